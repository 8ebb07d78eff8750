//! One writer per model: an advisory lock that the system releases when its holder ends, however it ends.
//!
//! Contract: lock files lie outside the models' folders and are never deleted, so that everybody locks the same file.

use std::fs::{self, File, TryLockError};
use std::path::Path;

use crate::Error;

/// Held while a model is written or removed; dropping it releases it.
#[derive(Debug)]
pub(crate) struct ModelLock {
    _file: File,
}

impl ModelLock {
    /// Takes the lock of a model's folder, calling `waiting` first if somebody else has it.
    pub(crate) fn acquire(root: &Path, folder: &str, waiting: impl FnOnce()) -> Result<ModelLock, Error> {
        let (file, path) = open(root, folder)?;
        match file.try_lock() {
            Ok(()) => return Ok(ModelLock { _file: file }),
            Err(TryLockError::WouldBlock) => waiting(),
            Err(TryLockError::Error(source)) => return Err(Error::Io { action: "lock", path, source }),
        }
        file.lock().map_err(|source| Error::Io { action: "lock", path, source })?;
        Ok(ModelLock { _file: file })
    }

    /// Takes the lock, or `None` if somebody else has it.
    pub(crate) fn try_acquire(root: &Path, folder: &str) -> Result<Option<ModelLock>, Error> {
        let (file, path) = open(root, folder)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(ModelLock { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(Error::Io { action: "lock", path, source }),
        }
    }
}

fn open(root: &Path, folder: &str) -> Result<(File, std::path::PathBuf), Error> {
    let locks = root.join(".locks");
    fs::create_dir_all(&locks).map_err(|source| Error::Io { action: "create", path: locks.clone(), source })?;
    let path = locks.join(format!("{folder}.lock"));
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    file.map(|file| (file, path.clone())).map_err(|source| Error::Io { action: "open", path, source })
}
