//! Writes GGUF version 3: metadata in order, tensors in the order given, their data streamed by the caller.
//!
//! The files appear under their final names only when all of them are whole and on the disk. Data are not converted:
//! the caller hands over bytes in the tensor's own type.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use qwenkit_tensor::DType;

use super::array::Array;
use super::metadata::Metadata;
use super::parts::{self, KEY_COUNT, KEY_NUMBER, KEY_TENSORS};
use super::value::{Value, ValueType};
use super::{MAGIC, MAX_ALIGNMENT, MAX_AXES, alignment, tensor_type};
use crate::atomic_file::AtomicFile;
use crate::{Error, Gguf, TensorInfo};

/// ggml keeps names in 64 bytes with a terminating zero; a longer one could not be read by other programs.
const MAX_NAME_BYTES: usize = 63;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name, at most 63 bytes.
    pub name: String,
    /// A type that GGUF has.
    pub dtype: DType,
    /// Outermost axis first; at most four axes, none empty, rows a whole number of blocks.
    pub shape: Vec<usize>,
}

/// When to begin another part. A single tensor larger than `max_bytes` gets a part of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SplitLimits {
    /// Tensor data per part, headers apart.
    pub max_bytes: Option<u64>,
    /// Tensors per part.
    pub max_tensors: Option<usize>,
}

/// One file to be written.
struct Part {
    path: PathBuf,
    header: Vec<u8>,
    /// How many tensors it holds.
    tensors: usize,
}

/// Writes a model, tensor by tensor, in the order of the list it was created with.
pub struct Writer {
    path: PathBuf,
    specs: Vec<TensorSpec>,
    sizes: Vec<u64>,
    alignment: u64,
    parts: std::vec::IntoIter<Part>,
    /// Tensors of the part being written that are not complete.
    left_in_part: usize,
    files: Vec<AtomicFile>,
    /// The tensor whose data come next, and how many bytes of it have come.
    next: usize,
    done_bytes: u64,
}

impl Writer {
    /// Begins one file at `path`. Keys `split.*` in `metadata` are left out, as the file is not split.
    pub fn create(path: &Path, metadata: &Metadata, tensors: &[TensorSpec]) -> Result<Self, Error> {
        Self::create_split(path, metadata, tensors, SplitLimits::default())
    }

    /// Begins a set of files: `m.gguf` becomes `m-00001-of-00003.gguf` and so on, or stays `m.gguf` if one part is
    /// enough. Fails on names, shapes or types that GGUF cannot hold, before writing anything.
    pub fn create_split(
        path: &Path,
        metadata: &Metadata,
        tensors: &[TensorSpec],
        limits: SplitLimits,
    ) -> Result<Self, Error> {
        let alignment = alignment(metadata)?;
        let sizes = checked_sizes(path, tensors)?;
        let counts = part_counts(&sizes, limits);
        let parts = plan(path, metadata, tensors, &sizes, &counts, alignment)?;
        let mut writer = Self {
            path: path.to_path_buf(),
            specs: tensors.to_vec(),
            sizes,
            alignment,
            parts: parts.into_iter(),
            left_in_part: 0,
            files: Vec::new(),
            next: 0,
            done_bytes: 0,
        };
        writer.begin_part()?;
        Ok(writer)
    }

    /// Appends data of tensor `name`, which must be the next in order that is not complete. A tensor may come in as
    /// many pieces as is handy.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let (Some(spec), Some(&size)) = (self.specs.get(self.next), self.sizes.get(self.next)) else {
            return Err(self.order_error(name, "the end of the model".into()));
        };
        if spec.name != name {
            let expected = format!("tensor `{}` (byte {} of {size})", spec.name, self.done_bytes);
            return Err(self.order_error(name, expected));
        }
        let found = u128::from(self.done_bytes) + bytes.len() as u128;
        if found > size.into() {
            return Err(Error::WriteLength { path: self.path.clone(), tensor: name.into(), found, expected: size });
        }
        if self.left_in_part == 0 {
            self.begin_part()?;
        }
        let Some(file) = self.files.last_mut() else {
            return Err(self.order_error(name, "the end of the model".into()));
        };
        file.write(bytes)?;
        self.done_bytes += bytes.len() as u64;
        if self.done_bytes == size {
            file.pad_to(self.alignment)?;
            self.next += 1;
            self.done_bytes = 0;
            self.left_in_part -= 1;
            if self.left_in_part == 0 {
                file.sync()?;
            }
        }
        Ok(())
    }

    /// Checks that all data have come, and gives the files their final names. Returns their paths, in order.
    pub fn finish(self) -> Result<Vec<PathBuf>, Error> {
        if let (Some(spec), Some(&expected)) = (self.specs.get(self.next), self.sizes.get(self.next)) {
            let (path, tensor) = (self.path.clone(), spec.name.clone());
            return Err(Error::WriteLength { path, tensor, found: self.done_bytes.into(), expected });
        }
        let mut files = self.files;
        // All contents first: a full disk shows here, before the first name is given.
        for file in &mut files {
            file.sync()?;
        }
        files
            .into_iter()
            .map(|file| {
                let path = file.final_path().to_path_buf();
                file.finish().map(|()| path)
            })
            .collect()
    }

    fn begin_part(&mut self) -> Result<(), Error> {
        if let Some(part) = self.parts.next() {
            let mut file = AtomicFile::create(&part.path)?;
            file.write(&part.header)?;
            file.pad_to(self.alignment)?;
            self.left_in_part = part.tensors;
            self.files.push(file);
        }
        Ok(())
    }

    fn order_error(&self, found: &str, expected: String) -> Error {
        Error::WriteOrder { path: self.path.clone(), found: found.into(), expected }
    }
}

