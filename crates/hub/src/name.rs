//! What the user typed, as one of three things: a path, a short name of the catalogue, or a repository on a hub.
//!
//! Contract: a name that passes here cannot leave the store's folder when it becomes part of a path. Not here: whether
//! the thing exists on a hub (`pull`) or in the store (`store`).

use std::fmt;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::catalogue::{self, CatalogueEntry};
use crate::http::encode_segment;
use crate::words::nearest;

/// A service that hosts model repositories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HubHost {
    /// <https://huggingface.co>, or the mirror that `HF_ENDPOINT` names.
    HuggingFace,
    /// <https://modelscope.cn>.
    ModelScope,
}

impl HubHost {
    /// The address used unless the environment names another. The only host names of the program stand here.
    pub fn default_endpoint(self) -> &'static str {
        match self {
            HubHost::HuggingFace => "https://huggingface.co",
            HubHost::ModelScope => "https://modelscope.cn",
        }
    }

    /// The branch that holds the current state of a repository.
    pub(crate) fn default_revision(self) -> &'static str {
        match self {
            HubHost::HuggingFace => "main",
            HubHost::ModelScope => "master",
        }
    }
}

/// Which model is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelRef {
    /// A file or folder of the user's own; never copied, never removed.
    Path(PathBuf),
    /// A short name.
    Catalogue(&'static CatalogueEntry),
    /// A repository on a hub.
    Hub {
        /// Where it is hosted.
        host: HubHost,
        /// `owner/name`.
        repository: String,
        /// Branch, tag or commit; `None` is the default branch.
        revision: Option<String>,
        /// A file of the repository or the word for a quantisation (`Q4_K_M`); `None` leaves the choice to pull.
        file: Option<String>,
    },
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelRef::Path(path) => write!(f, "{}", path.display()),
            ModelRef::Catalogue(entry) => f.write_str(entry.name),
            ModelRef::Hub { host, repository, revision, file } => {
                if *host == HubHost::ModelScope {
                    f.write_str(MODELSCOPE_PREFIX)?;
                }
                f.write_str(repository)?;
                revision.iter().try_for_each(|r| write!(f, "@{r}"))?;
                file.iter().try_for_each(|name| write!(f, ":{name}"))
            }
        }
    }
}

impl ModelRef {
    /// The folder of this model inside the store, made of characters that every file system takes and different for
    /// different references. `None` for a path, which the store does not hold.
    pub(crate) fn folder(&self) -> Option<String> {
        match self {
            ModelRef::Path(_) => None,
            ModelRef::Catalogue(entry) => Some(entry.name.replace(':', "-")),
            ModelRef::Hub { host, repository, revision, file } => {
                // Hubs take repositories in any case. `+`, `@` and `=` cannot stand in what they separate.
                let mut folder = repository.to_lowercase().replace('/', "+");
                if *host == HubHost::ModelScope {
                    folder.insert_str(0, "modelscope+");
                }
                revision.iter().for_each(|r| folder.push_str(&format!("@{}", encode_segment(r))));
                file.iter().for_each(|f| folder.push_str(&format!("={}", encode_segment(f))));
                Some(folder)
            }
        }
    }
}

const MODELSCOPE_PREFIX: &str = "modelscope:";
const HUGGING_FACE_PREFIXES: [&str; 5] =
    ["https://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf.co/", "hf:"];
const MODELSCOPE_PREFIXES: [&str; 4] =
    [MODELSCOPE_PREFIX, "https://modelscope.cn/models/", "https://www.modelscope.cn/models/", "modelscope.cn/models/"];

/// Says what `name` means, in this order: a path that exists, a short name, a hub id.
///
/// Accepted are paths (`model.gguf`, `./folder`), short names whatever their case (`qwen3:4b`, `qwen3`), `owner/name`,
/// `owner/name@revision`, `owner/name:file.gguf`, `owner/name:Q4_K_M`, the same behind `hf.co/`, and `modelscope:owner/name`.
///
/// # Errors
/// [`Error::UnknownModel`] with the nearest names, [`Error::NoSuchPath`], [`Error::NotAModel`] or [`Error::BadName`].
pub fn resolve(name: &str) -> Result<ModelRef, Error> {
    let name = name.trim();
    let path = Path::new(name);
    if !name.is_empty() && path.exists() && (looks_like_path(name) || holds_model(path)) {
        return if holds_model(path) { Ok(ModelRef::Path(path.to_path_buf())) } else { not_a_model_or_hub_id(name) };
    }
    if let Some(entry) = catalogue::entry(name) {
        return Ok(ModelRef::Catalogue(entry));
    }
    if let Some(rest) = strip_any(name, &MODELSCOPE_PREFIXES) {
        return hub_id(name, rest, HubHost::ModelScope);
    }
    if let Some(rest) = strip_any(name, &HUGGING_FACE_PREFIXES) {
        return hub_id(name, rest, HubHost::HuggingFace);
    }
    if must_be_path(name) {
        return Err(Error::NoSuchPath { path: path.to_path_buf() });
    }
    if name.contains('/') {
        return hub_id(name, name, HubHost::HuggingFace);
    }
    let names = catalogue::catalogue().iter().map(|entry| entry.name);
    Err(Error::UnknownModel { name: name.to_owned(), nearest: nearest(name, names) })
}

