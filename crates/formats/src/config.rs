//! A JSON object with the file it came from: config.json and its kin, with getters whose messages name file and key.
//!
//! Keys keep Hugging Face's spelling. `null` counts as absent. Which keys a model needs is not known here.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Error;
use crate::data_file::read_whole;

/// tokenizer_config.json of real models reaches some MB; nothing of this kind reaches 64 MiB.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// A JSON object from a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    path: PathBuf,
    /// Where in the file this object stands, as a prefix of keys: empty, or `rope_parameters.`.
    prefix: String,
    value: Value,
}

impl Config {
    /// Reads a file that holds one JSON object.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let bytes = read_whole(path, "a JSON file", MAX_JSON_BYTES)?;
        let json_error = |problem: String| Error::Json { path: path.to_path_buf(), problem };
        // Editors on Windows put a byte order mark in front.
        let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        let value: Value = serde_json::from_slice(text).map_err(|e| json_error(e.to_string()))?;
        if !value.is_object() {
            return Err(json_error(format!("found {}, expected an object", describe(&value))));
        }
        Ok(Self { path: path.to_path_buf(), prefix: String::new(), value })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The object itself.
    pub fn value(&self) -> &Value {
        &self.value
    }

    /// The value of `key`, unless it is `null`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|v| !v.is_null())
    }

    /// The error that `key` was `found` to be something other than `expected`; for checks beyond types.
    pub fn wrong(&self, key: &str, found: impl Into<String>, expected: &'static str) -> Error {
        Error::KeyType { path: self.path.clone(), key: self.full_key(key), found: found.into(), expected }
    }

    fn full_key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.wrong(key, describe(value), expected))
    }

    /// A non-negative integer; `32.0` is one, `32.5` is not.
    pub fn usize(&self, key: &str) -> Result<Option<usize>, Error> {
        self.typed(key, "a non-negative integer", to_usize)
    }

    /// A number.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A number, rounded to f32; one beyond its range is an error.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, Error> {
        self.typed(key, "a number within the range of f32", |v| v.as_f64().map(|x| x as f32).filter(|x| x.is_finite()))
    }

    /// `true` or `false`.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub fn string(&self, key: &str) -> Result<Option<&str>, Error> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A list of non-negative integers.
    pub fn usizes(&self, key: &str) -> Result<Option<Vec<usize>>, Error> {
        self.typed(key, "a list of non-negative integers", |v| v.as_array()?.iter().map(to_usize).collect())
    }

    /// A list of numbers.
    pub fn f64s(&self, key: &str) -> Result<Option<Vec<f64>>, Error> {
        self.typed(key, "a list of numbers", |v| v.as_array()?.iter().map(Value::as_f64).collect())
    }

    /// A list of strings.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>, Error> {
        self.typed(key, "a list of strings", |v| v.as_array()?.iter().map(Value::as_str).collect())
    }

    /// A nested object; messages about its keys name the whole way to them, as `rope_parameters.factor`.
    pub fn object(&self, key: &str) -> Result<Option<Config>, Error> {
        let value = self.typed(key, "an object", |v| v.is_object().then(|| v.clone()))?;
        let prefix = format!("{}{key}.", self.prefix);
        Ok(value.map(|value| Config { path: self.path.clone(), prefix, value }))
    }

    /// Any getter's value, an error if the key is missing: `config.require("vocab_size", "an integer", Config::usize)`.
    /// `expected` says in the message what should have stood there.
    pub fn require<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        getter: impl FnOnce(&'a Self, &str) -> Result<Option<T>, Error>,
    ) -> Result<T, Error> {
        let missing = || Error::KeyMissing { path: self.path.clone(), key: self.full_key(key), expected };
        getter(self, key)?.ok_or_else(missing)
    }

    /// As `usize`, an error if the key is missing.
    pub fn require_usize(&self, key: &str) -> Result<usize, Error> {
        self.require(key, "a non-negative integer", Self::usize)
    }

    /// As `f32`, an error if the key is missing.
    pub fn require_f32(&self, key: &str) -> Result<f32, Error> {
        self.require(key, "a number", Self::f32)
    }

    /// As `f64`, an error if the key is missing.
    pub fn require_f64(&self, key: &str) -> Result<f64, Error> {
        self.require(key, "a number", Self::f64)
    }

    /// As `bool`, an error if the key is missing.
    pub fn require_bool(&self, key: &str) -> Result<bool, Error> {
        self.require(key, "true or false", Self::bool)
    }

    /// As `string`, an error if the key is missing.
    pub fn require_string(&self, key: &str) -> Result<&str, Error> {
        self.require(key, "a string", Self::string)
    }

    /// As `usizes`, an error if the key is missing.
    pub fn require_usizes(&self, key: &str) -> Result<Vec<usize>, Error> {
        self.require(key, "a list of non-negative integers", Self::usizes)
    }

    /// As `strings`, an error if the key is missing.
    pub fn require_strings(&self, key: &str) -> Result<Vec<&str>, Error> {
        self.require(key, "a list of strings", Self::strings)
    }

    /// As `object`, an error if the key is missing.
    pub fn require_object(&self, key: &str) -> Result<Config, Error> {
        self.require(key, "an object", Self::object)
    }
}

