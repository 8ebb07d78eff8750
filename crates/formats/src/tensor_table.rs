//! The tensors of a model: a list in file order, an index by name, and bounded reads from the files that hold them.
//!
//! GGUF sets, safetensors files and checkpoints all end as one `TensorTable`. Names are distinct across all parts. It
//! does not parse anything, and does not interpret the bytes it reads.

use std::path::Path;

use qwenkit_tensor::DType;

use crate::Error;
use crate::data_file::DataFile;

/// Where a tensor stands and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, as the file spells it.
    pub name: String,
    /// How its elements are stored.
    pub dtype: DType,
    /// Outermost axis first, e.g. `[rows, cols]`; the reversed axes of GGUF are turned round.
    pub shape: Vec<usize>,
    /// Index of the file that holds it.
    pub part: usize,
    /// Where its first byte stands in that file.
    pub offset: u64,
    /// How many bytes it takes there.
    pub len_bytes: usize,
}

/// Tensors and the open files they lie in.
#[derive(Debug)]
pub(crate) struct TensorTable {
    parts: Vec<DataFile>,
    tensors: Vec<TensorInfo>,
    /// Indices into `tensors`, sorted by name.
    by_name: Vec<usize>,
}

impl TensorTable {
    /// `tensors` have been checked to lie within their parts; here only the names are compared.
    pub(crate) fn new(parts: Vec<DataFile>, tensors: Vec<TensorInfo>) -> Result<Self, Error> {
        let mut by_name: Vec<usize> = (0..tensors.len()).collect();
        by_name.sort_unstable_by(|&a, &b| tensors[a].name.cmp(&tensors[b].name));
        let twice = by_name.windows(2).find(|pair| tensors[pair[0]].name == tensors[pair[1]].name);
        if let Some(pair) = twice {
            let tensor = &tensors[pair[0].max(pair[1])];
            let path = parts.get(tensor.part).map(|p| p.path().to_path_buf()).unwrap_or_default();
            return Err(Error::DuplicateTensor { path, tensor: tensor.name.clone() });
        }
        Ok(Self { parts, tensors, by_name })
    }

    pub(crate) fn parts(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.parts.iter().map(DataFile::path)
    }

    pub(crate) fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub(crate) fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let at = self.by_name.binary_search_by(|&i| self.tensors[i].name.as_str().cmp(name)).ok()?;
        self.tensors.get(self.by_name[at])
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.parts.iter().map(DataFile::len).sum()
    }

    pub(crate) fn read(&self, tensor: &TensorInfo, start_byte: usize, out: &mut [u8]) -> Result<(), Error> {
        let path = || self.parts.get(tensor.part).map(|p| p.path().to_path_buf()).unwrap_or_default();
        let outside = || Error::ReadRange {
            path: path(),
            tensor: tensor.name.clone(),
            start: start_byte,
            end: start_byte as u128 + out.len() as u128,
            len: tensor.len_bytes,
        };
        let end = start_byte.checked_add(out.len()).ok_or_else(outside)?;
        if end > tensor.len_bytes {
            return Err(outside());
        }
        let part = self.parts.get(tensor.part).ok_or_else(outside)?;
        let offset = tensor.offset.checked_add(start_byte as u64).ok_or_else(outside)?;
        part.read_at(offset, out, || format!("tensor `{}`", tensor.name))
    }
}
