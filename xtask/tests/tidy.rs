//! `cargo xtask tidy` as a developer runs it: over this checkout, which must be tidy, and over a small one that is not.
//!
//! This test makes tidy a part of `cargo test --workspace`. The rules themselves are tested beside their code.

use std::{
    fs, io,
    path::Path,
    process::{Command, Output},
};

/// Runs the tool with `arguments`, on its own: nothing of a git hook's surroundings reaches it.
fn xtask(arguments: &[&str]) -> io::Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        command.env_remove(variable);
    }
    command.args(arguments).output()
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

#[test]
fn findings_of_every_rule_are_printed_and_fail() -> io::Result<()> {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("untidy");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    let package = |name: &str| format!("[package]\nname = \"{name}\"\nversion = \"0.0.0\"\nedition = \"2024\"\n");
    let long = format!("//! Long.\n#![forbid(unsafe_code)]\n{}", "// one more line\n".repeat(800));
    let lib = "//! Lib.\nmod utils;\npub fn f() {\n    dbg!(1);\n}\n".to_owned();
    for (path, text) in [
        ("Cargo.toml", "[workspace]\nresolver = \"3\"\nmembers = [\"crates/*\"]\n".to_owned()),
        (
            "crates/tensor/Cargo.toml",
            package("qwenkit-tensor") + "[dependencies]\nqwenkit-hub = { path = \"../hub\" }\n",
        ),
        ("crates/tensor/src/lib.rs", "//! Tensor.\npub fn f() {\n    unsafe {}\n}\n".to_owned()),
        ("crates/hub/Cargo.toml", package("qwenkit-hub")),
        ("crates/hub/src/lib.rs", lib),
        ("crates/hub/src/utils.rs", "fn g() {}\n".to_owned()),
        ("crates/attic/Cargo.toml", package("qwenkit-attic")),
        ("crates/attic/src/lib.rs", long),
        ("target/ignored.rs", "fn h() {}\n".to_owned()),
    ] {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap_or(&root))?;
        fs::write(path, text)?;
    }
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
