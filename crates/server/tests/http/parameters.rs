//! Parameters of every interface: obeyed, or refused by name; and bodies that are none, at every path.

use serde_json::{Value, json};

use crate::client::{Reply, Running, model_at, serve, serve_with, thinking_checkpoint};

fn thinker() -> (tempfile::TempDir, Running) {
    let folder = thinking_checkpoint();
    let server = serve_with(vec![model_at(folder.path(), "thinker", 2048, 64)], &[]);
    (folder, server)
}

/// What a request is told: its status, and all of the error.
fn told(server: &Running, path: &str, body: &Value) -> (u16, String) {
    let reply = server.post(path, body);
    (reply.status, reply.text())
}

#[test]
fn what_would_be_ignored_is_refused_by_name() {
    let (_folder, server) = thinker();
    let user = |content: Value| json!([{"role": "user", "content": content}]);
    let text = |extra: (&str, Value)| {
        let mut part = json!({"type": "text", "text": "x"});
        part[extra.0] = extra.1;
        json!([part])
    };
    let chat = |extra: Value| ("/v1/chat/completions", json!({"messages": user(json!("x"))}), extra);
    let messages =
        |extra| ("/v1/messages", json!({"model": "thinker", "max_tokens": 2, "messages": user(json!("x"))}), extra);
    let responses = |extra| ("/v1/responses", json!({"input": "x", "max_output_tokens": 2}), extra);
    let generate = |options: Value| {
        ("/api/generate", json!({"model": "thinker", "prompt": "x", "stream": false}), json!({ "options": options }))
    };
    let embed =
        |options: Value| ("/api/embed", json!({"model": "thinker", "input": "x"}), json!({ "options": options }));
    for ((path, mut body, extra), word) in [
        (generate(json!({"num_ctx": 4096})), "options.num_ctx"),
        (generate(json!({"num_keep": 5})), "options.num_keep"),
        (generate(json!({"repeat_last_n": 64})), "options.repeat_last_n"),
        (embed(json!({"num_ctx": 4096})), "options.num_ctx"),
        (embed(json!({"temperature": 1})), "options.temperature"),
        (responses(json!({"include": ["message.output_text.logprobs"]})), "include[0]"),
        (responses(json!({"stream_options": {"colour": 1}})), "stream_options.colour"),
        (responses(json!({"truncation": "auto"})), "truncation"),
        (responses(json!({"reasoning": {"colour": 1}})), "reasoning.colour"),
        (responses(json!({"min_tokens": 3})), "min_tokens"),
        (
            messages(json!({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}})),
            "context_management.edits[0]",
        ),
        (messages(json!({"betas": ["x"]})), "betas"),
        (messages(json!({"service_tier": "priority"})), "service_tier"),
        (messages(json!({"thinking": {"type": "enabled", "budget_tokens": 9, "colour": 1}})), "thinking.colour"),
        (messages(json!({"messages": user(text(("colour", json!(1))))})), "messages[0].content[0].colour"),
        (chat(json!({"messages": user(text(("colour", json!(1))))})), "messages[0].content[0].colour"),
        (chat(json!({"reasoning": {"effort": "low", "exclude": true}})), "reasoning.exclude"),
        (chat(json!({"min_tokens": 5, "max_tokens": 4})), "min_tokens"),
    ] {
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        let (status, told) = told(&server, path, &body);
        assert!(status == 400 && told.contains(&format!("`{word}")), "{path} {extra}: {status} {told}");
    }
}

#[test]
fn what_is_so_anyway_is_taken() {
    let (_folder, server) = thinker();
    let edits = json!({"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]});
    let part = json!({"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "citations": null});
    for (path, body) in [
        (
            "/api/generate",
            json!({"model": "thinker", "prompt": "x", "stream": false,
            "options": {"num_ctx": 2048, "num_predict": 2, "repeat_last_n": -1, "num_keep": 0, "num_thread": 3}}),
        ),
        ("/api/embed", json!({"model": "thinker", "input": "x", "options": {"num_ctx": 512}})),
        (
            "/v1/responses",
            json!({"input": "x", "max_output_tokens": 2, "include": ["reasoning.encrypted_content"],
            "reasoning": {"summary": "auto"}, "truncation": "disabled", "stream_options": {"include_obfuscation": false}}),
        ),
        (
            "/v1/messages?beta=true",
            json!({"model": "thinker", "max_tokens": 2, "context_management": edits,
            "messages": [{"role": "user", "content": [part]}]}),
        ),
        (
            "/v1/chat/completions",
            json!({"max_tokens": 2, "messages": [{"role": "user", "content": [part]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "y", "annotations": [], "logprobs": []}]},
            {"role": "user", "content": "z"}]}),
        ),
    ] {
        server.post(path, &body).ok();
    }
}

#[test]
fn responses_are_generated_as_chats_are() {
    let server = serve();
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 30, "ignore_eos": true});
    let response = json!({"input": "Hi", "temperature": 0, "max_output_tokens": 30, "ignore_eos": true});
    let both = |extra: Value| {
        let (mut chat, mut response) = (chat.clone(), response.clone());
        for (name, value) in extra.as_object().unwrap() {
            (chat[name], response[name]) = (value.clone(), value.clone());
        }
        let chat = server.post("/v1/chat/completions", &chat).ok()["choices"][0]["message"]["content"].clone();
        let response = server.post("/v1/responses", &response).ok();
        let text = response["output"].get(0).map_or(json!(""), |item| item["content"][0]["text"].clone());
        assert_eq!(chat, text, "{extra}");
        text
    };
    let plain = both(json!({}));
    assert_ne!(both(json!({"repetition_penalty": 1.8})), plain);
    both(json!({"presence_penalty": 1.0, "frequency_penalty": 0.5}));
    both(json!({"logit_bias": {"40": 100}}));
    let stop: String = plain.as_str().unwrap().chars().skip(4).take(3).collect();
    assert_ne!(both(json!({"stop": [stop]})), plain);
    let background =
        server.post("/v1/responses", &json!({"input": "x", "background": true, "max_output_tokens": 2})).ok();
    assert_eq!(background["background"], true);
    assert_eq!(server.post("/v1/responses", &response).ok()["background"], false);
}

