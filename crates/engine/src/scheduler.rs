//! The engine's core: sequences waiting, running and finished, one batch after another. No threads, no text.
//!
//! Every step computes one token of each generating sequence and, in the room that is left, a piece of the prompts that
//! are not through yet, so that a long prompt never holds up the others. Pages are taken as they are filled. A sequence is
//! admitted when there are pages for its prompt and a little more; if they run out later, the sequence that came last gives
//! way and starts again when there is room, from what the tree still holds. The first in rank never gives way, so all come
//! to their end.
//!
//! Where it pays, a step also computes tokens that a sequence is guessed to say next. Each token is chosen from the model's own
//! logits as if there were no guesses; a guess only saves the step that its row would have been.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use qwenkit_kernels::{Best, PAGE_TOKENS};
use qwenkit_models::{Batch, BatchSeq, Outputs, Seen};
use qwenkit_tensor::SeqId;

use kept::Kept;

use crate::{
    disk::DiskPages,
    load::{Gauges, Load},
    pace::Pace,
    pages::PagePool,
    request::{Event, Finish, Goal, Limits, Request},
    runner::Runner,
    sequence::{Listener, Sequence},
    speculate::Speculate,
    vision::VisionInfo,
    worth::RowCost,
};

mod batch;
mod guesses;
mod kept;
mod prefix;

/// Sequences that run at the same time; others wait.
const MAX_RUNNING: usize = 256;

/// Positions of an answer for which pages are there at admission.
const FIRST_ANSWER_TOKENS: usize = PAGE_TOKENS;

/// The sequences of one runner.
pub(crate) struct Scheduler<R> {
    runner: R,
    pages: PagePool,
    /// Slots of recurrent state that no running sequence has; absent where the runner has no such state.
    free_slots: Option<Vec<usize>>,
    /// Ids below this are real tokens; rows of the embedding beyond are padding and never chosen.
    real_tokens: usize,
    /// Both in order of rank.
    waiting: Vec<Sequence>,
    running: Vec<Sequence>,
    pace: Pace,
    speculate: Speculate,
    row_cost: RowCost,
    gauges: Arc<Gauges>,
    vision: Option<VisionInfo>,
    /// Where pages are kept beyond this process's life, if anywhere.
    kept: Option<Kept>,
    logits: Vec<f32>,
}

impl<R: Runner> Scheduler<R> {
    pub(crate) fn new(runner: R, pages: usize, real_tokens: usize, speculate: Speculate) -> Scheduler<R> {
        let real_tokens = real_tokens.min(runner.vocab());
        let slots = runner.slots();
        let checkpoints = slots.map_or(Vec::new(), |s| (s.sequences..s.sequences + s.checkpoints).collect());
        let pool = PagePool::new(pages, checkpoints);
        let gauges = Arc::new(Gauges::default());
        gauges.lock().pages_total = pool.total();
        Scheduler {
            free_slots: slots.map(|s| (0..s.sequences).rev().collect()),
            vision: runner.vision(),
            runner,
            pages: pool,
            real_tokens,
            waiting: Vec::new(),
            running: Vec::new(),
            pace: Pace::default(),
            speculate,
            row_cost: RowCost::default(),
            gauges,
            kept: None,
            logits: Vec::new(),
        }
    }

    /// Keeps pages in files, and takes from them what was kept before.
    pub(crate) fn keep_in(&mut self, files: DiskPages) {
        self.kept = Some(Kept::new(files));
    }

    /// What requests are checked against.
    pub(crate) fn limits(&self) -> Limits {
        Limits { vocab: self.runner.vocab(), capacity_tokens: self.pages.capacity_tokens() }
    }

    /// What visuals requests may have.
    pub(crate) fn vision(&self) -> Option<&VisionInfo> {
        self.vision.as_ref()
    }

    /// Where the figures are. Whoever hands in a request counts it as waiting.
    pub(crate) fn gauges(&self) -> Arc<Gauges> {
        Arc::clone(&self.gauges)
    }

    /// Takes in a request that was checked against the limits.
    pub(crate) fn submit(&mut self, id: SeqId, request: Request, listener: Listener) {
        let mut sequence = Sequence::new(id, request, self.limits(), self.vision.as_ref(), listener);
        self.gauges.lock().prompt_tokens += sequence.prompt_tokens as u64;
        if sequence.wants_nothing() {
            sequence.finish = Some(Finish::Length);
        }
        insert(&mut self.waiting, sequence);
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
        self.look();
        let parts = self.parts();
        if !parts.is_empty() {
            let start = Instant::now();
            self.compute(&parts);
            self.observe(&parts, start.elapsed());
            let firsts: Vec<usize> = parts.iter().map(|&(i, _)| self.running[i].computed).collect();
            self.deliver(&parts);
            self.keep_states(&parts, &firsts);
            self.share_filled();
        }
        self.retire();
        self.keep_some();
        self.stand(&mut self.gauges.lock());
    }

