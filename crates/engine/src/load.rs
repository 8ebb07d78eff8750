//! How busy an engine is: figures that anybody may read at any time without asking the loop.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// An engine's figures, as of its last step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests that wait for their turn.
    pub waiting: usize,
    /// Requests that are being computed.
    pub running: usize,
    /// Pages of the key/value cache that running requests use.
    pub pages_used: usize,
    /// Pages in all.
    pub pages_total: usize,
    /// Tokens of prompts since the start, cached ones included.
    pub prompt_tokens: u64,
    /// Of these, tokens whose state was still there.
    pub cached_tokens: u64,
    /// Tokens whose state was read from files, for prompts or for what begins again after giving way.
    pub disk_tokens: u64,
    /// Files of kept beginnings that could not be written since the start.
    pub disk_failures: u64,
    /// Tokens generated since the start.
    pub generated_tokens: u64,
    /// Tokens guessed and computed since the start.
    pub drafted_tokens: u64,
    /// Of these, tokens that were what the answer said.
    pub accepted_tokens: u64,
    /// Batches that have gone through the output head since the start.
    pub head_reads: u64,
    /// Bytes of it that they read.
    pub head_bytes: u64,
    /// Requests that ended since the start.
    pub finished: u64,
    /// Times that a running request gave its pages to another since the start.
    pub preempted: u64,
}

/// The figures, shared between the loop and everybody else.
#[derive(Default)]
pub(crate) struct Gauges(Mutex<Load>);

impl Gauges {
    pub(crate) fn read(&self) -> Load {
        *self.lock()
    }

    /// Numbers stay numbers even if somebody panicked between two of them.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Load> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
