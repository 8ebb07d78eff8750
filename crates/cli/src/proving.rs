//! Arguments of the proof with which steps that write models end.
//!
//! Not here: the proof (`qwenkit-quantize`).

use std::path::PathBuf;

use clap::Args;
use qwenkit_kernels::Compute;
use qwenkit_quantize::Prover;

/// How a written model is proved.
#[derive(Args)]
#[command(next_help_heading = "Proof")]
pub(crate) struct ProofArgs {
    /// Compare answers on this text instead of the built-in ones
    #[arg(long, value_name = "FILE", conflicts_with = "no_proof")]
    proof_text: Option<PathBuf>,
    /// The largest mean divergence (KL, in nats) of the answers [default: what the type may cost]
    #[arg(long, value_name = "X", conflicts_with = "no_proof")]
    max_kl: Option<f64>,
    /// Write the file without comparing anything
    #[arg(long)]
    no_proof: bool,
}

impl ProofArgs {
    /// The user's own text.
    pub(crate) fn text(&self) -> anyhow::Result<Option<String>> {
        let Some(path) = &self.proof_text else { return Ok(None) };
        let read = std::fs::read_to_string(path);
        let text = read.map_err(|error| anyhow::anyhow!("cannot read `{}`: {error}", path.display()))?;
        if text.trim().is_empty() {
            anyhow::bail!("`{}` is empty, expected text to compare answers on", path.display());
        }
        Ok(Some(text))
    }

    /// What proves the step, unless the user wants none.
    pub(crate) fn prover<'a>(&self, compute: &'a Compute, text: Option<&'a str>) -> Option<Prover<'a>> {
        (!self.no_proof).then_some(Prover { compute, text, limit: self.max_kl, positions: Prover::POSITIONS })
    }
}
