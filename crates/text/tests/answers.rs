//! What a model writes, in every form its generations use and in the ways they go wrong, comes apart into thoughts,
//! content and calls; and the same way however the text was cut.

use proptest::prelude::*;
use qwenkit_text::{AnswerEvent, AnswerReader, Opening, ToolSet, ToolWarning};
use serde_json::{Value, json};

#[derive(Debug, Default, PartialEq)]
struct Answer {
    reasoning: String,
    content: String,
    /// Name and arguments as they came, joined.
    calls: Vec<(String, String)>,
    ended: usize,
    warnings: Vec<ToolWarning>,
}

impl Answer {
    fn call(&self, index: usize) -> (&str, Value) {
        let (name, arguments) = &self.calls[index];
        let arguments = serde_json::from_str(arguments).unwrap_or_else(|error| panic!("{arguments}: {error}"));
        (name, arguments)
    }
}

fn tools() -> ToolSet {
    let weather = json!({"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"type": ["string", "null"]},
        "precise": {"type": "boolean"}, "factor": {"type": "number"}, "where": {"type": "object"},
        "tags": {"anyOf": [{"type": "array"}, {"type": "null"}]}, "level": {"enum": [1, 2, "all"]},
        "spot": {"$ref": "#/$defs/spot"}, "anything": {},
    }, "$defs": {"spot": {"type": "object"}}});
    ToolSet::from_request(&json!([
        {"type": "function", "function": {"name": "get_weather", "parameters": weather}},
        {"type": "function", "name": "write_file", "parameters": {"type": "object", "properties": {
            "path": {"type": "string"}, "content": {"type": "string"}}}},
        {"name": "stop", "input_schema": {"type": "object"}},
    ]))
    .unwrap()
}

fn read_cut(opening: Opening, tools: &ToolSet, pieces: &[&str]) -> Answer {
    let mut reader = AnswerReader::new(opening, tools);
    let mut events = Vec::new();
    pieces.iter().for_each(|piece| events.extend(reader.push(piece)));
    events.extend(reader.finish());
    let mut answer = Answer::default();
    for event in events {
        match event {
            AnswerEvent::Reasoning(text) => answer.reasoning += &text,
            AnswerEvent::Content(text) => answer.content += &text,
            AnswerEvent::CallBegin { index, name } => {
                assert_eq!(index, answer.calls.len(), "calls come in order");
                assert_eq!(index, answer.ended, "a call ends before the next begins");
                answer.calls.push((name, String::new()));
            }
            AnswerEvent::CallArguments { index, delta } => {
                assert_eq!((index, index), (answer.ended, answer.calls.len() - 1), "only of the open call");
                answer.calls[index].1 += &delta;
            }
            AnswerEvent::CallEnd { index } => {
                assert_eq!(index, answer.ended);
                answer.ended += 1;
            }
            AnswerEvent::Warning(warning) => answer.warnings.push(warning),
        }
    }
    assert_eq!(answer.ended, answer.calls.len(), "every call ends");
    answer
}

/// Reads a text whole and character by character; both must agree.
fn read(opening: Opening, text: &str) -> Answer {
    let whole = read_cut(opening, &tools(), &[text]);
    let pieces: Vec<String> = text.chars().map(String::from).collect();
    let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
    assert_eq!(whole, read_cut(opening, &tools(), &pieces), "{text}");
    whole
}

