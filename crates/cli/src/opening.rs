//! From open files to a session that answers, with a bar when loading takes longer than a moment.
//!
//! Not here: which model (`locate`).

use std::{path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};
use qwenkit_engine::{Options, PrefixCache, Session, Speculate};
use qwenkit_formats::ModelFiles;
use qwenkit_kernels::Isa;
use qwenkit_models::LoadEvent;

use crate::args::ComputeArgs;
use crate::seeing::{Sight, note_guess};
use crate::terminal::{Bar, Unit, note};

/// How to run a model.
#[derive(Args)]
#[command(next_help_heading = "How the model is run")]
pub(crate) struct SessionArgs {
    /// Tokens of context: prompt and answer together [default: the model's own, or what memory holds]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Where beginnings of prompts are kept.
#[derive(Args)]
#[command(next_help_heading = "How the model is run")]
pub(crate) struct PrefixCacheArgs {
    /// Keep the computed state of prompts in this folder, to go on from after a restart; it is as private as the prompts are
    #[arg(long, value_name = "DIR")]
    prefix_cache: Option<PathBuf>,
    /// Megabytes of that folder at most; what was not used for longest goes first
    #[arg(long, value_name = "MB", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..))]
    prefix_cache_mb: u32,
}

impl PrefixCacheArgs {
    /// The folder and its limit, if one was named.
    pub(crate) fn cache(&self) -> Option<PrefixCache> {
        let limit_bytes = u64::from(self.prefix_cache_mb) << 20;
        self.prefix_cache.clone().map(|folder| PrefixCache { folder, limit_bytes })
    }
}

impl SessionArgs {
    /// These, for many users, of whose requests at most `max_waiting` wait for their turn.
    ///
    /// # Errors
    /// When `QWENKIT_ISA` names an instruction set that is not present.
    pub(crate) fn options(&self, max_waiting: usize, speculate: SpeculateArg) -> anyhow::Result<Options> {
        let (threads, context_tokens) = (self.threads(), self.context_tokens());
        Ok(Options {
            threads,
            isa: isa()?,
            context_tokens,
            max_waiting,
            speculate: speculate.into(),
            prefix_cache: None,
        })
    }

    /// The context that was asked for.
    pub(crate) fn context_tokens(&self) -> Option<usize> {
        self.ctx.map(|tokens| tokens as usize)
    }

    /// The number of threads.
    pub(crate) fn threads(&self) -> usize {
        self.compute.threads()
    }
}

/// Where guesses of the next tokens come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SpeculateArg {
    /// Wherever they can be had, as many as make answers faster
    Auto,
    /// From prompt and answer, where they went before as they go now
    Ngram,
    /// From the block that some models have for it (multi-token prediction)
    Mtp,
    /// Nowhere: one token at a time
    Off,
}

impl From<SpeculateArg> for Speculate {
    fn from(arg: SpeculateArg) -> Speculate {
        match arg {
            SpeculateArg::Auto => Speculate::Auto,
            SpeculateArg::Ngram => Speculate::Ngram,
            SpeculateArg::Mtp => Speculate::Mtp,
            SpeculateArg::Off => Speculate::Off,
        }
    }
}

/// Loads the model to read prompts only.
///
/// # Errors
/// When the files are no whole model, an argument does not fit it, or memory is short.
pub(crate) fn open(files: &ModelFiles, args: &SessionArgs) -> anyhow::Result<Session> {
    open_with(files, &Sight::Text, &args.options(usize::MAX, SpeculateArg::Off)?)
}

/// Loads the model, with its vision tower if `sight` says so.
///
/// # Errors
/// As `open`, and when the tower is missing or another model's.
pub(crate) fn open_with(files: &ModelFiles, sight: &Sight, options: &Options) -> anyhow::Result<Session> {
    let mut bar = loading_bar();
    let progress = &mut |event: LoadEvent| bar.update(event.done_bytes, event.total_bytes);
    let session = match sight {
        Sight::Text => Session::open(files, options, progress)?,
        Sight::Images(mmproj) => Session::open_seeing(files, mmproj.as_deref(), options, progress)?,
    };
    bar.clear();
    if let Some(found) = session.block_gap() {
        note(&format!(
            "note: the model's own block for guesses of next tokens (MTP) is not used: found {found}; answers are the same without it"
        ));
    }
    if let Some(vision) = session.vision() {
        note_guess(&vision.plan);
    }
    if let (Some(tokens), Some(cache)) = (session.kept_tokens(), &options.prefix_cache) {
        note(&format!("prefix cache: {tokens} tokens of this model's prompts in {}", cache.folder.display()));
    }
    let (in_force, made_for) = (session.info().context_tokens, session.info().model_context_tokens);
    if in_force > made_for {
        note(&format!("note: the context is {in_force} tokens; beyond the {made_for} it was made for, the model errs"));
    } else if in_force < made_for && options.context_tokens.is_none() {
        note(&format!("note: memory holds {in_force} tokens of the model's {made_for} tokens of context"));
    }
    Ok(session)
}

/// The instruction set to compute with.
///
/// # Errors
/// When `QWENKIT_ISA` names one that is not present.
pub(crate) fn isa() -> anyhow::Result<Isa> {
    Isa::detect().map_err(|error| anyhow::anyhow!("{error}\nhint: unset QWENKIT_ISA to have the best one chosen"))
}

/// A bar for loading, which shows itself only when loading is slow.
pub(crate) fn loading_bar() -> Bar {
    Bar::new("loading", Unit::Bytes, Duration::from_secs(1))
}
