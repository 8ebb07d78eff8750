//! The tokenizer: text to ids and back.
//!
//! Byte-level BPE as Hugging Face's `tokenizers` computes it, over a vocabulary that was checked by [`Parts`]. Encoding
//! never adds tokens of its own (no beginning or end of sequence), as `add_special_tokens=False` there. A `Tokenizer` is
//! cheap to clone and safe to share between threads.

use std::sync::Arc;

use qwenkit_tensor::TokenId;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedVocabulary, Model, OffsetType, PreTokenizer, SplitDelimiterBehavior};

use crate::parts::Parts;
use crate::{Error, Vocab, bytes, tokenizer_json};

/// What becomes of text that spells a control token such as `<|im_end|>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// It becomes the control token.
    Parse,
    /// It stays ordinary text. Added tokens that are not special (`<think>`, `<tool_call>`) are still matched.
    AsText,
}

/// Text to token ids and back.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    origin: String,
    model: BPE,
    nfc: Option<NFC>,
    split: Split,
    byte_level: ByteLevel,
    /// Matches every added token.
    added_parse: AddedVocabulary,
    /// Matches the added tokens that are not special.
    added_as_text: AddedVocabulary,
    /// Bytes without a token of their own; empty in every real vocabulary.
    missing_bytes: Vec<u8>,
    table: Table,
    /// Control tokens by id.
    special: Vec<(String, TokenId)>,
}

/// The bytes of every token, one after the other, with the kind of each.
struct Table {
    ends: Vec<u32>,
    bytes: Vec<u8>,
    kinds: Vec<Kind>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// No token has this id.
    Absent,
    Ordinary,
    Special,
}

impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json`. `origin` is the file's name, for messages.
    ///
    /// # Errors
    /// When the file is not JSON, asks for something no Qwen tokenizer uses, or contradicts itself.
    pub fn from_json(bytes: &[u8], origin: &str) -> Result<Tokenizer, Error> {
        Self::from_parts(tokenizer_json::read(bytes, origin)?)
    }

    /// Builds the tokenizer of a GGUF file.
    ///
    /// # Errors
    /// When the vocabulary is of another family or contradicts itself.
    pub fn from_vocab(vocab: Vocab) -> Result<Tokenizer, Error> {
        Self::from_parts(vocab.into_parts()?)
    }

    fn from_parts(mut parts: Parts) -> Result<Tokenizer, Error> {
        let origin = parts.origin.clone();
        let problem = |problem: Box<dyn std::error::Error + Send + Sync>| Error::TokenizerJson {
            origin: origin.clone(),
            problem: problem.to_string(),
        };
        parts.check_id_range()?;
        let table = Table::new(&parts);
        let mut special: Vec<_> = (parts.added.iter().filter(|added| added.token.special))
            .map(|added| (added.token.content.clone(), TokenId(added.id)))
            .collect();
        special.sort_by_key(|&(_, id)| id);
        let model = parts.build_model()?;
        let lacks = |&byte: &u8| model.token_to_id(bytes::char_of(byte).encode_utf8(&mut [0; 4])).is_none();
        let missing_bytes = (0..=255).filter(lacks).collect();
        let nfc = parts.nfc.then_some(NFC);
        let split = Split::new(SplitPattern::Regex(parts.split), SplitDelimiterBehavior::Isolated, false);
        let mut added_parse = AddedVocabulary::new();
        let tokens: Vec<_> = parts.added.into_iter().map(|added| added.token).collect();
        added_parse.add_tokens(tokens.iter().cloned(), &model, nfc.as_ref()).map_err(&problem)?;
        let mut added_as_text = AddedVocabulary::new();
        let ordinary = tokens.into_iter().filter(|token| !token.special);
        added_as_text.add_tokens(ordinary, &model, nfc.as_ref()).map_err(&problem)?;
        let inner = Inner {
            split: split.map_err(&problem)?,
            byte_level: ByteLevel::new(false, false, false),
            origin: parts.origin,
            model,
            nfc,
            added_parse,
            added_as_text,
            missing_bytes,
            table,
            special,
        };
        Ok(Tokenizer { inner: Arc::new(inner) })
    }

    /// The ids of a text. Nothing is added at its start or end.
    ///
    /// # Errors
    /// When the splitting pattern gives up on the text, or a broken vocabulary lacks one of its bytes.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<TokenId>, Error> {
        let inner = &*self.inner;
        let problem =
            |problem: Box<dyn std::error::Error + Send + Sync>| Error::Encode { problem: problem.to_string() };
        let added = match special {
            SpecialTokens::Parse => &inner.added_parse,
            SpecialTokens::AsText => &inner.added_as_text,
        };
        let mut pieces = added.extract_and_normalize(inner.nfc.as_ref(), text);
        inner.split.pre_tokenize(&mut pieces).map_err(problem)?;
        inner.byte_level.pre_tokenize(&mut pieces).map_err(problem)?;
        pieces
            .tokenize(|piece| {
                inner.check_bytes(piece.get())?;
                inner.model.tokenize(piece.get())
            })
            .map_err(problem)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(problem)?;
        Ok(encoding.get_ids().iter().map(|&id| TokenId(id)).collect())
    }

    /// The text of some ids. Bytes that are not UTF-8 become U+FFFD; ids without a token give nothing; control tokens
    /// are left out unless `keep_special`.
    pub fn decode(&self, ids: &[TokenId], keep_special: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.visible_bytes(id, keep_special));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes a token adds to a decoded text.
    pub(crate) fn visible_bytes(&self, id: TokenId, keep_special: bool) -> &[u8] {
        match self.is_special(id) && !keep_special {
            true => &[],
            false => self.token_bytes(id).unwrap_or_default(),
        }
    }

    /// The raw bytes of one token; they need not be whole UTF-8 characters. `None` where no token has this id.
    pub fn token_bytes(&self, id: TokenId) -> Option<&[u8]> {
        self.inner.table.bytes_of(id)
    }

    /// One more than the highest id that a token has. A model's output is often wider; those rows mean nothing.
    pub fn vocab_size(&self) -> usize {
        self.inner.table.kinds.len()
    }

    /// The id of a token: control tokens as they are spelt, ordinary tokens in the byte alphabet (`Ġthe` for ` the`).
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.inner.model.token_to_id(token).map(TokenId)
    }

    /// Whether the id is a control token, such as `<|im_end|>`.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.inner.table.kinds.get(id.index()) == Some(&Kind::Special)
    }

    /// The control tokens, by id.
    pub fn special_tokens(&self) -> impl Iterator<Item = (&str, TokenId)> {
        self.inner.special.iter().map(|(token, id)| (token.as_str(), *id))
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("origin", &self.inner.origin)
            .field("vocab_size", &self.vocab_size())
            .field("special", &self.inner.special.len())
            .finish_non_exhaustive()
    }
}

impl Inner {
    /// The library drops what it has no token for; losing text silently is not acceptable.
    fn check_bytes(&self, piece: &str) -> Result<(), Box<Error>> {
        if self.missing_bytes.is_empty() {
            return Ok(());
        }
        let missing = piece.chars().filter_map(bytes::byte_of).find(|byte| self.missing_bytes.contains(byte));
        match missing {
            Some(byte) => Err(Box::new(Error::MissingByte { origin: self.origin.clone(), byte })),
            None => Ok(()),
        }
    }
}

impl Table {
    fn new(parts: &Parts) -> Table {
        let ordinary = parts.tokens.iter().map(|(token, id)| (*id, token.as_str(), Kind::Ordinary, true));
        let added = parts.added.iter().map(|added| {
            let kind = if added.token.special { Kind::Special } else { Kind::Ordinary };
            (added.id, added.token.content.as_str(), kind, false)
        });
        let mut entries: Vec<_> = ordinary.chain(added).collect();
        entries.sort_by_key(|&(id, ..)| id);
        entries.dedup_by_key(|&mut (id, ..)| id);
        let mut table = Table { ends: Vec::new(), bytes: Vec::new(), kinds: Vec::new() };
        for (id, token, kind, in_byte_alphabet) in entries {
            table.kinds.resize(id as usize, Kind::Absent);
            table.ends.resize(id as usize, table.bytes.len() as u32);
            match in_byte_alphabet {
                true => bytes::push_bytes(token, &mut table.bytes),
                false => table.bytes.extend_from_slice(token.as_bytes()),
            }
            table.kinds.push(kind);
            table.ends.push(table.bytes.len() as u32);
        }
        table
    }

    fn bytes_of(&self, id: TokenId) -> Option<&[u8]> {
        let index = id.index();
        if *self.kinds.get(index)? == Kind::Absent {
            return None;
        }
        let start = if index == 0 { 0 } else { *self.ends.get(index - 1)? };
        self.bytes.get(start as usize..*self.ends.get(index)? as usize)
    }
}
