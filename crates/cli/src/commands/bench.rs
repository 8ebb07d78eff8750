//! `qwenkit bench`: how fast a model reads prompts and writes answers here, against what the memory can deliver.
//!
//! Contract: what is measured is what `run` does: the same session, the same loop (`measure`). The first run warms up and
//! does not count; every run has a prompt of its own, so that no cache answers for it. Figures are medians. Tokens are not
//! guessed ahead unless that is asked for: after prompts of random tokens, models repeat themselves.

use std::time::Instant;

use clap::Args;
use qwenkit_engine::{Info, Load as Work, Options};
use qwenkit_models::arch;
use serde_json::{Value, json};

use crate::args::ModelArgs;
use crate::measure::{self, Load};
use crate::opening::{self, SessionArgs, SpeculateArg};
use crate::seeing::Sight;
use crate::{interrupt, locate, machine, terminal};

/// Arguments of `bench`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit bench qwen3:4b
  qwenkit bench --model ./model.gguf --prompt 512 --generate 128 --threads 2 --json
  qwenkit bench --model ./model.gguf --depth 8192      the same behind 8192 tokens of context
  qwenkit bench --model ./model.gguf --batch 8         eight sequences generating together")]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt: u32,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    generate: u32,
    /// Tokens of context that are there before the prompt
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    depth: u32,
    /// Sequences that generate together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    /// Runs that count
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    repeat: u8,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Guesses next tokens and computes several at once; the answer is the same, sooner
    #[arg(long, value_name = "FROM", value_enum, default_value_t = SpeculateArg::Off, help_heading = "How the model is run")]
    speculate: SpeculateArg,
    #[command(flatten)]
    session: SessionArgs,
}

struct Figures {
    load_s: f64,
    prompt_tokens_per_s: f64,
    generate_tokens_per_s: f64,
    /// All sequences of a batch together, and one alone.
    batch: Option<(f64, f64)>,
    bandwidth: Option<f64>,
    /// Tokens guessed, and those of them that were said, where tokens are guessed.
    guessed: Option<(u64, u64)>,
    peak_rss_bytes: Option<u64>,
    /// Bytes of weights that a token read, with as much of the output head as its batches have read.
    bytes_per_token: u64,
}

/// Runs the command.
pub(crate) fn run(args: &BenchArgs, offline: bool) -> anyhow::Result<()> {
    let load = Load {
        depth: args.depth as usize,
        prompt: args.prompt as usize,
        generate: args.generate as usize,
        batch: usize::from(args.batch),
    };
    let located = locate::locate(args.model.name(), offline)?;
    // No more context than needed, so that the memory reported is the memory needed.
    let wanted = args.session.context_tokens().unwrap_or(load.context_tokens());
    let made_for = arch::plan(&located.files)?.context_tokens;
    if load.tokens() > made_for && args.session.context_tokens().is_none() {
        anyhow::bail!(
            "depth, prompt of {} tokens and answer are {} tokens together, more than the model's context of {made_for}\n\
             hint: fewer of them, or --ctx {} to measure what the model was not made for",
            load.prompt,
            load.tokens(),
            load.context_tokens()
        );
    }
    interrupt::install()?;
    let threads = args.session.threads();
    let began = Instant::now();
    let options = Options { context_tokens: Some(wanted), ..args.session.options(usize::MAX, args.speculate)? };
    let session = opening::open_with(&located.files, &Sight::Text, &options)?;
    let load_s = began.elapsed().as_secs_f64();
    let (mut reading, mut writing, mut together) = (Vec::new(), Vec::new(), Vec::new());
    let (mut head_reads, mut head_bytes) = (0, 0);
    for run in 0..=usize::from(args.repeat) {
        let alone = measure::alone(&session, &load, run)?;
        let batch = (load.batch > 1).then(|| measure::together(&session, &load, run)).transpose()?;
        // Run 0 warms up.
        if run > 0 {
            reading.extend(alone.prompt_tokens_per_s);
            writing.extend(alone.generate_tokens_per_s);
            head_reads += alone.head.0;
            head_bytes += alone.head.1;
            together.extend(batch);
        }
    }
    let peak_rss_bytes = machine::peak_rss_bytes();
    let Work { drafted_tokens, accepted_tokens, .. } = session.load();
    let info = session.info().clone();
    // The model's memory goes before the test's buffers come.
    drop(session);
    let generate_tokens_per_s = measure::median(&mut writing);
    let bytes_per_token =
        (info.bytes_per_token - info.head_bytes) as u64 + head_bytes.checked_div(head_reads).unwrap_or(0);
    let figures = Figures {
        load_s,
        prompt_tokens_per_s: measure::median(&mut reading),
        generate_tokens_per_s,
        batch: (load.batch > 1).then(|| (measure::median(&mut together), generate_tokens_per_s)),
        bandwidth: machine::read_bandwidth(threads, bytes_per_token),
        guessed: (args.speculate != SpeculateArg::Off).then_some((drafted_tokens, accepted_tokens)),
        peak_rss_bytes,
        bytes_per_token,
    };
    if args.json {
        return terminal::print_json(&figures.to_json(args, &located.stored.name, &info));
    }
    terminal::print(&figures.to_table(args, &located.stored.name, &info))
}

