//! `qwenkit export`: a model, or an adapter of it, in the other format - a GGUF file as a folder, or a folder as a GGUF file.
//!
//! Contract: the file or folder is there whole or not at all. Not here: what is written (`qwenkit-quantize`).

use std::path::PathBuf;

use clap::Args;
use qwenkit_quantize::{Importance, export_adapter};

use crate::args::ModelArgs;
use crate::failure::usage;
use crate::locate;
use crate::writing::{WritingArgs, kind_of};

/// Arguments of `export`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit export ./model-q4_k_m.gguf --out checkpoint/          for transformers, PEFT, vLLM
  qwenkit export ./checkpoint --out model-bf16.gguf             for llama.cpp and its like
  qwenkit export ./checkpoint --adapter my-adapter --out my-adapter.gguf     the adapter alone, for llama.cpp; or back to PEFT

A name that ends in .gguf makes a GGUF file, any other a checkpoint folder: safetensors, config.json, tokenizer.json and their like.
A quantised model's weights become plain numbers, which takes more room; its answers hardly move, and --type F32 keeps every value.")]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Export this adapter of the model, a PEFT folder or a GGUF file, instead of the model
    #[arg(long, value_name = "ADAPTER", conflicts_with = "kind")]
    adapter: Option<PathBuf>,
    /// F32, F16, BF16; of a GGUF file also a quantised type [default: the model's own type, of a quantised one F16 or BF16]
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// The GGUF file or folder to write
    #[arg(long, value_name = "FILE_OR_FOLDER")]
    out: PathBuf,
    #[command(flatten)]
    writing: WritingArgs,
}

/// Runs the command.
pub(crate) fn run(args: &ExportArgs, offline: bool) -> anyhow::Result<()> {
    let name = args.model.name().ok_or_else(|| usage("no model is named\nhint: qwenkit export MODEL --out ..."))?;
    let files = locate::locate(Some(name), offline)?.files;
    if let Some(adapter) = &args.adapter {
        export_adapter(&files, adapter, &args.out)?;
        eprintln!("wrote {}, read back and the same", args.out.display());
        return Ok(());
    }
    let kind = kind_of(args.kind.as_deref(), &files, &args.out)?;
    let compute = args.writing.compute()?;
    args.writing.write((kind, &args.out), &Importance::new(), &compute, |step, progress| step.export(&files, progress))
}