#[test]
fn thoughts_and_content_come_apart() {
    use Opening::{Closed, Open, Unopened};
    let cases = [
        (Open, "I think.\n</think>\n\nYes.", "I think.", "Yes."),
        (Open, "I think.</think>\nYes.", "I think.", "Yes."),
        (Open, "I think.\n\n</think>Yes.", "I think.", "Yes."),
        (Open, "<think>\nAgain.\n</think>\n\nYes.", "Again.", "Yes."),
        (Open, "\n</think>\n\nYes.", "", "Yes."),
        (Open, "never ends, 1 < 2 </thin", "never ends, 1 < 2 </thin", ""),
        (Open, "", "", ""),
        (Unopened, "<think>\nHm.\n</think>\n\nYes.\n", "Hm.", "Yes.\n"),
        (Unopened, "\n<think>\n\n</think>\n\nYes.", "", "Yes."),
        (Unopened, "<think></think>Yes.", "", "Yes."),
        (Unopened, "  Yes, 1 < 2.", "", "  Yes, 1 < 2."),
        (Unopened, "Well.\n<think>Hm.</think>\nYes.", "Hm.", "Well.\nYes."),
        (Unopened, "The tag `<think>` opens a thought.", "", "The tag `<think>` opens a thought."),
        (Unopened, "```\n<think>\n```", "", "```\n<think>\n```"),
        (Unopened, "<think>a</think><think>b</think>c", "a\nb", "c"),
        (Unopened, "<thinking>", "", "<thinking>"),
        (Closed, "Yes. <think> is a tag.", "", "Yes. <think> is a tag."),
        (Closed, "</think>\n\nYes.", "", "Yes."),
        (Closed, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ];
    for (opening, text, reasoning, content) in cases {
        let answer = read(opening, text);
        assert_eq!((answer.reasoning.as_str(), answer.content.as_str()), (reasoning, content), "{opening:?} {text:?}");
        assert_eq!(answer.warnings, [], "{text:?}");
    }
}

#[test]
fn a_prompt_tells_how_its_answer_opens() {
    let header = "<|im_start|>user\n<think> hi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(Opening::of_prompt(header), Opening::Unopened);
    assert_eq!(Opening::of_prompt(&format!("{header}<think>\n")), Opening::Open);
    assert_eq!(Opening::of_prompt(&format!("{header}<think>\n\n</think>\n\n")), Opening::Closed);
    assert_eq!(Opening::of_prompt("<think>\nso far"), Opening::Open);
}

#[test]
fn json_calls() {
    let text = "Let me look.\n\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Pune \\\"x\\\" \\u00e9\", \
                \"days\": 3}}\n</tool_call>\n<tool_call>\n{\"name\": \"stop\", \"arguments\": {}}\n</tool_call>";
    let answer = read(Opening::Unopened, text);
    assert_eq!(answer.content, "Let me look.");
    assert_eq!(answer.call(0), ("get_weather", json!({"city": "Pune \"x\" é", "days": 3})));
    assert_eq!(answer.call(1), ("stop", json!({})));
    assert_eq!(answer.warnings, []);
}

#[test]
fn json_calls_in_unusual_order_and_shape() {
    let expected = json!({"city": "Oslo"});
    for text in [
        r#"<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_weather"}</tool_call>"#,
        r#"<tool_call>{"name": "get_weather", "arguments": "{\"city\": \"Oslo\"}"}</tool_call>"#,
        r#"<tool_call>{"name": "get_weather", "parameters": {"city": "Oslo"}}</tool_call>"#,
        r#"<tool_call>{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}</tool_call>"#,
        r#"<tool_call>{"id": 7, "name": "get_weather", "arguments": {"city": "Oslo"}, "extra": [1, {"a": 2}]}</tool_call>"#,
        r#"<tool_call>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]</tool_call>"#,
        "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}",
        "```json\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}\n```",
        "<tools>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tools>",
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}",
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}}\n</tool_call>",
    ] {
        let answer = read(Opening::Closed, text);
        assert_eq!(answer.calls.len(), 1, "{text}");
        assert_eq!(answer.call(0), ("get_weather", expected.clone()), "{text}");
        assert_eq!((answer.content.as_str(), answer.warnings.as_slice()), ("", [].as_slice()), "{text}");
    }
}

