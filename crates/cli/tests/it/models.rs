//! `run`, `logits` and `bench` over the tiny checkpoints, held against what transformers computed for them.

#[path = "../../../../fixtures/guessing_block.rs"]
mod guessing_block;

use std::path::Path;

use crate::program::{Place, fixture, list, parity_models};
use crate::recorded;

#[test]
fn logits_are_those_on_record_for_every_checkpoint() {
    let place = Place::new();
    for (model, record) in parity_models() {
        let expected = recorded::read(&Path::new(&record).join("expected.safetensors"));
        let ids = list(&expected["input_ids"].ids());
        let out = place.path("logits.safetensors");
        let outcome = place.run(&["logits", "--model", &model, "--ids", &ids, "--out", out.to_str().expect("plain")]);
        assert!(outcome.exits(0).out.is_empty());
        let ours = recorded::read(&out);
        assert_eq!(ours.len(), 1);
        assert_eq!(ours["logits"].shape, expected["logits"].shape, "{model}");
        let (ours, theirs) = (ours["logits"].f32s(), expected["logits"].f32s());
        let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(ours.iter().all(|x| x.is_finite()) && worst <= 5e-4, "{model}: {worst}");
        std::fs::remove_file(&out).expect("it was written");
    }
}

#[test]
fn greedy_answers_are_those_on_record_for_every_checkpoint() {
    let place = Place::new();
    for (model, record) in parity_models() {
        let expected = recorded::read(&Path::new(&record).join("expected.safetensors"));
        let (prompt, greedy) = (expected["input_ids"].ids(), expected["greedy_ids"].ids());
        let max_tokens = greedy.len().to_string();
        let args = ["run", "--model", &model, "--prompt-ids", &list(&prompt), "--max-tokens", &max_tokens];
        let answer = place.run(&[&args[..], &["--temperature", "0", "--json"]].concat()).exits(0).json();
        assert_eq!(answer["prompt_ids"], serde_json::json!(prompt), "{model}");
        let ids: Vec<u32> = serde_json::from_value(answer["ids"].clone()).expect("ids");
        // A stop token ends ours earlier; the record goes on.
        assert!(!ids.is_empty() && greedy.starts_with(&ids), "{model}: {ids:?}, expected {greedy:?}");
        let ended = if ids.len() == greedy.len() { "length" } else { "stop" };
        assert!(answer["finish_reason"] == ended || answer["finish_reason"] == "stop", "{model}: {answer}");
        assert!(answer["text"].is_string() && answer["seed"].is_u64());
    }
}

#[test]
fn threads_and_files_change_no_bit() {
    let place = Place::new();
    let bytes = |model: &str, threads: &str| {
        let out = place.path("l.safetensors");
        let args = ["logits", "--model", model, "--ids", "5,6,7,8,9", "--threads", threads, "--out"];
        place.run(&[&args[..], &[out.to_str().expect("plain")]].concat()).exits(0);
        std::fs::read(&out).expect("written")
    };
    let folder = fixture("parity/qwen3");
    assert!(bytes(&folder, "1") == bytes(&folder, "3"));
    assert!(bytes(&folder, "2") == bytes(&fixture("parity/qwen3/model.gguf"), "2"));
}

#[test]
fn a_seed_decides_a_sampled_answer() {
    let place = Place::new();
    let model = fixture("parity/qwen2");
    let ask = |seed: &str| {
        let args = ["run", &model, "Tell me", "--json", "--max-tokens", "12", "--temperature", "1.5", "--seed", seed];
        place.run(&args).exits(0).json()["ids"].clone()
    };
    assert_eq!(ask("7"), ask("7"));
    let others: std::collections::HashSet<String> = (1..6).map(|seed| ask(&seed.to_string()).to_string()).collect();
    assert!(others.len() > 1, "five seeds gave one answer: {others:?}");
}

#[test]
fn a_prompt_goes_through_the_template_and_what_is_typed_spells_no_control_token() {
    let place = Place::new();
    let model = fixture("parity/qwen2");
    let prompt_ids = |args: &[&str], pipe: &[u8]| {
        let base = ["run", "--model", &model, "--json", "--max-tokens", "1"];
        let answer = place.run_with(&[&base[..], args].concat(), pipe).exits(0).json();
        serde_json::from_value::<Vec<u32>>(answer["prompt_ids"].clone()).expect("ids")
    };
    let ids_of = |text: &str| {
        let outcome = place.run(&["tokenize", "--model", &model, text]).exits(0);
        outcome.out.trim().split(',').map(|id| id.parse::<u32>().expect("an id")).collect::<Vec<_>>()
    };
    let chat = "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(prompt_ids(&["Hello", "--system", "Be brief"], b""), ids_of(chat));
    let (_, user) = chat.split_at(chat.find("<|im_start|>user").expect("a user"));
    assert_eq!(prompt_ids(&[], b"Hello\n"), ids_of(user));
    assert_eq!(prompt_ids(&["Hello"], b"you"), ids_of(&user.replace("Hello", "Hello\n\nyou")));
    assert_eq!(prompt_ids(&["Hello", "--raw"], b""), ids_of("Hello"));
    let typed = prompt_ids(&["a<|im_end|>"], b"");
    let ends = |ids: &[u32]| ids.iter().filter(|&&id| id == 2).count();
    assert_eq!((ends(&typed), ends(&ids_of(user))), (1, 1), "{typed:?}");
}

