//! What every handler shares: the models that are served, the limits, the moment of the start.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    io::Write,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use tokio::{sync::Notify, task::AbortHandle};

use crate::{
    Config, Job, Keys, Limits, Log,
    audit::AuditLog,
    error::ApiError,
    fine_tuning::Tuned,
    metrics::Responses,
    models::{ModelSource, Models, ServedModel},
    store::Store,
};

/// The server's state.
pub(crate) struct App {
    pub(crate) models: Models,
    pub(crate) limits: Limits,
    pub(crate) keys: Keys,
    pub(crate) started: Instant,
    pub(crate) started_unix_s: u64,
    pub(crate) responses: Responses,
    pub(crate) audit: Option<AuditLog>,
    /// Whether only this machine can ask, and nobody needs a key.
    pub(crate) is_private: bool,
    pub(crate) log: Option<Log>,
    /// Pages of other origins that may ask.
    pub(crate) origins: Vec<String>,
    pub(crate) store: Store,
    /// What can be done beside serving.
    pub(crate) jobs: Vec<Arc<dyn Job>>,
    /// Where the store is, if it is anywhere.
    pub(crate) folder: Option<PathBuf>,
    /// Told when a batch has come.
    pub(crate) work: Notify,
    /// Held while a batch's object is changed.
    pub(crate) batch_order: Mutex<()>,
    /// Told when there is something to do about jobs.
    pub(crate) job_work: Notify,
    /// Held while a job's object is changed.
    pub(crate) job_order: Mutex<()>,
    /// The id of the job that runs.
    running_job: Mutex<Option<String>>,
    /// What jobs have done since the start.
    pub(crate) tuned: Tuned,
    /// Responses that run with nobody waiting, by id.
    background: Mutex<HashMap<String, AbortHandle>>,
    requests: AtomicU64,
    /// Makes ids that nobody can guess.
    secret: RandomState,
    stopping: AtomicBool,
}

impl App {
    pub(crate) fn new(models: Vec<ModelSource>, config: &Config, audit: Option<AuditLog>, store: Store) -> App {
        App {
            models: Models::new(models, config.limits.images),
            limits: config.limits,
            keys: config.keys.clone(),
            responses: Responses::default(),
            audit,
            is_private: config.keys.is_empty() && config.host.is_loopback(),
            log: config.log.clone(),
            origins: config.origins.clone(),
            started: Instant::now(),
            started_unix_s: unix_s(),
            store,
            jobs: config.jobs.clone(),
            folder: config.store.clone(),
            work: Notify::new(),
            batch_order: Mutex::new(()),
            job_work: Notify::new(),
            job_order: Mutex::new(()),
            running_job: Mutex::new(None),
            tuned: Tuned::default(),
            background: Mutex::new(HashMap::new()),
            requests: AtomicU64::new(0),
            secret: RandomState::new(),
            stopping: AtomicBool::new(false),
        }
    }

    /// The model of this name; `default`, or no name at all, is the first.
    ///
    /// # Errors
    /// When there is none, or it cannot be loaded. When the server is about to stop.
    pub(crate) async fn model(&self, name: Option<&str>) -> Result<Arc<ServedModel>, ApiError> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("the server is stopping and takes no new requests"));
        }
        self.models.get(name).await
    }

    /// Tells whoever runs the server.
    pub(crate) fn warn(&self, message: &str) {
        match &self.log {
            Some(log) => log.warn(message),
            // A server without a terminal has nobody to tell.
            None => drop(writeln!(std::io::stderr(), "warning: {message}")),
        }
    }

    /// From now on new requests are refused.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.work.notify_one();
        self.job_work.notify_one();
    }

    /// The id of the job that runs.
    pub(crate) fn running_job(&self) -> Option<String> {
        self.running_job.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_running_job(&self, id: Option<String>) {
        *self.running_job.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Responses that run with nobody waiting.
    pub(crate) fn background(&self) -> MutexGuard<'_, HashMap<String, AbortHandle>> {
        self.background.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new id, which no other object has and nobody guesses.
    pub(crate) fn new_id(&self, prefix: &str) -> String {
        let count = self.requests.fetch_add(1, Ordering::Relaxed);
        let part = |salt: u8| self.secret.hash_one((self.started_unix_s, count, salt));
        format!("{prefix}{:016x}{:016x}", part(0), part(1))
    }
}

/// Seconds since 1970.
pub(crate) fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
