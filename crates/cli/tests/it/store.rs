//! `list`, `show`, `rm`, and `run` without a model, over a store that holds one.

use std::fs;

use serde_json::{Value, json};

use crate::program::{Place, fixture};

const NAME: &str = "test/tiny:model.gguf";

/// Puts the tiny GGUF file into the store, as a pull of it would leave it.
fn stock(place: &Place) {
    let folder = place.models().join("tiny");
    fs::create_dir_all(&folder).expect("a folder");
    let size_bytes = fs::copy(fixture("parity/qwen2/model.gguf"), folder.join("model.gguf")).expect("copied");
    let manifest = json!({
        "schema": 1, "name": NAME, "repository": "test/tiny", "host": "huggingface",
        "endpoint": "https://example.org", "revision": null, "commit": null, "licence": "apache-2.0",
        "source": "test/tiny on https://example.org", "pulled_unix_s": 1_700_000_000, "main": "model.gguf",
        "files": [{ "path": "model.gguf", "size_bytes": size_bytes, "sha256": "00" }],
    });
    fs::write(folder.join("manifest.json"), manifest.to_string()).expect("writable");
}

#[test]
fn an_empty_store_lists_nothing_and_says_how_to_fill_it() {
    let place = Place::new();
    let outcome = place.run(&["list"]).exits(0);
    assert!(outcome.out.is_empty() && outcome.err.contains("qwenkit pull"), "{outcome:?}");
    assert_eq!(place.run(&["list", "--json"]).exits(0).json(), json!([]));
}

#[test]
fn the_catalogue_names_every_model_with_its_licence() {
    let place = Place::new();
    let table = place.run(&["list", "--all"]).exits(0);
    assert!(table.out.contains("qwen2.5-coder:0.5b") && table.out.contains("apache-2.0"), "{table:?}");
    let all = place.run(&["list", "--all", "--json"]).exits(0).json();
    let entries = all.as_array().expect("an array");
    assert_eq!(entries.len() + 1, table.out.lines().count());
    assert!(entries.iter().all(|entry| entry["licence"].is_string() && entry["here"] == false), "{all}");
}

#[test]
fn a_model_is_listed_shown_run_and_removed() {
    let place = Place::new();
    stock(&place);
    let table = place.run(&["list"]).exits(0);
    assert!(table.out.contains("test/tiny") && table.out.contains("703.5 kB"), "{table:?}");
    let listed = place.run(&["list", "--json"]).exits(0).json();
    assert_eq!((listed[0]["name"].as_str(), listed[0]["licence"].as_str()), (Some(NAME), Some("apache-2.0")));

    let shown = place.run(&["show", NAME, "--json"]).exits(0).json();
    assert_eq!((shown["architecture"].as_str(), shown["context_tokens"].as_u64()), (Some("qwen2"), Some(512)));
    assert_eq!((&shown["has_template"], &shown["vocab"]), (&Value::Bool(true), &Value::from(384)));
    assert!(shown["type_bytes"]["F32"].as_u64().is_some_and(|bytes| bytes > 0), "{shown}");
    assert!(shown["stop_tokens"].as_array().is_some_and(|tokens| tokens.contains(&2.into())), "{shown}");
    let text = place.run(&["show", NAME]).exits(0).out;
    for part in ["licence       apache-2.0", "template      yes", "architecture  qwen2", "types         F32"] {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }

    assert_eq!(shown["images"], false);
    let seeing = place.run(&["show", &fixture("parity/qwen3-vl"), "--json"]).exits(0).json();
    assert_eq!(seeing["images"], true);

    let unnamed = place.run(&["run", "Hello", "--max-tokens", "2"]).exits(0);
    assert!(unnamed.err.contains("model: test/tiny:model.gguf"), "{unnamed:?}");
    place.run(&["run", NAME, "Hello", "--max-tokens", "2"]).exits(0);

    let removed = place.run(&["rm", NAME]).exits(0);
    assert!(removed.out.is_empty() && removed.err.contains("removed test/tiny:model.gguf"), "{removed:?}");
    assert_eq!(place.run(&["list", "--json"]).exits(0).json(), json!([]));
    place.run(&["rm", NAME]).fails_with(1, &[NAME, "is not in the store"]);
}

#[test]
fn files_of_the_users_own_are_never_removed() {
    let place = Place::new();
    let model = place.path("mine.gguf");
    fs::copy(fixture("parity/qwen2/model.gguf"), &model).expect("copied");
    place.run(&["rm", "mine.gguf"]).fails_with(1, &["mine.gguf", "does not belong"]);
    assert!(model.exists());
}

#[test]
fn show_describes_what_this_version_cannot_run_as_far_as_it_goes() {
    let place = Place::new();
    let folder = place.path("future");
    fs::create_dir_all(&folder).expect("a folder");
    for file in ["model.safetensors", "tokenizer.json"] {
        fs::copy(format!("{}/{file}", fixture("parity/qwen2")), folder.join(file)).expect("copied");
    }
    let config = fs::read_to_string(format!("{}/config.json", fixture("parity/qwen2"))).expect("readable");
    let config = config.replace("\"model_type\": \"qwen2\"", "\"model_type\": \"qwen9\"");
    fs::write(folder.join("config.json"), config).expect("writable");
    let shown = place.run(&["show", "./future", "--json"]).exits(0).json();
    assert!(shown["cannot_run"].as_str().is_some_and(|reason| reason.contains("`qwen9`")), "{shown}");
    assert!(shown["parameters"].as_u64().is_some_and(|count| count > 1000), "{shown}");
    place.run(&["run", "./future", "Hello"]).fails_with(1, &["`qwen9`", "qwen2"]);
}
