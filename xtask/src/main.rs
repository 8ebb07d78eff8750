//! `cargo xtask`: the project's own chores, written in Rust so that they run wherever the project builds.
//!
//! Exit codes are those of the product: 0 done, 1 failed (findings included), 2 wrong usage. Nothing of the product is
//! here, and no crate of the product may depend on it.
#![forbid(unsafe_code)]

mod tidy;

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
};

const USAGE: &str = "\
usage: cargo xtask COMMAND

commands:
  tidy [ROOT]   check the house rules no compiler checks: floors, file sizes, names, heads, unsafe, clean text
                (ROOT: another checkout; without it, the workspace around the current folder)";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments[..] {
        [] | ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        ["tidy"] => workspace_root().and_then(|root| tidy(&root)),
        ["tidy", root] if !root.starts_with('-') => tidy(Path::new(root)),
        _ => {
            eprintln!("xtask: no such command: `{}`\n{USAGE}", arguments.join(" "));
            return ExitCode::from(2);
        }
    };
    outcome.unwrap_or_else(|message| {
        eprintln!("xtask: {message}");
        ExitCode::FAILURE
    })
}

/// Prints every finding and the closing count; findings are a failure.
fn tidy(root: &Path) -> Result<ExitCode, String> {
    let report = tidy::check(root)?;
    for finding in &report.findings {
        println!("{finding}");
    }
    let (findings, files) = (report.findings.len(), report.file_count);
    println!("tidy: {findings} finding{} in {files} files", if findings == 1 { "" } else { "s" });
    Ok(if findings == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The nearest folder, from the current one upwards, whose Cargo.toml declares a workspace.
fn workspace_root() -> Result<PathBuf, String> {
    let start = env::current_dir().map_err(|error| format!("cannot tell the current folder: {error}"))?;
    let declares_workspace = |folder: &&Path| {
        std::fs::read_to_string(folder.join("Cargo.toml"))
            .is_ok_and(|manifest| manifest.lines().any(|line| line.trim() == "[workspace]"))
    };
    start.ancestors().find(declares_workspace).map(Path::to_path_buf).ok_or_else(|| {
        format!(
            "found no Cargo.toml with [workspace] in {} or above it\nhint: run it inside the checkout, or name it: \
             cargo xtask tidy ROOT",
            start.display()
        )
    })
}