/// A folder `Qwen/Qwen3-0.6B` that holds something else must not hide the hub's model of that name.
fn not_a_model_or_hub_id(name: &str) -> Result<ModelRef, Error> {
    let not_a_model = || Error::NotAModel { path: PathBuf::from(name) };
    if must_be_path(name) {
        return Err(not_a_model());
    }
    hub_id(name, name, HubHost::HuggingFace).map_err(|_| not_a_model())
}

fn looks_like_path(name: &str) -> bool {
    name.contains(['/', '\\']) || is_gguf(name)
}

/// Shapes that no hub id has.
fn must_be_path(name: &str) -> bool {
    let starts = ["/", "./", "../", "~", "\\", ".\\", "..\\"];
    let drive = name.as_bytes().get(1) == Some(&b':') && matches!(name.as_bytes().get(2), Some(b'\\' | b'/'));
    let bare_file = is_gguf(name) && !name.contains(':') && name.matches('/').count() != 1;
    starts.iter().any(|s| name.starts_with(s))
        || name.contains('\\')
        || drive
        || bare_file
        || name == "."
        || name == ".."
}

fn holds_model(path: &Path) -> bool {
    if path.is_dir() {
        path.join("config.json").is_file()
    } else {
        path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
    }
}

fn is_gguf(name: &str) -> bool {
    name.get(name.len().saturating_sub(5)..).is_some_and(|end| end.eq_ignore_ascii_case(".gguf"))
}

fn strip_any<'a>(name: &'a str, prefixes: &[&str]) -> Option<&'a str> {
    prefixes.iter().find_map(|prefix| {
        let head = name.get(..prefix.len())?;
        head.eq_ignore_ascii_case(prefix).then(|| &name[prefix.len()..])
    })
}

/// `owner/name[@revision][:file]`.
fn hub_id(given: &str, id: &str, host: HubHost) -> Result<ModelRef, Error> {
    let bad = |reason: String| Error::BadName { name: given.to_owned(), reason };
    let (id, file) = match id.split_once(':') {
        Some((id, file)) => (id, Some(file)),
        None => (id, None),
    };
    let (repository, revision) = match id.split_once('@') {
        Some((repository, revision)) => (repository, Some(revision)),
        None => (id, None),
    };
    let repository = repository.trim_end_matches('/');
    let parts: Vec<&str> = repository.split('/').collect();
    if parts.len() != 2 {
        return Err(bad(format!("expected one `/` between owner and name, found {}", parts.len().saturating_sub(1))));
    }
    for part in parts {
        let allowed = part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        if part.is_empty() || !allowed || part.starts_with(['.', '-']) || part.contains("..") || part.len() > 96 {
            return Err(bad(format!("`{part}` is not an owner or a repository name")));
        }
    }
    for (what, value) in [("revision", revision), ("file", file)] {
        if value.is_some_and(|v| !is_safe_relative(v)) {
            return Err(bad(format!("`{}` is not a {what}", value.unwrap_or_default())));
        }
    }
    Ok(ModelRef::Hub {
        host,
        repository: repository.to_owned(),
        revision: revision.map(str::to_owned),
        file: file.map(str::to_owned),
    })
}

