//! Pages that are kept in files: prompts go on from what an earlier life of the process has computed, and what is worth
//! keeping is written.
//!
//! Worth keeping is a page that a second request has used, and at the end whatever is there. Both ways are cut into pieces, so
//! that nobody waits long for another's files.

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

/// Reading files takes so much of a step.
const FETCH_TIME: Duration = Duration::from_millis(30);
/// Pages that a step hands to the writer.
const KEPT_PAGES: usize = 8;

/// The files, and what is going to be written.
pub(super) struct Kept {
    files: DiskPages,
    /// Pages that a second request has used.
    soon: VecDeque<(u32, PlainPage)>,
    /// Of these and of those before, the texts.
    known: HashSet<Entry>,
}

impl Kept {
    pub(super) fn new(files: DiskPages) -> Kept {
        Kept { files, soon: VecDeque::new(), known: HashSet::new() }
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
    /// Reads pages of prompts from files. Returns whose have not all been read yet: it had better wait for them.
    pub(super) fn fetch(&mut self) -> Option<usize> {
        self.kept.as_ref()?;
        let start = Instant::now();
        for i in 0..self.running.len() {
            if self.running[i].is_generating() || self.follows_another(i) {
                continue;
            }
            let mut sequence = self.running.remove(i);
            let before = sequence.computed;
            let is_done = self.fetch_for(&mut sequence, start);
            if sequence.computed > before {
                self.gauges.lock().disk_tokens += (sequence.computed - before) as u64;
                let pages = sequence.shared_pages;
                sequence.missed(self.missed(&sequence, sequence.parent(pages), pages));
            }
            self.running.insert(i, sequence);
            if !is_done {
                return Some(i);
            }
        }
        None
    }

    /// Returns whether there is nothing left to read for a sequence.
    fn fetch_for(&mut self, sequence: &mut Sequence, start: Instant) -> bool {
        let first = sequence.computed / PAGE_TOKENS;
        let rest = sequence.keys.get(first * PAGE_TOKENS..sequence.sharable_tokens()).unwrap_or_default();
        let Some(Kept { files, .. }) = &mut self.kept else { return true };
        let ahead = self.pages.plain_ahead(sequence.parent(first), rest);
        let mut ahead: Vec<PlainPage> = ahead.take_while(|page| files.has(page.page())).collect();
        let is_recurrent = self.free_slots.is_some();
        if is_recurrent {
            // Pages alone are worth nothing.
            ahead.truncate(ahead.iter().rposition(|page| files.has(page.state())).map_or(0, |last| last + 1));
        }
        for (index, page) in (first..).zip(&ahead) {
            if index < sequence.fetched_pages {
                continue;
            }
            if start.elapsed() > FETCH_TIME {
                return false;
            }
            let Some(bytes) = files.read(page.page(), page.depth) else { return true };
            if sequence.pages.len() == index {
                sequence.pages.extend(self.pages.allocate());
            }
            let Some(&own) = sequence.pages.get(index) else { return true };
            if !self.runner.put_page(own, &bytes) {
                sequence.give_up("a kept page does not fit the model".to_owned());
                return true;
            }
            sequence.fetched_pages = index + 1;
            if !is_recurrent {
                sequence.found((index + 1) * PAGE_TOKENS);
                share_pages(&mut self.pages, sequence);
            }
        }
        if let (true, Some(last)) = (is_recurrent, ahead.last()) {
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
        let Some(kept) = &mut self.kept else { return };
        for &page in path {
            let Some(plain) = self.pages.plain(page) else { return };
            let wanted = match self.pages.checkpoint(page) {
                Some(_) => plain.state(),
                None => plain.page(),
            };
            if !kept.files.has(wanted) && kept.known.insert(wanted) {
                kept.soon.push_back((page, plain));
            }
        }
    }

    /// Hands some of what is to be kept to the writer.
    pub(super) fn keep_some(&mut self) {
        for _ in 0..KEPT_PAGES {
            let Some(kept) = self.kept.as_mut().filter(|kept| kept.files.has_room()) else { return };
            let Some((page, plain)) = kept.soon.pop_front() else { return };
            // It may hold another text by now.
            if self.pages.plain(page) == Some(plain) {
                self.keep(page, plain);
            }
        }
    }

    /// Writes what is there and not kept yet, as far as files may hold it: the process is about to end. Nothing is kept after it.
    pub(crate) fn keep_all(&mut self) {
        let Some(Kept { files, .. }) = self.kept.take() else { return };
        let mut missing = Vec::new();
        for (page, plain) in self.pages.all_plain().into_iter().take(files.capacity_pages()) {
            let state = self.pages.checkpoint(page).filter(|_| !files.has(plain.state()));
            let page = Some(page).filter(|_| !files.has(plain.page()));
            missing.push((plain, page, state));
        }
        let Some(mut writer) = files.finish() else { return };
        for (plain, page, state) in missing {
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

    fn keep(&mut self, page: u32, plain: PlainPage) {
        let Some(Kept { files, known, .. }) = &mut self.kept else { return };
        if !files.has(plain.page()) {
            files.write(plain.page(), plain.depth, self.runner.page(page));
        }
        known.remove(&plain.page());
        if let Some(slot) = self.pages.checkpoint(page) {
            if !files.has(plain.state()) {
                files.write(plain.state(), plain.depth, self.runner.slot(slot));
            }
            known.remove(&plain.state());
        }
    }
}
