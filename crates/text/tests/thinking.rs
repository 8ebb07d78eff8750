//! Every spelling of the thinking switch comes to the same wish, and wishes come to what each template understands.

use std::path::PathBuf;

use qwenkit_text::{ChatTemplate, Opening, ThinkingSupport, ThinkingWish};
use serde_json::{Value, json};

fn wish(request: Value) -> Result<ThinkingWish, String> {
    ThinkingWish::of_request(request.as_object().unwrap()).map_err(|error| error.to_string())
}

fn support(name: &str) -> ThinkingSupport {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/text").join(name);
    ThinkingSupport::of_template(&ChatTemplate::new(&std::fs::read_to_string(path).unwrap(), name).unwrap())
}

#[test]
fn every_spelling_is_understood() {
    let says = |text: &str| json!({"messages": [{"role": "user", "content": text}]});
    let off = [
        json!({"enable_thinking": false}),
        json!({"chat_template_kwargs": {"enable_thinking": false}}),
        json!({"chat_template_kwargs": {"thinking": false}}),
        json!({"think": false}),
        json!({"think": "none"}),
        json!({"reasoning_effort": "none"}),
        json!({"reasoning": {"effort": "none", "summary": null}}),
        json!({"reasoning": {"enabled": false}}),
        json!({"thinking": {"type": "disabled"}}),
        says("Hello /no_think"),
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "/no_think Hi"}]}]}),
        json!({"enable_thinking": false, "reasoning_effort": "none"}),
    ];
    for request in off {
        assert_eq!(wish(request.clone()).unwrap().thinks, Some(false), "{request}");
    }
    let on = [
        json!({"enable_thinking": true}),
        json!({"think": "high"}),
        json!({"reasoning_effort": "low"}),
        json!({"thinking": {"type": "enabled", "budget_tokens": 2000}}),
        says("Hello /think"),
    ];
    for request in on {
        assert_eq!(wish(request.clone()).unwrap().thinks, Some(true), "{request}");
    }
    let nothing = [json!({}), json!({"reasoning_effort": null}), says("what does /no_think do here"), says("")];
    for request in nothing {
        assert_eq!(wish(request.clone()).unwrap(), ThinkingWish::default(), "{request}");
    }
    assert_eq!(
        wish(json!({"thinking": {"type": "enabled", "budget_tokens": 2000}})).unwrap().budget_tokens,
        Some(2000)
    );
    assert_eq!(wish(json!({"reasoning": {"effort": "low"}})).unwrap().effort.as_deref(), Some("low"));
}

#[test]
fn the_latest_word_counts_and_a_switch_beats_it() {
    let messages = json!([{"role": "user", "content": "a /no_think"}, {"role": "assistant", "content": "/no_think"},
        {"role": "user", "content": "b /think"}, {"role": "user", "content": "c"}]);
    assert_eq!(wish(json!({"messages": messages})).unwrap().thinks, Some(true));
    assert_eq!(wish(json!({"messages": messages, "think": false})).unwrap().thinks, Some(false));
}

#[test]
fn wrong_and_contradicting_switches_are_errors_with_their_place() {
    for (request, expected) in [
        (json!({"enable_thinking": "no"}), "`enable_thinking`: found `no`"),
        (json!({"reasoning_effort": "enormous"}), "`reasoning_effort`: found `enormous`"),
        (json!({"reasoning": "low"}), "`reasoning`"),
        (json!({"reasoning": {"effort": 3}}), "`reasoning.effort`"),
        (json!({"think": 1}), "`think`"),
        (json!({"thinking": {"type": "sometimes"}}), "`thinking.type`: found `sometimes`"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": -1}}), "`thinking.budget_tokens`"),
        (json!({"think": true, "reasoning_effort": "none"}), "contradict each other"),
        (json!({"think": "low", "reasoning_effort": "high"}), "contradict each other"),
    ] {
        let message = wish(request.clone()).unwrap_err();
        assert!(message.contains(expected), "{request}: {message}");
    }
}

#[test]
fn templates_are_asked_what_they_understand() {
    let off = wish(json!({"think": false})).unwrap();
    let on = wish(json!({"reasoning_effort": "high"})).unwrap();
    let qwen3 = support("qwen3.jinja");
    assert_eq!((qwen3.thinks, qwen3.default, qwen3.has_switch), (true, Opening::Unopened, true));
    assert_eq!(Value::Object(qwen3.plan(&off).unwrap().kwargs), json!({"enable_thinking": false}));
    assert_eq!(Value::Object(qwen3.plan(&on).unwrap().kwargs), json!({"enable_thinking": true}));
    let qwen35 = support("qwen3.5.jinja");
    assert_eq!((qwen35.default, qwen35.has_switch), (Opening::Open, true));
    let qwq = support("qwq.jinja");
    // This one closes the thought unless it is told to leave it open.
    assert_eq!((qwq.thinks, qwq.default, qwq.has_switch), (true, Opening::Closed, true));
    assert_eq!(Value::Object(qwq.plan(&on).unwrap().kwargs), json!({"enable_thinking": true}));
    let always = ChatTemplate::new("<|im_start|>assistant\n<think>\n", "always").unwrap();
    let always = ThinkingSupport::of_template(&always);
    assert_eq!((always.default, always.has_switch), (Opening::Open, false));
    let plan = always.plan(&off).unwrap();
    assert_eq!((plan.kwargs.len(), plan.suffix), (0, "\n</think>\n\n"));
    for plain in ["qwen2.5.jinja", "qwen3-coder.jinja"] {
        let plain = support(plain);
        assert!(plain.plan(&off).unwrap().kwargs.is_empty());
        let message = plain.plan(&on).unwrap_err().to_string();
        assert!(message.contains("`reasoning_effort: \"high\"`"), "{message}");
        let soft = wish(json!({"messages": [{"role": "user", "content": "Hi /think"}]})).unwrap();
        assert!(plain.plan(&soft).is_ok());
    }
}

#[test]
fn an_effort_that_a_template_lacks_becomes_the_next_one() {
    let source = "{%- if reasoning_effort is defined and reasoning_effort not in ['low', 'medium', 'xhigh'] %}\
                  {{- raise_exception('no such effort') }}{%- endif %}<|im_start|>assistant\n<think>\n{{ enable_thinking }}";
    let support = ThinkingSupport::of_template(&ChatTemplate::new(source, "test").unwrap());
    assert_eq!(support.efforts, ["low", "medium", "xhigh"]);
    for (asked, given) in [("minimal", "low"), ("medium", "medium"), ("high", "xhigh"), ("max", "xhigh")] {
        let plan = support.plan(&wish(json!({"reasoning_effort": asked})).unwrap()).unwrap();
        assert_eq!(plan.kwargs["reasoning_effort"], given, "{asked}");
    }
}
