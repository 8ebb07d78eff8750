//! Prompts equal those of transformers' `apply_chat_template`, recorded in `fixtures/text/chat_cases.json`.

use std::path::PathBuf;

use qwenkit_text::{ChatInput, ChatTemplate};
use serde_json::Value;

fn fixture(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/text").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn input(case: &Value) -> ChatInput {
    ChatInput {
        messages: case["messages"].clone(),
        tools: case.get("tools").cloned(),
        add_generation_prompt: case.get("add_generation_prompt").and_then(Value::as_bool).unwrap_or(true),
        kwargs: case.get("kwargs").and_then(Value::as_object).cloned().unwrap_or_default(),
        ..ChatInput::default()
    }
}

#[test]
fn all_sixty_conversations_render_as_in_transformers() {
    let cases: Vec<Value> = serde_json::from_str(&fixture("chat_cases.json")).unwrap();
    assert_eq!(cases.len(), 60);
    for (index, case) in cases.iter().enumerate() {
        let name = format!("{}.jinja", case["template"].as_str().unwrap());
        let template = ChatTemplate::new(&fixture(&name), &name).unwrap();
        let prompt = template.render(&input(case)).unwrap_or_else(|error| panic!("case {index}, {name}: {error}"));
        assert_eq!(prompt, case["expected"].as_str().unwrap(), "case {index}, {name}");
    }
}

#[test]
fn arguments_given_as_json_text_render_as_the_object() {
    let cases: Vec<Value> = serde_json::from_str(&fixture("chat_cases.json")).unwrap();
    let mut changed = 0;
    for case in cases {
        let name = format!("{}.jinja", case["template"].as_str().unwrap());
        let template = ChatTemplate::new(&fixture(&name), &name).unwrap();
        let mut input = input(&case);
        for message in input.messages.as_array_mut().unwrap() {
            for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
                let function = if call.get("function").is_some() { &mut call["function"] } else { call };
                function["arguments"] = Value::String(serde_json::to_string(&function["arguments"]).unwrap());
                changed += 1;
            }
        }
        assert_eq!(template.render(&input).unwrap(), case["expected"].as_str().unwrap(), "{name}");
    }
    assert!(changed >= 5, "only {changed} calls in the fixture");
}
