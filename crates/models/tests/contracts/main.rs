//! The contracts of this crate as tests: right answers, the same bits however they come about, every weight type, and
//! an error with a reason for every file that is no whole model.

mod adapters;
mod hostile_config;
mod hostile_tensors;
mod parity;
mod quantised;
mod refusal;
mod run;
mod tiny;
