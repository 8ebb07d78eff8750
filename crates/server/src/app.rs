//! What every handler shares: the models that are served, the limits, the moment of the start.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    io::Write,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use axum::http::StatusCode;
use qwenkit_engine::Session;
use qwenkit_text::{Opening, ThinkingSupport};

use tokio::{sync::Notify, task::AbortHandle};

use crate::{
    Config, Keys, Limits,
    audit::AuditLog,
    error::ApiError,
    metrics::{Responses, Work},
    store::Store,
};

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
    pub(crate) work: Work,
}

impl ServedModel {
    /// A model behind `name` and its aliases.
    pub fn new(name: String, aliases: Vec<String>, session: Session) -> ServedModel {
        let none =
            || ThinkingSupport { thinks: false, default: Opening::Unopened, has_switch: false, efforts: Vec::new() };
        let thinking = session.template().map_or_else(none, ThinkingSupport::of_template);
        ServedModel { name, aliases, session, thinking, work: Work::default() }
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
    pub(crate) responses: Responses,
    pub(crate) audit: Option<AuditLog>,
    /// Whether only this machine can ask, and nobody needs a key.
    pub(crate) is_private: bool,
    /// Pages of other origins that may ask.
    pub(crate) origins: Vec<String>,
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
    pub(crate) fn new(models: Vec<ServedModel>, config: &Config, audit: Option<AuditLog>, store: Store) -> App {
        App {
            models: models.into_iter().map(Arc::new).collect(),
            limits: config.limits,
            keys: config.keys.clone(),
            responses: Responses::default(),
            audit,
            is_private: config.keys.is_empty() && config.host.is_loopback(),
            origins: config.origins.clone(),
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

    /// Tells whoever runs the server.
    pub(crate) fn warn(&self, message: &str) {
        // A server without a terminal has nobody to tell.
        let _ = writeln!(std::io::stderr(), "warning: {message}");
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
