//! Answers held to a form: whatever a model would say, what comes out fulfils the form, and strangers' forms do no harm.

use std::{path::PathBuf, sync::OnceLock};

use qwenkit_tensor::TokenId;
use qwenkit_text::{
    AnswerEvent, AnswerReader, CallForm, CallSyntax, ChatTemplate, Error, Form, GrammarFactory, Opening, Tokenizer,
    ToolSet,
};
use serde_json::{Value, json};

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/text").join(name)).unwrap()
}

struct Setup {
    tokenizer: Tokenizer,
    end: TokenId,
    factory: GrammarFactory,
}

fn setup() -> &'static Setup {
    static SETUP: OnceLock<Setup> = OnceLock::new();
    SETUP.get_or_init(|| {
        let tokenizer = Tokenizer::from_json(&fixture("tokenizer.json"), "tokenizer.json").unwrap();
        let end = tokenizer.token_id("<|im_end|>").unwrap();
        let factory = GrammarFactory::new(&tokenizer, end).unwrap();
        Setup { tokenizer, end, factory }
    })
}

/// A model that says anything: noise for logits, from a seed.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32
    }
}

/// An answer of this form by a model that has no idea; `None` if it had not ended after so many tokens.
fn answer(form: &Form, seed: u64, most: usize) -> Result<Option<String>, Error> {
    let Setup { tokenizer, end, factory } = setup();
    let mut grammar = factory.compile(form)?;
    let mut noise = Noise(seed);
    let mut ids = Vec::new();
    while ids.len() < most {
        let forced = grammar.forced();
        let next = match forced.first() {
            Some(&id) => id,
            None => {
                let mut logits: Vec<f32> = (0..tokenizer.vocab_size()).map(|_| noise.next()).collect();
                grammar.mask(&mut logits, &[*end])?;
                // A model that has said enough ends where it may.
                if ids.len() > most / 3 && logits[end.0 as usize] > f32::NEG_INFINITY {
                    return Ok(Some(tokenizer.decode(&ids, true)));
                }
                let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                assert!(logits[best] > f32::NEG_INFINITY, "something can always come");
                TokenId(best as u32)
            }
        };
        if next == *end {
            return Ok(Some(tokenizer.decode(&ids, true)));
        }
        grammar.accept(next)?;
        ids.push(next);
        if grammar.is_over() {
            return Ok(Some(tokenizer.decode(&ids, true)));
        }
    }
    Ok(None)
}

/// Answers that came to an end, of which there must be some.
fn answers(form: &Form, most: usize) -> Vec<String> {
    let found: Vec<String> = (1..=12).filter_map(|seed| answer(form, seed, most).unwrap()).collect();
    assert!(found.len() >= 3, "{} of 12 ended", found.len());
    found
}

#[test]
fn whatever_is_said_fulfils_the_schema() {
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "ç"]}, "maxItems": 3},
            "open": {"type": ["boolean", "null"]},
        },
        "required": ["name", "age", "tags", "open"],
        "additionalProperties": false,
    });
    for text in answers(&Form::Json(schema), 200) {
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let object = value.as_object().unwrap();
        assert_eq!(object.keys().collect::<Vec<_>>(), ["name", "age", "tags", "open"]);
        assert!(object["name"].as_str().unwrap().chars().count() <= 12, "{text}");
        assert!((0..=120).contains(&object["age"].as_i64().unwrap()), "{text}");
        assert!(object["tags"].as_array().unwrap().iter().all(|tag| ["a", "b", "ç"].map(Value::from).contains(tag)));
        assert!(object["open"].is_boolean() || object["open"].is_null());
    }
}

#[test]
fn expressions_choices_and_grammars_hold() {
    for text in answers(&Form::Regex("[0-9]{4}-[0-9]{2}-[0-9]{2}".to_owned()), 40) {
        assert!(text.len() == 10 && text.as_bytes()[4] == b'-' && text.as_bytes()[7] == b'-', "{text}");
    }
    let choice = ["yes", "no", "say \"hé\""];
    for text in answers(&Form::Choice(choice.map(str::to_owned).to_vec()), 40) {
        assert!(choice.contains(&text.as_str()), "{text}");
    }
    for text in answers(&Form::Lark("start: \"(\" (start | \"x\") \")\"".to_owned()), 60) {
        let depth = text.len() / 2;
        assert_eq!(text, format!("{}x{}", "(".repeat(depth), ")".repeat(depth)));
    }
    for text in answers(&Form::AnyJson, 300) {
        match serde_json::from_str::<Value>(&text) {
            Ok(value) => assert!(value.is_object(), "{text}"),
            // Noise writes numbers of a length that no reader takes; they are JSON all the same.
            Err(error) => assert!(error.to_string().contains("number out of range"), "{text}: {error}"),
        }
    }
}

fn tools() -> ToolSet {
    let tool = |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let weather = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"type": "string", "enum": ["c", "f"]},
        },
        "required": ["city", "days"],
    });
    ToolSet::from_request(&json!([tool("weather", weather), tool("now", json!({"type": "object", "properties": {}}))]))
        .unwrap()
}

