//! Models without an output head: what they are read for, and what they refuse.

use std::path::Path;

use qwenkit_engine::{Error, Goal, Input, Prompt, Reading, Session};
use qwenkit_formats::{
    Gguf, ModelFiles,
    gguf::{Array, TensorSpec, Value, Writer},
};
use qwenkit_tensor::TokenId;
use qwenkit_text::SpecialTokens;

use crate::fixture::{checkpoint, greedy, open, options};

/// Longer than the fixture's own: its vocabulary makes many tokens of a reranker's prompt.
const CONTEXT: Option<usize> = Some(2048);
/// The tokens that stand for yes and no here.
const WORDS: [usize; 2] = [70, 85];

/// Writes the qwen2 fixture as converters write models without a head: its rows of the two words, or a way of pooling alone.
fn write_headless(to: &Path, judges: bool, labels: [&str; 2]) {
    let gguf = Gguf::open(&checkpoint("qwen2").join("model.gguf")).unwrap();
    let mut metadata = gguf.metadata().clone();
    metadata.set("qwen2.pooling_type", Value::U32(if judges { 4 } else { 3 }));
    let mut tensors: Vec<(TensorSpec, Vec<u8>)> = Vec::new();
    for info in gguf.tensors() {
        let mut bytes = vec![0; info.len_bytes];
        gguf.read(info, 0, &mut bytes).unwrap();
        let mut spec = TensorSpec { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone() };
        if info.name == "output.weight" {
            if !judges {
                continue;
            }
            let row = info.len_bytes / spec.shape[0];
            bytes = WORDS.iter().flat_map(|word| bytes[word * row..(word + 1) * row].to_vec()).collect();
            (spec.name, spec.shape[0]) = ("cls.output.weight".to_owned(), 2);
            metadata.set("qwen2.classifier.output_labels", Value::Array(Array::String(labels.iter().collect())));
        }
        tensors.push((spec, bytes));
    }
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = Writer::create(to, &metadata, &specs).unwrap();
    for (spec, bytes) in &tensors {
        writer.write(&spec.name, bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// The share of the first word where the whole model's logits are taken, (V) at the end of `ids`.
fn share(ids: &[TokenId]) -> f64 {
    let whole = open(&checkpoint("qwen2").join("model.gguf"), CONTEXT);
    let goal = Goal::Logits(WORDS.map(|word| TokenId(word as u32)).to_vec());
    let logits = whole.read(vec![Reading { ids: ids.to_vec(), goal }]).unwrap();
    1.0 / (1.0 + f64::from(logits[0][1] - logits[0][0]).exp())
}

fn refuses_to_answer(session: &Session) {
    let error = session.ask(greedy(Prompt::Text("Hello".into()), 1)).map(|_| ()).unwrap_err();
    assert!(matches!(&error, Error::Headless { origin } if origin.ends_with("m.gguf")), "{error}");
    assert!(!session.info().has_head);
}

#[test]
fn a_reranker_of_two_rows_judges_as_the_whole_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write_headless(&path, true, ["yes", "no"]);
    let session = open(&path, CONTEXT);
    refuses_to_answer(&session);
    for document in ["Paris is the capital of France", "Cats sleep", ""] {
        let reading = session.relevance(None, "capital of France", document).unwrap();
        let expected = share(&reading.ids);
        let values = session.read(vec![reading]).unwrap();
        let found = f64::from(session.relevance_score(&values[0]));
        assert!((found - expected).abs() < 1e-5, "{document:?}: {found}, expected {expected}");
        assert!((0.0..=1.0).contains(&found));
    }
}

#[test]
fn rows_of_other_words_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write_headless(&path, true, ["no", "yes"]);
    let files = ModelFiles::open(&path).unwrap();
    let error = Session::open(&files, &options(None), &mut |_| {}).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("`qwen2.classifier.output_labels` is [\"no\", \"yes\"], expected yes and no"), "{error}");
}

#[test]
fn an_embedding_model_gives_vectors_and_neither_answers_nor_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write_headless(&path, false, ["", ""]);
    let session = open(&path, CONTEXT);
    refuses_to_answer(&session);
    let error = session.relevance(None, "q", "d").map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Headless { .. }), "{error}");
    // The vocabulary of the fixture's GGUF file lacks the token at which texts end; no vector is made without it.
    let error = session.embedding(&Input::Text("one".into())).map(|_| ()).unwrap_err();
    assert!(matches!(&error, Error::TokenMissing { token } if token == "<|endoftext|>"), "{error}");
    let ids = session.tokenizer().encode("one", SpecialTokens::AsText).unwrap();
    let state = session.read(vec![Reading { ids, goal: Goal::Hidden }]).unwrap();
    assert_eq!(state[0].len(), session.info().width);
}
