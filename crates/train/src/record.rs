//! What a trained adapter's folder says of how it came to be, beside what PEFT reads: `qwenkit.json`.

use std::path::Path;

use qwenkit_formats::ModelFiles;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{error::Error, report::RECORD};

/// What a classifier needs beside its adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassifierRecord {
    /// The labels in order of their scores.
    pub labels: Vec<String>,
    /// The token behind a text whose state is scored.
    pub end_token: u32,
    /// What scores are divided by before they become probabilities.
    pub temperature: f64,
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
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

impl ClassifierRecord {
    /// As part of the record.
    pub fn to_json(&self) -> Value {
        json!({ "labels": self.labels, "end_token": self.end_token, "temperature": self.temperature })
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
        Ok(ClassifierRecord { labels, end_token, temperature })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_others_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let write = |value: &Value| std::fs::write(folder.path().join(RECORD), value.to_string()).unwrap();
        let record = ClassifierRecord { labels: vec!["a".into(), "b \"c\"".into()], end_token: 2, temperature: 1.25 };
        let message = |found: Result<ClassifierRecord, Error>| found.unwrap_err().to_string();
        assert!(message(ClassifierRecord::read(folder.path())).contains(RECORD));
        write(&json!({ "classifier": record.to_json() }));
        assert_eq!(ClassifierRecord::read(folder.path()).unwrap(), record);
        for (value, part) in [
            (json!({}), "not of a classifier"),
            (json!({ "classifier": { "labels": [], "temperature": 1 } }), "labels"),
            (json!({ "classifier": { "labels": ["a"], "temperature": 0 } }), "temperature"),
            (json!({ "classifier": { "labels": ["a"], "temperature": 1 } }), "end_token"),
        ] {
            write(&value);
            assert!(message(ClassifierRecord::read(folder.path())).contains(part), "{value}");
        }
    }
}
