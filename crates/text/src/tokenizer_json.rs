//! Hugging Face's `tokenizer.json`, turned into [`Parts`].
//!
//! Only what Qwen tokenizers use is accepted, and everything else is named in the error: a setting that is read over
//! would give other ids than Hugging Face without a word. `post_processor`, `truncation`, `padding` and `decoder` do not
//! change the ids of a text and are not read.

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::Error;
use crate::parts::{Added, Parts, UnmadeMerge};

/// Reads the file.
pub(crate) fn read(bytes: &[u8], origin: &str) -> Result<Parts, Error> {
    let root: Value = serde_json::from_slice(bytes).map_err(|error| broken(origin, error.to_string()))?;
    let Value::Object(mut root) = root else {
        return Err(broken(origin, "the file is not a JSON object".to_owned()));
    };
    let nfc = normalizer(root.get("normalizer"), origin)?;
    let split = pre_tokenizer(root.get("pre_tokenizer"), origin)?;
    let added = added_tokens(root.get("added_tokens"), origin)?;
    let Some(Value::Object(mut model)) = root.remove("model") else {
        return Err(broken(origin, "`model` is missing".to_owned()));
    };
    check_model(&model, origin)?;
    let merges = merges(model.remove("merges"), origin)?;
    let mut tokens = vocabulary(model.remove("vocab"), origin)?;
    // Newer files list added tokens in the model's vocabulary as well; they stay added tokens.
    let is_added: std::collections::HashSet<(&str, u32)> =
        added.iter().map(|added| (added.token.content.as_str(), added.id)).collect();
    tokens.retain(|(token, id)| !is_added.contains(&(token.as_str(), *id)));
    Ok(Parts { origin: origin.to_owned(), tokens, merges, unmade: UnmadeMerge::Refuse, added, nfc, split })
}

fn broken(origin: &str, problem: String) -> Error {
    Error::TokenizerJson { origin: origin.to_owned(), problem }
}

fn unsupported(origin: &str, setting: &'static str, found: &Value, supported: &'static str) -> Error {
    let mut found = found.to_string();
    if let Some((end, _)) = found.char_indices().nth(120) {
        found.truncate(end);
        found.push('…');
    }
    Error::Unsupported { origin: origin.to_owned(), setting, found, supported }
}

/// The `type` field of a component.
fn kind(value: &Value) -> &str {
    value.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn normalizer(value: Option<&Value>, origin: &str) -> Result<bool, Error> {
    match value {
        None | Some(Value::Null) => Ok(false),
        Some(value) if kind(value) == "NFC" => Ok(true),
        Some(value) => Err(unsupported(origin, "normalizer", value, "NFC or null")),
    }
}

/// The splitting pattern out of the one shape Qwen uses: Split by a pattern, then ByteLevel without its own pattern.
fn pre_tokenizer(value: Option<&Value>, origin: &str) -> Result<String, Error> {
    const SUPPORTED: &str =
        "a Sequence of Split (Regex, Isolated) and ByteLevel (add_prefix_space and use_regex false)";
    let value = value.unwrap_or(&Value::Null);
    let steps = value.get("pretokenizers").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let is_false = |step: &Value, key: &str| step.get(key).and_then(Value::as_bool) == Some(false);
    if let [split, bytes] = steps
        && kind(split) == "Split"
        && kind(bytes) == "ByteLevel"
        && split.get("behavior").and_then(Value::as_str) == Some("Isolated")
        && is_false(split, "invert")
        && is_false(bytes, "add_prefix_space")
        && is_false(bytes, "use_regex")
        && let Some(pattern) = split.pointer("/pattern/Regex").and_then(Value::as_str)
    {
        return Ok(pattern.to_owned());
    }
    Err(unsupported(origin, "pre_tokenizer", value, SUPPORTED))
}

fn added_tokens(value: Option<&Value>, origin: &str) -> Result<Vec<Added>, Error> {
    let list = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(broken(origin, "`added_tokens` is not a list".to_owned())),
    };
    let read = |(index, entry): (usize, &Value)| {
        let flag = |key: &str| entry.get(key).and_then(Value::as_bool).unwrap_or(false);
        let id = entry.get("id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        let content = entry.get("content").and_then(Value::as_str).filter(|content| !content.is_empty());
        let (Some(id), Some(content)) = (id, content) else {
            return Err(broken(origin, format!("`added_tokens[{index}]` has no `id` or no `content`")));
        };
        let token = AddedToken::from(content, flag("special"))
            .normalized(flag("normalized"))
            .single_word(flag("single_word"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"));
        Ok(Added { id, token })
    };
    list.iter().enumerate().map(read).collect()
}

fn check_model(model: &Map<String, Value>, origin: &str) -> Result<(), Error> {
    let kind = model.get("type").unwrap_or(&Value::Null);
    if !kind.is_null() && kind != "BPE" {
        return Err(unsupported(origin, "model.type", kind, "BPE"));
    }
    for setting in
        ["dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges", "fuse_unk"]
    {
        match model.get(setting) {
            None | Some(Value::Null | Value::Bool(false)) => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(found) => return Err(unsupported(origin, setting, found, "null, false or empty, as in Qwen's files")),
        }
    }
    Ok(())
}

fn vocabulary(value: Option<Value>, origin: &str) -> Result<Vec<(String, u32)>, Error> {
    let Some(Value::Object(vocab)) = value else {
        return Err(broken(origin, "`model.vocab` is not an object".to_owned()));
    };
    let read = |(token, id): (String, Value)| match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok((token, id)),
        None => Err(broken(origin, format!("`model.vocab` gives token `{token}` the id {id}"))),
    };
    vocab.into_iter().map(read).collect()
}

/// Merges are `"a b"` in older files and `["a", "b"]` in newer ones.
fn merges(value: Option<Value>, origin: &str) -> Result<Vec<(String, String)>, Error> {
    let Some(Value::Array(list)) = value else {
        return Err(broken(origin, "`model.merges` is not a list".to_owned()));
    };
    let read = |(index, merge): (usize, Value)| {
        let pair = match &merge {
            Value::String(text) => text.split_once(' ').filter(|(_, right)| !right.contains(' ')),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            _ => None,
        };
        match pair.filter(|(left, right)| !left.is_empty() && !right.is_empty()) {
            Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
            None => Err(Error::Merge {
                origin: origin.to_owned(),
                index,
                merge: merge.to_string(),
                problem: "expected two tokens".to_owned(),
            }),
        }
    };
    list.into_iter().enumerate().map(read).collect()
}
