//! What the environment and the caller say about pulling: token, endpoint, offline, patience; and where folders lie.
//!
//! Contract: environment variables are read here and nowhere else in the crate. Not here: using any of it.

use std::env;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::{Error, HubHost};

/// How a pull behaves. [`PullOptions::from_env`] is what the program uses; tests set the fields.
#[derive(Clone)]
pub struct PullOptions {
    /// Open no socket and start no process: the store and the Hugging Face cache or nothing.
    pub offline: bool,
    /// Token for the Hugging Face hub; sent to its endpoint only, never to where it redirects.
    pub token: Option<String>,
    /// Address of the Hugging Face hub instead of <https://huggingface.co>.
    pub endpoint: Option<String>,
    /// Address of ModelScope instead of <https://modelscope.cn>.
    pub modelscope_endpoint: Option<String>,
    /// Python executables to look for pip with, in order.
    pub pythons: Vec<String>,
    /// Patience with slow and broken connections.
    pub pacing: Pacing,
}

impl fmt::Debug for PullOptions {
    /// Says whether there is a token, never which: options end up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullOptions")
            .field("offline", &self.offline)
            .field("token", &self.token.as_ref().map(|_| "(set)"))
            .field("endpoint", &self.endpoint)
            .field("modelscope_endpoint", &self.modelscope_endpoint)
            .field("pythons", &self.pythons)
            .field("pacing", &self.pacing)
            .finish()
    }
}

/// Patience with slow and broken connections.
#[derive(Debug, Clone)]
pub struct Pacing {
    /// Attempts for one file without a megabyte of progress before giving up.
    pub attempts: u32,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest silence of a connected server.
    pub silence_timeout: Duration,
    /// How to wait between attempts.
    pub wait: fn(Duration),
}

impl Default for Pacing {
    fn default() -> Self {
        Pacing {
            attempts: 6,
            connect_timeout: Duration::from_secs(5),
            silence_timeout: Duration::from_secs(30),
            wait: std::thread::sleep,
        }
    }
}

impl Default for PullOptions {
    fn default() -> Self {
        PullOptions {
            offline: false,
            token: None,
            endpoint: None,
            modelscope_endpoint: None,
            pythons: ["python3", "python", "py"].map(str::to_owned).to_vec(),
            pacing: Pacing::default(),
        }
    }
}

impl PullOptions {
    /// Honours `HF_HUB_OFFLINE`, `HF_TOKEN` (else the token file under `HF_HOME`), `HF_ENDPOINT` and `MODELSCOPE_DOMAIN`.
    pub fn from_env() -> PullOptions {
        PullOptions {
            offline: text("HF_HUB_OFFLINE").is_some_and(|v| is_true(&v)),
            token: token(),
            endpoint: text("HF_ENDPOINT"),
            modelscope_endpoint: text("MODELSCOPE_DOMAIN")
                .map(|domain| if domain.contains("://") { domain } else { format!("https://{domain}") }),
            ..PullOptions::default()
        }
    }

    /// The address of a hub, without a trailing slash.
    pub(crate) fn endpoint_of(&self, host: HubHost) -> String {
        let named = match host {
            HubHost::HuggingFace => &self.endpoint,
            HubHost::ModelScope => &self.modelscope_endpoint,
        };
        named.as_deref().unwrap_or(host.default_endpoint()).trim_end_matches('/').to_owned()
    }

    /// The token that may go to a hub: Hugging Face's goes to Hugging Face alone.
    pub(crate) fn token_for(&self, host: HubHost) -> Option<&str> {
        match host {
            HubHost::HuggingFace => self.token.as_deref(),
            HubHost::ModelScope => None,
        }
    }
}

/// The folder of the store: `$QWENKIT_HOME/models`, else `qwenkit/models` in the system's cache folder.
pub(crate) fn store_root() -> Result<PathBuf, Error> {
    if let Some(home) = folder("QWENKIT_HOME") {
        return Ok(home.join("models"));
    }
    let cache = if cfg!(windows) {
        folder("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        home().map(|home| home.join("Library").join("Caches"))
    } else {
        folder("XDG_CACHE_HOME").or_else(|| home().map(|home| home.join(".cache")))
    };
    cache.map(|cache| cache.join("qwenkit").join("models")).ok_or(Error::NoHome)
}

/// The folder where the Hugging Face libraries keep downloaded repositories, by their own rules.
pub(crate) fn hugging_face_cache() -> Option<PathBuf> {
    folder("HF_HUB_CACHE")
        .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(hugging_face_home()?.join("hub")))
}

fn hugging_face_home() -> Option<PathBuf> {
    folder("HF_HOME")
        .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("huggingface")))
        .or_else(|| Some(home()?.join(".cache").join("huggingface")))
}

fn token() -> Option<String> {
    let from_file = || {
        let path = folder("HF_TOKEN_PATH").or_else(|| Some(hugging_face_home()?.join("token")))?;
        Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
    };
    text("HF_TOKEN").or_else(from_file).filter(|token| !token.is_empty())
}

fn home() -> Option<PathBuf> {
    folder("HOME").or_else(|| folder("USERPROFILE"))
}

/// An empty variable counts as unset, as shells treat it.
fn folder(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn text(variable: &str) -> Option<String> {
    env::var(variable).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

fn is_true(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")
}
