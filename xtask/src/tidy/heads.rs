//! Every Rust file opens with `//!`: what it is for, its contract, what is not here.
//!
//! Tests, examples and build scripts are files as well. Whether the sentences are any good is for review to say.

use super::{Finding, tree::Tree};

/// Checks the first line of every Rust file.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let files = tree.texts().filter(|(path, _)| path.ends_with(".rs"));
    files.filter(|(_, text)| !has_head(text)).map(|(path, _)| finding(path)).collect()
}

/// Whether the first line is a head with words in it.
fn has_head(text: &str) -> bool {
    let first = text.lines().next().unwrap_or_default();
    first.strip_prefix("//!").is_some_and(|words| !words.trim().is_empty())
}

fn finding(path: &str) -> Finding {
    Finding::new(path, 1, "the file has no head", "a first line `//! purpose`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_head_fails_wherever_it_stands() {
        let tree = Tree::of(&[
            ("src/good.rs", "//! Purpose.\n"),
            ("build.rs", "fn main() {}\n"),
            ("tests/late.rs", "use std::fmt;\n//! Purpose.\n"),
            ("examples/comment.rs", "// Purpose.\n"),
            ("src/bare.rs", "//!\nmod a;\n"),
            ("src/empty.rs", ""),
            ("notes.md", "no head needed\n"),
        ]);
        let paths: Vec<String> = check(&tree).into_iter().map(|finding| finding.path).collect();
        assert_eq!(paths, ["build.rs", "tests/late.rs", "examples/comment.rs", "src/bare.rs", "src/empty.rs"]);
    }
}
