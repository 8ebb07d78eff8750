//! The keys and values of a GGUF file, in order, with getters that say which file and key a wrong type was found under.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::array::{Array, Strings};
use super::value::Value;
use crate::Error;

/// Ordered metadata. Typed getters give `None` for a missing key and an error for a value of another type.
#[derive(Clone, Debug)]
pub struct Metadata {
    path: PathBuf,
    entries: Vec<(String, Value)>,
    by_key: HashMap<String, usize>,
}

impl Metadata {
    /// Empty metadata; `path` is the file that messages shall name.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf(), entries: Vec::new(), by_key: HashMap::new() }
    }

    /// The file these were read from or are meant for.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values, in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of `key`, whatever its type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.by_key.get(key).and_then(|&i| self.entries.get(i)).map(|(_, value)| value)
    }

    /// Sets `key`, in its old place if it has one, else at the end.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        match self.by_key.get(key).and_then(|&i| self.entries.get_mut(i)) {
            Some(entry) => entry.1 = value.into(),
            None => {
                self.by_key.insert(key.to_owned(), self.entries.len());
                self.entries.push((key.to_owned(), value.into()));
            }
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || Error::KeyType { path: self.path.clone(), key: key.into(), found: value.describe(), expected };
        convert(value).map(Some).ok_or_else(wrong)
    }

    /// A string.
    pub fn string(&self, key: &str) -> Result<Option<&str>, Error> {
        self.typed(key, "a string", |v| if let Value::String(s) = v { Some(s.as_str()) } else { None })
    }

    /// A non-negative integer, stored in whatever integer type.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, Error> {
        self.typed(key, "a non-negative integer", |v| u64::try_from(v.integer()?).ok())
    }

    /// A non-negative integer as a count or index.
    pub fn usize(&self, key: &str) -> Result<Option<usize>, Error> {
        self.typed(key, "a non-negative integer", |v| usize::try_from(v.integer()?).ok())
    }

    /// An f32, or an f64 rounded to one.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, Error> {
        self.typed(key, "an f32 or f64", |v| match v {
            Value::F32(x) => Some(*x),
            Value::F64(x) => Some(*x as f32),
            _ => None,
        })
    }

    /// A bool.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "a bool", |v| if let Value::Bool(x) = v { Some(*x) } else { None })
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<&Strings>, Error> {
        self.typed(key, "an array of strings", |v| if let Value::Array(Array::String(s)) = v { Some(s) } else { None })
    }

    /// An array of bools.
    pub fn bools(&self, key: &str) -> Result<Option<&[bool]>, Error> {
        self.typed(key, "an array of bools", |v| if let Value::Array(Array::Bool(b)) = v { Some(&b[..]) } else { None })
    }

    /// An array of integers of any type, all of which fit `u32`.
    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>, Error> {
        self.integers(key, "an array of integers from 0 to 4294967295")
    }

    /// An array of integers of any type, all of which fit `i32`.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>, Error> {
        self.integers(key, "an array of integers from -2147483648 to 2147483647")
    }

    fn integers<T: TryFrom<i128>>(&self, key: &str, expected: &'static str) -> Result<Option<Vec<T>>, Error> {
        self.typed(key, expected, |v| {
            let Value::Array(array) = v else { return None };
            array.integers()?.map(|x| T::try_from(x).ok()).collect()
        })
    }

    /// An array of f32, or of f64 rounded to them.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>, Error> {
        self.typed(key, "an array of f32 or f64", |v| match v {
            Value::Array(Array::F32(x)) => Some(x.clone()),
            Value::Array(Array::F64(x)) => Some(x.iter().map(|&x| x as f32).collect()),
            _ => None,
        })
    }

    /// Any getter's value, an error if the key is missing: `metadata.require("a.b", "an integer", Metadata::u64)`.
    /// `expected` says in the message what should have stood there.
    pub fn require<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        getter: impl FnOnce(&'a Self, &str) -> Result<Option<T>, Error>,
    ) -> Result<T, Error> {
        let missing = || Error::KeyMissing { path: self.path.clone(), key: key.into(), expected };
        getter(self, key)?.ok_or_else(missing)
    }

    /// As `string`, an error if the key is missing.
    pub fn require_string(&self, key: &str) -> Result<&str, Error> {
        self.require(key, "a string", Self::string)
    }

    /// As `u64`, an error if the key is missing.
    pub fn require_u64(&self, key: &str) -> Result<u64, Error> {
        self.require(key, "a non-negative integer", Self::u64)
    }

    /// As `usize`, an error if the key is missing.
    pub fn require_usize(&self, key: &str) -> Result<usize, Error> {
        self.require(key, "a non-negative integer", Self::usize)
    }

    /// As `f32`, an error if the key is missing.
    pub fn require_f32(&self, key: &str) -> Result<f32, Error> {
        self.require(key, "an f32 or f64", Self::f32)
    }

    /// As `bool`, an error if the key is missing.
    pub fn require_bool(&self, key: &str) -> Result<bool, Error> {
        self.require(key, "a bool", Self::bool)
    }

    /// As `strings`, an error if the key is missing.
    pub fn require_strings(&self, key: &str) -> Result<&Strings, Error> {
        self.require(key, "an array of strings", Self::strings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Metadata {
        let mut m = Metadata::new(Path::new("m.gguf"));
        m.set("name", "qwen");
        m.set("layers", 24_i32);
        m.set("negative", -3_i64);
        m.set("theta", 1e6_f32);
        m.set("eps", 0.5_f64);
        m.set("yes", true);
        m.set("tokens", ["a", "b"].into_iter().collect::<Strings>());
        m.set("types", Array::I32(vec![1, 3]));
        m.set("signs", Array::I8(vec![1, -1]));
        m.set("mean", Array::F64(vec![0.5, 0.25]));
        m.set("flags", Array::Bool(vec![true, false]));
        m
    }

    #[test]
    fn getters_convert_what_is_the_same_thing() {
        let m = sample();
        assert_eq!(m.string("name").unwrap(), Some("qwen"));
        assert_eq!((m.u64("layers").unwrap(), m.require_usize("layers").unwrap()), (Some(24), 24));
        assert_eq!((m.require_f32("theta").unwrap(), m.f32("eps").unwrap()), (1e6, Some(0.5)));
        assert!(m.require_bool("yes").unwrap());
        assert_eq!(m.require_strings("tokens").unwrap().iter().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(m.u32s("types").unwrap(), Some(vec![1, 3]));
        assert_eq!(m.i32s("signs").unwrap(), Some(vec![1, -1]));
        assert_eq!(m.f32s("mean").unwrap(), Some(vec![0.5, 0.25]));
        assert_eq!(m.bools("flags").unwrap(), Some(&[true, false][..]));
        assert_eq!(m.u64("absent").unwrap(), None);
    }

    #[test]
    fn a_wrong_type_names_file_key_found_and_expected() {
        let m = sample();
        let wrong = [
            m.u64("negative").unwrap_err(),
            m.u64("theta").unwrap_err(),
            m.u64("types").unwrap_err(),
            m.bool("flags").unwrap_err(),
            m.bools("yes").map(|_| ()).unwrap_err(),
            m.u32s("signs").unwrap_err(),
            m.u32s("layers").unwrap_err(),
            m.f32("layers").unwrap_err(),
            m.strings("name").map(|_| ()).unwrap_err(),
            m.string("tokens").map(|_| ()).unwrap_err(),
        ];
        for error in &wrong {
            assert!(matches!(error, Error::KeyType { .. }), "{error}");
        }
        let expected = "key `negative` in `m.gguf`: found the signed integer -3, expected a non-negative integer";
        assert_eq!(wrong[0].to_string(), expected);
        assert_eq!(
            wrong[2].to_string(),
            "key `types` in `m.gguf`: found an array of 2 i32, expected a non-negative integer"
        );
    }

    #[test]
    fn a_missing_key_names_file_key_and_expected() {
        let error = sample().require_u64("qwen2.block_count").unwrap_err();
        let expected = "key `qwen2.block_count` in `m.gguf`: found none, expected a non-negative integer";
        assert_eq!(error.to_string(), expected);
        assert!(sample().require("flops", "an array", Metadata::f32s).is_err());
    }

    #[test]
    fn set_keeps_the_place() {
        let mut m = sample();
        m.set("layers", 2_u8);
        assert_eq!(m.iter().nth(1), Some(("layers", &Value::U8(2))));
        assert_eq!(m.len(), 11);
    }
}
