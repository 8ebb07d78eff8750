//! Which guessed tokens the next batch computes beside the tokens that are known.

use qwenkit_kernels::PAGE_TOKENS;

use super::{Scheduler, batch::SCORED_ROWS};
use crate::{drafter::GUESSES_MAX, runner::Runner, speculate::Speculate};

impl<R: Runner> Scheduler<R> {
    /// Adds drafts to a batch whose rows are given for each running sequence, where they pay. Prompts need all the rows they can
    /// get, so there are no drafts beside them.
    pub(super) fn add_guesses(&mut self, rows: &mut [usize]) {
        let reads = |(i, &rows): (usize, &usize)| rows > 1 || rows == 1 && !self.running[i].is_generating();
        if self.speculate == Speculate::Off || rows.iter().enumerate().any(reads) {
            return;
        }
        let parts: Vec<usize> = (0..rows.len()).filter(|&i| rows[i] > 0).collect();
        let mut guesses = Vec::with_capacity(parts.len());
        for &i in &parts {
            let most = self.can_guess(i);
            guesses.push(self.running[i].guess(most));
        }
        let counts = self.row_cost.worth(&guesses, SCORED_ROWS.saturating_sub(parts.len()));
        for (i, count) in parts.into_iter().zip(counts) {
            let count = self.room_for_guesses(i, count);
            self.running[i].draft(count);
            rows[i] += count;
        }
    }

    /// How many tokens may be guessed behind the last one of sequence `i`.
    fn can_guess(&self, i: usize) -> usize {
        let position = self.running[i].computed;
        // A state of the answer is kept where a page ends, so no guess may lie behind it.
        if self.free_slots.is_some() && (position + 1).is_multiple_of(PAGE_TOKENS) {
            return 0;
        }
        self.runner.can_take_back(position).min(GUESSES_MAX)
    }

    /// Pages for `count` guesses of sequence `i`, or for as many as can be had without taking them from others.
    fn room_for_guesses(&mut self, i: usize, count: usize) -> usize {
        let sequence = &mut self.running[i];
        let first = sequence.computed + 1;
        while sequence.pages.len() * PAGE_TOKENS < first + count {
            match self.pages.allocate() {
                Some(page) => sequence.pages.push(page),
                None => break,
            }
        }
        (sequence.pages.len() * PAGE_TOKENS).min(first + count) - first
    }
}
