//! `/v1/responses`: conversations that the server keeps, told as items.

mod reply;
mod request;

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use qwenkit_engine::Priority;
use serde_json::{Value, json};

use self::reply::Reply;
use crate::{
    app::App,
    error::ApiError,
    fields::Fields,
    keys::Caller,
    listing::{Page, own, window},
    run::Run,
    sse,
    store::RESPONSES,
    text::blocking,
};

/// Responses that one may follow on, one behind the other.
const CHAIN_MAX: usize = 1000;

/// A new response.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let fields = Fields::of_body(&body)?;
    let (run, reply) = start(&app, &caller, fields, Priority::Normal).await?;
    match (reply.stream, reply.is_background()) {
        (true, true) => Err(ApiError::invalid("stream", "`stream` and `background` cannot both be true")),
        (true, false) => Ok(sse::respond(run, reply)),
        (false, false) => Ok(Json(drain(run, reply).await?).into_response()),
        (false, true) => in_background(&app, run, reply).await,
    }
}

/// The whole response to a request.
pub(crate) async fn whole(
    app: &Arc<App>,
    caller: &Caller,
    fields: Fields,
    priority: Priority,
) -> Result<Value, ApiError> {
    // A batch is in the background already.
    if fields.peek("background").is_some_and(|value| *value == true) {
        return Err(ApiError::invalid("background", "`background` is true, and a line of a batch is waited for"));
    }
    let (run, reply) = start(app, caller, fields, priority).await?;
    drain(run, reply).await
}

async fn start(
    app: &Arc<App>,
    caller: &Caller,
    mut fields: Fields,
    priority: Priority,
) -> Result<(Run, Reply), ApiError> {
    let name = fields.string("model")?;
    let model = app.model(name.as_deref()).await?;
    let previous = fields.string("previous_response_id")?;
    let history = match &previous {
        Some(id) => {
            let (app, caller, id) = (Arc::clone(app), caller.clone(), id.clone());
            blocking(move || history(&app, &caller, &id)).await?
        }
        None => Vec::new(),
    };
    let background = fields.bool("background")?.unwrap_or(false);
    let request = request::read(fields, &model, history, background)?;
    let answering = request.conversation.clone_with(priority).start(&model).await?;
    let reader = answering.reader();
    Ok((answering.run, Reply::new(app, caller, &model.name, request, previous, reader)))
}

/// The items of a response and of all that it follows on, the oldest first.
fn history(app: &App, caller: &Caller, id: &str) -> Result<Vec<Value>, ApiError> {
    let (mut parts, mut next) = (Vec::new(), Some(id.to_owned()));
    while let Some(id) = next {
        let at = |error| ApiError { param: Some("previous_response_id".to_owned()), ..error };
        let record = find(app, caller, &id).map_err(at)?;
        if parts.len() >= CHAIN_MAX {
            let message = format!("more than {CHAIN_MAX} responses follow each other");
            return Err(ApiError::invalid("previous_response_id", message));
        }
        if record["response"]["status"] == "in_progress" {
            return Err(ApiError::invalid("previous_response_id", format!("{id} is not finished yet")));
        }
        next = record["response"]["previous_response_id"].as_str().map(str::to_owned);
        parts.push(record);
    }
    let items = |record: &Value| {
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        [list(&record["input"]), list(&record["response"]["output"])].concat()
    };
    Ok(parts.iter().rev().flat_map(items).collect())
}

fn find(app: &App, caller: &Caller, id: &str) -> Result<Value, ApiError> {
    own(app, caller, (RESPONSES, "response"), id)
}

async fn drain(mut run: Run, mut reply: Reply) -> Result<Value, ApiError> {
    run.drain(|_, piece| drop(reply.take_in(piece))).await?;
    let record = reply.record();
    let response = record["response"].clone();
    if reply.store {
        let app = Arc::clone(&reply.app);
        blocking(move || keep(&app, &record)).await?;
    }
    Ok(response)
}

fn keep(app: &App, record: &Value) -> Result<(), ApiError> {
    app.store.put(RESPONSES, record["response"]["id"].as_str().unwrap_or_default(), record)
}

/// Answers at once, and goes on.
async fn in_background(app: &Arc<App>, run: Run, reply: Reply) -> Result<Response, ApiError> {
    if !reply.store {
        return Err(ApiError::invalid("store", "`background` needs `store`: nobody could fetch the response"));
    }
    let record = reply.record();
    let (kept, begun) = (Arc::clone(app), record.clone());
    blocking(move || keep(&kept, &begun)).await?;
    let id = record["response"]["id"].as_str().unwrap_or_default().to_owned();
    let app = Arc::clone(app);
    let task = tokio::spawn({
        let (app, id) = (Arc::clone(&app), id.clone());
        async move {
            if drain(run, reply).await.is_err() {
                let ended = Arc::clone(&app);
                let own = id.clone();
                // If this fails too, the next start of the server says the same.
                let _ = blocking(move || end_unfinished(&ended, &own, "failed")).await;
            }
            app.background().remove(&id);
        }
    });
    app.background().insert(id, task.abort_handle());
    Ok(Json(record["response"].clone()).into_response())
}

/// Says of a response that nobody computes any more that it has ended.
fn end_unfinished(app: &App, id: &str, status: &str) -> Result<(), ApiError> {
    let Some(mut record) = app.store.get(RESPONSES, id)? else { return Ok(()) };
    if record["response"]["status"] == "in_progress" {
        record["response"]["status"] = json!(status);
        if status == "failed" {
            let message = "the server stopped before the response was finished; ask again";
            record["response"]["error"] = json!({ "code": "server_error", "message": message });
        }
        app.store.put(RESPONSES, id, &record)?;
    }
    Ok(())
}

/// After a start: responses that an earlier server left unfinished have failed.
pub(crate) fn end_those_left(app: &App) -> Result<(), ApiError> {
    for record in app.store.all(RESPONSES)? {
        if record["response"]["status"] == "in_progress" {
            end_unfinished(app, record["response"]["id"].as_str().unwrap_or_default(), "failed")?;
        }
    }
    Ok(())
}

/// One response.
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || find(&app, &caller, &id)).await.map(|record| Json(record["response"].clone()))
}

/// What a response answers.
pub(crate) async fn input_items(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    wanted: Page,
) -> Result<Json<Value>, ApiError> {
    let record = blocking(move || find(&app, &caller, &id)).await?;
    let mut items = record["input"].as_array().cloned().unwrap_or_default();
    // The newest first, unless asked otherwise.
    if !wanted.is_ascending()? {
        items.reverse();
    }
    window(items, &wanted).map(Json)
}

/// Forgets a response.
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        find(&app, &caller, &id)?;
        app.store.remove(RESPONSES, &id)?;
        Ok(Json(json!({ "id": id, "object": "response", "deleted": true })))
    })
    .await
}

/// Ends a response that runs in the background.
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let task = app.background().remove(&id);
    if let Some(task) = task {
        task.abort();
    }
    blocking(move || {
        find(&app, &caller, &id)?;
        end_unfinished(&app, &id, "cancelled")?;
        Ok(Json(find(&app, &caller, &id)?["response"].clone()))
    })
    .await
}
