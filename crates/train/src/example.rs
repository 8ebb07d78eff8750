//! What is learnt from, in token ids, and the lessons that it makes: several sequences side by side, none seeing another,
//! nothing padded.

use std::ops::Range;

use qwenkit_models::{Aim, Lesson};
use qwenkit_tensor::TokenId;

/// One sequence to learn from.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Its tokens.
    pub ids: Vec<TokenId>,
    /// What is learnt from it.
    pub goal: Goal,
}

/// What is learnt from a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum Goal {
    /// The tokens so marked; the first of a sequence has nothing before it and cannot be.
    Tokens(Vec<bool>),
    /// Its label.
    Label(u32),
}

impl Example {
    /// How many losses it gives.
    pub fn wanted(&self) -> usize {
        match &self.goal {
            Goal::Tokens(marks) => marks.iter().skip(1).filter(|mark| **mark).count(),
            Goal::Label(_) => 1,
        }
    }
}

/// Sequences of one batch, with the room that a lesson borrows.
#[derive(Default)]
pub struct Packed {
    tokens: Vec<TokenId>,
    seqs: Vec<Range<usize>>,
    rows: Vec<usize>,
    targets: Vec<u32>,
    scales: Vec<f32>,
    of_labels: bool,
    /// Of labels, what of each is learnt as all labels'.
    pub smoothing: f32,
}

impl Packed {
    /// Packs examples, each loss counting `scale`.
    pub fn new<'a>(examples: impl IntoIterator<Item = &'a Example>, scale: f32) -> Packed {
        Packed::weighted(examples.into_iter().map(|example| (example, scale)))
    }

    /// Packs examples, each with what its losses count.
    pub fn weighted<'a>(examples: impl IntoIterator<Item = (&'a Example, f32)>) -> Packed {
        let mut packed = Packed::default();
        for (example, scale) in examples {
            let start = packed.tokens.len();
            packed.tokens.extend_from_slice(&example.ids);
            packed.seqs.push(start..packed.tokens.len());
            match &example.goal {
                Goal::Tokens(marks) => {
                    for (i, _) in marks.iter().enumerate().skip(1).filter(|(_, mark)| **mark) {
                        packed.rows.push(start + i - 1);
                        packed.targets.push(example.ids[i].0);
                        packed.scales.push(scale);
                    }
                }
                Goal::Label(label) => {
                    packed.of_labels = true;
                    packed.targets.push(*label);
                    packed.scales.push(scale);
                }
            }
        }
        packed
    }

    /// How many tokens.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// What each loss is of: the token, or the label.
    pub fn targets(&self) -> &[u32] {
        &self.targets
    }

    /// The lesson.
    pub fn lesson(&self) -> Lesson<'_> {
        let aim = match self.of_labels {
            true => Aim::Labels { labels: &self.targets, scales: &self.scales, smoothing: self.smoothing },
            false => Aim::NextTokens { rows: &self.rows, targets: &self.targets, scales: &self.scales },
        };
        Lesson { tokens: &self.tokens, seqs: &self.seqs, aim }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_those_before_the_marked_tokens() {
        let example = |ids: &[u32], marks: &[u8]| Example {
            ids: ids.iter().map(|id| TokenId(*id)).collect(),
            goal: Goal::Tokens(marks.iter().map(|mark| *mark == 1).collect()),
        };
        let examples = [example(&[5, 6, 7], &[1, 0, 1]), example(&[8, 9], &[0, 1])];
        assert_eq!([examples[0].wanted(), examples[1].wanted()], [1, 1]);
        let packed = Packed::new(&examples, 0.5);
        let Aim::NextTokens { rows, targets, scales } = packed.lesson().aim else { panic!("tokens are the aim") };
        assert_eq!((rows, targets, scales), (&[1, 3][..], &[7, 9][..], &[0.5, 0.5][..]));
        assert_eq!(packed.lesson().seqs, [0..3, 3..5]);
    }
}
