//! What sequences have in common: they take over from the tree what is computed, and put in what they compute.

use qwenkit_kernels::PAGE_TOKENS;

use super::Scheduler;
use crate::{
    pages::{Next, PagePool, Parent},
    request::{Miss, Missed},
    runner::Runner,
    sequence::Sequence,
};

impl<R: Runner> Scheduler<R> {
    /// Of a waiting sequence's pages: those that the tree holds and it would share, and of these those nobody uses now.
    pub(super) fn known_pages(&self, sequence: &Sequence) -> (usize, usize) {
        let path = self.path(sequence, None);
        (path.len(), path.iter().filter(|&&page| self.pages.is_idle(page)).count())
    }

    /// The whole pages with which the tree goes on from `parent` with what is not computed of a sequence, as far as they are
    /// of use to it.
    fn path(&self, sequence: &Sequence, mut parent: Parent) -> Vec<u32> {
        let first = sequence.computed / PAGE_TOKENS * PAGE_TOKENS;
        let mut rest = sequence.keys.get(first..sequence.sharable_tokens()).unwrap_or_default();
        let mut path = Vec::new();
        while let Next::Whole(page) = self.pages.next(parent, rest) {
            path.push(page);
            parent = Some(page);
            rest = &rest[PAGE_TOKENS..];
        }
        path
    }

    /// Lets every prompt go on from what others have computed meanwhile.
    pub(super) fn adopt_all(&mut self) {
        for i in 0..self.running.len() {
            if !self.running[i].is_generating() {
                let mut sequence = self.running.remove(i);
                self.adopt(&mut sequence);
                self.running.insert(i, sequence);
            }
        }
    }

    /// Lets a sequence go on from what the tree holds of its tokens.
    pub(super) fn adopt(&mut self, sequence: &mut Sequence) {
        let mut path = self.path(sequence, sequence.parent(sequence.computed / PAGE_TOKENS));
        let first = sequence.computed / PAGE_TOKENS;
        let known = path.last().copied().or(sequence.parent(first));
        let (known_pages, before) = (first + path.len(), sequence.computed);
        if self.free_slots.is_some() {
            let whole = path.len();
            let kept = path.iter().rposition(|&page| self.pages.checkpoint(page).is_some()).map_or(0, |i| i + 1);
            path.truncate(kept);
            if whole > kept && sequence.computed == 0 {
                // Others begin like this too: the next one shall find a state where this one found only pages.
                sequence.cuts.push((first + whole) * PAGE_TOKENS);
            }
        }
        if !path.is_empty() {
            path.iter().for_each(|&page| self.pages.retain(page));
            sequence.pages.drain(first..).for_each(|page| self.pages.release(page));
            let checkpoint = path.last().and_then(|&page| self.pages.checkpoint(page));
            self.keep_soon(&path);
            sequence.pages.extend(path);
            sequence.fetched_pages = 0;
            sequence.shared_pages = sequence.pages.len();
            sequence.found(sequence.shared_pages * PAGE_TOKENS);
            if let Some(slot) = checkpoint {
                self.runner.copy_slot(slot, sequence.slot);
            }
        }
        if self.free_slots.is_none() {
            self.copy_part(sequence);
        }
        if before == 0 || sequence.computed > before {
            sequence.missed(self.missed(sequence, known, known_pages));
        }
    }

    /// What the tree does not hold of a sequence, and why; `known` is the last of the `known_pages` whole pages that it holds of it.
    pub(super) fn missed(&self, sequence: &Sequence, known: Parent, known_pages: usize) -> Option<Missed> {
        if sequence.left() <= PAGE_TOKENS {
            return None;
        }
        let rest = sequence.keys.get(known_pages * PAGE_TOKENS..sequence.sharable_tokens()).unwrap_or_default();
        let part = match self.pages.next(known, rest) {
            Next::Part(_, tokens) => tokens,
            Next::Whole(_) | Next::Nothing => 0,
        };
        let why = match sequence.computed < known_pages * PAGE_TOKENS {
            _ if sequence.prompt_logprobs.is_some() => Miss::Scored,
            true => Miss::NoState,
            false if self.pages.was_forgotten(known, rest) => Miss::Evicted,
            false => Miss::New,
        };
        Some(Missed { why, common_tokens: known_pages * PAGE_TOKENS + part })
    }

