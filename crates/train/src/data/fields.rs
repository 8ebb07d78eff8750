//! An object taken apart key by key, noting what nobody asked for.

use serde_json::{Map, Value};

use super::form::LabelKeys;
use super::{Problem, Remarks};

/// An object and where it stands.
pub(crate) struct Fields {
    object: Map<String, Value>,
    path: String,
}

impl Fields {
    /// The fields of a whole line.
    pub(crate) fn of_line(object: Map<String, Value>) -> Fields {
        Fields { object, path: String::new() }
    }

    /// The fields of a value that has to be an object.
    pub(crate) fn new(value: Value, path: String, expected: &'static str) -> Result<Fields, Problem> {
        match value {
            Value::Object(object) => Ok(Fields { object, path }),
            other => Err(wrong(&path, &other, expected)),
        }
    }

    /// The path of a key.
    pub(crate) fn at(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// The value of a key, if it is there and not null.
    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        self.object.shift_remove(key).filter(|value| !value.is_null())
    }

    /// The value of a key that has to be there.
    pub(crate) fn need(&mut self, key: &str, expected: &'static str) -> Result<Value, Problem> {
        self.take(key).ok_or_else(|| Problem::Missing { path: self.at(key), expected })
    }

    /// A string, if the key is there.
    pub(crate) fn string(&mut self, key: &str) -> Result<Option<String>, Problem> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.at(key), &other, "a string")),
        }
    }

    /// A string that has to be there.
    pub(crate) fn need_string(&mut self, key: &str) -> Result<String, Problem> {
        let text = self.string(key)?;
        text.ok_or_else(|| Problem::Missing { path: self.at(key), expected: "a string" })
    }

    /// The keys of a text and its label.
    pub(crate) fn label_keys(&self, labels: &LabelKeys) -> Result<(String, String), Problem> {
        let keys = labels.among(self.object.keys().map(String::as_str));
        let (text, label) = keys.ok_or_else(|| Problem::Missing {
            path: labels.label.clone().unwrap_or_else(|| "label".to_owned()),
            expected: "the keys of a text and its label",
        })?;
        Ok((text.to_owned(), label.to_owned()))
    }

    /// Notes the keys that are left. Numbers in paths become `[]`, so that each kind of key is noted once.
    pub(crate) fn finish(self, remarks: &mut Remarks) {
        for (key, value) in &self.object {
            if !value.is_null() {
                remarks.note_unread(&self.at(key));
            }
        }
    }
}

/// A value of the wrong kind.
pub(crate) fn wrong(path: &str, found: &Value, expected: &'static str) -> Problem {
    let found = match found {
        Value::String(text) => shortened(text),
        Value::Number(number) => format!("the number {number}"),
        other => kind(other).to_owned(),
    };
    Problem::Wrong { path: path.to_owned(), found, expected }
}

/// A text in quotes, not more than its beginning.
pub(crate) fn shortened(text: &str) -> String {
    const CHARS_MAX: usize = 40;
    match text.char_indices().nth(CHARS_MAX) {
        Some((at, _)) => format!("`{}...`", text.get(..at).unwrap_or_default().escape_debug()),
        None => format!("`{}`", text.escape_debug()),
    }
}

/// What a JSON value is.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(true) => "true",
        Value::Bool(false) => "false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
