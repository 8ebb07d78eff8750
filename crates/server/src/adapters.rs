//! Adapters of served models: each is a model by a name of its own, taken in and let go while the server runs.
//!
//! Contract: requests under way keep the adapter that they began with. Not here: what an adapter adds (`qwenkit-models`).

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{Json, body::Bytes, extract::State};
use qwenkit_engine::{Error as EngineError, Session};
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
    /// The same one says that it is the same entry: a name may come back with another file.
    source: Arc<AdapterSource>,
    /// With the model, once it was asked for.
    model: Option<Arc<ServedModel>>,
}

impl Adapters {
    pub(crate) fn new(sources: Vec<AdapterSource>) -> Adapters {
        let entry = |source| Entry { source: Arc::new(source), model: None };
        Adapters(Mutex::new(sources.into_iter().map(entry).collect()))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Their names, in the order in which they came.
    pub(crate) fn names(&self) -> Vec<String> {
        self.lock().iter().map(|entry| entry.source.name.clone()).collect()
    }

    /// The adapted models in memory.
    #[cfg(test)]
    pub(crate) fn loaded(&self) -> Vec<Arc<ServedModel>> {
        self.lock().iter().filter_map(|entry| entry.model.clone()).collect()
    }

    /// Lets go of what is in memory, if nobody uses it; nor the session, which an answer under an adapter without a name any
    /// more would still hold.
    pub(crate) fn unload_idle(&self, session: &Arc<Session>) -> bool {
        let mut entries = self.lock();
        let models = || entries.iter().filter_map(|entry| entry.model.as_ref());
        let own = models().filter(|model| Arc::ptr_eq(&model.session, session)).count();
        // One more is the model without an adapter.
        let idle = models().all(|model| Arc::strong_count(model) == 1) && Arc::strong_count(session) == own + 1;
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
        let Some((source, model)) = self.find(name) else {
            return Err(ApiError::unavailable(format!("{name} was unloaded just now")));
        };
        if let Some(model) = model.filter(|model| Arc::ptr_eq(&model.session, &base.session)) {
            return Ok(model);
        }
        let failed = |error: Box<EngineError>| {
            ApiError::unavailable(format!("{name} cannot be loaded now: {error}")).with_code("model_not_loaded")
        };
        let model = adapted(base, &source).map_err(failed)?;
        self.keep(&source, &model);
        Ok(model)
    }

    fn find(&self, name: &str) -> Option<(Arc<AdapterSource>, Option<Arc<ServedModel>>)> {
        let entries = self.lock();
        let entry = entries.iter().find(|entry| entry.source.name == name)?;
        Some((Arc::clone(&entry.source), entry.model.clone()))
    }

    /// Keeps what was read from a source, unless it was let go of meanwhile: then it answers this once.
    fn keep(&self, source: &Arc<AdapterSource>, model: &Arc<ServedModel>) {
        if let Some(entry) = self.lock().iter_mut().find(|entry| Arc::ptr_eq(&entry.source, source)) {
            entry.model = Some(Arc::clone(model));
        }
    }

    /// The file of an adapter.
    pub(crate) fn path(&self, name: &str) -> Option<PathBuf> {
        self.find(name).map(|(source, _)| source.path.clone())
    }

    /// One more, whose name is free (`Models::add_adapter`).
    pub(crate) fn add(&self, source: AdapterSource, model: Option<Arc<ServedModel>>) {
        self.lock().push(Entry { source: Arc::new(source), model });
    }

    pub(crate) fn remove(&self, name: &str) -> bool {
        let mut entries = self.lock();
        let before = entries.len();
        entries.retain(|entry| entry.source.name != name);
        entries.len() < before
    }
}

/// The model with an adapter from its file.
pub(crate) fn adapted(base: &ServedModel, source: &AdapterSource) -> Result<Arc<ServedModel>, Box<EngineError>> {
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
    // Before a file is read; who comes first is decided behind it.
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
    if !app.models.add_adapter(&slot, source, Some(model)) {
        return Err(taken());
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::tests::{adapter, models};

    #[test]
    fn what_was_read_for_a_name_before_is_not_kept_under_it() {
        let models = models();
        let slot = &models.slots()[0];
        let base = slot.model().unwrap();
        let named = |path| AdapterSource { name: "a".to_owned(), path };
        assert!(models.add_adapter(slot, named(adapter()), None));
        assert!(!models.add_adapter(slot, named("elsewhere".into()), None), "the name is taken");
        // One request has found the adapter; before it has read the file, the name goes to another one.
        let (before, _) = slot.adapters.find("a").unwrap();
        let old = adapted(&base, &before).unwrap();
        assert!(slot.adapters.remove("a"));
        let new = adapted(&base, &before).unwrap();
        assert!(models.add_adapter(slot, named(adapter()), Some(Arc::clone(&new))));
        slot.adapters.keep(&before, &old);
        assert!(Arc::ptr_eq(&slot.adapters.model(&base, "a").unwrap(), &new));
    }
}
