//! Tuning: from people's data to a changed model.
//!
//! Contract: every line of the data becomes a sample or a fault with its number; nothing is skipped. Not here: reading
//! model files (`formats`), chat templates and tokens (`text`), the command line.
#![forbid(unsafe_code)]

pub mod calibrate;
pub mod check;
mod checkpoint;
pub mod data;
mod dynamic;
mod error;
mod example;
mod launch;
mod learner;
mod model_file;
#[cfg(feature = "mpi")]
mod mpi;
mod optimiser;
pub mod order;
mod preference;
mod ranks;
mod record;
mod reference;
pub mod report;
mod run;
mod schedule;
mod start;
mod tcp;
mod trained;

pub use checkpoint::{Best, Checkpoint, Trend};
pub use error::Error;
pub use example::{Example, Goal, Packed};
pub use launch::{Joined, Launched};
pub use learner::{Learner, Sink, StepReport, StepSettings};
pub use model_file::write_model;
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub use optimiser::{AdamW, Moments, Precision, norm};
pub use preference::{Pair, Preferred};
pub use ranks::{Alone, Ranks, Team};
pub use record::{ClassifierRecord, Reading, examples_hash, model_hash, values_hash};
pub use reference::references;
pub use report::RECORD;
pub use run::{Happening, Lessons, Outcome, Place, RunSettings, best_of, run, validate};
pub use schedule::{Curve, Schedule};
pub use start::{AdapterShape, USUAL_TARGETS, usual_targets};
pub use tcp::{Meeting, Tcp, Waits};
