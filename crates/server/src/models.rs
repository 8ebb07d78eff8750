//! The models behind their names: which are loaded, and loading one when it is asked for.
//!
//! Contract: one model is loaded at a time; when memory is short, models that nobody is using are unloaded, the longest
//! unused first, until there is room or none is left. A model in use is never unloaded.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use axum::http::StatusCode;
use qwenkit_engine::Session;
use qwenkit_text::{Opening, ThinkingSupport};

use crate::{
    error::ApiError,
    images::{ImageLimits, ImageRoom},
    metrics::Work,
};

/// Why a model cannot be loaded now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadRefusal {
    /// In words.
    pub message: String,
    /// Whether more free memory would help.
    pub needs_memory: bool,
}

type Loader = Box<dyn Fn() -> Result<Session, LoadRefusal> + Send + Sync>;

/// A model that a server can have.
pub struct ModelSource {
    name: String,
    aliases: Vec<String>,
    loaded: Option<Session>,
    load: Option<Loader>,
    /// Whether it sees once it is loaded.
    images: bool,
}

impl ModelSource {
    /// A model that is there, and stays.
    pub fn loaded(name: String, aliases: Vec<String>, session: Session) -> ModelSource {
        ModelSource { name, aliases, images: session.pictures().is_ok(), loaded: Some(session), load: None }
    }

    /// A model that may be unloaded when memory is short, and is loaded when it is asked for and is not there;
    /// `session` if it is there already.
    pub fn on_demand(
        name: String,
        aliases: Vec<String>,
        session: Option<Session>,
        load: impl Fn() -> Result<Session, LoadRefusal> + Send + Sync + 'static,
    ) -> ModelSource {
        let images = session.as_ref().is_some_and(|session| session.pictures().is_ok());
        ModelSource { name, aliases, loaded: session, load: Some(Box::new(load)), images }
    }

    /// Says of a model that is not loaded yet whether it is going to see.
    pub fn with_images(self, images: bool) -> ModelSource {
        ModelSource { images, ..self }
    }

    /// The name that requests give.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// A model in memory.
pub(crate) struct ServedModel {
    /// The name that requests give.
    pub(crate) name: String,
    pub(crate) session: Session,
    /// What its template knows of thinking.
    pub(crate) thinking: ThinkingSupport,
    pub(crate) work: Arc<Work>,
    pub(crate) images: Arc<ImageRoom>,
}

/// A name and what is behind it.
pub(crate) struct Slot {
    pub(crate) name: String,
    pub(crate) aliases: Vec<String>,
    /// Whether the model sees.
    pub(crate) sees: bool,
    load: Option<Loader>,
    model: Mutex<Option<Arc<ServedModel>>>,
    /// When it was last asked for, as a count of requests.
    used: AtomicU64,
    /// Goes on through unloading.
    work: Arc<Work>,
    images: Arc<ImageRoom>,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<ServedModel>>> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model, if it is in memory.
    pub(crate) fn model(&self) -> Option<Arc<ServedModel>> {
        self.lock().clone()
    }

    fn has_name(&self, name: &str) -> bool {
        self.name == name || self.aliases.iter().any(|alias| alias == name)
    }

    fn put(&self, session: Session) -> Arc<ServedModel> {
        let none =
            || ThinkingSupport { thinks: false, default: Opening::Unopened, has_switch: false, efforts: Vec::new() };
        let thinking = session.template().map_or_else(none, ThinkingSupport::of_template);
        let (work, images) = (Arc::clone(&self.work), Arc::clone(&self.images));
        let model = ServedModel { name: self.name.clone(), session, thinking, work, images };
        Arc::clone(self.lock().insert(Arc::new(model)))
    }

