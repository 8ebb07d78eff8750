//! The log: a line for each request, with what it used and why the cache had not more, and without its words.

use std::{
    io::{self, Read, Write},
    sync::{Arc, Mutex},
};

use qwenkit_server::{Config, Log};
use serde_json::{Value, json};

use crate::client::{Reply, Running, model, serve_config};

/// Where a log is written, to be read afterwards.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The lines that a server has written when it has ended, and all of its log.
fn logged(prompts: bool, ask: impl FnOnce(&Running)) -> (Vec<Value>, String) {
    let written = Written::default();
    let log = Log::to(written.clone(), prompts).unwrap();
    let mut server = serve_config(vec![model("qwen2", 2048, 64)], |config| Config { log: Some(log), ..config });
    ask(&server);
    server.join();
    let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
    (text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), text)
}

fn chat(words: &str) -> Value {
    json!({"messages": [{"role": "user", "content": words}], "max_tokens": 4, "temperature": 0, "ignore_eos": true})
}

#[test]
fn each_request_has_a_line_and_none_of_its_words() {
    let secret = "confidential ".repeat(40);
    let mut usage = Vec::new();
    let (lines, text) = logged(false, |server| {
        for stream in [false, true] {
            let mut body = chat(&secret);
            (body["stream"], body["stream_options"]) = (json!(stream), json!({"include_usage": true}));
            if !stream {
                body.as_object_mut().unwrap().remove("stream_options");
            }
            let reply = server.post("/v1/chat/completions", &body);
            usage.push(if stream { reply.events().pop().unwrap() } else { reply.ok() }["usage"].clone());
        }
        server.refused("/v1/chat/completions", &json!({"messages": [], "confidential": 1}), 400);
        server.get("/v1/models?order=asc");
        server.get("/health");
    });
    assert_eq!(lines.len(), 4, "who asks whether the server lives leaves no line: {text}");
    for (line, usage) in lines.iter().zip(&usage) {
        assert_eq!(
            (&line["route"], &line["status"], &line["model"]),
            (&json!("/v1/chat/completions"), &json!(200), &json!("qwen2"))
        );
        assert_eq!(line["prompt_tokens"], usage["prompt_tokens"]);
        assert_eq!(line["cached_tokens"], usage["prompt_tokens_details"]["cached_tokens"]);
        assert_eq!(line["generated_tokens"], 4);
        assert!(line["request_id"].as_str().unwrap().starts_with("req_") && line["ms"].as_f64() > Some(0.0), "{line}");
        assert!(line.get("cut").is_none(), "{line}");
    }
    assert_eq!(lines[0]["missed"], json!({"why": "new", "common_tokens": 0}));
    assert!(lines[1].get("missed").is_none() && lines[1]["cached_tokens"].as_u64() > Some(64), "{}", lines[1]);
    assert_eq!((&lines[2]["status"], &lines[2]["param"]), (&json!(400), &json!("messages")));
    assert_eq!((&lines[3]["param"], &lines[3]["code"]), (&json!("order"), &json!("unknown_parameter")));
    assert!(!text.contains("confidential"), "{text}");
}

#[test]
fn prompts_are_shown_where_that_is_asked_for() {
    let (lines, _) = logged(true, |server| drop(server.post("/v1/chat/completions", &chat("a word of mine")).ok()));
    assert!(lines[0]["prompt"].as_str().unwrap().contains("a word of mine"), "{}", lines[0]);
}

#[test]
fn an_answer_that_was_left_is_told_as_such() {
    let (lines, _) = logged(false, |server| {
        let mut body = chat("Go on");
        (body["max_tokens"], body["stream"]) = (json!(1900), json!(true));
        let mut connection = server.send("POST", "/v1/chat/completions", "", body.to_string().as_bytes());
        connection.read_exact(&mut [0; 900]).unwrap();
        drop(connection);
        while server.get("/v1/loads").ok()["loads"][0]["running"] != 0 {}
    });
    let left = lines.iter().find(|line| line["route"] == "/v1/chat/completions").unwrap();
    assert!(left["cut"] == true && left["generated_tokens"].as_u64() > Some(0), "{left}");
    assert!(left["generated_tokens"].as_u64() < Some(1900) && left["prompt_tokens"].as_u64() > Some(0), "{left}");
}

#[test]
fn a_request_that_is_no_good_at_all_has_a_line_too() {
    let (lines, _) = logged(false, |server| {
        let reply = Reply::read(server.send("POST", "/v1/embeddings", "", b"\xff"));
        assert_eq!(reply.status, 400);
        server.get("/v1/nothing");
    });
    assert_eq!(
        (&lines[0]["status"], &lines[1]["status"], &lines[1]["route"]),
        (&json!(400), &json!(404), &json!("none"))
    );
}
