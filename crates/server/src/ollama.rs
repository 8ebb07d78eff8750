//! Ollama's interface: `/api/chat`, `/api/generate`, `/api/tags`, `/api/show`, `/api/ps`, `/api/version`, `/api/embed`.

mod answers;
mod models;
mod options;

pub(crate) use answers::{chat, generate};
pub(crate) use models::{embed, ps, show, tags, version};

use serde_json::{Value, json};

use crate::{clock::rfc3339, error::ApiError};

/// The error object of this interface.
pub(crate) fn error_body(error: &ApiError) -> Value {
    json!({ "error": error.message })
}

/// This moment as this interface writes it.
fn now() -> String {
    rfc3339(crate::app::unix_s())
}
