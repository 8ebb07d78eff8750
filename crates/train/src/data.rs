//! People's data, from files to records.
//!
//! Contract: a file is read once, line by line, in bounded memory; what is wrong with it is collected as [`Faults`] up to
//! a bound, so that somebody sees many of them at once. Not here: tokens, batches.

mod fault;
mod fields;
mod form;
mod lines;
mod messages;
mod read;
mod record;

pub use fault::{Fault, Faults, Problem};
pub use form::{Form, LabelKeys, Objective};
pub use read::{Remarks, read_jsonl};
pub use record::{Chat, Record};
