//! The audit log: a line for each request that needs a key, each bound to the line before by a hash.
//!
//! Contract: lines are only added; who changes, removes or reorders one breaks the chain from there on, and [`verify`] says
//! where. Lines cut off at the end break nothing: they show against a [`Chain`] that was noted elsewhere before. No text of prompts or answers is in it.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Write},
    path::Path,
    sync::{Mutex, PoisonError},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{app::unix_s, clock::rfc3339};

/// What the first line follows.
const BEGINNING: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The log.
#[derive(Debug)]
pub(crate) struct AuditLog(Mutex<Open>);

#[derive(Debug)]
struct Open {
    file: File,
    chain: Chain,
}

/// How far a log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its lines.
    pub lines: u64,
    /// The last one's hash, which stands for all of them.
    pub head: String,
}

/// One request.
pub(crate) struct Entry<'a> {
    pub(crate) request_id: &'a str,
    pub(crate) key: &'a str,
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) status: u16,
}

impl AuditLog {
    /// Opens a log to go on with.
    ///
    /// # Errors
    /// When the file cannot be used, or its chain is broken.
    pub(crate) fn open(path: &Path) -> io::Result<AuditLog> {
        let chain = if path.exists() { verify(path)? } else { Chain { lines: 0, head: BEGINNING.to_owned() } };
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(AuditLog(Mutex::new(Open { file, chain })))
    }

    /// Adds a line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn add(&self, entry: &Entry<'_>) -> io::Result<()> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Open { file, chain } = &mut *open;
        let mut line = json!({
            "line": chain.lines + 1,
            "time": rfc3339(unix_s()),
            "request_id": entry.request_id,
            "key": entry.key,
            "method": entry.method,
            "path": entry.path,
            "status": entry.status,
        });
        let hash = link(&chain.head, &line);
        line["hash"] = json!(hash);
        file.write_all(format!("{line}\n").as_bytes())?;
        chain.lines += 1;
        chain.head = hash;
        Ok(())
    }
}

/// The hash of a line without its hash, behind the hash of the line before.
fn link(previous: &str, line: &Value) -> String {
    let digest = Sha256::digest(format!("{previous}{line}").as_bytes());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Checks a log's chain; returns how far it goes.
///
/// # Errors
/// When the file cannot be read, or a line does not follow from the one before: says which.
pub fn verify(path: &Path) -> io::Result<Chain> {
    let (mut lines, mut last) = (0, BEGINNING.to_owned());
    for text in BufReader::new(File::open(path)?).lines() {
        let broken = |what: &str| {
            let message = format!("{}: line {}: {what}; the log was changed from here on", path.display(), lines + 1);
            io::Error::new(io::ErrorKind::InvalidData, message)
        };
        let mut line: Value = serde_json::from_str(&text?).map_err(|_| broken("no JSON"))?;
        let hash = line.as_object_mut().and_then(|map| map.remove("hash"));
        let hash = hash.as_ref().and_then(Value::as_str).ok_or_else(|| broken("no hash"))?.to_owned();
        if link(&last, &line) != hash {
            return Err(broken("the hash does not follow from the line before"));
        }
        if line["line"] != lines + 1 {
            return Err(broken("the line's number is another"));
        }
        lines += 1;
        last = hash;
    }
    Ok(Chain { lines, head: last })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_line_breaks_the_chain_and_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        for round in 0..2 {
            let log = AuditLog::open(&path).unwrap();
            for i in 0..3 {
                let id = format!("r{round}{i}");
                log.add(&Entry { request_id: &id, key: "k", method: "POST", path: "/v1/x", status: 200 }).unwrap();
            }
        }
        let whole = verify(&path).unwrap();
        assert_eq!(whole.lines, 6);
        let text = std::fs::read_to_string(&path).unwrap();
        // Nothing in what is left shows that the end is gone; what was noted of the whole does.
        let cut = folder.path().join("cut.jsonl");
        std::fs::write(&cut, text.lines().take(4).map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        let left = verify(&cut).unwrap();
        assert!(left.lines == 4 && left.head != whole.head && text.lines().last().unwrap().contains(&whole.head));
        let lines: Vec<&str> = text.lines().collect();
        for (changed, line) in [
            (text.replacen("\"r01\"", "\"r99\"", 1), 2),
            (lines[1..].join("\n"), 1),
            ([&lines[..2], &lines[3..]].concat().join("\n"), 3),
            (format!("{text}nonsense\n"), 7),
        ] {
            std::fs::write(&path, changed).unwrap();
            let error = verify(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("line {line}:")), "{error}");
            assert!(AuditLog::open(&path).is_err());
        }
    }
}
