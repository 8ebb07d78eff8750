//! A tokenizer taken apart: what both file formats say, checked once, in the same words.
//!
//! `tokenizer.json` and GGUF metadata become [`Parts`]; [`Parts::build_model`] keeps every promise that the tokenizer
//! library takes for granted (it would panic on some broken vocabularies). Encoding is not here.

use std::collections::HashSet;

use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Vocab};

use crate::Error;

/// The pattern that splits text into pieces before merging: Qwen 1 to 3, VL, Next, Omni.
pub const SPLIT_QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same from Qwen 3.5 on: combining marks belong to the letters they sit on.
pub const SPLIT_QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A token that is matched as a whole before anything else happens to the text.
pub(crate) struct Added {
    pub(crate) id: u32,
    pub(crate) token: AddedToken,
}

/// What becomes of a merge that makes a token the vocabulary does not have.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum UnmadeMerge {
    /// An error, as in Hugging Face's library.
    Refuse,
    /// It is never applied. GGUF files lose a token where two had one id, and llama.cpp spells such tokens out.
    Drop,
}

/// What a tokenizer consists of.
pub(crate) struct Parts {
    /// The file, for messages.
    pub(crate) origin: String,
    /// Ordinary tokens, in the byte alphabet.
    pub(crate) tokens: Vec<(String, u32)>,
    /// Merges by rank: the two tokens that join.
    pub(crate) merges: Vec<(String, String)>,
    /// What to do about merges without a result.
    pub(crate) unmade: UnmadeMerge,
    /// Control tokens and other tokens matched as a whole.
    pub(crate) added: Vec<Added>,
    /// Whether text is brought into NFC first.
    pub(crate) nfc: bool,
    /// The splitting pattern.
    pub(crate) split: String,
}

impl Parts {
    /// Checks the vocabulary and builds the merging model from it; takes tokens and merges out of `self`.
    ///
    /// Added tokens get their ids from the model as well, so they stand in its vocabulary; no merge may make one.
    pub(crate) fn build_model(&mut self) -> Result<BPE, Error> {
        let vocab = self.take_vocab()?;
        let added: HashSet<&str> = self.added.iter().map(|added| added.token.content.as_str()).collect();
        let mut merges = std::mem::take(&mut self.merges);
        let mut joined = String::new();
        let mut made = |left: &str, right: &str| {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            vocab.contains_key(joined.as_str()) && !added.contains(joined.as_str())
        };
        match self.unmade {
            UnmadeMerge::Drop => merges.retain(|(left, right)| made(left, right)),
            UnmadeMerge::Refuse => {
                if let Some(index) = merges.iter().position(|(left, right)| !made(left, right)) {
                    return Err(self.merge_error(&merges, index, None));
                }
            }
        }
        let unknown = |token: &String| !vocab.contains_key(token.as_str());
        if let Some(index) = merges.iter().position(|(left, right)| unknown(left) || unknown(right)) {
            let missing = merges.get(index).map(|(left, right)| if unknown(left) { left } else { right });
            return Err(self.merge_error(&merges, index, missing));
        }
        BPE::builder()
            .vocab_and_merges(vocab, merges)
            .build()
            .map_err(|problem| Error::TokenizerJson { origin: self.origin.clone(), problem: problem.to_string() })
    }

    fn merge_error(&self, merges: &[(String, String)], index: usize, missing: Option<&String>) -> Error {
        let (left, right) = merges.get(index).cloned().unwrap_or_default();
        let missing = missing.cloned().unwrap_or_else(|| format!("{left}{right}"));
        Error::Merge {
            origin: self.origin.clone(),
            index,
            merge: format!("{left} {right}"),
            problem: format!("but the vocabulary has no ordinary token `{missing}`"),
        }
    }

    /// Most ids that this many tokens may spread over; tables are sized by the highest id.
    fn id_limit(&self) -> usize {
        (self.tokens.len() + self.added.len()).saturating_mul(2).saturating_add(4096)
    }

    /// Refuses ids far beyond the number of tokens; to be called before any table is made.
    pub(crate) fn check_id_range(&self) -> Result<(), Error> {
        let added = self.added.iter().map(|added| (&added.token.content, added.id));
        let mut entries = self.tokens.iter().map(|(token, id)| (token, *id)).chain(added);
        match entries.find(|&(_, id)| id as usize >= self.id_limit()) {
            None => Ok(()),
            Some((token, id)) => Err(Error::IdOutOfRange {
                origin: self.origin.clone(),
                token: token.clone(),
                id,
                tokens: self.tokens.len() + self.added.len(),
            }),
        }
    }

    /// The ids by token. One id per token, one token per id.
    fn take_vocab(&mut self) -> Result<Vocab, Error> {
        if self.tokens.is_empty() {
            return Err(Error::EmptyVocabulary { origin: self.origin.clone() });
        }
        let count = self.tokens.len() + self.added.len();
        let mut is_taken = vec![false; self.id_limit()];
        let mut vocab = Vocab::with_capacity(count);
        let added = self.added.iter().map(|added| (added.token.content.clone(), added.id));
        for (token, id) in std::mem::take(&mut self.tokens).into_iter().chain(added) {
            let origin = || self.origin.clone();
            match is_taken.get_mut(id as usize) {
                None => return Err(Error::IdOutOfRange { origin: origin(), token, id, tokens: count }),
                Some(true) => {
                    let first = vocab.iter().find(|&(_, &other)| other == id).map(|(token, _)| token.clone());
                    let first = first.unwrap_or_default();
                    return Err(Error::DuplicateId { origin: origin(), id, first, second: token });
                }
                Some(slot) => *slot = true,
            }
            if let Some(&first) = vocab.get(token.as_str()) {
                return Err(Error::DuplicateToken { origin: origin(), token, first, second: id });
            }
            vocab.insert(token, id);
        }
        Ok(vocab)
    }
}
