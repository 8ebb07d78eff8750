//! Work that takes longer than an answer, done beside serving: what a job is, and what it tells.
//!
//! Contract: the server never knows what a job does; whoever runs the server hands its jobs over in `Config`. A job that is
//! run again in the same folder goes on where it was. Not here: who may begin one (`fine_tuning`), the work itself.

use std::{fmt, path::PathBuf};

use serde_json::Value;

/// A kind of work. The server runs one at a time, on a thread of its own.
pub trait Job: fmt::Debug + Send + Sync {
    /// What the server finds it by: `tune`.
    fn name(&self) -> &'static str;

    /// The JSON schema of its settings, for `/openapi.json`.
    fn schema(&self) -> Value;

    /// Does the work, or goes on with what an earlier call in the same folder has left. `hear` is called at least every second
    /// with what has happened since the last call, which may be nothing, and says what is wished; what was told before may
    /// be told again after an interruption.
    ///
    /// # Errors
    /// When it was stopped, as `hear` wished or by somebody else, or the work failed.
    fn run(&self, order: &Order, hear: &mut dyn FnMut(&[Progress]) -> Wish) -> Result<Done, JobError>;
}

/// What a job is to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    /// The job's own folder. Files that the settings name without a folder are in it; everything else there is the job's.
    pub folder: PathBuf,
    /// The model's name.
    pub model: String,
    /// As the schema says.
    pub settings: Value,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// Settings and data are in order; the work proper begins.
    Begun(Course),
    /// A step was done.
    Step {
        /// Steps done.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its tokens.
        tokens: u64,
    },
    /// A validation.
    Validation {
        /// Steps done.
        step: u64,
        /// The loss.
        loss: f64,
        /// Share that is right, where that can be said.
        right: Option<f64>,
        /// Whether it is the best so far, which is what is kept.
        is_best: bool,
    },
}

/// What lies ahead, with everything decided that the settings left open.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Course {
    /// Samples to learn from.
    pub samples: u64,
    /// Samples to validate with.
    pub validation: u64,
    /// Steps in all.
    pub steps: u64,
    /// Samples of a step.
    pub batch: u64,
    /// Times that all samples are gone through.
    pub epochs: f64,
    /// The highest learning rate against the usual one.
    pub rate_multiplier: f64,
}

/// What the server wishes of a job that is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To go on.
    GoOn,
    /// To stop soon, and to be ready to go on later.
    Rest,
    /// To stop at once; nothing of it is wanted any more.
    Cancel,
}

/// What a job has made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// An adapter of the model: a PEFT folder or a GGUF file, in the job's folder.
    pub adapter: PathBuf,
}

/// Why a job has not come to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobError {
    /// It was stopped, and can go on.
    Stopped,
    /// It failed, and would fail again.
    Failed {
        /// What happened, for whoever ordered it.
        message: String,
    },
}
