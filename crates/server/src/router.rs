//! Which handler answers which path, and what holds for all of them.

use std::{pin::Pin, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header::CONTENT_LENGTH, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};

use futures_core::Stream as _;
use serde_json::json;

use crate::{
    Limits, adapters, anthropic,
    app::{App, unix_s},
    audit::Entry,
    batches, chat,
    clock::rfc3339,
    completions, embeddings,
    error::ApiError,
    files, fine_tuning, info,
    keys::{Caller, Scope},
    log::{Line, Logged},
    metrics, ollama, openapi, origin, page, query, rerank, responses,
    tally::{TALLY, Tally},
    text,
};

/// All paths.
pub(crate) fn router(app: &Arc<App>) -> Router {
    Router::new()
        .route("/", get(page::index))
        .route("/web/{*path}", get(page::part))
        .route("/health", get(info::health))
        .route("/ready", get(info::ready))
        .route("/version", get(info::version))
        .route("/openapi.json", get(openapi::document))
        .route("/server_info", get(info::server_info))
        .route("/metrics", get(metrics::metrics))
        .route("/v1/loads", get(info::loads))
        .route("/v1/load_lora_adapter", post(adapters::load))
        .route("/v1/unload_lora_adapter", post(adapters::unload))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*name}", get(info::one_model).delete(fine_tuning::delete_model))
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/messages", post(anthropic::messages))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/{id}", get(responses::retrieve).delete(responses::delete))
        .route("/v1/responses/{id}/input_items", get(responses::input_items))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/files", post(files::upload).get(files::list))
        .route("/v1/files/{id}", get(files::retrieve).delete(files::delete))
        .route("/v1/files/{id}/content", get(files::content))
        .route("/v1/batches", post(batches::create).get(batches::list))
        .route("/v1/batches/{id}", get(batches::retrieve))
        .route("/v1/batches/{id}/cancel", post(batches::cancel))
        .route("/v1/fine_tuning/jobs", post(fine_tuning::create).get(fine_tuning::list))
        .route("/v1/fine_tuning/jobs/{id}", get(fine_tuning::retrieve))
        .route("/v1/fine_tuning/jobs/{id}/cancel", post(fine_tuning::cancel))
        .route("/v1/fine_tuning/jobs/{id}/pause", post(fine_tuning::pause))
        .route("/v1/fine_tuning/jobs/{id}/resume", post(fine_tuning::resume))
        .route("/v1/fine_tuning/jobs/{id}/events", get(fine_tuning::events))
        .route("/v1/fine_tuning/jobs/{id}/checkpoints", get(fine_tuning::checkpoints))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/rerank", post(rerank::rerank))
        .route("/rerank", post(rerank::rerank))
        .route("/v1/score", post(rerank::score))
        .route("/score", post(rerank::score))
        .route("/api/chat", post(ollama::chat))
        .route("/api/generate", post(ollama::generate))
        .route("/api/tags", get(ollama::tags))
        .route("/api/ps", get(ollama::ps))
        .route("/api/show", post(ollama::show))
        .route("/api/version", get(ollama::version))
        .route("/api/embed", post(ollama::embed))
        .route("/api/embeddings", post(ollama::embed))
        .route("/tokenize", post(text::tokenize))
        .route("/tokenizer_info", get(text::tokenizer_info))
        .route("/detokenize", post(text::detokenize))
        .route("/apply-template", post(text::apply_template))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(middleware::from_fn_with_state(Arc::clone(app), around))
        .layer(DefaultBodyLimit::disable())
        .layer(origin::cors(app))
        .with_state(Arc::clone(app))
}

async fn no_such_path(request: Request) -> ApiError {
    let path: String = request.uri().path().chars().take(120).collect();
    let message = format!("there is no {path} here; the README lists what there is");
    ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
}

