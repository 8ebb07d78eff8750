//! Why a run could not begin, go on or end.

use std::path::PathBuf;

/// A failure of a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model or the adapter.
    #[error(transparent)]
    Model(#[from] qwenkit_models::Error),

    /// A file.
    #[error(transparent)]
    Format(#[from] qwenkit_formats::Error),

    /// A file of the run's folder could not be written.
    #[error("cannot write `{path}`: {source}\nhint: the run goes on from its last checkpoint with --resume", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },

    /// A checkpoint that lacks something.
    #[error(
        "the checkpoint `{path}` has no valid {what}\nhint: it cannot be gone on from; begin again in another folder",
        path = path.display()
    )]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is missing.
        what: String,
    },

    /// A checkpoint of a run with other settings or data.
    #[error(
        "the checkpoint `{path}` is of another run ({differences})\n\
         hint: a run goes on with the settings and data that it began with; begin a new one in another folder",
        path = path.display()
    )]
    OtherRun {
        /// The file.
        path: PathBuf,
        /// What differs.
        differences: String,
    },

    /// A model that is not on disk what was written.
    #[error("the tensor `{tensor}` read back from `{path}` is not the one that was written\nhint: check the disk; the run goes on from its last checkpoint with --resume", path = path.display())]
    ReadBack {
        /// The folder.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },

    /// A folder whose record does not say what is needed.
    #[error("`{path}`: {what}\nhint: name the folder that `qwenkit tune` wrote", path = path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is missing.
        what: String,
    },

    /// A run that goes astray.
    #[error(
        "the run has diverged: the loss of step {step} is {loss:.3}, after {lowest:.3} before\n\
         hint: a lower learning rate (--lr {hint:.1e}) is the usual remedy; {kept}"
    )]
    Diverged {
        /// The step, counted from 1.
        step: usize,
        /// Its loss.
        loss: f64,
        /// The lowest mean before.
        lowest: f64,
        /// A rate to try.
        hint: f64,
        /// What is left of the run.
        kept: &'static str,
    },

    /// Somebody stopped it while it measured what it is to be held against.
    #[error("stopped after {done} of {pairs} pairs were measured; the same command goes on from there")]
    StoppedBefore {
        /// Pairs measured.
        done: usize,
        /// Pairs in all.
        pairs: usize,
    },

    /// Somebody stopped it.
    #[error("stopped after step {step}; the run goes on from there with --resume")]
    Stopped {
        /// Steps done.
        step: usize,
    },
}