#[test]
fn broken_json_is_mended_with_a_warning() {
    let cases = [
        (r#"{'city': 'Oslo', 'precise': True, 'unit': None}"#, json!({"city": "Oslo", "precise": true, "unit": null})),
        ("{\"content\": \"a\nb\tc\"}", json!({"content": "a\nb\tc"})),
        (r#"{"a": [1, 2,], "b": 1,}"#, json!({"a": [1, 2], "b": 1})),
        (r#"{"a": [1 }"#, json!({"a": [1]})),
        (r#"{"a": 'it\'s', b: \d}"#, json!({"a": "it's", "b": "\\d"})),
        (r#"{"a" "b", "c"}"#, json!({"a": "b", "c": null})),
        (r#"{"a": "\ud83d\ude00 \ud83d \u12"}"#, json!({"a": "😀 \u{FFFD} \\u12"})),
        (r#"{"a": 1e999}"#, json!({"a": "1e999"})),
    ];
    for (arguments, expected) in cases {
        let text = format!("<tool_call>\n{{\"name\": \"stop\", \"arguments\": {arguments}}}\n</tool_call>");
        let answer = read(Opening::Closed, &text);
        assert_eq!(answer.call(0).1, expected, "{arguments}");
        assert_eq!(answer.warnings, [ToolWarning::Mended { index: 0 }], "{arguments}");
    }
}

#[test]
fn brackets_missing_at_the_end_of_a_call() {
    let text = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"\n</tool_call>\nDone.";
    let answer = read(Opening::Closed, text);
    assert_eq!(answer.call(0).1, json!({"city": "Oslo"}));
    assert_eq!(answer.warnings, [ToolWarning::Mended { index: 0 }]);
    assert_eq!(answer.content, "Done.");
    let cut = read(Opening::Closed, "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Os");
    assert_eq!(cut.call(0).1, json!({"city": "Os"}));
    assert_eq!(cut.warnings, [ToolWarning::Cut { index: 0 }]);
}

#[test]
fn what_is_no_call_stays_text() {
    let not_a_call = |text: &str| ToolWarning::NotACall { text: text.to_owned() };
    for text in ["<tool_call>\nget the weather\n</tool_call>", "Use <tool_call> for tools.", "a <tool_call>"] {
        let answer = read(Opening::Closed, text);
        assert_eq!((answer.content.as_str(), answer.calls.len()), (text, 0));
        assert_eq!(answer.warnings, [not_a_call("<tool_call>")]);
    }
    for text in ["<tool_call>\n{\"name\": 3}\n</tool_call>", "<tool_call>{\"nam", "<tool_call> {\"arguments\": {}} x"] {
        let answer = read(Opening::Closed, text);
        assert_eq!((answer.content.as_str(), answer.calls.len(), answer.warnings.len()), (text, 0, 1), "{text}");
    }
    for text in
        ["{\"name\": \"unknown\", \"arguments\": {}}", "<function=unknown>", "{\"answer\": 1}", "```python\nx\n```\n"]
    {
        let answer = read(Opening::Closed, text);
        assert_eq!((answer.content.as_str(), answer.calls.len(), answer.warnings.len()), (text, 0, 0), "{text}");
    }
}

#[test]
fn without_tools_nothing_is_a_call() {
    let text = "<tool_call>\n{\"name\": \"stop\", \"arguments\": {}}\n</tool_call>";
    let answer = read_cut(Opening::Closed, &ToolSet::default(), &[text]);
    assert_eq!((answer.content.as_str(), answer.calls.len()), (text, 0));
}

#[test]
fn xml_calls_follow_the_schema() {
    let text = "I'll look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\n  New\nYork \n</parameter>\n<parameter=days>\n3\n\
                </parameter>\n<parameter=unit>\nnull\n</parameter>\n<parameter=precise>\nTrue\n</parameter>\n<parameter=factor>\n\
                1.5\n</parameter>\n<parameter=where>\n{\"lat\": [1, 2]}\n</parameter>\n<parameter=tags>\n[\"a\"]\n</parameter>\n\
                <parameter=level>\n2\n</parameter>\n<parameter=spot>\n{'x': 1}\n</parameter>\n<parameter=anything>\n12\n\
                </parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=stop>\n</function>\n</tool_call>";
    let answer = read(Opening::Closed, text);
    let expected = json!({"city": "  New\nYork ", "days": 3, "unit": null, "precise": true, "factor": 1.5,
        "where": {"lat": [1, 2]}, "tags": ["a"], "level": 2, "spot": {"x": 1}, "anything": "12"});
    assert_eq!(answer.call(0), ("get_weather", expected));
    assert_eq!(answer.call(1), ("stop", json!({})));
    assert_eq!((answer.content.as_str(), answer.warnings.as_slice()), ("I'll look.", [].as_slice()));
}

#[test]
fn values_that_do_not_fit_their_schema_stay_text() {
    let text = "<tool_call>\n<function=get_weather>\n<parameter=days>\nthree\n</parameter>\n<parameter=where>\n{\"lat\"\n\
                </parameter>\n<parameter=precise>\nyes\n</parameter>\n</function>\n</tool_call>";
    let (_, arguments) = (0, read(Opening::Closed, text).call(0).1);
    assert_eq!(arguments, json!({"days": "three", "where": {"lat": null}, "precise": "yes"}));
}

#[test]
fn xml_tags_that_are_missing() {
    let expected = json!({"city": "Oslo", "days": 2});
    for text in [
        "<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>",
        "<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n<parameter=days>\n2\n</function>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</tool_call>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>",
        "<tool_call><function=get_weather><parameter=city>Oslo</parameter><parameter=days>2</parameter></function></tool_call>",
        "<tool_call>\n<function=\"get_weather\">\r\n<parameter=city>\r\nOslo\r\n</parameter>\r\n<parameter=days>\r\n2\r\n</parameter>\r\n</function>",
    ] {
        let answer = read(Opening::Closed, text);
        assert_eq!(answer.calls.len(), 1, "{text}");
        assert_eq!(answer.call(0), ("get_weather", expected.clone()), "{text}");
        assert_eq!((answer.content.as_str(), answer.warnings.as_slice()), ("", [].as_slice()), "{text}");
    }
}

#[test]
fn text_values_may_speak_of_tags() {
    let content = "<a></parameter></a>\nif x < 3 { </function> }\n<parameter=other>\n\n";
    let text = format!(
        "<tool_call>\n<function=write_file>\n<parameter=content>\n{content}\n</parameter>\n<parameter=path>\na.txt\n</parameter>\n\
         </function>\n</tool_call>"
    );
    let answer = read(Opening::Closed, &text);
    assert_eq!(answer.call(0).1, json!({"content": content, "path": "a.txt"}));
    assert_eq!(answer.warnings, []);
}

#[test]
fn an_end_that_nothing_confirms_counts_when_no_other_comes() {
    let text = "<tool_call>\n<function=stop>\n<parameter=why>\nall done\n</parameter>\nGoodbye.";
    let answer = read(Opening::Closed, text);
    assert_eq!(answer.call(0).1, json!({"why": "all done"}));
    assert_eq!(answer.warnings, [ToolWarning::Stray { index: 0, text: "Goodbye.".to_owned() }]);
    let cut = read(Opening::Closed, "<tool_call>\n<function=stop>\n<parameter=why>\nall do");
    assert_eq!(cut.call(0).1, json!({"why": "all do"}));
    assert_eq!(cut.warnings, [ToolWarning::Cut { index: 0 }]);
}

#[test]
fn calls_in_thoughts() {
    let call = "<tool_call>\n<function=stop>\n</function>\n</tool_call>";
    let meant = read(Opening::Open, &format!("I should stop.\n{call}"));
    assert_eq!((meant.reasoning.as_str(), meant.call(0)), ("I should stop.", ("stop", json!({}))));
    assert_eq!(meant.warnings, [ToolWarning::InThought]);
    let draft = read(Opening::Open, &format!("Perhaps {call}?\n</think>\n\nNo."));
    assert_eq!((draft.calls.len(), draft.content.as_str()), (0, "No."));
    assert_eq!(draft.reasoning, format!("Perhaps\n{call}?"));
    let word = read(Opening::Open, "The tag <tool_call> opens a call.</think>Yes.");
    assert_eq!((word.reasoning.as_str(), word.content.as_str()), ("The tag <tool_call> opens a call.", "Yes."));
}

#[test]
fn unknown_tools_are_called_with_a_warning() {
    let text = "<tool_call>\n{\"name\": \"dance\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    let answer = read(Opening::Closed, text);
    assert_eq!(answer.call(0), ("dance", json!({"a": 1})));
    assert_eq!(answer.warnings, [ToolWarning::UnknownTool { name: "dance".to_owned() }]);
}

#[test]
fn strings_arrive_while_they_are_written() {
    let mut reader = AnswerReader::new(Opening::Closed, &tools());
    let start = "<tool_call>\n<function=write_file>\n<parameter=content>\nfirst line\nsecond";
    let arrived: String = reader.push(start).iter().filter_map(delta).collect();
    assert_eq!(arrived, "{\"content\":\"first line\\nsecond");
    let mut reader = AnswerReader::new(Opening::Closed, &tools());
    let start = "<tool_call>\n{\"name\": \"write_file\", \"arguments\": {\"content\": \"first";
    let arrived: String = reader.push(start).iter().filter_map(delta).collect();
    assert_eq!(arrived, "{\"content\":\"first");
}

fn delta(event: &AnswerEvent) -> Option<&str> {
    match event {
        AnswerEvent::CallArguments { delta, .. } => Some(delta),
        _ => None,
    }
}

#[test]
fn hostile_answers_end() {
    let deep = "[".repeat(200_000);
    let texts = [
        format!("<tool_call>{{\"name\": \"stop\", \"arguments\": {{\"a\": {deep}"),
        format!("<tool_call><function=get_weather><parameter=where>{{\"a\": {deep}</parameter></function>"),
        "<".repeat(300_000),
        "<tool_call>".repeat(30_000),
        "<think>".repeat(30_000),
        format!("<tool_call>{}{{", " ".repeat(200_000)),
        "<function=stop>".repeat(20_000),
        format!("<tool_call><function=stop><parameter=a>{}", "</parameter>x".repeat(20_000)),
    ];
    for text in &texts {
        for opening in [Opening::Open, Opening::Unopened] {
            let answer = read_cut(opening, &tools(), &[text]);
            (0..answer.calls.len()).for_each(|index| assert!(answer.call(index).1.is_object()));
        }
    }
}

#[test]
fn declarations_are_checked_with_their_place() {
    let cases = [
        (json!({}), "`tools`"),
        (json!([3]), "`tools[0]`"),
        (json!([{"type": "function"}]), "`tools[0].name`"),
        (json!([{"type": "web_search"}]), "`tools[0].type`"),
        (json!([{"type": "function", "function": 1}]), "`tools[0].function`"),
        (json!([{"type": "function", "function": {"name": "a b"}}]), "`tools[0].function.name`"),
        (json!([{"type": "function", "function": {"name": "a", "parameters": 1}}]), "`tools[0].function.parameters`"),
        (json!([{"name": "a"}, {"name": "a"}]), "`tools[1]`"),
        (json!([{"name": "a", "strict": 1}]), "`tools[0].strict`"),
    ];
    for (tools, path) in cases {
        let message = ToolSet::from_request(&tools).unwrap_err().to_string();
        assert!(message.starts_with(path), "{tools}: {message}");
    }
    let templates = tools().for_template().unwrap();
    assert_eq!(templates[1]["function"]["name"], "write_file");
    assert_eq!(templates[2]["function"]["parameters"], json!({"type": "object"}));
    assert!(ToolSet::from_request(&Value::Null).unwrap().for_template().is_none());
}

/// Fragments that answers are made of, so that random texts reach every branch.
const FRAGMENTS: [&str; 40] = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "get_weather",
    "stop",
    ">",
    "<function=stop>",
    "</function>",
    "<parameter=",
    "city>",
    "<parameter=days>",
    "<parameter=city>",
    "</parameter>",
    "\n",
    "\n\n",
    " ",
    "{",
    "}",
    "[",
    "]",
    "\"name\"",
    "\"arguments\"",
    ":",
    ",",
    "\"get_weather\"",
    "'",
    "\"",
    "\\",
    "\\u12",
    "\\ud83d",
    "null",
    "True",
    "12",
    "word",
    "é😀",
    "```json\n",
    "<tools>",
    "{\"name\": \"stop\", \"arguments\": {\"a\": \"b",
];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(3000) })]

    #[test]
    fn any_cut_gives_the_same_answer(
        fragments in proptest::collection::vec(0..FRAGMENTS.len(), 0..40),
        opening in prop_oneof![Just(Opening::Open), Just(Opening::Unopened), Just(Opening::Closed)],
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let text: String = fragments.iter().map(|&index| FRAGMENTS[index]).collect();
        let whole = read_cut(opening, &tools(), &[&text]);
        for (name, arguments) in &whole.calls {
            let value: Result<Value, _> = serde_json::from_str(arguments);
            prop_assert!(value.is_ok_and(|value| value.is_object()), "{name}: {arguments} in {text:?}");
        }
        prop_assert!(!whole.reasoning.contains("</think>"));
        let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
        places.extend([0, text.len()]);
        places.retain(|&at| text.is_char_boundary(at));
        places.sort_unstable();
        let pieces: Vec<&str> = places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        prop_assert_eq!(&whole, &read_cut(opening, &tools(), &pieces), "{:?}", pieces);
        let each: Vec<String> = text.chars().map(String::from).collect();
        let each: Vec<&str> = each.iter().map(String::as_str).collect();
        prop_assert_eq!(&whole, &read_cut(opening, &tools(), &each), "{:?}", text);
    }
}
