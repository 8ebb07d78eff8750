//! `qwenkit export`: a model in the other format - a GGUF file as a checkpoint folder, or a folder as a GGUF file.
//!
//! Contract: the file or folder is there whole or not at all. Not here: what is written (`qwenkit-quantize`).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use qwenkit_kernels::Compute;
use qwenkit_quantize::{Importance, Kind, Step};

use crate::args::{ComputeArgs, ModelArgs};
use crate::commands::quantize::{plain_kind, report};
use crate::failure::usage;
use crate::proving::ProofArgs;
use crate::terminal::{Bar, Unit};
use crate::{locate, opening};

/// Arguments of `export`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit export ./model-q4_k_m.gguf --out checkpoint/          for transformers, PEFT, vLLM
  qwenkit export ./checkpoint --out model-bf16.gguf             for llama.cpp and its like

A name that ends in .gguf makes a GGUF file, any other a checkpoint folder: safetensors, config.json, tokenizer.json and their like.
A quantised model's weights are written as they are multiplied, which takes more room and gives the same answers.")]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// F32, F16, BF16; of a GGUF file also a quantised type [default: the model's own type, of a quantised one F16 or BF16]
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// The GGUF file or folder to write
    #[arg(long, value_name = "FILE_OR_FOLDER")]
    out: PathBuf,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    proof: ProofArgs,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Runs the command.
pub(crate) fn run(args: &ExportArgs, offline: bool) -> anyhow::Result<()> {
    let name = args.model.name().ok_or_else(|| usage("no model is named\nhint: qwenkit export MODEL --out ..."))?;
    let files = locate::locate(Some(name), offline)?.files;
    let kind: Kind = match &args.kind {
        Some(kind) => kind.parse::<Kind>().map_err(|error| usage(error.to_string()))?,
        None => plain_kind(&files, &args.out)?,
    };
    let mut bar = Bar::new("writing", Unit::Values, Duration::from_secs(1));
    let started = Instant::now();
    let (threads, importance) = (args.compute.threads(), Importance::new());
    let compute = Compute::new(threads, opening::isa()?);
    let text = args.proof.text()?;
    let prover = args.proof.prover(&compute, text.as_deref());
    let step = Step { kind, out: &args.out, importance: &importance, threads, prover: prover.as_ref() };
    let written = step.export(&files, &mut |done, total| bar.update(done, total))?;
    bar.clear();
    report(&written, kind, args.json, started.elapsed())
}
