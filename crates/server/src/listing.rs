//! Kept objects as OpenAI's interface has them: one, or a list page by page, of the caller's own.

use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::{app::App, error::ApiError, keys::Caller, store::Kind};

/// Objects of a page where the request does not say.
const LIMIT: usize = 20;
/// At most.
pub(crate) const LIMIT_MAX: usize = 10_000;

/// Which part of a list is wanted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Page {
    pub(crate) after: Option<String>,
    pub(crate) before: Option<String>,
    pub(crate) limit: Option<usize>,
    pub(crate) order: Option<String>,
    /// Files for this purpose alone.
    pub(crate) purpose: Option<String>,
}

impl Page {
    /// Whether the oldest come first.
    pub(crate) fn is_ascending(&self) -> Result<bool, ApiError> {
        match self.order.as_deref() {
            None | Some("desc") => Ok(false),
            Some("asc") => Ok(true),
            Some(other) => Err(ApiError::invalid("order", format!("`order` is {other:?}, expected asc or desc"))),
        }
    }
}

/// There is no such object.
pub(crate) fn none(kind: &str, id: &str) -> ApiError {
    let shown: String = id.chars().take(80).collect();
    let message = format!("there is no {kind} {shown:?} here");
    ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message).with_code("not_found")
}

/// The object of this id that belongs to the caller; people know its kind as `word`.
pub(crate) fn own(app: &App, caller: &Caller, (kind, word): (Kind, &str), id: &str) -> Result<Value, ApiError> {
    app.store.get(kind, id)?.filter(|object| object["owner"] == caller.id).ok_or_else(|| none(word, id))
}

/// All of a kind that belong to the caller.
pub(crate) fn all_own(app: &App, caller: &Caller, kind: Kind) -> Result<Vec<Value>, ApiError> {
    Ok(app.store.all(kind)?.into_iter().filter(|object| object["owner"] == caller.id).collect())
}

/// A page of objects, the newest first unless asked otherwise.
pub(crate) fn page(mut objects: Vec<Value>, wanted: &Page) -> Result<Value, ApiError> {
    let made = |object: &Value| object["created_at"].as_u64();
    objects.sort_by(|a, b| made(b).cmp(&made(a)).then_with(|| a["id"].as_str().cmp(&b["id"].as_str())));
    if wanted.is_ascending()? {
        objects.reverse();
    }
    window(objects, wanted)
}

/// A page of objects in their own order.
pub(crate) fn window(mut objects: Vec<Value>, wanted: &Page) -> Result<Value, ApiError> {
    let at = |id: &str, name: &'static str| {
        let place = objects.iter().position(|object| object["id"] == *id);
        place.ok_or_else(|| ApiError::invalid(name, format!("`{name}` is {id:?}, which is not in the list")))
    };
    let from = wanted.after.as_deref().map(|id| at(id, "after")).transpose()?.map_or(0, |i| i + 1);
    let until = wanted.before.as_deref().map(|id| at(id, "before")).transpose()?.unwrap_or(objects.len());
    let limit = wanted.limit.unwrap_or(LIMIT);
    objects.truncate(until.max(from));
    let mut rest = objects.split_off(from);
    let has_more = rest.len() > limit;
    rest.truncate(limit);
    let id = |object: Option<&Value>| object.map(|object| object["id"].clone());
    let (first, last) = (id(rest.first()), id(rest.last()));
    Ok(json!({ "object": "list", "data": rest, "first_id": first, "last_id": last, "has_more": has_more }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other() {
        let objects: Vec<Value> = (0..5).map(|i| json!({ "id": format!("o{i}"), "created_at": i })).collect();
        let mut seen = Vec::new();
        let mut wanted = Page { limit: Some(2), ..Page::default() };
        loop {
            let found = page(objects.clone(), &wanted).unwrap();
            seen.extend(found["data"].as_array().unwrap().iter().map(|object| object["id"].clone()));
            if found["has_more"] == false {
                break;
            }
            wanted.after = found["last_id"].as_str().map(str::to_owned);
        }
        assert_eq!(seen, ["o4", "o3", "o2", "o1", "o0"]);
        assert!(page(objects, &Page { after: Some("x".to_owned()), ..Page::default() }).is_err());
    }
}
