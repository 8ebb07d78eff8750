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

/// One interface: its path, its request for the form, and where its answer's text stands, whole and in events.
struct Interface {
    path: &'static str,
    body: fn(&Value) -> Value,
    whole: fn(&Value) -> String,
    delta: fn(&Value) -> Option<&str>,
}

const INTERFACES: [Interface; 3] = [
    Interface {
        path: "/v1/chat/completions",
        body: |schema| {
            let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
            json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "response_format": format})
        },
        whole: |reply| reply["choices"][0]["message"]["content"].as_str().unwrap().to_owned(),
        delta: |event| event["choices"][0]["delta"]["content"].as_str(),
    },
    Interface {
        path: "/v1/responses",
        body: |schema| {
            let format = json!({"type": "json_schema", "name": "x", "schema": schema});
            json!({"input": "Hi", "max_output_tokens": 300, "text": {"format": format}})
        },
        whole: |reply| {
            let items = reply["output"].as_array().unwrap();
            let message = items.iter().find(|item| item["type"] == "message").unwrap();
            message["content"][0]["text"].as_str().unwrap().to_owned()
        },
        delta: |event| event["delta"].as_str().filter(|_| event["type"] == "response.output_text.delta"),
    },
    Interface {
        path: "/v1/messages",
        body: |schema| {
            let format = json!({"type": "json_schema", "schema": schema});
            let messages = json!([{"role": "user", "content": "Hi"}]);
            json!({"model": "thinker", "messages": messages, "max_tokens": 300, "output_config": {"format": format}})
        },
        whole: |reply| {
            let blocks = reply["content"].as_array().unwrap();
            blocks.iter().find(|block| block["type"] == "text").unwrap()["text"].as_str().unwrap().to_owned()
        },
        delta: |event| event["delta"]["text"].as_str(),
    },
];

#[test]
fn a_form_holds_in_every_interface_with_thoughts_and_without_whole_and_in_pieces() {
    let (_folder, server) = thinking_server();
    for Interface { path, body, whole, delta } in INTERFACES {
        for thinks in [true, false] {
            let mut body = body(&schema());
            body["thinking"] = match thinks {
                true => json!({"type": "enabled", "budget_tokens": 9}),
                false => json!({"type": "disabled"}),
            };
            if path != "/v1/messages" {
                // Has the model open a thought where it may, and never end it.
                (body["seed"], body["logit_bias"]) = (json!(5), json!({"278": if thinks { 100 } else { 0 }}));
            }
            let reply = server.post(path, &body).ok();
            assert_fits(&whole(&reply));
            let ended = [
                &reply["usage"]["completion_tokens_details"]["thinking_ended"],
                &reply["usage"]["output_tokens_details"]["thinking_ended"],
            ];
            if path != "/v1/messages" {
                assert_eq!(ended.contains(&&json!("budget")), thinks, "{path}: {reply}");
            }
            body["stream"] = json!(true);
            let events = server.post(path, &body).text();
            let data = events.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
            let data: Vec<Value> = data.map(|data| serde_json::from_str(data).unwrap()).collect();
            assert_fits(&data.iter().filter_map(delta).collect::<String>());
        }
    }
}

#[test]
fn usage_says_that_a_thought_went_in_circles() {
    let (_folder, server) = thinking_server();
    let body = json!({"enable_thinking": true, "logit_bias": {"278": 100.0}, "max_tokens": 400});
    let answer = server.post("/v1/chat/completions", &question(body)).ok();
    assert_eq!(answer["usage"]["completion_tokens_details"]["thinking_ended"], "loop", "{answer}");
    let body = json!({"enable_thinking": false, "max_tokens": 4});
    let answer = server.post("/v1/chat/completions", &question(body)).ok();
    assert!(answer["usage"]["completion_tokens_details"].get("thinking_ended").is_none(), "{answer}");
}

#[test]
fn what_was_wrong_with_a_call_is_said_beside_the_answer() {
    let (_folder, server) = thinking_server();
    // The bias has the model begin a call and never come to its name.
    let mut body = question(json!({
        "tools": [tool("f", false)], "enable_thinking": false, "logit_bias": {"280": 100.0}, "max_tokens": 6
    }));
    let answer = server.post("/v1/chat/completions", &body).ok();
    let warnings = answer["choices"][0]["warnings"].as_array().unwrap_or_else(|| panic!("{answer}")).clone();
    assert!(!warnings.is_empty() && warnings.iter().all(Value::is_string), "{answer}");
    body["stream"] = json!(true);
    let events = server.post("/v1/chat/completions", &body).events();
    let told: Vec<&Value> = events.iter().filter_map(|event| event["choices"][0].get("warnings")).collect();
    assert_eq!(told, [&json!(warnings)], "in the last chunk alone");
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], answer["choices"][0]["finish_reason"]);
    let plain = server.post("/v1/chat/completions", &question(json!({"enable_thinking": false, "max_tokens": 6}))).ok();
    assert!(plain["choices"][0].get("warnings").is_none());
}
