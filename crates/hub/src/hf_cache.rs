//! Looks for a model among what the Hugging Face libraries already downloaded, so that nothing is fetched twice.
//!
//! Contract: read only; a file counts if its snapshot entry leads to a blob of the right size and, where the checksum is
//! known, of the right name (the cache names large blobs by their SHA-256). Not here: ModelScope's cache.

use std::fs;
use std::path::{Path, PathBuf};

use crate::listing::RemoteFile;
use crate::select::select;
use crate::store::{StoredModel, bare};
use crate::{HubHost, ModelRef, checkpoint};

const SOURCE: &str = "the Hugging Face cache";

/// The model in the cache at `cache`, if it is whole there.
pub(crate) fn find(cache: &Path, model: &ModelRef) -> Option<StoredModel> {
    let (repository, revision, wanted) = match model {
        ModelRef::Catalogue(entry) => (entry.repository, None, Some(entry.file)),
        ModelRef::Hub { host: HubHost::HuggingFace, repository, revision, file } => {
            (repository.as_str(), revision.as_deref(), file.as_deref())
        }
        _ => return None,
    };
    let folder = cache.join(format!("models--{}", repository.replace('/', "--")));
    let snapshot = snapshot(&folder, revision.unwrap_or(HubHost::HuggingFace.default_revision()))?;
    if wanted.is_none() && checkpoint::is_whole(&snapshot) {
        return Some(StoredModel {
            size_bytes: checkpoint::size_bytes(&snapshot),
            repository: Some(repository.to_owned()),
            source: SOURCE.to_owned(),
            ..bare(model.to_string(), snapshot)
        });
    }
    gguf(&snapshot, model, repository, wanted)
}

fn gguf(snapshot: &Path, model: &ModelRef, repository: &str, wanted: Option<&str>) -> Option<StoredModel> {
    let files = files_below(snapshot);
    let selection = select(repository, &files, wanted).ok()?;
    let main = selection.main.filter(|main| main.to_lowercase().ends_with(".gguf"))?;
    let path = snapshot.join(&main);
    let size_bytes = selection.files.iter().map(|file| file.size_bytes).sum::<Option<u64>>()?;
    let mut licence = None;
    if let ModelRef::Catalogue(entry) = model {
        let blob = fs::canonicalize(&path).ok()?.file_name()?.to_string_lossy().into_owned();
        let other_content = entry.sha256.is_some_and(|sum| blob.len() == 64 && blob != sum);
        if other_content || entry.size_bytes.is_some_and(|size| size != size_bytes) {
            return None;
        }
        licence = Some(entry.licence.to_owned());
    }
    Some(StoredModel {
        size_bytes,
        licence,
        repository: Some(repository.to_owned()),
        source: SOURCE.to_owned(),
        ..bare(model.to_string(), path)
    })
}

/// The snapshot of a branch, tag or commit.
fn snapshot(folder: &Path, revision: &str) -> Option<PathBuf> {
    let commit = fs::read_to_string(folder.join("refs").join(revision)).map(|text| text.trim().to_owned());
    let snapshot = folder.join("snapshots").join(commit.unwrap_or_else(|_| revision.to_owned()));
    snapshot.is_dir().then_some(snapshot)
}

/// The files of a snapshot with their sizes, one level of subfolders deep; broken links are left out.
fn files_below(snapshot: &Path) -> Vec<RemoteFile> {
    let mut files = Vec::new();
    let Ok(entries) = fs::read_dir(snapshot) else { return files };
    for entry in entries.filter_map(Result::ok) {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let Ok(metadata) = fs::metadata(entry.path()) else { continue };
        if metadata.is_file() {
            files.push(RemoteFile { path: name, size_bytes: Some(metadata.len()), sha256: None });
        } else if let Ok(inner) = fs::read_dir(entry.path()) {
            let inner = inner.filter_map(|inner| {
                let inner = inner.ok()?;
                let metadata = fs::metadata(inner.path()).ok().filter(fs::Metadata::is_file)?;
                let path = format!("{name}/{}", inner.file_name().into_string().ok()?);
                Some(RemoteFile { path, size_bytes: Some(metadata.len()), sha256: None })
            });
            files.extend(inner);
        }
    }
    files
}
