//! Files that lie: every command that opens a model fails with exit code 1 and one clear error, and never panics.

use std::fs;
use std::path::PathBuf;

use crate::program::{Place, fixture};

const COMMANDS: [&[&str]; 4] = [
    &["run", "Hello", "--model"],
    &["tokenize", "Hello", "--model"],
    &["logits", "--ids", "1", "--out", "never.safetensors", "--model"],
    &["bench", "--prompt", "4", "--generate", "2", "--model"],
];

fn refused(place: &Place, model: &str) {
    for command in COMMANDS {
        place.run(&[command, &[model]].concat()).fails_with(1, &[]);
    }
    assert!(!place.path("never.safetensors").exists());
}

#[test]
fn files_that_are_no_gguf_are_refused() {
    let place = Place::new();
    let cases: [(&str, &[u8]); 5] = [
        ("empty.gguf", b""),
        ("page.gguf", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        ("pointer.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        ("magic.gguf", b"GGUF"),
        ("huge.gguf", b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x7f"),
    ];
    for (name, bytes) in cases {
        fs::write(place.path(name), bytes).expect("writable");
        refused(&place, name);
        place.run(&["show", name]).fails_with(1, &[name]);
    }
}

#[test]
fn a_gguf_file_cut_anywhere_is_refused() {
    let place = Place::new();
    let whole = fs::read(fixture("parity/qwen2/model.gguf")).expect("readable");
    for part in [1, 10, 30, 60, 90, 99] {
        fs::write(place.path("cut.gguf"), &whole[..whole.len() * part / 100]).expect("writable");
        refused(&place, "cut.gguf");
    }
}

/// A copy of a checkpoint with one file replaced.
fn checkpoint_with(place: &Place, file: &str, change: impl Fn(Vec<u8>) -> Vec<u8>) -> PathBuf {
    let folder = place.path("checkpoint");
    fs::create_dir_all(&folder).expect("a folder");
    for name in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        let bytes = fs::read(format!("{}/{name}", fixture("parity/qwen2"))).expect("readable");
        fs::write(folder.join(name), if name == file { change(bytes) } else { bytes }).expect("writable");
    }
    folder
}

fn replaced(from: &'static str, to: &'static str) -> impl Fn(Vec<u8>) -> Vec<u8> {
    move |bytes| {
        let text = String::from_utf8(bytes).expect("text");
        assert!(text.contains(from), "no `{from}`");
        text.replace(from, to).into_bytes()
    }
}

#[test]
fn checkpoints_with_absurd_numbers_are_refused() {
    let place = Place::new();
    let cases = [
        ("\"hidden_size\": 64", "\"hidden_size\": 18446744073709551615"),
        ("\"hidden_size\": 64", "\"hidden_size\": 0"),
        ("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 1000000000"),
        ("\"num_attention_heads\": 4", "\"num_attention_heads\": -4"),
        ("\"vocab_size\": 384", "\"vocab_size\": \"many\""),
        ("\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 1e400"),
        ("{", "["),
    ];
    for (from, to) in cases {
        checkpoint_with(&place, "config.json", replaced(from, to));
        for command in [COMMANDS[0], COMMANDS[2]] {
            place.run(&[command, &["./checkpoint"]].concat()).fails_with(1, &["config.json"]);
        }
    }
}

#[test]
fn broken_weights_and_tokenizers_are_refused_by_name() {
    let place = Place::new();
    checkpoint_with(&place, "model.safetensors", |bytes| bytes[..bytes.len() / 2].to_vec());
    place.run(&["run", "Hello", "--model", "./checkpoint"]).fails_with(1, &["model.safetensors"]);
    checkpoint_with(&place, "model.safetensors", |_| b"\xff\xff\xff\xff\xff\xff\xff\xff{".to_vec());
    place.run(&["run", "Hello", "--model", "./checkpoint"]).fails_with(1, &["model.safetensors"]);
    checkpoint_with(&place, "tokenizer.json", |_| b"{}".to_vec());
    place.run(&["tokenize", "--model", "./checkpoint", "x"]).fails_with(1, &["tokenizer.json"]);
    checkpoint_with(&place, "tokenizer_config.json", replaced("{% for m in messages %}", "{% for m in %}"));
    place.run(&["run", "Hello", "--model", "./checkpoint"]).fails_with(1, &["template"]);
}

#[test]
fn names_cannot_steer_the_terminal() {
    let place = Place::new();
    let outcome = place.run(&["show", "./\u{1b}[2Jx.gguf"]).fails_with(1, &["[2Jx.gguf"]);
    assert!(!outcome.err.contains('\u{1b}'), "{outcome:?}");
}
