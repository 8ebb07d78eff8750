//! `/v1/files`: files that batches read and write.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Body,
    extract::{Multipart, Path, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{
    app::{App, unix_s},
    error::ApiError,
    fields::wrong,
    keys::Caller,
    listing::{Page, all_own, none, own, page},
    store::FILES,
    text::blocking,
};

/// What files may be for.
const PURPOSES: [&str; 3] = ["batch", "fine-tune", "user_data"];

/// A new file.
pub(crate) async fn upload(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    mut form: Multipart,
) -> Result<Json<Value>, ApiError> {
    let (mut purpose, mut name, mut content) = (None, None, None);
    while let Some(field) = form.next_field().await.map_err(broken)? {
        match field.name().unwrap_or_default() {
            "purpose" => purpose = Some(field.text().await.map_err(broken)?),
            "file" => {
                name = field.file_name().map(str::to_owned);
                content = Some(field.bytes().await.map_err(broken)?);
            }
            "expires_after" | "expires_after[anchor]" | "expires_after[seconds]" => {}
            other => {
                let shown: String = other.chars().take(80).collect();
                let message = format!("`{shown}` is no field of this form, which has `purpose` and `file`");
                return Err(ApiError::invalid(shown, message).with_code("unknown_parameter"));
            }
        }
    }
    let purpose = purpose.ok_or_else(|| ApiError::invalid("purpose", "`purpose` is missing"))?;
    if !PURPOSES.contains(&purpose.as_str()) {
        return Err(wrong("purpose", &json!(purpose), "batch, fine-tune or user_data"));
    }
    let content = content.ok_or_else(|| ApiError::invalid("file", "`file` is missing"))?;
    let file = object(&app, &caller, &name.unwrap_or_else(|| "file".to_owned()), &purpose, content.len());
    let kept = file.clone();
    blocking(move || {
        let id = kept["id"].as_str().unwrap_or_default();
        app.store.put_file(id, &kept, &content)
    })
    .await?;
    Ok(Json(shown(file)))
}

fn broken(error: axum::extract::multipart::MultipartError) -> ApiError {
    match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", "the file is larger than is taken")
        }
        _ => ApiError::invalid("file", format!("the form did not arrive whole: {}", error.body_text())),
    }
}

/// A file's object, as it is kept.
pub(crate) fn object(app: &App, caller: &Caller, name: &str, purpose: &str, bytes: usize) -> Value {
    json!({
        "id": app.new_id("file-"),
        "object": "file",
        "bytes": bytes,
        "created_at": unix_s(),
        "filename": name,
        "purpose": purpose,
        "status": "processed",
        "owner": caller.id,
    })
}

/// What others see of an object.
pub(crate) fn shown(mut object: Value) -> Value {
    if let Value::Object(map) = &mut object {
        map.remove("owner");
    }
    object
}

/// The file of this id that belongs to the caller.
pub(crate) fn find(app: &App, caller: &Caller, id: &str) -> Result<Value, ApiError> {
    own(app, caller, (FILES, "file"), id)
}

/// The caller's files.
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    wanted: Page,
) -> Result<Json<Value>, ApiError> {
    let own = blocking(move || all_own(&app, &caller, FILES)).await?;
    let own = own.into_iter().filter(|file| wanted.purpose.as_ref().is_none_or(|purpose| file["purpose"] == *purpose));
    page(own.map(shown).collect(), &wanted).map(Json)
}

/// One file's object.
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || find(&app, &caller, &id)).await.map(shown).map(Json)
}

/// One file's content.
pub(crate) async fn content(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let content = blocking(move || {
        find(&app, &caller, &id)?;
        app.store.content(&id)?.ok_or_else(|| none("file", &id))
    });
    Ok(([(CONTENT_TYPE, "application/octet-stream")], Body::from(content.await?)).into_response())
}

/// Forgets a file.
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        find(&app, &caller, &id)?;
        app.store.remove(FILES, &id)?;
        Ok(Json(json!({ "id": id, "object": "file", "deleted": true })))
    })
    .await
}
