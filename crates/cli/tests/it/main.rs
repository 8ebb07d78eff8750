//! The program as its users run it: the built binary, its exit codes, what it prints and where.
//!
//! Every run has a store of its own in a temporary folder and no network. Expected numbers come from the recorded
//! answers in `fixtures/parity`, never from an earlier run of this program.

mod adapters;
mod conformance;
mod embeddings;
mod hostile;
mod jobs;
mod json_lines;
mod models;
mod network;
mod pictures;
mod preprocess;
mod program;
mod ranks;
mod recorded;
mod store;
mod tune;
mod tune_check;
mod usage;
