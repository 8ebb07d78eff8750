//! `/v1/batches`: a file of requests, answered when nobody else waits, through crashes and restarts.

mod lines;
mod worker;

pub(crate) use worker::work;

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{Path, State},
};
use serde_json::{Value, json};

use crate::{
    app::{App, unix_s},
    error::ApiError,
    fields::{Fields, wrong},
    files::{self, shown},
    keys::Caller,
    listing::{Page, all_own, own, page},
    store::BATCHES,
    text::blocking,
};

/// Interfaces whose requests a batch may hold.
const ENDPOINTS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"];
/// Seconds that a batch may take, by name.
const WINDOW_S: u64 = 24 * 3600;

/// A new batch.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of_body(&body)?;
    let input = fields.string("input_file_id")?;
    let input = fields.required("input_file_id", input)?;
    let endpoint = fields.string("endpoint")?;
    let endpoint = fields.required("endpoint", endpoint)?;
    if !ENDPOINTS.contains(&endpoint.as_str()) {
        return Err(wrong("endpoint", &json!(endpoint), &format!("one of {}", ENDPOINTS.join(", "))));
    }
    let window = fields.string("completion_window")?;
    if fields.required("completion_window", window)? != "24h" {
        return Err(ApiError::invalid("completion_window", "`completion_window` must be `24h`"));
    }
    let metadata = fields.take("metadata").unwrap_or_default();
    fields.take("output_expires_after");
    fields.finish()?;
    let now = unix_s();
    let batch = json!({
        "id": app.new_id("batch_"),
        "object": "batch",
        "endpoint": endpoint,
        "errors": null,
        "input_file_id": input,
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": null,
        "error_file_id": null,
        "created_at": now,
        "in_progress_at": null,
        "expires_at": now + WINDOW_S,
        "finalizing_at": null,
        "completed_at": null,
        "failed_at": null,
        "expired_at": null,
        "cancelling_at": null,
        "cancelled_at": null,
        "request_counts": { "total": 0, "completed": 0, "failed": 0 },
        "metadata": metadata,
        "owner": caller.id,
    });
    let (kept, kept_app) = (batch.clone(), Arc::clone(&app));
    blocking(move || {
        files::find(&kept_app, &caller, &input)
            .map_err(|error| ApiError { param: Some("input_file_id".to_owned()), ..error })?;
        kept_app.store.put(BATCHES, kept["id"].as_str().unwrap_or_default(), &kept)
    })
    .await?;
    app.work.notify_one();
    Ok(Json(shown(batch)))
}

fn find(app: &App, caller: &Caller, id: &str) -> Result<Value, ApiError> {
    own(app, caller, (BATCHES, "batch"), id)
}

/// One batch.
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || find(&app, &caller, &id)).await.map(shown).map(Json)
}

/// The caller's batches.
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    wanted: Page,
) -> Result<Json<Value>, ApiError> {
    let own = blocking(move || all_own(&app, &caller, BATCHES)).await?;
    page(own.into_iter().map(shown).collect(), &wanted).map(Json)
}

/// Ends a batch early; what is done of it stays.
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let kept_app = Arc::clone(&app);
    let batch = blocking(move || {
        let _order = kept_app.batch_order.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut batch = find(&kept_app, &caller, &id)?;
        let status = batch["status"].as_str().unwrap_or_default().to_owned();
        if !["validating", "in_progress", "cancelling"].contains(&status.as_str()) {
            return Err(ApiError::invalid("batch_id", format!("the batch is {status} and cannot be cancelled")));
        }
        batch["status"] = json!("cancelling");
        batch["cancelling_at"] = json!(unix_s());
        kept_app.store.put(BATCHES, &id, &batch)?;
        Ok(batch)
    })
    .await?;
    app.work.notify_one();
    Ok(Json(shown(batch)))
}
