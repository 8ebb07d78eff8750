//! What a hub says about a repository: its commit, its licence, its files with sizes and checksums.
//!
//! Contract: paths that could leave the model's folder are dropped here, so nothing later sees them. Sources of the
//! formats: Hugging Face's `/api/models/{repo}/revision` and `/tree`, ModelScope's `/api/v1/models/{repo}/repo/files`.
//! Not here: which of the files to take (`select`).

use serde_json::Value;

use crate::http::{Ask, Client, Failure, Reply, backoff, encode_path, encode_segment, without_query};
use crate::name::is_safe_relative;
use crate::pull::PullEvent;
use crate::words::nearest;
use crate::{Error, HubHost, catalogue};

/// A repository as its hub describes it.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub(crate) commit: Option<String>,
    pub(crate) licence: Option<String>,
    pub(crate) files: Vec<RemoteFile>,
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    /// With `/`; safe to join to a folder.
    pub(crate) path: String,
    pub(crate) size_bytes: Option<u64>,
    /// Lower-case hexadecimal; hubs know it for large files only.
    pub(crate) sha256: Option<String>,
}

/// A repository at a revision on a hub.
#[derive(Clone, Copy)]
pub(crate) struct Remote<'a> {
    pub(crate) client: &'a Client,
    pub(crate) host: HubHost,
    pub(crate) repository: &'a str,
    pub(crate) revision: Option<&'a str>,
}

