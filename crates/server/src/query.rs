//! What stands behind the `?` of a request: names that the path knows, each once.

use axum::{
    extract::{FromRequestParts, Query, rejection::QueryRejection},
    http::{Uri, request::Parts},
};

use serde_json::Value;

use crate::{
    error::ApiError,
    listing::{LIMIT_MAX, Page},
};

/// Names and values, in their order.
type Pairs = Vec<(String, String)>;

/// The names that the query of a route may have.
fn known(route: &str) -> &'static [&'static str] {
    match route {
        "/v1/files" => &["after", "before", "limit", "order", "purpose"],
        "/v1/batches"
        | "/v1/responses/{id}/input_items"
        | "/v1/fine_tuning/jobs"
        | "/v1/fine_tuning/jobs/{id}/events"
        | "/v1/fine_tuning/jobs/{id}/checkpoints" => &["after", "before", "limit", "order"],
        // Anthropic's clients say so that something of the request is new to them.
        "/v1/messages" | "/v1/messages/count_tokens" | "/v1/models/{*name}" => &["beta"],
        "/v1/models" => &["after_id", "before_id", "beta", "limit"],
        _ => &[],
    }
}

/// Refuses names that the route does not know, and names that come twice.
pub(crate) fn check(route: &str, uri: &Uri) -> Result<(), ApiError> {
    let (pairs, known) = (pairs(uri)?, known(route));
    for (i, (name, _)) in pairs.iter().enumerate() {
        let shown: String = name.chars().take(80).collect();
        if !known.contains(&name.as_str()) {
            let there = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let message = format!("`{shown}` is no query parameter of {route}, which has {there}");
            return Err(ApiError::invalid(shown, message).with_code("unknown_parameter"));
        }
        if pairs[..i].iter().any(|(other, _)| other == name) {
            return Err(ApiError::invalid(&shown, format!("`{shown}` is there twice; give it once")));
        }
    }
    Ok(())
}

fn limit(value: &str) -> Result<usize, ApiError> {
    value.parse().ok().filter(|limit| (1..=LIMIT_MAX).contains(limit)).ok_or_else(|| {
        let shown: String = value.chars().take(40).collect();
        ApiError::invalid("limit", format!("`limit` is {shown:?}, expected a whole number from 1 to {LIMIT_MAX}"))
    })
}

/// The part of the models `data` that a query wants, as Anthropic's clients page through them, and whether there are more.
pub(crate) fn models_page(uri: &Uri, mut data: Vec<Value>) -> Result<(Vec<Value>, bool), ApiError> {
    let (mut first, mut wanted) = (true, usize::MAX);
    for (name, value) in pairs(uri)? {
        let at = || {
            let missing = || ApiError::invalid(&name, format!("`{name}` names no model of this list"));
            data.iter().position(|model| model["id"] == value.as_str()).ok_or_else(missing)
        };
        match name.as_str() {
            "after_id" => data = data.split_off(at()? + 1),
            "before_id" => {
                data.truncate(at()?);
                first = false;
            }
            "limit" => wanted = limit(&value)?,
            _ => {}
        }
    }
    let more = data.len().saturating_sub(wanted);
    match first {
        true => data.truncate(wanted),
        false => data = data.split_off(more),
    }
    Ok((data, more > 0))
}

fn pairs(uri: &Uri) -> Result<Pairs, ApiError> {
    let found: Result<Query<Pairs>, QueryRejection> = Query::try_from_uri(uri);
    found.map(|Query(pairs)| pairs).map_err(|error| ApiError::invalid("", format!("the query of the URL: {error}")))
}

/// The part of a list that a request wants.
impl<S: Sync> FromRequestParts<S> for Page {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Page, ApiError> {
        let mut page = Page::default();
        for (name, value) in pairs(&parts.uri)? {
            match name.as_str() {
                "after" => page.after = Some(value),
                "before" => page.before = Some(value),
                "limit" => page.limit = Some(limit(&value)?),
                "order" => page.order = Some(value),
                "purpose" => page.purpose = Some(value),
                // `check` has refused it.
                _ => {}
            }
        }
        Ok(page)
    }
}
