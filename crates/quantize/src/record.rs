//! The record of a step, beside the file or in the folder that it wrote: what was compared, and the checksums of what is there.
//!
//! The next step holds its input against the record: a model that has changed since its proof is no longer the one that was
//! proved. Models without a record are taken as they are.

use std::io::Read;
use std::path::{Path, PathBuf};

use qwenkit_formats::{Config, ModelFiles};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::{Error, proof::Proof};

/// Of a folder.
pub(crate) const IN_FOLDER: &str = "proof.json";

/// Where the record of the GGUF file `out` stands: beside it.
pub fn record_path(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(".proof.json");
    out.with_file_name(name)
}

/// A step that has come to its end.
pub(crate) struct Done<'a> {
    pub(crate) step: &'a str,
    pub(crate) kind: &'a str,
    pub(crate) before: &'a Path,
    pub(crate) after: &'a Path,
    pub(crate) proof: &'a Proof,
}

/// Writes the record of a step to `path`. `files` are what was written, wherever they lie until they get their names; of each
/// the name that it will have.
pub(crate) fn write(path: &Path, done: &Done<'_>, files: &[(String, PathBuf)]) -> Result<(), Error> {
    let mut sums = Map::new();
    for (name, file) in files {
        sums.insert(name.clone(), json!(checksum(file)?));
    }
    let record = json!({
        "step": done.step,
        "type": done.kind,
        "before": done.before.display().to_string(),
        "after": done.after.display().to_string(),
        "proof": done.proof.to_json(),
        "sha256": sums,
    });
    std::fs::write(path, format!("{record:#}\n")).map_err(Error::io("write", path))
}

/// Files of a folder that a record speaks of: all that are there.
pub(crate) fn files_of(dir: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let path = entry.map_err(Error::io("list", dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_file() && name != IN_FOLDER {
            files.push((name, path));
        }
    }
    files.sort();
    Ok(files)
}

/// Holds a model against its record, if it has one.
pub(crate) fn check(files: &ModelFiles) -> Result<(), Error> {
    let (record, dir) = match files {
        ModelFiles::Checkpoint(checkpoint) => (checkpoint.path().join(IN_FOLDER), checkpoint.path()),
        ModelFiles::Gguf(gguf) => (record_path(gguf.path()), gguf.path().parent().unwrap_or(Path::new(""))),
    };
    if !record.is_file() {
        return Ok(());
    }
    let config = Config::open(&record)?;
    for (name, sum) in config.get("sha256").and_then(Value::as_object).into_iter().flatten() {
        // Names in a record are names of files beside it, and nothing else.
        let plain = Path::new(name).file_name().is_some_and(|plain| plain == name.as_str());
        let path = dir.join(name);
        let found = match plain && path.is_file() {
            true => checksum(&path)?,
            false => "missing".into(),
        };
        if sum.as_str() != Some(&found) {
            return Err(Error::Changed { path, record, found, expected: sum.as_str().unwrap_or_default().to_owned() });
        }
    }
    Ok(())
}

fn checksum(path: &Path) -> Result<String, Error> {
    let mut file = std::fs::File::open(path).map_err(Error::io("open", path))?;
    let (mut hasher, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut piece).map_err(Error::io("read", path))?;
        if n == 0 {
            break;
        }
        hasher.update(&piece[..n]);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
