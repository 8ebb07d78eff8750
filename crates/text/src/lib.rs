//! Text on its way into and out of a model: tokenizer, streaming detokeniser, chat template, thoughts and tool calls.
//!
//! Contract: the ids equal Hugging Face's `tokenizers`, the prompts equal transformers' `apply_chat_template`, and text
//! that a user typed never turns into a control token ([`encode_chat`]). Vocabularies and templates come from downloaded
//! files, so a broken or hostile one ends in an [`Error`], never in a panic or in unbounded work.
//!
//! Not here: reading GGUF (the caller hands over a [`Vocab`]), choosing stop tokens, running a model.
#![forbid(unsafe_code)]

mod answer;
mod bytes;
mod chat;
mod clock;
mod error;
mod grammar;
mod guard;
mod jinja;
mod parts;
mod python;
mod reasoning;
mod stream;
mod template;
mod thinking;
mod tokenizer;
mod tokenizer_json;
mod tools;
mod turns;
mod vetting;
mod visuals;
mod vocab;

pub use answer::AnswerReader;
pub use chat::{ChatInput, ChatPrompt, chat_text, encode_chat};
pub use error::Error;
pub use grammar::{Form, Grammar, GrammarFactory};
pub use parts::{SPLIT_QWEN2, SPLIT_QWEN35};
pub use reasoning::{Opening, Part, ReasoningSplitter};
pub use stream::StreamDecoder;
pub use template::ChatTemplate;
pub use thinking::{ThinkingPlan, ThinkingSupport, ThinkingWish};
pub use tokenizer::{SpecialTokens, Tokenizer};
pub use tools::{AnswerEvent, CallForm, CallSyntax, Tool, ToolReader, ToolSet, ToolWarning};
pub use turns::{Turn, TurnEncoder};
pub use vocab::Vocab;
