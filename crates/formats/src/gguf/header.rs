//! Parses and checks the header of one GGUF file: preamble, metadata, tensor entries.
//!
//! Believes nothing: counts and lengths are held against the bytes left in the file, arrays may not nest deeply, keys
//! and tensor names may not repeat, and every tensor must be a whole number of blocks that stands aligned within the
//! file and apart from the others. What is returned needs no further check.

use qwenkit_tensor::DType;

use super::array::{Array, Strings};
use super::metadata::Metadata;
use super::reader::{Reader, Thing};
use super::tensor_type;
use super::value::{Value, ValueType};
use super::{MAGIC, MAX_AXES, alignment};
use crate::data_file::DataFile;
use crate::{Error, TensorInfo, sniff};

/// Arrays of arrays are allowed by the format and used by nobody; a few levels are plenty.
const MAX_NESTING: usize = 4;
/// The shortest key-value pair: an empty key's length, the value type, one byte.
const MIN_PAIR_BYTES: u64 = 8 + 4 + 1;
/// The shortest tensor entry: an empty name's length, the number of axes (none), the type, the offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;
/// Real models have below 100 keys. A key takes ten times as much memory as the shortest pair takes in the file.
const MAX_PAIRS: u64 = 1 << 16;
/// Real models have below 100,000 tensors, those with unmerged experts included.
const MAX_TENSORS: u64 = 1 << 20;

pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: Metadata,
    /// `part` is 0 in all of them.
    pub(super) tensors: Vec<TensorInfo>,
}

pub(super) fn parse(file: &DataFile) -> Result<Header, Error> {
    let mut magic = [0; 4];
    if file.len() < 4 || file.read_at(0, &mut magic, || "the magic".into()).is_err() || &magic != MAGIC {
        return Err(sniff::wrong_kind(file, "a GGUF model"));
    }
    let mut reader = Reader::new(file);
    reader.array::<4>(Thing::Preamble)?;
    let version = version(&mut reader)?;
    let tensor_count = reader.u64(Thing::Preamble)?;
    let pair_count = reader.u64(Thing::Preamble)?;
    let metadata = metadata(&mut reader, pair_count)?;
    let count = reader.count_up_to(MAX_TENSORS, tensor_count, MIN_TENSOR_BYTES, Thing::Preamble, "tensor count")?;
    // No capacity is reserved by the count: entries in memory are larger than in the file.
    let mut entries = Vec::new();
    for i in 0..count {
        entries.push(entry(&mut reader, i as u64)?);
    }
    let alignment = alignment(&metadata)?;
    let header_end = reader.position();
    let tensors = place(file, entries, header_end, alignment)?;
    Ok(Header { version, metadata, tensors })
}

fn version(reader: &mut Reader) -> Result<u32, Error> {
    let version = reader.u32(Thing::Preamble)?;
    let path = || reader.file().path().to_path_buf();
    match version {
        2 | 3 => Ok(version),
        // A small number in the upper bytes: the file was written the other way round.
        v if v != 0 && v & 0xffff == 0 => Err(Error::GgufBigEndian { path: path(), found: v.swap_bytes() }),
        found => Err(Error::GgufVersion { path: path(), found }),
    }
}

fn metadata(reader: &mut Reader, pair_count: u64) -> Result<Metadata, Error> {
    let count = reader.count_up_to(MAX_PAIRS, pair_count, MIN_PAIR_BYTES, Thing::Preamble, "key count")?;
    let mut metadata = Metadata::new(reader.file().path());
    for i in 0..count {
        let key = reader.string(Thing::Key(i as u64))?;
        let value = value(reader, Thing::Value(&key))?;
        if metadata.get(&key).is_some() {
            return Err(Error::DuplicateKey { path: reader.file().path().to_path_buf(), key });
        }
        metadata.set(&key, value);
    }
    Ok(metadata)
}

