//! `unsafe` lives in two crates, and says there why it is sound.
//!
//! Every other crate forbids it at its roots and uses it nowhere, tests included. In the two, each `unsafe` block, impl
//! and attribute stands right below a `SAFETY:` comment and each `unsafe fn` below its conditions; conditions that all
//! inner functions of a file share may stand once in its head, under `# Safety`. Whether the words are true is for
//! review; clippy looks closer at some of the same places.

use super::{
    Finding,
    rust_code::{line_of, word_offsets},
    tree::{RustFile, Tree},
    workspace::Crate,
};

/// Folders of the crates that may use `unsafe`.
const ALLOWED: [&str; 2] = ["crates/tensor", "crates/kernels"];
const FORBID: &str = "#![forbid(unsafe_code)]";
/// How many lines above an `unsafe` its comment may end.
const REACH_LINES: usize = 4;

/// Checks crate roots and every use of `unsafe`.
pub(super) fn check(crates: &[Crate], tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.rust_files() {
        let is_root = crates.iter().any(|member| member.roots.iter().any(|root| root == file.path));
        let allowed =
            ALLOWED.iter().any(|folder| file.path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/')));
        if is_root && !allowed && !file.code.contains(FORBID) {
            findings.push(Finding::new(file.path, 1, "a crate root that allows unsafe code", format!("`{FORBID}`")));
        }
        let lines = Lines::of(&file);
        for offset in word_offsets(&file.code, "unsafe") {
            let line = line_of(&file.code, offset);
            let found = match allowed {
                false => Some(("`unsafe`", "none outside tensor and kernels")),
                true => undocumented(&file.code[offset..], line, &lines),
            };
            findings.extend(found.map(|(what, expected)| Finding::new(file.path, line, what, expected)));
        }
    }
    findings
}

/// What an `unsafe` (where `code` starts) lacks, if anything.
fn undocumented(code: &str, line: usize, lines: &Lines) -> Option<(&'static str, &'static str)> {
    let rest = code["unsafe".len()..].trim_start();
    let mut words = rest.split_whitespace().skip_while(|word| *word == "extern");
    // A function pointer type promises nothing by itself: `unsafe fn(`.
    let next = words.next().unwrap_or_default();
    if next.starts_with("fn(") {
        return None;
    }
    if next == "fn" && lines.is_in_trait_impl(line) {
        // Its conditions are the trait's, and stand there.
        return None;
    }
    if next == "fn" || next == "trait" {
        let is_public = lines.code.get(line - 1).is_some_and(|line| line.trim_start().starts_with("pub "));
        let above = lines.item_above(line);
        return match is_public {
            _ if above.contains("# Safety") => None,
            true => Some(("a public `unsafe` item without conditions", "`# Safety` in its docs")),
            false if above.contains("SAFETY") || lines.head_has_conditions() => None,
            false => Some(("an `unsafe` item without conditions", "`# Safety` in its docs or in the file's head")),
        };
    }
    let is_noted = lines.near(line).contains("SAFETY:") || lines.item_above(line).contains("SAFETY:");
    (!is_noted).then_some(("`unsafe` without a reason", "a `SAFETY:` comment right above it"))
}

/// The lines of a file in both views.
struct Lines<'a> {
    raw: Vec<&'a str>,
    code: Vec<&'a str>,
}

