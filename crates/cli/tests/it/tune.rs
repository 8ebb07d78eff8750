//! `tune` and `classify`: recorded cases come out as PyTorch's, a classifier is tuned, used and written as PEFT writes it, a run
//! that is killed goes on with the same numbers, and data that cannot be learnt from are refused with line and reason.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use qwenkit_formats::{Adapter, read_safetensors_file};
use serde_json::Value;

use crate::program::{Place, fixture};

fn f32s(path: &Path, name: &str) -> Vec<f32> {
    let file = read_safetensors_file(path).expect("a file");
    let info = file.tensor(name).unwrap_or_else(|| panic!("no tensor `{name}`"));
    let mut bytes = vec![0; info.len_bytes];
    file.read(info, 0, &mut bytes).expect("readable");
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn a_recorded_case_comes_out_as_recorded() {
    let place = Place::new();
    let (model, case) = (fixture("parity/qwen3"), fixture("parity-train/qwen3"));
    let (init, record) = (format!("{case}/adapter_init"), format!("{case}/train.safetensors"));
    let mut args = vec!["tune", "--model", &model, "--adapter-init", &init, "--ids", &record, "--steps", "8"];
    args.extend(["--lr", "1e-2", "--weight-decay", "0.01", "--schedule", "constant", "--no-clip"]);
    args.extend(["--dump", "out.safetensors"]);
    place.run(&args).exits(0);
    let out = place.path("out.safetensors");
    let expected = read_safetensors_file(Path::new(&record)).expect("a record");
    let (mut gradients, mut finals) = (0, 0);
    for info in expected.tensors() {
        let limit = match info.name.split('.').next() {
            Some("grad") => 1e-4,
            Some("final") => 1e-2,
            Some("losses") => 1e-3,
            _ => continue,
        };
        let (found, expected) = (f32s(&out, &info.name), f32s(Path::new(&record), &info.name));
        assert_eq!(found.len(), expected.len(), "{}", info.name);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let apart: f64 = found.iter().zip(&expected).map(|(a, b)| square(a - b)).sum();
        let length: f64 = expected.iter().map(|x| square(*x)).sum();
        assert!((apart / length).sqrt() < limit, "{}: {}", info.name, (apart / length).sqrt());
        gradients += usize::from(limit == 1e-4);
        finals += usize::from(limit == 1e-2);
    }
    assert!(gradients >= 56 && finals >= 14);
    assert!((f32s(&out, "loss0")[0] - f32s(Path::new(&record), "losses")[0]).abs() < 1e-5);
}

/// Texts about two things.
fn intents() -> String {
    let mut text = "text,category\n".to_owned();
    for i in 0..24 {
        text.push_str(&format!("\"where is my card, number {i}?\",card\n"));
        text.push_str(&format!("how do I pay {i} by transfer,money\n"));
    }
    text
}

fn tune<'a>(model: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["tune", "--model", model, "--data", "intents.csv", "--out", out, "--rank", "4", "--batch", "8"];
    args.extend(["--lr", "1e-2", "--validation", "8"]);
    args.extend(more);
    args
}

