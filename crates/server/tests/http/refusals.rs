//! What is wrong is refused by name, and nobody else notices.

use std::io::{Read, Write};

use serde_json::{Value, json};

use crate::client::{Reply, model, serve, serve_with};

/// A request for a short answer with something added to it.
fn with(extra: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[test]
fn a_parameter_is_obeyed_or_refused_by_name() {
    let server = serve();
    let cases = [
        (json!({"temprature": 1}), "temprature", "did you mean `temperature`"),
        (json!({"zzz": {"a": 1}}), "zzz", "no parameter"),
        (json!({"temperature": "hot"}), "temperature", "\"hot\""),
        (json!({"temperature": -1}), "temperature", "-1"),
        (json!({"top_p": 2.5}), "top_p", "2.5"),
        (json!({"n": 0}), "n", "1 to"),
        (json!({"n": 1.5}), "n", "1.5"),
        (json!({"max_tokens": 5, "max_completion_tokens": 6}), "max_tokens", "give one of them"),
        (json!({"max_tokens": "five"}), "max_tokens", "whole number"),
        (json!({"stop": 5}), "stop", "list of strings"),
        (json!({"stop": vec!["x"; 10_000]}), "stop", "10000"),
        (json!({"stop": ["y".repeat(5_000)]}), "stop[0]", "5000 characters"),
        (json!({"logit_bias": {"abc": 1}}), "logit_bias", "abc"),
        (json!({"logit_bias": {"99999999": 1}}), "messages", "vocabulary"),
        (json!({"top_logprobs": 3}), "top_logprobs", "needs `logprobs`"),
        (json!({"logprobs": true, "top_logprobs": 50}), "top_logprobs", "20"),
        (json!({"stream_options": {"include_usag": true}}), "stream_options.include_usag", "include_usage"),
        (json!({"audio": {"voice": "x"}}), "audio", "not supported"),
        (json!({"store": true}), "store", "not supported"),
        (json!({"messages": "Hi"}), "messages", "a list"),
        (json!({"messages": []}), "messages", "0 entries"),
        (json!({"messages": [5]}), "messages[0]", "an object"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), "messages[0].role", "robot"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content", "missing"),
        (json!({"messages": [{"role": "user", "content": "x", "colour": 1}]}), "messages[0].colour", "no parameter"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}),
            "messages[0].content[0].type",
            "text only",
        ),
        (json!({"tools": [{"type": "robot"}]}), "tools[0].type", "robot"),
        (json!({"tool_choice": "required"}), "tool_choice", "no tools"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type", "xml"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.schema", "missing"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}),
            "response_format",
            "cannot be followed",
        ),
        (json!({"guided_regex": "("}), "guided_regex", "cannot be followed"),
        (json!({"guided_choice": []}), "guided_choice", "nothing to choose"),
        (json!({"guided_choice": ["a"], "guided_regex": "a"}), "guided_choice", "one of them"),
        (json!({"structured_outputs": {"xml": 1}}), "structured_outputs.xml", "no parameter"),
        (json!({"enable_thinking": true}), "enable_thinking", "does not think"),
        (json!({"enable_thinking": true, "think": false}), "think", "contradict"),
        (json!({"reasoning_effort": "huge"}), "reasoning_effort", "huge"),
        (json!({"chat_template_kwargs": {"messages": []}}), "messages", "keyword arguments"),
    ];
    for (extra, param, told) in cases {
        let error = server.refused("/v1/chat/completions", &with(extra.clone()), 400);
        assert_eq!(error["param"], param, "{extra}: {error}");
        assert!(error["message"].as_str().unwrap().contains(told), "{extra}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    for extra in [
        json!({"user": "u1", "metadata": {"a": "b"}, "store": false, "temperature": null, "seed": -5, "top_k": -1}),
        json!({"max_tokens": null, "max_completion_tokens": 2.0, "stop": null, "parallel_tool_calls": true}),
        json!({"repetition_penalty": 1.1, "min_p": 0.05, "chat_template_kwargs": {"x": 1}, "enable_thinking": false}),
    ] {
        server.post("/v1/chat/completions", &with(extra)).ok();
    }
}

