//! A tokenizer taken apart: what both file formats say, checked once, in the same words.
//!
//! `tokenizer.json` and GGUF metadata become [`Parts`]; [`Parts::checked`] holds every promise that the tokenizer library
//! takes for granted (it would panic on some broken vocabularies). Encoding is not here.

use std::collections::HashMap;

use tokenizers::AddedToken;

use crate::Error;

/// The pattern that splits text into pieces before merging: Qwen 1 to 3, VL, Next, Omni.
pub(crate) const SPLIT_QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same from Qwen 3.5 on: combining marks belong to the letters they sit on.
pub(crate) const SPLIT_QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A token that is matched as a whole before anything else happens to the text.
pub(crate) struct Added {
    pub(crate) id: u32,
    pub(crate) token: AddedToken,
}

/// What a tokenizer consists of.
pub(crate) struct Parts {
    /// The file, for messages.
    pub(crate) origin: String,
    /// Ordinary tokens, in the byte alphabet.
    pub(crate) tokens: Vec<(String, u32)>,
    /// Merges by rank: the two tokens that join.
    pub(crate) merges: Vec<(String, String)>,
    /// Control tokens and other tokens matched as a whole.
    pub(crate) added: Vec<Added>,
    /// Whether text is brought into NFC first.
    pub(crate) nfc: bool,
    /// The splitting pattern.
    pub(crate) split: String,
}

impl Parts {
    /// Refuses vocabularies that contradict themselves.
    pub(crate) fn checked(self) -> Result<Self, Error> {
        if self.tokens.is_empty() {
            return Err(Error::EmptyVocabulary { origin: self.origin });
        }
        self.check_ids()?;
        self.check_merges()?;
        Ok(self)
    }

    /// Every entry, ordinary and added.
    fn entries(&self) -> impl Iterator<Item = (&str, u32)> {
        let added = self.added.iter().map(|added| (added.token.content.as_str(), added.id));
        self.tokens.iter().map(|(token, id)| (token.as_str(), *id)).chain(added)
    }

    /// One id per token, one token per id, no id far beyond the number of tokens (tables are sized by the highest).
    fn check_ids(&self) -> Result<(), Error> {
        let count = self.tokens.len() + self.added.len();
        let limit = count.saturating_mul(2).saturating_add(4096);
        let mut id_of: HashMap<&str, u32> = HashMap::with_capacity(count);
        let mut token_of: Vec<Option<&str>> = vec![None; limit];
        for (token, id) in self.entries() {
            let slot = token_of.get_mut(id as usize).ok_or_else(|| Error::IdOutOfRange {
                origin: self.origin.clone(),
                token: token.to_owned(),
                id,
                tokens: count,
            })?;
            if let Some(first) = id_of.insert(token, id).filter(|&first| first != id) {
                return Err(Error::DuplicateToken {
                    origin: self.origin.clone(),
                    token: token.to_owned(),
                    first,
                    second: id,
                });
            }
            if let Some(first) = slot.replace(token).filter(|&first| first != token) {
                return Err(Error::DuplicateId {
                    origin: self.origin.clone(),
                    id,
                    first: first.to_owned(),
                    second: token.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Both halves of a merge and what they join to are ordinary tokens.
    fn check_merges(&self) -> Result<(), Error> {
        let known: std::collections::HashSet<&str> = self.tokens.iter().map(|(token, _)| token.as_str()).collect();
        let mut joined = String::new();
        for (index, (left, right)) in self.merges.iter().enumerate() {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            let missing = [left.as_str(), right.as_str(), joined.as_str()].into_iter().find(|t| !known.contains(t));
            if let Some(missing) = missing {
                return Err(Error::Merge {
                    origin: self.origin.clone(),
                    index,
                    merge: format!("{left} {right}"),
                    problem: format!("but the vocabulary has no token `{missing}`"),
                });
            }
        }
        Ok(())
    }
}
