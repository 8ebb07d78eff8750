//! A file opened for positional reads, which remembers its path and its length when it was opened.
//!
//! Every read is held against that length first, and says which thing was wanted when bytes are missing. Reads take
//! `&self`: there is no cursor, so threads may read different places of one file at once. Knows no format.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::Error;

/// An open regular file.
#[derive(Debug)]
pub(crate) struct DataFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl DataFile {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let io_error = |source| Error::Io { action: "open", path: path.to_path_buf(), source };
        // Looked at before opening: opening a pipe would wait for its writer.
        let found = match std::fs::metadata(path) {
            Ok(found) => found,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NotFound {
                    path: path.to_path_buf(),
                    hint: "check the spelling of the path".into(),
                });
            }
            Err(e) => return Err(io_error(e)),
        };
        if !found.is_file() {
            let found = if found.is_dir() { "a folder" } else { "a device or pipe" };
            return Err(Error::NotAFile { path: path.to_path_buf(), found });
        }
        let file = File::open(path).map_err(io_error)?;
        let len = file.metadata().map_err(io_error)?.len();
        Ok(Self { path: path.to_path_buf(), file, len })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `out` from byte `offset` on. `thing` names what is read, for the message if the file is too short.
    pub(crate) fn read_at(&self, offset: u64, out: &mut [u8], thing: impl FnOnce() -> String) -> Result<(), Error> {
        let needed = out.len() as u64;
        if offset.checked_add(needed).is_none_or(|end| end > self.len) {
            return Err(self.truncated(offset, needed, thing()));
        }
        match read_exact_at(&self.file, out, offset) {
            Ok(()) => Ok(()),
            // The file was long enough when it was opened: somebody has shortened it since.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                let file_len = self.file.metadata().map_or(offset, |m| m.len());
                Err(Error::Truncated { path: self.path.clone(), thing: thing(), offset, needed, file_len })
            }
            Err(source) => Err(Error::Io { action: "read", path: self.path.clone(), source }),
        }
    }

    pub(crate) fn truncated(&self, offset: u64, needed: u64, thing: String) -> Error {
        Error::Truncated { path: self.path.clone(), thing, offset, needed, file_len: self.len }
    }
}

/// Reads a small text-like file whole, refusing one longer than `limit` before allocating for it.
pub(crate) fn read_whole(path: &Path, thing: &'static str, limit: u64) -> Result<Vec<u8>, Error> {
    let file = DataFile::open(path)?;
    if file.len() > limit {
        return Err(Error::TooLarge { path: path.to_path_buf(), thing, found: file.len(), limit });
    }
    let mut bytes = vec![0; file.len() as usize];
    file.read_at(0, &mut bytes, || thing.into())?;
    Ok(bytes)
}

#[cfg(unix)]
fn read_exact_at(file: &File, out: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut out: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                out = out.get_mut(n..).unwrap_or_default();
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
