//! Reads and rewrites the recorded answers of a checkpoint.

use std::collections::BTreeMap;
use std::path::Path;

use qwenkit_formats::{read_safetensors_file, write_safetensors};
use qwenkit_tensor::DType;

/// A tensor as a safetensors file holds it.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// All tensors of a file.
pub(crate) fn read(path: &Path) -> BTreeMap<String, Tensor> {
    let file = read_safetensors_file(path).expect("a safetensors file");
    let tensor = |info: &qwenkit_formats::TensorInfo| {
        let mut bytes = vec![0; info.len_bytes];
        file.read(info, 0, &mut bytes).expect("readable");
        (info.name.clone(), Tensor { dtype: info.dtype, shape: info.shape.clone(), bytes })
    };
    file.tensors().iter().map(tensor).collect()
}

/// Writes them back.
pub(crate) fn write(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let list: Vec<_> =
        tensors.iter().map(|(name, t)| (name.as_str(), t.dtype, t.shape.as_slice(), t.bytes.as_slice())).collect();
    write_safetensors(path, &list, &BTreeMap::new()).expect("writable");
}

impl Tensor {
    pub(crate) fn f32s(&self) -> Vec<f32> {
        assert_eq!(self.dtype, DType::F32);
        self.bytes.as_chunks().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()
    }

    pub(crate) fn ids(&self) -> Vec<u32> {
        assert_eq!(self.dtype, DType::I64);
        let id = |chunk: &[u8; 8]| u32::try_from(i64::from_le_bytes(*chunk)).expect("a token id");
        self.bytes.as_chunks().0.iter().map(id).collect()
    }
}