impl Remote<'_> {
    fn revision(&self) -> &str {
        self.revision.unwrap_or(self.host.default_revision())
    }

    /// Address of a file's content at a commit.
    pub(crate) fn file_url(&self, commit: Option<&str>, path: &str) -> String {
        let endpoint = self.client.endpoint();
        let revision = encode_segment(commit.unwrap_or(self.revision()));
        let (repository, path) = (self.repository, encode_path(path));
        match self.host {
            HubHost::HuggingFace => format!("{endpoint}/{repository}/resolve/{revision}/{path}"),
            HubHost::ModelScope => format!("{endpoint}/models/{repository}/resolve/{revision}/{path}"),
        }
    }

    /// The page a person reads about the model.
    pub(crate) fn page(&self) -> String {
        let models = if self.host == HubHost::ModelScope { "models/" } else { "" };
        format!("{}/{models}{}", self.client.endpoint(), self.repository)
    }

    /// Asks the hub what the repository holds.
    pub(crate) fn list(&self, events: &mut dyn FnMut(PullEvent)) -> Result<Listing, Error> {
        match self.host {
            HubHost::HuggingFace => self.list_hugging_face(events),
            HubHost::ModelScope => self.list_modelscope(events),
        }
    }

    fn list_hugging_face(&self, events: &mut dyn FnMut(PullEvent)) -> Result<Listing, Error> {
        // A repository of more pages than this (1000 files each) is no model.
        const PAGES_MAX: usize = 20;
        let api = format!("{}/api/models/{}", self.client.endpoint(), self.repository);
        let url = format!("{api}/revision/{}", encode_segment(self.revision()));
        let (about, _) = self.json(&url, events)?;
        let commit = about["sha"].as_str().filter(|sha| is_safe_relative(sha) && !sha.contains('/')).map(str::to_owned);
        let mut listing = Listing { licence: licence_of(&about), commit, files: Vec::new() };
        let at = encode_segment(listing.commit.as_deref().unwrap_or(self.revision()));
        let mut next = Some(format!("{api}/tree/{at}?recursive=true"));
        for _ in 0..PAGES_MAX {
            let Some(url) = next.take() else { break };
            let (page, link) = self.json(&url, events)?;
            let entries = page.as_array().ok_or_else(|| bad_answer(&url, "expected a list of files"))?;
            listing.files.extend(entries.iter().filter_map(hugging_face_file));
            // Pages elsewhere would be asked for without the token and trusted with the checksums: not followed.
            next = link.filter(|link| link.starts_with(&format!("{}/", self.client.endpoint())));
        }
        Ok(listing)
    }

    fn list_modelscope(&self, events: &mut dyn FnMut(PullEvent)) -> Result<Listing, Error> {
        let revision = encode_segment(self.revision());
        let (endpoint, repository) = (self.client.endpoint(), self.repository);
        let url = format!("{endpoint}/api/v1/models/{repository}/repo/files?Revision={revision}&Recursive=true");
        let (answer, _) = self.json(&url, events)?;
        if let Some(code) = answer["Code"].as_u64().filter(|code| *code != 200) {
            return Err(match code {
                401 | 403 => self.unauthorised(code as u16),
                404 => self.repository_not_found(),
                _ => bad_answer(&url, answer["Message"].as_str().unwrap_or("an error without a message")),
            });
        }
        let files = answer["Data"]["Files"].as_array().ok_or_else(|| bad_answer(&url, "expected Data.Files"))?;
        Ok(Listing { files: files.iter().filter_map(modelscope_file).collect(), ..Listing::default() })
    }

    /// JSON and the address of its next page, with the patience that a busy hub deserves and an absent one does not.
    fn json(&self, url: &str, events: &mut dyn FnMut(PullEvent)) -> Result<(Value, Option<String>), Error> {
        let pacing = &self.client.pacing;
        let mut attempt = 1;
        loop {
            let (reason, wait, give_up) = match self.json_once(url) {
                Ok(done) => return Ok(done),
                Err(Once::Fatal(error)) => return Err(*error),
                Err(Once::Again { reason, wait, error }) => (reason, wait, error),
            };
            if attempt >= pacing.attempts {
                return Err(*give_up);
            }
            events(PullEvent::Retrying { attempt: attempt + 1, reason });
            (pacing.wait)(wait.unwrap_or_else(|| backoff(attempt)));
            attempt += 1;
        }
    }

    fn json_once(&self, url: &str) -> Result<(Value, Option<String>), Once> {
        let broken = |failure: Failure| match failure {
            Failure::Unreachable { host, reason } => Once::Fatal(Box::new(Error::Unreachable { host, reason })),
            Failure::Refused(error) => Once::Fatal(Box::new(error)),
            Failure::Broken(reason) => {
                let error = Error::Unreachable { host: self.client.endpoint().to_owned(), reason: reason.clone() };
                Once::Again { reason, wait: None, error: Box::new(error) }
            }
        };
        let reply = self.client.get(url, &Ask::default()).map_err(broken)?;
        match reply.status {
            200 => {
                let next = reply.header("link").and_then(next_page);
                Ok((reply.into_json(url).map_err(broken)?, next))
            }
            429 | 500..=599 => {
                let error = Error::Status {
                    url: without_query(url),
                    status: reply.status,
                    attempts: self.client.pacing.attempts,
                };
                Err(Once::Again {
                    reason: format!("HTTP {}", reply.status),
                    wait: reply.retry_after(),
                    error: Box::new(error),
                })
            }
            _ => Err(Once::Fatal(Box::new(self.refusal(&reply, url)))),
        }
    }

    /// The error for a status that another attempt would not change.
    pub(crate) fn refusal(&self, reply: &Reply, url: &str) -> Error {
        // Hugging Face hides private repositories by answering 401 for absent ones, and says which in a header.
        let absent = reply.header("x-error-code").is_some_and(|code| code == "RepoNotFound");
        match reply.status {
            404 => self.repository_not_found(),
            401 | 403 if absent && !self.client.has_token() => self.repository_not_found(),
            status @ (401 | 403) => self.unauthorised(status),
            status => Error::Status { url: without_query(url), status, attempts: 1 },
        }
    }

    fn unauthorised(&self, status: u16) -> Error {
        Error::Unauthorised { page: self.page(), status, token_sent: self.client.has_token() }
    }

    fn repository_not_found(&self) -> Error {
        let known = || catalogue::catalogue().iter().map(|entry| entry.repository);
        // A mirror may lack what the catalogue knows; its neighbours are then no better names.
        let misspelt = !known().any(|repository| repository == self.repository);
        let nearest = if misspelt { nearest(self.repository, known()) } else { Vec::new() };
        Error::RepositoryNotFound {
            host: self.client.endpoint().to_owned(),
            repository: self.repository.to_owned(),
            revision: self.revision.map(str::to_owned),
            nearest,
        }
    }
}

/// One attempt's outcome when it brought nothing.
enum Once {
    Fatal(Box<Error>),
    Again {
        reason: String,
        wait: Option<std::time::Duration>,
        /// What to report if there is no further attempt.
        error: Box<Error>,
    },
}

fn bad_answer(url: &str, reason: &str) -> Error {
    Error::BadAnswer { url: without_query(url), reason: reason.to_owned() }
}

/// The licence from the model card: its identifier, or its own name where the identifier says `other`.
fn licence_of(about: &Value) -> Option<String> {
    let card = &about["cardData"];
    let id = card["license"].as_str().or_else(|| card["license"][0].as_str());
    let named = card["license_name"].as_str().filter(|_| id.is_none_or(|id| id == "other"));
    named.or(id).map(|text| text.chars().filter(|c| !c.is_control()).take(80).collect())
}

