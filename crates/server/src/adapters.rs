//! Adapters of served models: each is a model by a name of its own, taken in and let go while the server runs.
//!
//! Contract: requests under way keep the adapter that they began with. Not here: what an adapter adds (`qwenkit-models`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::{Json, body::Bytes, extract::State};
use qwenkit_engine::Error as EngineError;
use qwenkit_formats::Adapter as AdapterFile;
use serde_json::{Value, json};

use crate::{
    AdapterSource,
    app::App,
    error::ApiError,
    fields::Fields,
    info,
    models::{ServedModel, Slot},
    text::blocking,
};

/// The longest name of an adapter.
const NAME_BYTES_MAX: usize = 200;

/// The adapters of one model.
#[derive(Default)]
pub(crate) struct Adapters(Mutex<Vec<Entry>>);

struct Entry {
    source: AdapterSource,
    /// With the model, once it was asked for.
    model: Option<Arc<ServedModel>>,
}

impl Adapters {
    pub(crate) fn new(sources: Vec<AdapterSource>) -> Adapters {
        Adapters(Mutex::new(sources.into_iter().map(|source| Entry { source, model: None }).collect()))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Their names, in the order in which they came.
    pub(crate) fn names(&self) -> Vec<String> {
        self.lock().iter().map(|entry| entry.source.name.clone()).collect()
    }

    /// The adapted models in memory.
    pub(crate) fn loaded(&self) -> Vec<Arc<ServedModel>> {
        self.lock().iter().filter_map(|entry| entry.model.clone()).collect()
    }

    /// Lets go of what is in memory, if nobody uses it.
    pub(crate) fn unload_idle(&self) -> bool {
        let mut entries = self.lock();
        let idle = entries.iter().all(|entry| entry.model.as_ref().is_none_or(|model| Arc::strong_count(model) == 1));
        if idle {
            entries.iter_mut().for_each(|entry| entry.model = None);
        }
        idle
    }

    /// The model under the adapter `name`, whose file is read if it was not yet.
    ///
    /// # Errors
    /// When the file is no adapter of the model, or there is none of this name any more.
    pub(crate) fn model(&self, base: &ServedModel, name: &str) -> Result<Arc<ServedModel>, ApiError> {
        let source = {
            let entries = self.lock();
            let Some(entry) = entries.iter().find(|entry| entry.source.name == name) else {
                return Err(ApiError::unavailable(format!("{name} was unloaded just now")));
            };
            match &entry.model {
                Some(model) if Arc::ptr_eq(&model.session, &base.session) => return Ok(Arc::clone(model)),
                _ => entry.source.clone(),
            }
        };
        let failed = |error: Box<EngineError>| {
            ApiError::unavailable(format!("{name} cannot be loaded now: {error}")).with_code("model_not_loaded")
        };
        let model = adapted(base, &source).map_err(failed)?;
        // Let go of by its name meanwhile, it still answers this once.
        if let Some(entry) = self.lock().iter_mut().find(|entry| entry.source.name == name) {
            entry.model = Some(Arc::clone(&model));
        }
        Ok(model)
    }

    fn add(&self, source: AdapterSource, model: Arc<ServedModel>) {
        self.lock().push(Entry { source, model: Some(model) });
    }

    fn remove(&self, name: &str) -> bool {
        let mut entries = self.lock();
        let before = entries.len();
        entries.retain(|entry| entry.source.name != name);
        entries.len() < before
    }
}

/// The model with an adapter from its file.
fn adapted(base: &ServedModel, source: &AdapterSource) -> Result<Arc<ServedModel>, Box<EngineError>> {
    let file = AdapterFile::open(&source.path).map_err(EngineError::from)?;
    let adapter = base.session.adapter(&file)?;
    Ok(Arc::new(ServedModel { name: source.name.clone(), adapter: Some(adapter), ..base.clone() }))
}

/// `/v1/load_lora_adapter`: takes an adapter in, from a file of this machine, for whoever runs the server.
pub(crate) async fn load(State(app): State<Arc<App>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of_body(&body)?;
    let (name, path) = (fields.string("lora_name")?, fields.string("lora_path")?);
    let (name, path) = (fields.required("lora_name", name)?, fields.required("lora_path", path)?);
    let base = fields.take_one(&["base_model_name", "model"])?;
    fields.finish()?;
    let base = base
        .map(|(at, base)| base.as_str().map(str::to_owned).ok_or_else(|| crate::fields::wrong(&at, &base, "a string")));
    let base = base.transpose()?;
    if name.trim().is_empty() || name.len() > NAME_BYTES_MAX {
        let message = format!("`lora_name` has {} bytes, expected 1 to {NAME_BYTES_MAX}", name.len());
        return Err(ApiError::invalid("lora_name", message));
    }
    let taken = || ApiError::invalid("lora_name", format!("`lora_name` is {name:?}, which a model has already"));
    if app.models.has_name(&name) {
        return Err(taken());
    }
    let slot = Arc::clone(app.models.slot(base.as_deref())?);
    let model = app.model(Some(&slot.name)).await?;
    let source = AdapterSource { name: name.clone(), path: path.into() };
    let read = {
        let source = source.clone();
        blocking(move || adapted(&model, &source).map_err(|error| ApiError::invalid("lora_path", error.to_string())))
    };
    let model = read.await?;
    // Somebody else may have taken the name meanwhile.
    if app.models.has_name(&name) {
        return Err(taken());
    }
    slot.adapters.add(source, model);
    Ok(Json(info::adapter(&app, &slot, &name)))
}

/// `/v1/unload_lora_adapter`: lets an adapter go; answers that it is writing come to their end.
pub(crate) async fn unload(State(app): State<Arc<App>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of_body(&body)?;
    let name = fields.string("lora_name")?;
    let name = fields.required("lora_name", name)?;
    fields.finish()?;
    let gone = app.models.slots().iter().any(|slot: &Arc<Slot>| slot.adapters.remove(&name));
    if !gone {
        return Err(ApiError { param: Some("lora_name".to_owned()), ..app.models.unknown(&name) });
    }
    Ok(Json(json!({ "id": name, "object": "model", "deleted": true })))
}
