//! Adapters behind names of their own: in every interface, many at once, taken in and let go while the server runs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use qwenkit_server::{AdapterSource, Config, Keys};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{Reply, Running, model, serve_config, serve_with};

pub(crate) fn recorded(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity-train").join(name).join("adapter_init")
}

/// The recorded adapter, twice as strong.
fn stronger() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let from = recorded("qwen2");
    fs::copy(from.join("adapter_model.safetensors"), folder.path().join("adapter_model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(from.join("adapter_config.json")).unwrap()).unwrap();
    config["lora_alpha"] = json!(config["lora_alpha"].as_f64().unwrap() * 2.0);
    fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    folder
}

fn source(name: &str, path: &Path) -> AdapterSource {
    AdapterSource { name: name.to_owned(), path: path.to_owned() }
}

const NAMES: [&str; 3] = ["qwen2", "mild", "strong"];

fn serve(strong: &TempDir) -> Running {
    let adapters = vec![source("mild", &recorded("qwen2")), source("strong", strong.path())];
    serve_with(vec![model("qwen2", 2048, 64).with_adapters(adapters)], &[])
}

fn ask(name: &str) -> Value {
    let messages =
        json!([{"role": "user", "content": "Tell me about the river that runs past the old mill, and its people."}]);
    json!({"model": name, "messages": messages, "max_tokens": 12, "temperature": 0, "logprobs": true, "top_logprobs": 5, "ignore_eos": true})
}

fn logprobs(answer: &Value) -> Value {
    answer["choices"][0]["logprobs"].clone()
}

#[test]
fn adapters_are_models_and_answer_together_as_alone() {
    let strong = stronger();
    let alone = NAMES.map(|name| logprobs(&serve(&strong).post("/v1/chat/completions", &ask(name)).ok()));
    assert!(alone[0] != alone[1] && alone[1] != alone[2] && alone[0] != alone[2]);
    let server = serve(&strong);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            for (name, alone) in NAMES.iter().zip(&alone) {
                let server = &server;
                scope.spawn(move || {
                    let answer = server.post("/v1/chat/completions", &ask(name)).ok();
                    assert_eq!((&answer["model"], &logprobs(&answer)), (&json!(name), alone));
                });
            }
        }
    });
    let list = server.get("/v1/models").ok();
    let ids: Vec<&str> = list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, NAMES);
    assert_eq!((&list["data"][1]["parent"], &list["data"][0]["parent"]), (&json!("qwen2"), &Value::Null));
    assert_eq!(server.get("/v1/models/strong").ok()["id"], "strong");
    assert_eq!(server.get("/server_info").ok()["models"].as_array().unwrap().len(), 1, "one model in memory");
}

#[test]
fn every_interface_knows_an_adapter_by_its_name() {
    let strong = stronger();
    let server = serve(&strong);
    let differs = |path: &str, body: Value, at: &str| {
        let of = |name: &str| {
            let mut body = body.clone();
            body["model"] = json!(name);
            server.post(path, &body).ok().pointer(at).unwrap_or_else(|| panic!("{path}: no {at}")).clone()
        };
        assert_ne!(of("qwen2"), of("strong"), "{path}");
        assert_eq!(of("strong"), of("strong"), "{path}");
    };
    let messages = ask("")["messages"].clone();
    let options = json!({"temperature": 0, "num_predict": 12});
    differs("/v1/completions", json!({"prompt": "Hello", "max_tokens": 12, "temperature": 0}), "/choices/0/text");
    differs(
        "/v1/responses",
        json!({"input": "Hello", "max_output_tokens": 12, "temperature": 0, "ignore_eos": true}),
        "/output/0/content/0/text",
    );
    differs("/v1/messages", json!({"messages": messages, "max_tokens": 12, "temperature": 0}), "/content/0/text");
    differs("/api/chat", json!({"messages": messages, "stream": false, "options": options}), "/message/content");
    differs("/api/generate", json!({"prompt": "Hello", "raw": true, "stream": false, "options": options}), "/response");
    differs("/v1/embeddings", json!({"input": "Hello"}), "/data/0/embedding");
    let tags = server.get("/api/tags").text();
    assert!(tags.contains("\"strong\"") && tags.contains("\"qwen2\""), "{tags}");
    let found = server.post("/tokenize", &json!({"model": "mild", "prompt": "Hello"})).ok();
    assert_eq!(found["tokens"], server.post("/tokenize", &json!({"prompt": "Hello"})).ok()["tokens"]);
}