fn hugging_face_file(entry: &Value) -> Option<RemoteFile> {
    if entry["type"].as_str() != Some("file") {
        return None;
    }
    let large = &entry["lfs"];
    let size_bytes = large["size"].as_u64().or_else(|| entry["size"].as_u64());
    remote_file(entry["path"].as_str()?, size_bytes, large["oid"].as_str())
}

fn modelscope_file(entry: &Value) -> Option<RemoteFile> {
    if entry["Type"].as_str() == Some("tree") {
        return None;
    }
    remote_file(entry["Path"].as_str()?, entry["Size"].as_u64(), entry["Sha256"].as_str())
}

fn remote_file(path: &str, size_bytes: Option<u64>, sha256: Option<&str>) -> Option<RemoteFile> {
    let sha256 = sha256
        .map(|sum| sum.strip_prefix("sha256:").unwrap_or(sum).to_ascii_lowercase())
        .filter(|sum| sum.len() == 64 && sum.bytes().all(|b| b.is_ascii_hexdigit()));
    is_safe_relative(path).then(|| RemoteFile { path: path.to_owned(), size_bytes, sha256 })
}

/// The address in `Link: <address>; rel="next"`.
fn next_page(link: &str) -> Option<String> {
    link.split(',').find_map(|part| {
        let (address, rest) = part.trim().strip_prefix('<')?.split_once('>')?;
        rest.contains("rel=\"next\"").then(|| address.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn hugging_face_files_carry_the_large_files_checksum() {
        let sum = "AB".repeat(32);
        let entry =
            json!({"type": "file", "path": "a.gguf", "size": 130, "lfs": {"oid": sum, "size": 7_000_000_000_u64}});
        let file = hugging_face_file(&entry).expect("a file");
        assert_eq!((file.size_bytes, file.sha256), (Some(7_000_000_000), Some("ab".repeat(32))));
        let small = hugging_face_file(&json!({"type": "file", "path": "config.json", "size": 30, "oid": "f00"}));
        assert_eq!(small.expect("a file").sha256, None, "a git blob's id is no SHA-256");
        assert_eq!(hugging_face_file(&json!({"type": "directory", "path": "onnx"})), None);
    }

    #[test]
    fn modelscope_files_carry_their_checksum() {
        let entry = json!({"Type": "blob", "Path": "a.gguf", "Size": 12, "Sha256": "cd".repeat(32)});
        let file = modelscope_file(&entry).expect("a file");
        assert_eq!((file.size_bytes, file.sha256), (Some(12), Some("cd".repeat(32))));
        assert_eq!(modelscope_file(&json!({"Type": "blob", "Path": "b", "Sha256": ""})).expect("a file").sha256, None);
        assert_eq!(modelscope_file(&json!({"Type": "tree", "Path": "onnx"})), None);
    }

    #[test]
    fn paths_that_would_leave_the_folder_are_not_listed() {
        for path in ["../x.gguf", "/etc/passwd", "a/../../b", "a//b", "C:\\x", "a\\b", "", "a/.", "x\n.gguf", ".."] {
            assert_eq!(hugging_face_file(&json!({"type": "file", "path": path, "size": 1})), None, "{path:?}");
        }
        assert!(hugging_face_file(&json!({"type": "file", "path": "Q4_K_M/x.gguf", "size": 1})).is_some());
    }

    #[test]
    fn the_next_page_is_found_among_links() {
        let link = "<https://hub/a?cursor=x>; rel=\"next\", <https://hub/b>; rel=\"last\"";
        assert_eq!(next_page(link).as_deref(), Some("https://hub/a?cursor=x"));
        assert_eq!(next_page("<https://hub/b>; rel=\"last\""), None);
        assert_eq!(next_page("nonsense"), None);
    }

    #[test]
    fn a_licence_named_other_gives_its_own_name() {
        let about = |card: Value| licence_of(&json!({ "cardData": card }));
        assert_eq!(about(json!({"license": "apache-2.0"})).as_deref(), Some("apache-2.0"));
        assert_eq!(
            about(json!({"license": "other", "license_name": "qwen-research"})).as_deref(),
            Some("qwen-research")
        );
        assert_eq!(about(json!({"license": ["mit", "apache-2.0"]})).as_deref(), Some("mit"));
        assert_eq!(about(json!({})), None);
    }
}
