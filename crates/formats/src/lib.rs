//! Floor 1: files on disk <-> named tensors - GGUF, safetensors, Hugging Face checkpoint folders, config.json, adapters.
//!
//! Every file is treated as hostile: no length or count is believed before it is held against the file's size, nothing
//! panics, and whatever is wrong is reported with the file, the thing, what was found and what was expected. Bytes are
//! fetched by positional reads, never through a memory map, so a file that shrinks gives an error and not a signal, and
//! loading holds one copy of the weights. All readers take `&self` and may be shared between threads.
//! What the numbers mean (block formats, model plans, vocabularies) belongs to other crates.

#![forbid(unsafe_code)]

mod adapter;
mod atomic_file;
mod checkpoint;
mod config;
mod data_file;
mod error;
pub mod gguf;
mod model_files;
pub mod safetensors;
mod sniff;
mod tensor_table;

pub use self::safetensors::{SafetensorsFile, ShardWriter, read_safetensors_file, write_safetensors};
pub use adapter::{Adapter, AdapterModule, AdapterNames, AdapterSettings, AdapterTensor};
pub use atomic_file::sync_folder;
pub use checkpoint::Checkpoint;
pub use config::Config;
pub use error::Error;
pub use gguf::Gguf;
pub use model_files::ModelFiles;
pub use tensor_table::TensorInfo;
