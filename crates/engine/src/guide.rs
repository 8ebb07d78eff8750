//! What steers an answer from outside the sampler: grammars that allow some tokens only, budgets that end a thought.

use qwenkit_tensor::TokenId;

/// Steers one answer. It runs on the engine's thread, so a slow guide slows everybody's answers.
pub trait Guide: Send {
    /// Sets the logits, (V) over real tokens, of everything that may not come next to minus infinity.
    fn mask(&mut self, logits: &mut [f32]);

    /// Hears of the token that came, and says how to go on. `mask` is asked again before the next token unless that one is
    /// forced; forced tokens are heard of here like others.
    fn accept(&mut self, id: TokenId) -> Verdict;
}

/// Why a thought was ended for the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThoughtEnd {
    /// It had as many tokens as it may.
    Budget,
    /// It went round in circles.
    Loop,
}

impl ThoughtEnd {
    /// The word that interfaces use.
    pub fn name(self) -> &'static str {
        match self {
            ThoughtEnd::Budget => "budget",
            ThoughtEnd::Loop => "loop",
        }
    }
}

/// How an answer goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As sampled.
    Continue,
    /// With these tokens, whatever the model would say.
    Force(Vec<TokenId>),
    /// So too, because the thought at hand had to be ended.
    EndThought(ThoughtEnd, Vec<TokenId>),
    /// Not at all.
    Stop,
}
