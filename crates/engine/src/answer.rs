//! An answer on its way: the engine's events become pieces of text. `Transcript` is that and no more, so that whoever
//! hears the events may do it on any thread; `Answer` waits for them.

use std::{
    sync::mpsc::{Receiver, channel},
    time::Instant,
};

use qwenkit_tensor::TokenId;
use qwenkit_text::{Opening, StreamDecoder};

use crate::{
    engine::Canceller,
    error::Error,
    guide::ThoughtEnd,
    request::{Event, Finish, Missed, TokenLogprobs},
    sequence::Listener,
    stop_text::{Passed, StopText},
};

/// A part of an answer.
#[derive(Clone, Debug)]
pub enum Piece {
    /// Progress through the prompt.
    Prefill {
        /// Tokens done.
        done_tokens: usize,
        /// Tokens of the prompt.
        total_tokens: usize,
        /// Milliseconds until it is through, at the pace since the first word of it.
        left_ms: Option<f64>,
    },
    /// Log-probabilities of the next tokens of the prompt, from its second token on.
    Prompt(Vec<TokenLogprobs>),
    /// Some text; whole characters.
    Text(TextPiece),
    /// The end.
    Done(Summary),
}

/// Text that has become certain.
#[derive(Clone, Debug, Default)]
pub struct TextPiece {
    /// The text.
    pub text: String,
    /// Tokens generated since the last piece; their text may come later, or has come before.
    pub ids: Vec<TokenId>,
    /// Of those tokens, if wanted.
    pub logprobs: Vec<TokenLogprobs>,
}

/// A whole answer, in numbers.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Generated tokens, the one that ended it included.
    pub ids: Vec<TokenId>,
    /// The answer.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// The stop text that ended it, if one did.
    pub stop_text: Option<String>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens whose state was still there from before.
    pub cached_tokens: usize,
    /// What was not there of a long prompt, and why.
    pub missed: Option<Missed>,
    /// Why the thought was ended for the model, if it was.
    pub thought_end: Option<ThoughtEnd>,
    /// Milliseconds from the question to the first token.
    pub prompt_ms: f64,
    /// Milliseconds from the first token to the last.
    pub generate_ms: f64,
    /// The seed of its random numbers.
    pub seed: u64,
}

/// Makes pieces of an answer's events. Dropping it before the end cancels the request.
pub struct Transcript {
    canceller: Canceller,
    /// Taken at the end.
    decoder: Option<StreamDecoder>,
    stop_text: StopText,
    stop_tokens: Vec<TokenId>,
    prompt_ids: Vec<TokenId>,
    opening: Opening,
    summary: Summary,
    /// No stop text ends the answer before it has so many tokens.
    min_tokens: usize,
    asked: Instant,
    /// When the first piece of the prompt was through, and how many tokens.
    begun: Option<(Instant, usize)>,
    /// Tokens of the prompt that are through.
    read_tokens: usize,
    ended: bool,
}

impl Transcript {
    pub(crate) fn new(canceller: Canceller, plan: TranscriptPlan) -> Transcript {
        Transcript {
            canceller,
            decoder: Some(plan.decoder),
            stop_text: StopText::new(plan.stop),
            stop_tokens: plan.stop_tokens,
            summary: Summary {
                ids: Vec::new(),
                text: String::new(),
                finish: Finish::Cancelled,
                stop_text: None,
                prompt_tokens: plan.prompt_ids.len(),
                cached_tokens: 0,
                missed: None,
                thought_end: None,
                prompt_ms: 0.0,
                generate_ms: 0.0,
                seed: plan.seed,
            },
            prompt_ids: plan.prompt_ids,
            opening: plan.opening,
            min_tokens: plan.min_tokens,
            begun: None,
            read_tokens: 0,
            asked: plan.asked,
            ended: false,
        }
    }

    /// A handle that ends the answer from anywhere.
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// The prompt's tokens.
    pub fn prompt_ids(&self) -> &[TokenId] {
        &self.prompt_ids
    }

    /// How the prompt leaves the thought of the answer.
    pub fn opening(&self) -> Opening {
        self.opening
    }

    /// The seed of its random numbers.
    pub fn seed(&self) -> u64 {
        self.summary.seed
    }

    /// Tokens of the prompt that are through, and of the answer.
    pub fn tokens_so_far(&self) -> (usize, usize) {
        (self.read_tokens, self.summary.ids.len())
    }

