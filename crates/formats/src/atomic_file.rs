//! Writes a file under a temporary name beside its final one and renames it when it is whole and on the disk.
//!
//! Until `finish` the final name is untouched; a writer dropped early removes what it wrote. A full disk is one clear
//! error. Knows no format.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Error;

/// Tells apart the temporary files of one process; the process id tells apart processes.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// 1 MiB: tensors arrive in large pieces, and system calls should be few for the small ones.
const BUFFER_BYTES: usize = 1 << 20;

pub(crate) struct AtomicFile {
    final_path: PathBuf,
    temp_path: PathBuf,
    out: BufWriter<File>,
    /// Bytes given so far.
    written: u64,
    renamed: bool,
}

impl AtomicFile {
    pub(crate) fn create(final_path: &Path) -> Result<Self, Error> {
        if final_path.is_dir() {
            return Err(Error::NotAFile { path: final_path.to_path_buf(), found: "a folder" });
        }
        let name = final_path.file_name().unwrap_or_default().to_string_lossy();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let temp_path = final_path.with_file_name(format!(".{name}.{}-{number}.partial", std::process::id()));
        let file = File::options()
            .write(true)
            .create_new(true)
            .open(&temp_path)
            .map_err(|source| write_error("create", final_path, source))?;
        Ok(Self::over(file, final_path, temp_path))
    }

    fn over(file: File, final_path: &Path, temp_path: PathBuf) -> Self {
        let out = BufWriter::with_capacity(BUFFER_BYTES, file);
        Self { final_path: final_path.to_path_buf(), temp_path, out, written: 0, renamed: false }
    }

    pub(crate) fn final_path(&self) -> &Path {
        &self.final_path
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.out.write_all(bytes).map_err(|source| write_error("write", &self.final_path, source))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Zero bytes up to the next multiple of `alignment`.
    pub(crate) fn pad_to(&mut self, alignment: u64) -> Result<(), Error> {
        let missing = self.written.next_multiple_of(alignment) - self.written;
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut left = missing as usize;
        while left > 0 {
            let n = left.min(ZEROS.len());
            self.write(&ZEROS[..n])?;
            left -= n;
        }
        Ok(())
    }

    /// Flushes and syncs the contents; the file still bears its temporary name.
    pub(crate) fn sync(&mut self) -> Result<(), Error> {
        let synced = self.out.flush().and_then(|()| self.out.get_ref().sync_all());
        synced.map_err(|source| write_error("write", &self.final_path, source))
    }

    /// Syncs, then gives the file its final name.
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        self.sync()?;
        let renamed = std::fs::rename(&self.temp_path, &self.final_path);
        renamed.map_err(|source| write_error("rename the finished file to", &self.final_path, source))?;
        self.renamed = true;
        sync_folder(&self.final_path);
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.renamed {
            // Nothing more can be done here if it fails; the name says that it is a partial file.
            let _ = std::fs::remove_file(&self.temp_path);
        }
    }
}

/// Makes the new name itself durable. Some file systems refuse to sync a folder; the file's contents are safe anyway.
pub fn sync_folder(path: &Path) {
    if cfg!(unix) {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let _ = File::open(folder).and_then(|f| f.sync_all());
    }
}

fn write_error(action: &'static str, path: &Path, source: io::Error) -> Error {
    let path = path.to_path_buf();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull { path, source },
        _ => Error::Io { action, path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn the_final_name_appears_only_when_finished() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.bin");
        let mut file = AtomicFile::create(&path).unwrap();
        file.write(b"abc").unwrap();
        file.pad_to(8).unwrap();
        assert!(!path.exists());
        file.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"abc\0\0\0\0\0");
        assert_eq!(names(folder.path()), ["m.bin"]);
    }

    #[test]
    fn a_dropped_writer_leaves_the_old_file_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.bin");
        std::fs::write(&path, b"old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write(b"new").unwrap();
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["m.bin"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_one_clear_error() {
        // /dev/full answers every write as a full disk does.
        let file = File::options().write(true).open("/dev/full").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut file = AtomicFile::over(file, &folder.path().join("m.bin"), folder.path().join("none"));
        file.write(b"abc").unwrap();
        let error = file.finish().unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains("disk is full") && message.contains("m.bin") && message.contains("free some space"));
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_folder_in_the_way_is_refused_before_writing() {
        let folder = tempfile::tempdir().unwrap();
        let error = AtomicFile::create(folder.path()).err().unwrap();
        assert!(matches!(error, Error::NotAFile { .. }), "{error}");
    }
}
