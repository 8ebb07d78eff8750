//! The command line: its subcommands, and the arguments that several of them share.
//!
//! Contract: whatever parses here is in range; what only makes sense together is checked by the command. Not here: the
//! arguments of one command alone, which stand in its file.

use clap::{Args, Parser, Subcommand};

use crate::commands::{
    bench, classify, doctor, embed, export, list, logits, merge, preprocess, pull, quantize, rerank, rm, run, serve,
    show, template, tokenize, tune,
};

const EXAMPLES: &str = "\
Examples:
  qwenkit run \"Write a Python function that reverses a string\"
  qwenkit run qwen3:4b                      a chat in the terminal
  cat report.txt | qwenkit run \"Summarise:\"
  qwenkit serve qwen3:4b                    an OpenAI-compatible server, and a page at http://127.0.0.1:8080
  qwenkit list --all                        models that have a short name
  qwenkit doctor                            what this machine can run

A MODEL is a short name (qwen2.5-coder:0.5b), a hub id (Qwen/Qwen3-0.6B), a .gguf file or a checkpoint folder.
Nothing leaves this machine except what `pull` asks a model hub for.";

/// Run open Qwen models on your own machine: one program, no Python, no cloud.
#[derive(Parser)]
#[command(name = "qwenkit", version, arg_required_else_help = true, after_help = EXAMPLES, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) network: NetworkArgs,
}

/// What may leave the machine.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NetworkArgs {
    /// Open no network connection, whatever is missing
    #[arg(long, global = true)]
    offline: bool,
    /// Have the system itself refuse outgoing connections, to this process and all it starts (Linux)
    #[arg(long, global = true, env = "QWENKIT_AIR_GAP", value_parser = clap::builder::FalseyValueParser::new())]
    pub(crate) air_gap: bool,
}

impl NetworkArgs {
    /// Whether no connection may be opened.
    pub(crate) fn is_offline(self) -> bool {
        self.offline || self.air_gap
    }
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Chat in the terminal, or answer once
    Run(run::RunArgs),
    /// Put models behind OpenAI's interface, with a page for people
    Serve(serve::ServeArgs),
    /// Fetch a model into the local store
    Pull(pull::PullArgs),
    /// List the models of the local store, or all short names
    List(list::ListArgs),
    /// Say what a model is: size, licence, architecture, types
    Show(show::ShowArgs),
    /// Remove a model from the local store
    Rm(rm::RmArgs),
    /// Train an adapter for a model on your data, or say what is in the data
    Tune(tune::TuneArgs),
    /// Name the labels of texts, with a classifier that `tune` made
    Classify(classify::ClassifyArgs),
    /// Turn texts into vectors
    Embed(embed::EmbedArgs),
    /// Say how well documents fit a query
    Rerank(rerank::RerankArgs),
    /// Turn text into token ids
    Tokenize(tokenize::TokenizeArgs),
    /// Work with chat templates
    Template(template::TemplateArgs),
    /// Measure prompt and generation speed
    Bench(bench::BenchArgs),
    /// Write the raw logits of a token sequence
    Logits(logits::LogitsArgs),
    /// Turn images into the patches that a vision model reads
    Preprocess(preprocess::PreprocessArgs),
    /// Write a model as a GGUF file of another kind
    Quantize(quantize::QuantizeArgs),
    /// Make adapters or other models part of a model's weights
    Merge(merge::MergeArgs),
    /// Write a model in the other format: GGUF file or checkpoint folder
    Export(export::ExportArgs),
    /// Say what this machine can run, or check this build against reference models
    Doctor(doctor::DoctorArgs),
}

/// The model, named either way.
#[derive(Args)]
pub(crate) struct ModelArgs {
    /// The model: a short name, a hub id, a .gguf file or a checkpoint folder
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    positional: Option<String>,
    /// The same as MODEL, as an option
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
}

impl ModelArgs {
    /// The model's name, if one was given.
    pub(crate) fn name(&self) -> Option<&str> {
        self.model.as_deref().or(self.positional.as_deref())
    }
}

/// How to compute.
#[derive(Args)]
pub(crate) struct ComputeArgs {
    /// Threads that compute [default: one per core that this process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl ComputeArgs {
    /// The number of threads.
    pub(crate) fn threads(&self) -> usize {
        self.given_threads().unwrap_or_else(crate::machine::cores)
    }

    /// The number of threads, if somebody said it.
    pub(crate) fn given_threads(&self) -> Option<usize> {
        self.threads.map(usize::from)
    }
}
