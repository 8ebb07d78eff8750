//! Detokenising while tokens arrive, one by one.
//!
//! Contract: everything pushed plus the finish is the same string as [`Tokenizer::decode`] over all ids, and no piece
//! ever ends inside a character. Bytes that may still become a character wait.

use qwenkit_tensor::TokenId;

use crate::Tokenizer;

/// A decoder for one growing answer. It owns what it needs and may outlive the borrow it was made from.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    keep_special: bool,
    /// The start of a character whose end has not come yet: at most three bytes.
    waiting: Vec<u8>,
}

impl StreamDecoder {
    /// A decoder at the start of an answer. Control tokens are left out unless `keep_special`.
    pub fn new(tokenizer: &Tokenizer, keep_special: bool) -> StreamDecoder {
        StreamDecoder { tokenizer: tokenizer.clone(), keep_special, waiting: Vec::new() }
    }

    /// The text that this token completes; often empty in the middle of a character.
    pub fn push(&mut self, id: TokenId) -> String {
        self.waiting.extend_from_slice(self.tokenizer.visible_bytes(id, self.keep_special));
        let mut text = String::new();
        let mut whole = 0;
        for chunk in self.waiting.utf8_chunks() {
            text.push_str(chunk.valid());
            whole += chunk.valid().len();
            let invalid = chunk.invalid();
            // A character cut off by the end may still be completed by the next token.
            if whole + invalid.len() == self.waiting.len() && is_unfinished(invalid) {
                break;
            }
            if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                whole += invalid.len();
            }
        }
        self.waiting.drain(..whole);
        text
    }

    /// What is left at the end of the answer: U+FFFD for a character that never got its end.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.waiting).into_owned()
    }
}

/// Whether these bytes are the start of a character, with bytes missing at the end only.
fn is_unfinished(bytes: &[u8]) -> bool {
    !bytes.is_empty() && std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