#[test]
fn a_classifier_is_tuned_and_used() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    fs::write(place.path("intents.csv"), intents()).expect("writable");
    let told = place.run(&tune(&model, "out", &["--steps", "30"])).exits(0);
    for part in ["40 samples to learn from, 8 to validate with; 30 steps of 8", "memory: ", "(best so far)", "done in"]
    {
        assert!(told.err.contains(part), "`{part}` is not in: {}", told.err);
    }
    let adapter = Adapter::open(&place.path("out")).expect("an adapter");
    assert_eq!(adapter.settings.task_type.as_deref(), Some("SEQ_CLS"));
    assert_eq!((adapter.settings.rank, adapter.settings.modules_to_save.len()), (Some(4), 1));
    assert_eq!((adapter.whole[0].name.as_str(), &adapter.whole[0].shape[..]), ("score.weight", &[2, 64][..]));
    let metrics = fs::read_to_string(place.path("out/metrics.jsonl")).expect("figures");
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.iter().filter(|line| line["loss"].is_f64()).count(), 30);
    assert!(!place.path("out/checkpoint.safetensors").exists());
    let record: Value =
        serde_json::from_slice(&fs::read(place.path("out/qwenkit.json")).expect("a record")).expect("JSON");
    assert_eq!(record["classifier"]["labels"], serde_json::json!(["card", "money"]));
    assert_eq!(record["data"]["files"][0]["sha256"].as_str().map(str::len), Some(64));
    assert!(place.path("out/report.html").is_file());

    let input = b"{\"text\": \"where is my card?\", \"id\": 7}\n{}\n{\"text\": \"how do I pay by transfer\"}\n";
    let found = place.run_with(&["classify", "--model", &model, "--adapter", "out", "--jsonl"], input).exits(1);
    let lines = found.json_lines();
    assert_eq!((&lines[0]["label"], &lines[0]["id"]), (&"card".into(), &7.into()));
    assert!(lines[1]["error"].as_str().is_some_and(|error| error.starts_with("line 2: ")));
    assert_eq!(lines[2]["label"], "money");
    let sum: f64 = lines[2]["top"].as_array().expect("labels").iter().filter_map(|l| l["probability"].as_f64()).sum();
    assert!((sum - 1.0).abs() < 1e-9);
    let one = place.run(&["classify", "--model", &model, "--adapter", "out", "where is my card?"]).exits(0);
    assert!(one.out.starts_with("card\t"), "{one:?}");
    // A finished run is not written over, nor gone on with.
    place.run(&tune(&model, "out", &[])).fails_with(2, &["holds an adapter"]);
    place.run(&tune(&model, "out", &["--resume"])).fails_with(2, &["a finished run"]);
    let other = fixture("parity/qwen3");
    place.run(&["classify", "--model", &other, "--adapter", "out", "x"]).fails_with(1, &["another model's adapter"]);
    let plain = fixture("parity-train/qwen2/adapter_init");
    place.run(&["classify", "--model", &model, "--adapter", &plain, "x"]).fails_with(1, &["qwenkit.json"]);
}

#[test]
fn a_run_that_is_killed_goes_on_with_the_same_numbers() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    fs::write(place.path("intents.csv"), intents()).expect("writable");
    let more = ["--steps", "60", "--checkpoint-every", "2", "--validate-every", "7"];
    place.run(&tune(&model, "whole", &more)).exits(0);
    let mut child = place.command(&tune(&model, "cut", &more));
    let mut child = child.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let steps = || fs::read_to_string(place.path("cut/metrics.jsonl")).map_or(0, |text| text.lines().count());
    while steps() < 5 && child.try_wait().expect("a child").is_none() {
        std::thread::yield_now();
    }
    child.kill().expect("killed");
    child.wait().expect("ended");
    assert!(place.path("cut/checkpoint.safetensors").exists(), "killed after {} steps", steps());
    place.run(&tune(&model, "cut", &more)).fails_with(2, &["a run that was cut off", "--resume"]);
    let others = ["--steps", "61", "--checkpoint-every", "2", "--validate-every", "7", "--resume"];
    place.run(&tune(&model, "cut", &others)).fails_with(1, &["then: steps: 60; now: steps: 61"]);
    // The same files, read into other samples.
    let others = [&more[..], &["--resume", "--context", "24", "--too-long", "cut"]].concat();
    place.run(&tune(&model, "cut", &others)).fails_with(1, &["tokens and goals"]);
    let told = place.run(&tune(&model, "cut", &[&more[..], &["--resume"]].concat())).exits(0);
    assert!(told.err.contains("going on after step"), "{told:?}");
    let read = |path: &str| fs::read(place.path(path)).expect("a file");
    assert!(read("whole/adapter_model.safetensors") == read("cut/adapter_model.safetensors"), "the adapters differ");
    let losses = |path: &str| -> Vec<String> {
        let text = String::from_utf8(read(path)).expect("text");
        let line = |line: &str| serde_json::from_str::<Value>(line).expect("JSON");
        text.lines().map(line).map(|line| format!("{} {}", line["loss"], line["validation_loss"])).collect()
    };
    assert_eq!(losses("whole/metrics.jsonl"), losses("cut/metrics.jsonl"));
}