/// Puts `metadata` in the place of those of the file at `path`, whose tensors stay where they are. Both must take the same room
/// up to the file's alignment, as when only numbers change.
///
/// # Errors
/// When the file is no whole GGUF file in one part, the room is another, or writing fails.
pub fn replace_metadata(path: &Path, metadata: &Metadata) -> Result<(), Error> {
    let gguf = Gguf::open(path)?;
    let alignment = alignment(metadata)?;
    let mut tensors: Vec<_> = gguf.tensors().iter().collect();
    tensors.sort_by_key(|tensor| tensor.offset);
    let spec = |t: &&TensorInfo| TensorSpec { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() };
    let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    let held: Vec<_> = specs.iter().zip(&tensors).map(|(spec, info)| (spec, info.len_bytes as u64)).collect();
    let mut bytes = header(metadata, &held, alignment);
    let found = (bytes.len() as u64).next_multiple_of(alignment);
    let expected = tensors.first().map_or(found, |first| first.offset);
    if found != expected || gguf.parts().len() != 1 {
        return Err(Error::WriteInvalid {
            path: path.to_path_buf(),
            thing: "the header".into(),
            found: format!("{found} bytes"),
            expected: format!("the {expected} bytes of the header in its place"),
        });
    }
    bytes.resize(expected as usize, 0);
    let io_error = |source| Error::Io { action: "write", path: path.to_path_buf(), source };
    let mut file = std::fs::File::options().write(true).open(path).map_err(io_error)?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io_error)
}

/// The bytes of each tensor, if GGUF can hold them all.
fn checked_sizes(path: &Path, tensors: &[TensorSpec]) -> Result<Vec<u64>, Error> {
    let mut names = HashSet::new();
    let mut sizes = Vec::with_capacity(tensors.len());
    let mut total = 0_u64;
    for TensorSpec { name, dtype, shape } in tensors {
        let invalid = |found: String, expected: String| Error::WriteInvalid {
            path: path.to_path_buf(),
            thing: format!("tensor `{name}`"),
            found,
            expected,
        };
        if !names.insert(name.as_str()) {
            return Err(Error::DuplicateTensor { path: path.to_path_buf(), tensor: name.clone() });
        }
        if name.len() > MAX_NAME_BYTES {
            let found = format!("a name of {} bytes", name.len());
            return Err(invalid(found, format!("at most {MAX_NAME_BYTES}")));
        }
        if tensor_type::to_id(*dtype).is_none() {
            return Err(invalid(format!("type {dtype}"), format!("one of {}", tensor_type::supported_names())));
        }
        let bytes = dtype.tensor_bytes(shape).filter(|_| shape.len() <= MAX_AXES && !shape.contains(&0));
        let Some(bytes) = bytes else {
            let expected = format!("at most 4 axes, none empty, rows of a multiple of {}", dtype.block_len());
            return Err(invalid(format!("shape {shape:?} of {dtype}"), expected));
        };
        // With the padding that may follow each: offsets then cannot overflow.
        total = total.saturating_add(bytes as u64).saturating_add(MAX_ALIGNMENT);
        if total > i64::MAX as u64 {
            return Err(invalid(
                format!("shape {shape:?} of {dtype}"),
                "all tensors together within 2^63 bytes".into(),
            ));
        }
        sizes.push(bytes as u64);
    }
    Ok(sizes)
}

/// How many tensors go into each part.
fn part_counts(sizes: &[u64], limits: SplitLimits) -> Vec<usize> {
    let mut counts = Vec::new();
    let (mut count, mut bytes) = (0_usize, 0_u64);
    for &size in sizes {
        let too_many = limits.max_tensors.is_some_and(|max| count >= max);
        let too_large = limits.max_bytes.is_some_and(|max| bytes.saturating_add(size) > max);
        if count > 0 && (too_many || too_large) {
            counts.push(count);
            (count, bytes) = (0, 0);
        }
        count += 1;
        bytes = bytes.saturating_add(size);
    }
    counts.push(count);
    counts
}

