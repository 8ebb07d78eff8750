//! Floor 4: models behind the HTTP interfaces that existing programs speak, and a page for people.
//!
//! Contract: every parameter of a request is obeyed or refused by name; a client that goes away ends its answers; one
//! request's fault is one request's error. Async begins and ends here: the engine is a thread of its own. Not here: which
//! models, how they are loaded, the command line.
#![forbid(unsafe_code)]

mod adapters;
mod anthropic;
mod app;
mod audit;
mod batches;
mod blocks;
mod chat;
mod clock;
mod completions;
mod connections;
mod conversation;
mod embeddings;
mod error;
mod fields;
mod files;
mod fine_tuning;
mod forms;
mod images;
mod info;
mod jobs;
mod keys;
mod listing;
mod log;
mod logprobs;
mod messages;
mod metrics;
mod models;
mod ollama;
mod openapi;
mod origin;
mod page;
mod query;
mod quota;
mod readings;
mod rerank;
mod responses;
mod router;
mod run;
mod serve;
mod settings;
mod sse;
mod store;
mod tally;
mod text;
mod tls;
mod told;

pub use audit::{Chain, verify as verify_audit_log};
pub use images::ImageLimits;
pub use jobs::{Course, Done, Job, JobError, Order, Progress, Wish};
pub use keys::{Keys, KeysError};
pub use log::Log;
pub use models::{AdapterSource, LoadRefusal, ModelSource};
pub use quota::Quota;
pub use serve::{Config, Error, Server, told_to_end};
pub use tls::TlsFiles;

use std::time::Duration;

/// How much a request may ask for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Its images.
    pub images: ImageLimits,
    /// Connections at once; more wait until one has ended.
    pub connections: u32,
    /// How long a client may take for a handshake, the head of a request, its body, or to take the next piece of an answer.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            body_bytes: 32 << 20,
            images: ImageLimits::default(),
            // Below the 1024 open files that systems give a process by default.
            connections: 900,
            // Longer than gateways' pools keep connections on which nothing comes.
            patience: Duration::from_secs(60),
        }
    }
}