#[test]
fn forced_calls_are_read_as_calls_of_the_declared_tools() {
    let tools = tools();
    for syntax in [CallSyntax::Hermes, CallSyntax::Xml] {
        for many in [false, true] {
            let form = Form::Calls(CallForm { syntax, tools: tools.tools().to_vec(), many, or_json: None });
            for text in answers(&form, 240) {
                let mut reader = AnswerReader::new(Opening::Unopened, &tools);
                let mut events = reader.push(&text);
                events.extend(reader.finish());
                let (mut calls, mut ends) = (Vec::<(String, String)>::new(), 0);
                for event in events {
                    match event {
                        AnswerEvent::CallBegin { name, .. } => calls.push((name, String::new())),
                        AnswerEvent::CallArguments { index, delta } => calls[index].1.push_str(&delta),
                        AnswerEvent::CallEnd { .. } => ends += 1,
                        other => panic!("{syntax:?} {text:?}: {other:?}"),
                    }
                }
                assert_eq!(calls.len(), ends, "{text}");
                assert!(!calls.is_empty() && (many || calls.len() == 1), "{text}");
                for (name, arguments) in calls {
                    let arguments: Value = serde_json::from_str(&arguments).unwrap();
                    if name == "weather" {
                        assert!(arguments["city"].is_string(), "{text}");
                        assert!((1..=9).contains(&arguments["days"].as_i64().unwrap()), "{text}");
                        assert!(
                            ["c", "f"].map(Value::from).contains(arguments.get("unit").unwrap_or(&json!("c"))),
                            "{text}"
                        );
                    } else {
                        assert_eq!((name.as_str(), arguments), ("now", json!({})));
                    }
                }
            }
        }
    }
}

#[test]
fn calls_or_json_are_one_of_both() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false});
    let form =
        CallForm { syntax: CallSyntax::Hermes, tools: tools().tools().to_vec(), many: false, or_json: Some(schema) };
    let (calls, objects): (Vec<String>, Vec<String>) =
        answers(&Form::Calls(form), 240).into_iter().partition(|text| text.starts_with("<tool_call>"));
    assert!(objects.iter().all(|text| serde_json::from_str::<Value>(text).unwrap()["a"].is_boolean()));
    assert!(!calls.is_empty() && !objects.is_empty(), "{calls:?} {objects:?}");
}

#[test]
fn templates_tell_how_calls_are_written() {
    let of = |name: &str| {
        let source = String::from_utf8(fixture(name)).unwrap();
        CallSyntax::of_template(&ChatTemplate::new(&source, name).unwrap())
    };
    assert_eq!(of("qwen2.5.jinja"), Some(CallSyntax::Hermes));
    assert_eq!(of("qwen3.jinja"), Some(CallSyntax::Hermes));
    assert_eq!(of("qwen3-coder.jinja"), Some(CallSyntax::Xml));
    assert_eq!(of("qwen3.5.jinja"), Some(CallSyntax::Xml));
    let plain = ChatTemplate::new("{% for m in messages %}{{ m.content }}{% endfor %}", "plain").unwrap();
    assert_eq!(CallSyntax::of_template(&plain), None);
}

#[test]
fn forms_that_cannot_be_followed_are_refused() {
    let wide: serde_json::Map<String, Value> =
        (0..20_000).map(|i| (format!("key{i}"), json!({"type": "string", "pattern": "(a|b)*c{500}"}))).collect();
    let bombs = [
        Form::Json(json!({"type": "nonsense"})),
        Form::Json(json!({"type": "object", "unevaluatedProperties": {"type": "string"}})),
        Form::Json(json!({"$ref": "#/nowhere"})),
        Form::Json(json!({"$ref": "https://example.com/schema.json"})),
        Form::Json(json!({"properties": wide})),
        Form::Json(json!("text")),
        Form::Regex("(".to_owned()),
        Form::Choice(Vec::new()),
        Form::Choice(vec!["x".to_owned(); 5000]),
        Form::Lark("start: nothing".to_owned()),
        Form::Lark("\u{0}".to_owned()),
        Form::Lark(format!("start: \"{}\"", "x".repeat(300 << 10))),
    ];
    for form in &bombs {
        match setup().factory.compile(form) {
            Err(Error::Grammar { reason }) => assert!(!reason.is_empty() && !reason.contains('\n')),
            other => panic!("{form:?}: {other:?}"),
        }
    }
}

/// Huge counts and deep nesting may be refused or followed; either way they cost little.
#[test]
fn large_forms_are_refused_or_followed_within_bounds() {
    let mut deep = json!({"type": "string"});
    for _ in 0..100 {
        deep = json!({"type": "array", "items": deep, "minItems": 1, "maxItems": 1});
    }
    let forms = [
        Form::Json(deep),
        Form::Json(json!({"type": "string", "pattern": "(((a{1000}){1000}){1000})"})),
        Form::Json(json!({"type": "string", "minLength": 2_000_000_000u64})),
        Form::Json(json!({"type": "array", "items": {"type": "string"}, "minItems": 900_000_000u64})),
        Form::Regex("(x{1000}){1000}{1000}".to_owned()),
        Form::Regex("(a|aa|aaa)*(b|bb)*.*(a|aa|aaa)*c{20}".to_owned()),
        Form::Json(json!({"$defs": {"n": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}, "$ref": "#/$defs/n"})),
    ];
    for form in &forms {
        match answer(form, 5, 60) {
            Ok(text) => assert!(text.is_none_or(|text| text.len() < 4000), "{form:?}"),
            Err(Error::Grammar { reason }) => assert!(!reason.is_empty()),
            Err(other) => panic!("{form:?}: {other}"),
        }
    }
}
