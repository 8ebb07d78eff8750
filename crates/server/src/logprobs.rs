//! Log-probabilities as OpenAI's two interfaces show them.

use qwenkit_engine::TokenLogprobs;
use qwenkit_tensor::TokenId;
use qwenkit_text::Tokenizer;
use serde_json::{Map, Value, json};

/// A token as text; what is no whole character shows as U+FFFD, and its bytes stand beside it.
pub(crate) fn token_text(tokenizer: &Tokenizer, id: TokenId) -> String {
    tokenizer.token_bytes(id).map_or_else(String::new, |bytes| String::from_utf8_lossy(bytes).into_owned())
}

/// What probability 0 is in JSON, which has no infinity.
const LEAST: f32 = -9999.0;

fn number(logprob: f32) -> f64 {
    // Through text, so that the shortest decimal of the f32 comes out.
    let logprob = logprob.max(LEAST);
    logprob.to_string().parse().unwrap_or(f64::from(logprob))
}

/// One token of a chat's `logprobs.content`.
pub(crate) fn chat(tokenizer: &Tokenizer, found: &TokenLogprobs) -> Value {
    let token = |id: TokenId, logprob: f32| {
        json!({
            "token": token_text(tokenizer, id),
            "logprob": number(logprob),
            "bytes": tokenizer.token_bytes(id).unwrap_or_default(),
        })
    };
    let mut value = token(found.id, found.logprob);
    value["top_logprobs"] = found.top.iter().map(|&(id, logprob)| token(id, logprob)).collect();
    value
}

/// The `logprobs` of a text completion: parallel lists, with the place of each token in the text.
#[derive(Default)]
pub(crate) struct TextLogprobs {
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<usize>,
    /// Characters so far.
    length: usize,
}

impl TextLogprobs {
    /// Whether there are tokens.
    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The first token of a prompt, before which there is nothing to predict it from.
    pub(crate) fn push_first(&mut self, tokenizer: &Tokenizer, id: TokenId) {
        self.push_token(tokenizer, id);
        self.logprobs.push(Value::Null);
        self.top.push(Value::Null);
    }

    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, found: &TokenLogprobs, count: usize) {
        self.push_token(tokenizer, found.id);
        self.logprobs.push(json!(number(found.logprob)));
        let mut top = Map::new();
        for &(id, logprob) in found.top.iter().take(count) {
            // Different tokens may have the same text, as parts of characters do; the likeliest stands.
            top.entry(token_text(tokenizer, id)).or_insert(json!(number(logprob)));
        }
        // The token itself belongs to it, though it may not be among the best.
        if count > 0 {
            top.entry(token_text(tokenizer, found.id)).or_insert(json!(number(found.logprob)));
        }
        self.top.push(Value::Object(top));
    }

    fn push_token(&mut self, tokenizer: &Tokenizer, id: TokenId) {
        let text = token_text(tokenizer, id);
        self.offsets.push(self.length);
        self.length += text.chars().count();
        self.tokens.push(Value::String(text));
    }

    /// The object, and what was in it is gone; offsets go on.
    pub(crate) fn take(&mut self) -> Value {
        let rest = TextLogprobs { length: self.length, ..TextLogprobs::default() };
        let TextLogprobs { tokens, logprobs, top, offsets, .. } = std::mem::replace(self, rest);
        json!({ "tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets })
    }
}
