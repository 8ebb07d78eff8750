//! API keys: who may ask, for what and how much. Only their SHA-256 is kept.

use axum::http::{HeaderMap, StatusCode, header::AUTHORIZATION};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{
    error::ApiError,
    quota::{Meter, Quota},
};

/// Who asks: the owner of what the server keeps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Caller {
    /// The beginning of the key's hash; empty where there are no keys.
    pub(crate) id: String,
    /// What whoever runs the server calls the key.
    pub(crate) name: String,
    /// What the key uses, if it has limits.
    pub(crate) meter: Option<Meter>,
}

impl Caller {
    /// The owner of a kept object.
    pub(crate) fn of_owner(id: &str) -> Caller {
        Caller { id: id.to_owned(), ..Caller::default() }
    }
}

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Ask models.
    Models,
    /// Have models tuned, which takes hours of the machine.
    Jobs,
    /// See the server's figures, and have it read files of its machine.
    Admin,
}

impl Scope {
    const ALL: [Scope; 3] = [Scope::Models, Scope::Jobs, Scope::Admin];

    fn name(self) -> &'static str {
        match self {
            Scope::Models => "models",
            Scope::Jobs => "jobs",
            Scope::Admin => "admin",
        }
    }
}

/// A key.
#[derive(Clone, Debug)]
struct Key {
    hash: [u8; 32],
    name: String,
    scopes: Vec<Scope>,
    meter: Option<Meter>,
}

/// The keys that open the server; with none, it is open to whoever reaches it.
#[derive(Clone, Debug, Default)]
pub struct Keys(Vec<Key>);

/// Why a file of keys is not taken.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// It is no list of keys.
    #[error(
        "no list of keys: {0}\nhint: [{{\"name\": \"shop\", \"key\": \"...\", \"scopes\": [\"models\"], \"requests_per_minute\": 60}}]; \
         `sha256` may stand instead of `key`"
    )]
    Format(#[from] serde_json::Error),
    /// One of the keys is wrong.
    #[error("key {name:?}: {reason}")]
    Key {
        /// Which.
        name: String,
        /// Why.
        reason: String,
    },
}

/// A key in a file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyEntry {
    name: String,
    key: Option<String>,
    sha256: Option<String>,
    scopes: Option<Vec<String>>,
    requests_per_minute: Option<u64>,
    requests_per_day: Option<u64>,
    tokens_per_minute: Option<u64>,
    tokens_per_day: Option<u64>,
}

