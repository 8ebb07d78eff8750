//! Puts GGUF and safetensors bytes together by hand, valid or not, for the tests of the readers.
//!
//! Shares nothing with the crate's own writers, so that reader and writer cannot be wrong together.
#![allow(dead_code, unreachable_pub)] // each test binary uses a part of it

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A GGUF file in the making: the preamble's counts follow what is added, unless they are set.
pub struct Gguf {
    pub version: u32,
    pub tensor_count: Option<u64>,
    pub pair_count: Option<u64>,
    pub pairs: Vec<Vec<u8>>,
    pub tensors: Vec<Vec<u8>>,
    pub alignment: usize,
    pub data: Vec<u8>,
}

pub fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

pub fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Element type, length, elements.
pub fn array(element: u32, len: u64, elements: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &len.to_le_bytes(), elements].concat()
}

pub const U8: u32 = 0;
pub const I8: u32 = 1;
pub const U16: u32 = 2;
pub const I16: u32 = 3;
pub const U32: u32 = 4;
pub const I32: u32 = 5;
pub const F32: u32 = 6;
pub const BOOL: u32 = 7;
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;
pub const U64: u32 = 10;
pub const I64: u32 = 11;
pub const F64: u32 = 12;

impl Gguf {
    pub fn new() -> Self {
        let (pairs, tensors, data) = (Vec::new(), Vec::new(), Vec::new());
        Self { version: 3, tensor_count: None, pair_count: None, pairs, tensors, alignment: 32, data }
    }

    pub fn pair(mut self, key: impl AsRef<[u8]>, kind: u32, value: &[u8]) -> Self {
        self.pairs.push([&string(key)[..], &kind.to_le_bytes(), value].concat());
        self
    }

    /// `dims` with the innermost axis first, as the file has them; `offset` from the beginning of the data.
    pub fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let mut entry = string(name);
        entry.extend((dims.len() as u32).to_le_bytes());
        entry.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
        entry.extend(kind.to_le_bytes());
        entry.extend(offset.to_le_bytes());
        self.tensors.push(entry);
        self
    }

    pub fn data(mut self, bytes: usize) -> Self {
        self.data = (0..bytes).map(|i| i as u8).collect();
        self
    }

    /// Bytes up to the end of the tensor entries.
    pub fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.pair_count.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        out.extend(self.pairs.concat());
        out.extend(self.tensors.concat());
        out
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(&self.data);
        out
    }
}

/// A small valid model: every kind of value, three tensors, the last one ending with the file.
pub fn small_gguf() -> Gguf {
    Gguf::new()
        .pair("general.architecture", STRING, &string("qwen2"))
        .pair("qwen2.block_count", U32, &u32s(&[2]))
        .pair("flag", BOOL, &[1])
        .pair("tokens", ARRAY, &array(STRING, 3, &[string("a"), string(""), string("ä")].concat()))
        .pair("types", ARRAY, &array(I32, 3, &u32s(&[1, 2, 3])))
        .pair("nested", ARRAY, &array(ARRAY, 2, &[array(U8, 1, &[7]), array(BOOL, 2, &[0, 1])].concat()))
        .pair("general.alignment", U32, &u32s(&[32]))
        .tensor("a", &[4, 2], 0, 0)
        .tensor("b", &[32], 8, 32)
        .tensor("c", &[3], 0, 96)
        .data(96 + 12)
}

/// safetensors: the length of the header, the header, data.
pub fn safetensors(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend((0..data_bytes).map(|i| i as u8));
    out
}

pub fn small_safetensors() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"a":{"dtype":"I64","shape":[2],"data_offsets":[24,40]}}"#;
    safetensors(header, 40)
}

/// A folder that vanishes with the test, with files put into it.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn put(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// Names of everything in it, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path()).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Asserts that `error` is of a variant, and that its message contains every one of `parts`.
#[macro_export]
macro_rules! assert_error {
    ($error:expr, $variant:ident, $($part:expr),+) => {{
        let error = $error;
        let message = error.to_string();
        assert!(matches!(error, qwenkit_formats::Error::$variant { .. }), "expected {}, got {error:?}", stringify!($variant));
        for part in [$($part),+] {
            assert!(message.contains(part), "{part:?} is not in: {message}");
        }
    }};
}