/// Below 2^53 every whole f64 is exactly the integer that was written.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

fn to_usize(value: &Value) -> Option<usize> {
    if let Some(whole) = value.as_u64() {
        return usize::try_from(whole).ok();
    }
    let float = value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..MAX_EXACT).contains(x))?;
    usize::try_from(float as u64).ok()
}

/// What a value is, shown whole where it is short.
fn describe(value: &Value) -> String {
    let kind = match value {
        Value::Null => return "null".into(),
        Value::Bool(b) => return format!("{b}"),
        Value::Number(n) => return format!("the number {n}"),
        Value::String(_) => "the string",
        Value::Array(_) => "the list",
        Value::Object(_) => "the object",
    };
    let text = value.to_string();
    if text.chars().count() <= 60 {
        return format!("{kind} {text}");
    }
    let start: String = text.chars().take(60).collect();
    format!("{kind} {start}...")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Config {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, json).unwrap();
        let mut config = Config::open(&path).unwrap();
        config.path = "config.json".into();
        config
    }

    #[test]
    fn numbers_are_taken_as_what_they_are() {
        let c = config(r#"{"a": 32, "b": 32.0, "c": 1e6, "d": 0.5, "e": -1, "f": 1e300, "g": null, "h": 1000000.0}"#);
        assert_eq!(
            (c.usize("a").unwrap(), c.usize("b").unwrap(), c.usize("c").unwrap()),
            (Some(32), Some(32), Some(1000000))
        );
        assert_eq!((c.f32("c").unwrap(), c.f64("h").unwrap(), c.f32("a").unwrap()), (Some(1e6), Some(1e6), Some(32.0)));
        assert_eq!((c.usize("g").unwrap(), c.usize("absent").unwrap()), (None, None));
        for key in ["d", "e", "f"] {
            assert!(matches!(c.usize(key), Err(Error::KeyType { .. })), "{key}");
        }
        assert!(c.f32("f").is_err());
        assert_eq!(c.f64("f").unwrap(), Some(1e300));
    }

    #[test]
    fn messages_name_the_whole_way_to_a_key() {
        let c = config(r#"{"rope_parameters": {"factor": "four", "inner": {}}, "tie": 1}"#);
        let rope = c.require_object("rope_parameters").unwrap();
        assert_eq!(
            rope.f32("factor").unwrap_err().to_string(),
            "key `rope_parameters.factor` in `config.json`: found the string \"four\", expected a number within the \
             range of f32"
        );
        assert_eq!(
            rope.require_object("inner").unwrap().require_usize("x").unwrap_err().to_string(),
            "key `rope_parameters.inner.x` in `config.json`: found none, expected a non-negative integer"
        );
        assert_eq!(
            c.bool("tie").unwrap_err().to_string(),
            "key `tie` in `config.json`: found the number 1, expected true or false"
        );
    }

    #[test]
    fn lists_are_checked_element_by_element() {
        let c = config(r#"{"ids": [1, 2.0], "mixed": [1, "x"], "names": ["a"], "mean": [0.5, 1], "one": 1}"#);
        assert_eq!(c.require_usizes("ids").unwrap(), [1, 2]);
        assert_eq!(c.require_strings("names").unwrap(), ["a"]);
        assert_eq!(c.f64s("mean").unwrap(), Some(vec![0.5, 1.0]));
        assert!(c.usizes("mixed").is_err() && c.strings("mixed").is_err() && c.usizes("one").is_err());
    }

    #[test]
    fn a_file_that_is_no_json_object_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        for (text, part) in
            [("[1]", "expected an object"), ("{\"a\":", "EOF"), ("", "EOF"), ("{\"a\":\"\u{1}\"}", "control")]
        {
            std::fs::write(&path, text).unwrap();
            let error = Config::open(&path).unwrap_err();
            assert!(matches!(error, Error::Json { .. }) && error.to_string().contains(part), "{text}: {error}");
        }
        std::fs::write(&path, "[".repeat(100_000)).unwrap();
        assert!(matches!(Config::open(&path), Err(Error::Json { .. })), "deep nesting must not exhaust the stack");
        std::fs::write(&path, "\u{feff}{}").unwrap();
        assert!(Config::open(&path).is_ok());
    }
}
