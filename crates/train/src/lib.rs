//! Tuning: from people's data to a changed model.
//!
//! Contract: every line of the data becomes a sample or a fault with its number; nothing is skipped. Not here: reading
//! model files (`formats`), chat templates and tokens (`text`), the command line.
#![forbid(unsafe_code)]

pub mod check;
pub mod data;
pub mod report;
