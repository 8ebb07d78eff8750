//! What goes into the engine and what comes out, in token ids.

use qwenkit_tensor::TokenId;

use crate::sampler::Sampling;

/// A sequence to continue, or to look at.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt; not empty.
    pub prompt: Vec<TokenId>,
    /// What is wanted of it.
    pub goal: Goal,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Tokens that end the answer.
    pub stop_tokens: Vec<TokenId>,
    /// Log-probabilities wanted: of the chosen token and of so many best ones.
    pub logprobs: Option<usize>,
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

/// What the engine says of a request. The last event is `Finished`.
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
    },
    /// A token was generated.
    Token {
        /// The token; a stop token too.
        id: TokenId,
        /// If the request wants them.
        logprobs: Option<TokenLogprobs>,
    },
    /// The numbers that the request wants instead of an answer.
    Values(Vec<f32>),
    /// Nothing more will come.
    Finished(Finish),
}

/// Log-probabilities of one generated token, natural logarithms of the model's own distribution before sampling settings.
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
    /// A stop token or stop text.
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
