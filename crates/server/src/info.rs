//! What the server says of itself: health, models, load.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{
    app::App,
    chat::FINGERPRINT,
    error::ApiError,
    fine_tuning::standing,
    models::{ServedModel, Slot},
    query,
    text::blocking,
};

/// Whether the process answers.
pub(crate) async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// Whether requests are taken.
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.is_stopping() {
        false => Json(json!({ "status": "ready" })).into_response(),
        true => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "status": "stopping" }))).into_response(),
    }
}

pub(crate) async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// The models and the names they answer to.
pub(crate) async fn models(State(app): State<Arc<App>>, uri: Uri) -> Result<Json<Value>, ApiError> {
    let all = |slot: &Arc<Slot>| {
        let adapters = slot.adapters.names().into_iter().map(|name| adapter(&app, slot, &name));
        [model(&app, slot)].into_iter().chain(adapters.collect::<Vec<_>>())
    };
    let data: Vec<Value> = app.models.slots().iter().flat_map(all).collect();
    let (data, has_more) = query::models_page(&uri, data)?;
    let id = |model: Option<&Value>| model.map_or(Value::Null, |model| model["id"].clone());
    let (first, last) = (id(data.first()), id(data.last()));
    Ok(Json(json!({ "object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more })))
}

/// One model.
pub(crate) async fn one_model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(match app.models.adapter(&name) {
        Some((slot, own)) => adapter(&app, slot, &own),
        None => model(&app, app.models.slot(Some(&name))?),
    }))
}

fn model(app: &App, slot: &Slot) -> Value {
    let mut object = json!({
        "id": slot.name,
        "object": "model",
        "created": app.started_unix_s,
        "owned_by": "qwenkit",
        "aliases": slot.aliases,
        "loaded": false,
        "capabilities": { "images": slot.sees },
    });
    if let Some(served) = slot.model() {
        object["loaded"] = json!(true);
        object["max_model_len"] = json!(served.session.info().context_tokens);
        object["capabilities"] = json!({
            "chat": served.session.info().has_head && served.session.template().is_some(),
            "thinking": served.thinking.thinks,
            "thinking_switch": served.thinking.has_switch,
            "images": slot.sees,
        });
    }
    object
}

/// A model under an adapter: all that it is without, by another name.
pub(crate) fn adapter(app: &App, slot: &Slot, name: &str) -> Value {
    let mut object = model(app, slot);
    (object["id"], object["parent"], object["aliases"]) = (json!(name), json!(slot.name), json!([]));
    object
}

/// What is served and how, and how fine-tuning stands.
pub(crate) async fn server_info(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let kept_app = Arc::clone(&app);
    let tuning = blocking(move || Ok(standing(&kept_app)?.to_json(kept_app.tuning().is_ok()))).await?;
    let model = |m: &Arc<ServedModel>| {
        let info = m.session.info();
        json!({
            "id": m.name,
            "architecture": info.architecture,
            "layers": info.layers,
            "parameters": info.parameters,
            "weight_bytes": info.weight_bytes,
            "context_tokens": info.context_tokens,
            "images": m.session.pictures().is_ok(),
            "kv_bytes_per_token": info.kv_bytes_per_token,
            "threads": info.threads,
            "isa": info.isa.name(),
        })
    };
    Ok(Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "fingerprint": FINGERPRINT,
        "uptime_s": app.started.elapsed().as_secs(),
        "models": app.models.loaded().iter().map(model).collect::<Vec<_>>(),
        "fine_tuning": tuning,
    })))
}

/// How busy each model is.
pub(crate) async fn loads(State(app): State<Arc<App>>) -> Json<Value> {
    let load = |m: &Arc<ServedModel>| {
        let load = m.session.load();
        json!({
            "model": m.name,
            "running": load.running,
            "waiting": load.waiting,
            "kv_pages_used": load.pages_used,
            "kv_pages_total": load.pages_total,
        })
    };
    Json(json!({ "loads": app.models.loaded().iter().map(load).collect::<Vec<_>>() }))
}
