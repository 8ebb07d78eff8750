//! The interfaces beside OpenAI's chat: vectors, ranks, Anthropic's messages, Ollama's lines - what comes, what is refused.

use serde_json::{Value, json};

use crate::client::{Reply, Running, model_at, serve, serve_with, thinking_checkpoint};

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn vectors_have_length_one_and_do_not_depend_on_company() {
    let server = serve();
    let alone = server.post("/v1/embeddings", &json!({"model": "qwen2", "input": "one text"})).ok();
    let vector = floats(&alone["data"][0]["embedding"]);
    assert!((vector.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5);
    let many = server.post("/v1/embeddings", &json!({"input": ["another", "one text", "a third, longer text"]})).ok();
    assert_eq!(floats(&many["data"][1]["embedding"]), vector);
    let short = server.post("/v1/embeddings", &json!({"input": "one text", "dimensions": 32})).ok();
    let short = floats(&short["data"][0]["embedding"]);
    assert_eq!(short.len(), 32);
    let ratio = short[0] / vector[0];
    assert!(short.iter().zip(&vector).all(|(a, b)| (a - b * ratio).abs() < 1e-5), "the same direction, cut off");
    let encoded = server.post("/v1/embeddings", &json!({"input": "one text", "encoding_format": "base64"})).ok();
    assert_eq!(encoded["data"][0]["embedding"].as_str().unwrap().len(), (vector.len() * 4).div_ceil(3) * 4);
    for (body, param, word) in [
        (json!({}), "input", "missing"),
        (json!({"input": []}), "input", "a list of 0"),
        (json!({"input": ""}), "input", "no tokens"),
        (json!({"input": {"a": 1}}), "input", "object"),
        (json!({"input": ["a", 3]}), "input[1]", "3"),
        (json!({"input": [1, 99_999_999]}), "input", "99999999"),
        (json!({"input": "x ".repeat(5000)}), "input", "context"),
        (json!({"input": "x", "dimensions": 1}), "dimensions", "32"),
        (json!({"input": "x", "encoding_format": "int4"}), "encoding_format", "int4"),
        (json!({"input": "x", "colour": 1}), "colour", "no parameter"),
    ] {
        let error = server.refused("/v1/embeddings", &body, 400);
        assert!(error["param"] == param && error["message"].as_str().unwrap().contains(word), "{body}: {error}");
    }
}

#[test]
fn ranking_needs_the_words_it_judges_by() {
    // This vocabulary has no token for yes: silence would be nonsense.
    let error = serve().refused("/v1/rerank", &json!({"query": "q", "documents": ["d"]}), 400);
    assert!(error["message"].as_str().unwrap().contains("no token"), "{error}");
}

#[test]
fn documents_come_in_the_order_of_their_fit() {
    let folder = thinking_checkpoint();
    let path = folder.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("<|reserved_290|>", "yes").replace("<|reserved_291|>", "no")).unwrap();
    let server = serve_with(vec![model_at(folder.path(), "ranker", 2048, 64)], &[]);
    let documents = json!(["a", {"text": "bb"}, "ccc"]);
    let ranked = server.post("/v1/rerank", &json!({"query": "q", "documents": documents, "top_n": 2})).ok();
    let results = ranked["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    assert!(results[0]["relevance_score"].as_f64() >= results[1]["relevance_score"].as_f64());
    let scored = server.post("/v1/score", &json!({"text_1": "q", "text_2": ["a", "bb", "ccc"]})).ok();
    for result in results {
        let i = result["index"].as_u64().unwrap() as usize;
        assert_eq!(result["relevance_score"], scored["data"][i]["score"]);
        assert_eq!(result["document"]["text"], ["a", "bb", "ccc"][i]);
    }
    let error = server.refused("/v1/score", &json!({"text_1": ["a", "b"], "text_2": ["c"]}), 400);
    assert_eq!(error["param"], "text_2");
    assert_eq!(server.refused("/v1/rerank", &json!({"query": "q", "documents": []}), 400)["param"], "documents");
}

fn thinker() -> (tempfile::TempDir, Running) {
    let folder = thinking_checkpoint();
    let server = serve_with(vec![model_at(folder.path(), "thinker", 2048, 64)], &[]);
    (folder, server)
}

/// The events of a stream with their names.
fn named_events(reply: &Reply) -> Vec<(String, Value)> {
    assert_eq!(reply.status, 200, "{}", reply.text());
    let text = reply.text();
    let mut events = Vec::new();
    for block in text.split("\n\n").filter(|block| block.starts_with("event: ")) {
        let (name, data) = block.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(data["type"], name.strip_prefix("event: ").unwrap());
        events.push((name["event: ".len()..].to_owned(), data));
    }
    events
}

#[test]
fn messages_come_whole_and_as_events_that_say_the_same() {
    let (_folder, server) = thinker();
    let body = json!({
        "model": "thinker", "max_tokens": 24, "temperature": 0.8, "thinking": {"type": "disabled"},
        "system": [{"type": "text", "text": "x-client-header: a=17;\nBe kind.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    });
    let mut body = body;
    body["temperature"] = json!(0);
    let whole = server.post("/v1/messages", &body).ok();
    assert_eq!(
        (&whole["type"], &whole["role"], &whole["stop_reason"]),
        (&json!("message"), &json!("assistant"), &json!("max_tokens"))
    );
    let text = whole["content"][0]["text"].as_str().unwrap();
    body["stream"] = json!(true);
    let events = named_events(&server.post("/v1/messages", &body));
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).filter(|name| *name != "ping").collect();
    assert_eq!((names[0], names[1]), ("message_start", "content_block_start"));
    assert_eq!(&names[names.len() - 3..], ["content_block_stop", "message_delta", "message_stop"]);
    let told: String = events.iter().filter_map(|(_, data)| data["delta"]["text"].as_str()).collect();
    assert_eq!(told, text);
    let last = &events[events.len() - 2].1;
    assert_eq!(last["usage"]["output_tokens"], whole["usage"]["output_tokens"]);
    // A header that changes with each request changes nothing of the prompt.
    let count = |header: &str| {
        let mut body = json!({"model": "thinker", "messages": [{"role": "user", "content": "Hi"}]});
        body["system"] = json!(format!("{header}Be kind."));
        server.post("/v1/messages/count_tokens", &body).ok()["input_tokens"].clone()
    };
    assert_eq!(count("x-client-header: a=17;\n"), count(""));
}

#[test]
fn calls_are_blocks_and_their_results_go_back() {
    let (_folder, server) = thinker();
    let tools = json!([{"name": "f", "input_schema": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}}]);
    let mut body = json!({
        "model": "thinker", "max_tokens": 200, "tools": tools, "tool_choice": {"type": "tool", "name": "f"},
        "thinking": {"type": "disabled"}, "messages": [{"role": "user", "content": "Hi"}],
    });
    let whole = server.post("/v1/messages", &body).ok();
    let call = &whole["content"][0];
    assert_eq!(
        (&call["type"], &call["name"], &whole["stop_reason"]),
        (&json!("tool_use"), &json!("f"), &json!("tool_use"))
    );
    assert!([1, 2].contains(&call["input"]["a"].as_i64().unwrap()));
    body["messages"] = json!([
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": "ok", "is_error": false}]},
    ]);
    body["tool_choice"] = json!({"type": "none"});
    body["max_tokens"] = json!(4);
    server.post("/v1/messages", &body).ok();
    for (change, word) in [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), "robot"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}), "text only"),
        (json!({"messages": "x"}), "list"),
        (json!({"tool_choice": {"type": "tool", "name": "g"}}), "\"g\""),
        (json!({"colour": 1}), "colour"),
    ] {
        let mut bad = body.clone();
        for (key, value) in change.as_object().unwrap() {
            bad[key] = value.clone();
        }
        let reply = server.post("/v1/messages", &bad);
        let error = reply.json();
        assert_eq!(
            (reply.status, &error["type"], &error["error"]["type"]),
            (400, &json!("error"), &json!("invalid_request_error"))
        );
        assert!(error["error"]["message"].as_str().unwrap().contains(word), "{error}");
    }
}

