//! Opens a model wherever a path points: a GGUF file, one part of a split one, a checkpoint folder, its config.json.
//!
//! Both kinds of model answer the same questions about tensors here; what is particular to a kind (metadata, configs)
//! is asked of the kind itself.

use std::path::{Path, PathBuf};

use crate::checkpoint::{no_model, weights_path};
use crate::gguf::split_name;
use crate::{Checkpoint, Error, Gguf, TensorInfo};

/// An open model.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // one stands for a whole open model; its size does not matter
pub enum ModelFiles {
    /// A GGUF file or split set.
    Gguf(Gguf),
    /// A Hugging Face folder with safetensors.
    Checkpoint(Checkpoint),
}

impl ModelFiles {
    /// Opens the model at `path`: a .gguf file (any part of a split one), a checkpoint folder or its config.json, or a
    /// folder that holds one GGUF model (files named `mmproj*.gguf` apart). A folder with safetensors is a checkpoint,
    /// even if a GGUF file lies beside them.
    pub fn open(path: &Path) -> Result<Self, Error> {
        if path.is_dir() {
            return open_dir(path);
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if name == "config.json" && path.exists() {
            return Checkpoint::open(dir).map(Self::Checkpoint);
        }
        Gguf::open(path).map(Self::Gguf)
    }

    /// The GGUF file (the first part of a split one), or the checkpoint's folder.
    pub fn path(&self) -> &Path {
        match self {
            Self::Gguf(gguf) => gguf.path(),
            Self::Checkpoint(checkpoint) => checkpoint.path(),
        }
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        match self {
            Self::Gguf(gguf) => gguf.tensors(),
            Self::Checkpoint(checkpoint) => checkpoint.tensors(),
        }
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        match self {
            Self::Gguf(gguf) => gguf.tensor(name),
            Self::Checkpoint(checkpoint) => checkpoint.tensor(name),
        }
    }

    /// Reads bytes `start_byte .. start_byte + out.len()` of a tensor. Several threads may read at once.
    pub fn read(&self, tensor: &TensorInfo, start_byte: usize, out: &mut [u8]) -> Result<(), Error> {
        match self {
            Self::Gguf(gguf) => gguf.read(tensor, start_byte, out),
            Self::Checkpoint(checkpoint) => checkpoint.read(tensor, start_byte, out),
        }
    }

    /// The size of all weight files together.
    pub fn size_bytes(&self) -> u64 {
        match self {
            Self::Gguf(gguf) => gguf.size_bytes(),
            Self::Checkpoint(checkpoint) => checkpoint.size_bytes(),
        }
    }
}

fn open_dir(dir: &Path) -> Result<ModelFiles, Error> {
    if weights_path(dir).is_some() {
        return Checkpoint::open(dir).map(ModelFiles::Checkpoint);
    }
    let mut models = gguf_models(dir)?;
    match models.pop() {
        None => Err(no_model(dir)),
        Some(only) if models.is_empty() => Gguf::open(&only).map(ModelFiles::Gguf),
        Some(last) => {
            models.push(last);
            let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Err(Error::SeveralModels { path: dir.to_path_buf(), names: models.iter().map(name).collect() })
        }
    }
}

/// The GGUF models of a folder, sorted by name; of a split one its first part that is there.
fn gguf_models(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let io_error = |source| Error::Io { action: "list", path: dir.to_path_buf(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io_error)? {
        let name = entry.map_err(io_error)?.file_name();
        // A name that is not text is nobody's model name.
        if let Some(name) = name.to_str().filter(|n| n.ends_with(".gguf") && !n.starts_with("mmproj")) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    // Parts of one model follow each other in this order.
    names.dedup_by(|later, first| matches!((split_name(later), split_name(first)), (Some(a), Some(b)) if a == b));
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}
