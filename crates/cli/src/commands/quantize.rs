//! `qwenkit quantize`: a model as a GGUF file of another kind.
//!
//! Contract: the file is there whole or not at all. Not here: what is written (`qwenkit-quantize`).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use qwenkit_formats::ModelFiles;
use qwenkit_hub::bytes_in_words;
use qwenkit_kernels::Compute;
use qwenkit_quantize::{Converted, Importance, Kind, Proof, Step, calibrate, read_importance};
use qwenkit_tensor::DType;
use serde_json::json;

use crate::args::{ComputeArgs, ModelArgs};
use crate::failure::usage;
use crate::proving::ProofArgs;
use crate::terminal::{Bar, Unit};
use crate::{locate, opening, terminal};

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
    /// Print a JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    proof: ProofArgs,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Runs the command.
pub(crate) fn run(args: &QuantizeArgs, offline: bool) -> anyhow::Result<()> {
    let kind: Kind = args.kind.parse::<Kind>().map_err(|error| usage(error.to_string()))?;
    let name = args.model.name().ok_or_else(|| usage("no model is named\nhint: qwenkit quantize MODEL --type ..."))?;
    let files = locate::locate(Some(name), offline)?.files;
    if is_quantized(&files) && kind.base().is_quantized() {
        terminal::note("note: the model is quantised already; errors add up, so start from its original where you can");
    }
    let started = Instant::now();
    let threads = args.compute.threads();
    let compute = Compute::new(threads, opening::isa()?);
    let importance = importance(args, &files, &compute)?;
    let text = args.proof.text()?;
    let prover = args.proof.prover(&compute, text.as_deref());
    let mut bar = Bar::new("writing", Unit::Values, Duration::from_secs(1));
    let step = Step { kind, out: &args.out, importance: &importance, threads, prover: prover.as_ref() };
    let written = step.quantize(&files, &mut |done, total| bar.update(done, total))?;
    bar.clear();
    report(&written, kind, args.json, started.elapsed())
}

/// What the importance is learnt from, if anything.
fn importance(args: &QuantizeArgs, files: &ModelFiles, compute: &Compute) -> anyhow::Result<Importance> {
    if let Some(path) = &args.imatrix {
        return Ok(read_importance(path)?);
    }
    let Some(path) = &args.imatrix_text else { return Ok(Importance::new()) };
    let read = std::fs::read_to_string(path);
    let text = read.map_err(|error| anyhow::anyhow!("cannot read `{}`: {error}", path.display()))?;
    let mut bar = Bar::new("reading the text", Unit::Tokens, Duration::from_secs(1));
    let importance = calibrate(files, compute, &text, &mut |done, total| bar.update(done, total))?;
    bar.clear();
    Ok(importance)
}

/// Says what was written.
pub(crate) fn report(written: &Converted, kind: Kind, as_json: bool, took: Duration) -> anyhow::Result<()> {
    let seconds = took.as_secs_f64();
    if as_json {
        let types: serde_json::Map<_, _> =
            written.types.iter().map(|(dtype, tensors, _)| (dtype.name().to_owned(), json!(tensors))).collect();
        return terminal::print_json(&json!({
            "model": written.model, "tower": written.tower, "type": kind.name(), "read_bytes": written.bytes.0,
            "written_bytes": written.bytes.1, "tensors": types, "seconds": seconds,
            "proof": written.proof.as_ref().map(Proof::to_json),
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
    if let Some(proof) = &written.proof {
        terminal::note(&format!("proof {}", proof.in_words()));
    }
    if let Some(tower) = &written.tower {
        terminal::note(&format!("wrote its vision tower to {}", tower.display()));
    }
    Ok(())
}

/// The kind of a file in plain numbers: that of the model, of a quantised one F16 in a GGUF file and BF16 in a folder.
pub(crate) fn plain_kind(files: &ModelFiles, out: &Path) -> anyhow::Result<Kind> {
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

fn is_quantized(files: &ModelFiles) -> bool {
    files.tensors().iter().any(|tensor| tensor.dtype.is_quantized())
}
