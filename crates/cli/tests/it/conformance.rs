//! `doctor --conformance` passes what is right, and fails whenever a record, a model or the folder is not.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::program::{Outcome, Place, fixture};
use crate::recorded::{self, Tensor};

const EXPECTED: &str = "expected.safetensors";

/// A copy of a checkpoint in `checks/NAME`, its GGUF file left out.
fn copy(place: &Place, name: &str) -> PathBuf {
    let folder = place.path("checks").join(name);
    fs::create_dir_all(&folder).expect("a folder");
    for entry in fs::read_dir(fixture("parity/qwen2")).expect("a fixture") {
        let path = entry.expect("an entry").path();
        let file = path.file_name().expect("a name");
        if file != "model.gguf" {
            fs::copy(&path, folder.join(file)).expect("copied");
        }
    }
    folder
}

fn alter(folder: &Path, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
    let path = folder.join(EXPECTED);
    let mut tensors = recorded::read(&path);
    change(&mut tensors);
    recorded::write(&path, &tensors);
}

fn conformance(place: &Place) -> Outcome {
    place.run(&["doctor", "--conformance", "checks"])
}

#[test]
fn the_fixtures_pass_line_by_line() {
    let place = Place::new();
    let outcome = place.run(&["doctor", "--conformance", &fixture("parity")]).exits(0);
    let lines: Vec<&str> = outcome.out.lines().collect();
    let (last, models) = lines.split_last().expect("lines");
    // Every checkpoint folder, and every GGUF twin in one.
    let folders = fs::read_dir(fixture("parity")).expect("fixtures").map(|entry| entry.expect("a folder").path());
    let models_of =
        |folder: PathBuf| ["config.json", "model.gguf"].iter().filter(|name| folder.join(name).exists()).count();
    let expected: usize = folders.map(models_of).sum();
    assert!(expected >= 7 && models.len() == expected, "{expected} models: {outcome:?}");
    assert!(models.iter().all(|line| line.starts_with("pass  qwen")), "{outcome:?}");
    let is_split = |line: &&str| {
        line.contains("; cut and forked from the cached prefix at each of ")
            && line.ends_with(" positions, the same bits")
    };
    assert!(models.iter().all(is_split), "{outcome:?}");
    assert_eq!(*last, format!("{expected} passed, 0 failed, 0 skipped"));
}

#[test]
fn one_altered_logit_fails_and_is_named() {
    let place = Place::new();
    copy(&place, "good");
    let bad = copy(&place, "bad");
    alter(&bad, |tensors| {
        let logits = tensors.get_mut("logits").expect("logits");
        let at = (3 * 384 + 5) * 4;
        let changed = f32::from_le_bytes(logits.bytes[at..at + 4].try_into().expect("four bytes")) + 1e-3;
        logits.bytes[at..at + 4].copy_from_slice(&changed.to_le_bytes());
    });
    let outcome = conformance(&place).exits(1);
    assert!(outcome.out.contains("fail  bad: largest logit difference 1.0e-3 at token 3, id 5"), "{outcome:?}");
    assert!(outcome.out.contains("pass  good: ") && outcome.out.ends_with("1 passed, 1 failed, 0 skipped\n"));
    let report = place.run(&["doctor", "--conformance", "checks", "--json"]).exits(1).json();
    assert_eq!((&report["passed"], &report["failed"]), (&Value::from(1), &Value::from(1)), "{report}");
    assert_eq!(report["models"][0]["result"], "fail", "sorted by name: {report}");
}

#[test]
fn a_logit_that_is_no_number_fails() {
    let place = Place::new();
    let folder = copy(&place, "nan");
    alter(&folder, |tensors| {
        tensors.get_mut("logits").expect("logits").bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    assert!(conformance(&place).exits(1).out.contains("difference NaN at token 0, id 0"));
}

#[test]
fn an_altered_greedy_token_fails() {
    let place = Place::new();
    let folder = copy(&place, "greedy");
    alter(&folder, |tensors| tensors.get_mut("greedy_ids").expect("ids").bytes[0] ^= 1);
    assert!(conformance(&place).exits(1).out.contains("fail  greedy: greedy token 0 is "));
}

#[test]
fn a_record_that_contradicts_itself_fails() {
    let place = Place::new();
    let folder = copy(&place, "short");
    alter(&folder, |tensors| {
        let ids = tensors.get_mut("input_ids").expect("ids");
        ids.bytes.truncate(8);
        ids.shape = vec![1];
    });
    assert!(conformance(&place).exits(1).out.contains("contradicts itself"));
    alter(&folder, |tensors| drop(tensors.remove("greedy_ids")));
    assert!(conformance(&place).exits(1).out.contains("has no tensor `greedy_ids`"));
}

#[test]
fn weights_that_are_cut_short_fail() {
    let place = Place::new();
    let folder = copy(&place, "cut");
    let path = folder.join("model.safetensors");
    let whole = fs::read(&path).expect("readable");
    fs::write(&path, &whole[..whole.len() - 100]).expect("writable");
    assert!(conformance(&place).exits(1).out.contains("fail  cut: "));
}

#[test]
fn what_this_version_does_not_run_is_skipped_with_its_reason_and_counted() {
    let place = Place::new();
    copy(&place, "good");
    let config = copy(&place, "future").join("config.json");
    let text = fs::read_to_string(&config).expect("readable");
    let future = text.replace("\"model_type\": \"qwen2\"", "\"model_type\": \"qwen9\"");
    assert_ne!(text, future);
    fs::write(&config, future).expect("writable");
    let outcome = conformance(&place).exits(0);
    assert!(outcome.out.contains("skip  future: ") && outcome.out.contains("`qwen9`"), "{outcome:?}");
    assert!(outcome.out.ends_with("1 passed, 0 failed, 1 skipped\n"), "{outcome:?}");
}

#[test]
fn patches_for_a_model_without_eyes_fail() {
    let place = Place::new();
    let seeing = copy(&place, "seeing");
    alter(&seeing, |tensors| {
        let pixels = tensors["logits"].clone();
        tensors.insert("pixel_values".into(), pixels);
    });
    let outcome = conformance(&place).exits(1);
    assert!(outcome.out.contains("fail  seeing: ") && outcome.out.contains("qwen2 reads text only"), "{outcome:?}");
}

#[test]
fn a_folder_without_any_record_is_a_failure() {
    let place = Place::new();
    fs::create_dir_all(place.path("checks")).expect("a folder");
    conformance(&place).fails_with(1, &["found no `expected.safetensors`"]);
    place.run(&["doctor", "--conformance", "missing"]).fails_with(1, &["missing"]);
}

#[test]
fn doctor_describes_the_machine() {
    let place = Place::new();
    let report = place.run(&["doctor", "--json", "--threads", "1"]).exits(0).json();
    assert_eq!(report["threads"], 1);
    assert!(report["available_isas"].as_array().is_some_and(|isas| isas.contains(&report["isa"])), "{report}");
    #[cfg(target_os = "linux")]
    for key in ["memory_bytes", "memory_available_bytes", "bandwidth_bytes_per_s"] {
        assert!(report[key].as_f64().is_some_and(|value| value > 0.0), "{key}: {report}");
    }
    let mut unknown = place.command(&["doctor"]);
    let output = unknown.env("QWENKIT_ISA", "mmx").output().expect("it ends");
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && err.contains("`mmx`") && err.contains("portable"), "{err}");
}
