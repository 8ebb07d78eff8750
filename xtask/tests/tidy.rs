//! `cargo xtask tidy` as a developer runs it: over this checkout, which must be tidy, and over a small one that is not.
//!
//! This test makes tidy a part of `cargo test --workspace`. The rules themselves are tested beside their code.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Runs the tool with `arguments`.
fn xtask(arguments: &[&str]) -> io::Result<Output> {
    without_git_variables(&mut Command::new(env!("CARGO_BIN_EXE_xtask"))).args(arguments).output()
}

/// Inside a git hook these variables name the hook's repository, whatever folder git is pointed at.
fn without_git_variables(command: &mut Command) -> &mut Command {
    command.env_remove("GIT_DIR").env_remove("GIT_WORK_TREE").env_remove("GIT_INDEX_FILE")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn this_checkout_is_tidy() -> io::Result<()> {
    let output = xtask(&["tidy"])?;
    assert!(output.status.success(), "\n{}{}", stdout(&output), stderr(&output));
    assert!(stdout(&output).starts_with("tidy: 0 findings in "), "{}", stdout(&output));
    Ok(())
}

/// Writes a made-up checkout of these files, with a workspace manifest for `crates/*`, and says where it is.
fn checkout(name: &str, files: &[(&str, &str)]) -> io::Result<PathBuf> {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    let workspace = ("Cargo.toml", "[workspace]\nresolver = \"3\"\nmembers = [\"crates/*\"]\n");
    for (path, text) in [&[workspace], files].concat() {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap_or(&root))?;
        fs::write(path, text)?;
    }
    Ok(root)
}

fn package(name: &str) -> String {
    format!("[package]\nname = \"{name}\"\nversion = \"0.0.0\"\nedition = \"2024\"\n")
}

#[test]
fn findings_of_every_rule_are_printed_and_fail() -> io::Result<()> {
    let long = format!("//! Long.\n#![forbid(unsafe_code)]\n{}", "// one more line\n".repeat(800));
    let tensor = package("qwenkit-tensor") + "[dependencies]\nqwenkit-hub = { path = \"../hub\" }\n";
    let files = [
        ("crates/tensor/Cargo.toml", tensor.as_str()),
        ("crates/tensor/src/lib.rs", "//! Tensor.\npub fn f() {\n    unsafe {}\n}\n"),
        ("crates/hub/Cargo.toml", &package("qwenkit-hub")),
        ("crates/hub/src/lib.rs", "//! Lib.\nmod utils;\npub fn f() {\n    dbg!(1);\n}\n"),
        ("crates/hub/src/utils.rs", "fn g() {}\n"),
        ("crates/attic/Cargo.toml", &package("qwenkit-attic")),
        ("crates/attic/src/lib.rs", &long),
        ("target/ignored.rs", "fn h() {}\n"),
    ];
    let root = checkout("untidy", &files)?;
    let output = xtask(&["tidy", &root.to_string_lossy()])?;
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let expected = [
        "crates/attic/Cargo.toml:1: the crate `qwenkit-attic` in `crates/attic` has no floor",
        "crates/attic/src/lib.rs:801: 802 lines",
        "crates/hub/src/lib.rs:1: a crate root that allows unsafe code",
        "crates/hub/src/lib.rs:2: a module named `utils`",
        "crates/hub/src/lib.rs:4: `dbg!`",
        "crates/hub/src/utils.rs:1: a file or folder named `utils`",
        "crates/hub/src/utils.rs:1: the file has no head",
        "crates/tensor/Cargo.toml:6: `qwenkit-tensor` (floor 0) depends on `qwenkit-hub` (floor 1)",
        "crates/tensor/src/lib.rs:3: `unsafe` without a reason",
        "tidy: 9 findings in 8 files",
    ];
    let printed = stdout(&output);
    let shortened: Vec<&str> = printed.lines().map(|line| line.split(" (expected ").next().unwrap_or(line)).collect();
    assert_eq!(shortened, expected, "{printed}");
    Ok(())
}

#[test]
fn what_git_does_not_track_is_not_judged() -> io::Result<()> {
    let files = [
        ("crates/hub/Cargo.toml", package("qwenkit-hub")),
        ("crates/hub/src/lib.rs", "//! Lib.\n#![forbid(unsafe_code)]\n".to_owned()),
        ("notes.rs", "no head\n".to_owned()),
    ];
    let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (*path, text.as_str())).collect();
    let root = checkout("tracked", &files)?;
    let before = xtask(&["tidy", &root.to_string_lossy()])?;
    assert!(stdout(&before).ends_with("tidy: 1 finding in 4 files\n"), "{}{}", stdout(&before), stderr(&before));
    for arguments in [&["init", "--quiet"][..], &["add", "Cargo.toml", "crates"]] {
        let mut git = Command::new("git");
        let output = without_git_variables(&mut git).arg("-C").arg(&root).args(arguments).output()?;
        assert!(output.status.success(), "git {arguments:?}: {}", stderr(&output));
    }
    let after = xtask(&["tidy", &root.to_string_lossy()])?;
    assert_eq!(stdout(&after), "tidy: 0 findings in 3 files\n", "{}", stderr(&after));
    assert!(after.status.success());
    Ok(())
}

#[test]
fn without_a_command_it_says_what_there_is() -> io::Result<()> {
    let output = xtask(&[])?;
    assert!(output.status.success() && stdout(&output).contains("tidy [ROOT]"), "{}", stdout(&output));
    Ok(())
}

#[test]
fn wrong_usage_exits_with_two() -> io::Result<()> {
    for arguments in [&["tydi"][..], &["tidy", "--fix"], &["tidy", "a", "b"]] {
        let output = xtask(arguments)?;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains(&arguments.join(" ")), "{}", stderr(&output));
    }
    Ok(())
}

#[test]
fn a_folder_with_nothing_to_check_is_an_error_rather_than_a_pass() -> io::Result<()> {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("empty");
    fs::create_dir_all(&root)?;
    let output = xtask(&["tidy", &root.to_string_lossy()])?;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cargo metadata failed"), "{}", stderr(&output));
    Ok(())
}