impl<'a> Lines<'a> {
    fn of(file: &'a RustFile<'a>) -> Lines<'a> {
        Lines { raw: file.text.lines().collect(), code: file.code.lines().collect() }
    }

    /// Line `line` (from 1) and the few above it that a comment may stand in.
    fn near(&self, line: usize) -> String {
        self.raw[line.saturating_sub(1 + REACH_LINES)..line].join("\n")
    }

    /// Everything between the end of the statement or item before and line `line`: comments, docs, attributes, and the
    /// start of the statement when it spans lines.
    fn item_above(&self, line: usize) -> String {
        let ends_another = |code: &&str| code.trim_end().ends_with([';', '{', '}']);
        let height = self.code[..line - 1].iter().rev().take_while(|code| !ends_another(code)).count();
        self.raw[line - 1 - height..line - 1].join("\n")
    }

    /// Whether line `line` is a member of an `impl Trait for Type`, going by the indentation rustfmt gives.
    fn is_in_trait_impl(&self, line: usize) -> bool {
        let indent = |code: &str| code.len() - code.trim_start().len();
        let own = indent(self.code[line - 1]);
        let mut above = self.code[..line - 1].iter().rev().filter(|code| !code.trim().is_empty());
        above.find(|code| indent(code) < own).is_some_and(|code| {
            let code = code.trim_start();
            (code.starts_with("impl") || code.starts_with("unsafe impl")) && code.contains(" for ")
        })
    }

    /// Whether the file's head states conditions for the functions in it.
    fn head_has_conditions(&self) -> bool {
        self.raw.iter().take_while(|line| line.starts_with("//!")).any(|line| line.contains("# Safety"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found_in(path: &str, text: &str) -> Vec<String> {
        let root = Crate {
            name: String::new(),
            folder: String::new(),
            dependencies: Vec::new(),
            roots: ["crates/hub/src/lib.rs", "crates/kernels/src/lib.rs"].map(str::to_owned).to_vec(),
        };
        let found = check(&[root], &Tree::of(&[(path, text)]));
        found.iter().map(|finding| format!("{}: {}", finding.line, finding.what)).collect()
    }

    fn kernels(text: &str) -> Vec<String> {
        found_in("crates/kernels/src/dot.rs", text)
    }

    #[test]
    fn roots_outside_the_two_crates_must_forbid() {
        assert_eq!(found_in("crates/hub/src/lib.rs", "//! H\n#![forbid(unsafe_code)]\n"), Vec::<String>::new());
        let missing = ["1: a crate root that allows unsafe code"];
        assert_eq!(found_in("crates/hub/src/lib.rs", "//! H\n"), missing);
        assert_eq!(found_in("crates/hub/src/lib.rs", "//! #![forbid(unsafe_code)]\n"), missing);
        assert_eq!(found_in("crates/kernels/src/lib.rs", "//! K\n"), Vec::<String>::new());
        assert_eq!(found_in("crates/hub/src/store.rs", "//! not a root\n"), Vec::<String>::new());
    }

    #[test]
    fn no_unsafe_elsewhere_whatever_its_comment() {
        let text = "//! T\n// SAFETY: really\nunsafe { f() }\n";
        assert_eq!(found_in("crates/hub/tests/a.rs", text), ["3: `unsafe`"]);
        assert_eq!(found_in("crates/kernelsmith/src/a.rs", text), ["3: `unsafe`"]);
        assert_eq!(found_in("crates/hub/src/a.rs", "//! no unsafe here\n"), Vec::<String>::new());
    }

    #[test]
    fn blocks_need_a_comment_above() {
        for good in [
            "// SAFETY: a\nunsafe { f() }",
            "// SAFETY: a\n// b\n// c\n// d\n// e\n// f\nlet x =\n    unsafe { f() };",
            "// SAFETY: a\nunsafe impl Send for A {}",
            "let x = unsafe { f() }; // SAFETY: a",
            "// SAFETY: a\n#[unsafe(no_mangle)]\nfn f() {}",
            "// SAFETY: a\nunsafe extern \"C\" {\n}",
        ] {
            assert_eq!(kernels(good), Vec::<String>::new(), "{good}");
        }
        for (bad, line) in [
            ("f();\nunsafe { f() }", 2),
            ("// safety: a\nunsafe { f() }", 2),
            ("// SAFETY: a\na();\nb();\nc();\nd();\nunsafe { f() }", 6),
            ("unsafe impl Send for A {}", 1),
            ("#[unsafe(no_mangle)]\nfn f() {}", 1),
            ("unsafe extern \"C\" {\n}", 1),
        ] {
            assert_eq!(kernels(bad), [format!("{line}: `unsafe` without a reason")], "{bad}");
        }
    }

    #[test]
    fn functions_need_their_conditions() {
        for good in [
            "/// F.\n///\n/// # Safety\n/// AVX2.\n#[target_feature(enable = \"avx2\")]\npub unsafe fn f() {}",
            "// SAFETY: callers check the length\nunsafe fn f() {}",
            "/// # Safety\n/// a\npub(crate) unsafe extern \"C\" fn f() {}",
            "impl Plain for F32 {\n    const STEP: usize = 1;\n\n    #[inline]\n    unsafe fn load() {}\n}",
            "struct Table {\n    dot: unsafe fn(&[f32]),\n}",
        ] {
            assert_eq!(kernels(good), Vec::<String>::new(), "{good}");
        }
        assert_eq!(
            kernels("// SAFETY: a\npub unsafe fn f() {}\n\nunsafe fn g() {}\n"),
            ["2: a public `unsafe` item without conditions", "4: an `unsafe` item without conditions"]
        );
        assert_eq!(
            kernels("//! # Safety\n//! AVX2.\n\nunsafe fn g() {}\n\npub unsafe fn f() {}\n"),
            ["6: a public `unsafe` item without conditions"]
        );
        let own_method = kernels("impl F32 {\n    unsafe fn load() {}\n}");
        assert_eq!(own_method, ["2: an `unsafe` item without conditions"]);
        assert_eq!(kernels("pub unsafe trait T {}"), ["1: a public `unsafe` item without conditions"]);
    }
}
