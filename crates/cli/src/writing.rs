//! What the commands that write models have in common: their arguments, the step they run, and what they say of it.
//!
//! Not here: what is written, and the proof of it (`qwenkit-quantize`).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use qwenkit_formats::ModelFiles;
use qwenkit_hub::bytes_in_words;
use qwenkit_kernels::Compute;
use qwenkit_quantize::{Converted, Error, Importance, Kind, Progress, Proof, Prover, Step};
use qwenkit_tensor::DType;
use serde_json::json;

use crate::args::ComputeArgs;
use crate::failure::usage;
use crate::terminal::{Bar, Unit};
use crate::{opening, terminal};

/// How a model is written, and what is said of it.
#[derive(Args)]
pub(crate) struct WritingArgs {
    /// Print a JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    proof: ProofArgs,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// How a written model is proved.
#[derive(Args)]
#[command(next_help_heading = "Proof")]
struct ProofArgs {
    /// Compare answers on the beginning of this text (480 tokens) instead of the built-in ones
    #[arg(long, value_name = "FILE", conflicts_with = "no_proof")]
    proof_text: Option<PathBuf>,
    /// The largest mean divergence (KL, in nats) of the answers [default: what the type may cost; of a blend none]
    #[arg(long, value_name = "X", conflicts_with = "no_proof")]
    max_kl: Option<f64>,
    /// Write the file without comparing anything
    #[arg(long)]
    no_proof: bool,
}

impl ProofArgs {
    /// The user's own text.
    fn text(&self) -> anyhow::Result<Option<String>> {
        let Some(path) = &self.proof_text else { return Ok(None) };
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
        if text.trim().is_empty() {
            anyhow::bail!("`{}` is empty, expected text to compare answers on", path.display());
        }
        Ok(Some(text))
    }
}

impl WritingArgs {
    /// The threads that compute.
    pub(crate) fn compute(&self) -> anyhow::Result<Compute> {
        Ok(Compute::new(self.compute.threads(), opening::isa()?))
    }

    /// Writes a model of this kind to `out` by `work`, and says what was written.
    pub(crate) fn write(
        &self,
        (kind, out): (Kind, &Path),
        importance: &Importance,
        compute: &Compute,
        work: impl FnOnce(&Step<'_>, &mut Progress<'_>) -> Result<Converted, Error>,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        let text = self.proof.text()?;
        let prover = (!self.proof.no_proof).then_some(Prover {
            compute,
            text: text.as_deref(),
            limit: self.proof.max_kl,
            positions: Prover::POSITIONS,
        });
        let step = Step { kind, out, importance, threads: self.compute.threads(), prover: prover.as_ref() };
        let mut bar = Bar::new("writing", Unit::Values, Duration::from_secs(1));
        let written = work(&step, &mut |done, total| bar.update(done, total))?;
        bar.clear();
        self.report(&written, kind, started.elapsed())
    }

    fn report(&self, written: &Converted, kind: Kind, took: Duration) -> anyhow::Result<()> {
        let seconds = took.as_secs_f64();
        if self.json {
            let types: serde_json::Map<_, _> =
                written.types.iter().map(|(dtype, tensors, _)| (dtype.name().to_owned(), json!(tensors))).collect();
            return terminal::print_json(&json!({
                "model": written.model, "tower": written.tower, "type": kind.name(), "read_bytes": written.bytes.0,
                "written_bytes": written.bytes.1, "tensors": types, "seconds": seconds,
                "proof": written.proof.as_ref().map(Proof::to_json), "without_block": written.without_block.is_some(),
            }));
        }
        let types: Vec<String> = written.types.iter().map(|(dtype, tensors, _)| format!("{tensors} {dtype}")).collect();
        terminal::note(&format!(
            "wrote {} ({}, {}; tensors: {}) in {seconds:.1} s",
            written.model.display(),
            kind.name(),
            bytes_in_words(written.bytes.1),
            types.join(", "),
        ));
        if let Some(why) = &written.without_block {
            terminal::note(&format!("note: the model's block that guesses tokens (MTP) is left out: {why}"));
        }
        if let Some(proof) = &written.proof {
            terminal::note(&format!("proof {}", proof.in_words()));
        }
        if let Some(tower) = &written.tower {
            terminal::note(&format!("wrote its vision tower to {}", tower.display()));
        }
        Ok(())
    }
}

/// The kind that is named; of none the model's own plain numbers, of a quantised model F16 in a GGUF file and BF16 in a folder.
pub(crate) fn kind_of(named: Option<&str>, files: &ModelFiles, out: &Path) -> anyhow::Result<Kind> {
    if let Some(named) = named {
        return named.parse::<Kind>().map_err(|error| usage(error.to_string()));
    }
    let to_gguf = out.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
    let largest = files.tensors().iter().max_by_key(|tensor| tensor.len_bytes).map(|tensor| tensor.dtype);
    let name = match largest {
        Some(DType::F32) => "F32",
        Some(DType::F16) => "F16",
        Some(DType::BF16) => "BF16",
        _ if to_gguf => "F16",
        _ => "BF16",
    };
    Ok(name.parse()?)
}
