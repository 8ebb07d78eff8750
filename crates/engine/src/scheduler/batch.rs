//! What the next batch computes: whose rows, how many, and who gives way when pages run out.

use std::cmp::Reverse;

use qwenkit_kernels::PAGE_TOKENS;

use super::Scheduler;
use crate::{runner::Runner, sequence::Sequence};

/// Rows whose logits are all wanted, in a batch: each takes V numbers.
pub(super) const SCORED_ROWS: usize = 64;

impl<R: Runner> Scheduler<R> {
    /// The batch's parts: (running sequence, tokens). Every generating sequence has one, and perhaps a draft; prompts share the
    /// rest. Their pages are there. Empty only if nothing runs, or all wait for files of which some were read.
    pub(super) fn parts(&mut self) -> Vec<(usize, usize)> {
        self.adopt_all();
        let waits_for_files = self.fetch();
        let mut rows = vec![0; self.running.len()];
        // Those that gave way; they leave when all rows are known, so that numbers stay what they are.
        let mut gone = vec![false; self.running.len()];
        let mut generating = 0;
        for i in 0..self.running.len() {
            if !gone[i] && self.running[i].is_generating() && self.running[i].seen_ahead(1) == 1 {
                rows[i] = self.make_room(i, 1, &mut gone);
                generating += rows[i];
                gone[i] = rows[i] == 0;
            }
        }
        let mut left = self.pace.prompt_rows(generating);
        let mut scored = SCORED_ROWS;
        for (i, most) in self.prompts_in_turn(left) {
            let sequence = &self.running[i];
            let mut wanted = sequence.left().min(left).min(most);
            if let Some(cut) = sequence.next_cut() {
                wanted = wanted.min(cut - sequence.computed);
            }
            if sequence.prompt_logprobs.is_some() {
                wanted = wanted.min(scored);
            }
            wanted = sequence.seen_ahead(wanted);
            if gone[i] || wanted == 0 || rows[i] > 0 || waits_for_files.contains(&i) {
                continue;
            }
            rows[i] = self.make_room(i, wanted, &mut gone);
            left -= rows[i];
            scored -= if self.running[i].prompt_logprobs.is_some() { rows[i] } else { 0 };
        }
        if !gone.contains(&true) {
            self.add_guesses(&mut rows);
        }
        for i in (0..gone.len()).rev() {
            if gone[i] {
                self.give_way(i);
                rows.remove(i);
            }
        }
        rows.into_iter().enumerate().filter(|&(_, rows)| rows > 0).collect()
    }

    /// Prompts that are not through, in the order in which they get rows, with the most that each may take: the first in
    /// rank has the right to all, but the one nearest its end takes up to half before it, so that a short prompt does not
    /// wait for a long one. A prompt that begins like one further on waits for the pages of that one.
    fn prompts_in_turn(&mut self, rows: usize) -> Vec<(usize, usize)> {
        let mut turns: Vec<usize> = Vec::new();
        for i in 0..self.running.len() {
            if !self.running[i].is_generating() && !self.follows_another(i) {
                turns.push(i);
            }
        }
        let shortest = turns.iter().copied().min_by_key(|&i| self.running[i].left());
        let mut order: Vec<(usize, usize)> = Vec::new();
        if let Some(shortest) = shortest.filter(|s| turns.first() != Some(s)) {
            order.push((shortest, rows / 2));
        }
        order.extend(turns.into_iter().map(|i| (i, usize::MAX)));
        order
    }

    /// Whether another prompt is about to fill a page that `i` needs next.
    pub(super) fn follows_another(&mut self, i: usize) -> bool {
        let follower = &self.running[i];
        let page = follower.computed / PAGE_TOKENS;
        let end = (page + 1) * PAGE_TOKENS;
        if end > follower.sharable_tokens() {
            return false;
        }
        let before = |s: &Sequence| s.pages[..page.min(s.shared_pages)].last().copied();
        // Where `leader` gives it something: at the end of its next page, or, as a recurrent state is of use only where it
        // was kept, at the end of all that they have in common.
        let given = |leader: &Sequence| match self.free_slots {
            None => end,
            Some(_) => common_pages(leader, follower) * PAGE_TOKENS,
        };
        let leads = |j: &usize| {
            let leader = &self.running[*j];
            (leader.computed, Reverse(*j)) > (follower.computed, Reverse(i))
                && leader.tokens.len() >= end
                && leader.shared_pages >= page
                && before(leader) == before(follower)
                && leader.keys[page * PAGE_TOKENS..end] == follower.keys[page * PAGE_TOKENS..end]
                && leader.computed < given(leader)
        };
        let Some(leader) = (0..self.running.len()).find(leads) else { return false };
        let cut = given(&self.running[leader]);
        if self.free_slots.is_some() && !self.running[leader].cuts.contains(&cut) {
            self.running[leader].cuts.push(cut);
        }
        true
    }

    /// Pages for `wanted` more tokens of sequence `i`, or for as many as can be had; those behind it in rank give way.
    fn make_room(&mut self, i: usize, wanted: usize, gone: &mut [bool]) -> usize {
        let until = self.running[i].computed + wanted;
        while self.running[i].pages.len() * PAGE_TOKENS < until {
            if let Some(page) = self.pages.allocate() {
                self.running[i].pages.push(page);
                continue;
            }
            let Some(last) = (i + 1..gone.len()).rev().find(|&j| !gone[j]) else { break };
            gone[last] = true;
            self.free_pages_of(last);
        }
        (self.running[i].pages.len() * PAGE_TOKENS).min(until).saturating_sub(self.running[i].computed)
    }
}

/// Whole pages with which two sequences begin alike, as far as the second can share them.
fn common_pages(leader: &Sequence, follower: &Sequence) -> usize {
    let sharable = &follower.keys[..follower.sharable_tokens()];
    let common = leader.keys.iter().zip(sharable).take_while(|(a, b)| a == b).count();
    common / PAGE_TOKENS
}
