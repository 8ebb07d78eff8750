//! A pull as the user sees it: what is about to be fetched, a bar with rate and time left, and every hitch.
//!
//! Not here: the download itself (`qwenkit-hub`).

use std::time::Duration;

use qwenkit_hub::{CatalogueEntry, ModelRef, PullEvent, PullOptions, Store, StoredModel, bytes_in_words};

use crate::terminal::{Bar, Unit, note};

/// Fetches a model into the store unless it is there.
///
/// # Errors
/// Those of the hub; what had arrived is kept for the next pull.
pub(crate) fn pull(store: &Store, model: &ModelRef, offline: bool) -> Result<StoredModel, qwenkit_hub::Error> {
    let from_env = PullOptions::from_env();
    let options = PullOptions { offline: offline || from_env.offline, ..from_env };
    let mut known_size = false;
    if !options.offline && store.find(model).is_none() {
        match model {
            ModelRef::Catalogue(entry) => {
                known_size = entry.size_bytes.is_some();
                note(&introduction(entry));
            }
            other => note(&format!("pulling {other}")),
        }
    }
    let mut bar = Bar::new("fetching", Unit::Bytes, Duration::ZERO);
    let mut total = 0;
    let stored = store.pull(model, &options, &mut |event| match event {
        PullEvent::Resolving { .. } | PullEvent::Done => {}
        PullEvent::Waiting { name } => bar.say(&format!("another process is pulling {name}; waiting for it")),
        PullEvent::Source { words } => bar.say(&format!("source: {words}")),
        PullEvent::SourceFailed { reason } => bar.say(&format!("that source failed: {reason}; trying another")),
        PullEvent::Size { total_bytes } => {
            total = total_bytes;
            if !known_size {
                bar.say(&format!("size: {}", bytes_in_words(total)));
            }
        }
        PullEvent::Resumed { have_bytes } => {
            bar.say(&format!("continuing an earlier pull at {}", bytes_in_words(have_bytes)));
        }
        PullEvent::Progress { done_bytes } => bar.update(done_bytes, total.max(done_bytes)),
        PullEvent::Retrying { attempt, reason } => bar.say(&format!("{reason}; attempt {attempt}")),
        PullEvent::Verifying => bar.say("comparing the checksum"),
    })?;
    bar.clear();
    Ok(stored)
}

fn introduction(entry: &CatalogueEntry) -> String {
    let size = entry.size_bytes.map(|bytes| format!(", {}", bytes_in_words(bytes))).unwrap_or_default();
    let text = entry.licence_url.map(|url| format!(" ({url})")).unwrap_or_default();
    format!(
        "{}: {}, {} parameters, {}{size}\nlicence: {}{text}",
        entry.name, entry.title, entry.parameters, entry.quantisation, entry.licence
    )
}
