//! Several models behind one server: loaded when they are asked for, unloaded when memory is short and nobody uses them.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use qwenkit_server::{LoadRefusal, ModelSource};
use serde_json::{Value, json};

use crate::client::{Running, serve_with, session};

fn refusal(needs_memory: bool) -> LoadRefusal {
    LoadRefusal { message: "it needs 9 GB and there is 1 GB".to_owned(), needs_memory }
}

fn ask(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3})
}

fn loaded(server: &Running) -> Vec<bool> {
    let list = server.get("/v1/models").ok();
    list["data"].as_array().unwrap().iter().map(|model| model["loaded"].as_bool().unwrap()).collect()
}

#[test]
fn a_model_is_loaded_once_when_it_is_first_asked_for() {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let later = ModelSource::on_demand("later".to_owned(), Vec::new(), None, move || {
        counted.fetch_add(1, Ordering::Relaxed);
        Ok(session("qwen3"))
    });
    let server = serve_with(vec![ModelSource::loaded("first".to_owned(), Vec::new(), session("qwen2")), later], &[]);
    assert_eq!((loaded(&server), count.load(Ordering::Relaxed)), (vec![true, false], 0));
    std::thread::scope(|scope| {
        let asked: Vec<_> =
            (0..4).map(|_| scope.spawn(|| server.post("/v1/chat/completions", &ask("later")).ok())).collect();
        for answer in asked {
            assert_eq!(answer.join().unwrap()["model"], "later");
        }
    });
    assert_eq!((loaded(&server), count.load(Ordering::Relaxed)), (vec![true, true], 1));
    server.post("/v1/chat/completions", &ask("default")).ok();
    let metrics = server.get("/metrics").text();
    assert!(metrics.contains("model_name=\"first\"") && metrics.contains("model_name=\"later\""));
}

#[test]
fn an_idle_model_makes_room_and_comes_back() {
    // Room for one: whoever loads while the other is there is refused.
    let there = Arc::new(AtomicUsize::new(0));
    let source = |name: &str, checkpoint: &'static str, refusals: usize| {
        let there = Arc::clone(&there);
        ModelSource::on_demand(name.to_owned(), Vec::new(), None, move || {
            match there.fetch_add(1, Ordering::Relaxed) < refusals {
                true => Err(refusal(true)),
                false => Ok(session(checkpoint)),
            }
        })
    };
    // The first load goes through, the second is refused once.
    let server = serve_with(vec![source("a", "qwen2", 0), source("b", "qwen3", 2)], &[]);
    server.post("/v1/chat/completions", &ask("a")).ok();
    assert_eq!(loaded(&server), [true, false]);
    server.post("/v1/chat/completions", &ask("b")).ok();
    assert_eq!(loaded(&server), [false, true], "a made room for b");
    server.post("/v1/chat/completions", &ask("a")).ok();
    assert_eq!(loaded(&server), [true, true]);
}

#[test]
fn a_model_that_cannot_be_loaded_is_its_own_requests_fault_alone() {
    let never = |name: &str, needs_memory| {
        ModelSource::on_demand(name.to_owned(), Vec::new(), None, move || Err(refusal(needs_memory)))
    };
    let first = ModelSource::loaded("first".to_owned(), Vec::new(), session("qwen2"));
    let server = serve_with(vec![first, never("huge", true), never("broken", false)], &[]);
    for name in ["huge", "broken"] {
        let error = server.refused("/v1/chat/completions", &ask(name), 503);
        assert!(error["code"] == "model_not_loaded" && error["message"].as_str().unwrap().contains("9 GB"), "{error}");
    }
    server.post("/v1/chat/completions", &ask("first")).ok();
    assert_eq!(loaded(&server), [true, false, false], "what cannot be loaded again is not unloaded");
}

#[test]
fn ollama_lists_what_openai_lists_loaded_or_not() {
    let later = ModelSource::on_demand("later".to_owned(), Vec::new(), None, || Ok(session("qwen3")));
    let first = ModelSource::loaded("first".to_owned(), Vec::new(), session("qwen2"));
    let server = serve_with(vec![first, later], &[]);
    let names = |path: &str, list: &str, name: &str| {
        let found = server.get(path).ok();
        found[list].as_array().unwrap().iter().map(|model| model[name].clone()).collect::<Vec<_>>()
    };
    let tags = || names("/api/tags", "models", "name");
    assert_eq!((tags(), tags()), (names("/v1/models", "data", "id"), vec![json!("first"), json!("later")]));
    assert_eq!(names("/api/ps", "models", "name"), ["first"]);
    assert_eq!(server.get("/api/tags").ok()["models"][1]["size"], 0);
    server.post("/api/show", &json!({"model": "later"})).ok();
    assert_eq!(names("/api/ps", "models", "name"), ["first", "later"]);
    assert!(server.get("/api/tags").ok()["models"][1]["size"].as_u64() > Some(0));
}
