//! What the server keeps: responses that follow each other, files, batches - through restarts, and apart for each key.

use serde_json::{Value, json};

use crate::client::{Reply, Running, model, serve, serve_at, serve_with};

fn delete(server: &Running, path: &str) -> Reply {
    Reply::read(server.send("DELETE", path, "", b""))
}

fn text_of(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap_or_else(|| panic!("{response}"))
}

#[test]
fn responses_follow_on_each_other_through_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = || Some(folder.path().to_owned());
    let ask = |input: &str| json!({"model": "qwen2", "input": input, "temperature": 0, "max_output_tokens": 6, "ignore_eos": true});
    let (first, second) = {
        let server = serve_at(vec![model("qwen2", 2048, 64)], &[], store());
        let first = server.post("/v1/responses", &ask("Hello")).ok();
        assert_eq!(
            (&first["status"], &first["incomplete_details"]["reason"]),
            (&json!("incomplete"), &json!("max_output_tokens"))
        );
        let mut next = ask("Again");
        next["previous_response_id"] = first["id"].clone();
        (first, server.post("/v1/responses", &next).ok())
    };
    let server = serve_at(vec![model("qwen2", 2048, 64)], &[], store());
    let path = format!("/v1/responses/{}", first["id"].as_str().unwrap());
    assert_eq!(server.get(&path).ok(), first);
    let mut next = ask("Again");
    next["previous_response_id"] = first["id"].clone();
    let repeated = server.post("/v1/responses", &next).ok();
    assert_eq!(text_of(&repeated), text_of(&second));
    // The same as the whole conversation at once.
    let whole = json!({
        "temperature": 0, "max_tokens": 6, "ignore_eos": true,
        "messages": [
            {"role": "user", "content": "Hello"}, {"role": "assistant", "content": text_of(&first)},
            {"role": "user", "content": "Again"},
        ],
    });
    let whole = server.post("/v1/chat/completions", &whole).ok();
    assert_eq!(whole["choices"][0]["message"]["content"], text_of(&second));
    let items = server.get(&format!("{path}/input_items")).ok();
    assert_eq!(items["data"][0]["content"][0]["text"], "Hello");
    assert_eq!(delete(&server, &path).ok()["deleted"], true);
    assert_eq!(server.get(&path).status, 404);
    assert_eq!(server.refused("/v1/responses", &next, 404)["param"], "previous_response_id");
}

