//! Text on its way into and out of a model: tokenizer, streaming detokeniser, chat template, thoughts and tool calls.
//!
//! Contract: the ids equal Hugging Face's `tokenizers`, the prompts equal transformers' `apply_chat_template`, and text
//! that a user typed never turns into a control token ([`encode_chat`]). Vocabularies and templates come from downloaded
//! files, so a broken or hostile one ends in an [`Error`], never in a panic or in unbounded work.
//!
//! Not here: reading GGUF (the caller hands over a [`Vocab`]), choosing stop tokens, running a model.
#![forbid(unsafe_code)]

mod bytes;
mod chat;
mod clock;
mod error;
mod guard;
mod jinja;
mod parts;
mod python;
mod reasoning;
mod reply;
mod stream;
mod template;
mod tokenizer;
mod tokenizer_json;
mod tool_json;
mod tools;
mod vetting;
mod vocab;

pub use chat::{ChatInput, encode_chat};
pub use error::Error;
pub use reasoning::{ReasoningParser, ReplyText};
pub use reply::{ReplyParser, ReplyPart};
pub use stream::StreamDecoder;
pub use template::ChatTemplate;
pub use tokenizer::{SpecialTokens, Tokenizer};
pub use tools::{ToolParser, ToolText};
pub use vocab::Vocab;
