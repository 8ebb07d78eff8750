//! `Tree`: the files under check, by path, with their text.
//!
//! git's list decides what belongs to the project (tracked or staged files). Without git, or in a folder git knows
//! nothing about (an unpacked archive), every file counts except those under `target` and `.git`. No rule lives here.

use std::{fs, path::Path, process::Command};

use super::rust_code;

/// The files of a checkout, ordered by path.
pub(super) struct Tree {
    pub(super) files: Vec<File>,
}

/// One file.
pub(super) struct File {
    /// Relative to the root, with `/` between folders.
    pub(super) path: String,
    /// None when the content is not text (not UTF-8, or with NUL bytes).
    pub(super) text: Option<String>,
}

/// A Rust file in two views of the same lines.
pub(super) struct RustFile<'a> {
    pub(super) path: &'a str,
    /// As it stands.
    pub(super) text: &'a str,
    /// With comments and the contents of literals blanked.
    pub(super) code: String,
}

impl Tree {
    /// Reads every file of the checkout at `root`.
    pub(super) fn read(root: &Path) -> Result<Tree, String> {
        let mut paths = match git_paths(root) {
            Some(paths) => paths,
            None => walked_paths(root)?,
        };
        paths.sort();
        let mut files = Vec::with_capacity(paths.len());
        for path in paths {
            let full = root.join(&path);
            // A file deleted but not yet committed, a link, or a submodule has no text of its own to judge.
            if !fs::symlink_metadata(&full).is_ok_and(|metadata| metadata.is_file()) {
                continue;
            }
            let bytes = fs::read(&full).map_err(|error| format!("cannot read {}: {error}", full.display()))?;
            let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
            files.push(File { path, text });
        }
        Ok(Tree { files })
    }

    /// Files whose content is text.
    pub(super) fn texts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().filter_map(|file| Some((file.path.as_str(), file.text.as_deref()?)))
    }

    /// The text of one file.
    pub(super) fn text(&self, path: &str) -> Option<&str> {
        self.texts().find(|(other, _)| *other == path).map(|(_, text)| text)
    }

    /// Files that end in `.rs`.
    pub(super) fn rust_files(&self) -> impl Iterator<Item = RustFile<'_>> {
        let rust = self.texts().filter(|(path, _)| path.ends_with(".rs"));
        rust.map(|(path, text)| RustFile { path, text, code: rust_code::blanked(text) })
    }

    /// A made-up tree for tests.
    #[cfg(test)]
    pub(super) fn of(files: &[(&str, &str)]) -> Tree {
        let file = |(path, text): &(&str, &str)| File { path: (*path).to_owned(), text: Some((*text).to_owned()) };
        Tree { files: files.iter().map(file).collect() }
    }
}

/// What git lists, or None when git is absent or lists nothing here.
fn git_paths(root: &Path) -> Option<Vec<String>> {
    let output = Command::new("git").arg("-C").arg(root).args(["ls-files", "-z"]).output().ok()?;
    let listing =
        String::from_utf8(output.stdout).ok().filter(|listing| output.status.success() && !listing.is_empty())?;
    Some(listing.split_terminator('\0').map(str::to_owned).collect())
}

/// Every file below `root` except in folders named `target` or `.git`.
fn walked_paths(root: &Path) -> Result<Vec<String>, String> {
    let mut paths = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        let full = root.join(&folder);
        let told = |error| format!("cannot list {}: {error}", full.display());
        for entry in fs::read_dir(&full).map_err(told)? {
            let entry = entry.map_err(told)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
            match entry.file_type().map_err(told)?.is_dir() {
                true if name == "target" || name == ".git" => {}
                true => folders.push(path),
                false => paths.push(path),
            }
        }
    }
    Ok(paths)
}
