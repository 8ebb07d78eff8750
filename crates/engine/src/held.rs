//! The guide of an answer: ends thoughts that are too long or go round in circles, then holds the answer to its form.
//!
//! Contract: a form begins behind the thought, never in it; a thought is ended by words of this program and the model's
//! own end of thoughts, so the model goes on as if it had ended it. Without a limit, a form or a lone call nothing is
//! touched.

use std::collections::VecDeque;

use qwenkit_tensor::TokenId;
use qwenkit_text::{Grammar, Opening, SpecialTokens, Tokenizer};

use crate::guide::{Guide, ThoughtEnd, Verdict};

/// What a thought that is cut off ends with.
const LAST_THOUGHT: &str = "\n\nI have thought long enough; now I give the answer that follows from this.\n";
/// Tokens that are looked at for circles.
const WINDOW: usize = 1024;
/// The longest circle that is seen.
const PERIOD_MAX: usize = 256;
/// Tokens that must have gone in a circle, and rounds of it.
const CIRCLE_TOKENS: usize = 128;
const CIRCLE_ROUNDS: usize = 4;

/// What an answer is held to.
#[derive(Clone, Debug, Default)]
pub struct Hold {
    /// The form that the answer proper must have.
    pub form: Option<Grammar>,
    /// The form of each tool call in an answer that is free otherwise; its tag opens it.
    pub calls: Option<Grammar>,
    /// Tokens of thought at most.
    pub thought_tokens: Option<usize>,
    /// Lets thoughts that go round in circles go on.
    pub circles: bool,
    /// Ends the answer behind its first tool call.
    pub one_call: bool,
}

impl Hold {
    /// The guide of an answer to a prompt with this opening; none where there is nothing to hold.
    pub(crate) fn guide(self, opening: Opening, tokenizer: &Tokenizer, ends: &[TokenId]) -> Option<Box<dyn Guide>> {
        let tags = Tags::of(tokenizer);
        let thinks = tags.is_some() && opening != Opening::Closed;
        let watches = thinks && (self.thought_tokens.is_some() || !self.circles);
        let call_end = if self.one_call { tokenizer.token_id("</tool_call>") } else { None };
        let call_open = tokenizer.token_id("<tool_call>").filter(|_| self.calls.is_some());
        if self.form.is_none() && !watches && call_end.is_none() && call_open.is_none() {
            return None;
        }
        let place = match (opening, &tags) {
            (Opening::Open, Some(_)) => Place::Thought,
            (Opening::Unopened, Some(_)) => Place::Start,
            _ => Place::Answer,
        };
        let guide = Held {
            hold: self,
            tags,
            call_open,
            call_end,
            call: None,
            ends: ends.to_vec(),
            place,
            thought: Thought::default(),
            forced: 0,
            of_form: false,
        };
        Some(Box::new(guide))
    }
}

/// The tokens around thoughts.
struct Tags {
    open: TokenId,
    close: TokenId,
    /// A line without words, which stands behind a thought.
    blank: Vec<TokenId>,
    /// `LAST_THOUGHT`
    last: Vec<TokenId>,
}

