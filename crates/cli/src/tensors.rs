//! Numbers out of a small safetensors file, such as recorded expectations: whole tensors, checked for type and shape.
//!
//! Not here: model weights, which are read piece by piece (`qwenkit-models`).

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use qwenkit_formats::{SafetensorsFile, read_safetensors_file};
use qwenkit_tensor::DType;

/// An open file of recorded tensors.
pub(crate) struct Recorded {
    path: PathBuf,
    file: SafetensorsFile,
}

impl Recorded {
    /// Opens the file.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Recorded> {
        Ok(Recorded { path: path.to_path_buf(), file: read_safetensors_file(path)? })
    }

    /// Whether it holds a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    /// A tensor of f32 values with this many axes: its shape and elements.
    pub(crate) fn f32s(&self, name: &str, axes: usize) -> anyhow::Result<(Vec<usize>, Vec<f32>)> {
        let (shape, bytes) = self.bytes(name, DType::F32, axes)?;
        Ok((shape, bytes.as_chunks().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()))
    }

    /// A tensor of i64 numbers with this many axes: its shape and elements.
    pub(crate) fn i64s(&self, name: &str, axes: usize) -> anyhow::Result<(Vec<usize>, Vec<i64>)> {
        let (shape, bytes) = self.bytes(name, DType::I64, axes)?;
        Ok((shape, bytes.as_chunks().0.iter().map(|chunk| i64::from_le_bytes(*chunk)).collect()))
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Numbers of 0 or more, stored as i64 with this many axes: their shape and the numbers.
    pub(crate) fn numbers(&self, name: &str, axes: usize) -> anyhow::Result<(Vec<usize>, Vec<usize>)> {
        let (shape, bytes) = self.bytes(name, DType::I64, axes)?;
        let number = |chunk: &[u8; 8]| usize::try_from(i64::from_le_bytes(*chunk)).ok();
        let numbers: Option<Vec<usize>> = bytes.as_chunks().0.iter().map(number).collect();
        let expected = || format!("tensor `{name}` in `{}`: expected numbers of 0 or more", self.path.display());
        Ok((shape, numbers.with_context(expected)?))
    }

    /// A list of token ids, stored as i64.
    pub(crate) fn ids(&self, name: &str) -> anyhow::Result<Vec<u32>> {
        let (_, bytes) = self.bytes(name, DType::I64, 1)?;
        let id = |chunk: &[u8; 8]| u32::try_from(i64::from_le_bytes(*chunk)).ok();
        let ids: Option<Vec<u32>> = bytes.as_chunks().0.iter().map(id).collect();
        ids.with_context(|| format!("tensor `{name}` in `{}`: expected token ids of 0 or more", self.path.display()))
    }

    fn bytes(&self, name: &str, dtype: DType, axes: usize) -> anyhow::Result<(Vec<usize>, Vec<u8>)> {
        let path = self.path.display();
        let info = self.file.tensor(name).with_context(|| format!("`{path}` has no tensor `{name}`"))?;
        if info.dtype != dtype || info.shape.len() != axes {
            bail!(
                "tensor `{name}` in `{path}`: expected {axes} axes of {dtype}, found {:?} of {}",
                info.shape,
                info.dtype
            );
        }
        let mut bytes = vec![0; info.len_bytes];
        self.file.read(info, 0, &mut bytes)?;
        Ok((info.shape.clone(), bytes))
    }
}
