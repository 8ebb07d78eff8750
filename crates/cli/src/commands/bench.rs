//! `qwenkit bench`: how fast a model reads prompts and writes answers here, against what the memory can deliver.
//!
//! Contract: what is measured is what `run` does: the same session, the same loop. The first run warms up and does not
//! count; every run has a prompt of its own, so that no cache answers for it. Figures are medians.

use std::time::Instant;

use clap::Args;
use qwenkit_engine::{Ask, Info, Prompt, Sampling, Session, Summary};
use qwenkit_models::arch;
use qwenkit_tensor::TokenId;
use serde_json::{Value, json};

use crate::answer::{self, Show};
use crate::args::ModelArgs;
use crate::failure::Interrupted;
use crate::opening::{self, SessionArgs};
use crate::{interrupt, locate, machine, terminal};

/// Arguments of `bench`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit bench qwen3:4b
  qwenkit bench --model ./model.gguf --prompt 512 --generate 128 --threads 2 --json")]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt: u32,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    generate: u32,
    /// Runs that count
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    repeat: u8,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    session: SessionArgs,
}

struct Figures {
    load_s: f64,
    prompt_tokens_per_s: f64,
    generate_tokens_per_s: f64,
    bandwidth: Option<f64>,
    peak_rss_bytes: Option<u64>,
}

/// Runs the command.
pub(crate) fn run(args: &BenchArgs, offline: bool) -> anyhow::Result<()> {
    let (prompt, generate) = (args.prompt as usize, args.generate as usize);
    let located = locate::locate(args.model.name(), offline)?;
    let plan = arch::plan(&located.files)?;
    // No more context than needed, so that the memory reported is the memory needed.
    let wanted = args.session.context_tokens().unwrap_or(prompt + generate).min(plan.context_tokens);
    interrupt::install()?;
    let threads = args.session.threads();
    let began = Instant::now();
    let session = opening::open(&located.files, threads, Some(wanted))?;
    let load_s = began.elapsed().as_secs_f64();
    let (mut reading, mut writing) = (Vec::new(), Vec::new());
    for run in 0..=usize::from(args.repeat) {
        let ids = prompt_ids(run, prompt, session.info().vocab);
        let summary = measure(&session, ids, generate)?;
        // Run 0 warms up.
        if run > 0 {
            reading.extend(answer::prompt_tokens_per_s(&summary));
            writing.extend(answer::generate_tokens_per_s(&summary));
        }
    }
    let peak_rss_bytes = machine::peak_rss_bytes();
    let info = session.info().clone();
    // The model's memory goes before the test's buffers come.
    drop(session);
    let figures = Figures {
        load_s,
        prompt_tokens_per_s: median(&mut reading),
        generate_tokens_per_s: median(&mut writing),
        bandwidth: machine::read_bandwidth(threads),
        peak_rss_bytes,
    };
    if args.json {
        return terminal::print_json(&figures.to_json(args, &located.stored.name, &info));
    }
    terminal::print(&figures.to_table(args, &located.stored.name, &info))
}

/// Ids spread over the vocabulary; each run's are the continuation of the last one's.
fn prompt_ids(run: usize, tokens: usize, vocab: usize) -> Vec<TokenId> {
    // Tokenizers of Qwen end shortly after 150 000; rows beyond are padding.
    let below = vocab.clamp(1, 150_000);
    // The first run that counts begins at 0.
    let first = match run {
        0 => tokens * 100,
        run => (run - 1) * tokens,
    };
    (first..first + tokens).map(|i| TokenId(((i * 7919 + 13) % below) as u32)).collect()
}

