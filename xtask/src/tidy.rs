//! `tidy`: the house rules that neither the compiler nor clippy checks.
//!
//! Every check is a pure function from what was read (a `Tree` of files, a list of `Crate`s) to findings, so each one is
//! tested on made-up trees. Reading the disk, git and cargo happens in `tree` and `workspace` alone. Nothing here
//! changes a file.

mod clean_text;
mod floors;
mod heads;
mod names;
mod rust_code;
mod size;
mod tree;
mod unsafety;
mod workspace;

use std::{fmt, path::Path};

use tree::Tree;

/// One broken rule at one place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    /// The file, relative to the root, with `/` between its folders.
    path: String,
    /// Counted from 1; 1 also where the file as a whole is meant.
    line: usize,
    /// What stands there.
    what: String,
    /// What should stand there, or what to do.
    expected: String,
}

impl Finding {
    fn new(path: &str, line: usize, what: impl Into<String>, expected: impl Into<String>) -> Finding {
        Finding { path: path.to_owned(), line, what: what.into(), expected: expected.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {} (expected {})", self.path, self.line, self.what, self.expected)
    }
}

/// What a whole run found.
pub(crate) struct Report {
    /// In the order of paths and lines.
    pub(crate) findings: Vec<Finding>,
    /// How many files were looked at.
    pub(crate) file_count: usize,
}

/// Runs every check on the checkout at `root`.
///
/// # Errors
/// When the files or the workspace's metadata cannot be read, or when there is nothing to check: a check of an empty
/// list would pass whatever the tree holds.
pub(crate) fn check(root: &Path) -> Result<Report, String> {
    let tree = Tree::read(root)?;
    let crates = workspace::read(root)?;
    if tree.rust_files().next().is_none() || crates.is_empty() {
        return Err(format!("found no Rust files or no crates in {}", root.display()));
    }
    let mut findings = [
        floors::check(&crates, &tree),
        size::check(&tree),
        names::check(&tree),
        heads::check(&tree),
        unsafety::check(&crates, &tree),
        clean_text::check(&tree),
    ]
    .concat();
    findings.sort();
    Ok(Report { findings, file_count: tree.files.len() })
}