#[test]
fn an_adapter_is_taken_in_and_let_go_while_others_are_answered() {
    let strong = stronger();
    let expected = logprobs(&serve(&strong).post("/v1/chat/completions", &ask("strong")).ok());
    let server = serve_with(vec![model("qwen2", 2048, 64)], &[]);
    assert_eq!(server.refused("/v1/chat/completions", &ask("strong"), 404)["code"], "model_not_found");
    let path = strong.path().to_str().unwrap();
    let take_in = json!({"lora_name": "strong", "lora_path": path});
    let mut long = ask("qwen2");
    (long["max_tokens"], long["stream"]) = (json!(400), json!(true));
    let stream =
        server.send("POST", "/v1/chat/completions", "content-type: application/json\r\n", long.to_string().as_bytes());
    let told = server.post("/v1/load_lora_adapter", &take_in).ok();
    assert_eq!((&told["id"], &told["parent"]), (&json!("strong"), &json!("qwen2")));
    assert_eq!(logprobs(&server.post("/v1/chat/completions", &ask("strong")).ok()), expected);
    assert_eq!(server.refused("/v1/load_lora_adapter", &take_in, 400)["param"], "lora_name");
    assert!(!Reply::read(stream).events().is_empty());
    // An answer under way keeps the adapter that is let go.
    let mut streamed = ask("strong");
    (streamed["max_tokens"], streamed["stream"]) = (json!(300), json!(true));
    let stream = server.send(
        "POST",
        "/v1/chat/completions",
        "content-type: application/json\r\n",
        streamed.to_string().as_bytes(),
    );
    server.wait_for("/v1/loads", |found| found["loads"][0]["running"] != 0);
    assert_eq!(server.post("/v1/unload_lora_adapter", &json!({"lora_name": "strong"})).ok()["deleted"], true);
    assert_eq!(server.refused("/v1/chat/completions", &ask("strong"), 404)["code"], "model_not_found");
    let events = Reply::read(stream).events();
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(server.refused("/v1/unload_lora_adapter", &json!({"lora_name": "strong"}), 404)["param"], "lora_name");
    // And comes back.
    server.post("/v1/load_lora_adapter", &take_in).ok();
    assert_eq!(logprobs(&server.post("/v1/chat/completions", &ask("strong")).ok()), expected);
}

#[test]
fn of_many_who_load_the_same_name_one_does() {
    let server = serve_with(vec![model("qwen2", 2048, 64)], &[]);
    let body = json!({"lora_name": "one", "lora_path": recorded("qwen2").to_str().unwrap()});
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let load = || server.post("/v1/load_lora_adapter", &body).status;
        let all: Vec<_> = (0..12).map(|_| scope.spawn(load)).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1, "{statuses:?}");
    assert!(statuses.iter().all(|status| [200, 400].contains(status)), "{statuses:?}");
    assert_eq!(server.get("/v1/models").ok()["data"].as_array().unwrap().len(), 2);
}

#[test]
fn what_is_no_adapter_of_the_model_is_refused_by_name() {
    let server = serve_with(vec![model("qwen2", 2048, 64)], &[]);
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    for (body, param, told) in [
        (json!({"lora_path": "x"}), "lora_name", "missing"),
        (json!({"lora_name": "a"}), "lora_path", "missing"),
        (json!({"lora_name": "", "lora_path": "x"}), "lora_name", "0 bytes"),
        (json!({"lora_name": "a", "lora_path": "/no/such/folder"}), "lora_path", "/no/such/folder"),
        (json!({"lora_name": "a", "lora_path": path(&recorded("qwen3"))}), "lora_path", "another model's adapter"),
        (json!({"lora_name": "qwen2", "lora_path": path(&recorded("qwen2"))}), "lora_name", "already"),
        (json!({"lora_name": "default", "lora_path": path(&recorded("qwen2"))}), "lora_name", "already"),
        (json!({"lora_name": "a", "lora_path": "x", "rank": 5}), "rank", "no parameter"),
    ] {
        let error = server.refused("/v1/load_lora_adapter", &body, 400);
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().unwrap().contains(told), "{error}");
    }
    let body = json!({"lora_name": "a", "lora_path": "x", "base_model_name": "gpt"});
    assert_eq!(server.refused("/v1/load_lora_adapter", &body, 404)["code"], "model_not_found");
    // Only who runs the server may have it read files.
    let mut keys = Keys::default();
    keys.add_file(r#"[{"name": "user", "key": "user-key", "scopes": ["models"]}]"#).unwrap();
    let server = serve_config(vec![model("qwen2", 2048, 64)], |config| Config { keys, ..config });
    let body = json!({"lora_name": "a", "lora_path": path(&recorded("qwen2"))}).to_string();
    let headers = "content-type: application/json\r\nauthorization: Bearer user-key\r\n";
    let reply = Reply::read(server.send("POST", "/v1/load_lora_adapter", headers, body.as_bytes()));
    assert_eq!(reply.status, 403, "{}", reply.text());
}
