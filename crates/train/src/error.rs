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

    /// Shares that the ranks cannot take.
    #[error(
        "{shares} shares and {ranks} ranks: each rank takes one share, or one process all of them\n\
         hint: start {shares} ranks, or one process without a launcher"
    )]
    Shares {
        /// Shares of a step's samples.
        shares: usize,
        /// Ranks that are there.
        ranks: usize,
    },

    /// Another rank could not go on.
    #[error("rank {rank} of {count}: {what}")]
    OfRank {
        /// Which one.
        rank: usize,
        /// How many there are.
        count: usize,
        /// What it said.
        what: String,
    },

    /// Ranks no longer reach each other, or never did.
    #[error(
        "{what}\nhint: see what the launcher says of that rank; the run goes on from its last checkpoint with --resume"
    )]
    Lost {
        /// What happened.
        what: String,
    },

    /// Ranks that do not come together at the start.
    #[error(
        "{what}\nhint: all ranks start together, from the same version, and reach the first machine's MASTER_ADDR; QWENKIT_MASTER_PORT \
         names another port for them there"
    )]
    NotMet {
        /// What happened.
        what: String,
    },

    /// Variables of a launcher that do not say how processes come together.
    #[error(
        "{what}\nhint: torchrun sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; unset WORLD_SIZE for one process by itself"
    )]
    Launch {
        /// What is missing or wrong.
        what: String,
    },

    /// Ranks that were given different things.
    #[error(
        "rank {rank} goes by something else than rank 0 ({own}; rank 0: {first})\n\
         hint: all ranks need the same arguments, data, model and instruction set (QWENKIT_ISA chooses an older one)"
    )]
    Disagree {
        /// Which one.
        rank: usize,
        /// Its lines that rank 0 has not.
        own: String,
        /// The other way round.
        first: String,
    },

    /// Ranks whose numbers are no longer the same.
    #[error(
        "behind step {step} the numbers of rank {ranks} are not those of rank 0, though all took the same steps: a machine computes \
         wrongly\nhint: check its memory; the run goes on from its last checkpoint with --resume"
    )]
    Apart {
        /// Which ones.
        ranks: String,
        /// Steps done.
        step: usize,
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

impl Error {
    /// Ranks that do not reach each other.
    pub(crate) fn lost(what: impl Into<String>) -> Error {
        Error::Lost { what: what.into() }
    }
}
