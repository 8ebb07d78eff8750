//! Works through batches, one after the other, several lines at a time.
//!
//! Contract: a line's result is kept before the line counts as done, and a line that has a result never runs again; a
//! batch is completed in one transaction with its files. A server that is killed goes on where it was.

use std::{collections::HashSet, sync::Arc, time::Duration};

use axum::http::StatusCode;
use qwenkit_engine::Priority;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::lines::{self, Line};
use crate::{
    app::{App, unix_s},
    chat, completions, embeddings,
    error::ApiError,
    fields::Fields,
    files,
    keys::Caller,
    responses,
    store::BATCHES,
    text::blocking,
};

/// Lines of a batch that run together.
const TOGETHER: usize = 8;
/// A server that is too busy for a line is asked again after so long.
const PAUSE: Duration = Duration::from_millis(500);

/// Works through what there is, and waits for more, until the server stops.
pub(crate) async fn work(app: Arc<App>) {
    while !app.is_stopping() {
        let kept = Arc::clone(&app);
        let next = blocking(move || Ok(oldest(kept.store.all(BATCHES)?))).await;
        let result = match next {
            Ok(Some(batch)) => one(&app, batch).await,
            Ok(None) => {
                app.work.notified().await;
                Ok(())
            }
            Err(error) => Err(error),
        };
        // A store that fails now may work later; nothing is lost meanwhile.
        if result.is_err() {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

fn oldest(batches: Vec<Value>) -> Option<Value> {
    let is_open = |batch: &Value| {
        ["validating", "in_progress", "finalizing", "cancelling"]
            .contains(&batch["status"].as_str().unwrap_or_default())
    };
    batches.into_iter().filter(is_open).min_by_key(|batch| batch["created_at"].as_u64())
}

async fn one(app: &Arc<App>, batch: Value) -> Result<(), ApiError> {
    let id = text(&batch, "id");
    let (input, endpoint) = (text(&batch, "input_file_id"), text(&batch, "endpoint"));
    let (kept, wanted) = (Arc::clone(app), endpoint.clone());
    let read = blocking(move || Ok(kept.store.content(&input)?.map(|content| lines::read(&content, &wanted)))).await?;
    let lines = match read {
        Some(Ok(lines)) => lines,
        Some(Err(errors)) => return fail(app, &id, &errors).await,
        None => {
            let error = json!({ "line": null, "code": "no_file", "message": "the input file is gone", "param": null });
            return fail(app, &id, &[error]).await;
        }
    };
    let total = lines.len();
    change(app, &id, move |batch| {
        if batch["status"] == "validating" {
            batch["status"] = json!("in_progress");
            batch["in_progress_at"] = json!(unix_s());
        }
        batch["request_counts"]["total"] = json!(total);
    })
    .await?;
    let caller = Caller::of_owner(&text(&batch, "owner"));
    if run(app, &id, &endpoint, &caller, &lines).await? {
        finish(app, &id, &caller, &lines).await?;
    }
    Ok(())
}

/// Runs what is left. Returns false if the server stops first.
async fn run(app: &Arc<App>, id: &str, endpoint: &str, caller: &Caller, lines: &[Line]) -> Result<bool, ApiError> {
    let (kept, own) = (Arc::clone(app), id.to_owned());
    let done: HashSet<u64> =
        blocking(move || kept.store.results(&own)).await?.into_iter().map(|(line, _)| line).collect();
    let mut left = lines.iter().enumerate().filter(|(i, _)| !done.contains(&(*i as u64)));
    let mut running = JoinSet::new();
    loop {
        let goes_on = !app.is_stopping() && status(app, id).await? != "cancelling";
        while goes_on && running.len() < TOGETHER {
            let Some((i, line)) = left.next() else { break };
            let (app, endpoint, caller) = (Arc::clone(app), endpoint.to_owned(), caller.clone());
            let (line, id) = (line.clone(), id.to_owned());
            running.spawn(async move { answer(&app, &id, i as u64, &endpoint, &caller, line).await });
        }
        match running.join_next().await {
            Some(Ok(kept)) => kept?,
            Some(Err(_)) => return Err(ApiError::internal("a line of a batch failed to run")),
            None => return Ok(!app.is_stopping()),
        }
    }
}

/// Answers a line and keeps the result. A line that finds the server stopping stays undone.
async fn answer(
    app: &Arc<App>,
    batch: &str,
    i: u64,
    endpoint: &str,
    caller: &Caller,
    line: Line,
) -> Result<(), ApiError> {
    let result = loop {
        match request(app, endpoint, caller, line.body.clone()).await {
            Err(error) if is_busy(&error) => {
                if app.is_stopping() {
                    return Ok(());
                }
                tokio::time::sleep(PAUSE).await;
            }
            other => break other,
        }
    };
    let (status, body) = match result {
        Ok(body) => (200, body),
        Err(error) => (error.status.as_u16(), error.body()),
    };
    let request_id = app.new_id("req_");
    let result = json!({
        "id": app.new_id("batch_req_"),
        "custom_id": line.custom_id,
        "response": { "status_code": status, "request_id": request_id, "body": body },
        "error": null,
    });
    let (kept, batch) = (Arc::clone(app), batch.to_owned());
    blocking(move || {
        kept.store.put_result(&batch, i, &result)?;
        let name = if status < 400 { "completed" } else { "failed" };
        changed(&kept, &batch, |batch| {
            let count = batch["request_counts"][name].as_u64().unwrap_or(0);
            batch["request_counts"][name] = json!(count + 1);
        })
    })
    .await
}

fn is_busy(error: &ApiError) -> bool {
    matches!(error.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
}

async fn request(app: &Arc<App>, endpoint: &str, caller: &Caller, body: Value) -> Result<Value, ApiError> {
    let fields = Fields::new(body, "")?;
    match endpoint {
        "/v1/chat/completions" => {
            let (run, reply) = chat::start(app, fields, Priority::Low).await?;
            chat::whole(run, reply).await
        }
        "/v1/completions" => {
            let (run, reply) = completions::start(app, fields, Priority::Low).await?;
            completions::whole(run, reply).await
        }
        "/v1/embeddings" => embeddings::embed(app, fields, Priority::Low).await,
        _ => responses::whole(app, caller, fields, Priority::Low).await,
    }
}

/// Files of what came of a batch, and its last state.
async fn finish(app: &Arc<App>, id: &str, caller: &Caller, lines: &[Line]) -> Result<(), ApiError> {
    let (app, id, caller) = (Arc::clone(app), id.to_owned(), caller.clone());
    let ids: Vec<String> = lines.iter().map(|line| line.custom_id.clone()).collect();
    blocking(move || {
        let _order = app.batch_order.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(mut batch) = app.store.get(BATCHES, &id)? else { return Ok(()) };
        let results = app.store.results(&id)?;
        let (mut good, mut bad) = (String::new(), String::new());
        let (mut completed, mut failed) = (0, 0);
        for (_, result) in &results {
            let is_good = result["response"]["status_code"] == 200;
            let (out, count) = if is_good { (&mut good, &mut completed) } else { (&mut bad, &mut failed) };
            out.push_str(&result.to_string());
            out.push('\n');
            *count += 1;
        }
        let was_cancelled = batch["status"] == "cancelling";
        let done: HashSet<u64> = results.iter().map(|(line, _)| *line).collect();
        for (_, custom_id) in ids.iter().enumerate().filter(|(i, _)| !done.contains(&(*i as u64))) {
            let error =
                json!({ "code": "batch_cancelled", "message": "the batch was cancelled before this request ran" });
            let line =
                json!({ "id": app.new_id("batch_req_"), "custom_id": custom_id, "response": null, "error": error });
            bad.push_str(&line.to_string());
            bad.push('\n');
        }
        // Counted anew: a kill between a result and its count must not show.
        batch["request_counts"] = json!({ "total": ids.len(), "completed": completed, "failed": failed });
        let state = if was_cancelled { "cancelled" } else { "completed" };
        batch["status"] = json!(state);
        batch["finalizing_at"] = json!(unix_s());
        batch[format!("{state}_at")] = json!(unix_s());
        let mut outputs = Vec::new();
        for (content, key, name) in [(good, "output_file_id", "output"), (bad, "error_file_id", "error")] {
            if !content.is_empty() {
                let object = files::object(&app, &caller, &format!("{id}_{name}.jsonl"), "batch_output", content.len());
                batch[key] = object["id"].clone();
                outputs.push((text(&object, "id"), object, content));
            }
        }
        let outputs: Vec<(&str, &Value, &[u8])> =
            outputs.iter().map(|(id, object, content)| (id.as_str(), object, content.as_bytes())).collect();
        app.store.put_files(&outputs, Some((&id, &batch)))
    })
    .await
}

async fn fail(app: &Arc<App>, id: &str, errors: &[Value]) -> Result<(), ApiError> {
    let errors = json!({ "object": "list", "data": errors });
    change(app, id, move |batch| {
        batch["status"] = json!("failed");
        batch["failed_at"] = json!(unix_s());
        batch["errors"] = errors;
    })
    .await
}

async fn status(app: &Arc<App>, id: &str) -> Result<String, ApiError> {
    let (app, id) = (Arc::clone(app), id.to_owned());
    blocking(move || Ok(app.store.get(BATCHES, &id)?.map_or_else(String::new, |batch| text(&batch, "status")))).await
}

async fn change(app: &Arc<App>, id: &str, edit: impl FnOnce(&mut Value) + Send + 'static) -> Result<(), ApiError> {
    let (app, id) = (Arc::clone(app), id.to_owned());
    blocking(move || changed(&app, &id, edit)).await
}

/// Edits a batch; edits come one after the other.
fn changed(app: &App, id: &str, edit: impl FnOnce(&mut Value)) -> Result<(), ApiError> {
    let _order = app.batch_order.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(mut batch) = app.store.get(BATCHES, id)? else { return Ok(()) };
    edit(&mut batch);
    app.store.put(BATCHES, id, &batch)
}

fn text(object: &Value, name: &str) -> String {
    object[name].as_str().unwrap_or_default().to_owned()
}
