//! What a trained adapter's folder says of how it came to be, beside what PEFT reads: `qwenkit.json`.

use std::path::Path;

use qwenkit_formats::ModelFiles;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    data::{Answers, Encoding, TooLong},
    error::Error,
    example::{Example, Goal},
    report::RECORD,
};

/// What a classifier needs beside its adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassifierRecord {
    /// The name of the model that it was tuned from, where the record has one.
    pub base: Option<String>,
    /// The labels in order of their scores.
    pub labels: Vec<String>,
    /// The token behind a text whose state is scored.
    pub end_token: u32,
    /// What scores are divided by before they become probabilities.
    pub temperature: f64,
    /// How texts became tokens.
    pub reading: Reading,
}

/// How a classifier's texts became tokens; those that it names the labels of are read the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The longest that a text may be.
    pub context_tokens: usize,
    /// Whether longer ones are cut, rather than refused.
    pub cuts: bool,
    /// Whether what spells a control token becomes that token.
    pub parses_control_tokens: bool,
}

impl Reading {
    /// As data were read when it was tuned.
    pub fn of(encoding: &Encoding) -> Reading {
        Reading {
            context_tokens: encoding.context_tokens,
            cuts: encoding.too_long == TooLong::Cut,
            parses_control_tokens: encoding.parses_control_tokens,
        }
    }

    /// For a model whose context is so long, which may be another one's.
    pub fn encoding(&self, context_tokens: usize) -> Encoding {
        Encoding {
            context_tokens: self.context_tokens.min(context_tokens),
            too_long: if self.cuts { TooLong::Cut } else { TooLong::Refuse },
            answers: Answers::All,
            is_raw: true,
            parses_control_tokens: self.parses_control_tokens,
        }
    }
}

/// The SHA-256 of a model's tensors: their names, types, shapes and bytes, in the order of the file.
///
/// # Errors
/// When it cannot be read.
pub fn model_hash(files: &ModelFiles) -> Result<String, Error> {
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    for info in files.tensors() {
        hash.update(format!("{} {} {:?}\n", info.name, info.dtype, info.shape));
        let mut start = 0;
        while start < info.len_bytes {
            let len = buffer.len().min(info.len_bytes - start);
            files.read(info, start, &mut buffer[..len])?;
            hash.update(&buffer[..len]);
            start += len;
        }
    }
    Ok(hex(hash))
}

/// The SHA-256 of examples, their tokens and what is learnt of each, in this order: of the same files it differs with the model's
/// tokens and the way samples are made.
pub fn examples_hash<'a>(examples: impl IntoIterator<Item = &'a Example>) -> String {
    let mut hash = Sha256::new();
    for Example { ids, goal } in examples {
        hash.update((ids.len() as u64).to_le_bytes());
        ids.iter().for_each(|id| hash.update(id.0.to_le_bytes()));
        match goal {
            Goal::Tokens(marks) => marks.iter().for_each(|&mark| hash.update([u8::from(mark)])),
            Goal::Label(label) => hash.update(label.to_le_bytes()),
        }
    }
    hex(hash)
}

/// The SHA-256 of an adapter's numbers.
pub fn values_hash(values: &[f32]) -> String {
    let mut hash = Sha256::new();
    values.iter().for_each(|value| hash.update(value.to_le_bytes()));
    hex(hash)
}

