//! One file from a hub to disk: resumed where it stopped, hashed over every byte, in place only when it is right.
//!
//! Contract: bytes arrive in `NAME.partial`; a note beside it says which remote content they belong to, and only that
//! content is continued. The final name appears by renaming, after length and checksum agree. Not here: which file
//! (`select`), which source (`pull`).

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Error;
use crate::http::{Ask, Failure, Reply, backoff, without_query};
use crate::listing::{Remote, RemoteFile};
use crate::manifest::{FileRecord, write_whole};
use crate::pull::PullEvent;

/// Network reads and disk writes of this size keep system calls and hashing out of the profile.
const CHUNK_BYTES: usize = 256 << 10;
/// Progress that earns a broken connection its attempts back.
const PROGRESS_BYTES: u64 = 1 << 20;

/// Wraps the file that bytes are written to; tests put a full disk here.
pub(crate) type Sink = fn(File) -> Box<dyn Write>;

/// The sink of the product: the file itself.
pub(crate) fn to_disk(file: File) -> Box<dyn Write> {
    Box::new(file)
}

/// What is to be fetched where.
pub(crate) struct Job<'a> {
    pub(crate) remote: Remote<'a>,
    pub(crate) commit: Option<&'a str>,
    pub(crate) file: &'a RemoteFile,
    /// The final path.
    pub(crate) target: PathBuf,
    pub(crate) sink: Sink,
}

/// Counts bytes over all files of a model and reports them.
pub(crate) struct Meter<'a> {
    /// Bytes of the files before the current one.
    pub(crate) before_bytes: u64,
    /// The most that was reported by [`Meter::at_least`].
    pub(crate) high_bytes: u64,
    pub(crate) events: &'a mut dyn FnMut(PullEvent),
}

impl Meter<'_> {
    /// The current file has `bytes`.
    pub(crate) fn at(&mut self, bytes: u64) {
        (self.events)(PullEvent::Progress { done_bytes: self.before_bytes + bytes });
    }

    /// The current file has `bytes` by an estimate; less than was reported before is not news.
    pub(crate) fn at_least(&mut self, bytes: u64) {
        if bytes > self.high_bytes {
            self.high_bytes = bytes;
            self.at(bytes);
        }
    }
}

/// The remote content a partial file belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    url: String,
    size_bytes: Option<u64>,
    sha256: Option<String>,
    /// The strong entity tag of the reply that began the file.
    etag: Option<String>,
}

/// The bytes of a partial file and their hash so far.
struct Partial {
    path: PathBuf,
    note_path: PathBuf,
    file: File,
    hasher: Sha256,
    have_bytes: u64,
    etag: Option<String>,
}

/// Why an attempt ended without the whole file.
enum Stop {
    Fatal(Error),
    Again { reason: String, wait: Option<Duration>, status: Option<u16> },
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Fatal(error)
    }
}

/// Fetches one file and says what is on disk.
///
/// # Errors
/// [`Error::Interrupted`] when patience ends, [`Error::WrongChecksum`], [`Error::WrongSize`], [`Error::DiskFull`],
/// [`Error::Io`], and what the hub refuses with.
pub(crate) fn fetch(job: &Job, meter: &mut Meter) -> Result<FileRecord, Error> {
    if let Some(record) = already_whole(job, meter)? {
        return Ok(record);
    }
    let mut partial = Partial::open(job)?;
    if partial.have_bytes > 0 {
        (meter.events)(PullEvent::Resumed { have_bytes: partial.have_bytes });
    }
    let pacing = &job.remote.client.pacing;
    let mut attempt = 1;
    while job.file.size_bytes != Some(partial.have_bytes) || partial.have_bytes == 0 {
        let before = partial.have_bytes;
        let (reason, wait, status) = match continue_file(job, &mut partial, meter) {
            Ok(()) => break,
            Err(Stop::Fatal(error)) => return Err(error),
            Err(Stop::Again { reason, wait, status }) => (reason, wait, status),
        };
        if partial.have_bytes >= before.saturating_add(PROGRESS_BYTES) {
            attempt = 1;
        } else if attempt >= pacing.attempts {
            return Err(out_of_patience(job, &partial, reason, attempt, status));
        }
        attempt += 1;
        (meter.events)(PullEvent::Retrying { attempt, reason });
        (pacing.wait)(wait.unwrap_or_else(|| backoff(attempt - 1)));
    }
    (meter.events)(PullEvent::Verifying);
    partial.settle(job)
}

/// A file that an interrupted pull of several files had already finished; trusted only by its checksum.
fn already_whole(job: &Job, meter: &mut Meter) -> Result<Option<FileRecord>, Error> {
    let (Some(sum), Ok(metadata)) = (&job.file.sha256, fs::metadata(&job.target)) else { return Ok(None) };
    if !metadata.is_file() || job.file.size_bytes.is_some_and(|size| size != metadata.len()) {
        return Ok(None);
    }
    let (hasher, size_bytes) = hash_file(&job.target)?;
    if hex(hasher) != *sum {
        return Ok(None);
    }
    meter.at(size_bytes);
    Ok(Some(FileRecord { path: job.file.path.clone(), size_bytes, sha256: sum.clone() }))
}

