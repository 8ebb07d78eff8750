//! What can go wrong with a file, as facts: the file, the thing in it, what was found, what was expected, what to do.
//!
//! One enum for the whole crate. Messages are complete sentences for the person at the terminal; a hint stands on a
//! line of its own. No variant carries a backtrace or a nested library type except the operating system's own error.

use std::io;
use std::path::PathBuf;

use qwenkit_tensor::DType;

/// Any failure of reading or writing model files.
#[allow(missing_docs)] // the message above each variant is its documentation, and the fields carry its names
#[derive(Debug, thiserror::Error)]
pub enum Error {
    // ---- the file as such ----
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the disk is full: cannot write `{}` ({source})\nhint: free some space, or choose another folder; \
             nothing was left under the final name", path.display())]
    DiskFull { path: PathBuf, source: io::Error },
    #[error("`{}` does not exist\nhint: {hint}", path.display())]
    NotFound { path: PathBuf, hint: String },
    #[error("`{}` is {found}, expected a regular file", path.display())]
    NotAFile { path: PathBuf, found: &'static str },
    #[error("`{}` is not {expected}: it is {found}\nhint: {hint}", path.display())]
    WrongKind { path: PathBuf, expected: &'static str, found: String, hint: String },
    #[error("`{}` is cut short: {thing} needs {needed} bytes at byte {offset}, but the file ends at byte {file_len}\n\
             hint: the download or copy is probably incomplete; fetch it again", path.display())]
    Truncated { path: PathBuf, thing: String, offset: u64, needed: u64, file_len: u64 },
    #[error("`{}` is {found} bytes, expected at most {limit} for {thing}", path.display())]
    TooLarge { path: PathBuf, thing: &'static str, found: u64, limit: u64 },

    // ---- GGUF structure ----
    #[error("`{}` is GGUF version {found}, expected version 2 or 3\nhint: convert the model again with a current \
             converter", path.display())]
    GgufVersion { path: PathBuf, found: u32 },
    #[error("`{}` is a big-endian GGUF file (version {found}), expected little-endian\nhint: fetch the little-endian \
             file, or convert it with gguf_convert_endian", path.display())]
    GgufBigEndian { path: PathBuf, found: u32 },
    #[error("{thing} in `{}`: found {found}, expected at most {limit}: {reason}", path.display())]
    Count { path: PathBuf, thing: String, found: u64, limit: u64, reason: &'static str },
    #[error("{thing} in `{}`: found bytes that are not UTF-8, expected text", path.display())]
    NotUtf8 { path: PathBuf, thing: String },
    #[error("{thing} in `{}`: found byte {found}, expected a bool (0 or 1)", path.display())]
    BadBool { path: PathBuf, thing: String, found: u8 },
    #[error("{thing} in `{}`: found value type {found}, expected 0 (u8) to 12 (f64)", path.display())]
    ValueType { path: PathBuf, thing: String, found: u32 },
    #[error("{thing} in `{}`: found arrays nested deeper than {limit} levels, expected at most {limit}",
            path.display())]
    Nesting { path: PathBuf, thing: String, limit: usize },
    #[error("key `{key}` in `{}`: found twice, expected once", path.display())]
    DuplicateKey { path: PathBuf, key: String },
    #[error("tensor `{tensor}` in `{}`: found twice, expected once", path.display())]
    DuplicateTensor { path: PathBuf, tensor: String },
    #[error("key `general.alignment` in `{}`: found {found}, expected a power of two up to {limit}", path.display())]
    Alignment { path: PathBuf, found: u64, limit: u64 },

    // ---- tensors ----
    #[error("tensor `{tensor}` in `{}` has type {found}, which QwenKit does not read; supported: {supported}\n\
             hint: fetch the model in one of these types", path.display())]
    TensorType { path: PathBuf, tensor: String, found: String, supported: String },
    #[error("tensor `{tensor}` in `{}`: found {found} axes, expected at most 4", path.display())]
    AxisCount { path: PathBuf, tensor: String, found: u32 },
    #[error("tensor `{tensor}` in `{}`: found shape {shape:?} of {dtype}, expected {expected}", path.display())]
    Shape { path: PathBuf, tensor: String, dtype: DType, shape: Vec<u64>, expected: String },
    #[error("tensor `{tensor}` in `{}`: found offset {found}, expected a multiple of the alignment {alignment}",
            path.display())]
    OffsetUnaligned { path: PathBuf, tensor: String, found: u64, alignment: u64 },
    #[error("tensor `{tensor}` in `{}`: found its data at bytes {start} to {end}, expected it to end within the file's \
             {file_len} bytes\nhint: the download or copy is probably incomplete; fetch it again", path.display())]
    OutsideFile { path: PathBuf, tensor: String, start: u128, end: u128, file_len: u64 },
    #[error("tensors `{first}` and `{second}` in `{}`: found overlapping data (from byte {at}), expected separate \
             bytes", path.display())]
    Overlap { path: PathBuf, first: String, second: String, at: u64 },
    #[error("tensor `{tensor}` in `{}`: asked for bytes {start} to {end}, expected a range within its {len} bytes",
            path.display())]
    ReadRange { path: PathBuf, tensor: String, start: usize, end: u128, len: usize },

    // ---- keys of metadata and of config.json ----
    #[error("key `{key}` in `{}`: found none, expected {expected}", path.display())]
    KeyMissing { path: PathBuf, key: String, expected: &'static str },
    #[error("key `{key}` in `{}`: found {found}, expected {expected}", path.display())]
    KeyType { path: PathBuf, key: String, found: String, expected: &'static str },
    #[error("`{}` is not valid JSON: {problem}", path.display())]
    Json { path: PathBuf, problem: String },

    // ---- split GGUF models ----
    #[error("`{}` is part {number} of {count} of a split model, but its name does not say so; expected a name ending \
             in `{expected}`\nhint: give the parts their original names", path.display())]
    SplitName { path: PathBuf, number: u64, count: u64, expected: String },
    #[error("part {number} of {count} of the split model is missing: expected `{}`\nhint: fetch all parts into the \
             same folder", path.display())]
    SplitMissing { path: PathBuf, number: u64, count: u64 },
    #[error("key `{key}` in `{}`: found {found}, expected {expected}\nhint: the parts are not of the same model; fetch \
             them again", path.display())]
    SplitMismatch { path: PathBuf, key: &'static str, found: String, expected: String },

    // ---- safetensors and checkpoint folders ----
    #[error("the safetensors header of `{}` is invalid: {problem}", path.display())]
    SafetensorsHeader { path: PathBuf, problem: String },
    #[error("`{}` is {found} bytes, expected {expected} from its header\nhint: the download or copy is probably \
             incomplete; fetch it again", path.display())]
    SafetensorsLength { path: PathBuf, found: u64, expected: u128 },
    #[error("shard `{shard}` is named in `{}` for tensor `{tensor}`, expected the name of a file in the same folder",
            path.display())]
    ShardName { path: PathBuf, shard: String, tensor: String },
    #[error("`{}` names {missing} of {count} shards that are not there, the first `{shard}`\nhint: fetch the missing \
             files into the same folder", path.display())]
    ShardMissing { path: PathBuf, shard: String, missing: usize, count: usize },
    #[error("`{}` places tensor `{tensor}` in `{shard}`, which does not hold it ({count} such tensors)",
            path.display())]
    IndexTensorMissing { path: PathBuf, tensor: String, shard: String, count: usize },
    #[error("`{shard}` holds tensor `{tensor}`, which `{}` does not place there ({count} such tensors)",
            path.display())]
    IndexTensorExtra { path: PathBuf, tensor: String, shard: String, count: usize },
    #[error("folder `{}` holds no model: found {found}, expected config.json with model.safetensors, or one .gguf \
             model\nhint: {hint}", path.display())]
    NoModel { path: PathBuf, found: String, hint: String },
    #[error("folder `{}` holds several models: {}\nhint: name the file you mean", path.display(), names.join(", "))]
    SeveralModels { path: PathBuf, names: Vec<String> },

    // ---- adapters ----
    #[error("`{}` holds no adapter: found {found}\nhint: {hint}", path.display())]
    NoAdapter { path: PathBuf, found: String, hint: String },
    #[error("adapter `{}`, `{tensor}`: found {found}, expected {expected}", path.display())]
    AdapterTensor { path: PathBuf, tensor: String, found: String, expected: String },

    // ---- writing ----
    #[error("cannot write `{}`: data for tensor `{found}` came where {expected} was expected", path.display())]
    WriteOrder { path: PathBuf, found: String, expected: String },
    #[error("cannot write `{}`: tensor `{tensor}` got {found} bytes, expected {expected}", path.display())]
    WriteLength { path: PathBuf, tensor: String, found: u128, expected: u64 },
    #[error("cannot write `{}`: {thing}: found {found}, expected {expected}", path.display())]
    WriteInvalid { path: PathBuf, thing: String, found: String, expected: String },
}