#[test]
fn an_answer_is_not_shorter_than_asked() {
    let server = serve();
    let ask = |extra: Value| {
        // The bias has the model end at once.
        let ends = server.post("/tokenize", &json!({"prompt": "<|im_end|>"})).ok()["tokens"][0].to_string();
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 20});
        body["logit_bias"] = json!({ ends: 100 });
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        let reply = server.post("/v1/chat/completions", &body).ok();
        (reply["usage"]["completion_tokens"].as_u64().unwrap(), reply["choices"][0]["finish_reason"].clone())
    };
    assert_eq!(ask(json!({})), (1, json!("stop")));
    assert_eq!(ask(json!({"min_tokens": 7})), (8, json!("stop")));
    assert_eq!(ask(json!({"min_tokens": 20})), (20, json!("length")));
    let text = json!({"prompt": "x", "min_tokens": 17, "seed": 1});
    assert!(server.post("/v1/completions", &text).ok()["usage"]["completion_tokens"].as_u64() >= Some(17));
}

#[test]
fn queries_are_read_strictly() {
    let server = serve();
    for (path, param) in [
        ("/v1/files?limit=abc", "limit"),
        ("/v1/files?limit=0", "limit"),
        ("/v1/batches?colour=1", "colour"),
        ("/v1/batches?limit=1&limit=2", "limit"),
        ("/v1/fine_tuning/jobs?order=up", "order"),
        ("/v1/models?order=asc", "order"),
    ] {
        let reply = server.get(path);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(param)), "{path}: {}", reply.text());
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains(param), "{}", reply.text());
    }
    assert_eq!(server.get("/v1/files?limit=5&order=asc&purpose=batch&after=").status, 400);
    for path in ["/v1/files?limit=5&order=asc&purpose=batch", "/v1/batches?limit=100", "/?from=elsewhere", "/health?x"]
    {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
}

/// Every path that takes a request, as the server itself lists them, with its request's schema.
fn post_paths(server: &Running) -> Vec<(String, Value)> {
    let document = server.get("/openapi.json").ok();
    let posts = document["paths"].as_object().unwrap().iter().filter_map(|(path, operations)| {
        let content = operations.get("post")?["requestBody"]["content"].clone();
        let path = path.replace("{id}", "x").replace("{name}", "qwen2");
        Some((path, content["application/json"]["schema"].clone()))
    });
    posts.collect()
}

#[test]
fn no_path_takes_what_is_no_request() {
    let server = serve();
    let posts = post_paths(&server);
    assert!(posts.len() > 25, "{}", posts.len());
    for (path, schema) in posts {
        let mut bodies: Vec<Vec<u8>> = [&b""[..], b"{", b"[]", b"\xff", b"null", b"7", b"\"x\"", b"{\"a\": \"\xff\"}"]
            .map(<[u8]>::to_vec)
            .to_vec();
        bodies.push([b"[".repeat(100_000), b"{".to_vec()].concat());
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let wrong = match property["type"].as_str() {
                Some("string") => json!({"a": [1]}),
                Some(_) => json!("\u{0}wrong"),
                None => json!(true),
            };
            bodies.push(json!({ name.as_str(): wrong }).to_string().into_bytes());
            bodies.push(json!({ name.as_str(): [[[{}]]] }).to_string().into_bytes());
        }
        for body in bodies {
            let reply = Reply::read(server.send("POST", &path, "content-type: application/json\r\n", &body));
            let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
            // A cancellation has no body, and there is nothing of this name to cancel.
            // Nor can this server fine-tune, which it says to whatever is sent.
            let is_off = path.starts_with("/v1/fine_tuning/") && reply.status == 501;
            assert!(is_off || (400..500).contains(&reply.status), "{path} {shown}: {} {}", reply.status, reply.text());
            let error = reply.json()["error"].clone();
            let message = error["message"].as_str().or(error.as_str());
            assert!(message.is_some_and(|message| !message.is_empty()), "{path} {shown}: {}", reply.text());
        }
    }
    server.post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1})).ok();
}

#[test]
fn every_request_is_described() {
    let server = serve();
    for (path, schema) in post_paths(&server) {
        let has_body = !["cancel", "pause", "resume", "/v1/files"].iter().any(|end| path.ends_with(end));
        let described = schema["properties"].as_object().is_some_and(|properties| !properties.is_empty());
        assert_eq!(described, has_body, "{path}: {schema}");
        for name in schema["required"].as_array().into_iter().flatten() {
            assert!(
                !schema["properties"][name.as_str().unwrap()].is_null(),
                "{path}: {name} must be there and is not described"
            );
        }
    }
}
