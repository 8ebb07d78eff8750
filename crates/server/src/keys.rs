//! API keys: who may ask. Only their SHA-256 is kept.

use axum::http::{HeaderMap, StatusCode, header::AUTHORIZATION};
use sha2::{Digest, Sha256};

use crate::error::ApiError;

/// Who asks: the owner of what the server keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The beginning of the key's hash; empty where there are no keys.
    pub(crate) id: String,
}

impl Caller {
    /// The owner of a kept object.
    pub(crate) fn of_owner(id: &str) -> Caller {
        Caller { id: id.to_owned() }
    }
}

/// The keys that open the server; with none, it is open to whoever reaches it.
#[derive(Clone, Debug, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// Of keys as they are given to clients.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Keys {
        Keys(keys.into_iter().map(hash).collect())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Refuses a request without a valid key, in either of the usual headers.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        if self.is_empty() {
            return Ok(Caller::default());
        }
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let bearer = text(AUTHORIZATION.as_str()).and_then(|value| {
            let (scheme, key) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
        });
        let unauthorized = |message: &str| {
            ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message).with_code("invalid_api_key")
        };
        let Some(key) = bearer.or_else(|| text("x-api-key")) else {
            return Err(unauthorized("this server wants an API key; send it as `Authorization: Bearer KEY`"));
        };
        let found = hash(key);
        // All of every hash is looked at, so that time tells nothing.
        let known = self.0.iter().fold(false, |known, hash| {
            known | (hash.iter().zip(&found).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0)
        });
        let id = found.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        if known { Ok(Caller { id }) } else { Err(unauthorized("this API key is not known here")) }
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}