impl Figures {
    /// Bytes a second of weights that generation reads.
    fn bytes_per_s(&self) -> f64 {
        self.generate_tokens_per_s * self.bytes_per_token as f64
    }

    fn to_json(&self, args: &BenchArgs, model: &str, info: &Info) -> Value {
        json!({
            "model": model,
            "architecture": info.architecture,
            "prompt_tokens": args.prompt,
            "generate_tokens": args.generate,
            "depth_tokens": args.depth,
            "batch": args.batch,
            "repeat": args.repeat,
            "threads": info.threads,
            "isa": info.isa.name(),
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "generate_tokens_per_s": self.generate_tokens_per_s,
            "batch_tokens_per_s": self.batch.map(|(together, _)| together),
            "batch_gain": self.batch.map(|(together, alone)| together / alone),
            "drafted_tokens": self.guessed.map(|(drafted, _)| drafted),
            "accepted_tokens": self.guessed.map(|(_, accepted)| accepted),
            "load_s": self.load_s,
            "weight_bytes": info.weight_bytes,
            "bytes_per_token": self.bytes_per_token,
            "read_bytes_per_s": self.bytes_per_s(),
            "bandwidth_bytes_per_s": self.bandwidth,
            "bandwidth_share": self.bandwidth.map(|bandwidth| self.bytes_per_s() / bandwidth),
            "peak_rss_bytes": self.peak_rss_bytes,
        })
    }

    fn to_table(&self, args: &BenchArgs, model: &str, info: &Info) -> String {
        let gigabytes = |bytes: f64| format!("{:.1} GB", bytes / 1e9);
        let share = self.bandwidth.map(|bandwidth| {
            let percent = 100.0 * self.bytes_per_s() / bandwidth;
            format!(", {percent:.0}% of the {}/s that {} threads read here", gigabytes(bandwidth), info.threads)
        });
        let behind = match args.depth {
            0 => String::new(),
            depth => format!(" behind {depth}"),
        };
        // Of experts a token reads those that it goes to.
        let read = match info.weight_bytes {
            all if all > 2 * info.bytes_per_token => format!(" of the model's {}", gigabytes(all as f64)),
            _ => String::new(),
        };
        let mut rows = vec![
            ("model", format!("{model} ({})", info.architecture)),
            ("computed by", format!("{} threads, {}", info.threads, info.isa)),
            ("load", format!("{:.2} s", self.load_s)),
            ("prompt", format!("{:.1} tokens/s ({} tokens{behind})", self.prompt_tokens_per_s, args.prompt)),
            ("generation", format!("{:.1} tokens/s ({} tokens{behind})", self.generate_tokens_per_s, args.generate)),
            ("weights read", format!("{} a token{read}", gigabytes(self.bytes_per_token as f64))),
            ("bandwidth", format!("{}/s{}", gigabytes(self.bytes_per_s()), share.unwrap_or_default())),
            ("peak memory", self.peak_rss_bytes.map_or("unknown".to_owned(), qwenkit_hub::bytes_in_words)),
        ];
        if let Some((drafted, accepted)) = self.guessed {
            let share = 100.0 * accepted as f64 / drafted.max(1) as f64;
            rows.insert(5, ("guessed", format!("{drafted} tokens, of which {accepted} ({share:.0}%) were right")));
        }
        if let Some((together, alone)) = self.batch {
            let words = format!("{together:.1} tokens/s in all, {:.2} times one alone", together / alone);
            rows.insert(5, ("batch", format!("{} sequences: {words}", args.batch)));
        }
        terminal::table(&rows.into_iter().map(|(key, value)| vec![key.to_owned(), value]).collect::<Vec<_>>())
    }
}
