//! The models behind their names: which are loaded, and loading one when it is asked for.
//!
//! Contract: one model is loaded at a time; when memory is short, models that nobody is using are unloaded, the longest
//! unused first, until there is room or none is left. A model in use is never unloaded.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::http::StatusCode;
use qwenkit_engine::Session;
use qwenkit_models::Adapter;
use qwenkit_text::{Opening, ThinkingSupport};

use crate::{
    adapters::Adapters,
    error::ApiError,
    images::{ImageLimits, ImageRoom},
    metrics::Work,
    text::blocking,
};

/// How long a model that another needs the memory of may take to become idle.
const UNTIL_IDLE: Duration = Duration::from_millis(500);

/// Why a model cannot be loaded now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadRefusal {
    /// In words.
    pub message: String,
    /// Whether more free memory would help.
    pub needs_memory: bool,
}

type Loader = Box<dyn Fn() -> Result<Session, LoadRefusal> + Send + Sync>;

/// An adapter that a model can have.
#[derive(Clone, Debug)]
pub struct AdapterSource {
    /// The name that requests give, as if it were a model.
    pub name: String,
    /// A PEFT folder or a GGUF file.
    pub path: PathBuf,
}

/// A model that a server can have.
pub struct ModelSource {
    name: String,
    aliases: Vec<String>,
    loaded: Option<Session>,
    load: Option<Loader>,
    /// Whether it sees once it is loaded.
    images: bool,
    adapters: Vec<AdapterSource>,
}

impl ModelSource {
    /// A model that is there, and stays.
    pub fn loaded(name: String, aliases: Vec<String>, session: Session) -> ModelSource {
        ModelSource {
            name,
            aliases,
            images: session.pictures().is_ok(),
            loaded: Some(session),
            load: None,
            adapters: Vec::new(),
        }
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
        ModelSource { name, aliases, loaded: session, load: Some(Box::new(load)), images, adapters: Vec::new() }
    }

    /// Says of a model that is not loaded yet whether it is going to see.
    pub fn with_images(self, images: bool) -> ModelSource {
        ModelSource { images, ..self }
    }

    /// Has the model answer under adapters too.
    pub fn with_adapters(self, adapters: Vec<AdapterSource>) -> ModelSource {
        ModelSource { adapters, ..self }
    }

    /// The name that requests give.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// A model in memory, with an adapter or without.
#[derive(Clone)]
pub(crate) struct ServedModel {
    /// The name that requests give.
    pub(crate) name: String,
    /// Shared by a model and all of its adapters.
    pub(crate) session: Arc<Session>,
    pub(crate) adapter: Option<Arc<Adapter>>,
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
    pub(crate) adapters: Adapters,
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
        let (name, session) = (self.name.clone(), Arc::new(session));
        let model = ServedModel { name, session, adapter: None, thinking, work, images };
        Arc::clone(self.lock().insert(Arc::new(model)))
    }

    /// Takes the model out if it can be loaded again and nobody uses it.
    fn take_idle(&self) -> Option<Arc<ServedModel>> {
        let mut model = self.lock();
        let idle = model.as_ref().is_some_and(|model| {
            let load = model.session.load();
            let idle = self.load.is_some() && Arc::strong_count(model) == 1 && load.running + load.waiting == 0;
            idle && self.adapters.unload_idle(&model.session)
        });
        if idle { model.take() } else { None }
    }
}

/// All models of a server.
pub(crate) struct Models {
    slots: Vec<Arc<Slot>>,
    requests: AtomicU64,
    /// Held while a model is loaded.
    loading: tokio::sync::Mutex<()>,
    /// Held while a name is looked for and given.
    naming: Mutex<()>,
}

impl Models {
    /// Of sources, the first of which is the default.
    pub(crate) fn new(sources: Vec<ModelSource>, images: ImageLimits) -> Models {
        let images = Arc::new(ImageRoom::new(images));
        let slot = |source: ModelSource| {
            let ModelSource { name, aliases, loaded, load, images: sees, adapters } = source;
            let adapters = Adapters::new(adapters);
            let (model, used, work) = (Mutex::new(None), AtomicU64::new(0), Arc::default());
            let slot = Slot { name, aliases, sees, adapters, load, model, used, work, images: Arc::clone(&images) };
            if let Some(session) = loaded {
                slot.put(session);
            }
            Arc::new(slot)
        };
        Models {
            slots: sources.into_iter().map(slot).collect(),
            requests: AtomicU64::new(0),
            loading: tokio::sync::Mutex::new(()),
            naming: Mutex::new(()),
        }
    }

    /// All names, the default one first.
    pub(crate) fn slots(&self) -> &[Arc<Slot>] {
        &self.slots
    }