/// One request, its body appended to the partial file.
fn continue_file(job: &Job, partial: &mut Partial, meter: &mut Meter) -> Result<(), Stop> {
    if job.file.sha256.is_none() && partial.etag.is_none() {
        // Neither a checksum nor an entity tag could show that the rest belongs to this beginning.
        partial.discard()?;
    }
    let url = job.remote.file_url(job.commit, &job.file.path);
    let ask = Ask { from_byte: partial.have_bytes, if_range: partial.etag.as_deref() };
    let reply = job.remote.client.get(&url, &ask).map_err(|failure| match failure {
        Failure::Refused(error) => Stop::Fatal(error),
        Failure::Unreachable { reason, .. } | Failure::Broken(reason) => {
            Stop::Again { reason, wait: None, status: None }
        }
    })?;
    let total_bytes = match reply.status {
        200 => {
            // The server sends the whole: another content, or it knows no ranges.
            partial.restart(&reply)?;
            reply.content_length()
        }
        206 => match reply.content_range() {
            Some((first, total)) if first == partial.have_bytes && partial.is_of_same_content(&reply) => total,
            _ => {
                partial.discard()?;
                return Err(again("the server continued at another place or in other content than asked"));
            }
        },
        416 => {
            partial.discard()?;
            return Err(again("the server has less than was already here"));
        }
        429 | 500..=599 => {
            let reason = format!("HTTP {}", reply.status);
            return Err(Stop::Again { reason, wait: reply.retry_after(), status: Some(reply.status) });
        }
        404 => return Err(Stop::Fatal(file_not_found(job))),
        _ => return Err(Stop::Fatal(job.remote.refusal(&reply, &url))),
    };
    if let (Some(announced), Some(expected)) = (total_bytes, job.file.size_bytes)
        && announced != expected
    {
        let reason = format!("`{}` should have {expected} bytes, {announced} are offered", job.file.path);
        return Err(Stop::Fatal(Error::BadAnswer { url: without_query(&url), reason }));
    }
    partial.write_note(job, total_bytes)?;
    partial.append(job, reply, total_bytes.or(job.file.size_bytes), meter)
}

fn again(reason: &str) -> Stop {
    Stop::Again { reason: reason.to_owned(), wait: None, status: None }
}

fn file_not_found(job: &Job) -> Error {
    Error::FileNotFound {
        repository: job.remote.repository.to_owned(),
        wanted: job.file.path.clone(),
        nearest: Vec::new(),
    }
}

fn out_of_patience(job: &Job, partial: &Partial, reason: String, attempts: u32, status: Option<u16>) -> Error {
    match status {
        Some(status) if partial.have_bytes == 0 => {
            let url = job.remote.file_url(job.commit, &job.file.path);
            Error::Status { url: without_query(&url), status, attempts }
        }
        _ => Error::Interrupted {
            file: job.file.path.clone(),
            have_bytes: partial.have_bytes,
            total_bytes: job.file.size_bytes,
            attempts,
            reason,
        },
    }
}

impl Partial {
    /// Opens what an earlier attempt left if it belongs to the same content, else begins anew.
    fn open(job: &Job) -> Result<Partial, Error> {
        let (path, note_path) = partial_paths(&job.target);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(io("create", folder))?;
        }
        let note: Option<Note> = fs::read(&note_path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let note = note.filter(|note| note.continues(job));
        let file = OpenOptions::new().create(true).append(true).read(true).open(&path).map_err(io("open", &path))?;
        let mut partial = Partial { path, note_path, file, hasher: Sha256::new(), have_bytes: 0, etag: None };
        match note {
            Some(note) => {
                (partial.hasher, partial.have_bytes) = hash_file(&partial.path)?;
                partial.etag = note.etag;
                if job.file.size_bytes.is_some_and(|size| partial.have_bytes > size) {
                    partial.discard()?;
                }
            }
            None => partial.discard()?,
        }
        Ok(partial)
    }

    /// Forgets what is here.
    fn discard(&mut self) -> Result<(), Error> {
        // A device in the file's place cannot be cut and does not need to be.
        if self.file.metadata().is_ok_and(|m| m.is_file()) {
            self.file.set_len(0).map_err(io("empty", &self.path))?;
        }
        self.hasher = Sha256::new();
        self.have_bytes = 0;
        self.etag = None;
        Ok(())
    }

