//! `tokenize --jsonl` and `template render --jsonl`: an answer for every line, whatever the lines hold.

use serde_json::{Value, json};

use crate::program::{Place, fixture};

fn lines(values: &[Value]) -> Vec<u8> {
    values.iter().map(|value| format!("{value}\n")).collect::<String>().into_bytes()
}

#[test]
fn every_line_of_text_gives_its_ids() {
    let place = Place::new();
    // `<|im_end|>` is token 2 of these tokenizers.
    let input = lines(&[json!({ "text": "Hello<|im_end|>" }), json!({ "text": "" }), json!({ "text": "Hello" })]);
    for model in ["parity/qwen2", "parity/qwen2/model.gguf"] {
        let outcome = place.run_with(&["tokenize", "--model", &fixture(model), "--jsonl"], &input).exits(0);
        let answers = outcome.json_lines();
        let ids = |i: usize| answers[i]["ids"].as_array().expect("ids").clone();
        assert_eq!((answers.len(), ids(1).len()), (3, 0), "{outcome:?}");
        let mut expected = ids(2);
        assert!(!expected.is_empty());
        expected.push(ids(0).last().expect("a control token").clone());
        assert_eq!(ids(0), expected);
        assert_eq!(ids(0).len(), ids(2).len() + 1, "the control token is one id");
    }
}

#[test]
fn text_as_an_argument_or_from_a_pipe_gives_a_list_for_other_commands() {
    let place = Place::new();
    let model = fixture("parity/qwen2");
    let given = place.run(&["tokenize", "--model", &model, "Hello you"]).exits(0);
    let piped = place.run_with(&["tokenize", "--model", &model], b"Hello you").exits(0);
    assert_eq!(given.out, piped.out);
    assert!(given.out.trim().split(',').all(|id| id.parse::<u32>().is_ok()), "{given:?}");
    place.run(&["tokenize", "--model", &model]).fails_with(2, &["there is no text"]);
}

#[test]
fn a_bad_line_is_answered_by_its_number_and_the_others_as_ever() {
    let place = Place::new();
    let input = b"{\"text\": \"a\"}\nnot json\n\n[1]\n{\"text\": 7}\n{\"text\": \"\xff\"}\n{\"text\": \"a\"}";
    let outcome = place.run_with(&["tokenize", "--model", &fixture("parity/qwen2"), "--jsonl"], input).exits(1);
    let answers = outcome.json_lines();
    assert_eq!(answers.len(), 7, "{outcome:?}");
    assert_eq!(answers[0], answers[6]);
    assert!(answers[0]["ids"].is_array());
    for (index, answer) in answers.iter().enumerate().take(6).skip(1) {
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(error.starts_with(&format!("line {}: ", index + 1)), "{answer}");
    }
    assert!(outcome.err.contains("5 of 7 lines"), "{outcome:?}");
}

#[test]
fn every_recorded_conversation_renders_as_recorded() {
    let place = Place::new();
    let text = std::fs::read_to_string(fixture("text/chat_cases.json")).expect("readable");
    let cases: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    let mut templates: Vec<&str> = cases.iter().filter_map(|case| case["template"].as_str()).collect();
    templates.sort_unstable();
    templates.dedup();
    assert!(templates.len() >= 3, "{templates:?}");
    for template in templates {
        let mine: Vec<&Value> = cases.iter().filter(|case| case["template"] == template).collect();
        let line = |case: &&Value| {
            let keys = ["messages", "tools", "add_generation_prompt", "kwargs"];
            keys.iter().filter_map(|&key| Some((key.to_owned(), case.get(key)?.clone()))).collect::<Value>()
        };
        let input = lines(&mine.iter().map(line).collect::<Vec<_>>());
        let file = fixture(&format!("text/{template}.jinja"));
        let outcome = place.run_with(&["template", "render", "--template", &file, "--jsonl"], &input).exits(0);
        let answers = outcome.json_lines();
        assert_eq!(answers.len(), mine.len());
        for (answer, case) in answers.iter().zip(mine) {
            assert_eq!(answer["text"], case["expected"], "{template}: {case}");
        }
    }
}

