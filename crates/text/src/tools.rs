//! Tool calls: how requests declare tools, and how calls are found in what a model writes.
//!
//! Contract: both forms that Qwen models write, told apart by what stands in the text; any cut of the text gives the same
//! calls; arguments given out for a call, joined, are one JSON object; nothing a model writes is an error. What is no call
//! after all stays text, with a warning.
//!
//! Not here: thoughts before the calls ([`crate::ReasoningSplitter`]), ids of calls, which servers make up.

pub(crate) mod declared;
mod hermes;
mod reader;
mod repair;
mod syntax;
mod xml;

pub use declared::{Tool, ToolSet};
pub use reader::{AnswerEvent, ToolReader, ToolWarning};
pub use syntax::{CallForm, CallSyntax};
