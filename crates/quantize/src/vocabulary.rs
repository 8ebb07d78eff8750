//! A checkpoint's tokenizer as GGUF metadata (`tokenizer.*`): tokens with their kinds, merges, the split pattern's name, the
//! tokens that begin and end texts, the chat template.
//!
//! Ids that no token has become `[PADn]`, as the embedding has a row for each.

use std::collections::HashMap;
use std::path::PathBuf;

use qwenkit_formats::gguf::{Array, Metadata, Strings};
use qwenkit_formats::{Checkpoint, Config};
use qwenkit_text::{SPLIT_QWEN2, SPLIT_QWEN35, Tokenizer};
use serde_json::Value;

use crate::Error;

/// Kinds of tokens (`tokenizer.ggml.token_type`).
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Adds the tokenizer of `checkpoint`, whose embedding has `rows` rows.
pub(crate) fn add(meta: &mut Metadata, checkpoint: &Checkpoint, rows: usize) -> Result<(), Error> {
    let Some(path) = checkpoint.tokenizer_json() else {
        return Err(qwenkit_engine::Error::NoTokenizer {
            origin: checkpoint.path().display().to_string(),
            expected: "a file tokenizer.json in the folder",
        }
        .into());
    };
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    // Everything that would give other ids than Hugging Face's library is refused there.
    let name = path.display().to_string();
    Tokenizer::from_json(&bytes, &name).map_err(qwenkit_engine::Error::from)?;
    let file = TokenizerFile { root: serde_json::from_slice(&bytes).unwrap_or(Value::Null), path };
    let (mut tokens, mut kinds) = ((0..rows).map(|i| format!("[PAD{i}]")).collect::<Vec<_>>(), vec![UNUSED; rows]);
    let mut set = |id: u64, token: &str, kind: i32| match usize::try_from(id).ok().filter(|id| *id < rows) {
        Some(id) => {
            (tokens[id], kinds[id]) = (token.to_owned(), kind);
            Ok(())
        }
        None => {
            Err(file.wrong(format!("token {token:?} has the id {id}, expected one below {rows}, the embedding's rows")))
        }
    };
    for (token, id) in file.root.pointer("/model/vocab").and_then(Value::as_object).into_iter().flatten() {
        set(id.as_u64().unwrap_or(u64::MAX), token, NORMAL)?;
    }
    let mut special = HashMap::new();
    for token in file.root.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        let id = token.get("id").and_then(Value::as_u64).unwrap_or(u64::MAX);
        let content = token.get("content").and_then(Value::as_str).unwrap_or_default();
        let is_special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
        set(id, content, if is_special { CONTROL } else { USER_DEFINED })?;
        special.insert(content.to_owned(), id);
    }
    meta.set("tokenizer.ggml.model", "gpt2");
    meta.set("tokenizer.ggml.pre", file.split_name()?);
    meta.set("tokenizer.ggml.tokens", tokens.iter().collect::<Strings>());
    meta.set("tokenizer.ggml.token_type", Array::I32(kinds));
    meta.set("tokenizer.ggml.merges", file.merges().collect::<Strings>());
    add_special(meta, checkpoint, &special)?;
    if let Some(template) = checkpoint.chat_template() {
        meta.set("tokenizer.chat_template", template);
    }
    Ok(())
}

struct TokenizerFile {
    path: PathBuf,
    root: Value,
}

impl TokenizerFile {
    fn wrong(&self, problem: String) -> Error {
        Error::Tokenizer { path: self.path.clone(), problem }
    }

    /// What llama.cpp calls the split pattern.
    fn split_name(&self) -> Result<&'static str, Error> {
        let found = self.root.pointer("/pre_tokenizer/pretokenizers/0/pattern/Regex").and_then(Value::as_str);
        match found {
            Some(SPLIT_QWEN2) => Ok("qwen2"),
            Some(SPLIT_QWEN35) => Ok("qwen35"),
            other => {
                let found = other.unwrap_or("none");
                Err(self.wrong(format!("the split pattern is {found}, expected Qwen2's or Qwen3.5's")))
            }
        }
    }

    /// Merges as `left right`.
    fn merges(&self) -> impl Iterator<Item = String> {
        let list = self.root.pointer("/model/merges").and_then(Value::as_array).into_iter().flatten();
        list.map(|merge| match merge {
            Value::Array(pair) => pair.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
            other => other.as_str().unwrap_or_default().to_owned(),
        })
    }
}

/// The tokens with a role: as tokenizer_config.json spells them, else as the configs number them.
fn add_special(meta: &mut Metadata, checkpoint: &Checkpoint, special: &HashMap<String, u64>) -> Result<(), Error> {
    let of_tokenizer = |role: &str| {
        let found = checkpoint.tokenizer_config()?.get(&format!("{role}_token"))?;
        let text = found.as_str().or_else(|| found.get("content")?.as_str())?;
        special.get(text).copied()
    };
    // The text part of a multimodal config may have its own.
    let text = checkpoint.config().object("text_config")?;
    let configs = [checkpoint.generation_config(), Some(checkpoint.config()), text.as_ref()];
    let of_configs = |role: &str| {
        let key = format!("{role}_token_id");
        let first = |config: &&Config| match config.get(&key)? {
            Value::Array(ids) => ids.first()?.as_u64(),
            id => id.as_u64(),
        };
        configs.iter().flatten().find_map(first)
    };
    for (role, key) in [("eos", "eos_token_id"), ("pad", "padding_token_id"), ("bos", "bos_token_id")] {
        if let Some(id) = of_tokenizer(role).or_else(|| of_configs(role)).and_then(|id| u32::try_from(id).ok()) {
            meta.set(&format!("tokenizer.ggml.{key}"), id);
        }
    }
    if let Some(config) = checkpoint.tokenizer_config()
        && let Some(adds) = config.bool("add_bos_token")?
    {
        meta.set("tokenizer.ggml.add_bos_token", adds);
    }
    Ok(())
}
