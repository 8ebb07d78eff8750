//! Where a text went before as it goes now: the earlier place whose last tokens are most like the latest ones.
//!
//! Prompt lookup, as in Saxena 2023 ("prompt lookup decoding"); places are found by chains of equal runs, as in LZ77. What
//! follows there is a guess of what comes next. Not here: whether to believe it (`drafter`).

use std::collections::HashMap;

use qwenkit_tensor::TokenId;

/// Tokens of a run: fewer say nothing about the next one.
pub(crate) const RUN: usize = 3;
/// Earlier places that are looked at.
const PLACES: usize = 24;
/// Tokens beyond which one place is as good as another.
const LONGEST: usize = 32;

/// The runs of one text that only grows.
#[derive(Default)]
pub(crate) struct Lookup {
    /// Behind the latest of each run.
    latest: HashMap<[TokenId; RUN], u32>,
    /// For each position from `RUN` on, the one behind the same run before it; 0 for none.
    before: Vec<u32>,
}

/// A place in a text where it went as at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The token that followed there.
    pub(crate) next: usize,
    /// Tokens before it that are like the last ones; no more than `LONGEST` are counted.
    pub(crate) matched: usize,
}

impl Lookup {
    /// The place most like the end of `text`, of equals the latest; `text` begins with what it was when last asked.
    pub(crate) fn find(&mut self, text: &[TokenId]) -> Option<Place> {
        self.read(text);
        let mut next = *self.latest.get(text.last_chunk::<RUN>()?)? as usize;
        let mut best = Place { next: 0, matched: 0 };
        for _ in 0..PLACES {
            let here = text[..next].iter().rev();
            let matched = here.zip(text.iter().rev()).take(LONGEST).take_while(|(a, b)| a == b).count();
            if matched > best.matched {
                best = Place { next, matched };
            }
            next = self.before[next - RUN] as usize;
            if matched == LONGEST || next == 0 {
                break;
            }
        }
        Some(best)
    }

    /// Takes in all runs but the last, which has nothing behind it.
    fn read(&mut self, text: &[TokenId]) {
        for end in self.before.len() + RUN..text.len() {
            let Some(run) = text[..end].last_chunk::<RUN>() else { continue };
            self.before.push(self.latest.insert(*run, end as u32).unwrap_or(0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(text: &str) -> Vec<TokenId> {
        text.bytes().map(|b| TokenId(b.into())).collect()
    }

    fn found(text: &str) -> Option<(usize, usize)> {
        Lookup::default().find(&ids(text)).map(|place| (place.next, place.matched))
    }

    #[test]
    fn the_longest_match_wins_and_of_equals_the_latest() {
        assert_eq!(found("one two three"), None);
        assert_eq!(found("ab"), None);
        assert_eq!(found("say abc. abc? xabc"), Some((12, 3)));
        assert_eq!(found("xabc. abc? xabc"), Some((4, 4)), "the earlier one is longer");
        assert_eq!(found("aaaaaa"), Some((5, 5)), "a place may reach into the end itself");
    }

    #[test]
    fn a_growing_text_finds_what_a_whole_one_does() {
        let text = ids("the cat sat on the mat and the cat ate; the cat sat on the rat and the cat sat on");
        let mut growing = Lookup::default();
        for end in 0..=text.len() {
            assert_eq!(growing.find(&text[..end]), Lookup::default().find(&text[..end]), "{end} tokens");
        }
    }
}
