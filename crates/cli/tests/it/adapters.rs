//! `--adapter`: another answer than the base model's, the same from every form of the adapter's files, and a refusal of what
//! is no adapter of this model.

use crate::program::{Place, fixture};

fn answer(place: &Place, adapter: &[&str]) -> Vec<u64> {
    let model = fixture("parity/qwen2");
    let mut args = vec!["run", "--model", &model, "--prompt-ids", "5,9,77,120", "--max-tokens", "12"];
    args.extend(["--temperature", "0", "--json"]);
    args.extend(adapter);
    let reply = place.run(&args).exits(0).json();
    reply["ids"].as_array().expect("ids").iter().filter_map(serde_json::Value::as_u64).collect()
}

#[test]
fn an_adapter_changes_the_answer() {
    let (place, adapter) = (Place::new(), fixture("parity-train/qwen2/adapter_init"));
    let base = answer(&place, &[]);
    let adapted = answer(&place, &["--adapter", &adapter]);
    assert_eq!((base.len(), adapted.len()), (12, 12));
    assert_ne!(base, adapted);
    assert_eq!(adapted, answer(&place, &["--adapter", &format!("{adapter}/adapter_config.json")]));
}

#[test]
fn what_is_no_adapter_of_the_model_is_refused() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    let fails = |adapter: &str, parts: &[&str]| {
        place.run(&["run", "--model", &model, "--adapter", adapter, "Hello"]).fails_with(1, parts);
    };
    fails(&fixture("parity-train/qwen3/adapter_init"), &["expected 64 and 32", "another model's adapter"]);
    fails(&model, &["a whole model (config.json)"]);
    fails("nowhere", &["nowhere"]);
}

#[test]
fn serve_checks_the_adapters_that_it_is_given() {
    let (place, model, adapter) = (Place::new(), fixture("parity/qwen2"), fixture("parity-train/qwen2/adapter_init"));
    let check = |adapters: &[&str]| {
        let mut args = vec!["serve", &model, "--check", "--port", "0"];
        args.extend(adapters.iter().flat_map(|adapter| ["--adapter", adapter]));
        place.run(&args)
    };
    let good = format!("mine={adapter}");
    check(&[&good]).exits(0);
    check(&[&good, &good]).fails_with(2, &["two models have the name mine"]);
    check(&[&format!("qwen2={adapter}")]).fails_with(2, &["two models have the name qwen2"]);
    let others = format!("mine={}", fixture("parity-train/qwen3/adapter_init"));
    check(&[&others]).fails_with(1, &["--adapter mine", "another model's adapter"]);
    check(&["mine=nowhere"]).fails_with(1, &["--adapter mine", "nowhere"]);
}

#[test]
fn an_adapter_goes_into_the_other_form_and_back() {
    let (place, adapter, model) = (Place::new(), fixture("parity-train/qwen2/adapter_init"), fixture("parity/qwen2"));
    let export = |from: &str, to: &str| place.run(&["export", &model, "--adapter", from, "--out", to]);
    export(&adapter, "one.gguf").exits(0);
    export("one.gguf", "back").exits(0);
    let expected = answer(&place, &["--adapter", &adapter]);
    assert_eq!(expected, answer(&place, &["--adapter", "one.gguf"]));
    assert_eq!(expected, answer(&place, &["--adapter", "back"]));
    export(&adapter, "one.gguf").fails_with(1, &["there already"]);
    export(&fixture("parity-train/qwen3/adapter_init"), "other.gguf").fails_with(1, &["another model's adapter"]);
    assert!(!place.path("other.gguf").exists());
}

/// Lengths of rows (DoRA): trained, in force beside the base, the same when merged, and said to be nothing for a GGUF adapter.
#[test]
fn magnitudes_are_trained_and_merged_and_have_no_place_in_gguf() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    let jsonl: String = (0..8).map(|i| format!("{{\"text\": \"the number {i} comes here\"}}\n")).collect();
    std::fs::write(place.path("text.jsonl"), jsonl).expect("writable");
    let mut args = vec!["tune", "--model", &model, "--data", "text.jsonl", "--out", "mine", "--dora", "--rank", "4"];
    args.extend(["--steps", "3", "--batch", "4", "--lr", "3e-2", "--validation", "0", "--warmup", "0"]);
    place.run(&args).exits(0);
    let config = std::fs::read_to_string(place.path("mine/adapter_config.json")).expect("settings");
    assert!(config.contains("\"use_dora\": true"), "{config}");
    let (base, adapted) = (answer(&place, &[]), answer(&place, &["--adapter", "mine"]));
    assert_ne!(base, adapted);
    place.run(&["merge", "--model", &model, "--adapter", "mine", "--out", "merged"]).exits(0);
    let merged = place.path("merged").display().to_string();
    let args =
        ["run", "--model", &merged, "--prompt-ids", "5,9,77,120", "--max-tokens", "12", "--temperature", "0", "--json"];
    let reply = place.run(&args).exits(0).json();
    let ids: Vec<u64> = reply["ids"].as_array().expect("ids").iter().filter_map(serde_json::Value::as_u64).collect();
    assert_eq!(ids, adapted);
    place
        .run(&["export", &model, "--adapter", "mine", "--out", "mine.gguf"])
        .fails_with(1, &["DoRA", "merge it instead"]);
    assert!(!place.path("mine.gguf").exists());
    place.run(&["serve", &model, "--check", "--port", "0", "--adapter", "mine=mine"]).exits(0);
}
