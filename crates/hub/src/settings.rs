//! What the environment and the caller say about pulling: token, endpoint, offline, patience; and where folders lie.
//!
//! Contract: environment variables are read here and nowhere else in the crate. Not here: using any of it.

use std::env;
use std::ffi::OsString;
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
        Environment::of_process().pull_options()
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
    Environment::of_process().store_root()
}

/// The folder where the Hugging Face libraries keep downloaded repositories, by their own rules.
pub(crate) fn hugging_face_cache() -> Option<PathBuf> {
    Environment::of_process().hugging_face_cache()
}

/// Gives a variable's value.
type Lookup = dyn Fn(&str) -> Option<OsString>;

/// The variables, behind a function so that tests need not change the process's own.
struct Environment {
    get: Box<Lookup>,
}

impl Environment {
    fn of_process() -> Environment {
        Environment { get: Box::new(|variable| env::var_os(variable)) }
    }

    fn pull_options(&self) -> PullOptions {
        let with_scheme = |domain: String| if domain.contains("://") { domain } else { format!("https://{domain}") };
        PullOptions {
            offline: self.text("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
            token: self.token(),
            endpoint: self.text("HF_ENDPOINT"),
            modelscope_endpoint: self.text("MODELSCOPE_DOMAIN").map(with_scheme),
            ..PullOptions::default()
        }
    }

    fn store_root(&self) -> Result<PathBuf, Error> {
        if let Some(home) = self.folder("QWENKIT_HOME") {
            return Ok(home.join("models"));
        }
        let cache = if cfg!(windows) {
            self.folder("LOCALAPPDATA")
        } else if cfg!(target_os = "macos") {
            self.home().map(|home| home.join("Library").join("Caches"))
        } else {
            self.folder("XDG_CACHE_HOME").or_else(|| Some(self.home()?.join(".cache")))
        };
        cache.map(|cache| cache.join("qwenkit").join("models")).ok_or(Error::NoHome)
    }

    fn hugging_face_cache(&self) -> Option<PathBuf> {
        let named = self.folder("HF_HUB_CACHE").or_else(|| self.folder("HUGGINGFACE_HUB_CACHE"));
        named.or_else(|| Some(self.hugging_face_home()?.join("hub")))
    }

    fn hugging_face_home(&self) -> Option<PathBuf> {
        self.folder("HF_HOME")
            .or_else(|| Some(self.folder("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(self.home()?.join(".cache").join("huggingface")))
    }

    fn token(&self) -> Option<String> {
        let from_file = || {
            let path = self.folder("HF_TOKEN_PATH").or_else(|| Some(self.hugging_face_home()?.join("token")))?;
            Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
        };
        self.text("HF_TOKEN").or_else(from_file).filter(|token| !token.is_empty())
    }

    fn home(&self) -> Option<PathBuf> {
        self.folder("HOME").or_else(|| self.folder("USERPROFILE"))
    }

    /// An empty variable counts as unset, as shells treat it.
    fn folder(&self, variable: &str) -> Option<PathBuf> {
        (self.get)(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
    }

    fn text(&self, variable: &str) -> Option<String> {
        let value = (self.get)(variable)?.into_string().ok()?;
        Some(value.trim().to_owned()).filter(|value| !value.is_empty())
    }
}

fn is_true(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        let variables: Vec<(String, OsString)> =
            variables.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect();
        Environment { get: Box::new(move |wanted| Some(variables.iter().find(|(name, _)| name == wanted)?.1.clone())) }
    }

    #[test]
    fn the_environment_sets_token_endpoint_and_offline() {
        let options = environment(&[
            ("HF_TOKEN", " hf_x\n"),
            ("HF_ENDPOINT", "https://mirror.example/"),
            ("HF_HUB_OFFLINE", "1"),
            ("MODELSCOPE_DOMAIN", "scope.example"),
        ])
        .pull_options();
        assert!(options.offline);
        assert_eq!(options.endpoint_of(HubHost::HuggingFace), "https://mirror.example");
        assert_eq!(options.endpoint_of(HubHost::ModelScope), "https://scope.example");
        assert_eq!(options.token_for(HubHost::HuggingFace), Some("hf_x"));
        assert_eq!(options.token_for(HubHost::ModelScope), None);
        assert!(!format!("{options:?}").contains("hf_x"), "{options:?}");
    }

    #[test]
    fn an_empty_environment_means_the_public_hubs_and_no_token() {
        let options = environment(&[("HF_TOKEN", ""), ("HF_HUB_OFFLINE", "0"), ("HF_ENDPOINT", " ")]).pull_options();
        assert!(!options.offline && options.token.is_none());
        assert_eq!(options.endpoint_of(HubHost::HuggingFace), HubHost::HuggingFace.default_endpoint());
    }

    #[test]
    fn the_token_file_is_read_where_the_hub_libraries_put_it() {
        let home = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(home.path().join("token"), "hf_file\n").expect("writable");
        let home = home.path().to_str().expect("a plain path");
        assert_eq!(environment(&[("HF_HOME", home)]).token().as_deref(), Some("hf_file"));
        assert_eq!(environment(&[("HF_HOME", home), ("HF_TOKEN", "hf_x")]).token().as_deref(), Some("hf_x"));
    }

    #[test]
    fn folders_follow_the_variables_in_order() {
        let path = |parts: &[&str]| parts.iter().collect::<PathBuf>();
        let all =
            [("QWENKIT_HOME", "q"), ("HF_HUB_CACHE", "c"), ("HF_HOME", "h"), ("XDG_CACHE_HOME", "x"), ("HOME", "u")];
        assert_eq!(environment(&all).store_root().expect("named"), path(&["q", "models"]));
        let caches: Vec<_> = (1..5).map(|from| environment(&all[from..]).hugging_face_cache()).collect();
        let expected = [
            path(&["c"]),
            path(&["h", "hub"]),
            path(&["x", "huggingface", "hub"]),
            path(&["u", ".cache", "huggingface", "hub"]),
        ];
        assert_eq!(caches, expected.map(Some));
        if cfg!(target_os = "linux") {
            assert_eq!(environment(&all[3..]).store_root().expect("named"), path(&["x", "qwenkit", "models"]));
            assert_eq!(
                environment(&all[4..]).store_root().expect("named"),
                path(&["u", ".cache", "qwenkit", "models"])
            );
        }
        assert!(matches!(environment(&[]).store_root(), Err(Error::NoHome)));
    }
}
