//! `qwenkit quantize`: a model as a GGUF file of another kind.
//!
//! Contract: the file is there whole or not at all. Not here: what is written (`qwenkit-quantize`).

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use qwenkit_formats::ModelFiles;
use qwenkit_kernels::Compute;
use qwenkit_quantize::{Importance, Kind, calibrate, read_importance};

use crate::args::ModelArgs;
use crate::failure::usage;
use crate::terminal::{Bar, Unit};
use crate::writing::WritingArgs;
use crate::{locate, terminal};

/// Arguments of `quantize`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit quantize ./checkpoint --type Q4_K_M --out model-q4_k_m.gguf
  qwenkit quantize ./model-bf16.gguf --type Q8_0 --out model-q8_0.gguf

Types, the nearest to the original first: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1, Q5_0, Q4_K_M, Q4_K_S, IQ4_NL, IQ4_XS,
Q4_1, Q4_0, Q3_K_L, Q3_K_M, Q3_K_S, Q2_K, Q2_K_S. A name stands for the same choice tensor by tensor as in llama.cpp.
At the end the model and the file read the same held-out texts. How far the file's answers have moved is printed, kept in the file's
metadata (qwenkit.proof.*) and beside it in FILE.proof.json; past a limit, each type's own unless --max-kl says another, the
file is refused, and the tensors that moved most are named.

The vision tower of a checkpoint is written beside the model, as mmproj-NAME.gguf.")]
pub(crate) struct QuantizeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The kind of file
    #[arg(long = "type", value_name = "TYPE")]
    kind: String,
    /// The GGUF file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Learn from this text which columns matter, and keep these nearer to the original
    #[arg(long, value_name = "FILE", conflicts_with = "imatrix")]
    imatrix_text: Option<PathBuf>,
    /// The same from an importance matrix that llama-imatrix has written as GGUF
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    #[command(flatten)]
    writing: WritingArgs,
}

/// Runs the command.
pub(crate) fn run(args: &QuantizeArgs, offline: bool) -> anyhow::Result<()> {
    let name = args.model.name().ok_or_else(|| usage("no model is named\nhint: qwenkit quantize MODEL --type ..."))?;
    let kind = args.kind.parse::<Kind>().map_err(|error| usage(error.to_string()))?;
    if (args.imatrix.is_some() || args.imatrix_text.is_some()) && !kind.base().is_quantized() {
        return Err(usage(format!("{} keeps every column alike; importance is for quantised types", kind.name())));
    }
    let files = locate::locate(Some(name), offline)?.files;
    if is_quantized(&files) && kind.base().is_quantized() {
        terminal::note("note: the model is quantised already; errors add up, so start from its original where you can");
    }
    let compute = args.writing.compute()?;
    let importance = importance(args, &files, &compute)?;
    args.writing.write((kind, &args.out), &importance, &compute, |step, progress| step.quantize(&files, progress))
}

/// What the importance is learnt from, if anything.
fn importance(args: &QuantizeArgs, files: &ModelFiles, compute: &Compute) -> anyhow::Result<Importance> {
    if let Some(path) = &args.imatrix {
        return Ok(read_importance(path)?);
    }
    let Some(path) = &args.imatrix_text else { return Ok(Importance::new()) };
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let mut bar = Bar::new("reading the text", Unit::Tokens, Duration::from_secs(1));
    let importance = calibrate(files, compute, &text, &mut |done, total| bar.update(done, total))?;
    bar.clear();
    Ok(importance)
}

fn is_quantized(files: &ModelFiles) -> bool {
    files.tensors().iter().any(|tensor| tensor.dtype.is_quantized())
}
