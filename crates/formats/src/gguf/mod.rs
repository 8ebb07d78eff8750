//! GGUF models: one file, or a set of split parts, as metadata and named tensors.
//!
//! Reads versions 2 and 3, little-endian; writes version 3. Everything in a header is checked before it is believed:
//! see `header`. What keys mean to a model is not known here.

mod array;
mod header;
mod metadata;
mod parts;
mod reader;
mod tensor_type;
mod value;
mod writer;

use std::path::Path;

pub use self::array::{Array, Strings};
pub use self::metadata::Metadata;
pub(crate) use self::parts::split_name;
pub use self::value::Value;
pub use self::writer::{SplitLimits, TensorSpec, Writer, replace_metadata};

use crate::data_file::DataFile;
use crate::tensor_table::TensorTable;
use crate::{Error, TensorInfo};

/// The alignment of tensor data where `general.alignment` does not say otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Real files use 32, some a memory page; padding of more than 1 MiB per tensor is nobody's intention.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// More axes no GGUF tensor has.
const MAX_AXES: usize = 4;
const MAGIC: &[u8; 4] = b"GGUF";

/// An open GGUF model.
#[derive(Debug)]
pub struct Gguf {
    metadata: Metadata,
    table: TensorTable,
    version: u32,
}

impl Gguf {
    /// Opens a GGUF file. If it is a part of a split model, whichever, all parts are opened from the same folder; the
    /// metadata are those of the first part, and the tensors of all parts follow each other.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = DataFile::open(path)?;
        let header = header::parse(&file)?;
        let version = header.version;
        let (files, headers) = match parts::membership(&header.metadata)? {
            None => (vec![file], vec![header]),
            Some(member) => parts::open_all(file, header, member)?,
        };
        let mut headers = headers.into_iter();
        let mut tensors = Vec::new();
        let mut metadata = Metadata::new(path);
        for (part, header) in headers.by_ref().enumerate() {
            if part == 0 {
                metadata = header.metadata;
            }
            tensors.extend(header.tensors.into_iter().map(|t| TensorInfo { part, ..t }));
        }
        Ok(Self { metadata, table: TensorTable::new(files, tensors)?, version })
    }

    /// The file; of a split model, its first part.
    pub fn path(&self) -> &Path {
        self.metadata.path()
    }

    /// The GGUF version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The keys and values of the (first) file.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Paths of all parts, in order; one for a model that is not split.
    pub fn parts(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.table.parts()
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        self.table.tensors()
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.table.tensor(name)
    }

    /// Reads bytes `start_byte .. start_byte + out.len()` of a tensor.
    pub fn read(&self, tensor: &TensorInfo, start_byte: usize, out: &mut [u8]) -> Result<(), Error> {
        self.table.read(tensor, start_byte, out)
    }

    /// The size of all parts together.
    pub fn size_bytes(&self) -> u64 {
        self.table.size_bytes()
    }
}

/// The alignment of tensor data that `metadata` ask for.
fn alignment(metadata: &Metadata) -> Result<u64, Error> {
    let alignment = metadata.u64("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(Error::Alignment { path: metadata.path().to_path_buf(), found: alignment, limit: MAX_ALIGNMENT });
    }
    Ok(alignment)
}
