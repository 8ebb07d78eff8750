//! Names that say nothing: a file, folder or module must be called after what it holds.
//!
//! Paths of every file count, and modules declared inside Rust files. Names of functions and types are left to review.

use super::{
    Finding,
    rust_code::{line_of, word_offsets},
    tree::Tree,
};

const BANNED: [&str; 5] = ["utils", "common", "helpers", "misc", "manager"];

/// Checks the parts of every path and every `mod` declaration.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let expected = "a name that says what is in it";
    let mut findings = Vec::new();
    for file in &tree.files {
        // `common.test.py` is as empty a name as `common`: what counts stands before the first dot.
        let stems = file.path.split('/').map(|part| part.split('.').next().unwrap_or(part));
        for stem in stems.filter(|stem| is_banned(stem)) {
            findings.push(Finding::new(&file.path, 1, format!("a file or folder named `{stem}`"), expected));
        }
    }
    for file in tree.rust_files() {
        for offset in word_offsets(&file.code, "mod") {
            let name = file.code[offset + "mod".len()..].split_whitespace().next().unwrap_or_default();
            let name = name.trim_end_matches([';', '{', '}']);
            if is_banned(name) {
                let line = line_of(&file.code, offset);
                findings.push(Finding::new(file.path, line, format!("a module named `{name}`"), expected));
            }
        }
    }
    findings
}

fn is_banned(name: &str) -> bool {
    BANNED.iter().any(|banned| name.eq_ignore_ascii_case(banned))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        check(&Tree::of(files))
            .iter()
            .map(|finding| format!("{}:{}: {}", finding.path, finding.line, finding.what))
            .collect()
    }

    #[test]
    fn files_and_folders_fail() {
        assert_eq!(
            found(&[
                ("a/utils.rs", ""),
                ("tests/common/mod.rs", ""),
                ("web/Helpers.js", ""),
                ("misc/x", ""),
                ("manager", "")
            ]),
            [
                "a/utils.rs:1: a file or folder named `utils`",
                "tests/common/mod.rs:1: a file or folder named `common`",
                "web/Helpers.js:1: a file or folder named `Helpers`",
                "misc/x:1: a file or folder named `misc`",
                "manager:1: a file or folder named `manager`",
            ]
        );
    }

    #[test]
    fn modules_fail_declared_or_inline() {
        assert_eq!(
            found(&[("a.rs", "//! x\npub mod utils;\n#[cfg(test)]\nmod common {\n}\nmod misc{}\n")]),
            ["a.rs:2: a module named `utils`", "a.rs:4: a module named `common`", "a.rs:6: a module named `misc`"]
        );
    }

    #[test]
    fn longer_names_comments_and_strings_pass() {
        let text = "//! mod utils;\nmod common_prefix;\nconst A: &str = \"mod misc;\";\nlet mod_utils = helpers();\n";
        assert_eq!(found(&[("common_prefix.rs", text), ("page_manager.rs", "")]), Vec::<String>::new());
    }
}
