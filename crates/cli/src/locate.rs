//! From what the user typed to a model on this machine: named, found in the store, or fetched.
//!
//! Contract: whatever is chosen or fetched for the user without being named is said on stderr. Not here: how a download
//! looks (`download`), what is inside the files.

use qwenkit_formats::ModelFiles;
use qwenkit_hub::{DEFAULT_MODEL, Error as HubError, ModelRef, Store, StoredModel, resolve};

use crate::{download, terminal};

/// A model that is here, with its files open.
pub(crate) struct Located {
    pub(crate) stored: StoredModel,
    pub(crate) files: ModelFiles,
}

/// The model of this name, or without a name the one to use: fetched if it is not here.
pub(crate) fn locate(name: Option<&str>, offline: bool) -> anyhow::Result<Located> {
    let store = Store::open(None)?;
    let model = match name {
        Some(name) => resolve(name)?,
        None => unnamed(&store)?,
    };
    let stored = match store.find(&model) {
        Some(stored) => stored,
        None => download::pull(&store, &model, offline)?,
    };
    let files = ModelFiles::open(&stored.path)?;
    Ok(Located { stored, files })
}

/// The default model if it is here, else the one pulled last, else the default, which is then fetched.
fn unnamed(store: &Store) -> anyhow::Result<ModelRef> {
    let default = resolve(DEFAULT_MODEL)?;
    if store.find(&default).is_some() {
        terminal::note(&format!("model: {DEFAULT_MODEL}"));
        return Ok(default);
    }
    if let Some(newest) = store.list().into_iter().max_by_key(|model| model.pulled_unix_s) {
        terminal::note(&format!("model: {} (the newest here; `qwenkit run MODEL` names another)", newest.name));
        return Ok(ModelRef::Path(newest.path));
    }
    terminal::note(&format!("no model is here yet; taking the default, {DEFAULT_MODEL}"));
    Ok(default)
}

/// Whether the first word after `run` names a model; otherwise it is the beginning of the prompt.
///
/// # Errors
/// When the word has the shape of a model's name or path and is none: a slip must not become a prompt to another model.
pub(crate) fn is_model(word: &str) -> Result<bool, HubError> {
    let error = match resolve(word) {
        Ok(_) => return Ok(true),
        Err(error) => error,
    };
    if word.trim().is_empty() || word.contains(char::is_whitespace) {
        return Ok(false);
    }
    match error {
        HubError::UnknownModel { .. } if !looks_like_short_name(word) => Ok(false),
        other => Err(other),
    }
}

fn looks_like_short_name(word: &str) -> bool {
    let word = word.to_lowercase();
    let has_tag = word.split_once(':').is_some_and(|(family, tag)| !family.is_empty() && !tag.is_empty());
    has_tag || word.starts_with("qwen") || word.starts_with("qwq")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_paths_and_hub_ids_are_models_and_sentences_are_not() {
        for word in ["qwen3:4b", "QWEN3", "Qwen/Qwen3-0.6B", "hf.co/Qwen/Qwen3-0.6B"] {
            assert!(is_model(word).expect("a model"), "{word}");
        }
        for word in ["Write a Python function that reverses a string", "Hello", "TCP/IP or UDP?", "", "Translate:"] {
            assert!(!is_model(word).expect("a prompt"), "{word}");
        }
    }

    #[test]
    fn a_slip_in_a_name_is_an_error_and_not_a_prompt() {
        for word in ["qwen3:4x", "qwen9", "qwq:1b", "llama:7b"] {
            assert!(matches!(is_model(word), Err(HubError::UnknownModel { .. })), "{word}");
        }
        for word in ["./model.gguf", "model.gguf", "/no/such/folder"] {
            assert!(matches!(is_model(word), Err(HubError::NoSuchPath { .. })), "{word}");
        }
    }
}
