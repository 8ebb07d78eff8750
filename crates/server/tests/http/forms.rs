//! Answers held to a form by a model that, left alone, writes noise: what comes is what was asked for.

use serde_json::{Value, json};

use crate::client::{Running, model_at, serve_with, thinking_checkpoint};

fn thinking_server() -> (tempfile::TempDir, Running) {
    let folder = thinking_checkpoint();
    let server = serve_with(vec![model_at(folder.path(), "thinker", 2048, 64)], &[]);
    (folder, server)
}

fn question(extra: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "seed": 7, "max_tokens": 200});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": false,
    })
}

fn assert_fits(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
    assert!(value["ok"].is_boolean() && ["a", "b"].contains(&value["kind"].as_str().unwrap()), "{text}");
    assert_eq!(value.as_object().unwrap().len(), 2);
}

#[test]
fn json_comes_with_and_without_thoughts_and_in_pieces() {
    let (_folder, server) = thinking_server();
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema()}});
    for seed in 0..4 {
        let body = json!({"response_format": format, "enable_thinking": false, "seed": seed});
        let answer = server.post("/v1/chat/completions", &question(body)).ok();
        assert_fits(answer["choices"][0]["message"]["content"].as_str().unwrap());
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
    // The bias has the model open a thought, and never end it.
    let bias = json!({"278": 100.0});
    let body = json!({
        "response_format": format, "thinking_budget": 9, "seed": 3, "reasoning_effort": "low", "logit_bias": bias,
    });
    let answer = server.post("/v1/chat/completions", &question(body.clone())).ok();
    let message = &answer["choices"][0]["message"];
    assert_fits(message["content"].as_str().unwrap());
    assert!(message["reasoning_content"].as_str().unwrap().contains("long enough"), "{message}");
    let mut streamed = question(body);
    streamed["stream"] = json!(true);
    let mut text = String::new();
    for event in server.post("/v1/chat/completions", &streamed).events() {
        text.push_str(event["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
    }
    assert_eq!(text, message["content"].as_str().unwrap());
    for (extra, allowed) in [
        (json!({"guided_choice": ["red", "green"]}), vec!["red", "green"]),
        (json!({"structured_outputs": {"regex": "(yes|no)!"}}), vec!["yes!", "no!"]),
        (json!({"guided_grammar": "start: \"x\" | \"y\""}), vec!["x", "y"]),
    ] {
        let mut body = question(extra);
        body["think"] = json!(false);
        let answer = server.post("/v1/chat/completions", &body).ok();
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
        assert!(allowed.contains(&text), "{text}");
    }
}

fn tool(name: &str, strict: bool) -> Value {
    let parameters = json!({
        "type": "object",
        "properties": {"unit": {"type": "string", "enum": ["c", "f"]}, "days": {"type": "integer", "minimum": 1, "maximum": 5}},
        "required": ["unit", "days"],
        "additionalProperties": false,
    });
    json!({"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}})
}

#[test]
fn forced_calls_come_and_are_whole() {
    let (_folder, server) = thinking_server();
    let tools = json!([tool("weather", false), tool("climate", true)]);
    for (choice, thinks) in [
        (json!("required"), false),
        (json!({"type": "function", "function": {"name": "climate"}}), false),
        (json!({"type": "function", "function": {"name": "weather"}}), true),
    ] {
        let body = json!({
            "tools": tools, "tool_choice": choice, "enable_thinking": thinks, "thinking_budget": 5,
            "parallel_tool_calls": false, "logit_bias": {"278": if thinks { 100.0 } else { 0.0 }},
        });
        let answer = server.post("/v1/chat/completions", &question(body)).ok();
        let message = &answer["choices"][0]["message"];
        let calls = message["tool_calls"].as_array().unwrap_or_else(|| panic!("{message}"));
        assert_eq!((calls.len(), &answer["choices"][0]["finish_reason"]), (1, &json!("tool_calls")), "{message}");
        assert_eq!((message["content"].is_null(), message.get("reasoning_content").is_some()), (true, thinks));
        if let Some(name) = choice["function"]["name"].as_str() {
            assert_eq!(calls[0]["function"]["name"], name);
        }
        let arguments: Value = serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap();
        assert!(["c", "f"].contains(&arguments["unit"].as_str().unwrap()));
        assert!((1..=5).contains(&arguments["days"].as_i64().unwrap()));
    }
}

#[test]
fn tools_are_refused_where_the_template_knows_none_and_named_tools_must_exist() {
    let server = crate::client::serve();
    let body = question(json!({"tools": [tool("f", false)]}));
    let error = server.refused("/v1/chat/completions", &body, 400);
    assert!(error["param"] == "tools" && error["message"].as_str().unwrap().contains("not taught"), "{error}");
    let (_folder, server) = thinking_server();
    let body =
        question(json!({"tools": [tool("f", false)], "tool_choice": {"type": "function", "function": {"name": "g"}}}));
    assert_eq!(server.refused("/v1/chat/completions", &body, 400)["param"], "tool_choice");
    let bad = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}});
    let body = question(json!({"tools": [bad], "tool_choice": "required"}));
    assert_eq!(server.refused("/v1/chat/completions", &body, 400)["param"], "tool_choice");
}
