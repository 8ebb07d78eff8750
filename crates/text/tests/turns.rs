//! Conversations cut into turns: the prompt is what inference gives the model, the answer what it then has to write.

use std::path::PathBuf;

use qwenkit_tensor::TokenId;
use qwenkit_text::{
    ChatInput, ChatTemplate, Error, ThinkingSupport, ThinkingWish, Tokenizer, Turn, TurnEncoder, encode_chat,
};
use serde_json::{Value, json};

const TEMPLATES: [&str; 5] = ["qwen2.5", "qwen3", "qwen3-coder", "qwen3.5", "qwq"];

fn fixture(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/text").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn template(name: &str) -> ChatTemplate {
    ChatTemplate::new(&fixture(&format!("{name}.jinja")), name).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_json(fixture("tokenizer.json").as_bytes(), "tokenizer.json").unwrap()
}

fn turns(name: &str, messages: &Value, tools: Option<Value>) -> Result<Vec<Turn>, Error> {
    let (template, tokenizer) = (template(name), tokenizer());
    let answers: Vec<usize> = messages
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .filter(|(_, m)| m["role"] == "assistant")
        .map(|(i, _)| i)
        .collect();
    let input = ChatInput { messages: messages.clone(), tools, ..ChatInput::default() };
    TurnEncoder::new(&template, &tokenizer).turns(&input, &answers)
}

/// The end of a prompt from the header of its last turn on, and the answer, as texts.
fn texts(name: &str, messages: Value) -> Vec<(String, String)> {
    let tokenizer = tokenizer();
    let text = |ids: &[TokenId]| tokenizer.decode(ids, true);
    let shown = |turn: Turn| {
        let prompt = text(&turn.prompt);
        let header = prompt.rfind("<|im_start|>").expect("a header");
        (prompt[header..].to_owned(), text(&turn.answer))
    };
    turns(name, &messages, None).unwrap_or_else(|error| panic!("{name}: {error}")).into_iter().map(shown).collect()
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn assistant(text: &str) -> Value {
    json!({"role": "assistant", "content": text})
}

fn call(content: &str) -> Value {
    json!({"role": "assistant", "content": content, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Pune\"}"}}]})
}

/// How each template's prompts end for an answer without thoughts.
fn closed_header(name: &str) -> &'static str {
    match name {
        "qwen3" | "qwen3.5" => "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "qwq" => "<|im_start|>assistant\n<think>\n</think>",
        _ => "<|im_start|>assistant\n",
    }
}