    /// A server that ignores `If-Range` still betrays other content by its entity tag.
    fn is_of_same_content(&self, reply: &Reply) -> bool {
        match (self.etag.as_deref(), reply.strong_etag()) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => true,
        }
    }

    fn restart(&mut self, reply: &Reply) -> Result<(), Error> {
        self.discard()?;
        self.etag = reply.strong_etag().map(str::to_owned);
        Ok(())
    }

    /// Written before the first byte, so that bytes without a note never exist.
    fn write_note(&self, job: &Job, total_bytes: Option<u64>) -> Result<(), Error> {
        let note = Note {
            url: job.remote.file_url(job.commit, &job.file.path),
            size_bytes: job.file.size_bytes.or(total_bytes),
            sha256: job.file.sha256.clone(),
            etag: self.etag.clone(),
        };
        write_whole(&self.note_path, &serde_json::to_vec(&note).unwrap_or_default())
    }

    fn append(&mut self, job: &Job, reply: Reply, total_bytes: Option<u64>, meter: &mut Meter) -> Result<(), Stop> {
        let mut sink = (job.sink)(self.file.try_clone().map_err(io("open", &self.path))?);
        let mut body = reply.into_reader();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let read = match body.read(&mut chunk) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(again(&format!("the connection broke ({error})"))),
            };
            let bytes = chunk.get(..read).unwrap_or_default();
            if total_bytes.is_some_and(|total| self.have_bytes + read as u64 > total) {
                let found_bytes = self.have_bytes + read as u64;
                return Err(Stop::Fatal(self.reject(job, total_bytes.unwrap_or_default(), found_bytes)));
            }
            sink.write_all(bytes).map_err(|source| self.write_failure(source, total_bytes))?;
            self.hasher.update(bytes);
            self.have_bytes += read as u64;
            meter.at(self.have_bytes);
        }
        sink.flush().map_err(|source| self.write_failure(source, total_bytes))?;
        match total_bytes {
            Some(total) if self.have_bytes < total => {
                Err(again(&format!("the connection ended {} bytes early", total - self.have_bytes)))
            }
            _ => Ok(()),
        }
    }

    fn write_failure(&self, source: std::io::Error, total_bytes: Option<u64>) -> Error {
        if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
            let needed_bytes = total_bytes.map(|total| total.saturating_sub(self.have_bytes));
            return Error::DiskFull { path: self.path.clone(), needed_bytes };
        }
        Error::Io { action: "write", path: self.path.clone(), source }
    }

    fn reject(&self, job: &Job, expected_bytes: u64, found_bytes: u64) -> Error {
        remove_partial(&job.target);
        Error::WrongSize { file: job.file.path.clone(), expected_bytes, found_bytes }
    }

    /// Checks the whole and gives it its name, or deletes it.
    fn settle(self, job: &Job) -> Result<FileRecord, Error> {
        if let Some(expected) = job.file.size_bytes.filter(|expected| *expected != self.have_bytes) {
            return Err(self.reject(job, expected, self.have_bytes));
        }
        let sha256 = hex(self.hasher);
        if let Some(expected) = job.file.sha256.as_ref().filter(|expected| **expected != sha256) {
            remove_partial(&job.target);
            return Err(Error::WrongChecksum {
                file: job.file.path.clone(),
                expected: expected.clone(),
                found: sha256,
            });
        }
        self.file.sync_all().map_err(io("write", &self.path))?;
        drop(self.file);
        fs::rename(&self.path, &job.target).map_err(io("rename", &self.path))?;
        // The note of a finished file means nothing; that it could not be removed harms nobody.
        let _ = fs::remove_file(&self.note_path);
        Ok(FileRecord { path: job.file.path.clone(), size_bytes: self.have_bytes, sha256 })
    }
}

impl Note {
    /// Whether bytes under this note begin the content that the job wants.
    fn continues(&self, job: &Job) -> bool {
        let same_content = self.size_bytes == job.file.size_bytes || job.file.size_bytes.is_none();
        match &job.file.sha256 {
            Some(_) => self.sha256 == job.file.sha256 && same_content,
            // Without a checksum only the server can tell, by the entity tag.
            None => self.etag.is_some() && self.url == job.remote.file_url(job.commit, &job.file.path) && same_content,
        }
    }
}

/// `(NAME.partial, NAME.partial.json)`.
pub(crate) fn partial_paths(target: &Path) -> (PathBuf, PathBuf) {
    let with = |suffix: &str| {
        let mut name = target.file_name().unwrap_or_default().to_os_string();
        name.push(suffix);
        target.with_file_name(name)
    };
    (with(".partial"), with(".partial.json"))
}

fn remove_partial(target: &Path) {
    let (path, note_path) = partial_paths(target);
    // The bytes first: a note without bytes is harmless, bytes without a note would only be thrown away.
    for path in [path, note_path] {
        let _ = fs::remove_file(path);
    }
}

/// Hash and length of a file.
pub(crate) fn hash_file(path: &Path) -> Result<(Sha256, u64), Error> {
    let mut file = File::open(path).map_err(io("read", path))?;
    let mut hasher = Sha256::new();
    let mut size_bytes = 0;
    if !file.metadata().is_ok_and(|m| m.is_file()) {
        // A device has no content to continue from, and may never end.
        return Ok((hasher, 0));
    }
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let read = match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(source) => return Err(io("read", path)(source)),
        };
        hasher.update(chunk.get(..read).unwrap_or_default());
        size_bytes += read as u64;
    }
    Ok((hasher, size_bytes))
}

/// A finished hash in lower-case hexadecimal.
pub(crate) fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Maps a file system error to one that names the action and the path.
pub(crate) fn io(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Io { action, path: path.to_path_buf(), source }
}
