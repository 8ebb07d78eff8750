//! Floor 4: models as other files - quantised, converted, merged, exported - and the proof that they still answer alike.
//!
//! Tensors flow: a file's own (`Stored`), put together under other names (`Renamed`), are read, encoded and written piece by
//! piece by several threads, so no more than a few pieces are ever in memory. Files appear under their names when they are whole.
//! What a block type's bits are is the kernels' business, what a file's bytes are the formats', what tensors mean the
//! models'.

#![forbid(unsafe_code)]

mod adapter;
mod blend;
mod calibrate;
mod choice;
mod config_json;
mod error;
mod folder;
mod merge;
mod metadata;
mod model_name;
mod proof;
mod record;
mod size_label;
mod step;
#[cfg(test)]
mod step_tests;
mod steps;
mod tensors;
mod tokenizer_json;
mod tower;
mod unproved;
mod vocabulary;
mod write;

pub use adapter::export_adapter;
pub use blend::Method;
pub use calibrate::{calibrate, read_importance};
pub use choice::Kind;
pub use error::Error;
pub use folder::companions;
pub use proof::{Before, Moved, Place, Proof, Prover};
pub use record::record_path;
pub use step::{Converted, Step};
pub use steps::Change;
pub use write::{Importance, Progress};
