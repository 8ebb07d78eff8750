//! Which guessed tokens the next batch computes beside the tokens that are known.

use std::{ops::Range, time::Instant};

use qwenkit_kernels::PAGE_TOKENS;
use qwenkit_models::{GuessSeq, Guesses};

use super::{Scheduler, batch::SCORED_ROWS};
use crate::{drafter::GUESSES_MAX, runner::Runner, speculate::Speculate, trail};

impl<R: Runner> Scheduler<R> {
    /// Adds drafts to a batch whose rows are given for each running sequence, where they pay. Prompts need all the rows they can
    /// get, so there are no drafts beside them.
    pub(super) fn add_guesses(&mut self, rows: &mut [usize]) {
        let reads = |(i, &rows): (usize, &usize)| rows > 1 || rows == 1 && !self.running[i].is_generating();
        if self.speculate == Speculate::Off || rows.iter().enumerate().any(reads) {
            return;
        }
        let parts: Vec<usize> = (0..rows.len()).filter(|&i| rows[i] > 0).collect();
        if parts.len() >= SCORED_ROWS {
            return;
        }
        let looks_up = self.speculate.looks_up();
        let block_cost = self.speculate.asks_block().then(|| self.row_cost.of_block());
        let mut guesses = Vec::with_capacity(parts.len());
        for &i in &parts {
            let most = self.can_guess(i);
            guesses.push(self.running[i].guess(most, looks_up, block_cost));
        }
        let counts = self.row_cost.worth(&guesses, SCORED_ROWS - parts.len());
        let counts: Vec<_> = parts.into_iter().zip(counts).map(|(i, n)| (i, self.room_for_guesses(i, n))).collect();
        let by_block = counts.iter().zip(&guesses).filter(|((_, count), guesses)| guesses.by_block && *count > 0);
        self.guess_by_block(&by_block.map(|(part, _)| *part).collect::<Vec<_>>());
        for (i, count) in counts {
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

    /// Has the model's block guess so many tokens for each of some sequences: one of each at a time.
    fn guess_by_block(&mut self, wanted: &[(usize, usize)]) {
        // Of each sequence, what the block goes over next: the position of the first token, tokens, states before them.
        let mut next = Vec::with_capacity(wanted.len());
        for &(i, count) in wanted {
            let sequence = &mut self.running[i];
            let positions = sequence.trail.positions();
            let tokens = sequence.tokens[positions.clone()].to_vec();
            next.push((i, count, positions.start, tokens, sequence.trail.take(positions.len())));
        }
        while !next.is_empty() {
            let start = Instant::now();
            let (mut tokens, mut states, mut seqs) = (Vec::new(), Vec::new(), Vec::new());
            for (i, _, first, own, of_own) in &next {
                let rows = tokens.len()..tokens.len() + own.len();
                tokens.extend_from_slice(own);
                states.extend_from_slice(of_own);
                seqs.push(GuessSeq { rows, first: *first, pages: &self.running[*i].pages, wanted: true });
            }
            let guesses = Guesses { tokens: &tokens, states: &states, seqs: &seqs };
            let (ids, made) = self.runner.guess(&guesses, self.real_tokens);
            // What it had to catch up on is no part of a guess.
            if tokens.len() <= 2 * next.len() {
                self.row_cost.observe_block(next.len(), start.elapsed());
            }
            let width = made.len() / ids.len().max(1);
            for (((i, count, first, own, of_own), id), made) in next.iter_mut().zip(ids).zip(made.chunks_exact(width)) {
                self.running[*i].add_guess(id);
                (*first, *count) = (*first + own.len(), *count - 1);
                (*own, *of_own) = (vec![id], made.to_vec());
            }
            next.retain(|(_, count, ..)| *count > 0);
        }
    }

    /// Keeps the states that a batch has computed for the model's block; `firsts` are the positions at which its parts began.
    /// Long trails are led through the block at once.
    pub(super) fn keep_states(&mut self, parts: &[(usize, usize)], firsts: &[usize]) {
        if !self.speculate.asks_block() || self.runner.states().is_empty() {
            return;
        }
        let (mut row, mut long) = (0, Vec::new());
        let all = self.runner.states();
        let width = all.len() / parts.iter().map(|(_, rows)| rows).sum::<usize>().max(1);
        for (&(i, rows), &first) in parts.iter().zip(firsts) {
            let sequence = &mut self.running[i];
            if sequence.has_trail() {
                // Of a draft only what was right counts.
                let own = sequence.computed - first;
                sequence.trail.add(first, &all[row * width..(row + own) * width], width);
                // The last one goes with a token for which there may be no page.
                let positions = sequence.trail.positions().start..sequence.computed;
                if positions.len() >= trail::LONGEST {
                    long.push((i, positions));
                }
            }
            row += rows;
        }
        let (mut tokens, mut states, mut seqs) = (Vec::new(), Vec::new(), Vec::new());
        for (i, positions) in &long {
            let rows = tokens.len()..tokens.len() + positions.len();
            tokens.extend_from_slice(&self.running[*i].tokens[positions.clone()]);
            states.extend(self.running[*i].trail.take(positions.len()));
            seqs.push((rows, *i, positions.start));
        }
        let seq = |(rows, i, first): (Range<usize>, usize, usize)| GuessSeq {
            rows,
            first,
            pages: &self.running[i].pages,
            wanted: false,
        };
        let seqs: Vec<GuessSeq<'_>> = seqs.into_iter().map(seq).collect();
        if !seqs.is_empty() {
            self.runner.guess(&Guesses { tokens: &tokens, states: &states, seqs: &seqs }, self.real_tokens);
        }
    }
}
