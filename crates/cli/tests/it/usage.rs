//! The command line itself: help, wrong usage, names that are slips.

use std::process::Stdio;

use crate::program::{Place, fixture};

const COMMANDS: [&str; 11] =
    ["run", "pull", "list", "show", "rm", "tokenize", "template", "bench", "logits", "preprocess", "doctor"];

#[test]
fn help_of_every_command_goes_to_stdout_with_exit_code_0() {
    let place = Place::new();
    let all = place.run(&["--help"]).exits(0);
    for command in COMMANDS {
        assert!(all.out.contains(&format!("\n  {command} ")), "{command} is missing from: {}", all.out);
        let help = place.run(&[command, "--help"]).exits(0);
        assert!(help.out.contains("Usage: qwenkit") && help.err.is_empty(), "{help:?}");
        if command != "template" {
            assert!(help.out.contains("Example"), "{command} has no example");
        }
    }
    assert!(place.run(&["--version"]).exits(0).out.starts_with("qwenkit "));
}

#[test]
fn wrong_usage_exits_with_2_and_says_what_would_be_right() {
    let place = Place::new();
    let cases: [(&[&str], &str); 14] = [
        (&["frobnicate"], "frobnicate"),
        (&["run", "--temprature", "1", "hello"], "--temperature"),
        (&["run", "--temperature", "-1", "hello"], "0 or more"),
        (&["run", "--temperature", "hot", "hello"], "0 or more"),
        (&["run", "--top-p", "0", "hello"], "above 0"),
        (&["run", "--max-tokens", "0", "hello"], "--max-tokens"),
        (&["run", "--logit-bias", "12", "hello"], "1234:-5"),
        (&["run", "--logprobs", "3", "hello"], "--json"),
        (&["run", "--template-arg", "a", "hello"], "key=json"),
        (&["run", "--prompt-ids", "1,x", "--offline"], "--prompt-ids"),
        (&["run", "--think", "--no-think", "hello"], "--no-think"),
        (&["run", "--threads", "0", "hello"], "--threads"),
        (&["logits", "--ids", "1", "--out", "x"], "no model is named"),
        (&["bench", "a/b", "--model", "c/d"], "--model"),
    ];
    for (args, part) in cases {
        let outcome = place.run(args).exits(2);
        assert!(outcome.out.is_empty() && outcome.err.contains(part), "{args:?}: {outcome:?}");
    }
    assert!(place.run(&[]).exits(2).err.contains("Usage:"));
}

#[test]
fn a_slip_in_a_models_name_names_the_nearest_ones() {
    let place = Place::new();
    for args in [&["run", "qwen3:4x"][..], &["run", "--model", "qwen3:4x", "hello"], &["pull", "qwen3:4x"]] {
        let outcome = place.run(args).fails_with(1, &["qwen3:4x", "did you mean `qwen3:4b`", "\n  hint: "]);
        assert!(outcome.out.is_empty(), "{outcome:?}");
    }
}

#[test]
fn a_missing_model_is_not_fetched_offline_and_the_default_is_named() {
    let place = Place::new();
    let outcome = place.run(&["run", "--offline", "Write a Python function that reverses a string"]);
    outcome.fails_with(1, &["offline: `qwen2.5-coder:0.5b`", "qwenkit pull qwen2.5-coder:0.5b", "taking the default"]);
    place.run(&["run", "./missing.gguf", "hello"]).fails_with(1, &["missing.gguf", "hint: "]);
    place.run(&["show", "qwen3:4b"]).fails_with(1, &["qwen3:4b", "is not in the store"]);
}

#[test]
fn run_without_a_prompt_and_without_a_terminal_is_wrong_usage() {
    let place = Place::new();
    place.run(&["run"]).fails_with(2, &["there is no prompt"]);
    place.run(&["run", "--model", &fixture("parity/qwen2")]).fails_with(2, &["there is no prompt"]);
    let both = ["run", "--model", &fixture("parity/qwen2"), "hello", "--prompt-ids", "1"];
    place.run(&both).fails_with(2, &["both --prompt-ids and the prompt"]);
}

#[test]
fn a_pipe_that_is_not_text_is_refused() {
    let place = Place::new();
    let args = ["run", "--model", &fixture("parity/qwen2"), "what is this?"];
    place.run_with(&args, b"ab\xff").fails_with(1, &["not UTF-8 at position 2"]);
}

#[test]
fn output_that_nobody_reads_ends_the_program_quietly() {
    let place = Place::new();
    let long = ["run", "--model", &fixture("parity/qwen2"), "--prompt-ids", "1,2,3", "--seed", "1"];
    for args in
        [&["list", "--all"][..], &["list", "--all", "--json"], &["doctor", "--conformance", &fixture("parity")], &long]
    {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = place.command(args);
        let output = command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()).output().expect("it ends");
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !err.contains("error") && !err.contains("panicked"), "{args:?}: {err}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn output_that_cannot_be_written_is_a_failure() {
    let place = Place::new();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has /dev/full");
    let mut command = place.command(&["list", "--all"]);
    let output = command.stdout(full).stderr(Stdio::piped()).output().expect("it ends");
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && err.starts_with("error: cannot write the output"), "{err}");
}

#[test]
fn a_file_of_settings_goes_with_the_flags_of_the_whole_program() {
    let place = Place::new();
    let settings = r#"{"model": ["./missing.gguf"], "port": 0, "threads": 1, "job-threads": 0, "log": "off"}"#;
    std::fs::write(place.path("serve.json"), settings).expect("a file");
    let model = fixture("parity/qwen2");
    for words in [
        &["serve", &*model, "--config", "serve.json", "--offline", "--check"][..],
        &["--offline", "serve", &*model, "--check", "--config", "serve.json"],
    ] {
        let told = place.run(words).exits(0).err;
        assert!(told.contains("qwen2: everything is in order"), "{words:?}: {told}");
    }
    place.run(&["serve", "--config", "serve.json", "--offline", "--check"]).fails_with(1, &["missing.gguf"]);
    place.run(&["serve", "--config", "serve.json", "--log-prompts"]).fails_with(2, &["--log-prompts", "--log is off"]);
    let mut command = place.command(&["serve", "--check", "--port", "0", "--job-threads", "0"]);
    let output = command.env("QWENKIT_MODEL", &model).env("QWENKIT_CORS", "shop.example").output().expect("it ends");
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && err.contains("--cors") && err.contains("shop.example"), "{err}");
}
