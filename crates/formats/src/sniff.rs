//! Says what a file really is when it is not what its name promised.
//!
//! Looks at the first bytes only and never fails: an unreadable or unknown file is described by its first bytes. Used
//! for messages alone; nothing is ever accepted because of what is found here.

use std::path::Path;

use crate::Error;
use crate::data_file::DataFile;

const REFETCH: &str = "download the file again; open the address in a browser if it asks you to log in or agree";

/// The error for `file`, whose beginning is not `expected`'s.
pub(crate) fn wrong_kind(file: &DataFile, expected: &'static str) -> Error {
    let mut head = vec![0; file.len().min(512) as usize];
    if file.read_at(0, &mut head, || "its first bytes".into()).is_err() {
        head.clear();
    }
    let (found, hint) = describe(&head, file.path());
    Error::WrongKind { path: file.path().to_path_buf(), expected, found, hint }
}

/// What bytes at the beginning of a file say about it, and what to do.
fn describe(head: &[u8], path: &Path) -> (String, String) {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let found = |found: &str, hint: &str| (found.to_owned(), hint.to_owned());
    let text = String::from_utf8_lossy(head);
    let lower = text.trim_start_matches('\u{feff}').trim_start().to_ascii_lowercase();
    if head.is_empty() {
        return found("an empty file", "the download did not start or was cut; fetch it again");
    }
    if lower.starts_with("version https://git-lfs.github.com/spec/") {
        let hint = format!("fetch it with `git lfs pull --include={name}`, or download it with `qwenkit pull`");
        return ("a Git LFS pointer, not the file itself".into(), hint);
    }
    if lower.starts_with("<!doctype html") || lower.starts_with("<html") || lower.starts_with("<head") {
        return found("an HTML page", REFETCH);
    }
    if lower.starts_with("<?xml") {
        return found("an XML document (often a server's error message)", REFETCH);
    }
    if head.starts_with(b"GGUF") {
        return found("a GGUF file", "give it the extension .gguf and open it as that");
    }
    if [&b"ggml"[..], b"lmgg", b"ggjt", b"tjgg", b"ggmf", b"fmgg", b"ggla", b"algg"].iter().any(|m| head.starts_with(m))
    {
        return found("a model in the old GGML format", "convert the original checkpoint to GGUF again");
    }
    if head.starts_with(b"PK\x03\x04") {
        return found(
            "a zip archive (a PyTorch .bin or .pt file is one, too)",
            "unpack it, or fetch the model as safetensors or GGUF",
        );
    }
    if head.len() > 1 && head[0] == 0x80 && (2..=5).contains(&head[1]) {
        return found(
            "a Python pickle",
            "pickles can run code when opened and are not read; fetch the model as safetensors or GGUF",
        );
    }
    if head.starts_with(&[0x1f, 0x8b]) || head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || head.starts_with(b"\xfd7zXZ") {
        return found("a compressed file (gzip, zstd or xz)", "unpack it first");
    }
    if head.len() > 9 && head[8] == b'{' && head[4..8] == [0; 4] {
        return found("a safetensors file", "open the checkpoint folder that holds it, with its config.json");
    }
    if head.iter().all(|&b| b == 0) {
        return found("filled with zeros", "the download reserved the space and never finished; fetch it again");
    }
    if name.ends_with(".json") {
        return found("a JSON file", "open the checkpoint folder that holds it, or the folder's config.json");
    }
    if lower.starts_with('{') || lower.starts_with('[') {
        return found("a JSON document (often a server's error message)", REFETCH);
    }
    let shown: Vec<String> = head.iter().take(8).map(|b| format!("{b:02x}")).collect();
    (format!("something else (first bytes {})", shown.join(" ")), "check that this is the file you meant".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_impostor_is_named() {
        let cases: [(&[u8], &str, &str); 14] = [
            (b"", "empty", "fetch"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer", "--include=m.gguf"),
            (b"\n <!DOCTYPE html><html>", "HTML", "download"),
            (b"<?xml version", "XML", "download"),
            (b"GGUF\x03\0\0\0", "a GGUF file", ".gguf"),
            (b"tjgg\x03\0\0\0", "old GGML", "convert"),
            (b"PK\x03\x04....", "zip", "unpack"),
            (b"\x80\x02}q\0", "pickle", "safetensors"),
            (b"\x1f\x8b\x08", "compressed", "unpack"),
            (b"\x40\0\0\0\0\0\0\0{\"a\"", "safetensors", "config.json"),
            (b"\0\0\0\0", "zeros", "fetch"),
            (b"{\"error\":\"gated\"}", "JSON", "download"),
            (b"\x01\x02", "01 02", "check"),
            (b"\x80", "80", "check"),
        ];
        for (head, what, todo) in cases {
            let (found, hint) = describe(head, Path::new("m.gguf"));
            assert!(found.contains(what), "{head:?}: {found}");
            assert!(hint.contains(todo), "{head:?}: {hint}");
        }
    }
}
