//! The server over loopback, with tiny models: what clients get, what they are told when something is wrong.

mod adapters;
mod answers;
mod client;
mod fine_tuning;
mod forms;
mod images;
mod interfaces;
mod kept;
mod models;
mod refusals;
mod service;
mod tls;
