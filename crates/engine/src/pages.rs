//! Pages of the key/value cache: who has which, and what finished sequences left behind.
//!
//! A page belongs to one running sequence, to one remembered sequence, or to nobody. A new request takes over the
//! remembered sequence with which it shares the longest beginning, so that a conversation is not computed again each
//! turn; when pages run out, the sequence remembered longest is forgotten.

use std::collections::VecDeque;

use qwenkit_kernels::PAGE_TOKENS;
use qwenkit_tensor::TokenId;

/// All pages of an engine.
pub(crate) struct PagePool {
    free: Vec<u32>,
    /// Oldest first.
    remembered: VecDeque<Remembered>,
    total: usize,
}

/// A finished sequence whose keys and values are still there.
struct Remembered {
    /// The tokens whose state the pages hold.
    tokens: Vec<TokenId>,
    pages: Vec<u32>,
}

/// The pages of a new sequence, and how many tokens of its prompt they already hold.
pub(crate) struct Taken {
    pub(crate) pages: Vec<u32>,
    pub(crate) cached_tokens: usize,
}

impl PagePool {
    pub(crate) fn new(pages: usize) -> PagePool {
        PagePool { free: (0..pages as u32).rev().collect(), remembered: VecDeque::new(), total: pages }
    }

    /// Positions that all pages hold together.
    pub(crate) fn capacity_tokens(&self) -> usize {
        self.total * PAGE_TOKENS
    }

    /// Pages for `tokens` positions of a sequence that begins with `prompt`; `None` while too many are in use.
    pub(crate) fn take(&mut self, prompt: &[TokenId], tokens: usize) -> Option<Taken> {
        let wanted = tokens.div_ceil(PAGE_TOKENS);
        let idle = self.free.len() + self.remembered.iter().map(|r| r.pages.len()).sum::<usize>();
        if idle < wanted {
            return None;
        }
        let mut taken = self.take_over(prompt);
        // A longer sequence may have been taken over than is needed.
        while taken.pages.len() > wanted {
            self.free.extend(taken.pages.pop());
        }
        while taken.pages.len() < wanted {
            match self.free.pop() {
                Some(page) => taken.pages.push(page),
                None => self.free.extend(self.remembered.pop_front()?.pages),
            }
        }
        Some(taken)
    }

    /// The remembered sequence with the longest common beginning, cut to it.
    fn take_over(&mut self, prompt: &[TokenId]) -> Taken {
        let common = |r: &Remembered| r.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let best = (0..self.remembered.len()).max_by_key(|&i| common(&self.remembered[i]));
        // Less than a page is not worth another conversation's memory.
        let Some(i) = best.filter(|&i| common(&self.remembered[i]) >= PAGE_TOKENS.min(prompt.len())) else {
            return Taken { pages: Vec::new(), cached_tokens: 0 };
        };
        // The last token is computed again in any case: its logits are wanted.
        let cached_tokens = common(&self.remembered[i]).min(prompt.len() - 1);
        let mut pages = self.remembered.remove(i).map(|r| r.pages).unwrap_or_default();
        let kept = cached_tokens.div_ceil(PAGE_TOKENS);
        self.free.extend(pages.drain(kept.min(pages.len())..));
        Taken { pages, cached_tokens }
    }

    /// Takes back the pages of a sequence that has ended; they hold the state of `tokens`.
    pub(crate) fn give_back(&mut self, tokens: Vec<TokenId>, mut pages: Vec<u32>) {
        let used = tokens.len().div_ceil(PAGE_TOKENS).min(pages.len());
        self.free.extend(pages.drain(used..));
        if !pages.is_empty() {
            self.remembered.push_back(Remembered { tokens, pages });
        }
    }

    /// Every page that is not in use by a running sequence; with those in use it must make `total`.
    #[cfg(test)]
    pub(crate) fn idle_pages(&self) -> Vec<u32> {
        let remembered = self.remembered.iter().flat_map(|r| &r.pages);
        let mut pages: Vec<u32> = self.free.iter().chain(remembered).copied().collect();
        pages.sort_unstable();
        pages
    }

    #[cfg(test)]
    pub(crate) fn total(&self) -> usize {
        self.total
    }
}
