//! `qwenkit`: one program that runs Qwen models on the machine at hand.
//!
//! Contract: data goes to stdout and everything else to stderr; exit codes are 0 done, 1 failed, 2 wrong usage, 130
//! stopped by Ctrl-C. No error ends in a backtrace. Not here: the commands themselves, each of which is a file in
//! `commands`.
#![forbid(unsafe_code)]

mod air_gap;
mod answer;
mod args;
mod chat;
mod commands;
mod download;
mod failure;
mod images;
mod interrupt;
mod jsonl;
mod locate;
mod machine;
mod measure;
mod opening;
mod prompt;
mod sampling;
mod seeing;
mod tensors;
mod terminal;
mod writing;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version come this way too, with exit code 0.
        Err(message) => {
            let _ = message.print();
            return ExitCode::from(u8::try_from(message.exit_code()).unwrap_or(failure::WRONG_USAGE));
        }
    };
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<()> {
    if cli.network.air_gap {
        air_gap::lock()?;
    }
    let offline = cli.network.is_offline();
    match cli.command {
        Command::Run(args) => commands::run::run(&args, offline),
        Command::Serve(args) => commands::serve::run(&args, offline),
        Command::Pull(args) => commands::pull::run(&args, offline),
        Command::List(args) => commands::list::run(&args),
        Command::Show(args) => commands::show::run(&args),
        Command::Rm(args) => commands::rm::run(&args),
        Command::Tune(args) => commands::tune::run(&args, offline),
        Command::Classify(args) => commands::classify::run(&args, offline),
        Command::Embed(args) => commands::embed::run(&args, offline),
        Command::Rerank(args) => commands::rerank::run(&args, offline),
        Command::Tokenize(args) => commands::tokenize::run(&args, offline),
        Command::Template(args) => commands::template::run(&args),
        Command::Bench(args) => commands::bench::run(&args, offline),
        Command::Logits(args) => commands::logits::run(&args, offline),
        Command::Preprocess(args) => commands::preprocess::run(&args, offline),
        Command::Quantize(args) => commands::quantize::run(&args, offline),
        Command::Merge(args) => commands::merge::run(&args, offline),
        Command::Export(args) => commands::export::run(&args, offline),
        Command::Doctor(args) => commands::doctor::run(&args, offline),
    }
}
