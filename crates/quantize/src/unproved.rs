//! A file or folder that is whole but not proved yet: it lies beside its final name under a hidden one, and goes when it is dropped.

use std::path::{Path, PathBuf};

use qwenkit_formats::sync_folder;

use crate::Error;

pub(crate) struct Unproved {
    path: PathBuf,
    out: PathBuf,
    finished: bool,
}

impl Unproved {
    pub(crate) fn new(out: &Path) -> Unproved {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        let path = out.with_file_name(format!(".{name}.{}.unproved", std::process::id()));
        Unproved { path, out: out.to_path_buf(), finished: false }
    }

    /// Where it lies until then.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The name that it will have.
    pub(crate) fn name(&self) -> String {
        self.out.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Gives it its name.
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        if self.path.is_dir() {
            // A power cut must not leave empty files under a finished name.
            for file in std::fs::read_dir(&self.path).map_err(Error::io("read", &self.path))? {
                let path = file.map_err(Error::io("read", &self.path))?.path();
                std::fs::File::open(&path).and_then(|file| file.sync_all()).map_err(Error::io("write", &path))?;
            }
        }
        std::fs::rename(&self.path, &self.out).map_err(Error::io("rename the finished file to", &self.out))?;
        sync_folder(&self.out);
        self.finished = true;
        Ok(())
    }
}

impl Drop for Unproved {
    fn drop(&mut self) {
        if !self.finished {
            // It may not be there at all.
            let _ = match self.path.is_dir() {
                true => std::fs::remove_dir_all(&self.path),
                false => std::fs::remove_file(&self.path),
            };
        }
    }
}
