//! safetensors files, alone or as the shards of a checkpoint: bytes <-> named tensors.
//!
//! The header is parsed with and checked by the format's own library; here only its 8 + n bytes are read, and n and the
//! length of the data are held against the file's size. Tensors of types QwenKit has no name for are refused.

mod header;
mod shards;
mod stream;
mod writer;

use std::collections::BTreeMap;
use std::path::Path;

use ::safetensors::tensor::Dtype;
use qwenkit_tensor::DType;

pub(crate) use self::shards::open_shards;
pub use self::stream::ShardWriter;
pub use self::writer::write_safetensors;

use crate::data_file::DataFile;
use crate::tensor_table::TensorTable;
use crate::{Error, TensorInfo, sniff};

/// Parsed entries take several times their text in memory, so a header is limited more tightly than the library's
/// 100 MB. The largest real headers, of thousands of expert tensors, are below 10 MB.
const MAX_HEADER_BYTES: u64 = 32 << 20;

/// The types both sides have.
const TYPES: [(Dtype, DType); 15] = [
    (Dtype::BOOL, DType::Bool),
    (Dtype::U8, DType::U8),
    (Dtype::I8, DType::I8),
    (Dtype::F8_E5M2, DType::F8_E5M2),
    (Dtype::F8_E4M3, DType::F8_E4M3),
    (Dtype::I16, DType::I16),
    (Dtype::U16, DType::U16),
    (Dtype::F16, DType::F16),
    (Dtype::BF16, DType::BF16),
    (Dtype::I32, DType::I32),
    (Dtype::U32, DType::U32),
    (Dtype::F32, DType::F32),
    (Dtype::F64, DType::F64),
    (Dtype::I64, DType::I64),
    (Dtype::U64, DType::U64),
];

/// An open safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    table: TensorTable,
    metadata: BTreeMap<String, String>,
}

/// Opens a safetensors file that stands alone, such as recorded activations or an adapter.
pub fn read_safetensors_file(path: &Path) -> Result<SafetensorsFile, Error> {
    let file = DataFile::open(path)?;
    let (metadata, tensors) = parse(&file, 0)?;
    Ok(SafetensorsFile { table: TensorTable::new(vec![file], tensors)?, metadata })
}

impl SafetensorsFile {
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

    /// The file's own remarks (`__metadata__`), sorted by key.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The size of the file.
    pub fn size_bytes(&self) -> u64 {
        self.table.size_bytes()
    }
}

/// Remarks and tensors (in file order) of a file; the tensors are marked as lying in `part`.
fn parse(file: &DataFile, part: usize) -> Result<(BTreeMap<String, String>, Vec<TensorInfo>), Error> {
    let header = read_header(file)?;
    let path = || file.path().to_path_buf();
    let (remarks, parsed) =
        header::parse(&header).map_err(|problem| Error::SafetensorsHeader { path: path(), problem })?;
    let data_start = 8 + header.len() as u64;
    let expected = u128::from(data_start) + parsed.data_len() as u128;
    if expected != file.len().into() {
        return Err(Error::SafetensorsLength { path: path(), found: file.len(), expected });
    }
    let names = parsed.offset_keys();
    let mut tensors = Vec::with_capacity(names.len());
    for name in names {
        let Some(info) = parsed.info(&name) else { continue };
        let Some((_, dtype)) = TYPES.iter().find(|(theirs, _)| *theirs == info.dtype) else {
            let supported = TYPES.map(|(_, ours)| ours.name()).join(", ");
            return Err(Error::TensorType {
                path: path(),
                tensor: name,
                found: format!("{:?}", info.dtype),
                supported,
            });
        };
        // The library has checked that start <= end, and that they agree with the shape.
        let (start, end) = info.data_offsets;
        let offset = data_start + start as u64;
        let (shape, len_bytes) = (info.shape.clone(), end - start);
        tensors.push(TensorInfo { name, dtype: *dtype, shape, part, offset, len_bytes });
    }
    Ok((remarks, tensors))
}

/// The JSON text of the header, without its length.
fn read_header(file: &DataFile) -> Result<Vec<u8>, Error> {
    // A length below 4 GB and a brace: anything else is another kind of file, and not worth calling cut short.
    let mut start = [0; 9];
    if file.len() < 9
        || file.read_at(0, &mut start, || "the header's length".into()).is_err()
        || start[4..] != [0, 0, 0, 0, b'{']
    {
        return Err(sniff::wrong_kind(file, "a safetensors file"));
    }
    let [a, b, c, d, ..] = start;
    let len = u64::from(u32::from_le_bytes([a, b, c, d]));
    if len > file.len() - 8 {
        return Err(file.truncated(8, len, "the safetensors header".into()));
    }
    if len > MAX_HEADER_BYTES {
        let path = file.path().to_path_buf();
        return Err(Error::TooLarge { path, thing: "a safetensors header", found: len, limit: MAX_HEADER_BYTES });
    }
    let mut header = vec![0; len as usize];
    file.read_at(8, &mut header, || "the safetensors header".into())?;
    Ok(header)
}