    /// Says how many run, and what they hold.
    fn stand(&self, load: &mut Load) {
        load.running = self.running.len();
        load.disk_failures = self.kept.as_ref().map_or(0, Kept::failures);
        load.pages_used = self.pages.total() - self.pages.available();
    }

    /// Learns from how long a step took.
    fn observe(&mut self, parts: &[(usize, usize)], time: Duration) {
        let rows = parts.iter().map(|&(_, rows)| rows).sum();
        match parts.iter().all(|&(i, rows)| rows == 1 + self.running[i].draft.len()) {
            true => self.row_cost.observe(rows, time),
            false => self.pace.observe(rows, time),
        }
    }

    /// Lets the first in rank that misses an image's vectors have a piece of them computed.
    fn look(&mut self) {
        for i in 0..self.running.len() {
            let computed = self.running[i].computed;
            let misses = self.running[i].view.as_mut().is_some_and(|view| view.missed(computed).is_some());
            // Who gets the image's pages from another needs no vectors.
            if !misses || self.follows_another(i) {
                continue;
            }
            let sequence = &mut self.running[i];
            if let Some(item) = sequence.view.as_mut().and_then(|view| view.missed(computed)) {
                match self.runner.look(&item.visual) {
                    Ok(vectors) => item.vectors = vectors,
                    // Memory is all that can be refused here; everything else was checked before.
                    Err(error) => sequence.give_up(format!("an image could not be looked at: {error}")),
                }
            }
            return;
        }
    }

    /// Moves waiting sequences in, in order of rank, while their pages and a slot are there.
    fn admit(&mut self) {
        while self.running.len() < MAX_RUNNING
            && let Some(next) = self.waiting.first()
        {
            let rank = next.priority;
            let no_slot = self.free_slots.as_ref().is_some_and(Vec::is_empty);
            if no_slot || !self.has_room_for(next) {
                // Somebody of lower priority makes room.
                match self.running.last() {
                    Some(last) if last.priority < rank => {
                        let last = self.running.len() - 1;
                        self.give_way(last);
                        continue;
                    }
                    _ => return,
                }
            }
            let mut sequence = self.waiting.remove(0);
            sequence.slot = self.free_slots.as_mut().and_then(Vec::pop).unwrap_or(0);
            self.adopt(&mut sequence);
            if self.free_slots.is_some() {
                sequence.cuts.push(sequence.last_page_end());
            }
            let mut load = self.gauges.lock();
            load.waiting = load.waiting.saturating_sub(1);
            drop(load);
            insert(&mut self.running, sequence);
        }
    }

    /// Whether a sequence's prompt and the beginning of its answer find pages beside what the running ones will take.
    fn has_room_for(&self, next: &Sequence) -> bool {
        let wanted = (next.tokens.len() + FIRST_ANSWER_TOKENS).div_ceil(PAGE_TOKENS).min(self.pages.total());
        let promised: usize = self.running.iter().map(pages_ahead).sum();
        let (shared, idle) = self.known_pages(next);
        promised + wanted - shared + idle <= self.pages.available()
    }

    /// The sequence `i` leaves its pages to others and waits for its turn again.
    fn give_way(&mut self, i: usize) {
        let mut sequence = self.running.remove(i);
        self.let_go(&mut sequence);
        let mut load = self.gauges.lock();
        load.preempted += 1;
        load.waiting += 1;
        drop(load);
        insert(&mut self.waiting, sequence);
    }

    /// Computes the parts: (running sequence, tokens).
    fn compute(&mut self, parts: &[(usize, usize)]) {
        let mut tokens = Vec::new();
        let mut seqs = Vec::with_capacity(parts.len());
        let seen = |&(i, rows): &(usize, usize)| {
            let s = &self.running[i];
            let range = s.computed..s.computed + rows;
            s.view.as_ref().map(|view| (view.positions(range.clone()), view.rows(range)))
        };
        let seen: Vec<_> = parts.iter().map(seen).collect();
        let seen: Vec<_> =
            seen.iter().map(|seen| seen.as_ref().map(|(positions, rows)| Seen { positions, rows })).collect();
        let few: Vec<_> = parts.iter().map(|&(i, rows)| self.running[i].few(rows)).collect();
        for ((&(i, rows), seen), few) in parts.iter().zip(&seen).zip(&few) {
            let s = &self.running[i];
            let from = tokens.len();
            tokens.extend(s.tokens[s.computed..].iter().chain(&s.draft).take(rows));
            let (rows, outputs) = (from..tokens.len(), s.outputs(rows));
            let seen = seen.as_ref();
            let adapter = s.adapter.as_deref();
            let among = self.real_tokens;
            let best = few.as_ref().map(|(count, lowered)| Best { count: *count, among, lowered });
            seqs.push(BatchSeq {
                rows,
                first: s.computed,
                pages: &s.pages,
                slot: s.slot,
                outputs,
                seen,
                adapter,
                best,
            });
        }
        self.runner.forward(&Batch { tokens: &tokens, seqs: &seqs }, &mut self.logits);
        let mut load = self.gauges.lock();
        load.head_reads += u64::from(self.runner.head_bytes() > 0);
        load.head_bytes += self.runner.head_bytes() as u64;
    }

