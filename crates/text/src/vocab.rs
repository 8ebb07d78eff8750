//! The vocabulary as GGUF metadata holds it (`tokenizer.ggml.*`), turned into [`Parts`].
//!
//! Reading the GGUF file itself is the business of the formats crate.

use tokenizers::AddedToken;

use crate::Error;
use crate::parts::{Added, Parts, SPLIT_QWEN2, SPLIT_QWEN35, UnmadeMerge};

/// The tokenizer of a GGUF file, field by field.
#[derive(Clone, Debug, Default)]
pub struct Vocab {
    /// The file, for messages.
    pub origin: String,
    /// `tokenizer.ggml.model`; Qwen's is `gpt2`, byte-level BPE.
    pub model: String,
    /// `tokenizer.ggml.pre`: `qwen2`, or `qwen35` from Qwen 3.5 on.
    pub pre: String,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`, by rank: two tokens with a space between.
    pub merges: Vec<String>,
}

impl Vocab {
    /// The same tokenizer in the words both formats share.
    pub(crate) fn into_parts(self) -> Result<Parts, Error> {
        let split = self.split_pattern()?.to_owned();
        if self.tokens.len() != self.token_types.len() {
            return Err(Error::TokenTypes {
                origin: self.origin,
                tokens: self.tokens.len(),
                types: self.token_types.len(),
            });
        }
        let merges = self.split_merges()?;
        let (mut tokens, mut added) = (Vec::with_capacity(self.tokens.len()), Vec::new());
        for (id, (token, found)) in self.tokens.into_iter().zip(self.token_types).enumerate() {
            let id32 = u32::try_from(id).map_err(|_| Error::IdOutOfRange {
                origin: self.origin.clone(),
                token: token.clone(),
                id: u32::MAX,
                tokens: id,
            })?;
            match found {
                1 | 2 | 6 => tokens.push((token, id32)),
                3 | 4 => {
                    let token = AddedToken::from(token, found == 3).normalized(false);
                    added.push(Added { id: id32, token });
                }
                5 => {}
                _ => return Err(Error::TokenType { origin: self.origin, id, token, found }),
            }
        }
        Ok(Parts { origin: self.origin, tokens, merges, unmade: UnmadeMerge::Drop, added, nfc: true, split })
    }

    fn split_pattern(&self) -> Result<&'static str, Error> {
        let unsupported = |setting, found: &str, supported| Error::Unsupported {
            origin: self.origin.clone(),
            setting,
            found: found.to_owned(),
            supported,
        };
        if self.model != "gpt2" {
            return Err(unsupported("tokenizer.ggml.model", &self.model, "gpt2 (byte-level BPE, as all Qwen models)"));
        }
        match self.pre.as_str() {
            "qwen2" => Ok(SPLIT_QWEN2),
            "qwen35" => Ok(SPLIT_QWEN35),
            other => Err(unsupported("tokenizer.ggml.pre", other, "qwen2, qwen35")),
        }
    }

    fn split_merges(&self) -> Result<Vec<(String, String)>, Error> {
        let split = |(index, merge): (usize, &String)| match merge.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
                Ok((left.to_owned(), right.to_owned()))
            }
            _ => Err(Error::Merge {
                origin: self.origin.clone(),
                index,
                merge: merge.clone(),
                problem: "expected two tokens with one space between".to_owned(),
            }),
        };
        self.merges.iter().enumerate().map(split).collect()
    }
}
