//! What every handler shares: the models that are served, the limits, the moment of the start.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use axum::http::StatusCode;
use qwenkit_engine::Session;
use qwenkit_text::{Opening, ThinkingSupport};

use tokio::{sync::Notify, task::AbortHandle};

use crate::{Keys, Limits, error::ApiError, store::Store};

/// A model behind a name.
pub struct ServedModel {
    /// The name that requests give.
    pub name: String,
    /// Further names of the same model.
    pub aliases: Vec<String>,
    /// The model.
    pub session: Session,
    /// What its template knows of thinking.
    pub(crate) thinking: ThinkingSupport,
}

impl ServedModel {
    /// A model behind `name` and its aliases.
    pub fn new(name: String, aliases: Vec<String>, session: Session) -> ServedModel {
        let none =
            || ThinkingSupport { thinks: false, default: Opening::Unopened, has_switch: false, efforts: Vec::new() };
        let thinking = session.template().map_or_else(none, ThinkingSupport::of_template);
        ServedModel { name, aliases, session, thinking }
    }

    fn has_name(&self, name: &str) -> bool {
        self.name == name || self.aliases.iter().any(|alias| alias == name)
    }
}

/// The server's state.
pub(crate) struct App {
    models: Vec<Arc<ServedModel>>,
    pub(crate) limits: Limits,
    pub(crate) keys: Keys,
    pub(crate) started: Instant,
    pub(crate) started_unix_s: u64,
    pub(crate) store: Store,
    /// Told when a batch has come.
    pub(crate) work: Notify,
    /// Held while a batch's object is changed.
    pub(crate) batch_order: Mutex<()>,
    /// Responses that run with nobody waiting, by id.
    background: Mutex<HashMap<String, AbortHandle>>,
    requests: AtomicU64,
    /// Makes ids that nobody can guess.
    secret: RandomState,
    stopping: AtomicBool,
}

impl App {
    pub(crate) fn new(models: Vec<ServedModel>, limits: Limits, keys: Keys, store: Store) -> App {
        App {
            models: models.into_iter().map(Arc::new).collect(),
            limits,
            keys,
            started: Instant::now(),
            started_unix_s: unix_s(),
            store,
            work: Notify::new(),
            batch_order: Mutex::new(()),
            background: Mutex::new(HashMap::new()),
            requests: AtomicU64::new(0),
            secret: RandomState::new(),
            stopping: AtomicBool::new(false),
        }
    }

    /// All models, the default one first.
    pub(crate) fn models(&self) -> &[Arc<ServedModel>] {
        &self.models
    }

    /// The model of this name; `default`, or no name at all, is the first.
    ///
    /// # Errors
    /// When there is none: says which there are. When the server is about to stop.
    pub(crate) fn model(&self, name: Option<&str>) -> Result<Arc<ServedModel>, ApiError> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("the server is stopping and takes no new requests"));
        }
        let named = |m: &&Arc<ServedModel>| match name {
            None | Some("default") => true,
            Some(name) => m.has_name(name) || name.strip_suffix(":latest").is_some_and(|name| m.has_name(name)),
        };
        self.models.iter().find(named).cloned().ok_or_else(|| {
            let shown: String = name.unwrap_or_default().chars().take(80).collect();
            let names: Vec<&str> = self.models.iter().map(|m| m.name.as_str()).collect();
            let message = format!("no model {shown:?} is served here; there is {}", names.join(", "));
            let error = ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
            ApiError { param: Some("model".to_owned()), ..error.with_code("model_not_found") }
        })
    }

    /// From now on new requests are refused.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.work.notify_one();
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
