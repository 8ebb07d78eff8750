//! How fine-tuning stands, for whoever watches the server: jobs by state, what was done since the start, how fast the job under way
//! goes.
//!
//! Contract: all callers' jobs together, and nothing of anybody's data. Not here: one caller's jobs (`record`).

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use serde_json::{Value, json};

use super::record::{self, Pace};
use crate::{app::App, error::ApiError, store::JOBS};

/// The states of jobs.
const STATES: [&str; 7] = ["queued", "validating_files", "running", "paused", "succeeded", "failed", "cancelled"];

/// What was done since the start.
#[derive(Debug, Default)]
pub(crate) struct Tuned {
    steps: AtomicU64,
    tokens: AtomicU64,
    /// Of the job under way, once two of its steps are done.
    tokens_per_s: Mutex<Option<f64>>,
}

impl Tuned {
    /// Counts what a job has done and the store has taken in.
    pub(super) fn add(&self, (steps, tokens): (u64, u64), pace: &Pace) {
        self.steps.fetch_add(steps, Ordering::Relaxed);
        self.tokens.fetch_add(tokens, Ordering::Relaxed);
        *self.tokens_per_s.lock().unwrap_or_else(PoisonError::into_inner) = pace.tokens_per_s();
    }

    /// No job is under way.
    pub(super) fn rest(&self) {
        *self.tokens_per_s.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// How fine-tuning stands.
pub(crate) struct Standing {
    /// How many jobs are in each state.
    pub(crate) jobs: Vec<(&'static str, usize)>,
    /// Steps since the start.
    pub(crate) steps: u64,
    /// Tokens learnt from since the start.
    pub(crate) tokens: u64,
    /// The job under way.
    pub(crate) running: Option<Running>,
}

/// The job under way.
pub(crate) struct Running {
    /// The model that is trained.
    model: String,
    /// Steps done, in all servers.
    pub(crate) step: u64,
    /// Steps in all; 0 before its data have been read.
    pub(crate) steps: u64,
    /// Tokens a second, once it is known.
    pub(crate) tokens_per_s: Option<f64>,
}

/// How fine-tuning stands. Reads every job's object.
///
/// # Errors
/// When the store fails.
pub(crate) fn standing(app: &App) -> Result<Standing, ApiError> {
    let (all, running, tuned) = (app.store.all(JOBS)?, app.running_job(), &app.tuned);
    let count = |state: &'static str| (state, all.iter().filter(|job| job["status"] == *state).count());
    let running = all.iter().find(|job| running.as_deref().is_some_and(|id| job["id"] == *id)).map(|job| {
        let (step, steps) = record::steps(job);
        let tokens_per_s = *tuned.tokens_per_s.lock().unwrap_or_else(PoisonError::into_inner);
        Running { model: record::base(job), step, steps, tokens_per_s }
    });
    let [steps, tokens] = [&tuned.steps, &tuned.tokens].map(|count| count.load(Ordering::Relaxed));
    Ok(Standing { jobs: STATES.map(count).to_vec(), steps, tokens, running })
}

impl Standing {
    /// As JSON; `available` says whether the server takes new jobs.
    pub(crate) fn to_json(&self, available: bool) -> Value {
        let jobs: serde_json::Map<_, _> = self.jobs.iter().map(|(state, n)| ((*state).to_owned(), json!(n))).collect();
        let running = self.running.as_ref().map(|Running { model, step, steps, tokens_per_s }| {
            json!({ "model": model, "step": step, "steps": steps, "trained_tokens_per_s": tokens_per_s })
        });
        let since_start = json!({ "steps": self.steps, "trained_tokens": self.tokens });
        json!({ "available": available, "jobs": jobs, "running": running, "since_start": since_start })
    }
}