fn measure(session: &Session, ids: Vec<TokenId>, generate: usize) -> anyhow::Result<Summary> {
    let ask = Ask {
        prompt: Prompt::Ids(ids),
        sampling: Sampling::greedy(),
        max_tokens: Some(generate),
        stop: Vec::new(),
        logprobs: None,
        ignore_stop_tokens: true,
    };
    let summary = answer::answer(session, ask, Show::Nothing)?.summary;
    if summary.finish == qwenkit_engine::Finish::Cancelled {
        return Err(Interrupted.into());
    }
    if summary.ids.len() != generate {
        anyhow::bail!(
            "the run gave {} tokens where {generate} were asked for: the context of {} is too short\n\
             hint: fewer --prompt or --generate tokens, or a larger --ctx",
            summary.ids.len(),
            session.info().context_tokens
        );
    }
    Ok(summary)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), values.len() % 2) {
        (Some(&value), 1) => value,
        (Some(&upper), _) => (values.get(middle.saturating_sub(1)).copied().unwrap_or(upper) + upper) / 2.0,
        (None, _) => f64::NAN,
    }
}

impl Figures {
    /// Bytes a second of weights that generation reads.
    fn bytes_per_s(&self, info: &Info) -> f64 {
        self.generate_tokens_per_s * info.bytes_per_token as f64
    }

    fn to_json(&self, args: &BenchArgs, model: &str, info: &Info) -> Value {
        json!({
            "model": model,
            "architecture": info.architecture,
            "prompt_tokens": args.prompt,
            "generate_tokens": args.generate,
            "repeat": args.repeat,
            "threads": info.threads,
            "isa": info.isa.name(),
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "generate_tokens_per_s": self.generate_tokens_per_s,
            "load_s": self.load_s,
            "weight_bytes": info.weight_bytes,
            "bytes_per_token": info.bytes_per_token,
            "read_bytes_per_s": self.bytes_per_s(info),
            "bandwidth_bytes_per_s": self.bandwidth,
            "bandwidth_share": self.bandwidth.map(|bandwidth| self.bytes_per_s(info) / bandwidth),
            "peak_rss_bytes": self.peak_rss_bytes,
        })
    }

    fn to_table(&self, args: &BenchArgs, model: &str, info: &Info) -> String {
        let gigabytes = |bytes: f64| format!("{:.1} GB", bytes / 1e9);
        let share = self.bandwidth.map(|bandwidth| {
            let percent = 100.0 * self.bytes_per_s(info) / bandwidth;
            format!(", {percent:.0}% of the {}/s that {} threads read here", gigabytes(bandwidth), info.threads)
        });
        let rows = [
            ("model", format!("{model} ({})", info.architecture)),
            ("computed by", format!("{} threads, {}", info.threads, info.isa)),
            ("load", format!("{:.2} s", self.load_s)),
            ("prompt", format!("{:.1} tokens/s ({} tokens)", self.prompt_tokens_per_s, args.prompt)),
            ("generation", format!("{:.1} tokens/s ({} tokens)", self.generate_tokens_per_s, args.generate)),
            ("weights read", format!("{} a token", gigabytes(info.bytes_per_token as f64))),
            ("bandwidth", format!("{}/s{}", gigabytes(self.bytes_per_s(info)), share.unwrap_or_default())),
            ("peak memory", self.peak_rss_bytes.map_or("unknown".to_owned(), qwenkit_hub::bytes_in_words)),
        ];
        terminal::table(&rows.map(|(key, value)| vec![key.to_owned(), value]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0]), 2.5);
        assert!(median(&mut []).is_nan());
    }

    #[test]
    fn runs_have_prompts_of_their_own_and_the_first_that_counts_begins_at_zero() {
        assert_eq!(prompt_ids(1, 2, 1_000_000), [TokenId(13), TokenId(7932)]);
        let firsts: Vec<_> = (0..4).map(|run| prompt_ids(run, 512, 151_936)[0]).collect();
        let distinct: std::collections::HashSet<_> = firsts.iter().collect();
        assert_eq!(distinct.len(), firsts.len());
        assert!(prompt_ids(3, 100, 384).iter().all(|id| id.0 < 384));
    }
}
