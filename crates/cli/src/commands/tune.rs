//! `qwenkit tune`: trains an adapter for a model.
//!
//! Contract: arguments and data are judged before a model is loaded. Not here: the arithmetic (`qwenkit-models`), the run
//! (`qwenkit-train`).

mod adapting;
mod beside;
mod check;
mod data;
mod data_args;
mod full;
mod identity;
mod memory;
mod ranks;
mod recorded;
mod report;
mod training;

pub(crate) use training::{CHECKPOINT, COURSE, is_claimed, usual_rate};

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use qwenkit_train::{Curve, Precision};

use crate::args::ComputeArgs;
use crate::failure::usage;
use crate::terminal;
use check::CheckRequest;
use data_args::DataArgs;

const EXAMPLES: &str = "\
Examples:
  qwenkit tune --model qwen2.5-coder:0.5b --data train.jsonl --out my-adapter
  qwenkit run --model qwen2.5-coder:0.5b --adapter my-adapter \"...\"
  qwenkit tune --task classify --data intents.csv --out my-classifier
  qwenkit classify --adapter my-classifier \"Where is my card?\"
  qwenkit tune --method full --model ./checkpoint --data train.jsonl --out my-model
  qwenkit tune ... --resume                 goes on with a run that was cut off, with the same numbers
  qwenkit tune --check --data train.jsonl   what is in the data, and what of it would be learnt
  qwenkit tune --report my-adapter          the page of a run's folder, as far as it has come
  torchrun --nproc-per-node 2 --no-python qwenkit tune ...
                                            two processes train one adapter, over TCP; on several machines too
  mpirun -n 2 qwenkit tune ...              the same over MPI (a program built with --features mpi)

The model's weights stay as they are in their file; what is trained is a LoRA adapter beside them, written as PEFT writes it. With
--method full it is all of a dense model's weights, in f32, and what is written is a checkpoint folder; that takes 18 bytes for each
of them in BF16, 12 with --optimiser adamw-8bit, and 4 more where samples are kept apart to validate with. Settings that are not given depend
on the data and are in qwenkit.json afterwards, with the hashes of model and data.

