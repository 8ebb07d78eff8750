//! Works through batches, one after the other, several lines at a time.
//!
//! Contract: a line's result is kept before the line counts as done, and a line that has a result never runs again; a
//! batch is completed in one transaction with its files. A server that is killed goes on where it was.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

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
    tally::{TALLY, Tally},
    text::blocking,
};

/// Lines of a batch that run together.
const TOGETHER: usize = 8;
/// A model that cannot be loaded for a line is tried again for so long.
const LOADING_PATIENCE: Duration = Duration::from_secs(60);
/// Batches that wait for their owners' limits are looked at again after so long at most.
const LOOK: Duration = Duration::from_secs(5);
/// A server that is too busy for a line is asked again after so long.
const PAUSE: Duration = Duration::from_millis(500);

/// Works through what there is, and waits for more, until the server stops.
pub(crate) async fn work(app: Arc<App>) {
    // Batches whose owners' limits are used up, which stand behind all others until then.
    let mut held: HashMap<String, Instant> = HashMap::new();
    while !app.is_stopping() {
        let kept = Arc::clone(&app);
        let next = blocking(move || Ok(open(kept.store.all(BATCHES)?))).await;
        held.retain(|_, until| *until > Instant::now());
        let result = match next {
            Ok(batches) if batches.is_empty() => {
                app.work.notified().await;
                Ok(())
            }
            Ok(batches) => match batches.into_iter().find(|batch| !waits(batch, &held)) {
                Some(batch) => {
                    let id = text(&batch, "id");
                    one(&app, batch).await.map(|until| held.extend(until.map(|until| (id, until))))
                }
                None => {
                    // Until the first may go on, or somebody sends or cancels one; a batch's time may be over meanwhile.
                    let until = held.values().min().copied().unwrap_or_else(Instant::now);
                    let wait = until.saturating_duration_since(Instant::now()).min(LOOK);
                    let _ = tokio::time::timeout(wait, app.work.notified()).await;
                    Ok(())
                }
            },
            Err(error) => Err(error),
        };
        // A store that fails now may work later; nothing is lost meanwhile.
        if result.is_err() {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Whether a batch waits for its owner's limits: one that is to end does not.
fn waits(batch: &Value, held: &HashMap<String, Instant>) -> bool {
    held.contains_key(&text(batch, "id")) && batch["status"] == "in_progress" && !is_late(batch)
}

/// Batches that are not at their end, the oldest first.
fn open(batches: Vec<Value>) -> Vec<Value> {
    let is_open = |batch: &Value| {
        ["validating", "in_progress", "finalizing", "cancelling"]
            .contains(&batch["status"].as_str().unwrap_or_default())
    };
    let mut open: Vec<Value> = batches.into_iter().filter(is_open).collect();
    open.sort_by_key(|batch| batch["created_at"].as_u64());
    open
}

/// Returns until when its owner's limits keep it from going on, if they do.
async fn one(app: &Arc<App>, batch: Value) -> Result<Option<Instant>, ApiError> {
    let id = text(&batch, "id");
    let (input, endpoint) = (text(&batch, "input_file_id"), text(&batch, "endpoint"));
    let (kept, wanted) = (Arc::clone(app), endpoint.clone());
    let read = blocking(move || Ok(kept.store.content(&input)?.map(|content| lines::read(&content, &wanted)))).await?;
    let lines = match read {
        Some(Ok(lines)) => lines,
        Some(Err(errors)) => return fail(app, &id, &errors).await.map(|()| None),
        None => {
            let error = json!({ "line": null, "code": "no_file", "message": "the input file is gone", "param": null });
            return fail(app, &id, &[error]).await.map(|()| None);
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
    let caller = app.keys.owner(&text(&batch, "owner"));
    let held = Arc::default();
    let work = Work { app: Arc::clone(app), id, endpoint, caller, held };
    if run(&work, &lines).await? {
        finish(&work, &lines).await?;
    }
    Ok(work.held.get().copied())
}

/// A batch that is worked through.
#[derive(Clone)]
struct Work {
    app: Arc<App>,
    id: String,
    endpoint: String,
    /// Whose it is, and what its tokens are charged to.
    caller: Caller,
    /// Until when its owner's limits are used up, once they are.
    held: Arc<OnceLock<Instant>>,
}

impl Work {
    /// Counts a line as the request of its owner that it is.
    fn enter(&self) -> Result<(), ApiError> {
        self.caller.meter.as_ref().map_or(Ok(()), |meter| meter.enter())
    }

    /// Whether lines are to run: nobody has ended the batch, its time is not over, and the server goes on.
    async fn goes_on(&self) -> Result<bool, ApiError> {
        if self.app.is_stopping() {
            return Ok(false);
        }
        let (app, id) = (Arc::clone(&self.app), self.id.clone());
        let batch = blocking(move || app.store.get(BATCHES, &id)).await?;
        Ok(batch.is_some_and(|batch| batch["status"] == "in_progress" && !is_late(&batch)))
    }
}

/// Whether a batch's time is over.
fn is_late(batch: &Value) -> bool {
    batch["expires_at"].as_u64().is_some_and(|end| end <= unix_s())
}

/// Runs what is left. Returns false if the server stops first, or the owner's limits are used up.
async fn run(work: &Work, lines: &[Line]) -> Result<bool, ApiError> {
    let Work { app, id, .. } = work;
    let (kept, own) = (Arc::clone(app), id.clone());
    let done: HashSet<u64> =
        blocking(move || kept.store.results(&own)).await?.into_iter().map(|(line, _)| line).collect();
    let mut left = lines.iter().enumerate().filter(|(i, _)| !done.contains(&(*i as u64)));
    let mut running = JoinSet::new();
    loop {
        let goes_on = work.goes_on().await?;
        let is_held = || work.held.get().is_some();
        while goes_on && !is_held() && running.len() < TOGETHER {
            let Some((i, line)) = left.next() else { break };
            let (work, line) = (work.clone(), line.clone());
            running.spawn(async move { answer(&work, i as u64, line).await });
        }
        match running.join_next().await {
            Some(Ok(kept)) => kept?,
            Some(Err(_)) => return Err(ApiError::internal("a line of a batch failed to run")),
            // Lines that are left wait for the owner's limits, unless the batch is at its end for another reason.
            None => return Ok(!(app.is_stopping() || goes_on && is_held())),
        }
    }
}

/// Answers a line and keeps the result. A line that finds the server busy is asked again; it stays undone when
/// the batch ends meanwhile, and when its key's limits are used up.
async fn answer(work: &Work, i: u64, line: Line) -> Result<(), ApiError> {
    let (app, begun) = (&work.app, Instant::now());
    if let Err(refused) = work.enter() {
        let wait = refused.retry_after_s.map_or(PAUSE, Duration::from_secs);
        work.held.get_or_init(|| begun + wait);
        return Ok(());
    }
    let result = loop {
        match TALLY.scope(Tally::new(work.caller.meter.clone()), request(work, line.body.clone())).await {
            Err(error) if is_busy(&error, begun.elapsed()) => {
                if !work.goes_on().await? {
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
    let (kept, batch) = (Arc::clone(app), work.id.clone());
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

/// Whether asking again later may help. Memory for a model that cannot be loaded now may come free; a file that is broken stays so.
fn is_busy(error: &ApiError, waited: Duration) -> bool {
    let is_loading = error.code == Some("model_not_loaded");
    let is_busy = matches!(error.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
    is_busy && (!is_loading || waited < LOADING_PATIENCE)
}

async fn request(work: &Work, body: Value) -> Result<Value, ApiError> {
    let (app, caller) = (&work.app, &work.caller);
    let fields = Fields::new(body, "")?;
    match work.endpoint.as_str() {
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
async fn finish(work: &Work, lines: &[Line]) -> Result<(), ApiError> {
    let Work { app, id, caller, .. } = work.clone();
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
        let done: HashSet<u64> = results.iter().map(|(line, _)| *line).collect();
        let (state, code, reason) = match batch["status"] == "cancelling" {
            true => ("cancelled", "batch_cancelled", "the batch was cancelled before this request ran"),
            false if done.len() < ids.len() => {
                ("expired", "batch_expired", "the batch's time was over before this request ran; send it again")
            }
            false => ("completed", "", ""),
        };
        for (_, custom_id) in ids.iter().enumerate().filter(|(i, _)| !done.contains(&(*i as u64))) {
            let error = json!({ "code": code, "message": reason });
            let line =
                json!({ "id": app.new_id("batch_req_"), "custom_id": custom_id, "response": null, "error": error });
            bad.push_str(&line.to_string());
            bad.push('\n');
        }
        // Counted anew: a kill between a result and its count must not show.
        batch["request_counts"] = json!({ "total": ids.len(), "completed": completed, "failed": failed });
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Config, LoadRefusal, ModelSource,
        store::{FILES, Store},
    };

    /// A server with a model that cannot be loaded, and in its store a batch of two lines whose time is over at `expires_at`.
    fn app(expires_at: u64) -> Arc<App> {
        let never = || Err(LoadRefusal { message: "no room".to_owned(), needs_memory: true });
        let model = ModelSource::on_demand("m".to_owned(), Vec::new(), None, never);
        let app = Arc::new(App::new(vec![model], &Config::default(), None, Store::open(None).unwrap()));
        let line =
            |id: &str| json!({ "custom_id": id, "method": "POST", "url": "/v1/embeddings", "body": { "input": "x" } });
        let content = format!("{}\n{}", line("a"), line("b"));
        app.store.put_file("file", &json!({ "id": "file" }), content.as_bytes()).unwrap();
        let batch = json!({
            "id": "batch", "endpoint": "/v1/embeddings", "input_file_id": "file", "status": "validating", "owner": "",
            "expires_at": expires_at, "request_counts": { "total": 0, "completed": 0, "failed": 0 },
        });
        app.store.put(BATCHES, "batch", &batch).unwrap();
        app
    }

    fn batch(app: &App) -> Value {
        app.store.get(BATCHES, "batch").unwrap().unwrap()
    }

    /// The errors of the lines that did not run.
    fn codes(app: &App) -> Vec<String> {
        let id = text(&batch(app), "error_file_id");
        assert!(app.store.get(FILES, &id).unwrap().is_some());
        let content = String::from_utf8(app.store.content(&id).unwrap().unwrap()).unwrap();
        content.lines().map(|line| text(&serde_json::from_str::<Value>(line).unwrap()["error"], "code")).collect()
    }

    #[tokio::test]
    async fn a_batch_whose_time_is_over_ends_without_its_last_lines() {
        let app = app(unix_s().saturating_sub(1));
        one(&app, batch(&app)).await.unwrap();
        assert_eq!(
            (batch(&app)["status"].as_str(), codes(&app)),
            (Some("expired"), vec!["batch_expired".to_owned(); 2])
        );
        assert!(batch(&app)["expired_at"].is_number());
    }

    #[tokio::test]
    async fn a_batch_that_waits_for_its_model_can_be_cancelled() {
        let app = app(unix_s() + 3600);
        let cancelled = Arc::clone(&app);
        let (worked, ()) = tokio::join!(one(&app, batch(&app)), async move {
            // Once its lines wait.
            while batch(&cancelled)["status"] != "in_progress" {
                tokio::task::yield_now().await;
            }
            changed(&cancelled, "batch", |batch| batch["status"] = json!("cancelling")).unwrap();
        });
        worked.unwrap();
        assert_eq!(
            (batch(&app)["status"].as_str(), codes(&app)),
            (Some("cancelled"), vec!["batch_cancelled".to_owned(); 2])
        );
    }
}
