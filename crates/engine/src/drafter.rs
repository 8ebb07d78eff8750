//! Guesses of what one answer says next, each with its chance, and what came of earlier guesses.
//!
//! Guesses come from an earlier place of the same text, from what a guide forces, and from a block of the model that guesses. How
//! far a guess is trusted is learnt from the answer itself: by how many tokens the text went as at that place, or by how many
//! guesses of the block it lies behind, how often it was right. Contract: a guess never changes an answer. Not here: how
//! many guesses are worth their time (`worth`), and the block's part (`trail`).

use std::collections::VecDeque;

use qwenkit_tensor::TokenId;

use crate::lookup::{Lookup, Place};

/// The most guesses at once: more rows than that cost as much each as a prompt's.
pub(crate) const GUESSES_MAX: usize = 24;
/// Classes of places by the tokens that they match, from these numbers on, with the chance that is believed before anything is
/// known. Those below `lookup::RUN` are of texts that went as at a place for long, said something else, and may go on as there.
const CLASSES: [(usize, f32); 8] =
    [(0, 0.4), (1, 0.5), (2, 0.6), (3, 0.35), (4, 0.5), (6, 0.65), (9, 0.85), (17, 0.95)];
/// Guesses that a model's block makes one behind the other, with the chances that are believed of them.
const BLOCK: [f32; 4] = [0.7, 0.6, 0.5, 0.4];
/// Guesses that a belief weighs as much as.
const BELIEF: f32 = 4.0;
/// Outcomes after which older ones count half.
const MEMORY: f32 = 64.0;
/// Tokens that must have matched for a place to be kept after another token came.
const WORTH_KEEPING: usize = 8;

/// One answer's guesses.
#[derive(Default)]
pub(crate) struct Drafter {
    lookup: Lookup,
    /// The place that the text goes by, as of `heard` tokens.
    place: Option<Place>,
    heard: usize,
    /// Of each class, guesses that were right and all.
    outcomes: [(f32, f32); CLASSES.len() + BLOCK.len()],
    guesses: Vec<Guess>,
}

/// The chances of guesses, each if all before it come true.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Chances {
    pub(crate) of_guesses: Vec<f32>,
    /// Whether the model's block has to make them.
    pub(crate) by_block: bool,
}

/// One token that may come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Guess {
    pub(crate) id: TokenId,
    /// That it comes, if all guesses before it do.
    pub(crate) chance: f32,
    /// Whose outcome it is.
    class: Option<usize>,
}

impl Drafter {
    /// The guesses at hand.
    pub(crate) fn guesses(&self) -> &[Guess] {
        &self.guesses
    }

    /// Guesses up to `most` tokens behind `text`, the first of which are `forced`.
    pub(crate) fn guess(&mut self, text: &[TokenId], forced: &VecDeque<TokenId>, most: usize) {
        self.guesses.clear();
        self.guesses.extend(forced.iter().take(most).map(|&id| Guess { id, chance: 1.0, class: None }));
        self.follow(text);
        if let (true, Some(place)) = (forced.is_empty(), self.place) {
            for i in 0..most {
                // A text that repeats itself is its own continuation.
                let Some(id) = text
                    .get(place.next + i)
                    .copied()
                    .or_else(|| Some(self.guesses.get(place.next + i - text.len())?.id))
                else {
                    break;
                };
                let class = class_of(place.matched + i);
                self.guesses.push(Guess { id, chance: self.chance(class), class: Some(class) });
            }
        }
    }

    /// The chances of the guesses at hand, or of those that the model's block would make where these are better for their cost,
    /// which is so many times that of the others.
    pub(crate) fn chances(&mut self, block_cost: Option<f64>, most: usize) -> Chances {
        let first = self.guesses.first().map_or(0.0, |guess| f64::from(guess.chance));
        let of_block = || (0..BLOCK.len().min(most)).map(|i| self.chance(CLASSES.len() + i)).collect::<Vec<_>>();
        match block_cost {
            Some(cost) if first < 1.0 && f64::from(self.chance(CLASSES.len())) > first * cost => {
                let of_guesses = of_block();
                self.guesses.clear();
                Chances { of_guesses, by_block: true }
            }
            _ => Chances { of_guesses: self.guesses.iter().map(|guess| guess.chance).collect(), by_block: false },
        }
    }

    /// Takes in the block's next guess.
    pub(crate) fn add(&mut self, id: TokenId) {
        let class = CLASSES.len() + self.guesses.len().min(BLOCK.len() - 1);
        self.guesses.push(Guess { id, chance: self.chance(class), class: Some(class) });
    }

