//! What goes into the engine and what comes out, in token ids.

use std::sync::Arc;

use qwenkit_models::Adapter;
use qwenkit_tensor::TokenId;

use crate::{
    error::Error,
    guide::{Guide, ThoughtEnd},
    sampler::Sampling,
    vision::{Placed, VisionInfo},
};

/// A sequence to continue, or to look at.
#[derive(Default)]
pub struct Request {
    /// The prompt; not empty.
    pub prompt: Vec<TokenId>,
    /// Images and films in it, in order; each stands on as many placeholder tokens as it has vectors.
    pub visuals: Vec<Placed>,
    /// What is wanted of it.
    pub goal: Goal,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Tokens to generate at least, unless the guide ends the answer: before, no stop token is chosen.
    pub min_tokens: usize,
    /// Tokens that end the answer.
    pub stop_tokens: Vec<TokenId>,
    /// Log-probabilities wanted: of the chosen token and of so many best ones.
    pub logprobs: Option<usize>,
    /// Log-probabilities wanted of the prompt's tokens. Such a prompt is computed anew, whatever is remembered of it.
    pub prompt_logprobs: Option<usize>,
    /// Who goes first.
    pub priority: Priority,
    /// What may come next, and what must.
    pub guide: Option<Box<dyn Guide>>,
    /// The adapter that is in force for it, made for the engine's model.
    pub adapter: Option<Arc<Adapter>>,
}

/// Whose turn it is when not all fit: waiting requests of a higher one are taken in first, and running ones of a lower one
/// give way to them, to go on later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Work that nobody waits for, such as batch files.
    Low,
    /// Somebody waits.
    #[default]
    Normal,
    /// Somebody waits who goes before others.
    High,
}

/// What a request wants of its prompt. All but an answer come as one `Event::Values`; what is said of answers in a
/// request means nothing to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Goal {
    /// Tokens that follow.
    #[default]
    Answer,
    /// The last position's hidden state behind the final norm: (D).
    Hidden,
    /// The last position's logits of these tokens.
    Logits(Vec<TokenId>),
}

/// What an engine can take, the same for its whole life.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// V; ids are below it.
    pub(crate) vocab: usize,
    /// Positions that all pages hold together.
    pub(crate) capacity_tokens: usize,
}

impl Request {
    /// Refuses what can never be served.
    pub(crate) fn check(&self, limits: Limits, vision: Option<&VisionInfo>) -> Result<(), Error> {
        let Limits { vocab, capacity_tokens } = limits;
        self.sampling.check(vocab)?;
        let prompt_tokens = self.prompt.len();
        if prompt_tokens == 0 {
            return Err(Error::PromptEmpty);
        }
        let asked: &[TokenId] = if let Goal::Logits(ids) = &self.goal { ids } else { &[] };
        if let Some(&found) = self.prompt.iter().chain(asked).find(|id| id.index() >= vocab) {
            return Err(Error::TokenUnknown { found, vocab });
        }
        match (vision, self.visuals.is_empty()) {
            (_, true) => {}
            (Some(vision), false) => vision.check(&self.prompt, &self.visuals)?,
            (None, false) => return Err(Error::Blind),
        }
        if prompt_tokens > capacity_tokens {
            let hint = String::new();
            return Err(Error::PromptTooLong { prompt_tokens, context_tokens: capacity_tokens, hint });
        }
        Ok(())
    }
}

/// What the engine says of a request. The last event is `Finished` or `GivenUp`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Progress through the prompt.
    Prefill {
        /// Tokens computed, or found already computed.
        done_tokens: usize,
        /// Tokens of the prompt.
        total_tokens: usize,
        /// Tokens whose state was still there from an earlier request.
        cached_tokens: usize,
        /// Why there were not more of these, if more than a page was left to compute.
        missed: Option<Missed>,
    },
    /// Log-probabilities of the next tokens of the prompt, from its second token on; in pieces.
    Prompt(Vec<TokenLogprobs>),
    /// A token was generated.
    Token {
        /// The token; a stop token too.
        id: TokenId,
        /// If the request wants them.
        logprobs: Option<TokenLogprobs>,
    },
    /// The thought at hand is ended for the model; the tokens that do it follow.
    ThoughtEnded(ThoughtEnd),
    /// The numbers that the request wants instead of an answer.
    Values(Vec<f32>),
    /// Nothing more will come.
    Finished(Finish),
    /// The request could not be finished, for this reason; nothing more will come.
    GivenUp(String),
}

/// What the cache did not have of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missed {
    /// Why it was not there.
    pub why: Miss,
    /// So many of the prompt's first tokens are those of an earlier text that is still known.
    pub common_tokens: usize,
}

/// Why a part of a prompt had to be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miss {
    /// No text that is known goes on like this.
    New,
    /// It was there, and its pages were given to others.
    Evicted,
    /// Its pages are there, and no recurrent state from which to go on behind them.
    NoState,
    /// Its own log-probabilities are wanted, so it is computed whatever is there.
    Scored,
}

impl Miss {
    /// The word for logs.
    pub fn name(self) -> &'static str {
        match self {
            Miss::New => "new",
            Miss::Evicted => "evicted",
            Miss::NoState => "no_state",
            Miss::Scored => "scored",
        }
    }
}

/// Log-probabilities of one token, natural logarithms of the model's own distribution before sampling settings.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token chosen.
    pub id: TokenId,
    /// Its log-probability.
    pub logprob: f32,
    /// The best tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token, a stop text, or the guide's end.
    Stop,
    /// As many tokens as were asked for, or as the context holds.
    Length,
    /// The caller cancelled it.
    Cancelled,
}

impl Finish {
    /// The word that interfaces use.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "cancelled",
        }
    }
}
