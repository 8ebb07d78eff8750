//! Whether tokens are guessed ahead of the model.

/// Where guesses of the next tokens come from. The model computes several at once in about the time of one, and only those
/// that it would have said itself become part of the answer: the choice changes the speed, never a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculate {
    /// Wherever guesses come from, as many as pay.
    #[default]
    Auto,
    /// From earlier places of prompt and answer that went as the text does now.
    Ngram,
    /// From the model's own block for it (multi-token prediction).
    Mtp,
    /// No guesses.
    Off,
}

impl Speculate {
    /// Whether earlier places are looked at.
    pub(crate) fn looks_up(self) -> bool {
        matches!(self, Speculate::Auto | Speculate::Ngram)
    }

    /// Whether the model's block is asked, where it has one.
    pub(crate) fn asks_block(self) -> bool {
        matches!(self, Speculate::Auto | Speculate::Mtp)
    }
}