impl Tags {
    fn of(tokenizer: &Tokenizer) -> Option<Tags> {
        let text = |text| tokenizer.encode(text, SpecialTokens::AsText).ok();
        Some(Tags {
            open: tokenizer.token_id("<think>")?,
            close: tokenizer.token_id("</think>")?,
            blank: text("\n\n")?,
            last: text(LAST_THOUGHT)?,
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before the first token, which may open a thought.
    Start,
    Thought,
    Answer,
}

/// The thought so far.
#[derive(Default)]
struct Thought {
    tokens: usize,
    latest: VecDeque<TokenId>,
}

impl Thought {
    fn push(&mut self, id: TokenId) {
        self.tokens += 1;
        self.latest.push_back(id);
        if self.latest.len() > WINDOW {
            self.latest.pop_front();
        }
    }

    /// Whether the latest tokens repeat, word for word, what came just before them.
    fn goes_in_circles(&self) -> bool {
        let n = self.latest.len();
        (1..=PERIOD_MAX.min(n / CIRCLE_ROUNDS)).any(|period| {
            let tokens = CIRCLE_TOKENS.max(period * CIRCLE_ROUNDS);
            tokens <= n && (n - tokens + period..n).all(|i| self.latest[i] == self.latest[i - period])
        })
    }
}

struct Held {
    hold: Hold,
    tags: Option<Tags>,
    /// The token that begins a call that has a form.
    call_open: Option<TokenId>,
    /// The token that ends the only call.
    call_end: Option<TokenId>,
    /// The form of the call at hand.
    call: Option<Grammar>,
    ends: Vec<TokenId>,
    place: Place,
    thought: Thought,
    /// Tokens of a verdict that have not come yet, and whether they are part of the form.
    forced: usize,
    of_form: bool,
}

impl Held {
    fn force(&mut self, ids: Vec<TokenId>, of_form: bool) -> Verdict {
        (self.forced, self.of_form) = (ids.len(), of_form);
        if ids.is_empty() { Verdict::Continue } else { Verdict::Force(ids) }
    }

    fn think(&mut self, id: TokenId) -> Verdict {
        let Some(tags) = &self.tags else { return Verdict::Continue };
        if id == tags.close {
            self.place = Place::Answer;
            let blank = tags.blank.clone();
            return match self.hold.form {
                Some(_) => self.force(blank, false),
                None => Verdict::Continue,
            };
        }
        self.thought.push(id);
        let is_long = self.hold.thought_tokens.is_some_and(|most| self.thought.tokens >= most);
        // Looking for circles now and then is soon enough.
        let circles = !self.hold.circles && self.thought.tokens.is_multiple_of(32) && self.thought.goes_in_circles();
        if !is_long && !circles {
            return Verdict::Continue;
        }
        self.place = Place::Answer;
        let end = [tags.last.as_slice(), &[tags.close], &tags.blank].concat();
        let why = if is_long { ThoughtEnd::Budget } else { ThoughtEnd::Loop };
        (self.forced, self.of_form) = (end.len(), false);
        Verdict::EndThought(why, end)
    }

    fn answer(&mut self, id: TokenId) -> Verdict {
        if self.call_open == Some(id) && self.call.is_none() {
            self.call.clone_from(&self.hold.calls);
        }
        let ends_only_call = self.call_end == Some(id);
        let Some(form) = self.call.as_mut().or(self.hold.form.as_mut()) else {
            return if ends_only_call { Verdict::Stop } else { Verdict::Continue };
        };
        // A token that was not allowed can only be one that ends the answer.
        if form.accept(id).is_err() || ends_only_call {
            return Verdict::Stop;
        }
        // Until the last forced token has come, nothing new follows from the form.
        if self.forced > 0 {
            return Verdict::Continue;
        }
        let next = form.forced();
        match form.is_over() {
            true if self.call.take().is_some() => Verdict::Continue,
            true => Verdict::Stop,
            false => self.force(next, true),
        }
    }
}

impl Guide for Held {
    fn mask(&mut self, logits: &mut [f32]) {
        let thought = match (self.place, &self.tags) {
            (Place::Thought, _) => return,
            (Place::Start, Some(tags)) => logits.get(tags.open.0 as usize).map(|logit| (tags.open, *logit)),
            _ => None,
        };
        if let Some(form) = self.call.as_mut().or(self.hold.form.as_mut()) {
            if form.mask(logits, &self.ends).is_err() {
                // The form can no longer be followed: the answer ends here rather than break it.
                let ends: Vec<usize> = self.ends.iter().map(|id| id.0 as usize).collect();
                for (id, logit) in logits.iter_mut().enumerate() {
                    *logit = if ends.contains(&id) { 0.0 } else { f32::NEG_INFINITY };
                }
            } else if let Some((id, logit)) = thought {
                logits[id.0 as usize] = logit;
            }
        }
    }

    fn accept(&mut self, id: TokenId) -> Verdict {
        if self.forced > 0 {
            self.forced -= 1;
            return if self.of_form { self.answer(id) } else { Verdict::Continue };
        }
        match self.place {
            Place::Start if self.tags.as_ref().is_some_and(|tags| id == tags.open) => {
                self.place = Place::Thought;
                Verdict::Continue
            }
            Place::Start => {
                self.place = Place::Answer;
                self.answer(id)
            }
            Place::Thought => self.think(id),
            Place::Answer => self.answer(id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thought(ids: impl IntoIterator<Item = u32>) -> Thought {
        let mut thought = Thought::default();
        ids.into_iter().for_each(|id| thought.push(TokenId(id)));
        thought
    }

    #[test]
    fn circles_are_seen_and_lists_are_not() {
        for period in [1, 2, 7, 40, 200, 256] {
            let lead = (0..37).map(|i| 1000 + i);
            let circle = (0..1024).map(move |i| i % period);
            assert!(thought(lead.chain(circle)).goes_in_circles(), "period {period}");
        }
        // Numbered lines are alike but for their numbers.
        let list = (0..100).flat_map(|line| [7, 8, 9, 500 + line, 10, 11, 12, 13]);
        assert!(!thought(list).goes_in_circles());
        // A few rounds may be meant.
        assert!(!thought((0..60).map(|i| i % 20).chain(100..160)).goes_in_circles());
        assert!(!thought((0..3).flat_map(|_| 0..40)).goes_in_circles());
    }

    #[test]
    fn nothing_to_hold_is_no_guide() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/text/tokenizer.json");
        let tokenizer = Tokenizer::from_json(&std::fs::read(path).unwrap(), path).unwrap();
        for opening in [Opening::Unopened, Opening::Open, Opening::Closed] {
            assert!(Hold::default().guide(opening, &tokenizer, &[]).is_none(), "a vocabulary without thoughts");
        }
    }

    /// A vocabulary with thoughts and calls, of which a reserved token each stands for a tag.
    fn tokenizer() -> Tokenizer {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/text/tokenizer.json");
        let mut text = std::fs::read_to_string(path).unwrap();
        for (i, tag) in ["<think>", "</think>", "<tool_call>", "</tool_call>"].into_iter().enumerate() {
            text = text.replace(&format!("<|reserved_{}|>", 278 + i), tag);
        }
        Tokenizer::from_json(text.as_bytes(), path).unwrap()
    }

    #[test]
    fn a_thought_ends_at_its_budget_and_is_left_alone_before() {
        let tokenizer = tokenizer();
        let close = tokenizer.token_id("</think>").unwrap();
        let hold = Hold { thought_tokens: Some(3), ..Hold::default() };
        let mut guide = hold.clone().guide(Opening::Open, &tokenizer, &[]).unwrap();
        assert_eq!(guide.accept(TokenId(40)), Verdict::Continue);
        assert_eq!(guide.accept(TokenId(41)), Verdict::Continue);
        let Verdict::EndThought(ThoughtEnd::Budget, ids) = guide.accept(TokenId(42)) else {
            panic!("the budget is spent")
        };
        assert_eq!(ids.iter().filter(|&&id| id == close).count(), 1);
        assert!(ids.iter().all(|&id| guide.accept(id) == Verdict::Continue));
        assert!((0..50).all(|id| guide.accept(TokenId(id)) == Verdict::Continue), "the answer itself has no budget");
        // One that ends by itself in time is not touched.
        let mut guide = hold.guide(Opening::Open, &tokenizer, &[]).unwrap();
        assert_eq!([guide.accept(TokenId(40)), guide.accept(close)], [Verdict::Continue, Verdict::Continue]);
        assert!((0..50).all(|id| guide.accept(TokenId(id)) == Verdict::Continue));
    }

    #[test]
    fn a_thought_that_goes_in_circles_is_ended_as_such() {
        let tokenizer = tokenizer();
        let mut guide = Hold::default().guide(Opening::Open, &tokenizer, &[]).unwrap();
        let mut verdicts = (0..2000).map(|i| guide.accept(TokenId(40 + i % 7)));
        let ended = verdicts.find(|verdict| *verdict != Verdict::Continue);
        assert!(matches!(ended, Some(Verdict::EndThought(ThoughtEnd::Loop, _))), "{ended:?}");
    }

    #[test]
    fn the_only_call_ends_the_answer() {
        let tokenizer = tokenizer();
        let hold = Hold { one_call: true, ..Hold::default() };
        let mut guide = hold.guide(Opening::Closed, &tokenizer, &[]).unwrap();
        assert_eq!(guide.accept(tokenizer.token_id("<tool_call>").unwrap()), Verdict::Continue);
        assert_eq!(guide.accept(TokenId(50)), Verdict::Continue);
        assert_eq!(guide.accept(tokenizer.token_id("</tool_call>").unwrap()), Verdict::Stop);
    }
}