#[test]
fn events_of_a_response_say_what_it_says_and_it_is_kept() {
    let server = serve();
    let mut ask = json!({"input": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_output_tokens": 8, "ignore_eos": true});
    let whole = server.post("/v1/responses", &ask).ok();
    ask["stream"] = json!(true);
    let text = server.post("/v1/responses", &ask).text();
    let events: Vec<Value> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(events.iter().enumerate().all(|(i, event)| event["sequence_number"] == i));
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(
        &kinds[..4],
        ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    );
    let deltas: String = events
        .iter()
        .filter(|e| e["type"] == "response.output_text.delta")
        .map(|e| e["delta"].as_str().unwrap())
        .collect();
    assert_eq!(deltas, text_of(&whole));
    let last = events.last().unwrap();
    assert_eq!((kinds[kinds.len() - 1], text_of(&last["response"])), ("response.incomplete", text_of(&whole)));
    let kept = server.get(&format!("/v1/responses/{}", last["response"]["id"].as_str().unwrap())).ok();
    assert_eq!(kept, last["response"]);
    ask["store"] = json!(false);
    ask["stream"] = json!(false);
    let unkept = server.post("/v1/responses", &ask).ok();
    assert_eq!(server.get(&format!("/v1/responses/{}", unkept["id"].as_str().unwrap())).status, 404);
}

#[test]
fn responses_in_the_background_are_fetched_later() {
    let server = serve();
    let ask = json!({"input": "Hi", "background": true, "max_output_tokens": 5, "ignore_eos": true});
    let begun = server.post("/v1/responses", &ask).ok();
    assert_eq!(begun["status"], "in_progress");
    let path = format!("/v1/responses/{}", begun["id"].as_str().unwrap());
    let ended = server.wait_for(&path, |response| response["status"] != "in_progress");
    assert_eq!(ended["status"], "incomplete");
    let long = json!({"input": "Hi", "background": true, "max_output_tokens": 1900, "ignore_eos": true});
    let begun = server.post("/v1/responses", &long).ok();
    let path = format!("/v1/responses/{}", begun["id"].as_str().unwrap());
    assert_eq!(server.post(&format!("{path}/cancel"), &json!({})).ok()["status"], "cancelled");
    assert_eq!(server.get(&path).ok()["status"], "cancelled");
    for (body, param) in [
        (json!({}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": [{"type": "magic"}]}), "input[0].type"),
        (json!({"input": [{"role": "user", "content": 5}]}), "input[0].content"),
        (
            json!({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]}),
            "input[0].arguments",
        ),
        (json!({"input": "x", "conversation": "c"}), "conversation"),
        (json!({"input": "x", "background": true, "store": false}), "store"),
        (json!({"input": "x", "text": {"format": {"type": "json_schema", "schema": 1}}}), "text.format.schema"),
        (json!({"input": "x", "colour": 1}), "colour"),
    ] {
        assert_eq!(server.refused("/v1/responses", &body, 400)["param"], param, "{body}");
    }
}

fn input(count: usize) -> String {
    let line = |i: usize| {
        let body = json!({"model": "qwen2", "messages": [{"role": "user", "content": format!("Question {i}")}], "max_tokens": 5, "temperature": 0});
        json!({"custom_id": format!("c{i}"), "method": "POST", "url": "/v1/chat/completions", "body": body}).to_string()
    };
    let mut lines: Vec<String> = (0..count).map(line).collect();
    lines.push(lines[0].replace("\"c0\"", "\"bad\"").replace("max_tokens", "colour"));
    lines.join("\n")
}

fn batch(server: &Running, file: &Value) -> Value {
    let body = json!({"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h", "metadata": {"a": "b"}});
    server.post("/v1/batches", &body).ok()
}

fn is_over(batch: &Value) -> bool {
    ["completed", "failed", "cancelled"].contains(&batch["status"].as_str().unwrap())
}

#[test]
fn a_batch_is_finished_by_the_next_server_and_every_line_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = || Some(folder.path().to_owned());
    let path = {
        let server = serve_at(vec![model("qwen2", 2048, 64)], &[], store());
        let file = server.upload("", "batch", &input(30)).ok();
        assert_eq!((&file["purpose"], &file["filename"]), (&json!("batch"), &json!("in.jsonl")));
        let path = format!("/v1/batches/{}", batch(&server, &file)["id"].as_str().unwrap());
        server.wait_for(&path, |batch| batch["request_counts"]["completed"].as_u64() >= Some(3));
        path
    };
    let server = serve_at(vec![model("qwen2", 2048, 64)], &[], store());
    let ended = server.wait_for(&path, is_over);
    assert_eq!(ended["request_counts"], json!({"total": 31, "completed": 30, "failed": 1}));
    let lines = |key: &str| {
        let content = server.get(&format!("/v1/files/{}/content", ended[key].as_str().unwrap())).text();
        content.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    let results = lines("output_file_id");
    let ids: Vec<&str> = results.iter().map(|result| result["custom_id"].as_str().unwrap()).collect();
    assert_eq!(ids, (0..30).map(|i| format!("c{i}")).collect::<Vec<_>>());
    assert_eq!(lines("error_file_id")[0]["response"]["status_code"], 400);
    // What a line says is what the request alone says.
    let alone = json!({"messages": [{"role": "user", "content": "Question 17"}], "max_tokens": 5, "temperature": 0});
    let alone = server.post("/v1/chat/completions", &alone).ok();
    assert_eq!(results[17]["response"]["body"]["choices"], alone["choices"]);
    assert_eq!(server.get("/v1/batches").ok()["data"][0]["id"], ended["id"]);
}

#[test]
fn bad_files_and_batches_are_refused_or_fail_with_their_lines() {
    let server = serve();
    assert_eq!(server.upload("", "poetry", "x").status, 400);
    let broken =
        server.send("POST", "/v1/files", "content-type: multipart/form-data; boundary=b\r\n", b"--b\r\nnonsense");
    assert_eq!(Reply::read(broken).status, 400);
    let file = server.upload("", "batch", "{}\nnonsense").ok();
    let path = format!("/v1/batches/{}", batch(&server, &file)["id"].as_str().unwrap());
    let ended = server.wait_for(&path, is_over);
    assert_eq!((&ended["status"], ended["errors"]["data"].as_array().unwrap().len()), (&json!("failed"), 2));
    let error = server.post(&format!("{path}/cancel"), &json!({}));
    assert_eq!(error.status, 400, "{}", error.text());
    let missing = json!({"input_file_id": "file-x", "endpoint": "/v1/embeddings", "completion_window": "24h"});
    assert_eq!(server.refused("/v1/batches", &missing, 404)["param"], "input_file_id");
    let bad = json!({"input_file_id": file["id"], "endpoint": "/v1/magic", "completion_window": "24h"});
    assert_eq!(server.refused("/v1/batches", &bad, 400)["param"], "endpoint");
    let path = format!("/v1/files/{}", file["id"].as_str().unwrap());
    assert_eq!(delete(&server, &path).ok()["deleted"], true);
    assert_eq!(server.get(&path).status, 404);
}

#[test]
fn a_key_sees_its_own_things_alone() {
    let server = serve_with(vec![model("qwen2", 2048, 64)], &["one", "two"]);
    let file = server.upload("authorization: Bearer one\r\n", "user_data", "x").ok();
    let get =
        |key: &str, path: &str| Reply::read(server.send("GET", path, &format!("authorization: Bearer {key}\r\n"), b""));
    let path = format!("/v1/files/{}", file["id"].as_str().unwrap());
    assert_eq!((get("one", &path).status, get("two", &path).status), (200, 404));
    assert_eq!(get("two", "/v1/files").ok()["data"], json!([]));
    assert_eq!(get("one", &format!("{path}/content")).text(), "x");
}