/// A disk that is full, as far as a limit on the size of files can play one.
#[test]
#[cfg(unix)]
fn a_full_disk_costs_no_more_than_the_steps_since_the_last_checkpoint() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    fs::write(place.path("intents.csv"), intents()).expect("writable");
    let more = ["--steps", "9", "--checkpoint-every", "2", "--validate-every", "4"];
    let full = |out: &str, more: &[&str]| {
        let program = place.command(&[]);
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "ulimit -f 100; trap '' XFSZ; exec \"$0\" \"$@\""]).arg(program.get_program());
        command.args(tune(&model, out, more)).current_dir(place.path("")).stdin(Stdio::null());
        let output = command.output().expect("a shell");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("checkpoint.safetensors") && told.contains("File too large"), "{told}");
    };
    place.run(&tune(&model, "whole", &more)).exits(0);
    // Before there is a checkpoint nothing is lost but the first steps.
    full("cut", &more);
    place.run(&tune(&model, "cut", &[&more[..], &["--resume"]].concat())).fails_with(2, &["no checkpoint", "--resume"]);
    // With one, the run goes on from it.
    let mut child = place.command(&tune(&model, "cut", &more));
    let mut child = child.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    while !place.path("cut/checkpoint.safetensors").exists() && child.try_wait().expect("a child").is_none() {
        std::thread::yield_now();
    }
    child.kill().expect("killed");
    child.wait().expect("ended");
    if place.path("cut/checkpoint.safetensors").exists() {
        let before = fs::read(place.path("cut/checkpoint.safetensors")).expect("a checkpoint");
        full("cut", &[&more[..], &["--resume"]].concat());
        assert!(fs::read(place.path("cut/checkpoint.safetensors")).expect("a checkpoint") == before);
        place.run(&tune(&model, "cut", &[&more[..], &["--resume"]].concat())).exits(0);
    }
    let read = |path: &str| fs::read(place.path(path)).expect("a file");
    assert!(read("whole/adapter_model.safetensors") == read("cut/adapter_model.safetensors"), "the adapters differ");
}

#[test]
fn data_that_cannot_be_learnt_from_are_refused() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    let fails = |text: &str, parts: &[&str]| {
        fs::write(place.path("intents.csv"), text).expect("writable");
        place.run(&tune(&model, "out", &[])).fails_with(1, parts);
        assert!(!place.path("out").exists());
    };
    fails("", &["intents.csv"]);
    fails("text,label\na,b\nc,b\n", &["`b`"]);
    fails("text,label\na,b\nc,b\nd,e\n", &["line 4", "`e`"]);
    fails("text,label\na,b\nc,b\nd\n", &["line 4"]);
    let long = "word ".repeat(4000);
    fails(&format!("text,label\na,b\nc,b\nd,e\n{long},e\n"), &["line 5", "512"]);
    place.run(&["tune", "--model", &model]).fails_with(2, &["nothing to learn"]);
}

