//! What one request uses: counted for its line in the log, and against the limits of its key.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qwenkit_engine::{Missed, Summary};

use crate::quota::Meter;

tokio::task_local! {
    /// What the request at hand is charged to.
    pub(crate) static TALLY: Tally;
}

/// What the request at hand is charged to; nothing that anybody sees outside of one.
pub(crate) fn tally() -> Tally {
    TALLY.try_with(Tally::clone).unwrap_or_default()
}

/// The account of a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    meter: Option<Meter>,
    used: Arc<Mutex<Used>>,
}

/// What a request has used.
#[derive(Clone, Debug, Default)]
pub(crate) struct Used {
    /// The model that was asked.
    pub(crate) model: Option<String>,
    pub(crate) prompt_tokens: usize,
    pub(crate) cached_tokens: usize,
    pub(crate) generated_tokens: usize,
    /// What the cache did not have of its first prompt that is not all there.
    pub(crate) missed: Option<Missed>,
}

impl Tally {
    /// An account whose tokens count against the limits of `meter`.
    pub(crate) fn new(meter: Option<Meter>) -> Tally {
        Tally { meter, used: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn used(&self) -> Used {
        self.lock().clone()
    }

    /// A model was asked.
    pub(crate) fn asks(&self, model: &str) {
        self.lock().model = Some(model.to_owned());
    }

    /// An answer has ended.
    pub(crate) fn answered(&self, summary: &Summary) {
        let mut used = self.lock();
        used.prompt_tokens += summary.prompt_tokens;
        used.cached_tokens += summary.cached_tokens;
        used.generated_tokens += summary.ids.len();
        used.missed = used.missed.or(summary.missed);
        drop(used);
        self.charge(summary.prompt_tokens + summary.ids.len());
    }

    /// Prompts were read, for numbers or for an answer that was left before its end, which had so many tokens.
    pub(crate) fn read(&self, prompt_tokens: usize, generated_tokens: usize) {
        let mut used = self.lock();
        used.prompt_tokens += prompt_tokens;
        used.generated_tokens += generated_tokens;
        drop(used);
        self.charge(prompt_tokens + generated_tokens);
    }

    fn charge(&self, tokens: usize) {
        if let Some(meter) = &self.meter {
            meter.add_tokens(tokens);
        }
    }
}
