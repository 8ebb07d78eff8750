//! Files cut at every byte and changed at random: an error or a model that can be read in full, never a panic, and
//! never a tensor that reaches beyond its file.

mod encoder;

use std::path::Path;

use encoder::*;
use proptest::prelude::*;
use qwenkit_formats::gguf::{Array, Value};
use qwenkit_formats::{Error, Gguf as Opened, ModelFiles, TensorInfo, read_safetensors_file};

/// Every tensor lies within the file of `len` bytes, and all of its bytes can be read.
fn assert_sound(tensors: &[TensorInfo], len: usize, read: impl Fn(&TensorInfo, usize, &mut [u8]) -> Result<(), Error>) {
    for tensor in tensors {
        assert!(tensor.offset as usize + tensor.len_bytes <= len, "{tensor:?} in {len} bytes");
        assert_eq!(tensor.dtype.tensor_bytes(&tensor.shape), Some(tensor.len_bytes));
        let mut bytes = vec![0; tensor.len_bytes];
        read(tensor, 0, &mut bytes).unwrap();
    }
}

/// An error's message names the file that is wrong.
fn assert_names(error: &Error, path: &Path) {
    let name = path.file_name().unwrap().to_str().unwrap();
    assert!(error.to_string().contains(name), "{error}");
}

/// What metadata hold cannot be more than the file did.
fn content_bytes(array: &Array) -> usize {
    match array {
        Array::String(strings) => strings.iter().map(|s| 8 + s.len()).sum(),
        Array::Array(inner) => inner.iter().map(|a| 12 + content_bytes(a)).sum(),
        other => other.len(),
    }
}

fn check_gguf(path: &Path, bytes: &[u8]) -> bool {
    std::fs::write(path, bytes).unwrap();
    match Opened::open(path) {
        Ok(model) => {
            assert_sound(model.tensors(), bytes.len(), |t, start, out| model.read(t, start, out));
            let held: usize = model
                .metadata()
                .iter()
                .map(|(key, value)| key.len() + if let Value::Array(a) = value { content_bytes(a) } else { 1 })
                .sum();
            assert!(held <= bytes.len());
            true
        }
        Err(error) => {
            assert_names(&error, path);
            false
        }
    }
}

fn check_safetensors(path: &Path, bytes: &[u8]) -> bool {
    std::fs::write(path, bytes).unwrap();
    match read_safetensors_file(path) {
        Ok(file) => {
            assert_sound(file.tensors(), bytes.len(), |t, start, out| file.read(t, start, out));
            true
        }
        Err(error) => {
            assert_names(&error, path);
            false
        }
    }
}

#[test]
fn gguf_cut_at_every_byte() {
    let folder = Folder::new();
    let path = folder.path().join("m.gguf");
    let whole = small_gguf().bytes();
    assert!(check_gguf(&path, &whole));
    for len in 0..whole.len() {
        assert!(!check_gguf(&path, &whole[..len]), "cut at byte {len} of {}", whole.len());
    }
}

#[test]
fn gguf_without_its_last_padding_is_whole() {
    let folder = Folder::new();
    let path = folder.path().join("m.gguf");
    let data_end = small_gguf().bytes();
    let mut padded = data_end.clone();
    padded.resize(padded.len().next_multiple_of(32), 0);
    for len in data_end.len()..=padded.len() {
        assert!(check_gguf(&path, &padded[..len]), "only padding is cut at byte {len}");
    }
}

#[test]
fn foreign_gguf_cut_at_every_byte() {
    let folder = Folder::new();
    let path = folder.path().join("m.gguf");
    let whole = include_bytes!("../../../fixtures/formats/foreign.gguf");
    std::fs::write(&path, whole).unwrap();
    let data_end = {
        let model = Opened::open(&path).unwrap();
        model.tensors().iter().map(|t| t.offset as usize + t.len_bytes).max().unwrap()
    };
    for len in 0..whole.len() {
        assert_eq!(check_gguf(&path, &whole[..len]), len >= data_end, "cut at byte {len}, data end at {data_end}");
    }
}

#[test]
fn safetensors_cut_at_every_byte() {
    let folder = Folder::new();
    let path = folder.path().join("m.safetensors");
    for whole in [small_safetensors(), include_bytes!("../../../fixtures/formats/foreign.safetensors").to_vec()] {
        assert!(check_safetensors(&path, &whole));
        for len in 0..whole.len() {
            assert!(!check_safetensors(&path, &whole[..len]), "cut at byte {len} of {}", whole.len());
        }
    }
}