/// A finished hash as it is written.
pub(crate) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl ClassifierRecord {
    /// As part of the record, which has the model's name elsewhere.
    pub fn to_json(&self) -> Value {
        let Reading { context_tokens, cuts, parses_control_tokens } = self.reading;
        json!({
            "labels": self.labels, "end_token": self.end_token, "temperature": self.temperature,
            "reading": { "context_tokens": context_tokens, "cuts": cuts, "control_tokens": parses_control_tokens },
        })
    }

    /// Reads the record of the adapter in `dir`.
    ///
    /// # Errors
    /// When there is none, or it is not of a classifier.
    pub fn read(dir: &Path) -> Result<ClassifierRecord, Error> {
        let path = dir.join(RECORD);
        let wrong = |what: &str| Error::Record { path: path.clone(), what: what.to_owned() };
        let text = std::fs::read_to_string(&path).map_err(|error| wrong(&error.to_string()))?;
        let value: Value = serde_json::from_str(&text).map_err(|error| wrong(&error.to_string()))?;
        let of = value.get("classifier").ok_or_else(|| wrong("it is not of a classifier (no `classifier`)"))?;
        let labels = of.get("labels").and_then(Value::as_array).ok_or_else(|| wrong("no `classifier.labels`"))?;
        let labels: Option<Vec<String>> = labels.iter().map(|label| label.as_str().map(str::to_owned)).collect();
        let labels = labels
            .filter(|labels| !labels.is_empty())
            .ok_or_else(|| wrong("`classifier.labels` is no list of texts"))?;
        let temperature = of.get("temperature").and_then(Value::as_f64).filter(|t| t.is_finite() && *t > 0.0);
        let temperature = temperature.ok_or_else(|| wrong("no `classifier.temperature` above 0"))?;
        let end_token = of.get("end_token").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        let end_token = end_token.ok_or_else(|| wrong("no `classifier.end_token`"))?;
        let base = value["base"]["name"].as_str().map(str::to_owned);
        let flag = |key: &str| of["reading"][key].as_bool();
        let context_tokens = of["reading"]["context_tokens"].as_u64().and_then(|n| usize::try_from(n).ok());
        let reading = match (context_tokens, flag("cuts"), flag("control_tokens")) {
            (Some(context_tokens), Some(cuts), Some(parses_control_tokens)) => {
                Reading { context_tokens, cuts, parses_control_tokens }
            }
            _ => return Err(wrong("no whole `classifier.reading`, which says how its texts became tokens")),
        };
        Ok(ClassifierRecord { base, labels, end_token, temperature, reading })
    }
}

#[cfg(test)]
mod tests {
    use qwenkit_tensor::TokenId;

    use super::*;

    #[test]
    fn hashes_of_examples_see_tokens_marks_and_order() {
        let example = |ids: &[u32], marks: &[bool]| Example {
            ids: ids.iter().map(|&id| TokenId(id)).collect(),
            goal: Goal::Tokens(marks.to_vec()),
        };
        let (a, b, c) =
            (example(&[1, 2], &[false, true]), example(&[1, 3], &[false, true]), example(&[1, 2], &[true; 2]));
        let label = Example { goal: Goal::Label(0), ..a.clone() };
        let lists: [&[&Example]; 6] = [&[&a], &[&b], &[&c], &[&label], &[&a, &b], &[&b, &a]];
        let hashes: std::collections::HashSet<String> =
            lists.iter().map(|list| examples_hash(list.iter().copied())).collect();
        assert_eq!(hashes.len(), lists.len());
    }

    #[test]
    fn records_come_back_and_others_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let write = |value: &Value| std::fs::write(folder.path().join(RECORD), value.to_string()).unwrap();
        let record = ClassifierRecord {
            base: Some("qwen3:4b".into()),
            labels: vec!["a".into(), "b \"c\"".into()],
            end_token: 2,
            temperature: 1.25,
            reading: Reading { context_tokens: 300, cuts: true, parses_control_tokens: false },
        };
        let message = |found: Result<ClassifierRecord, Error>| found.unwrap_err().to_string();
        assert!(message(ClassifierRecord::read(folder.path())).contains(RECORD));
        write(&json!({ "classifier": record.to_json(), "base": { "name": "qwen3:4b" } }));
        assert_eq!(ClassifierRecord::read(folder.path()).unwrap(), record);
        for (value, part) in [
            (json!({}), "not of a classifier"),
            (json!({ "classifier": { "labels": [], "temperature": 1 } }), "labels"),
            (json!({ "classifier": { "labels": ["a"], "temperature": 0 } }), "temperature"),
            (json!({ "classifier": { "labels": ["a"], "temperature": 1 } }), "end_token"),
            (json!({ "classifier": { "labels": ["a"], "temperature": 1, "end_token": 2 } }), "reading"),
        ] {
            write(&value);
            assert!(message(ClassifierRecord::read(folder.path())).contains(part), "{value}");
        }
    }
}
