//! Floor 1: from a model's name to whole, checked files on this machine.
//!
//! A name becomes a [`ModelRef`] ([`resolve`]); a [`Store`] says whether it is here ([`Store::find`]) and fetches it if it
//! is not ([`Store::pull`]). The network is touched by `pull` and nothing else in the whole program's model handling.
//! A model is in the store only when every byte of it was checked. Not here: what is inside the files (`formats`), and
//! how progress looks (the binary).
#![forbid(unsafe_code)]

mod catalogue;
mod checkpoint;
mod download;
mod error;
mod hf_cache;
mod http;
mod listing;
mod lock;
mod manifest;
mod name;
mod pip;
mod pull;
mod select;
mod settings;
mod store;
mod wheel;
mod words;

pub use catalogue::{CatalogueEntry, DEFAULT_MODEL, PipSource, WheelPart, catalogue};
pub use error::{Error, SourceFailure};
pub use name::{HubHost, ModelRef, resolve};
pub use pull::PullEvent;
pub use settings::{Pacing, PullOptions};
pub use store::{Store, StoredModel};
pub use words::bytes_in_words;
