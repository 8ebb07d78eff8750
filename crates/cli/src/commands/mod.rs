//! The subcommands, a file each: its arguments and what it does.

pub(crate) mod bench;
pub(crate) mod classify;
pub(crate) mod conformance;
pub(crate) mod doctor;
pub(crate) mod embed;
pub(crate) mod export;
pub(crate) mod list;
pub(crate) mod logits;
pub(crate) mod merge;
pub(crate) mod preprocess;
pub(crate) mod pull;
pub(crate) mod quantize;
pub(crate) mod reference;
pub(crate) mod rerank;
pub(crate) mod rm;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod show;
pub(crate) mod template;
pub(crate) mod tokenize;
pub(crate) mod tune;
