//! The server over loopback, with tiny models: what clients get, what they are told when something is wrong.

mod adapters;
mod answers;
mod client;
mod fine_tuning;
mod forms;
mod images;
mod interfaces;
mod kept;
mod log;
mod models;
mod parameters;
mod refusals;
mod service;
mod slow;
mod tls;
