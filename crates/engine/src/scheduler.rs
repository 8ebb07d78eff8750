//! The engine's core: sequences waiting, running and finished, one batch after another. No threads, no text.
//!
//! Every step computes one token of each generating sequence and, in the room that is left, a piece of the prompts that
//! are not through yet, so that a long prompt never holds up the others. A sequence is admitted only when pages for all
//! of it - prompt and longest answer - are there, so a running sequence never runs out of memory.

use std::{collections::VecDeque, ops::Range};

use qwenkit_models::{Batch, BatchSeq, Outputs};
use qwenkit_tensor::{SeqId, TokenId};

use crate::{
    error::Error,
    pages::PagePool,
    request::{Event, Finish, Goal, Request},
    runner::Runner,
    sampler::{self, Sampler},
};

/// Rows of a batch. Prompts are cut to it: large enough that weights are read once for many tokens, small enough that
/// generating sequences get their turn several times a second.
const BATCH_TOKENS: usize = 512;

/// Who hears a sequence's events; `false` when nobody listens any more.
pub(crate) type Listener = Box<dyn FnMut(Event) -> bool + Send>;

/// The sequences of one runner.
pub(crate) struct Scheduler<R> {
    runner: R,
    pages: PagePool,
    /// Slots of recurrent state that no running sequence has; absent where the runner has no such state.
    free_slots: Option<Vec<usize>>,
    /// Ids below this are real tokens; rows of the embedding beyond are padding and never chosen.
    real_tokens: usize,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    logits: Vec<f32>,
}

struct Sequence {
    id: SeqId,
    /// Prompt and answer.
    tokens: Vec<TokenId>,
    prompt_tokens: usize,
    goal: Goal,
    /// Tokens whose state is in the pages.
    computed: usize,
    cached_tokens: usize,
    max_tokens: usize,
    stop_tokens: Vec<TokenId>,
    logprobs: Option<usize>,
    sampler: Sampler,
    pages: Vec<u32>,
    /// Its own while it runs; 0 where the runner has no recurrent state.
    slot: usize,
    listener: Listener,
    finish: Option<Finish>,
}

impl Sequence {
    /// Positions that the sequence may come to have; the last token's state is never needed.
    fn positions(&self) -> usize {
        self.prompt_tokens + self.max_tokens - 1
    }

    fn tell(&mut self, event: Event) {
        if !(self.listener)(event) {
            self.finish.get_or_insert(Finish::Cancelled);
        }
    }
}

impl<R: Runner> Scheduler<R> {
    pub(crate) fn new(runner: R, pages: usize, real_tokens: usize) -> Scheduler<R> {
        let real_tokens = real_tokens.min(runner.vocab());
        Scheduler {
            free_slots: runner.slots().map(|slots| (0..slots).rev().collect()),
            runner,
            pages: PagePool::new(pages),
            real_tokens,
            waiting: VecDeque::new(),
            running: Vec::new(),
            logits: Vec::new(),
        }
    }

    /// Takes a request in. Its answer is cut to what all pages together hold.
    ///
    /// # Errors
    /// When it can never be served.
    pub(crate) fn submit(&mut self, id: SeqId, request: Request, listener: Listener) -> Result<(), Error> {
        let (vocab, capacity) = (self.runner.vocab(), self.pages.capacity_tokens());
        request.sampling.check(vocab)?;
        let prompt_tokens = request.prompt.len();
        if prompt_tokens == 0 {
            return Err(Error::PromptEmpty);
        }
        let asked: &[TokenId] = if let Goal::Logits(ids) = &request.goal { ids } else { &[] };
        if let Some(&found) = request.prompt.iter().chain(asked).find(|id| id.index() >= vocab) {
            return Err(Error::TokenUnknown { found, vocab });
        }
        if prompt_tokens > capacity {
            return Err(Error::PromptTooLong { prompt_tokens, context_tokens: capacity, hint: String::new() });
        }
        let max_tokens = match request.goal {
            Goal::Answer => request.max_tokens.min(capacity - prompt_tokens + 1),
            // As an answer of one token, it needs no page beyond the prompt's.
            Goal::Hidden | Goal::Logits(_) => 1,
        };
        let mut sequence = Sequence {
            id,
            sampler: Sampler::new(request.sampling, &request.prompt),
            tokens: request.prompt,
            prompt_tokens,
            goal: request.goal,
            computed: 0,
            cached_tokens: 0,
            max_tokens,
            stop_tokens: request.stop_tokens,
            logprobs: request.logprobs,
            pages: Vec::new(),
            slot: 0,
            listener,
            finish: None,
        };
        match max_tokens {
            0 => sequence.tell(Event::Finished(Finish::Length)),
            _ => self.waiting.push_back(sequence),
        }
        Ok(())
    }

    /// Ends a sequence at the next step; one that is not there is none's loss.
    pub(crate) fn cancel(&mut self, id: SeqId) {
        for sequence in self.waiting.iter_mut().chain(&mut self.running).filter(|s| s.id == id) {
            sequence.finish.get_or_insert(Finish::Cancelled);
        }
    }