fn value_type(reader: &mut Reader, thing: Thing) -> Result<ValueType, Error> {
    let found = reader.u32(thing)?;
    let unknown = || Error::ValueType { path: reader.file().path().to_path_buf(), thing: thing.to_string(), found };
    ValueType::from_id(found).ok_or_else(unknown)
}

fn value(reader: &mut Reader, thing: Thing) -> Result<Value, Error> {
    Ok(match value_type(reader, thing)? {
        ValueType::U8 => Value::U8(u8::from_le_bytes(reader.array(thing)?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(reader.array(thing)?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(reader.array(thing)?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(reader.array(thing)?)),
        ValueType::U32 => Value::U32(u32::from_le_bytes(reader.array(thing)?)),
        ValueType::I32 => Value::I32(i32::from_le_bytes(reader.array(thing)?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(reader.array(thing)?)),
        ValueType::U64 => Value::U64(u64::from_le_bytes(reader.array(thing)?)),
        ValueType::I64 => Value::I64(i64::from_le_bytes(reader.array(thing)?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(reader.array(thing)?)),
        ValueType::Bool => Value::Bool(bool(reader, thing)?),
        ValueType::String => Value::String(reader.string(thing)?),
        ValueType::Array => Value::Array(array(reader, thing, 1)?),
    })
}

fn bool(reader: &mut Reader, thing: Thing) -> Result<bool, Error> {
    match reader.array::<1>(thing)? {
        [0] => Ok(false),
        [1] => Ok(true),
        [found] => Err(Error::BadBool { path: reader.file().path().to_path_buf(), thing: thing.to_string(), found }),
    }
}

/// An array: its element type, its length, its elements. `level` counts the arrays around it and itself.
fn array(reader: &mut Reader, thing: Thing, level: usize) -> Result<Array, Error> {
    if level > MAX_NESTING {
        let path = reader.file().path().to_path_buf();
        return Err(Error::Nesting { path, thing: thing.to_string(), limit: MAX_NESTING });
    }
    let element = value_type(reader, thing)?;
    let found = reader.u64(thing)?;
    let count = reader.count(found, element.min_bytes(), thing, "array length")?;
    macro_rules! numbers {
        ($variant:ident, $type:ty) => {{
            // As many bytes as the file holds for them.
            let mut all = Vec::with_capacity(count);
            for _ in 0..count {
                all.push(<$type>::from_le_bytes(reader.array(thing)?));
            }
            Array::$variant(all)
        }};
    }
    Ok(match element {
        ValueType::U8 => numbers!(U8, u8),
        ValueType::I8 => numbers!(I8, i8),
        ValueType::U16 => numbers!(U16, u16),
        ValueType::I16 => numbers!(I16, i16),
        ValueType::U32 => numbers!(U32, u32),
        ValueType::I32 => numbers!(I32, i32),
        ValueType::F32 => numbers!(F32, f32),
        ValueType::U64 => numbers!(U64, u64),
        ValueType::I64 => numbers!(I64, i64),
        ValueType::F64 => numbers!(F64, f64),
        ValueType::Bool => Array::Bool((0..count).map(|_| bool(reader, thing)).collect::<Result<_, _>>()?),
        ValueType::String => Array::String(strings(reader, count, thing)?),
        ValueType::Array => {
            Array::Array((0..count).map(|_| array(reader, thing, level + 1)).collect::<Result<_, _>>()?)
        }
    })
}

fn strings(reader: &mut Reader, count: usize, thing: Thing) -> Result<Strings, Error> {
    let mut bytes = Vec::new();
    // Eight bytes each, as their lengths in the file.
    let mut ends = Vec::with_capacity(count);
    for _ in 0..count {
        let len = reader.u64(thing)?;
        reader.count(len, 1, thing, "string length in the array")?;
        reader.append(len, &mut bytes, thing)?;
        ends.push(bytes.len());
    }
    bytes.shrink_to_fit();
    Strings::from_parts(bytes, ends).map_err(|index| Error::NotUtf8 {
        path: reader.file().path().to_path_buf(),
        thing: format!("string {index} of {thing}"),
    })
}

/// A tensor entry as it stands in the header; `offset` counts from the beginning of the data.
struct Entry {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    len_bytes: usize,
    offset: u64,
}

fn entry(reader: &mut Reader, index: u64) -> Result<Entry, Error> {
    let name = reader.string(Thing::TensorName(index))?;
    let thing = Thing::Tensor(&name);
    let path = reader.file().path().to_path_buf();
    let axes = reader.u32(thing)?;
    if axes as usize > MAX_AXES {
        return Err(Error::AxisCount { path, tensor: name, found: axes });
    }
    let mut shape = Vec::with_capacity(MAX_AXES);
    for _ in 0..axes {
        shape.push(reader.u64(thing)?);
    }
    // The file lists the innermost axis first.
    shape.reverse();
    let type_id = reader.u32(thing)?;
    let offset = reader.u64(thing)?;
    let Some(dtype) = tensor_type::from_id(type_id) else {
        let (found, supported) = (tensor_type::unsupported_name(type_id), tensor_type::supported_names());
        return Err(Error::TensorType { path, tensor: name, found, supported });
    };
    match checked_shape(dtype, &shape) {
        Ok((shape, len_bytes)) => Ok(Entry { name, dtype, shape, len_bytes, offset }),
        Err(expected) => Err(Error::Shape { path, tensor: name, dtype, shape, expected }),
    }
}

/// The shape in words of this machine and the tensor's size in bytes, or what a valid shape would be.
fn checked_shape(dtype: DType, shape: &[u64]) -> Result<(Vec<usize>, usize), String> {
    if shape.contains(&0) {
        return Err("no empty axis".into());
    }
    let too_large = || "a size that fits in memory".to_owned();
    let words: Vec<usize> =
        shape.iter().map(|&n| usize::try_from(n)).collect::<Result<_, _>>().map_err(|_| too_large())?;
    let row = words.last().copied().unwrap_or(1);
    if !row.is_multiple_of(dtype.block_len()) {
        return Err(format!("rows of a multiple of {} elements", dtype.block_len()));
    }
    let bytes = dtype.tensor_bytes(&words).ok_or_else(too_large)?;
    Ok((words, bytes))
}

/// Gives each entry its place in the file, and checks that it is one of its own.
fn place(file: &DataFile, entries: Vec<Entry>, header_end: u64, alignment: u64) -> Result<Vec<TensorInfo>, Error> {
    let path = || file.path().to_path_buf();
    let data_start = u128::from(header_end).next_multiple_of(alignment.into());
    let mut tensors = Vec::with_capacity(entries.len());
    for Entry { name, dtype, shape, len_bytes, offset } in entries {
        if !offset.is_multiple_of(alignment) {
            return Err(Error::OffsetUnaligned { path: path(), tensor: name, found: offset, alignment });
        }
        let start = data_start + u128::from(offset);
        let end = start + len_bytes as u128;
        match u64::try_from(start) {
            Ok(offset) if end <= file.len().into() => {
                tensors.push(TensorInfo { name, dtype, shape, part: 0, offset, len_bytes });
            }
            _ => return Err(Error::OutsideFile { path: path(), tensor: name, start, end, file_len: file.len() }),
        }
    }
    let mut in_order: Vec<&TensorInfo> = tensors.iter().collect();
    in_order.sort_unstable_by_key(|t| t.offset);
    for (first, second) in in_order.iter().zip(in_order.iter().skip(1)) {
        if first.offset + first.len_bytes as u64 > second.offset {
            let (first, at) = (first.name.clone(), second.offset);
            return Err(Error::Overlap { path: path(), first, second: second.name.clone(), at });
        }
    }
    Ok(tensors)
}