/// Whether a path from outside stays below the folder it is joined to, on every system: no empty, `.` or `..` part, no
/// drive, backslash or control character, none of the characters Windows refuses.
pub(crate) fn is_safe_relative(path: &str) -> bool {
    const REFUSED: [char; 9] = ['\\', ':', '*', '?', '"', '<', '>', '|', '@'];
    !path.is_empty()
        && path.len() <= 300
        && !path.contains(REFUSED)
        && !path.chars().any(char::is_control)
        && path.split('/').all(|part| !part.is_empty() && !part.ends_with(['.', ' ']) && !part.starts_with(' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(name: &str) -> (HubHost, String, Option<String>, Option<String>) {
        match resolve(name) {
            Ok(ModelRef::Hub { host, repository, revision, file }) => (host, repository, revision, file),
            other => panic!("{name}: {other:?}"),
        }
    }

    fn text(value: &str) -> Option<String> {
        Some(value.to_owned())
    }

    #[test]
    fn short_names_know_no_case_and_families_have_a_default() {
        for (name, full) in [("QWEN3:0.6B", "qwen3:0.6b"), ("qwen3", "qwen3:4b"), (" qwq ", "qwq:32b")] {
            assert!(matches!(resolve(name), Ok(ModelRef::Catalogue(entry)) if entry.name == full), "{name}");
        }
    }

    #[test]
    fn hub_ids_have_owner_name_revision_and_file() {
        let (face, scope) = (HubHost::HuggingFace, HubHost::ModelScope);
        let id = "Qwen/Qwen3-0.6B".to_owned();
        assert_eq!(hub("Qwen/Qwen3-0.6B"), (face, id.clone(), None, None));
        assert_eq!(hub("Qwen/Qwen3-0.6B@refs/pr/1"), (face, id.clone(), text("refs/pr/1"), None));
        assert_eq!(hub("Qwen/Qwen3-0.6B:Q4_K_M"), (face, id.clone(), None, text("Q4_K_M")));
        assert_eq!(hub("Qwen/Qwen3-0.6B@main:sub/x.gguf"), (face, id.clone(), text("main"), text("sub/x.gguf")));
        for prefix in ["hf.co/", "https://huggingface.co/", "HF.co/"] {
            assert_eq!(hub(&format!("{prefix}Qwen/Qwen3-0.6B")), (face, id.clone(), None, None));
        }
        assert_eq!(hub("modelscope:Qwen/Qwen3-0.6B"), (scope, id.clone(), None, None));
        assert_eq!(hub("https://modelscope.cn/models/Qwen/Qwen3-0.6B"), (scope, id, None, None));
    }

    #[test]
    fn a_reference_prints_as_a_name_that_means_the_same() {
        for name in ["qwen3:4b", "Qwen/X", "Qwen/X@v1", "Qwen/X:Q8_0", "Qwen/X@v1:a.gguf", "modelscope:Qwen/X:a.gguf"] {
            let model = resolve(name).expect("a good name");
            assert_eq!(model.to_string(), name);
            assert_eq!(resolve(&model.to_string()).expect("a good name"), model);
        }
    }

    #[test]
    fn ids_that_could_leave_the_store_are_refused() {
        for name in [
            "a/..",
            "a/b/c",
            "modelscope:../x",
            "hf.co/.a/b",
            "a/b@../../x",
            "a/b:../x.gguf",
            "a/b:/etc/x",
            "-a/b",
            "a/",
        ] {
            assert!(matches!(resolve(name), Err(Error::BadName { .. })), "{name}: {:?}", resolve(name));
        }
    }

    #[test]
    fn shapes_of_paths_are_looked_for_as_paths() {
        for name in ["./x", "../x/y", "/no/such/model.gguf", "no-such.gguf", "C:\\x\\y.gguf", "~/x.gguf", "a/b/c.gguf"]
        {
            assert!(matches!(resolve(name), Err(Error::NoSuchPath { .. })), "{name}: {:?}", resolve(name));
        }
    }

    #[test]
    fn a_file_or_checkpoint_that_exists_is_a_path_and_another_folder_is_not() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("My.GGUF");
        std::fs::write(&file, b"GGUF").expect("writable");
        let name = |path: &Path| path.to_str().expect("a plain path").to_owned();
        assert_eq!(resolve(&name(&file)).expect("it exists"), ModelRef::Path(file));
        assert!(matches!(resolve(&name(folder.path())), Err(Error::NotAModel { .. })));
        std::fs::write(folder.path().join("config.json"), b"{}").expect("writable");
        assert_eq!(resolve(&name(folder.path())).expect("a checkpoint"), ModelRef::Path(folder.path().to_path_buf()));
    }

    #[test]
    fn an_unknown_name_gets_the_nearest_names_and_a_hint() {
        let error = resolve("qwen3:4bb").expect_err("a slip of the finger");
        let text = error.to_string();
        assert!(
            matches!(&error, Error::UnknownModel { nearest, .. } if nearest[0] == "qwen3:4b" && nearest.len() <= 3)
        );
        assert!(text.contains("did you mean `qwen3:4b`") && text.contains("qwenkit list --all"), "{text}");
        let far = resolve("zzz").expect_err("nothing like it");
        assert!(!far.to_string().contains("did you mean"), "{far}");
        assert!(matches!(resolve(""), Err(Error::UnknownModel { .. })));
    }

    #[test]
    fn two_references_never_share_a_folder() {
        let names = [
            "qwen3:4b",
            "a/b",
            "a/b@c",
            "a/b:c",
            "a/b@c:d",
            "modelscope:a/b",
            "a/b--c",
            "a--b/c",
            "a/b-c",
            "a/b@c+d",
            "a/b@c/d",
        ];
        let mut folders: Vec<_> = names.map(|n| resolve(n).expect("a good name").folder()).to_vec();
        folders.sort();
        folders.dedup();
        assert_eq!(folders.len(), names.len(), "{folders:?}");
    }
}
