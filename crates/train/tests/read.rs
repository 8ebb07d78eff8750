//! Files of every form become the same records, and what is wrong with a file is told with its line.

use std::io::Write;

use qwenkit_train::data::{Chat, Faults, Form, LabelKeys, Record, Source, read_file};
use serde_json::{Value, json};

struct Found {
    source: Source,
    records: Vec<(usize, Record)>,
}

fn read_with(bytes: &[u8], labels: &LabelKeys) -> Result<Found, Faults> {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(bytes).expect("written");
    let mut records = Vec::new();
    let source = read_file(file.path(), labels, |line, record| {
        records.push((line, record));
        Ok(())
    })?;
    Ok(Found { source, records })
}

fn read(bytes: &[u8]) -> Result<Found, Faults> {
    read_with(bytes, &LabelKeys::default())
}

fn one(line: Value) -> Record {
    let mut found = read(line.to_string().as_bytes()).unwrap_or_else(|faults| panic!("{line}: {faults}"));
    assert_eq!(found.records.len(), 1);
    found.records.remove(0).1
}

fn faults(bytes: &[u8]) -> String {
    let Err(faults) = read(bytes) else { panic!("{} was read", String::from_utf8_lossy(bytes)) };
    let file =
        faults.to_string().split(':').next().unwrap_or_default().split(',').next().unwrap_or_default().to_owned();
    faults.to_string().replace(&file, "F")
}

#[test]
fn conversations_of_every_form_are_the_same_record() {
    let expected = Record::Chat(Chat::of_turn("Hi", "Hello"));
    let (user, assistant) =
        (json!({"role": "user", "content": "Hi"}), json!({"role": "assistant", "content": "Hello"}));
    for line in [
        json!({"messages": [user, assistant]}),
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, assistant]}),
        json!({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
        json!({"prompt": [user], "completion": [assistant]}),
        json!({"prompt": [user], "completion": "Hello"}),
        json!({"instruction": "Hi", "input": "", "output": "Hello"}),
        json!({"messages": [user, assistant, {"role": "user", "content": "and nobody answers"}]}),
    ] {
        assert_eq!(one(line.clone()), expected, "{line}");
    }
    let completion = Record::Completion { prompt: "Hi".into(), completion: "Hello".into() };
    assert_eq!(one(json!({"prompt": "Hi", "completion": "Hello"})), completion);
    assert_eq!(one(json!({"text": "All of it"})), Record::Text("All of it".into()));
}

#[test]
fn calls_reach_templates_as_objects_and_answers_of_weight_0_are_not_learnt() {
    let line = json!({
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": null, "weight": 0, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Pune\"}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "31"},
            {"role": "assistant", "reasoning": "31 is hot.", "content": "Hot."},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
        "chat_template_kwargs": {"x": 1},
    });
    let Record::Chat(chat) = one(line) else { panic!("a conversation") };
    assert_eq!(chat.trained, [false, false, false, false, true]);
    assert_eq!(chat.messages[0]["role"], "system");
    assert_eq!(chat.messages[2]["content"], "");
    assert_eq!(chat.messages[2]["tool_calls"][0]["function"]["arguments"], json!({"city": "Pune"}));
    assert_eq!(chat.messages[4]["reasoning_content"], "31 is hot.");
    assert_eq!(chat.tools.expect("tools")[0]["function"]["name"], "weather");
    assert_eq!(chat.kwargs["x"], 1);
}