#[test]
fn an_answer_that_has_begun_is_gone_on_with() {
    let (_folder, server) = thinker();
    let body = |begun: &str| {
        json!({
            "model": "thinker", "max_tokens": 6,
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": begun}],
        })
    };
    let count = |begun: &str| server.post("/v1/messages", &body(begun)).ok()["usage"]["input_tokens"].as_u64().unwrap();
    // Each longer beginning is found in the cache or read; together they grow by its tokens alone.
    let total = |begun: &str| {
        let usage = server.post("/v1/messages", &body(begun)).ok()["usage"].clone();
        usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap()
    };
    assert!(count("x") > 0);
    assert!(total("{\"name\": \"a b c d e f\"") > total("{"));
}

fn lines(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(reply.head.contains("application/x-ndjson"), "{}", reply.head);
    reply.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn lines_of_ollama_say_what_the_whole_answer_says() {
    let (_folder, server) = thinker();
    let options = json!({"temperature": 0, "num_predict": 12, "num_ctx": 2048});
    let mut body = json!({
        "model": "thinker:latest", "stream": false, "think": false, "options": options,
        "messages": [{"role": "user", "content": "Hi"}],
    });
    let whole = server.post("/api/chat", &body).ok();
    assert_eq!(
        (&whole["done"], &whole["eval_count"], &whole["done_reason"]),
        (&json!(true), &json!(12), &json!("length"))
    );
    body.as_object_mut().unwrap().remove("stream");
    let parts = lines(&server.post("/api/chat", &body));
    let told: String = parts.iter().map(|part| part["message"]["content"].as_str().unwrap()).collect();
    assert_eq!(told, whole["message"]["content"].as_str().unwrap());
    assert_eq!(parts.last().unwrap()["eval_count"], 12);
    let shaped = json!({
        "model": "thinker", "stream": false, "think": false, "prompt": "Hi", "options": {"num_predict": 100},
        "format": {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": false},
    });
    assert_eq!(server.post("/api/generate", &shaped).ok()["response"], "{\"a\": \"x\"}");
    let raw = json!({"model": "thinker", "prompt": "def ", "raw": true, "options": {"num_predict": 3}});
    assert_eq!(lines(&server.post("/api/generate", &raw)).last().unwrap()["done"], true);
    assert_eq!(server.post("/api/generate", &json!({"model": "thinker"})).ok()["done_reason"], "load");
    assert_eq!(server.get("/api/tags").ok()["models"][0]["name"], "thinker");
    assert_eq!(server.get("/api/ps").ok()["models"].as_array().unwrap().len(), 1);
    assert_eq!(
        server.post("/api/show", &json!({"model": "thinker"})).ok()["model_info"]["general.architecture"],
        "qwen3"
    );
    let found = server.post("/api/embed", &json!({"model": "thinker", "input": ["a", "b"], "truncate": true})).ok();
    assert_eq!(found["embeddings"].as_array().unwrap().len(), 2);
    for (path, body, status) in [
        ("/api/chat", json!({"model": "nobody", "messages": []}), 404),
        ("/api/chat", json!({"model": "thinker", "messages": [{"role": "x", "content": ""}]}), 400),
        ("/api/chat", json!({"model": "thinker", "messages": [{"role": "user", "images": ["AA"]}]}), 400),
        ("/api/generate", json!({"model": "thinker", "prompt": "x", "options": {"colour": 1}}), 400),
        ("/api/generate", json!({"model": "thinker", "prompt": "x", "format": "xml"}), 400),
        ("/api/embed", json!({"model": "thinker"}), 400),
        ("/api/show", json!({}), 400),
    ] {
        let reply = server.post(path, &body);
        assert_eq!(reply.status, status, "{path} {body}: {}", reply.text());
        assert!(reply.json()["error"].as_str().is_some_and(|error| !error.is_empty()), "{}", reply.text());
    }
}

#[test]
fn a_line_that_changes_with_each_request_costs_nothing() {
    let (_folder, server) = thinker();
    let rules = "You are an agent that reads files and answers. ".repeat(12);
    let usage = |cch: &str, as_block: bool, rules: &str| {
        let header = format!("x-anthropic-billing-header: cc_version=2.1.15; cc_entrypoint=cli; cch={cch};");
        let system = match as_block {
            true => {
                json!([{"type": "text", "text": header}, {"type": "text", "text": rules, "cache_control": {"type": "ephemeral"}}])
            }
            false => json!(format!("{header}\n{rules}")),
        };
        let messages = json!([{"role": "user", "content": "Hi"}]);
        let body = json!({"model": "thinker", "max_tokens": 2, "system": system, "messages": messages});
        let usage = server.post("/v1/messages", &body).ok()["usage"].clone();
        (usage["cache_read_input_tokens"].as_u64().unwrap(), usage["input_tokens"].as_u64().unwrap())
    };
    let (cached, read) = usage("a0000", true, &rules);
    assert!(cached < 64 && read > 100, "{cached} {read}");
    // All but the last token, whose logits are wanted.
    assert_eq!(usage("b1111", true, &rules), (cached + read - 1, 1));
    assert_eq!(usage("c2222", false, &rules), (cached + read - 1, 1));
}

#[test]
fn what_a_tool_gave_stays_as_it_is() {
    let (_folder, server) = thinker();
    let count = |result: Value, system: &str| {
        let messages = json!([
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": result}]},
        ]);
        let body = json!({"model": "thinker", "system": system, "messages": messages});
        server.post("/v1/messages/count_tokens", &body).ok()["input_tokens"].as_u64().unwrap()
    };
    let headers = "x-cache: HIT\nx-served-by: one";
    let blocks = json!([{"type": "text", "text": headers}]);
    let without = count(json!("body"), "Be kind.");
    assert!(count(json!(format!("{headers}\nbody")), "Be kind.") > without + 10);
    assert!(count(blocks, "Be kind.") > count(json!(""), "Be kind.") + 10);
    assert_eq!(count(json!("body"), &format!("{headers}\nBe kind.")), without);
}