fn plan(
    path: &Path,
    metadata: &Metadata,
    tensors: &[TensorSpec],
    sizes: &[u64],
    counts: &[usize],
    alignment: u64,
) -> Result<Vec<Part>, Error> {
    let count = counts.len() as u64;
    if count > parts::MAX_PARTS {
        return Err(Error::WriteInvalid {
            path: path.to_path_buf(),
            thing: "number of parts".into(),
            found: count.to_string(),
            expected: format!("at most {}", parts::MAX_PARTS),
        });
    }
    let mut planned = Vec::with_capacity(counts.len());
    let mut rest = tensors.iter().zip(sizes);
    for (number, &in_part) in counts.iter().enumerate() {
        let held: Vec<(&TensorSpec, u64)> = rest.by_ref().take(in_part).map(|(spec, &size)| (spec, size)).collect();
        let metadata = part_metadata(metadata, number as u64, count, tensors.len());
        let path = if count == 1 {
            path.to_path_buf()
        } else {
            let plain = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
            let stem = if plain { path.with_extension("") } else { path.to_path_buf() };
            parts::part_path(&stem, number as u64, count)
        };
        planned.push(Part { path, header: header(&metadata, &held, alignment), tensors: in_part });
    }
    Ok(planned)
}

/// The first part carries everything; the others what is needed to read them.
fn part_metadata(metadata: &Metadata, number: u64, count: u64, tensors: usize) -> Metadata {
    let mut own = Metadata::new(metadata.path());
    for (key, value) in metadata.iter() {
        let of_split = [KEY_NUMBER, KEY_COUNT, KEY_TENSORS].contains(&key);
        if !of_split && (number == 0 || key == "general.alignment") {
            own.set(key, value.clone());
        }
    }
    if count > 1 {
        // The types that llama.cpp gives these keys, and insists on; `plan` has checked that they hold the numbers.
        own.set(KEY_NUMBER, number as u16);
        own.set(KEY_COUNT, count as u16);
        own.set(KEY_TENSORS, tensors as i32);
    }
    own
}

fn header(metadata: &Metadata, tensors: &[(&TensorSpec, u64)], alignment: u64) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&3_u32.to_le_bytes());
    put_u64(&mut out, tensors.len() as u64);
    put_u64(&mut out, metadata.len() as u64);
    for (key, value) in metadata.iter() {
        put_string(&mut out, key);
        out.extend_from_slice(&ValueType::of(value).id().to_le_bytes());
        put_value(&mut out, value);
    }
    let mut offset = 0_u64;
    for (spec, size) in tensors {
        put_string(&mut out, &spec.name);
        out.extend_from_slice(&(spec.shape.len() as u32).to_le_bytes());
        for &axis in spec.shape.iter().rev() {
            put_u64(&mut out, axis as u64);
        }
        // `checked_sizes` has refused types without a number.
        out.extend_from_slice(&tensor_type::to_id(spec.dtype).unwrap_or_default().to_le_bytes());
        put_u64(&mut out, offset);
        offset = (offset + size).next_multiple_of(alignment);
    }
    out
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    put_u64(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(x) => out.push(*x),
        Value::I8(x) => out.extend_from_slice(&x.to_le_bytes()),
        Value::U16(x) => out.extend_from_slice(&x.to_le_bytes()),
        Value::I16(x) => out.extend_from_slice(&x.to_le_bytes()),
        Value::U32(x) => out.extend_from_slice(&x.to_le_bytes()),
        Value::I32(x) => out.extend_from_slice(&x.to_le_bytes()),
        Value::F32(x) => out.extend_from_slice(&x.to_le_bytes()),
        Value::U64(x) => out.extend_from_slice(&x.to_le_bytes()),
        Value::I64(x) => out.extend_from_slice(&x.to_le_bytes()),
        Value::F64(x) => out.extend_from_slice(&x.to_le_bytes()),
        Value::Bool(x) => out.push(u8::from(*x)),
        Value::String(x) => put_string(out, x),
        Value::Array(x) => put_array(out, x),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend_from_slice(&ValueType::of_elements(array).id().to_le_bytes());
    put_u64(out, array.len() as u64);
    match array {
        Array::U8(v) => out.extend_from_slice(v),
        Array::I8(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::U16(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::I16(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::U32(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::I32(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::F32(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::U64(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::I64(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::F64(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|&x| u8::from(x))),
        Array::String(v) => v.iter().for_each(|x| put_string(out, x)),
        Array::Array(v) => v.iter().for_each(|x| put_array(out, x)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_break_at_both_limits() {
        let sizes = [10, 10, 10, 100, 10];
        let by_bytes = SplitLimits { max_bytes: Some(25), max_tensors: None };
        assert_eq!(part_counts(&sizes, by_bytes), [2, 1, 1, 1]);
        let by_tensors = SplitLimits { max_bytes: None, max_tensors: Some(2) };
        assert_eq!(part_counts(&sizes, by_tensors), [2, 2, 1]);
        assert_eq!(part_counts(&sizes, SplitLimits::default()), [5]);
        assert_eq!(part_counts(&[], by_bytes), [0]);
    }
}
