//! `qwenkit pull`: a model into the store.
//!
//! Not here: the download (`qwenkit-hub`) and how it looks (`download`).

use clap::Args;
use qwenkit_hub::{Store, bytes_in_words, resolve};

use crate::{download, terminal};

/// Arguments of `pull`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit pull qwen3:4b                     a short name; `qwenkit list --all` shows them
  qwenkit pull Qwen/Qwen3-0.6B              a repository of the Hugging Face hub
  qwenkit pull Qwen/Qwen3-4B-GGUF:Q8_0      one file of it
  qwenkit pull modelscope:Qwen/Qwen3-0.6B   from ModelScope

An interrupted pull is continued by the same command. HF_TOKEN, HF_ENDPOINT, HTTPS_PROXY and QWENKIT_HOME are honoured.")]
pub(crate) struct PullArgs {
    /// A short name or a hub id
    model: String,
}

/// Runs the command.
pub(crate) fn run(args: &PullArgs, offline: bool) -> anyhow::Result<()> {
    let model = resolve(&args.model)?;
    let stored = download::pull(&Store::open(None)?, &model, offline)?;
    terminal::note(&format!("{} is here, {}", stored.name, bytes_in_words(stored.size_bytes)));
    terminal::print_line(&stored.path.display().to_string())
}