async fn no_such_method(request: Request) -> ApiError {
    let path: String = request.uri().path().chars().take(120).collect();
    let message = format!("{path} does not take {}", request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
}

/// A body that is too large is let in, and thrown away, for so long and so far.
const LINGERING: Duration = Duration::from_secs(10);
const LINGERING_BYTES: usize = 256 << 20;

/// So much of a path is in the log.
const PATH_CHARS: usize = 256;

/// What holds for every request: who may ask, how much, how large, how long; and what every response has.
async fn around(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let given = request.headers().get("x-request-id").and_then(|id| id.to_str().ok()).filter(|id| id.len() <= 128);
    let id = given.map_or_else(|| app.new_id("req_"), str::to_owned);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let mut line = app.log.as_ref().filter(|_| !is_open(&path)).map(|log| {
        let request = json!({
            "time": rfc3339(unix_s()), "request_id": id, "key": "", "method": method.as_str(),
            "path": path.chars().take(PATH_CHARS).collect::<String>(), "route": route
        });
        Line::begin(log, &Tally::default(), request)
    });
    let admitted = admit(&app, request.headers(), &method, &path);
    let (caller, admitted) = match admitted {
        Ok((caller, admitted)) => (caller, admitted),
        Err(error) => (Caller::default(), Err(error)),
    };
    let tally = Tally::new(caller.meter.clone());
    line.iter_mut().for_each(|line| line.set_caller(&caller.name, &tally));
    // Who looks at a page, or asks whether the server lives, may add what they like to its address.
    let admitted = admitted.and_then(|()| match is_open(&path) || route == "none" {
        true => Ok(()),
        false => query::check(&route, request.uri()),
    });
    let mut response = match admitted {
        Ok(()) => match whole_body(request, &app.limits).await {
            Ok((mut parts, body)) => {
                line.iter_mut().for_each(|line| line.show(&body));
                parts.extensions.insert(caller.clone());
                TALLY.scope(tally, next.run(Request::from_parts(parts, Body::from(body)))).await
            }
            Err(error) => error.into_response(),
        },
        Err(error) => error.into_response(),
    };
    tell_fault(&path, &mut response);
    if let Some(meter) = &caller.meter {
        meter.tell(response.headers_mut());
    }
    let status = response.status().as_u16();
    app.responses.add(&route, status);
    if !is_open(&path) {
        record(&app, &Entry { request_id: &id, key: &caller.name, method: method.as_str(), path: &path, status });
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(HeaderName::from_static("x-request-id"), id);
    }
    let Some(mut line) = line else { return response };
    let fault = response.extensions().get::<ApiError>().map(|error| (error.param.clone(), error.code));
    line.answer(status, fault);
    response.map(|body| Body::new(Logged::new(body, line)))
}

/// Says what is wrong in the shape of the interface that was spoken.
fn tell_fault(path: &str, response: &mut Response) {
    if response.status() == StatusCode::BAD_REQUEST && !is_json(response) {
        let message = "the request did not arrive as it was announced";
        *response = ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message).into_response();
    }
    let body = response.extensions().get::<ApiError>().and_then(|error| match path {
        path if path.starts_with("/v1/messages") => Some(anthropic::error_body(error)),
        path if path.starts_with("/api/") => Some(ollama::error_body(error)),
        _ => None,
    });
    if let Some(body) = body {
        *response.body_mut() = Body::from(body.to_string());
        response.headers_mut().remove(CONTENT_LENGTH);
    }
}

/// Paths that need no key: what supervisors ask, and the page, which asks for the key itself.
fn is_open(path: &str) -> bool {
    matches!(path, "/" | "/health" | "/ready" | "/openapi.json") || path.starts_with("/web/")
}

/// What a key has to be for.
fn scope(method: &Method, path: &str) -> Scope {
    match path {
        "/metrics" | "/server_info" | "/v1/loads" | "/v1/load_lora_adapter" | "/v1/unload_lora_adapter" => Scope::Admin,
        path if path.starts_with("/v1/fine_tuning/") => Scope::Jobs,
        // What a job has made.
        path if path.starts_with("/v1/models/") && method == Method::DELETE => Scope::Jobs,
        _ => Scope::Models,
    }
}

/// Who asks, and whether within limits.
fn admit(
    app: &App,
    headers: &HeaderMap,
    method: &Method,
    path: &str,
) -> Result<(Caller, Result<(), ApiError>), ApiError> {
    origin::check(app, headers)?;
    if is_open(path) {
        return Ok((Caller::default(), Ok(())));
    }
    let scope = scope(method, path);
    let caller = app.keys.check(headers, scope)?;
    let within = caller.meter.as_ref().filter(|_| scope != Scope::Admin).map_or(Ok(()), |meter| meter.enter());
    Ok((caller, within))
}

/// The request with all of its body, which comes in time and is not too large.
async fn whole_body(request: Request, limits: &Limits) -> Result<(Parts, Bytes), ApiError> {
    let (most, patience) = (limits.body_bytes, limits.patience);
    let too_large = || {
        let message = format!("the request's body is larger than {most} bytes, which is the most");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    };
    let announced = request.headers().get(CONTENT_LENGTH).and_then(|n| n.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > most as u64) {
        // Many clients read the answer only when they have sent everything.
        let _ = tokio::time::timeout(LINGERING.min(patience), discard(request.into_body())).await;
        return Err(too_large());
    }
    let (parts, body) = request.into_parts();
    match tokio::time::timeout(patience, axum::body::to_bytes(body, most)).await {
        Ok(Ok(bytes)) => Ok((parts, bytes)),
        Ok(Err(error)) if is_length_limit(&error) => Err(too_large()),
        Ok(Err(_)) => {
            let message = "the request's body did not arrive as it was announced";
            Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message))
        }
        Err(_) => {
            let message = format!("the request's body did not arrive within {} s", patience.as_secs_f64());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message))
        }
    }
}

async fn discard(body: Body) {
    let mut pieces = body.into_data_stream();
    let mut bytes = 0;
    while let Some(Ok(piece)) = std::future::poll_fn(|context| Pin::new(&mut pieces).poll_next(context)).await {
        bytes += piece.len();
        if bytes > LINGERING_BYTES {
            return;
        }
    }
}

fn is_length_limit(error: &axum::Error) -> bool {
    let mut next: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = next {
        if error.to_string().contains("length limit") {
            return true;
        }
        next = error.source();
    }
    false
}

/// A line of the audit log. A log that cannot be written is told of, and keeps nobody from working.
fn record(app: &App, entry: &Entry<'_>) {
    if let Some(Err(error)) = app.audit.as_ref().map(|log| log.add(entry)) {
        app.warn(&format!("the audit log cannot be written: {error}"));
    }
}

fn is_json(response: &Response<Body>) -> bool {
    response.headers().get("content-type").is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"))
}
