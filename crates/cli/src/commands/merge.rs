//! `qwenkit merge`: adapters, or other models, become part of a model's weights.
//!
//! Contract: the file or folder is there whole or not at all. Not here: the arithmetic (`qwenkit-quantize`).

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use qwenkit_formats::{Adapter, ModelFiles};
use qwenkit_quantize::{Change, Importance, Method, Progress, Step};

use crate::args::ModelArgs;
use crate::failure::usage;
use crate::locate;
use crate::writing::{WritingArgs, kind_of};

/// Arguments of `merge`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit merge --model qwen2.5-coder:0.5b --adapter ./my-adapter --out merged/
  qwenkit merge --model ./base --adapter ./my-adapter --type Q4_K_M --out merged-q4_k_m.gguf
  qwenkit merge --model ./base --blend ties --with ./coder=0.5 --with ./math=0.5 --density 0.3 --out blend/

A name that ends in .gguf makes a GGUF file, any other a checkpoint folder. Merging computes in f32 whatever the model's type.
--blend: linear is the weighted mean (the model itself has what the weights leave of 1); slerp goes the share WEIGHT of the way
along the circle to one other model; task adds the others' differences from the model; dare keeps a random share of each
difference and enlarges it in turn; ties keeps the largest, and where signs differ the stronger side.")]
pub(crate) struct MergeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// An adapter: a PEFT folder or a GGUF file; several are merged one after the other
    #[arg(long, value_name = "ADAPTER")]
    adapter: Vec<PathBuf>,
    /// Blend other models of the same shape in
    #[arg(long, value_name = "METHOD", requires = "with")]
    blend: Option<Blend>,
    /// Another model and its weight
    #[arg(long, value_name = "MODEL=WEIGHT", requires = "blend", value_parser = weighted)]
    with: Vec<(String, f32)>,
    /// The share of each difference that dare and ties keep [default: 0.5]
    #[arg(long, value_name = "X", requires = "blend")]
    density: Option<f32>,
    /// Which random numbers dare takes [default: 0]
    #[arg(long, value_name = "N", requires = "blend")]
    seed: Option<u64>,
    /// The kind of file [default: the model's own type, of a quantised model F16 in a GGUF file and BF16 in a folder]
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// The GGUF file or folder to write
    #[arg(long, value_name = "FILE_OR_FOLDER")]
    out: PathBuf,
    #[command(flatten)]
    writing: WritingArgs,
}

/// Ways to blend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Blend {
    Linear,
    Slerp,
    Task,
    Dare,
    Ties,
}

/// `MODEL=WEIGHT`
fn weighted(text: &str) -> Result<(String, f32), String> {
    let found = text.rsplit_once('=').and_then(|(model, weight)| Some((model, weight.parse::<f32>().ok()?)));
    match found {
        Some((model, weight)) if !model.is_empty() && weight.is_finite() => Ok((model.to_owned(), weight)),
        _ => Err("expected a model, `=` and a number, as in ./coder=0.5".to_owned()),
    }
}

/// Runs the command.
pub(crate) fn run(args: &MergeArgs, offline: bool) -> anyhow::Result<()> {
    let name = args.model.name().ok_or_else(|| usage("no model is named\nhint: qwenkit merge --model MODEL ..."))?;
    if args.adapter.is_empty() && args.blend.is_none() {
        return Err(usage("nothing to merge is named\nhint: --adapter ADAPTER, or --blend METHOD --with MODEL=WEIGHT"));
    }
    let files = locate::locate(Some(name), offline)?.files;
    let kind = kind_of(args.kind.as_deref(), &files, &args.out)?;
    let adapters = args.adapter.iter().map(|path| Adapter::open(path)).collect::<Result<Vec<_>, _>>()?;
    let others = args
        .with
        .iter()
        .map(|(name, weight)| Ok((locate::locate(Some(name), offline)?.files, *weight)))
        .collect::<anyhow::Result<Vec<(ModelFiles, f32)>>>()?;
    let mut changes: Vec<Change<'_>> = Vec::new();
    if let Some(blend) = args.blend {
        if args.density.is_some() && !matches!(blend, Blend::Dare | Blend::Ties) {
            return Err(usage("--density is for dare and ties alone"));
        }
        if args.seed.is_some() && blend != Blend::Dare {
            return Err(usage("--seed is for dare alone"));
        }
        let density = args.density.unwrap_or(0.5);
        let method = match blend {
            Blend::Linear => Method::Linear,
            Blend::Slerp => Method::Slerp,
            Blend::Task => Method::Task,
            Blend::Dare => Method::Dare { density, seed: args.seed.unwrap_or(0) },
            Blend::Ties => Method::Ties { density },
        };
        changes.push(Change::Blend(others.iter().map(|(files, weight)| (files, *weight)).collect(), method));
    }
    changes.extend(adapters.iter().zip(&args.adapter).map(|(adapter, path)| Change::Adapter(adapter, path)));
    let compute = args.writing.compute()?;
    let merge = |step: &Step<'_>, progress: &mut Progress<'_>| step.merge(&files, &changes, progress);
    args.writing.write((kind, &args.out), &Importance::new(), &compute, merge)
}