#[test]
fn a_template_that_refuses_has_answered_but_a_line_that_is_no_conversation_has_failed() {
    let place = Place::new();
    let file = place.path("refuses.jinja");
    std::fs::write(&file, "{{ raise_exception('no system, please') }}").expect("writable");
    let file = file.to_str().expect("a plain path");
    let args = ["template", "render", "--template", file, "--jsonl"];
    let good = json!({ "messages": [{ "role": "user", "content": "x" }] });
    let outcome = place.run_with(&args, &lines(std::slice::from_ref(&good))).exits(0);
    assert!(outcome.json()["error"].as_str().is_some_and(|error| error.contains("no system, please")), "{outcome:?}");
    let bad =
        [json!({}), json!({ "messages": "x" }), json!({ "messages": [1] }), json!({ "messages": [], "kwargs": 1 })];
    for bad in bad {
        let outcome = place.run_with(&args, &lines(&[good.clone(), bad])).exits(1);
        let answers = outcome.json_lines();
        assert_eq!(answers.len(), 2);
        assert!(answers[1]["error"].as_str().is_some_and(|error| error.starts_with("line 2: ")), "{outcome:?}");
    }
}

#[test]
fn keys_that_nothing_reads_are_said() {
    let place = Place::new();
    let file = fixture("text/qwen3.jinja");
    let input = lines(&[json!({ "messages": [{ "role": "user", "content": "x" }], "enable_thinking": false })]);
    let outcome = place.run_with(&["template", "render", "--template", &file, "--jsonl"], &input).exits(0);
    assert!(outcome.err.contains("`enable_thinking`") && outcome.err.contains("kwargs"), "{outcome:?}");
}

#[test]
fn templates_that_cannot_be_compiled_or_never_end_give_one_clear_line() {
    let place = Place::new();
    let file = place.path("broken.jinja");
    std::fs::write(&file, "{% for m in messages %}\n{{ m.role }").expect("writable");
    let name = file.to_str().expect("a plain path");
    let args = ["template", "render", "--template", name, "--jsonl"];
    place.run(&args).fails_with(1, &["broken.jinja", "line 2"]);
    std::fs::write(&file, "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}")
        .expect("writable");
    let outcome = place.run_with(&args, &lines(&[json!({ "messages": [] })])).exits(0);
    assert!(outcome.json()["error"].is_string(), "{outcome:?}");
    place.run(&["template", "render", "--template", "missing.jinja", "--jsonl"]).fails_with(1, &["missing.jinja"]);
}

#[test]
fn a_template_is_checked_with_conversations_of_every_kind() {
    let place = Place::new();
    for template in ["qwen2.5", "qwen3", "qwen3-coder", "qwen3.5", "qwq"] {
        let found =
            place.run(&["template", "check", &fixture(&format!("text/{template}.jinja")), "--json"]).exits(0).json();
        assert_eq!(found["conversations"]["tools on offer"]["result"], "ok", "{template}: {found}");
        assert_eq!(
            (&found["tool_calls"], found["thinks"] == true),
            (&json!(true), template != "qwen2.5" && template != "qwen3-coder")
        );
    }
    // What breaks is named by its place: as it is read, and as it runs.
    std::fs::write(place.path("syntax.jinja"), "a\nb {{ messages | nonsense( }}").expect("a file");
    place.run(&["template", "check", "syntax.jinja"]).fails_with(1, &["syntax.jinja", "line 2, column "]);
    let source = "{% for message in messages %}\n{{ message.content }}\n  {{ message.tool_calls[0].function.name }}\n{% endfor %}";
    std::fs::write(place.path("run.jinja"), source).expect("a file");
    let outcome = place.run(&["template", "check", "run.jinja"]).fails_with(1, &["breaks on", "hint: "]);
    assert!(outcome.out.contains("BROKEN") && outcome.out.contains("line 3, column "), "{outcome:?}");
    std::fs::write(place.path("refuses.jinja"), "{% if tools %}{{ raise_exception('no tools') }}{% endif %}x")
        .expect("a file");
    let outcome = place.run(&["template", "check", "refuses.jinja"]).exits(0);
    assert!(outcome.out.contains("refused: no tools"), "{outcome:?}");
}
