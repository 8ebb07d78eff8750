//! Which handler answers which path, and what holds for all of them.

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header::CONTENT_LENGTH},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};

use crate::{
    anthropic, app::App, batches, chat, completions, embeddings, error::ApiError, files, info, keys::Caller, ollama,
    page, rerank, responses, text,
};

/// All paths.
pub(crate) fn router(app: &Arc<App>) -> Router {
    Router::new()
        .route("/", get(page::index))
        .route("/web/{*path}", get(page::part))
        .route("/health", get(info::health))
        .route("/ready", get(info::ready))
        .route("/version", get(info::version))
        .route("/server_info", get(info::server_info))
        .route("/v1/loads", get(info::loads))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*name}", get(info::one_model))
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
        .route("/detokenize", post(text::detokenize))
        .route("/apply-template", post(text::apply_template))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(middleware::from_fn_with_state(Arc::clone(app), around))
        .layer(DefaultBodyLimit::max(app.limits.body_bytes))
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

/// Gives every response its request's id, and every refusal by the framework the shape of an error.
async fn around(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let given = request.headers().get("x-request-id").filter(|id| id.len() <= 128).cloned();
    let id = given.or_else(|| HeaderValue::from_str(&app.new_id("req_")).ok());
    let open = matches!(request.uri().path(), "/" | "/health" | "/ready") || request.uri().path().starts_with("/web/");
    let path = request.uri().path().to_owned();
    let allowed = if open { Ok(Caller::default()) } else { app.keys.check(request.headers()) };
    let mut response = match allowed {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    if response.status() == StatusCode::PAYLOAD_TOO_LARGE {
        let message = format!("the request's body is larger than {} bytes, which is the most", app.limits.body_bytes);
        response = ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message).into_response();
    } else if response.status() == StatusCode::BAD_REQUEST && !is_json(&response) {
        let message = "the request's body did not arrive as it was announced";
        response = ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message).into_response();
    }
    let body = response.extensions().get::<ApiError>().and_then(|error| match path.as_str() {
        path if path.starts_with("/v1/messages") => Some(anthropic::error_body(error)),
        path if path.starts_with("/api/") => Some(ollama::error_body(error)),
        _ => None,
    });
    if let Some(body) = body {
        *response.body_mut() = Body::from(body.to_string());
        response.headers_mut().remove(CONTENT_LENGTH);
    }
    if let Some(id) = id {
        response.headers_mut().insert(HeaderName::from_static("x-request-id"), id);
    }
    response
}

fn is_json(response: &Response<Body>) -> bool {
    response.headers().get("content-type").is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"))
}