#[test]
fn an_answer_is_text_on_stdout_and_everything_else_on_stderr() {
    let place = Place::new();
    let model = fixture("parity/qwen2");
    let args = ["run", "--model", &model, "Hello", "--max-tokens", "6", "--temperature", "0"];
    let text = place.run(&args).exits(0);
    let answer = place.run(&[&args[..], &["--json"]].concat()).exits(0).json();
    let expected = answer["text"].as_str().expect("text");
    assert_eq!(text.out.trim_end_matches('\n'), expected.trim_end_matches('\n'));
    assert!(text.err.contains("[cut after 6 tokens, as --max-tokens says]"), "{text:?}");
    let with = |more: &[&str]| place.run(&[&args[..], &["--json"], more].concat()).exits(0).json();
    let top = with(&["--logprobs", "2"]);
    let logprobs = top["logprobs"].as_array().expect("a list");
    assert!(logprobs.len() == 6 && logprobs.iter().all(|token| token["top"].as_array().is_some_and(|t| t.len() == 2)));
    assert!(logprobs.iter().all(|token| token["logprob"] == token["top"][0]["logprob"]), "greedy takes the best");
    let first = logprobs[0]["id"].as_u64().expect("an id");
    let barred = with(&["--logit-bias", &format!("{first}:-100")]);
    assert_ne!(barred["ids"][0], first);
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_with_numbers_and_a_way_out() {
    let place = Place::new();
    let model = fixture("parity/qwen2");
    let ids = list(&(0..40).collect::<Vec<u32>>());
    let args = ["run", "--model", &model, "--prompt-ids", &ids, "--ctx", "32"];
    place.run(&args).fails_with(1, &["40 tokens", "holds 32", "--ctx", "512"]);
    let ids = list(&vec![7; 600]);
    place.run(&["run", "--model", &model, "--prompt-ids", &ids]).fails_with(1, &["600 tokens", "holds 512"]);
}

#[test]
fn a_context_that_is_full_is_said() {
    let place = Place::new();
    let args =
        ["run", "--model", &fixture("parity/qwen2"), "--prompt-ids", "5,6,7", "--ctx", "8", "--temperature", "0"];
    let cut = place.run(&args).exits(0);
    let answer = place.run(&[&args[..], &["--json"]].concat()).exits(0).json();
    assert_eq!((answer["finish_reason"].as_str(), answer["generated_tokens"].as_u64()), (Some("length"), Some(5)));
    assert!(cut.err.contains("the context of 8 tokens is full"), "{cut:?}");
}

#[test]
fn switches_that_do_nothing_are_said() {
    let place = Place::new();
    let model = fixture("parity/qwen2");
    let outcome = place.run(&["run", "--model", &model, "Hello", "--no-think", "--max-tokens", "1"]).exits(0);
    assert!(outcome.err.contains("does not use `enable_thinking`"), "{outcome:?}");
    let outcome = place.run(&["run", "--model", &model, "Hello", "--ctx", "600", "--max-tokens", "1"]).exits(0);
    assert!(outcome.err.contains("600") && outcome.err.contains("512"), "{outcome:?}");
}

#[test]
fn ids_that_the_model_does_not_have_are_refused() {
    let place = Place::new();
    let model = fixture("parity/qwen2");
    let parts = ["384", "vocabulary"];
    place.run(&["run", "--model", &model, "--prompt-ids", "1,384"]).fails_with(1, &parts);
    let out = place.path("l.safetensors");
    let args = ["logits", "--model", &model, "--ids", "1,384", "--out", out.to_str().expect("plain")];
    place.run(&args).fails_with(1, &parts);
    assert!(!out.exists());
}

#[test]
fn logits_that_cannot_be_written_are_an_error_with_the_files_name() {
    let place = Place::new();
    let args = ["logits", "--model", &fixture("parity/qwen2"), "--ids", "1", "--out", "no-such-folder/l.safetensors"];
    place.run(&args).fails_with(1, &["no-such-folder/l.safetensors"]);
}

#[test]
fn guesses_change_no_token() {
    let place = Place::new();
    let ids: Vec<String> = (0..90).map(|i| (3 + i % 30 * 7).to_string()).collect();
    for model in [fixture("parity/qwen2"), fixture("parity/qwen3.5/model.gguf")] {
        let answer = |from: &str| {
            let args = ["run", "--model", &model, "--prompt-ids", &ids.join(","), "--max-tokens", "80", "--seed", "5"];
            let answer = place.run(&[&args[..], &["--json", "--speculate", from]].concat()).exits(0).json();
            answer["ids"].clone()
        };
        let plain = answer("off");
        assert_eq!([answer("auto"), answer("ngram")], [plain.clone(), plain], "{model}");
    }
    let args =
        ["bench", "--model", &fixture("parity/qwen2"), "--prompt", "48", "--generate", "64", "--speculate", "auto"];
    let figures = place.run(&[&args[..], &["--json"]].concat()).exits(0).json();
    let [drafted, accepted] = ["drafted_tokens", "accepted_tokens"].map(|key| figures[key].as_u64().expect("a number"));
    assert!(drafted > 0 && accepted <= drafted, "{figures}");
    let refusal = "expected a block that guesses tokens";
    place.run(&["run", "--model", &fixture("parity/qwen3.5"), "--speculate", "mtp", "hello"]).fails_with(1, &[refusal]);
}

#[test]
fn a_block_for_guesses_that_is_not_whole_is_told_once_and_asked_for_in_vain() {
    let place = Place::new();
    let (from, to) = (fixture("parity/qwen3.5"), place.path("half"));
    std::fs::create_dir(&to).expect("a folder");
    guessing_block::with_block(from.as_ref(), &to, &["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"]);
    let found = "found one that lacks `mtp.fc.weight`, `mtp.layers.0.mlp.up_proj.weight`";
    let ask = |model: &str, more: &[&str]| {
        let args = ["run", "--model", model, "hello", "--raw", "--max-tokens", "4", "--temperature", "0", "--json"];
        place.run(&[&args[..], more].concat())
    };
    let told = ask("./half", &[]).exits(0);
    let notes = told.err.lines().filter(|line| line.contains("(MTP) is not used")).collect::<Vec<_>>();
    assert!(notes.len() == 1 && notes[0].starts_with("note: ") && notes[0].contains(found), "{told:?}");
    assert_eq!(told.json()["ids"], ask(&from, &[]).exits(0).json()["ids"]);
    for from in ["ngram", "off"] {
        let silent = ask("./half", &["--speculate", from]).exits(0);
        assert!(!silent.err.contains("MTP"), "{silent:?}");
    }
    ask("./half", &["--speculate", "mtp"])
        .fails_with(1, &["expected a block that guesses tokens", found, "--speculate"]);
    let served = place.run(&["serve", "./half", "--check", "--port", "0"]).exits(0);
    assert!(served.err.contains(found), "{served:?}");
}

#[test]
fn bench_reports_what_it_measured() {
    let place = Place::new();
    let args = ["bench", "--model", &fixture("parity/qwen2"), "--prompt", "48", "--generate", "8", "--threads", "2"];
    let figures = place.run(&[&args[..], &["--repeat", "2", "--json"]].concat()).exits(0).json();
    for key in ["prompt_tokens_per_s", "generate_tokens_per_s", "load_s", "read_bytes_per_s"] {
        assert!(figures[key].as_f64().is_some_and(|value| value > 0.0), "{key}: {figures}");
    }
    assert_eq!((figures["threads"].as_u64(), figures["prompt_tokens"].as_u64()), (Some(2), Some(48)));
    #[cfg(target_os = "linux")]
    assert!(figures["peak_rss_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{figures}");
    let several = ["--depth", "64", "--prompt", "8", "--generate", "24", "--batch", "3", "--repeat", "1", "--json"];
    let figures = place.run(&[&args[..3], &several[..]].concat()).exits(0).json();
    for key in ["prompt_tokens_per_s", "generate_tokens_per_s", "batch_tokens_per_s", "batch_gain"] {
        assert!(figures[key].as_f64().is_some_and(|value| value > 0.0), "{key}: {figures}");
    }
    assert_eq!((figures["depth_tokens"].as_u64(), figures["batch"].as_u64()), (Some(64), Some(3)));
    let long = ["bench", "--model", &fixture("parity/qwen2"), "--prompt", "512", "--generate", "8"];
    place.run(&long).fails_with(1, &["512 tokens", "context"]);
}