    /// Hands out what the batch has given.
    fn deliver(&mut self, parts: &[(usize, usize)]) {
        let vocab = self.runner.vocab();
        let hidden = self.runner.hidden();
        let outputs = |&(i, rows): &(usize, usize)| self.running[i].outputs(rows);
        let hidden_parts = parts.iter().filter(|part| outputs(part) == Outputs::Hidden).count();
        let (mut row, mut hidden_row, mut generated, mut drafted, mut accepted) = (0, 0, 0, 0, 0);
        for &(i, rows) in parts {
            let sequence = &mut self.running[i];
            let (first, outputs) = (sequence.computed, sequence.outputs(rows));
            // Of a draft nothing is certain.
            let draft = sequence.draft.len();
            sequence.advance(rows - draft);
            let logit_rows = match outputs {
                Outputs::All => rows,
                Outputs::Last => 1,
                Outputs::None | Outputs::Hidden => 0,
            };
            let logits = &mut self.logits[row * vocab..(row + logit_rows) * vocab];
            row += logit_rows;
            if outputs == Outputs::All {
                sequence.score_prompt(first, logits, vocab, self.real_tokens);
            }
            if sequence.left() > 0 {
                continue;
            }
            match &sequence.goal {
                Goal::Hidden => {
                    let width = hidden.len() / hidden_parts.max(1);
                    sequence.deliver(hidden[hidden_row * width..][..width].to_vec());
                    hidden_row += 1;
                }
                Goal::Logits(ids) => {
                    let last = &logits[logits.len() - vocab..];
                    let values = ids.iter().map(|id| last[id.index()]).collect();
                    sequence.deliver(values);
                }
                Goal::Answer => {
                    let own = logits.len() - (1 + draft) * vocab;
                    let (new, guessed) = sequence.choose_along(&mut logits[own..], vocab, self.real_tokens);
                    (generated, drafted, accepted) = (generated + new, drafted + draft, accepted + guessed.min(draft));
                }
            }
        }
        let mut load = self.gauges.lock();
        load.generated_tokens += generated as u64;
        load.drafted_tokens += drafted as u64;
        load.accepted_tokens += accepted as u64;
    }

    /// Takes ended sequences out and says so.
    fn retire(&mut self) {
        let waited: Vec<Sequence> = self.waiting.extract_if(.., |s| s.finish.is_some()).collect();
        let mut ran: Vec<Sequence> = self.running.extract_if(.., |s| s.finish.is_some()).collect();
        if waited.is_empty() && ran.is_empty() {
            return;
        }
        ran.iter_mut().for_each(|sequence| self.let_go(sequence));
        let mut load = self.gauges.lock();
        load.waiting = load.waiting.saturating_sub(waited.len());
        // Who hears that an answer has ended finds it gone, and its pages free.
        self.stand(&mut load);
        load.finished += (waited.len() + ran.len()) as u64;
        load.cached_tokens += ran.iter().map(|s| s.cached_tokens() as u64).sum::<u64>();
        drop(load);
        waited.into_iter().chain(ran).for_each(|mut sequence| tell_end(&mut sequence));
    }
}

/// Pages that a running sequence is going to take soon: the rest of its prompt's and one more.
fn pages_ahead(s: &Sequence) -> usize {
    ((s.tokens.len() + FIRST_ANSWER_TOKENS).div_ceil(PAGE_TOKENS)).saturating_sub(s.pages.len())
}

fn tell_end(sequence: &mut Sequence) {
    match (sequence.failure.take(), sequence.finish) {
        (Some(reason), _) => sequence.tell(Event::GivenUp(reason)),
        (None, Some(finish)) => sequence.tell(Event::Finished(finish)),
        (None, None) => {}
    }
}

/// Puts a sequence among others in order of rank.
fn insert(among: &mut Vec<Sequence>, sequence: Sequence) {
    let at = among.partition_point(|s| s.rank() < sequence.rank());
    among.insert(at, sequence);
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
