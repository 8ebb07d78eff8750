//! `qwenkit tune`: what a model can learn from data.
//!
//! Contract: data is judged before anything is computed. Not here: reading data and what is found in it (`qwenkit-train`).

mod check;
mod data_args;

use std::path::PathBuf;

use clap::Args;

use crate::failure::usage;
use crate::terminal;
use check::CheckRequest;
use data_args::DataArgs;

const EXAMPLES: &str = "\
Examples:
  qwenkit tune --check --data train.jsonl
  qwenkit tune --check --model qwen3:4b --data intents.csv --label-column intent
  qwenkit tune --report my-adapter          the page of a run's folder, as far as it has come

Data are JSON lines, or CSV with a header line. A line is one of:
  {\"messages\": [{\"role\": \"user\", \"content\": ...}, {\"role\": \"assistant\", \"content\": ...}], \"tools\": [...]}
  {\"prompt\": ..., \"completion\": ...}
  {\"prompt\": ..., \"chosen\": ..., \"rejected\": ...}
  {\"text\": ..., \"label\": ...}
  {\"text\": ...}
Of a conversation the assistant's messages are learnt, each with the token that ends it; \"weight\": 0 leaves one out.";

/// Arguments of `tune`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TuneArgs {
    /// The model: a short name, a hub id, a .gguf file or a checkpoint folder
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// The data to learn from; may be given several times
    #[arg(long, value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Say what is in the data, and show samples with what is learnt of them marked; nothing is trained
    #[arg(long, requires = "data", conflicts_with = "report")]
    check: bool,
    /// Samples that --check shows
    #[arg(long, value_name = "N", default_value_t = 3)]
    show: usize,
    /// Print what --check finds as JSON
    #[arg(long, requires = "check")]
    json: bool,
    /// Write the page report.html of a run's folder anew
    #[arg(long, value_name = "FOLDER")]
    report: Option<PathBuf>,
    #[command(flatten)]
    how: DataArgs,
}

/// Runs the command.
///
/// # Errors
/// When the data cannot be learnt from, or a folder holds no run.
pub(crate) fn run(args: &TuneArgs, offline: bool) -> anyhow::Result<()> {
    if let Some(folder) = &args.report {
        let path = qwenkit_train::report::write(folder)?;
        return terminal::print_line(&path.display().to_string());
    }
    if !args.check {
        return Err(usage("there is nothing to do\nhint: qwenkit tune --check --data train.jsonl"));
    }
    let model = args.model.as_deref();
    let request = CheckRequest { model, files: &args.data, data: &args.how, is_json: args.json, show: args.show };
    check::run(&request, offline)
}
