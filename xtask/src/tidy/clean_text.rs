//! Text that must not be committed: a developer's own paths, package registries, work markers, debugging leftovers.
//!
//! Every text file counts except the licence. Fixtures are other people's words, so work markers may stand in them, but
//! paths and registries may not. What is searched for is put together from pieces, so that this file passes too.

use super::{
    Finding,
    rust_code::{blanked, word_offsets},
    tree::Tree,
};

/// Starts of absolute paths that exist on one machine only.
const HOME_PATHS: [&str; 4] =
    [concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/Us", "ers/"), concat!("/wo", "rk/")];

/// Hosts of package registries and their mirrors; cargo's own index is named in Cargo.lock and is no host.
const REGISTRY_HOSTS: [&str; 8] = [
    concat!("crates", ".io"),
    concat!("pypi", ".org"),
    concat!("pythonhosted", ".org"),
    concat!("npmjs", ".org"),
    concat!("npmjs", ".com"),
    concat!("yarnpkg", ".com"),
    concat!("anaconda", ".org"),
    concat!("rubygems", ".org"),
];

const WORK_MARKERS: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX")];
const DEBUG_MACRO: &str = "dbg!";

/// Checks every line of every text file.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.texts().filter(|(path, _)| *path != "LICENSE") {
        let is_fixture = path.starts_with("fixtures/");
        for (index, line) in text.lines().enumerate() {
            let mut add = |what: String, expected: &str| findings.push(Finding::new(path, index + 1, what, expected));
            if let Some(start) = HOME_PATHS.iter().find(|start| has_absolute(line, start)) {
                add(format!("an absolute path under `{start}`"), "a path relative to the project, or under `~`");
            }
            if let Some(host) = REGISTRY_HOSTS.iter().find(|host| has_host(line, host)) {
                add(format!("the package registry `{host}`"), "none named: tools find theirs by configuration");
            }
            if let Some(marker) = WORK_MARKERS.iter().find(|marker| !is_fixture && has_bare(line, marker)) {
                add(format!("a bare `{marker}`"), "the work done, or an issue named: `(#12)` right behind it");
            }
        }
        if path.ends_with(".rs") {
            for (index, _) in blanked(text).lines().enumerate().filter(|(_, line)| has_debug_macro(line)) {
                findings.push(Finding::new(path, index + 1, format!("`{DEBUG_MACRO}`"), "no debugging leftovers"));
            }
        }
    }
    findings
}

/// Whether `start` opens an absolute path in `line`, rather than standing inside a relative path or a web address.
fn has_absolute(line: &str, start: &str) -> bool {
    let continues = |before: char| before.is_alphanumeric() || "_-.~}".contains(before);
    line.match_indices(start).any(|(at, _)| !line[..at].chars().next_back().is_some_and(continues))
}

fn has_host(line: &str, host: &str) -> bool {
    line.match_indices(host).any(|(at, _)| !line[at + host.len()..].starts_with("-index"))
}

/// Whether `marker` stands in `line` as a word, without an issue in brackets behind it.
fn has_bare(line: &str, marker: &str) -> bool {
    word_offsets(line, marker).any(|at| !line[at + marker.len()..].starts_with("(#"))
}

fn has_debug_macro(code: &str) -> bool {
    code.match_indices(DEBUG_MACRO)
        .any(|(at, _)| !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        check(&Tree::of(&[(path, text)])).iter().map(|finding| format!("{}: {}", finding.line, finding.what)).collect()
    }

    #[test]
    fn absolute_paths_fail_and_relative_ones_pass() {
        for start in HOME_PATHS {
            for line in [format!("see {start}x"), format!("\"{start}\""), format!("file://{start}x"), start.to_owned()]
            {
                let expected = [format!("2: an absolute path under `{start}`")];
                assert_eq!(found("docs/a.md", &format!("first\n{line}\n")), expected, "{line}");
            }
            for line in
                [format!("web.example{start}"), format!("~{start}x"), format!("..{start}x"), format!("{{dir}}{start}")]
            {
                assert_eq!(found("docs/a.md", &line), Vec::<String>::new(), "{line}");
            }
        }
    }

    #[test]
    fn registry_hosts_fail_and_the_lock_file_passes() {
        for host in REGISTRY_HOSTS {
            assert_eq!(
                found("a.toml", &format!("https://files.{host}/x")),
                [format!("1: the package registry `{host}`")]
            );
        }
        let lock = format!("source = \"registry+https://github.com/rust-lang/{}-index\"\n", REGISTRY_HOSTS[0]);
        assert_eq!(found("Cargo.lock", &lock), Vec::<String>::new());
    }

    #[test]
    fn bare_markers_fail_unless_data_or_tied_to_an_issue() {
        for marker in WORK_MARKERS {
            let line = format!("# {marker}: later");
            assert_eq!(found("a.py", &line), [format!("1: a bare `{marker}`")]);
            assert_eq!(found("fixtures/text/words.json", &line), Vec::<String>::new());
            assert_eq!(found("a.py", &format!("# {marker}(#12): later; {marker}S")), Vec::<String>::new());
        }
    }

    #[test]
    fn paths_and_hosts_fail_in_fixtures_too() {
        let text = format!("{}x\n{}\n", HOME_PATHS[0], REGISTRY_HOSTS[1]);
        assert_eq!(found("fixtures/hub/config.json", &text).len(), 2);
        assert_eq!(found("LICENSE", &text), Vec::<String>::new());
    }

    #[test]
    fn the_debug_macro_fails_in_code_only() {
        assert_eq!(found("a.rs", "//! dbg!(x)\nlet y = dbg!(x);\nlet z = \"dbg!(x)\";\nmy_dbg!(x);\n"), ["2: `dbg!`"]);
    }
}
