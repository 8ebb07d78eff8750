//! What a client is told when something does not work: one error, in the shape of the interface that it speaks.

use axum::{
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use qwenkit_engine::Error as EngineError;
use qwenkit_text::Error as TextError;
use serde_json::{Value, json};

/// A refused or failed request.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// OpenAI's `type`.
    pub(crate) kind: &'static str,
    pub(crate) message: String,
    /// The parameter at fault, as a path: `messages[2].content`.
    pub(crate) param: Option<String>,
    pub(crate) code: Option<&'static str>,
    /// When it is worth trying again.
    pub(crate) retry_after_s: Option<u64>,
}

impl ApiError {
    /// The request is wrong at `param`.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message);
        ApiError { param: Some(param.into()).filter(|p| !p.is_empty()), ..error }
    }

    /// An error that is nobody's parameter.
    pub(crate) fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { status, kind, message: message.into(), param: None, code: None, retry_after_s: None }
    }

    /// The request cannot be served now.
    pub(crate) fn unavailable(message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        ApiError { retry_after_s: Some(5), ..error }
    }

    /// The server is at fault.
    pub(crate) fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    pub(crate) fn with_code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    /// OpenAI's error object.
    pub(crate) fn body(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code } })
    }
}

/// What the engine refuses, in terms of the request that it was made of; `prompt` is the parameter with the prompt.
pub(crate) fn from_engine(error: &EngineError, prompt: &str) -> ApiError {
    let message = error.to_string();
    match error {
        EngineError::PromptTooLong { .. } => ApiError::invalid(prompt, message).with_code("context_length_exceeded"),
        EngineError::Text(error) => from_text(error, prompt),
        EngineError::NoTemplate { .. } | EngineError::PromptEmpty => ApiError::invalid(prompt, message),
        EngineError::TokenUnknown { .. } => ApiError::invalid(prompt, message),
        // A template that has no place for an image where a message has one.
        EngineError::Placeholders { .. } => ApiError::invalid(prompt, message).with_code("unsupported_content"),
        EngineError::TokenMissing { .. } | EngineError::Headless { .. } => {
            ApiError::invalid("model", message).with_code("unsupported_model")
        }
        EngineError::Sampling { setting, .. } => ApiError::invalid(*setting, message),
        EngineError::QueueFull { .. } => {
            let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
            ApiError { retry_after_s: Some(5), ..error.with_code("queue_full") }
        }
        EngineError::Stopped | EngineError::GivenUp { .. } => ApiError::unavailable(message),
        _ => ApiError::internal(message),
    }
}

/// What the text side refuses, at a parameter that it may know better.
pub(crate) fn from_text(error: &TextError, at: &str) -> ApiError {
    let message = error.to_string();
    match error {
        TextError::Request { path, .. } => ApiError::invalid(path, message),
        TextError::ThinkingUnknown { switch } => {
            let at = switch.split(':').next().unwrap_or_default();
            ApiError::invalid(at, message).with_code("unsupported_parameter")
        }
        _ => ApiError::invalid(at, message),
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        // Other interfaces have other shapes for it.
        response.extensions_mut().insert(self);
        response
    }
}
