//! The record that makes a folder of the store a model: its name, origin, and every file with size and checksum.
//!
//! Contract: it is written last and by renaming, so a folder with a manifest once held every byte; reading it checks
//! that the files still have their sizes. Not here: hashing (`download`).

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::name::is_safe_relative;

const FILE_NAME: &str = "manifest.json";
/// Raised when a reader of an older version would misread a newer record.
const SCHEMA: u32 = 1;

/// One model of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) schema: u32,
    /// The name it was pulled by.
    pub(crate) name: String,
    /// `owner/name` on its hub.
    pub(crate) repository: String,
    /// `huggingface`, `modelscope` or `pip`.
    pub(crate) host: String,
    /// The address it came from, without secrets.
    pub(crate) endpoint: String,
    /// Branch, tag or commit that was asked for.
    pub(crate) revision: Option<String>,
    /// The commit that was delivered, where the source tells.
    pub(crate) commit: Option<String>,
    pub(crate) licence: Option<String>,
    /// The source in words.
    pub(crate) source: String,
    pub(crate) pulled_unix_s: u64,
    /// The file to open, relative to the folder; `None`: the folder is a checkpoint.
    pub(crate) main: Option<String>,
    pub(crate) files: Vec<FileRecord>,
}

/// One file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileRecord {
    /// Relative to the model's folder, with `/`.
    pub(crate) path: String,
    pub(crate) size_bytes: u64,
    /// Computed over what was written.
    pub(crate) sha256: String,
}

impl Manifest {
    /// An empty record of the current schema; the caller fills it.
    pub(crate) fn new(name: String, repository: String) -> Manifest {
        Manifest {
            schema: SCHEMA,
            name,
            repository,
            host: String::new(),
            endpoint: String::new(),
            revision: None,
            commit: None,
            licence: None,
            source: String::new(),
            pulled_unix_s: 0,
            main: None,
            files: Vec::new(),
        }
    }

    /// The manifest of a folder, if the folder holds a whole model: readable record, all files there with their sizes.
    pub(crate) fn read(folder: &Path) -> Option<Manifest> {
        let manifest: Manifest = serde_json::from_slice(&fs::read(folder.join(FILE_NAME)).ok()?).ok()?;
        (manifest.schema == SCHEMA && !manifest.files.is_empty() && manifest.is_whole(folder)).then_some(manifest)
    }

    fn is_whole(&self, folder: &Path) -> bool {
        let main_is_listed = self.main.as_ref().is_none_or(|main| self.files.iter().any(|file| file.path == *main));
        main_is_listed
            && self.files.iter().all(|file| {
                is_safe_relative(&file.path)
                    && fs::metadata(folder.join(&file.path)).is_ok_and(|m| m.is_file() && m.len() == file.size_bytes)
            })
    }

    /// Puts the record in place in one step, after the disk has it.
    pub(crate) fn write(&self, folder: &Path) -> Result<(), Error> {
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        write_whole(&folder.join(FILE_NAME), &text)
    }

    /// Takes the record away, so that the folder is no model whatever else happens to it.
    pub(crate) fn remove(folder: &Path) -> Result<(), Error> {
        let path = folder.join(FILE_NAME);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::Io { action: "remove", path, source })
            }
            _ => Ok(()),
        }
    }

    /// What to open: the file, or the folder of a checkpoint.
    pub(crate) fn open_path(&self, folder: &Path) -> PathBuf {
        self.main.as_ref().map_or_else(|| folder.to_path_buf(), |main| folder.join(main))
    }

    /// Bytes of all files.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size_bytes).sum()
    }
}

/// Writes a small file so that it is either the old or the new one, never a piece.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> Result<(), Error> {
    let beside = path.with_extension("json.new");
    let failed = |source: std::io::Error| {
        if source.kind() == std::io::ErrorKind::StorageFull {
            Error::DiskFull { path: path.to_path_buf(), needed_bytes: Some(content.len() as u64) }
        } else {
            Error::Io { action: "write", path: path.to_path_buf(), source }
        }
    };
    let mut file = fs::File::create(&beside).map_err(failed)?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed)?;
    drop(file);
    fs::rename(&beside, path).map_err(failed)
}
