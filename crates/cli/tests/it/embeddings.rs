//! `embed` and `rerank`: vectors and scores for lines of texts, whatever the lines hold.

use serde_json::{Value, json};

use crate::program::{Place, fixture};

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