#[test]
fn preferences_of_every_spelling_are_the_same_record() {
    let (user, good, bad) = (
        json!({"role": "user", "content": "Hi"}),
        json!({"role": "assistant", "content": "Hello"}),
        json!({"role": "assistant", "content": "What?"}),
    );
    let expected = Record::Preference { chosen: Chat::of_turn("Hi", "Hello"), rejected: Chat::of_turn("Hi", "What?") };
    for line in [
        json!({"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}),
        json!({"question": "Hi", "chosen": "Hello", "rejected": "What?", "system": ""}),
        json!({"prompt": [user], "chosen": [good], "rejected": [bad]}),
        json!({"prompt": "Hi", "chosen": good, "rejected": bad}),
        json!({"chosen": [user, good], "rejected": [user, bad]}),
        json!({"input": {"messages": [user], "parallel_tool_calls": true}, "preferred_output": [good],
               "non_preferred_output": [bad]}),
    ] {
        assert_eq!(one(line.clone()), expected, "{line}");
    }
    assert!(faults(b"{\"chosen\": \"a\", \"rejected\": \"b\"}").contains("there is no `prompt`"));
    assert!(faults(b"{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"b\"}").contains("are equal"));
}

#[test]
fn labels_are_found_under_usual_and_named_keys() {
    let label = |label: &str| Record::Label { text: "a".into(), label: label.into() };
    assert_eq!(one(json!({"text": "a", "label": "x"})), label("x"));
    assert_eq!(one(json!({"text": "a", "label": 3})), label("3"));
    assert_eq!(one(json!({"question": "a", "category": true})), label("true"));
    let keys = LabelKeys { text: Some("body".into()), label: Some("kind".into()) };
    let found = read_with(b"{\"body\": \"a\", \"kind\": \"x\", \"text\": \"no\"}", &keys).expect("readable");
    assert_eq!(found.source.form, Form::Label);
    assert_eq!(found.records, [(1, label("x"))]);
    assert_eq!(found.source.remarks.unread.get("text"), Some(&1));
    assert!(faults(b"{\"text\": \"a\", \"label\": 0.5}").contains("`label`: found the number 0.5"));
    assert!(faults(b"{\"text\": \" \", \"label\": 1}").contains("`text` is missing"));
}

#[test]
fn what_nothing_reads_is_remarked() {
    let line = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\", \"date\": 1}, {\"role\": \"assistant\", \
                \"content\": \"b\", \"date\": 2}, {\"role\": \"user\", \"content\": \"c\"}], \"id\": 7}\r\n\r\n";
    let found = read(format!("\u{feff}{line}{line}").as_bytes()).expect("readable");
    let unread: Vec<_> = found.source.remarks.unread.iter().map(|(key, count)| (key.as_str(), *count)).collect();
    assert_eq!(unread, [("id", 2), ("messages[].date", 4)]);
    assert_eq!((found.source.remarks.blank_lines, found.source.remarks.unanswered), (2, 2));
    assert_eq!(found.records.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [1, 3]);
}

#[test]
fn every_fault_has_its_line_and_its_reason() {
    let good =
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    for (bad, reason) in [
        ("{\"messages\": [}\n", "not valid JSON at byte 15: expected value"),
        ("[1]\n", "found a list, expected a JSON object"),
        ("{\"question\": 1}\n", "this line is of no known form (keys `question`)"),
        ("{\"text\": \"a\"}\n", "this line is a plain text, and the file's first line is a conversation"),
        ("{\"messages\": []}\n", "`messages`: found an empty list"),
        ("{\"messages\": \"a\"}\n", "`messages`: found `a`, expected a list"),
        ("{\"messages\": [1]}\n", "`messages[0]`: found the number 1, expected an object"),
        (
            "{\"messages\": [{\"role\": \"bot\", \"content\": \"a\"}]}\n",
            "`messages[0].role`: the role `bot` is unknown",
        ),
        ("{\"messages\": [{\"role\": \"user\"}]}\n", "`messages[0].content` is missing"),
        ("{\"messages\": [{\"content\": \"a\"}]}\n", "`messages[0].role` is missing"),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n", "no message of the assistant"),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]}\n",
            "tuning reads text alone",
        ),
        ("{\"messages\": [{\"role\": \"assistant\", \"function_call\": {}}]}\n", "older form of a call"),
        (
            "{\"messages\": [{\"role\": \"assistant\", \"tool_calls\": [{\"function\": {\"name\": \"f\", \"arguments\": \"x\"}}]}]}\n",
            "`messages[0].tool_calls[0].function.arguments`: found `x`",
        ),
        (
            "{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\", \"weight\": 2}]}\n",
            "`messages[0].weight`: found the number 2",
        ),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"cut o", "the file seems to be cut off here"),
    ] {
        let found = faults(format!("{good}{bad}").as_bytes());
        assert!(found.starts_with("F, line 2: ") && found.contains(reason), "{bad}: {found}");
    }
    let found = faults(&[good.as_bytes(), b"{\"a\": \"\xFF\"}\n", good.as_bytes(), b"{}\n"].concat());
    assert!(found.starts_with("F: 2 faults\nF, line 2: found the byte 0xFF at byte 8"), "{found}");
    assert!(found.contains("\nF, line 4: this line is of no known form"), "{found}");
}

#[test]
fn files_that_are_something_else_are_one_fault() {
    assert_eq!(faults(b""), "F: the file is empty; expected one sample a line");
    assert_eq!(faults(b"\n\n \n"), "F: the file is empty; expected one sample a line");
    assert!(faults(b"[\n{\"text\": \"a\"}\n]\n").contains("one list of JSON"));
    assert!(faults(b"{\n\"text\": \"a\"\n}\n").contains("JSON over several lines"));
    assert!(faults(b"PAR1\x15\x04").contains("a Parquet file"));
    assert!(faults(b"{\"a\": 1}\n").contains("found the keys `a`, expected one of these forms:\n"));
}

#[test]
fn many_faults_are_shown_up_to_a_bound_and_counted() {
    let found = faults("{}\n".repeat(1000).as_bytes());
    assert!(found.starts_with("F: 1000 faults\nF, line 1: "), "{found}");
    assert!(found.ends_with("and 980 more"), "{found}");
}

/// Every byte of files of all forms, replaced by bytes that mean something: whatever stands there, the answer is records or faults.
#[test]
fn broken_files_of_any_form_are_read_to_their_end() {
    let folder = tempfile::tempdir().expect("a folder");
    let files = [
        (
            "a.jsonl",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"\u{e9}\"}, {\"role\": \"assistant\", \"tool_calls\": \
                     [{\"function\": {\"name\": \"f\", \"arguments\": \"{}\"}}]}], \"tools\": [{\"name\": \"f\"}]}\n",
        ),
        (
            "b.jsonl",
            "{\"chosen\": [{\"role\": \"assistant\", \"content\": \"a\"}], \"rejected\": \"b\", \"prompt\": \"c\"}\n",
        ),
        ("c.csv", "text,label\n\"a, \"\"b\"\"\nc\",x\n\u{e9},y\n"),
    ];
    for (name, text) in files {
        let path = folder.path().join(name);
        for at in 0..text.len() {
            for byte in [b'"', b'\n', b'\\', b'{', b']', b',', b'0', 0, 0xFF] {
                let mut bytes = text.as_bytes().to_vec();
                bytes[at] = byte;
                std::fs::write(&path, &bytes).expect("written");
                let mut count = 0;
                let read = read_file(&path, &LabelKeys::default(), |_, _| {
                    count += 1;
                    Ok(())
                });
                match read {
                    Ok(_) => assert!(count > 0),
                    Err(faults) => assert!(faults.total() > 0 && !faults.to_string().is_empty()),
                }
            }
        }
    }
}
