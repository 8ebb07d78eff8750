//! The models on this machine: one folder each, found, listed and removed.
//!
//! Contract: a model is here only if its manifest is and every file still has its size; what other tools downloaded is
//! used but never changed. Not here: fetching (`pull`).

use std::fs;
use std::path::{Path, PathBuf};

use crate::lock::ModelLock;
use crate::manifest::Manifest;
use crate::{Error, HubHost, ModelRef, hf_cache, settings};

/// [`Manifest::host`] of models that came from ModelScope.
pub(crate) const MODELSCOPE: &str = "modelscope";

/// Where models are kept.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    /// The Hugging Face libraries' cache, read only.
    hugging_face_cache: Option<PathBuf>,
}

/// A model that is whole on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredModel {
    /// The name it was pulled by, or its path.
    pub name: String,
    /// The .gguf file (the first part of a split one) or the checkpoint's folder.
    pub path: PathBuf,
    /// Bytes of all its files.
    pub size_bytes: u64,
    /// The licence as its source states it.
    pub licence: Option<String>,
    /// `owner/name` on its hub.
    pub repository: Option<String>,
    /// SHA-256 of the one weight file, in hexadecimal; `None` for sets of files.
    pub sha256: Option<String>,
    /// When it was pulled, in seconds since 1970.
    pub pulled_unix_s: Option<u64>,
    /// Where it came from, in words.
    pub source: String,
}

impl Store {
    /// The store in `root`, or in the place the environment names: `$QWENKIT_HOME/models`, else `qwenkit/models` in the
    /// system's cache folder. Nothing is created yet.
    ///
    /// # Errors
    /// [`Error::NoHome`] if neither `root` nor the environment names a place.
    pub fn open(root: Option<PathBuf>) -> Result<Store, Error> {
        let root = root.map_or_else(settings::store_root, Ok)?;
        Ok(Store { root, hugging_face_cache: settings::hugging_face_cache() })
    }

    /// The store in `root`, with the Hugging Face cache in the place named, or none.
    pub fn open_with_cache(root: PathBuf, hugging_face_cache: Option<PathBuf>) -> Store {
        Store { root, hugging_face_cache }
    }

    /// The folder of the store.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Every whole model of the store, by name. Interrupted pulls are not among them.
    pub fn list(&self) -> Vec<StoredModel> {
        let mut models: Vec<StoredModel> =
            self.manifests().into_iter().map(|(folder, manifest)| stored(&folder, manifest)).collect();
        models.sort_by(|a, b| a.name.cmp(&b.name));
        models
    }

    /// The model, if it is whole on this machine: in the store, in the Hugging Face cache, or at its path.
    pub fn find(&self, model: &ModelRef) -> Option<StoredModel> {
        if let ModelRef::Path(path) = model {
            return at_path(path);
        }
        let folder = self.folder_of(model)?;
        let own = Manifest::read(&folder).map(|manifest| stored(&folder, manifest));
        own.or_else(|| self.find_by_origin(model))
            .or_else(|| hf_cache::find(self.hugging_face_cache.as_deref()?, model))
    }

    /// Removes a model, or what an interrupted pull left of it. The answer's `size_bytes` is what became free.
    ///
    /// # Errors
    /// [`Error::NotInStore`], [`Error::NotOurs`] for paths and the Hugging Face cache, [`Error::Busy`] while it is being
    /// pulled, [`Error::Io`].
    pub fn remove(&self, model: &ModelRef) -> Result<StoredModel, Error> {
        let found = self.find(model);
        let folder = match (&found, self.folder_of(model)) {
            (_, Some(folder)) if folder.is_dir() => folder,
            (Some(found), _) => match self.folder_holding(&found.path) {
                Some(folder) => folder,
                None => return Err(Error::NotOurs { name: model.to_string(), path: found.path.clone() }),
            },
            (None, _) => return Err(Error::NotInStore { name: model.to_string(), root: self.root.clone() }),
        };
        let key = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let Some(_lock) = ModelLock::try_acquire(&self.root, &key)? else {
            return Err(Error::Busy { name: model.to_string() });
        };
        let size_bytes = folder_bytes(&folder);
        let removed = match Manifest::read(&folder) {
            Some(manifest) => StoredModel { size_bytes, ..stored(&folder, manifest) },
            None => StoredModel {
                source: "an interrupted pull".to_owned(),
                size_bytes,
                ..bare(model.to_string(), folder.clone())
            },
        };
        Manifest::remove(&folder)?;
        fs::remove_dir_all(&folder).map_err(|source| Error::Io { action: "remove", path: folder.clone(), source })?;
        Ok(removed)
    }