    /// The models in memory, adapters aside.
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
        self.slots.iter().find(named).ok_or_else(|| self.unknown(name.unwrap_or_default()))
    }

    /// The slot and the adapter of this name, if it is an adapter's.
    pub(crate) fn adapter(&self, name: &str) -> Option<(&Arc<Slot>, String)> {
        let names = [Some(name), name.strip_suffix(":latest")];
        self.slots.iter().find_map(|slot| {
            let own = slot.adapters.names().into_iter().find(|own| names.contains(&Some(own)))?;
            Some((slot, own))
        })
    }

    /// Whether requests can give this name.
    pub(crate) fn has_name(&self, name: &str) -> bool {
        self.adapter(name).is_some() || self.slot(Some(name)).is_ok()
    }

    /// Gives a model one more adapter; false if another model has its name.
    pub(crate) fn add_adapter(&self, slot: &Slot, source: AdapterSource, model: Option<Arc<ServedModel>>) -> bool {
        let _naming = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = !self.has_name(&source.name);
        if is_free {
            slot.adapters.add(source, model);
        }
        is_free
    }

    /// What is said to a name that nobody has.
    pub(crate) fn unknown(&self, name: &str) -> ApiError {
        let shown: String = name.chars().take(80).collect();
        let all = |slot: &Arc<Slot>| [vec![slot.name.clone()], slot.adapters.names()].concat();
        let names: Vec<String> = self.slots.iter().flat_map(all).collect();
        let message = format!("no model {shown:?} is served here; there is {}", names.join(", "));
        let error = ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        ApiError { param: Some("model".to_owned()), ..error.with_code("model_not_found") }
    }

    /// The model of this name, loaded if it is not yet.
    ///
    /// # Errors
    /// When there is none of this name, or it cannot be loaded.
    pub(crate) async fn get(&self, name: Option<&str>) -> Result<Arc<ServedModel>, ApiError> {
        let Some((slot, adapter)) = name.and_then(|name| self.adapter(name)) else {
            return self.base(self.slot(name)?).await;
        };
        let base = self.base(slot).await?;
        let slot = Arc::clone(slot);
        blocking(move || slot.adapters.model(&base, &adapter)).await
    }

    /// The model of a slot, loaded if it is not yet.
    async fn base(&self, slot: &Arc<Slot>) -> Result<Arc<ServedModel>, ApiError> {
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

    /// Unloads the longest unused idle model; false where there is none, nor becomes one soon: who asks for another model as soon
    /// as an answer has ended is faster than the answer's own request is let go.
    async fn unload_one(&self) -> bool {
        let mut slots: Vec<&Arc<Slot>> = self.slots.iter().collect();
        slots.sort_by_key(|slot| slot.used.load(Ordering::Relaxed));
        let until = Instant::now() + UNTIL_IDLE;
        let model = loop {
            if let Some(model) = slots.iter().find_map(|slot| slot.take_idle()) {
                break model;
            }
            let may_end = slots.iter().any(|slot| slot.load.is_some() && slot.model().is_some());
            if !may_end || Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(UNTIL_IDLE / 50).await;
        };
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

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use qwenkit_engine::{Options, Speculate};
    use qwenkit_formats::ModelFiles;
    use qwenkit_kernels::Isa;

    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
    }

    fn session() -> Session {
        let (threads, isa) = (1, Isa::detect().unwrap());
        let options = Options {
            threads,
            isa,
            context_tokens: Some(128),
            max_waiting: 8,
            speculate: Speculate::Off,
            prefix_cache: None,
        };
        Session::open(&ModelFiles::open(&fixture("parity/qwen2")).unwrap(), &options, &mut |_| {}).unwrap()
    }

    /// A tiny model in memory that could be loaded again.
    pub(crate) fn models() -> Models {
        let again = || Ok(session());
        let source = ModelSource::on_demand("base".to_owned(), Vec::new(), Some(session()), again);
        Models::new(vec![source], ImageLimits::default())
    }

    /// An adapter of the tiny model.
    pub(crate) fn adapter() -> PathBuf {
        fixture("parity-train/qwen2/adapter_init")
    }

    #[test]
    fn a_model_is_in_use_while_an_answer_holds_it_under_an_adapter_without_a_name() {
        let models = models();
        let slot = &models.slots()[0];
        assert!(models.add_adapter(slot, AdapterSource { name: "a".to_owned(), path: adapter() }, None));
        let answering = slot.adapters.model(&slot.model().unwrap(), "a").unwrap();
        assert!(slot.take_idle().is_none());
        assert!(slot.adapters.remove("a"));
        assert!(slot.take_idle().is_none(), "an answer under the adapter is still under way");
        drop(answering);
        // An adapter in memory that nobody uses goes with its model.
        assert!(models.add_adapter(slot, AdapterSource { name: "b".to_owned(), path: adapter() }, None));
        slot.adapters.model(&slot.model().unwrap(), "b").unwrap();
        assert!(slot.take_idle().is_some() && slot.model().is_none() && slot.adapters.loaded().is_empty());
    }
}