#[test]
fn what_is_no_request_is_told_so() {
    let server = serve();
    let raw = |body: &[u8]| Reply::read(server.send("POST", "/v1/chat/completions", "", body));
    for body in [&b""[..], b"{", b"[1,2]", b"null", b"{\"messages\": \"\xff\xfe\"}", b"\x00\x01", &[b'['; 100_000]] {
        let reply = raw(body);
        assert_eq!(reply.status, 400, "{}", reply.text());
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains("request"), "{}", reply.text());
    }
    let large = vec![b' '; 3 << 20];
    assert_eq!(raw(&large).status, 413);
    assert_eq!(server.get("/v1/chat/completions").status, 405);
    assert_eq!(server.get("/v1/nothing").json()["error"]["type"], "invalid_request_error");
    assert_eq!(server.get("/web/../Cargo.toml").status, 404);
    let error = server.refused("/v1/chat/completions", &with(json!({"model": "gpt-4"})), 404);
    assert!(error["code"] == "model_not_found" && error["message"].as_str().unwrap().contains("qwen2"));
    server.post("/v1/chat/completions", &with(json!({"model": "qwen2-alias"}))).ok();
    server.post("/v1/chat/completions", &with(json!({}))).ok();
}

#[test]
fn a_prompt_that_is_too_long_is_one_requests_error() {
    let server = serve_with(vec![model("qwen2", 256, 64)], &[]);
    let long = with(json!({"messages": [{"role": "user", "content": "word ".repeat(3_000)}]}));
    let error = server.refused("/v1/chat/completions", &long, 400);
    assert_eq!(error["code"], "context_length_exceeded");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("256") && message.contains("--ctx"), "{message}");
    server.post("/v1/chat/completions", &with(json!({}))).ok();
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let server = serve_with(vec![model("qwen2", 2048, 2)], &[]);
    let body = json!({"prompt": vec!["x"; 40], "max_tokens": 1});
    let reply = server.post("/v1/completions", &body);
    assert_eq!(reply.status, 429, "{}", reply.text());
    assert!(reply.head.contains("retry-after: "));
    assert!(reply.text().contains("40 more") && reply.text().contains("2 may"), "{}", reply.text());
    // All of them were refused: nothing runs for a client that was told to come again.
    assert_eq!(server.get("/v1/loads").ok()["loads"][0]["running"], 0);
    server.post("/v1/chat/completions", &with(json!({}))).ok();
}

#[test]
fn keys_open_the_server() {
    let server = serve_with(vec![model("qwen2", 512, 64)], &["secret", "other"]);
    let ask = |headers: &str| {
        let body = with(json!({})).to_string();
        Reply::read(server.send("POST", "/v1/chat/completions", headers, body.as_bytes()))
    };
    assert_eq!(ask("").json()["error"]["code"], "invalid_api_key");
    assert_eq!(ask("authorization: Bearer wrong\r\n").status, 401);
    assert_eq!(ask("authorization: Basic secret\r\n").status, 401);
    assert_eq!(ask("authorization: Bearer secret\r\n").status, 200);
    assert_eq!(ask("x-api-key: other\r\n").status, 200);
    assert_eq!(server.get("/v1/models").status, 401);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/").status, 200);
}

#[test]
fn connections_that_go_nowhere_hold_up_nobody() {
    let server = serve();
    let mut half_open = Vec::new();
    for start in [&b""[..], b"POST", b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{"] {
        for _ in 0..20 {
            let mut stream = server.connect();
            stream.write_all(start).unwrap();
            half_open.push(stream);
        }
    }
    let mut garbage = server.connect();
    garbage.write_all(b"\x16\x03\x01 this is no HTTP\r\n\r\n").unwrap();
    let mut answer = String::new();
    let _ = garbage.read_to_string(&mut answer);
    server.post("/v1/chat/completions", &with(json!({}))).ok();
    drop(half_open);
    server.post("/v1/chat/completions", &with(json!({}))).ok();
}

#[test]
fn who_sends_far_too_much_hears_why_after_sending_it() {
    let server = serve();
    // Six times the limit, all of it sent before the answer is read.
    let reply = Reply::read(server.send("POST", "/v1/completions", "", &vec![b'x'; 6 << 20]));
    assert_eq!((reply.status, reply.json()["error"]["type"].as_str()), (413, Some("invalid_request_error")));
}
