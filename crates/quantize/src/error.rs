//! What a step refuses: facts with values, and what to do.

use std::path::PathBuf;

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing files.
    #[error(transparent)]
    Format(#[from] qwenkit_formats::Error),

    /// The model is none that is known, or not whole.
    #[error(transparent)]
    Model(Box<qwenkit_models::Error>),

    /// Computing with the model, or its text side.
    #[error(transparent)]
    Engine(Box<qwenkit_engine::Error>),

    /// The operating system refused something outside the model's own files.
    #[error("cannot {action} `{path}`: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },

    /// A type that nobody knows.
    #[error("`{found}` is no type that can be written; there are {known}")]
    UnknownType {
        /// What was asked for.
        found: String,
        /// The names.
        known: String,
    },

    /// The output would overwrite its own input.
    #[error("`{path}` is the model itself\nhint: choose another name for the output", path = path.display())]
    SamePath {
        /// The file.
        path: PathBuf,
    },

    /// Something that a format has no place for.
    #[error("{path}: {what} is {found}, expected {expected}", path = path.display())]
    Unsayable {
        /// The model.
        path: PathBuf,
        /// The key or tensor.
        what: String,
        /// What it is.
        found: String,
        /// What can be said.
        expected: String,
    },

    /// A value that is no number.
    #[error(
        "{path}: tensor `{tensor}` holds a value that is not finite\nhint: the model is broken; fetch or train it again",
        path = path.display()
    )]
    NotFinite {
        /// The model.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },

    /// The file does not answer as the model before it.
    #[error(
        "{step} is refused: {found}\ntensors that moved most: {moved}\nhint: nothing was left under the name `{out}`; a type nearer \
         to the original moves less, --max-kl allows more", out = out.display()
    )]
    NotProved {
        /// What was done.
        step: &'static str,
        /// The file that would have been there.
        out: PathBuf,
        /// The comparison.
        found: String,
        /// The first few tensors, with how far they moved.
        moved: String,
    },

    /// The model is not the one that an earlier step has proved.
    #[error(
        "`{path}` has changed since the proof in `{record}`: its checksum is {found}, expected {expected}\nhint: make it again from \
         what came before; if the change is meant, remove the record", path = path.display(), record = record.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// The record.
        record: PathBuf,
        /// Its checksum, or that it is missing.
        found: String,
        /// The record's.
        expected: String,
    },

    /// A tokenizer file that says something else than Qwen's.
    #[error("{path}: {problem}", path = path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl From<qwenkit_models::Error> for Error {
    fn from(error: qwenkit_models::Error) -> Error {
        Error::Model(Box::new(error))
    }
}

impl From<qwenkit_engine::Error> for Error {
    fn from(error: qwenkit_engine::Error) -> Error {
        Error::Engine(Box::new(error))
    }
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { action, path, source }
    }
}
