//! People's data, from files to samples.
//!
//! Contract: a file is read once, line by line, in bounded memory; what is wrong with it is collected as [`Faults`] up to
//! a bound, so that somebody sees many of them at once. Not here: how templates and
//! tokenizers work (`text`), the order in which samples are learnt from.

mod fault;
mod fields;
mod form;
pub(crate) mod hash;
mod lines;
mod load;
mod messages;
#[cfg(feature = "parquet")]
mod parquet_rows;
mod read;
mod record;
mod sample;
mod table;

pub use fault::{Fault, Faults, Problem};
pub use form::{Form, LabelKeys, Objective};
pub use load::{Data, DataError, Division, Loading, Samples, divide, load};
pub use read::{Remarks, Source, read_file};
pub use record::{Chat, Record};
pub use sample::{Answers, Encoder, Encoding, EncodingRemarks, Labelled, Pair, Sample, TextSide, TooLong};