    /// Takes the model out if it can be loaded again and nobody uses it.
    fn take_idle(&self) -> Option<Arc<ServedModel>> {
        let mut model = self.lock();
        let idle = model.as_ref().filter(|model| {
            let load = model.session.load();
            self.load.is_some() && Arc::strong_count(model) == 1 && load.running + load.waiting == 0
        });
        idle.is_some().then(|| model.take()).flatten()
    }
}

/// All models of a server.
pub(crate) struct Models {
    slots: Vec<Arc<Slot>>,
    requests: AtomicU64,
    /// Held while a model is loaded.
    loading: tokio::sync::Mutex<()>,
}

impl Models {
    /// Of sources, the first of which is the default.
    pub(crate) fn new(sources: Vec<ModelSource>, images: ImageLimits) -> Models {
        let images = Arc::new(ImageRoom::new(images));
        let slot = |source: ModelSource| {
            let ModelSource { name, aliases, loaded, load, images: sees } = source;
            let (model, used, work) = (Mutex::new(None), AtomicU64::new(0), Arc::default());
            let slot = Slot { name, aliases, sees, load, model, used, work, images: Arc::clone(&images) };
            if let Some(session) = loaded {
                slot.put(session);
            }
            Arc::new(slot)
        };
        Models {
            slots: sources.into_iter().map(slot).collect(),
            requests: AtomicU64::new(0),
            loading: tokio::sync::Mutex::new(()),
        }
    }

    /// All names, the default one first.
    pub(crate) fn slots(&self) -> &[Arc<Slot>] {
        &self.slots
    }

    /// The models in memory.
    pub(crate) fn loaded(&self) -> Vec<Arc<ServedModel>> {
        self.slots.iter().filter_map(|slot| slot.model()).collect()
    }

    /// The slot of this name; `default`, or no name at all, is the first.
    ///
    /// # Errors
    /// When there is none: says which there are.
    pub(crate) fn slot(&self, name: Option<&str>) -> Result<&Arc<Slot>, ApiError> {
        let named = |slot: &&Arc<Slot>| match name {
            None | Some("default") => true,
            Some(name) => slot.has_name(name) || name.strip_suffix(":latest").is_some_and(|name| slot.has_name(name)),
        };
        self.slots.iter().find(named).ok_or_else(|| {
            let shown: String = name.unwrap_or_default().chars().take(80).collect();
            let names: Vec<&str> = self.slots.iter().map(|slot| slot.name.as_str()).collect();
            let message = format!("no model {shown:?} is served here; there is {}", names.join(", "));
            let error = ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
            ApiError { param: Some("model".to_owned()), ..error.with_code("model_not_found") }
        })
    }

    /// The model of this name, loaded if it is not yet.
    ///
    /// # Errors
    /// When there is none of this name, or it cannot be loaded.
    pub(crate) async fn get(&self, name: Option<&str>) -> Result<Arc<ServedModel>, ApiError> {
        let slot = self.slot(name)?;
        slot.used.store(self.requests.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        if let Some(model) = slot.model() {
            return Ok(model);
        }
        let _turn = self.loading.lock().await;
        loop {
            // Somebody else may have loaded it meanwhile.
            if let Some(model) = slot.model() {
                return Ok(model);
            }
            match load(slot).await? {
                Ok(model) => return Ok(model),
                Err(refusal) if refusal.needs_memory && self.unload_one().await => {}
                Err(refusal) => {
                    let message = format!("{} cannot be loaded now: {}", slot.name, refusal.message);
                    return Err(ApiError::unavailable(message).with_code("model_not_loaded"));
                }
            }
        }
    }

    /// Unloads the longest unused idle model; false where there is none.
    async fn unload_one(&self) -> bool {
        let mut slots: Vec<&Arc<Slot>> = self.slots.iter().collect();
        slots.sort_by_key(|slot| slot.used.load(Ordering::Relaxed));
        let Some(model) = slots.into_iter().find_map(|slot| slot.take_idle()) else { return false };
        // Its memory is free when its thread has ended.
        tokio::task::spawn_blocking(move || drop(model)).await.is_ok()
    }
}

async fn load(slot: &Arc<Slot>) -> Result<Result<Arc<ServedModel>, LoadRefusal>, ApiError> {
    let slot = Arc::clone(slot);
    let work = move || match &slot.load {
        Some(load) => load().map(|session| slot.put(session)),
        None => Err(LoadRefusal { message: "it was unloaded for good".to_owned(), needs_memory: false }),
    };
    tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal("loading the model failed"))
}