#[test]
fn an_adapter_to_begin_with_must_be_of_the_task() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    fs::write(place.path("intents.csv"), intents()).expect("writable");
    let init = |adapter: &str, out: &str, more: &[&str], code: i32, parts: &[&str]| {
        let mut args =
            vec!["tune", "--model", &model, "--data", "intents.csv", "--out", out, "--adapter-init", adapter];
        args.extend(["--steps", "2", "--batch", "8"]);
        args.extend(more);
        place.run(&args).fails_with(code, parts);
        assert!(!place.path(out).exists());
    };
    let plain = fixture("parity-train/qwen2/adapter_init");
    init(&plain, "a", &[], 1, &["scores 0 labels and the data have 2"]);
    init(&plain, "a", &["--rank", "4"], 2, &["--rank", "--adapter-init"]);
    init(&plain, "a", &["--patience", "2"], 2, &["--validation N"]);
    // A classifier goes on with its own labels, and refuses others.
    place.run(&tune(&model, "first", &["--steps", "2"])).exits(0);
    fs::write(place.path("intents.csv"), intents().replace("card\n", "parcel\n")).expect("writable");
    init("first", "b", &[], 1, &["the label `parcel` is none of the model's"]);
    fs::write(place.path("intents.csv"), intents()).expect("writable");
    let mut args = vec!["tune", "--model", &model, "--data", "intents.csv", "--out", "b", "--adapter-init", "first"];
    args.extend(["--steps", "2"]);
    place.run(&args).exits(0);
    // Without samples kept apart there is nothing to say of them; a classifier knows its model.
    let record = fs::read_to_string(place.path("b/qwenkit.json")).expect("a record");
    let record: Value = serde_json::from_str(&record).expect("JSON");
    assert_eq!((&record["validation"], &record["base"]["name"]), (&Value::Null, &model.as_str().into()));
    assert!(place.run(&["classify", "--adapter", "b", "where is my card?"]).exits(0).out.contains('\t'));
}

#[test]
fn flags_that_would_change_nothing_are_refused() {
    let place = Place::new();
    for args in [
        &["tune", "--report", "out", "--data", "x.jsonl"][..],
        &["tune", "--data", "x.jsonl", "--out", "out", "--show", "5"],
        &["tune", "--data", "x.jsonl", "--out", "out", "--json"],
        &["tune", "--ids", "x.safetensors", "--adapter-init", "out", "--patience", "3"],
        &["tune", "--ids", "x.safetensors", "--adapter-init", "out", "--raw"],
        &["tune", "--check", "--data", "x.jsonl", "--task", "sft"],
        &["classify", "--adapter", "out", "--top", "5", "a text"],
    ] {
        assert_eq!(place.run(args).code, Some(2), "{args:?}");
    }
}

#[test]
fn preferences_are_learnt_from_a_file() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    let line = |i: usize| {
        let prompt = format!("say {}", i % 5);
        format!("{}\n", serde_json::json!({ "prompt": prompt, "chosen": "yes, of course", "rejected": "no, never" }))
    };
    fs::write(place.path("pairs.jsonl"), (0..20).map(line).collect::<String>()).expect("writable");
    let args = |more: &[&'static str]| {
        let mut args = vec!["tune", "--model", &*model, "--data", "pairs.jsonl", "--out", "out", "--rank", "4"];
        args.extend(["--raw", "--lr", "1e-2", "--steps", "20", "--batch", "4", "--validation", "4"]);
        args.extend(more);
        place.run(&args)
    };
    args(&["--task", "classify"]).fails_with(1, &["--task dpo"]);
    args(&["--smoothing", "0.1"]).fails_with(2, &["--smoothing is for labels"]);
    let told = args(&[]).exits(0);
    for part in ["16 samples to learn from, 4 to validate with; 20 steps of 4", "100.00% right"] {
        assert!(told.err.contains(part), "`{part}` is not in: {}", told.err);
    }
    let record: Value =
        serde_json::from_slice(&fs::read(place.path("out/qwenkit.json")).expect("a record")).expect("JSON");
    assert_eq!((&record["task"], &record["data"]["train"]), (&"dpo".into(), &16.into()));
    let metrics = fs::read_to_string(place.path("out/metrics.jsonl")).expect("figures");
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let losses: Vec<f64> = lines.iter().filter_map(|line| line["loss"].as_f64()).collect();
    assert!((losses[0] - 2f64.ln()).abs() < 1e-6, "before the first step nothing has moved: {}", losses[0]);
    assert!(losses[19] < 0.1, "{losses:?}");
    // What was measured before the first step is told, and not left behind.
    assert!(told.err.contains("20 of 20 pairs") && !place.path("out/references.safetensors").exists(), "{told:?}");
    fs::write(place.path("plain.jsonl"), "{\"text\": \"some words to learn\"}\n").expect("writable");
    let plain = ["tune", "--model", &model, "--data", "plain.jsonl", "--out", "other", "--task", "dpo"];
    place.run(&plain).fails_with(1, &["no preferences"]);
}