    /// Takes in an event that happened at `time`; returns what has become certain with it, in order. The last piece is
    /// `Done`.
    ///
    /// # Errors
    /// When the answer cannot be finished; nothing more comes then.
    pub fn push(&mut self, time: Instant, event: Event) -> Result<Vec<Piece>, Error> {
        Ok(match event {
            Event::Prefill { done_tokens, total_tokens, cached_tokens, missed } => {
                (self.summary.cached_tokens, self.summary.missed) = (cached_tokens, missed);
                self.read_tokens = done_tokens;
                let (begun, first_tokens) = *self.begun.get_or_insert((time, done_tokens));
                let per_token_ms =
                    time.saturating_duration_since(begun).as_secs_f64() * 1e3 / (done_tokens - first_tokens) as f64;
                let left_ms = (done_tokens > first_tokens).then(|| per_token_ms * (total_tokens - done_tokens) as f64);
                vec![Piece::Prefill { done_tokens, total_tokens, left_ms }]
            }
            Event::ThoughtEnded(why) => {
                self.summary.thought_end = Some(why);
                Vec::new()
            }
            Event::Prompt(logprobs) => vec![Piece::Prompt(logprobs)],
            // Tokens computed between a stop text and its cancellation belong to nobody.
            Event::Token { .. } if self.summary.stop_text.is_some() => Vec::new(),
            Event::Token { id, logprobs } => vec![self.token(time, id, logprobs)],
            // Only other goals than an answer have values.
            Event::Values(_) => Vec::new(),
            Event::Finished(finish) => self.finished(finish),
            Event::GivenUp(reason) => {
                self.ended = true;
                return Err(Error::GivenUp { reason });
            }
        })
    }

    fn token(&mut self, time: Instant, id: TokenId, logprobs: Option<TokenLogprobs>) -> Piece {
        let elapsed_ms = time.saturating_duration_since(self.asked).as_secs_f64() * 1e3;
        if self.summary.ids.is_empty() {
            self.summary.prompt_ms = elapsed_ms;
        }
        self.summary.generate_ms = elapsed_ms - self.summary.prompt_ms;
        self.summary.ids.push(id);
        let mut piece = TextPiece { text: String::new(), ids: vec![id], logprobs: Vec::from_iter(logprobs) };
        if !self.stop_tokens.contains(&id) {
            let text = self.decoder.as_mut().map(|d| d.push(id)).unwrap_or_default();
            let passed = match self.summary.ids.len() <= self.min_tokens {
                true => Passed { text, stop: None },
                false => self.stop_text.push(&text),
            };
            if passed.stop.is_some() {
                self.summary.stop_text = passed.stop;
                self.canceller.cancel();
            }
            piece.text = passed.text;
        }
        self.summary.text.push_str(&piece.text);
        Piece::Text(piece)
    }

    /// The end: what was held back comes out, if no stop text has cut it off.
    fn finished(&mut self, finish: Finish) -> Vec<Piece> {
        self.ended = true;
        self.summary.finish = finish;
        let mut rest = String::new();
        if let (None, Some(decoder)) = (&self.summary.stop_text, self.decoder.take()) {
            let passed = self.stop_text.push(&decoder.finish());
            rest = passed.text;
            self.summary.stop_text = passed.stop;
            if self.summary.stop_text.is_none() {
                rest.push_str(&self.stop_text.finish());
            }
        }
        if self.summary.stop_text.is_some() {
            self.summary.finish = Finish::Stop;
        }
        self.summary.text.push_str(&rest);
        let text = (!rest.is_empty()).then(|| Piece::Text(TextPiece { text: rest, ..TextPiece::default() }));
        text.into_iter().chain([Piece::Done(self.summary.clone())]).collect()
    }
}

impl Drop for Transcript {
    fn drop(&mut self) {
        if !self.ended {
            self.canceller.cancel();
        }
    }
}

/// What a transcript is made of.
pub(crate) struct TranscriptPlan {
    pub(crate) decoder: StreamDecoder,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_tokens: Vec<TokenId>,
    pub(crate) prompt_ids: Vec<TokenId>,
    pub(crate) opening: Opening,
    pub(crate) min_tokens: usize,
    pub(crate) seed: u64,
    pub(crate) asked: Instant,
}

/// A listener that sends what it hears, and where it arrives.
pub(crate) fn listening() -> (Listener, Receiver<(Instant, Event)>) {
    let (sender, events) = channel();
    (Box::new(move |time, event| sender.send((time, event)).is_ok()), events)
}

/// An answer to wait for: an iterator of pieces, the last of which is `Done`. Dropping it cancels the request.
pub struct Answer {
    events: Receiver<(Instant, Event)>,
    transcript: Transcript,
    /// Pieces that one event gave, the next last.
    ready: Vec<Piece>,
    failed: bool,
}

impl Answer {
    pub(crate) fn new(events: Receiver<(Instant, Event)>, transcript: Transcript) -> Answer {
        Answer { events, transcript, ready: Vec::new(), failed: false }
    }

    /// A handle that ends the answer from anywhere.
    pub fn canceller(&self) -> Canceller {
        self.transcript.canceller()
    }

    /// The prompt's tokens.
    pub fn prompt_ids(&self) -> &[TokenId] {
        self.transcript.prompt_ids()
    }
}

impl Iterator for Answer {
    type Item = Result<Piece, Error>;

    fn next(&mut self) -> Option<Result<Piece, Error>> {
        loop {
            if let Some(piece) = self.ready.pop() {
                return Some(Ok(piece));
            }
            if self.transcript.ended || self.failed {
                return None;
            }
            match self.events.recv() {
                Ok((time, event)) => match self.transcript.push(time, event) {
                    Ok(pieces) => self.ready = pieces.into_iter().rev().collect(),
                    Err(error) => return Some(Err(error)),
                },
                Err(_) => {
                    self.failed = true;
                    return Some(Err(Error::Stopped));
                }
            }
        }
    }
}