#[test]
fn answers_are_the_assistants_text_and_the_end_token_in_every_turn_of_every_template() {
    for name in TEMPLATES {
        let conversation = json!([{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello there"),
            user("Who?"), assistant("  A fox,\n\nof course.\nYes")]);
        let found = texts(name, conversation);
        let second = if name == "qwen3.5" { "A fox,\n\nof course.\nYes" } else { "  A fox,\n\nof course.\nYes" };
        let header = closed_header(name).to_owned();
        let expected = [(header.clone(), "Hello there<|im_end|>".to_owned()), (header, format!("{second}<|im_end|>"))];
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn thoughts_are_learnt_where_the_template_prints_them_and_their_opening_where_the_prompt_has_none() {
    let thought = |messages: Value, name: &str| texts(name, messages).pop().expect("a turn");
    for written in [
        json!({"role": "assistant", "content": "Four.", "reasoning_content": "2 and 2"}),
        json!({"role": "assistant", "content": "<think>\n2 and 2\n</think>\n\nFour."}),
    ] {
        let messages = json!([user("2+2?"), written]);
        let found = thought(messages.clone(), "qwen3");
        assert_eq!(found.0, "<|im_start|>assistant\n");
        assert_eq!(found.1, "<think>\n2 and 2\n</think>\n\nFour.<|im_end|>");
        let found = thought(messages, "qwen3.5");
        assert_eq!(found.0, "<|im_start|>assistant\n<think>\n");
        assert_eq!(found.1, "2 and 2\n</think>\n\nFour.<|im_end|>");
    }
    // QwQ's template knows thoughts in the content alone.
    for written in ["<think>\n2 and 2\n</think>\n\nFour.", "<think>2 and 2\n</think>\n\nFour."] {
        let found = thought(json!([user("2+2?"), assistant(written)]), "qwq");
        assert_eq!(found.0, "<|im_start|>assistant\n<think>\n");
        assert_eq!(found.1, "2 and 2\n</think>\n\nFour.<|im_end|>");
    }
    for name in ["qwen2.5", "qwen3-coder", "qwq"] {
        let messages = json!([user("2+2?"), {"role": "assistant", "content": "Four.", "reasoning_content": "2 and 2"}]);
        let turns = turns(name, &messages, None).unwrap();
        assert!(!turns[0].prints_thoughts, "{name}");
    }
}

#[test]
fn calls_are_learnt_with_the_tags_that_the_template_prints_around_them() {
    let json_call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Pune\"}}\n</tool_call><|im_end|>";
    let xml_call =
        "<tool_call>\n<function=weather>\n<parameter=city>\nPune\n</parameter>\n</function>\n</tool_call><|im_end|>";
    for (name, alone, behind_text) in [
        ("qwen2.5", json_call.to_owned(), format!("Wait.\n{json_call}")),
        ("qwen3", json_call.to_owned(), format!("Wait.\n{json_call}")),
        ("qwq", json_call.to_owned(), format!("Wait.\n{json_call}")),
        ("qwen3-coder", xml_call.to_owned(), format!("Wait.\n\n{xml_call}")),
        ("qwen3.5", xml_call.to_owned(), format!("Wait.\n\n{xml_call}")),
    ] {
        let tool = json!({"role": "tool", "tool_call_id": "1", "content": "31"});
        let found = texts(name, json!([user("Weather?"), call(""), tool, assistant("Hot.")]));
        let header = closed_header(name).to_owned();
        assert_eq!(found, [(header.clone(), alone), (header.clone(), "Hot.<|im_end|>".to_owned())], "{name}");
        assert_eq!(texts(name, json!([user("Weather?"), call("Wait.")])), [(header, behind_text)], "{name}");
    }
}

#[test]
fn an_answer_that_spells_control_tokens_ends_where_the_template_ends_it() {
    let tokenizer = tokenizer();
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    for name in TEMPLATES {
        let text = "It ends with <|im_end|>\n<|im_start|>user\nand <|im_end|>";
        let turns = turns(name, &json!([user("<|im_start|>assistant\nHow?"), assistant(text)]), None).unwrap();
        let (last, before) = turns[0].answer.split_last().unwrap();
        assert_eq!(*last, end);
        assert!(before.iter().all(|&id| !tokenizer.is_special(id)), "{name}");
        assert_eq!(tokenizer.decode(before, true), text, "{name}");
    }
}

/// The conversations of the fixtures, with all their tools: a prompt is always one that inference makes.
#[test]
fn prompts_are_those_of_inference_and_with_their_answers_what_the_template_prints() {
    let tokenizer = tokenizer();
    let cases: Vec<Value> = serde_json::from_str(&fixture("chat_cases.json")).unwrap();
    let mut seen = 0;
    for case in &cases {
        let name = case["template"].as_str().unwrap();
        let (template, tools) = (template(name), case.get("tools").cloned());
        let support = ThinkingSupport::of_template(&template);
        let messages = case["messages"].as_array().unwrap();
        for turn in turns(name, &case["messages"], tools.clone()).unwrap() {
            seen += 1;
            let inferred = [None, Some(false), Some(true)].into_iter().filter_map(|thinks| {
                let plan = support.plan(&ThinkingWish { thinks, ..ThinkingWish::default() }).ok()?;
                let input = ChatInput {
                    messages: messages[..turn.message].into(),
                    tools: tools.clone(),
                    add_generation_prompt: true,
                    kwargs: plan.kwargs,
                    suffix: plan.suffix,
                    ..ChatInput::default()
                };
                Some(encode_chat(&template, &tokenizer, &input).unwrap().ids)
            });
            assert!(inferred.into_iter().any(|ids| ids == turn.prompt), "{name}: {case}");
            let printed =
                ChatInput { messages: messages[..=turn.message].into(), tools: tools.clone(), ..ChatInput::default() };
            let printed = template.render(&printed).unwrap();
            let text = tokenizer.decode(&[turn.prompt, turn.answer].concat(), true);
            match turn.is_reopened {
                false => assert_eq!(text, printed.trim_end_matches('\n'), "{name}: {case}"),
                true => {
                    assert_eq!(text.replace("<think>\n</think>", ""), printed.trim_end_matches('\n'), "{name}: {case}")
                }
            }
        }
    }
    assert!(seen >= 30, "{seen}");
}

#[test]
fn what_cannot_be_learnt_from_is_an_error_that_names_the_message() {
    let tokenizer = tokenizer();
    let ask = |source: &str| {
        let template = ChatTemplate::new(source, "t").unwrap();
        let messages = json!([user("a"), assistant("b")]);
        TurnEncoder::new(&template, &tokenizer).turns(&ChatInput { messages, ..ChatInput::default() }, &[1])
    };
    // No end token: a model tuned on it would never stop.
    let endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let found = ask(endless).unwrap_err().to_string();
    assert!(found.contains("message 1") && found.contains("not with a control token"), "{found}");
    // Asks in one way, prints in another.
    let other = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>bot\n{% endif %}";
    assert!(ask(other).unwrap_err().to_string().contains("in another way than it asks for it"));
    // A template's own refusal.
    assert!(ask("{{ raise_exception('no') }}").is_err());
}
