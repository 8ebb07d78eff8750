//! Writes a safetensors file: the same tensors and remarks always give the same bytes.
//!
//! Tensors are laid out by falling element size, then by name, as the format's own library does, so that every one is
//! aligned to its element. Data come as slices; this is for adapters, activations and small models.

use std::collections::BTreeMap;
use std::path::Path;

use qwenkit_tensor::DType;
use serde_json::{Map, Value, json};

use super::TYPES;
use crate::Error;
use crate::atomic_file::AtomicFile;

/// Writes `tensors` (name, type, shape with the outermost axis first, little-endian data) to `path`, under a temporary
/// name until the file is whole. `metadata` becomes `__metadata__`; pass an empty map for none.
pub fn write_safetensors(
    path: &Path,
    tensors: &[(&str, DType, &[usize], &[u8])],
    metadata: &BTreeMap<String, String>,
) -> Result<(), Error> {
    let mut sorted: Vec<_> = tensors.iter().collect();
    sorted.sort_by(|a, b| b.1.block_bytes().cmp(&a.1.block_bytes()).then_with(|| a.0.cmp(b.0)));
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut start = 0_usize;
    for (name, dtype, shape, data) in &sorted {
        let entry = entry(path, name, *dtype, shape, data, start)?;
        if header.insert((*name).to_owned(), entry).is_some() {
            return Err(Error::DuplicateTensor { path: path.to_path_buf(), tensor: (*name).to_owned() });
        }
        start += data.len();
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    // Spaces up to a multiple of 8, so that data begin aligned.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = AtomicFile::create(path)?;
    file.write(&(text.len() as u64).to_le_bytes())?;
    file.write(&text)?;
    for (_, _, _, data) in &sorted {
        file.write(data)?;
    }
    file.finish()
}

fn entry(path: &Path, name: &str, dtype: DType, shape: &[usize], data: &[u8], start: usize) -> Result<Value, Error> {
    let invalid = |found: String, expected: String| {
        let thing = format!("tensor `{name}`");
        Err(Error::WriteInvalid { path: path.to_path_buf(), thing, found, expected })
    };
    if name == "__metadata__" {
        return invalid("this name".into(), "another one: safetensors keeps it for remarks".into());
    }
    let Some((theirs, _)) = TYPES.iter().find(|(_, ours)| *ours == dtype) else {
        return invalid(format!("type {dtype}"), format!("one of {}", TYPES.map(|(_, ours)| ours.name()).join(", ")));
    };
    match dtype.tensor_bytes(shape) {
        Some(size) if size == data.len() => {
            Ok(json!({"dtype": theirs, "shape": shape, "data_offsets": [start, start + size]}))
        }
        Some(size) => Err(Error::WriteLength {
            path: path.to_path_buf(),
            tensor: name.to_owned(),
            found: data.len() as u128,
            expected: size as u64,
        }),
        None => invalid(format!("shape {shape:?}"), "a size that fits in memory".into()),
    }
}
