//! Pages that are kept in files: prompts go on from what an earlier life of the process has computed, and what is worth
//! keeping is written.
//!
//! Worth keeping is a page that a second request has used, and at the end whatever is there. Both ways are cut into files, so
//! that nobody waits for more than a few of another's; a hybrid model's state is one file, however large.

use std::{
    collections::{HashSet, VecDeque},
    time::{Duration, Instant},
};

use qwenkit_kernels::PAGE_TOKENS;

use super::{Scheduler, prefix::share_pages};
use crate::{
    disk::{DiskPages, Entry, Part},
    pages::PlainPage,
    runner::Runner,
    sequence::Sequence,
};

/// Reading files takes about so much of a step.
const FETCH_TIME: Duration = Duration::from_millis(30);
/// Pages that a step hands to the writer.
const KEPT_PAGES: usize = 8;

/// The files, and what is going to be written.
pub(super) struct Kept {
    files: DiskPages,
    /// Pages that a second request has used.
    soon: VecDeque<(u32, PlainPage)>,
    /// Of these, what is to be written.
    wanted: HashSet<Entry>,
    /// Reading files takes about so much of a step; a page at least is read.
    pub(super) fetch_time: Duration,
}

impl Kept {
    pub(super) fn new(files: DiskPages) -> Kept {
        Kept { files, soon: VecDeque::new(), wanted: HashSet::new(), fetch_time: FETCH_TIME }
    }

    pub(super) fn failures(&self) -> u64 {
        self.files.failures()
    }
}

impl PlainPage {
    fn page(self) -> Entry {
        Entry { text: self.text, part: Part::Page }
    }

    fn state(self) -> Entry {
        Entry { text: self.text, part: Part::State }
    }
}

impl<R: Runner> Scheduler<R> {
    /// Reads pages of prompts from files. Returns whose have not all been read yet: they had better wait for them.
    pub(super) fn fetch(&mut self) -> Vec<usize> {
        let Some(kept) = &mut self.kept else { return Vec::new() };
        kept.files.refresh();
        let end = Instant::now() + kept.fetch_time;
        let (mut waiting, mut has_read) = (Vec::new(), false);
        for i in 0..self.running.len() {
            if self.running[i].is_generating() || self.follows_another(i) {
                continue;
            }
            let ahead = self.in_files(&self.running[i]);
            if ahead.is_empty() {
                continue;
            }
            if has_read && Instant::now() > end {
                waiting.push(i);
                continue;
            }
            let mut sequence = self.running.remove(i);
            let before = sequence.computed;
            has_read = true;
            let is_done = self.fetch_for(&mut sequence, &ahead, end);
            if sequence.computed > before {
                self.gauges.lock().disk_tokens += (sequence.computed - before) as u64;
                let pages = sequence.shared_pages;
                sequence.missed(self.missed(&sequence, sequence.parent(pages), pages));
            }
            self.running.insert(i, sequence);
            if !is_done {
                waiting.push(i);
            }
        }
        waiting
    }

    /// The pages that a sequence would go on with and that are in files, as far as they are of use to it.
    fn in_files(&self, sequence: &Sequence) -> Vec<PlainPage> {
        let Some(Kept { files, .. }) = &self.kept else { return Vec::new() };
        let first = sequence.computed / PAGE_TOKENS;
        let rest = sequence.keys.get(first * PAGE_TOKENS..sequence.sharable_tokens()).unwrap_or_default();
        let ahead = self.pages.plain_ahead(sequence.parent(first), rest);
        let mut ahead: Vec<PlainPage> = ahead.take_while(|page| files.has(page.page())).collect();
        if self.free_slots.is_some() {
            // Pages alone are worth nothing.
            ahead.truncate(ahead.iter().rposition(|page| files.has(page.state())).map_or(0, |last| last + 1));
        }
        ahead
    }

