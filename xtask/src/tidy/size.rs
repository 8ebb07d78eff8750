//! No Rust file above 800 lines, unless it is listed with a reason.
//!
//! The list is `xtask/tidy-exceptions.txt`: `path reason` a line, `#` for comments. An entry that names no file, a file
//! below the ceiling, or no reason is a finding too, so the list only ever holds what is needed.

use super::{Finding, tree::Tree};

/// The ceiling; a readable file has 100 to 400.
const LINE_LIMIT: usize = 800;
const EXCEPTIONS_PATH: &str = "xtask/tidy-exceptions.txt";

/// Checks every Rust file against the ceiling and the exceptions against the files.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let exceptions = tree.text(EXCEPTIONS_PATH).unwrap_or_default();
    let entries: Vec<(usize, &str, &str)> = exceptions.lines().enumerate().filter_map(entry).collect();
    let mut findings: Vec<Finding> = entries.iter().filter_map(|entry| check_entry(entry, tree)).collect();
    for (path, text) in tree.texts().filter(|(path, _)| path.ends_with(".rs")) {
        let line_count = text.lines().count();
        if line_count > LINE_LIMIT && !entries.iter().any(|(_, listed, _)| *listed == path) {
            let expected = format!("at most {LINE_LIMIT}: split it, or list it with a reason in {EXCEPTIONS_PATH}");
            findings.push(Finding::new(path, LINE_LIMIT + 1, format!("{line_count} lines"), expected));
        }
    }
    findings
}

/// Line number, path and reason; None for a comment or an empty line.
fn entry((index, line): (usize, &str)) -> Option<(usize, &str, &str)> {
    let line = line.trim();
    let (path, reason) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    (!line.is_empty() && !line.starts_with('#')).then_some((index + 1, path, reason.trim()))
}

fn check_entry((line, path, reason): &(usize, &str, &str), tree: &Tree) -> Option<Finding> {
    let (what, expected) = match tree.text(path).map(|text| text.lines().count()) {
        None => (format!("there is no file `{path}`"), "no entry for it"),
        Some(count) if count <= LINE_LIMIT => {
            (format!("`{path}` has {count} lines"), "no entry for a file below the ceiling")
        }
        Some(_) if reason.is_empty() => (format!("`{path}` has no reason"), "`path reason`"),
        Some(_) => return None,
    };
    Some(Finding::new(EXCEPTIONS_PATH, *line, what, expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(line_count: usize, exceptions: &str) -> Vec<String> {
        let tree = Tree::of(&[("a/long.rs", &"x\n".repeat(line_count)), (EXCEPTIONS_PATH, exceptions)]);
        check(&tree).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn the_ceiling_itself_passes_and_one_line_more_fails() {
        assert_eq!(found(800, ""), Vec::<String>::new());
        assert_eq!(
            found(801, ""),
            ["a/long.rs:801: 801 lines (expected at most 800: split it, or list it with a reason in \
              xtask/tidy-exceptions.txt)"]
        );
    }

    #[test]
    fn a_listed_file_passes_only_with_a_reason() {
        assert_eq!(found(801, "# list\n\na/long.rs one table of tiles\n"), Vec::<String>::new());
        assert_eq!(
            found(801, "a/long.rs\n"),
            ["xtask/tidy-exceptions.txt:1: `a/long.rs` has no reason (expected `path reason`)"]
        );
    }

    #[test]
    fn entries_that_no_longer_apply_fail() {
        assert_eq!(
            found(10, "# list\na/long.rs reason\na/gone.rs reason\n"),
            [
                "xtask/tidy-exceptions.txt:2: `a/long.rs` has 10 lines (expected no entry for a file below the ceiling)",
                "xtask/tidy-exceptions.txt:3: there is no file `a/gone.rs` (expected no entry for it)",
            ]
        );
    }
}