    /// The folder a model has or would have.
    pub(crate) fn folder_of(&self, model: &ModelRef) -> Option<PathBuf> {
        model.folder().map(|folder| self.root.join(folder))
    }

    /// The same files pulled under another name, such as a short name's file asked for by its repository.
    fn find_by_origin(&self, model: &ModelRef) -> Option<StoredModel> {
        let (repository, revision, file) = match model {
            ModelRef::Hub { host: HubHost::HuggingFace, repository, revision, file: Some(file) } => {
                (repository.as_str(), revision, file.as_str())
            }
            ModelRef::Catalogue(entry) => (entry.repository, &None, entry.file),
            _ => return None,
        };
        self.manifests().into_iter().find_map(|(folder, manifest)| {
            let same_file = manifest.main.as_deref().is_some_and(|main| main == file);
            let same_revision = revision.is_none() && manifest.revision.is_none()
                || revision.is_some() && (manifest.revision == *revision || manifest.commit == *revision);
            let same_hash = match model {
                ModelRef::Catalogue(entry) => {
                    entry.sha256.is_none_or(|sum| manifest.files.iter().any(|f| f.sha256 == sum))
                }
                _ => true,
            };
            (manifest.repository == repository
                && manifest.host != MODELSCOPE
                && same_file
                && same_revision
                && same_hash)
                .then(|| stored(&folder, manifest))
        })
    }

    fn folder_holding(&self, path: &Path) -> Option<PathBuf> {
        let first = path.strip_prefix(&self.root).ok()?.components().next()?;
        Some(self.root.join(first))
    }

    fn manifests(&self) -> Vec<(PathBuf, Manifest)> {
        let Ok(entries) = fs::read_dir(&self.root) else { return Vec::new() };
        entries
            .filter_map(|entry| {
                let folder = entry.ok()?.path();
                Manifest::read(&folder).map(|manifest| (folder, manifest))
            })
            .collect()
    }
}

/// A manifest as callers see it.
pub(crate) fn stored(folder: &Path, manifest: Manifest) -> StoredModel {
    let sha256 = match manifest.files.as_slice() {
        [only] => Some(only.sha256.clone()),
        _ => None,
    };
    StoredModel {
        path: manifest.open_path(folder),
        size_bytes: manifest.size_bytes(),
        sha256,
        name: manifest.name,
        licence: manifest.licence,
        repository: Some(manifest.repository),
        pulled_unix_s: Some(manifest.pulled_unix_s),
        source: manifest.source,
    }
}

/// A model of which only name and place are known.
pub(crate) fn bare(name: String, path: PathBuf) -> StoredModel {
    StoredModel {
        name,
        path,
        size_bytes: 0,
        licence: None,
        repository: None,
        sha256: None,
        pulled_unix_s: None,
        source: String::new(),
    }
}

fn at_path(path: &Path) -> Option<StoredModel> {
    let is_folder = path.is_dir();
    if !is_folder && !path.is_file() {
        return None;
    }
    let size_bytes = if is_folder { folder_bytes(path) } else { fs::metadata(path).ok()?.len() };
    Some(StoredModel {
        size_bytes,
        source: "a path on this machine".to_owned(),
        ..bare(path.display().to_string(), path.to_path_buf())
    })
}

/// Bytes of the files below a folder; links are counted, not followed.
fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => folder_bytes(&entry.path()),
            _ => entry.metadata().map_or(0, |m| m.len()),
        })
        .sum()
}