    /// Returns whether there is nothing left to read for a sequence; at least one file is read.
    fn fetch_for(&mut self, sequence: &mut Sequence, ahead: &[PlainPage], end: Instant) -> bool {
        let Some(Kept { files, .. }) = &mut self.kept else { return true };
        let (first, is_recurrent) = (sequence.computed / PAGE_TOKENS, self.free_slots.is_some());
        let mut has_read = false;
        for (index, page) in (first..).zip(ahead) {
            if index < sequence.fetched_pages {
                continue;
            }
            if has_read && Instant::now() > end {
                return false;
            }
            if sequence.pages.len() == index {
                sequence.pages.extend(self.pages.allocate());
            }
            let Some(&own) = sequence.pages.get(index) else { return true };
            let Some(bytes) = files.read(page.page(), page.depth) else { return true };
            if !self.runner.put_page(own, &bytes) {
                sequence.give_up("a kept page does not fit the model".to_owned());
                return true;
            }
            has_read = true;
            sequence.fetched_pages = index + 1;
            if !is_recurrent {
                sequence.found((index + 1) * PAGE_TOKENS);
                share_pages(&mut self.pages, sequence);
            }
        }
        if let (true, Some(last)) = (is_recurrent, ahead.last()) {
            if has_read && Instant::now() > end {
                return false;
            }
            let Some(bytes) = files.read(last.state(), last.depth) else { return true };
            if !self.runner.put_slot(sequence.slot, &bytes) {
                sequence.give_up("a kept state does not fit the model".to_owned());
                return true;
            }
            sequence.found((first + ahead.len()) * PAGE_TOKENS);
            share_pages(&mut self.pages, sequence);
            let page = sequence.parent(sequence.shared_pages);
            if let Some(slot) = page.and_then(|page| self.pages.add_checkpoint(page)) {
                self.runner.copy_slot(sequence.slot, slot);
            }
        }
        true
    }

    /// Notes that a second request uses these pages.
    pub(super) fn keep_soon(&mut self, path: &[u32]) {
        let Some(Kept { files, soon, wanted, .. }) = &mut self.kept else { return };
        for &page in path {
            let Some(plain) = self.pages.plain(page) else { return };
            let state = self.pages.checkpoint(page).map(|_| plain.state());
            for entry in [Some(plain.page()), state].into_iter().flatten() {
                files.used(entry, plain.depth);
                if !files.has(entry) && wanted.insert(entry) {
                    soon.push_back((page, plain));
                }
            }
        }
    }

    /// Hands some of what is to be kept to the writer.
    pub(super) fn keep_some(&mut self) {
        for _ in 0..KEPT_PAGES {
            let Some(kept) = self.kept.as_mut().filter(|kept| kept.files.has_room()) else { return };
            let Some((page, plain)) = kept.soon.pop_front() else { return };
            kept.wanted.remove(&plain.page());
            kept.wanted.remove(&plain.state());
            // It may hold another text by now.
            if self.pages.plain(page) != Some(plain) {
                continue;
            }
            let files = &mut kept.files;
            if !files.has(plain.page()) {
                files.write(plain.page(), plain.depth, self.runner.page(page));
            }
            if let Some(slot) = self.pages.checkpoint(page).filter(|_| !files.has(plain.state())) {
                files.write(plain.state(), plain.depth, self.runner.slot(slot));
            }
        }
    }

    /// Writes what is there and not kept yet, as far as files may hold it: the process is about to end. Nothing is kept after it.
    pub(crate) fn keep_all(&mut self) {
        let Some(Kept { mut files, .. }) = self.kept.take() else { return };
        files.refresh();
        let (mut room, mut missing) = (files.room_bytes(), Vec::new());
        for (page, plain) in self.pages.all_plain() {
            let state = self.pages.checkpoint(page).filter(|_| !files.has(plain.state()));
            let page = Some(page).filter(|_| !files.has(plain.page()));
            let bytes =
                page.map_or(0, |_| files.file_bytes(Part::Page)) + state.map_or(0, |_| files.file_bytes(Part::State));
            let Some(left) = room.checked_sub(bytes) else { break };
            room = left;
            missing.push((plain, page, state));
        }
        let Some(mut writer) = files.finish() else { return };
        // What was used last is written last, so that it goes last.
        for (plain, page, state) in missing.into_iter().rev() {
            let page = page.map_or(Ok(()), |page| writer.write(plain.page(), plain.depth, &self.runner.page(page)));
            let written = page.and_then(|()| {
                state.map_or(Ok(()), |slot| writer.write(plain.state(), plain.depth, &self.runner.slot(slot)))
            });
            // A full disk will be full for the next page too.
            if written.is_err() {
                return;
            }
        }
    }
}
