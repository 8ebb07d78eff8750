//! `qwenkit rm`: a model out of the store. Files of the user's own are never touched.

use clap::Args;
use qwenkit_hub::{Store, bytes_in_words, resolve};

use crate::terminal;

/// Arguments of `rm`.
#[derive(Args)]
#[command(after_help = "\
Example:
  qwenkit rm qwen3:4b                       also removes what an interrupted pull left")]
pub(crate) struct RmArgs {
    /// The name it was pulled by
    model: String,
}

/// Runs the command.
pub(crate) fn run(args: &RmArgs) -> anyhow::Result<()> {
    let removed = Store::open(None)?.remove(&resolve(&args.model)?)?;
    terminal::note(&format!("removed {}, {} are free again", removed.name, bytes_in_words(removed.size_bytes)));
    Ok(())
}