Data are JSON lines, or CSV with a header line. A line is one of:
  {\"messages\": [{\"role\": \"user\", \"content\": ...}, {\"role\": \"assistant\", \"content\": ...}], \"tools\": [...]}
  {\"prompt\": ..., \"completion\": ...}
  {\"prompt\": ..., \"chosen\": ..., \"rejected\": ...}
  {\"text\": ..., \"label\": ...}
  {\"text\": ...}
Of a conversation the assistant's messages are learnt, each with the token that ends it; \"weight\": 0 leaves one out. Of texts with
labels a classifier is made. Of preferences (DPO) the better answer is to gain on the worse, measured against the model as it was.

Processes that torchrun starts (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) meet at MASTER_ADDR, at MASTER_PORT or, where torchrun itself
listens there, at the first free port of the eight from MASTER_PORT + 1000 on; QWENKIT_MASTER_PORT names another one.

--ids is for holding one trainer against another: it names a file with the tensors `input_ids` and `labels`, (sequences, tokens) of
i64, a label of -100 being left out; every step takes all of it. --dump writes `loss0`, `grad.*` of the first step, `losses` before
each step and `final.*`.";

/// What is learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Task {
    /// To answer as the data does
    Sft,
    /// To name a text's label
    Classify,
    /// To prefer the better of two answers
    Dpo,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Method {
    /// A LoRA adapter beside the model, whose weights stay as they are
    Lora,
    /// All weights of a dense Qwen2, Qwen2.5 or Qwen3; a checkpoint folder comes of it
    Full,
}

/// How numbers are changed by their gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Optimiser {
    /// AdamW, its memory in f32
    Adamw,
    /// The same with its memory in 8 bits, a quarter of the bytes
    #[value(name = "adamw-8bit")]
    Adamw8bit,
}

impl Optimiser {
    fn precision(self) -> Precision {
        match self {
            Optimiser::Adamw => Precision::F32,
            Optimiser::Adamw8bit => Precision::Bits8,
        }
    }

    /// As the command line has it.
    fn name(self) -> &'static str {
        match self {
            Optimiser::Adamw => "adamw",
            Optimiser::Adamw8bit => "adamw-8bit",
        }
    }
}

/// Arguments of `tune`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TuneArgs {
    /// The model: a short name, a hub id, a .gguf file or a checkpoint folder
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// The data to learn from; may be given several times
    #[arg(long, value_name = "FILE", conflicts_with = "ids")]
    data: Vec<PathBuf>,
    /// Data to validate with, instead of a part of the others; may be given several times
    #[arg(long, value_name = "FILE", requires = "data", conflicts_with_all = ["validation", "check", "ids"])]
    validation_data: Vec<PathBuf>,
    /// The folder for the adapter and the run's records
    #[arg(long, value_name = "FOLDER", requires = "data")]
    out: Option<PathBuf>,
    /// What to learn [default: what the data's form says]
    #[arg(long, value_enum, conflicts_with_all = ["check", "ids"])]
    task: Option<Task>,
    /// What is trained
    #[arg(long, value_enum, value_name = "METHOD", default_value_t = Method::Lora, conflicts_with_all = ["check", "ids"])]
    method: Method,
    /// Go on with the run that was begun in the folder
    #[arg(long, requires = "data")]
    resume: bool,
    /// For the jobs of a server: give way to everything else, and stop when stdin ends
    #[arg(long, hide = true, requires = "out")]
    beside: bool,
    /// Say what is in the data, and show samples with what is learnt of them marked; nothing is trained
    #[arg(long, requires = "data", conflicts_with_all = ["report", "out"])]
    check: bool,
    /// Samples that --check shows
    #[arg(long, value_name = "N", default_value_t = 3, requires = "check", conflicts_with = "out")]
    show: usize,
    /// Print what --check finds as JSON
    #[arg(long, requires = "check", conflicts_with = "out")]
    json: bool,
    /// Write the page report.html of a run's folder anew
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["data", "ids", "out", "resume"])]
    report: Option<PathBuf>,
    /// Token ids and labels to learn, as safetensors
    #[arg(long, value_name = "FILE", requires = "adapter_init", conflicts_with_all = [
        "batch", "validation", "validate_every", "patience", "checkpoint_every", "seed", "piece_tokens",
        "text_column", "label_column", "context", "too_long", "answers", "raw", "control_tokens",
    ])]
    ids: Option<PathBuf>,
    /// The adapter to go on from: a PEFT folder or a GGUF file
    #[arg(long, value_name = "PATH", conflicts_with_all = ["rank", "alpha", "rslora", "dora", "targets", "from_layer"])]
    adapter_init: Option<PathBuf>,
    /// Write losses, gradients and the trained adapter to this safetensors file
    #[arg(long, value_name = "FILE", requires = "ids")]
    dump: Option<PathBuf>,
    #[command(flatten)]
    how: DataArgs,
    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    course: CourseArgs,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// What the adapter is.
#[derive(Args)]
#[command(next_help_heading = "The adapter")]
pub(crate) struct ShapeArgs {
    /// Rank of what is added to each matrix [default: 16]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u16).range(1..=1024))]
    rank: Option<u16>,
    /// What the scale is made of: alpha / rank [default: twice the rank]
    #[arg(long, value_name = "ALPHA", value_parser = positive)]
    alpha: Option<f64>,
    /// A scale of alpha / sqrt(rank) instead
    #[arg(long)]
    rslora: bool,
    /// Train the length of each row of the adapted matrices too (DoRA)
    #[arg(long)]
    dora: bool,
    /// The matrices that are adapted
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    targets: Vec<String>,
    /// The first layer that is adapted, counted from 0 [default: 0; for labels half-way up, which is faster]
    #[arg(long, value_name = "LAYER")]
    from_layer: Option<u16>,
}

impl ShapeArgs {
    /// R
    fn rank(&self) -> u16 {
        self.rank.unwrap_or(16)
    }

    /// Whether anything was said of it.
    fn is_given(&self) -> bool {
        let ShapeArgs { rank, alpha, rslora, dora, targets, from_layer } = self;
        rank.is_some() || alpha.is_some() || *rslora || *dora || !targets.is_empty() || from_layer.is_some()
    }
}