    /// Whether there is anything to do.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// One batch: admits what fits, computes, chooses tokens, ends what has ended.
    pub(crate) fn step(&mut self) {
        self.retire();
        self.admit();
        let parts = self.parts();
        if parts.is_empty() {
            return;
        }
        let hidden_parts = self.compute(&parts);
        let (mut row, mut hidden_row) = (0, 0);
        for (i, rows) in parts {
            let sequence = &mut self.running[i];
            let tokens = rows.len();
            sequence.computed += tokens;
            if sequence.computed < sequence.tokens.len() {
                let event = prefill(sequence);
                sequence.tell(event);
                continue;
            }
            if sequence.computed == sequence.prompt_tokens {
                let event = prefill(sequence);
                sequence.tell(event);
            }
            if sequence.goal == Goal::Hidden {
                let hidden = self.runner.hidden();
                let width = hidden.len() / hidden_parts;
                deliver(sequence, hidden[hidden_row * width..][..width].to_vec());
                hidden_row += 1;
                continue;
            }
            let vocab = self.runner.vocab();
            let logits = &mut self.logits[row * vocab..][..vocab];
            row += 1;
            match &sequence.goal {
                Goal::Logits(ids) => {
                    let values = ids.iter().map(|id| logits[id.index()]).collect();
                    deliver(sequence, values);
                }
                Goal::Answer | Goal::Hidden => choose(sequence, &mut logits[..self.real_tokens]),
            }
        }
        self.retire();
    }

    /// Moves waiting sequences in, first come first served, while their pages and a slot are there.
    fn admit(&mut self) {
        while let Some(mut sequence) = self.waiting.pop_front() {
            if self.free_slots.as_ref().is_some_and(Vec::is_empty) {
                self.waiting.push_front(sequence);
                return;
            }
            match self.pages.take(&sequence.tokens, sequence.positions()) {
                Some(taken) => {
                    sequence.pages = taken.pages;
                    sequence.slot = self.free_slots.as_mut().and_then(Vec::pop).unwrap_or(0);
                    sequence.computed = taken.cached_tokens;
                    sequence.cached_tokens = taken.cached_tokens;
                    self.running.push(sequence);
                }
                None => {
                    self.waiting.push_front(sequence);
                    return;
                }
            }
        }
    }

    /// The batch's parts: (running sequence, its rows). Generating sequences first, then prompts in order of arrival.
    fn parts(&self) -> Vec<(usize, Range<usize>)> {
        let mut parts: Vec<(usize, Range<usize>)> = Vec::new();
        let left = |s: &Sequence| s.tokens.len() - s.computed;
        let mut rows = 0;
        for generating in [true, false] {
            for (i, s) in self.running.iter().enumerate().filter(|(_, s)| (left(s) == 1) == generating) {
                let tokens = left(s).min(BATCH_TOKENS.saturating_sub(rows));
                if tokens > 0 {
                    parts.push((i, rows..rows + tokens));
                    rows += tokens;
                }
            }
        }
        parts
    }

    /// Computes the parts; returns how many of them have a hidden state now.
    fn compute(&mut self, parts: &[(usize, Range<usize>)]) -> usize {
        let mut tokens = Vec::new();
        let mut seqs = Vec::with_capacity(parts.len());
        for (i, rows) in parts {
            let s = &self.running[*i];
            let end = s.computed + rows.len();
            tokens.extend_from_slice(&s.tokens[s.computed..end]);
            let outputs = match s.goal {
                _ if end < s.tokens.len() => Outputs::None,
                Goal::Hidden => Outputs::Hidden,
                Goal::Answer | Goal::Logits(_) => Outputs::Last,
            };
            seqs.push(BatchSeq { rows: rows.clone(), first: s.computed, pages: &s.pages, slot: s.slot, outputs });
        }
        let hidden_parts = seqs.iter().filter(|seq| seq.outputs == Outputs::Hidden).count();
        self.runner.forward(&Batch { tokens: &tokens, seqs: &seqs }, &mut self.logits);
        hidden_parts
    }

    /// Takes ended sequences out and says so.
    fn retire(&mut self) {
        let (ended, waiting) = self.waiting.drain(..).partition::<VecDeque<_>, _>(|s| s.finish.is_some());
        self.waiting = waiting;
        // A sequence that has waited has neither pages nor a slot.
        let ended = ended.into_iter().map(|s| (s, false));
        let ran = self.running.extract_if(.., |s| s.finish.is_some()).map(|s| (s, true));
        for (mut sequence, has_run) in ended.chain(ran) {
            if let Some(finish) = sequence.finish {
                sequence.tell(Event::Finished(finish));
            }
            sequence.tokens.truncate(sequence.computed);
            if let Some(free) = &mut self.free_slots {
                // What pages hold is worth nothing without the recurrent state at that position, which the next owner
                // of the slot overwrites: the pages are given back empty, so that no later sequence takes them over.
                sequence.tokens.clear();
                free.extend(has_run.then_some(sequence.slot));
            }
            self.pages.give_back(sequence.tokens, sequence.pages);
        }
    }
}

fn prefill(s: &Sequence) -> Event {
    Event::Prefill { done_tokens: s.computed, total_tokens: s.prompt_tokens, cached_tokens: s.cached_tokens }
}

/// Hands a sequence that wants no answer what it wants, which ends it.
fn deliver(sequence: &mut Sequence, values: Vec<f32>) {
    sequence.tell(Event::Values(values));
    sequence.finish.get_or_insert(Finish::Stop);
}

/// Adds the next token to a sequence whose last token's logits, over real tokens, are `logits`.
fn choose(sequence: &mut Sequence, logits: &mut [f32]) {
    // Log-probabilities are the model's own, so they are taken before penalties change the logits.
    let own = sequence.logprobs.map(|count| (count, logits.to_vec()));
    let id = sequence.sampler.choose(logits);
    sequence.tokens.push(id);
    let logprobs = own.map(|(count, logits)| sampler::logprobs(&logits, id, count));
    sequence.tell(Event::Token { id, logprobs });
    if sequence.stop_tokens.contains(&id) {
        sequence.finish.get_or_insert(Finish::Stop);
    } else if sequence.tokens.len() - sequence.prompt_tokens >= sequence.max_tokens {
        sequence.finish.get_or_insert(Finish::Length);
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