/// What a run is begun with that another machine, or another hour, would have otherwise.
#[test]
fn a_run_goes_on_as_it_was_begun_or_not_at_all() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    fs::write(place.path("intents.csv"), intents()).expect("writable");
    let more = ["--steps", "150", "--checkpoint-every", "1", "--validate-every", "100"];
    let mut child = place.command(&tune(&model, "cut", &[&more[..], &["--sparing"]].concat()));
    let mut child = child.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    while !place.path("cut/checkpoint.safetensors").exists() && child.try_wait().expect("a child").is_none() {
        std::thread::yield_now();
    }
    child.kill().expect("killed");
    child.wait().expect("ended");
    let resume = tune(&model, "cut", &["--steps", "150", "--validate-every", "100", "--resume"]);
    let output = place.command(&resume).env("QWENKIT_ISA", "portable").stdin(Stdio::null()).output().expect("it runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && told.contains("QWENKIT_ISA"), "{told}");
    // What was kept is taken from the checkpoint, and need not be said again.
    let told = place.run(&resume).exits(0);
    for part in ["layers are computed twice", "going on after step"] {
        assert!(told.err.contains(part), "`{part}` is not in: {}", told.err);
    }
}

#[test]
fn a_model_is_tuned_whole() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    let line = |i: usize| format!("{}\n", serde_json::json!({ "text": format!("one two three {i}") }));
    fs::write(place.path("texts.jsonl"), (0..12).map(line).collect::<String>()).expect("writable");
    let args = |base: &str, out: &str, more: &[&str]| {
        let mut args = vec!["tune", "--method", "full", "--model", base, "--data", "texts.jsonl", "--out", out];
        args.extend(["--steps", "8", "--batch", "4", "--lr", "1e-3", "--validation", "3"]);
        args.extend(more);
        place.run(&args)
    };
    let told = args(&model, "out", &["--optimiser", "adamw-8bit"]).exits(0);
    for part in ["numbers in f32, gradients and optimiser", "(best so far)", "the model is in out"] {
        assert!(told.err.contains(part), "`{part}` is not in: {}", told.err);
    }
    assert!(!place.path("out/checkpoint.safetensors").exists());
    let record = fs::read_to_string(place.path("out/qwenkit.json")).expect("a record");
    assert!(record.contains("method: full") && record.contains("optimiser: adamw-8bit"), "{record}");
    // What was written is a model like the one before, from which another run begins.
    let weights = |path: &Path| read_safetensors_file(&path.join("model.safetensors")).expect("weights");
    let (before, after) = (weights(Path::new(&model)), weights(&place.path("out")));
    assert_eq!(before.tensors().len(), after.tensors().len());
    args("out", "again", &[]).exits(0);
    // From a quantised file its values are taken.
    let quantised = place.path("q8_0.gguf");
    let quantised = quantised.to_str().expect("UTF-8");
    place.run(&["quantize", &model, "--type", "Q8_0", "--out", quantised, "--no-proof"]).exits(0);
    let told = args(quantised, "from-q8_0", &[]).exits(0);
    assert!(told.err.contains("the weights are quantised"), "{told:?}");
    assert_eq!(weights(&place.path("from-q8_0")).tensors().len(), before.tensors().len());
    args("out", "out", &[]).fails_with(2, &["holds a model"]);
    args(&model, "other", &["--rank", "4"]).fails_with(2, &["--method full"]);
    args(&fixture("parity/qwen3-moe"), "other", &[]).fails_with(1, &["--method lora"]);
    assert!(!place.path("other").exists());
}