    /// Learns what came of the guesses at hand: the first `right` of them were said, and if `wrong`, another token than the
    /// next. None are at hand afterwards.
    pub(crate) fn judge(&mut self, right: usize, wrong: bool) {
        let judged = self.guesses.iter().take(right + usize::from(wrong)).enumerate();
        for (i, class) in judged.filter_map(|(i, guess)| Some((i, guess.class?))) {
            let (hits, all) = &mut self.outcomes[class];
            *hits += if i < right { 1.0 } else { 0.0 };
            *all += 1.0;
            if *all > MEMORY {
                (*hits, *all) = (*hits / 2.0, *all / 2.0);
            }
        }
        self.guesses.clear();
    }

    fn chance(&self, class: usize) -> f32 {
        let (hits, all) = self.outcomes[class];
        let belief = CLASSES.get(class).map_or_else(|| BLOCK[class - CLASSES.len()], |(_, belief)| *belief);
        (hits + BELIEF * belief) / (all + BELIEF)
    }

    /// Goes on with the place by what has come since, or takes a better one.
    fn follow(&mut self, text: &[TokenId]) {
        for said in &text[self.heard.min(text.len())..] {
            let there = |at: usize| text.get(at) == Some(said);
            self.place = self.place.and_then(|Place { next, matched }| {
                let (next, matched) = match matched {
                    _ if there(next) => (next + 1, matched + 1),
                    0..WORTH_KEEPING => return None,
                    // One token was left out, or said instead.
                    _ if there(next + 1) => (next + 2, 1),
                    _ => (next + 1, 0),
                };
                Some(Place { next, matched })
            });
        }
        self.heard = text.len();
        let kept = self.place.filter(|place| place.next < text.len());
        let found = self.lookup.find(text);
        self.place = match (kept, found) {
            (Some(kept), Some(found)) if found.matched <= kept.matched => Some(kept),
            (kept, found) => found.or(kept),
        };
    }
}

fn class_of(matched: usize) -> usize {
    CLASSES.partition_point(|(from, _)| *from <= matched) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(text: &str) -> Vec<TokenId> {
        text.bytes().map(|b| TokenId(b.into())).collect()
    }

    fn guessed(drafter: &mut Drafter, text: &str, most: usize) -> String {
        drafter.guess(&ids(text), &VecDeque::new(), most);
        drafter.guesses().iter().map(|guess| char::from(guess.id.0 as u8)).collect()
    }

    #[test]
    fn guesses_go_on_as_the_text_did() {
        assert_eq!(guessed(&mut Drafter::default(), "nothing twice", 8), "");
        let mut drafter = Drafter::default();
        assert_eq!(guessed(&mut drafter, "a long story. a lon", 8), "g story.");
        assert_eq!(guessed(&mut drafter, "a long story. a lon", 2), "g ");
        assert_eq!(guessed(&mut Drafter::default(), "abcabc", 8), "abcabcab", "round and round");
    }

    #[test]
    fn another_token_does_not_end_a_long_likeness() {
        let original = "let total = price * count; return total;";
        let mut drafter = Drafter::default();
        let mut text = format!("{original}\nlet total = price ");
        assert_eq!(guessed(&mut drafter, &text, 4), "* co");
        // One token instead of another, then one left out.
        text.push('+');
        assert_eq!(guessed(&mut drafter, &text, 4), " cou");
        text.push_str(" count return");
        assert_eq!(guessed(&mut drafter, &text, 6), " total");
        // Two others in a row end it.
        text.push_str("!?");
        assert_eq!(guessed(&mut drafter, &text, 4), "");
    }

    #[test]
    fn chances_follow_what_came_of_guesses() {
        let text = "a long story. a lon";
        let mut drafter = Drafter::default();
        guessed(&mut drafter, text, 2);
        let believed = drafter.guesses()[0].chance;
        for _ in 0..30 {
            guessed(&mut drafter, text, 2);
            drafter.judge(0, true);
        }
        guessed(&mut drafter, text, 2);
        let seen = drafter.guesses()[0].chance;
        assert!(seen < 0.1 && seen < believed, "{seen} after {believed}");
        for _ in 0..200 {
            guessed(&mut drafter, text, 2);
            drafter.judge(1, false);
        }
        guessed(&mut drafter, text, 2);
        assert!(drafter.guesses()[0].chance > 0.9, "it learns anew");
        assert!(drafter.guesses()[0].chance <= 1.0);
    }

    #[test]
    fn forced_tokens_are_certain() {
        let mut drafter = Drafter::default();
        let forced: VecDeque<TokenId> = ids("yes").into();
        drafter.guess(&ids("abcabc"), &forced, 2);
        assert!(
            drafter
                .guesses()
                .iter()
                .map(|guess| (guess.id, guess.chance))
                .eq(ids("ye").into_iter().map(|id| (id, 1.0)))
        );
    }
}
