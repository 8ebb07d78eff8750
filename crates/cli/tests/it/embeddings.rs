//! `embed` and `rerank`: vectors and scores for lines of texts, whatever the lines hold.

use std::fs;

use serde_json::{Value, json};

use crate::program::{Place, fixture};
use crate::recorded;

fn vector(value: &Value) -> Vec<f64> {
    value.as_array().unwrap_or_else(|| panic!("{value}")).iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn lines_keep_what_they_say_of_themselves_and_get_their_vectors() {
    let place = Place::new();
    let input = b"{\"id\": 7, \"text\": \"one\"}\nnonsense\n{\"text\": 5}\n{\"text\": \"\"}\n{\"text\": \"two\", \"instruction\": \"find\"}\n";
    for model in ["parity/qwen2", "parity/qwen3.5"] {
        let model = fixture(model);
        let outcome = place.run_with(&["embed", "--model", &model, "--jsonl"], input).exits(1);
        let answers = outcome.json_lines();
        assert_eq!(answers.len(), 5, "{outcome:?}");
        assert_eq!((&answers[0]["id"], answers[0].get("text")), (&json!(7), None));
        let first = vector(&answers[0]["embedding"]);
        assert!((first.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5);
        for (i, word) in [(1, "line 2"), (2, "line 3"), (3, "no tokens")] {
            assert!(answers[i]["error"].as_str().is_some_and(|error| error.contains(word)), "{}", answers[i]);
        }
        assert!(answers[4]["tokens"].as_u64() > answers[0]["tokens"].as_u64());
        // Alone, and as an argument, the vector is the same.
        let alone = place.run(&["embed", "--model", &model, "one"]).exits(0);
        assert_eq!(vector(&serde_json::from_str(alone.out.trim()).unwrap()), first);
        let short = place.run(&["embed", "--model", &model, "--dimensions", "32", "one"]).exits(0);
        assert_eq!(vector(&serde_json::from_str(short.out.trim()).unwrap()).len(), 32);
    }
    place.run(&["embed", "--model", &fixture("parity/qwen2"), "--dimensions", "99999", "x"]).fails_with(2, &["99999"]);
    place.run(&["embed", "--model", &fixture("parity/qwen2")]).fails_with(2, &["TEXTS"]);
}

#[test]
fn a_model_without_the_words_to_judge_by_refuses_at_once() {
    let place = Place::new();
    let model = fixture("parity/qwen2");
    place.run(&["rerank", "--model", &model, "--query", "q", "d"]).fails_with(1, &["no token", "Qwen3-Reranker"]);
}

#[test]
fn an_embedding_model_without_its_end_token_refuses_at_once() {
    let place = Place::new();
    let model = fixture("parity/qwen2/model.gguf");
    place.run(&["embed", "--model", &model, "one"]).fails_with(1, &["no token", "<|endoftext|>", "Qwen3-Embedding"]);
}

/// As Qwen3-Embedding is published: the body of a model, saved by itself.
#[test]
fn a_body_alone_embeds_and_answers_nothing() {
    let place = Place::new();
    let folder = place.path("embedding");
    fs::create_dir_all(&folder).expect("a folder");
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(format!("{}/{name}", fixture("parity/qwen3")), folder.join(name)).expect("copied");
    }
    let whole = recorded::read(format!("{}/model.safetensors", fixture("parity/qwen3")).as_ref());
    let body = whole.into_iter().filter(|(name, _)| name != "lm_head.weight");
    let body = body.map(|(name, tensor)| (name.trim_start_matches("model.").to_owned(), tensor)).collect();
    recorded::write(&folder.join("model.safetensors"), &body);
    let model = folder.to_str().expect("a path");
    let of = |model: &str| place.run(&["embed", "--model", model, "one"]).exits(0).out;
    assert_eq!(of(model), of(&fixture("parity/qwen3")));
    let refusal = ["no output head", "embedding", model];
    place.run(&["run", model, "Hello"]).fails_with(1, &refusal);
    place.run(&["bench", "--model", model, "--prompt", "8", "--generate", "2"]).fails_with(1, &refusal);
    place.run(&["rerank", "--model", model, "--query", "q", "d"]).fails_with(1, &refusal);
    let out = place.path("logits.safetensors");
    let args = ["logits", "--model", model, "--ids", "1,2", "--out", out.to_str().expect("a path")];
    place.run(&args).fails_with(1, &refusal[..2]);
}