/// How the training goes.
#[derive(Args)]
#[command(next_help_heading = "The training")]
pub(crate) struct CourseArgs {
    /// Times that all data are gone through [default: 3, with few samples up to 10; 2 to 10 for labels]
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with = "steps")]
    epochs: Option<f64>,
    /// Steps, instead of epochs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
    /// Samples of a step; of several processes, of each [default: 8; 32 for labels]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// Shares into which one process deals a step's samples, to find the numbers that as many processes find [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536), conflicts_with = "ids")]
    shares: Option<u32>,
    /// The highest learning rate [default: 2e-4; 4e-4 for labels; 5e-5 for preferences; with --method full 1e-5, and 5e-7 for
    /// preferences]
    #[arg(long, value_name = "RATE", value_parser = positive)]
    lr: Option<f64>,
    /// How numbers are changed by their gradients
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Optimiser::Adamw)]
    optimiser: Optimiser,
    /// What a number loses at each step beside its gradient, times the rate
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = not_negative)]
    weight_decay: f64,
    /// How the rate goes on behind the warm-up: constant, linear or cosine
    #[arg(long, value_name = "CURVE", default_value = "cosine", value_parser = curve)]
    schedule: Curve,
    /// Steps over which the rate rises [default: a twentieth of them; none with --ids]
    #[arg(long, value_name = "N")]
    warmup: Option<u32>,
    /// The longest that a gradient may be
    #[arg(long, value_name = "LENGTH", default_value_t = 1.0, value_parser = positive)]
    clip: f64,
    /// Let gradients be of any length
    #[arg(long, conflicts_with = "clip")]
    no_clip: bool,
    /// How dear it is to go far from what was before [default: 0.1; preferences only]
    #[arg(long, value_name = "BETA", value_parser = positive, conflicts_with = "ids")]
    beta: Option<f64>,
    /// What of a label's share is learnt as all labels', equally [default: 0.1; labels only]
    #[arg(long, value_name = "SHARE", value_parser = share, conflicts_with = "ids")]
    smoothing: Option<f32>,
    /// Samples kept apart to validate with [default: a share of all, by how many there are]
    #[arg(long, value_name = "N")]
    validation: Option<u32>,
    /// Steps between two validations [default: eight in a run; four for labels]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    validate_every: Option<u32>,
    /// Validations without a better one after which the run ends
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    patience: Option<u32>,
    /// Steps between two checkpoints
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    checkpoint_every: u32,
    /// The number that all chance comes from
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Tokens that are computed at once; a larger step is taken in pieces
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    piece_tokens: u32,
    /// Keep only each layer's input of the forward pass, and compute the rest twice [default: if memory is short]
    #[arg(long)]
    sparing: bool,
}

/// Runs the command.
///
/// # Errors
/// When the data cannot be learnt from, a run fails, or a folder holds no run.
pub(crate) fn run(args: &TuneArgs, offline: bool) -> anyhow::Result<()> {
    ranks::let_the_first_speak();
    if let Some(folder) = &args.report {
        let path = qwenkit_train::report::write(folder)?;
        return terminal::print_line(&path.display().to_string());
    }
    if args.check {
        let model = args.model.as_deref();
        let request = CheckRequest { model, files: &args.data, data: &args.how, is_json: args.json, show: args.show };
        return check::run(&request, offline);
    }
    let of_adapters = args.adapter_init.is_some() || args.shape.is_given();
    if args.method == Method::Full && of_adapters {
        let flags = "--adapter-init, --rank, --alpha, --rslora, --dora, --targets and --from-layer";
        return Err(usage(format!("{flags} are of adapters, and --method full trains the model itself")));
    }
    match (&args.ids, &args.out) {
        (Some(ids), _) => {
            ranks::refuse("--ids")?;
            recorded::run(args, ids, offline)
        }
        (None, Some(out)) => ranks::run(args.course.shares, |team| training::run(args, out, team, offline)),
        (None, None) if !args.data.is_empty() => {
            Err(usage("the data are there, and no folder for what comes of them\nhint: --out my-adapter, or --check"))
        }
        (None, None) => Err(usage("there is nothing to learn\nhint: qwenkit tune --data train.jsonl --out my-adapter")),
    }
}

fn curve(text: &str) -> Result<Curve, String> {
    Curve::named(text).ok_or_else(|| "expected constant, linear or cosine".to_owned())
}

fn positive(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x: &f64| x.is_finite() && *x > 0.0).ok_or_else(|| "expected a number above 0".to_owned())
}

fn share(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|x| (0.0..1.0).contains(x)).ok_or_else(|| "expected 0 or more, and less than 1".to_owned())
}

fn not_negative(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x: &f64| x.is_finite() && *x >= 0.0).ok_or_else(|| "expected 0 or more".to_owned())
}