impl Keys {
    /// Of keys as they are given to clients, all alike: they may do everything, each within `quota`.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>, quota: Quota) -> Keys {
        let key = |(i, key): (usize, &str)| Key {
            hash: hash(key),
            name: format!("key {}", i + 1),
            scopes: Scope::ALL.to_vec(),
            meter: meter(quota),
        };
        Keys(keys.into_iter().enumerate().map(key).collect())
    }

    /// Adds the keys of a JSON file. A key without scopes may ask the models; the scope `jobs` may have them
    /// tuned, and `admin` sees the server's figures.
    ///
    /// # Errors
    /// When the text is no list of keys, or one of them makes no sense.
    pub fn add_file(&mut self, text: &str) -> Result<(), KeysError> {
        let entries: Vec<KeyEntry> = serde_json::from_str(text)?;
        for entry in entries {
            let wrong = |reason: &str| KeysError::Key { name: entry.name.clone(), reason: reason.to_owned() };
            let hash = match (&entry.key, &entry.sha256) {
                (Some(key), None) if !key.trim().is_empty() => hash(key.trim()),
                (None, Some(text)) => from_hex(text).ok_or_else(|| wrong("`sha256` is not 64 hexadecimal digits"))?,
                _ => return Err(wrong("either `key` or `sha256` has to say which key it is")),
            };
            let scopes = entry.scopes.clone().unwrap_or_else(|| vec!["models".to_owned()]);
            let scope = |name: &String| {
                let known = Scope::ALL.into_iter().find(|scope| scope.name() == name);
                known.ok_or_else(|| wrong(&format!("the scope {name:?} is none of `models`, `jobs` and `admin`")))
            };
            let scopes = scopes.iter().map(scope).collect::<Result<Vec<Scope>, _>>()?;
            if self.0.iter().any(|known| known.name == entry.name || known.hash == hash) {
                return Err(wrong("its name or the key itself is there twice"));
            }
            let quota = Quota {
                requests_per_minute: entry.requests_per_minute,
                requests_per_day: entry.requests_per_day,
                tokens_per_minute: entry.tokens_per_minute,
                tokens_per_day: entry.tokens_per_day,
            };
            self.0.push(Key { hash, name: entry.name, scopes, meter: meter(quota) });
        }
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The owner of a kept object, with the limits of the key.
    pub(crate) fn owner(&self, id: &str) -> Caller {
        let known = self.0.iter().find(|key| short(&key.hash) == id);
        let owner = Caller::of_owner(id);
        known.map_or(owner.clone(), |key| Caller { name: key.name.clone(), meter: key.meter.clone(), ..owner })
    }

    /// Refuses a request without a valid key, in either of the usual headers, or with one that may not do this.
    pub(crate) fn check(&self, headers: &HeaderMap, scope: Scope) -> Result<Caller, ApiError> {
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
        let same = |key: &Key| key.hash.iter().zip(&found).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0;
        let known = self.0.iter().fold(None, |known, key| if same(key) { Some(key) } else { known });
        let Some(key) = known else { return Err(unauthorized("this API key is not known here")) };
        if !key.scopes.contains(&scope) {
            let message = format!("this API key lacks the scope `{}`, which this path needs", scope.name());
            return Err(ApiError::new(StatusCode::FORBIDDEN, "permission_error", message).with_code("missing_scope"));
        }
        Ok(Caller { id: short(&found), name: key.name.clone(), meter: key.meter.clone() })
    }
}

/// The beginning of a key's hash, by which what the key's owner has is known.
fn short(hash: &[u8; 32]) -> String {
    hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

fn meter(quota: Quota) -> Option<Meter> {
    (quota != Quota::default()).then(|| Meter::new(quota))
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    let mut hash = [0; 32];
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, pair) in hash.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_keys_are_read_and_their_faults_named() {
        let mut keys = Keys::default();
        let digest: String = hash("b").iter().map(|byte| format!("{byte:02x}")).collect();
        keys.add_file(&format!(
            r#"[{{"name": "a", "key": "a"}}, {{"name": "b", "sha256": "{digest}", "scopes": ["admin"]}}]"#
        ))
        .unwrap();
        let headers = |key: &str| HeaderMap::from_iter([(AUTHORIZATION, format!("Bearer {key}").parse().unwrap())]);
        assert_eq!(keys.check(&headers("a"), Scope::Models).unwrap().name, "a");
        assert_eq!(keys.check(&headers("b"), Scope::Admin).unwrap().name, "b");
        assert_eq!(keys.check(&headers("a"), Scope::Admin).unwrap_err().status, StatusCode::FORBIDDEN);
        assert_eq!(keys.check(&headers("c"), Scope::Models).unwrap_err().status, StatusCode::UNAUTHORIZED);
        assert_eq!(keys.check(&headers("a"), Scope::Jobs).unwrap_err().status, StatusCode::FORBIDDEN);
        for (text, word) in [
            ("{}", "no list"),
            (r#"[{"name": "x", "colour": 1}]"#, "colour"),
            (r#"[{"name": "x"}]"#, "either"),
            (r#"[{"name": "x", "sha256": "12"}]"#, "64"),
            (r#"[{"name": "x", "key": "x", "scopes": ["root"]}]"#, "root"),
            (r#"[{"name": "a", "key": "z"}]"#, "twice"),
        ] {
            let error = keys.clone().add_file(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
