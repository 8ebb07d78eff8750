//! What Ollama's clients ask of models, and vectors.

use std::sync::Arc;

use axum::{Json, body::Bytes, extract::State};
use qwenkit_engine::{Priority, unit_vector};
use serde_json::{Value, json};

use super::options;
use crate::{
    app::App,
    clock::rfc3339,
    embeddings::{inputs, queries},
    error::ApiError,
    fields::{Fields, wrong},
    models::{ServedModel, Slot},
    readings,
};

/// The version whose interface this is. Clients compare it with the one they need.
const OLLAMA_VERSION: &str = "0.12.0";

/// `/api/version`
pub(crate) async fn version() -> Json<Value> {
    Json(json!({ "version": OLLAMA_VERSION, "qwenkit": env!("CARGO_PKG_VERSION") }))
}

/// `/api/tags`: all that can be asked for, loaded or not.
pub(crate) async fn tags(State(app): State<Arc<App>>) -> Json<Value> {
    let all = |slot: &Arc<Slot>| {
        let model = slot.model();
        let names = [vec![slot.name.clone()], slot.adapters.names()].concat();
        names.into_iter().map(|name| entry(&app, &name, model.as_deref())).collect::<Vec<_>>()
    };
    Json(json!({ "models": app.models.slots().iter().flat_map(all).collect::<Vec<_>>() }))
}

/// `/api/ps`
pub(crate) async fn ps(State(app): State<Arc<App>>) -> Json<Value> {
    let model = |model: &Arc<ServedModel>| {
        let mut entry = entry(&app, &model.name, Some(model));
        entry["size_vram"] = json!(0);
        entry["context_length"] = json!(model.session.info().context_tokens);
        entry["expires_at"] = json!(rfc3339(4_102_444_800));
        entry
    };
    Json(json!({ "models": app.models.loaded().iter().map(model).collect::<Vec<_>>() }))
}

/// A model by one of its names; of one that is not loaded, size and kind are not known yet.
fn entry(app: &App, name: &str, model: Option<&ServedModel>) -> Value {
    json!({
        "name": name,
        "model": name,
        "modified_at": rfc3339(app.started_unix_s),
        "size": model.map_or(0, |model| model.session.info().weight_bytes),
        "digest": "",
        "details": details(model),
    })
}

fn details(model: Option<&ServedModel>) -> Value {
    let Some(info) = model.map(|model| model.session.info()) else {
        return json!({
            "parent_model": "",
            "format": "",
            "family": "",
            "families": [],
            "parameter_size": "",
            "quantization_level": "unknown",
        });
    };
    json!({
        "parent_model": "",
        "format": "gguf",
        "family": info.architecture,
        "families": [info.architecture],
        "parameter_size": size_name(info.parameters),
        "quantization_level": "unknown",
    })
}

fn size_name(parameters: u64) -> String {
    match parameters {
        0..1_000_000_000 => format!("{:.2}M", parameters as f64 / 1e6),
        _ => format!("{:.1}B", parameters as f64 / 1e9),
    }
}

/// `/api/show`
pub(crate) async fn show(State(app): State<Arc<App>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of_body(&body)?;
    // Ollama's own client sends each of its fields, empty where it has nothing to say.
    let name = fields.take_said(&["model", "name"])?;
    for unused in ["system", "template", "options"] {
        if let Some((at, _)) = fields.take_said(&[unused])? {
            return Err(ApiError::invalid(&at, format!("`{at}` changes nothing of what is shown; leave it out")));
        }
    }
    let (at, name) = fields.required("model", name)?;
    let Some(name) = name.as_str() else { return Err(wrong(&at, &name, "a string")) };
    fields.bool("verbose")?;
    fields.finish()?;
    let model = app.model(Some(name)).await?;
    let info = model.session.info();
    let architecture = info.architecture;
    let mut capabilities = if info.has_head { vec!["completion", "embedding"] } else { vec!["embedding"] };
    if info.has_head && model.session.template().and_then(qwenkit_text::CallSyntax::of_template).is_some() {
        capabilities.push("tools");
    }
    if model.session.pictures().is_ok() {
        capabilities.push("vision");
    }
    if info.has_head && model.thinking.thinks {
        capabilities.push("thinking");
    }
    Ok(Json(json!({
        "modelfile": "",
        "parameters": "",
        "template": model.session.template().map_or("", |template| template.source()),
        "details": details(Some(&model)),
        "model_info": {
            "general.architecture": architecture,
            "general.parameter_count": info.parameters,
            format!("{architecture}.context_length"): info.model_context_tokens,
            format!("{architecture}.embedding_length"): info.width,
            format!("{architecture}.block_count"): info.layers,
        },
        "capabilities": capabilities,
        "modified_at": rfc3339(app.started_unix_s),
    })))
}

/// `/api/embed`, and the older `/api/embeddings` with `prompt`.
pub(crate) async fn embed(State(app): State<Arc<App>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let started = std::time::Instant::now();
    let mut fields = Fields::of_body(&body)?;
    let name = fields.string("model")?;
    let model = app.model(Some(&fields.required("model", name)?)).await?;
    let input = fields.take_one(&["input", "prompt"])?;
    let (at, input) = fields.required("input", input)?;
    let inputs = inputs(input)?;
    let dimensions = fields.integer("dimensions", 1, model.session.info().width as i64)?.map(|n| n as usize);
    fields.bool("truncate")?;
    fields.take("keep_alive");
    options::of_vectors(&mut fields, &model)?;
    fields.finish()?;
    let make = move |model: &ServedModel| queries(model, &inputs, None);
    let found = readings::read(&model, "input", Priority::Normal, make).await?;
    let vectors: Vec<Vec<f32>> = found.values.iter().map(|state| unit_vector(state, dimensions)).collect();
    if at == "prompt" {
        return Ok(Json(json!({ "embedding": vectors.first() })));
    }
    Ok(Json(json!({
        "model": model.name,
        "embeddings": vectors,
        "total_duration": started.elapsed().as_nanos() as u64,
        "load_duration": 0,
        "prompt_eval_count": found.prompt_tokens,
    })))
}