    /// Where the tree goes on with a page of which a sequence wants the beginning only, copies it.
    fn copy_part(&mut self, sequence: &mut Sequence) {
        let index = sequence.computed / PAGE_TOKENS;
        let rest = sequence.keys.get(index * PAGE_TOKENS..sequence.sharable_tokens()).unwrap_or_default();
        let Next::Part(page, tokens) = self.pages.next(sequence.parent(index), rest) else { return };
        if index * PAGE_TOKENS + tokens <= sequence.computed {
            return;
        }
        if sequence.pages.len() == index {
            // The page to copy must not be given up for its copy.
            self.pages.retain(page);
            sequence.pages.extend(self.pages.allocate());
            self.pages.release(page);
        }
        if let Some(&own) = sequence.pages.get(index) {
            self.runner.copy_page(page, own);
            sequence.found(index * PAGE_TOKENS + tokens);
        }
    }

    /// Puts what running sequences have filled into the tree, and keeps their recurrent state where it may be wanted.
    pub(super) fn share_filled(&mut self) {
        let recurrent = self.free_slots.is_some();
        for i in 0..self.running.len() {
            let sequence = &mut self.running[i];
            share_pages(&mut self.pages, sequence);
            if recurrent && sequence.computed.is_multiple_of(PAGE_TOKENS) {
                self.keep_state(i);
            }
        }
    }

    /// Keeps the state of a sequence at the end of a page: where its prompt was cut for it, and the latest of its answer.
    fn keep_state(&mut self, i: usize) {
        let sequence = &mut self.running[i];
        let in_answer = sequence.computed >= sequence.prompt_tokens;
        if !in_answer && !sequence.cuts.contains(&sequence.computed) {
            return;
        }
        let Some(page) = sequence.parent(sequence.computed / PAGE_TOKENS) else { return };
        if in_answer
            && sequence.answer_checkpoint != Some(page)
            && let Some(earlier) = sequence.answer_checkpoint.replace(page)
        {
            self.pages.drop_checkpoint(earlier);
        }
        if let Some(slot) = self.pages.add_checkpoint(page) {
            self.runner.copy_slot(sequence.slot, slot);
        }
    }

    /// Takes pages and slot from a sequence; what they hold stays in the tree while there is room.
    pub(super) fn let_go(&mut self, sequence: &mut Sequence) {
        if let Some(free) = &mut self.free_slots {
            free.push(sequence.slot);
        }
        self.release_pages(sequence);
    }

    /// Takes the pages of a running sequence that is about to give way.
    pub(super) fn free_pages_of(&mut self, i: usize) {
        let mut sequence = self.running.remove(i);
        self.release_pages(&mut sequence);
        self.running.insert(i, sequence);
    }

    fn release_pages(&mut self, sequence: &mut Sequence) {
        let index = sequence.shared_pages;
        let tail = sequence.keys.get(index * PAGE_TOKENS..sequence.computed).unwrap_or_default();
        // A recurrent state at the end of the tail is not kept, so its keys and values would be of no use.
        if let (None, Some(&page), false) = (&self.free_slots, sequence.pages.get(index), tail.is_empty()) {
            self.pages.share_tail(page, sequence.parent(index), tail);
        }
        // The last first, so that the beginning counts as used last.
        sequence.pages.drain(..).rev().for_each(|page| self.pages.release(page));
        sequence.start_again();
    }
}

/// Puts what a sequence has filled into the tree.
pub(super) fn share_pages(pages: &mut PagePool, sequence: &mut Sequence) {
    while (sequence.shared_pages + 1) * PAGE_TOKENS <= sequence.computed {
        let index = sequence.shared_pages;
        let tokens = &sequence.keys[index * PAGE_TOKENS..(index + 1) * PAGE_TOKENS];
        sequence.pages[index] = pages.share(sequence.pages[index], sequence.parent(index), tokens);
        sequence.shared_pages += 1;
    }
}