#[test]
fn every_single_byte_of_a_header_at_its_extremes() {
    let folder = Folder::new();
    let (gguf, other) = (folder.path().join("m.gguf"), folder.path().join("m.safetensors"));
    let whole = small_gguf().bytes();
    let (tensors, tensors_len) = (small_safetensors(), small_safetensors().len());
    for value in [0, 1, 0x7f, 0x80, 0xff] {
        for at in 0..small_gguf().header().len() {
            let mut bytes = whole.clone();
            bytes[at] = value;
            check_gguf(&gguf, &bytes);
        }
        for at in 0..tensors_len - 40 {
            let mut bytes = tensors.clone();
            bytes[at] = value;
            check_safetensors(&other, &bytes);
        }
    }
}

/// Changes to a file: overwritten bytes, an eight-byte number put anywhere, a piece taken out or doubled.
#[derive(Clone, Debug)]
enum Change {
    Byte(usize, u8),
    Number(usize, u64),
    Remove(usize, usize),
    Double(usize, usize),
    Cut(usize),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let numbers = prop_oneof![
        any::<u64>(),
        0..64_u64,
        (0..64_u32).prop_map(|bit| 1 << bit),
        (0..64_u32).prop_map(|bit| (1_u64 << bit).wrapping_neg()),
    ];
    let change = prop_oneof![
        4 => (any::<usize>(), any::<u8>()).prop_map(|(at, to)| Change::Byte(at, to)),
        4 => (any::<usize>(), numbers).prop_map(|(at, to)| Change::Number(at, to)),
        1 => (any::<usize>(), 1..40_usize).prop_map(|(at, n)| Change::Remove(at, n)),
        1 => (any::<usize>(), 1..40_usize).prop_map(|(at, n)| Change::Double(at, n)),
        1 => any::<usize>().prop_map(Change::Cut),
    ];
    prop::collection::vec(change, 1..5)
}

fn changed(mut bytes: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for change in changes {
        let len = bytes.len();
        let place = |at: usize, n: usize| (at % len.max(1), (at % len.max(1) + n).min(len));
        match *change {
            _ if len == 0 => {}
            Change::Byte(at, to) => bytes[at % len] = to,
            Change::Number(at, to) => {
                let (from, end) = place(at, 8);
                bytes[from..end].copy_from_slice(&to.to_le_bytes()[..end - from]);
            }
            Change::Remove(at, n) => {
                let (from, end) = place(at, n);
                bytes.drain(from..end);
            }
            Change::Double(at, n) => {
                let (from, end) = place(at, n);
                let piece = bytes[from..end].to_vec();
                bytes.splice(from..from, piece);
            }
            Change::Cut(at) => bytes.truncate(at % len),
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_gguf(changes in changes()) {
        let folder = Folder::new();
        let path = folder.path().join("m.gguf");
        check_gguf(&path, &changed(small_gguf().bytes(), &changes));
        // The same through the front door, which must agree with itself.
        prop_assert_eq!(ModelFiles::open(&path).is_ok(), Opened::open(&path).is_ok());
    }

    #[test]
    fn mutated_safetensors(changes in changes()) {
        let folder = Folder::new();
        check_safetensors(&folder.path().join("m.safetensors"), &changed(small_safetensors(), &changes));
    }

    #[test]
    fn mutated_split_sets(first in changes(), second in changes()) {
        let folder = Folder::new();
        let part = |no: u16, name: &str| Gguf::new()
            .pair("split.no", U16, &no.to_le_bytes())
            .pair("split.count", U16, &2_u16.to_le_bytes())
            .pair("split.tensors.count", I32, &u32s(&[2]))
            .tensor(name, &[4], 0, 0)
            .data(16)
            .bytes();
        let path = folder.put("m-00001-of-00002.gguf", changed(part(0, "a"), &first));
        folder.put("m-00002-of-00002.gguf", changed(part(1, "b"), &second));
        if let Ok(model) = Opened::open(&path) {
            for tensor in model.tensors() {
                let mut bytes = vec![0; tensor.len_bytes];
                model.read(tensor, 0, &mut bytes).unwrap();
            }
        }
    }

    #[test]
    fn mutated_checkpoints(config in changes(), index in changes()) {
        let folder = Folder::new();
        folder.put("config.json", changed(br#"{"model_type":"qwen3","rope_parameters":{"factor":4.0}}"#.to_vec(), &config));
        folder.put("1.safetensors", small_safetensors());
        let map = br#"{"weight_map":{"a":"1.safetensors","b":"1.safetensors"}}"#.to_vec();
        folder.put("model.safetensors.index.json", changed(map, &index));
        if let Err(error) = ModelFiles::open(folder.path()) {
            prop_assert!(error.to_string().contains(folder.path().to_str().unwrap()), "{}", error);
        }
    }
}
