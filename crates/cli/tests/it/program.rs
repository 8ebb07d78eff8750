//! Runs the binary in a place of its own and gathers what it did.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A home without models, without network, without the caches of whoever runs the tests.
pub(crate) struct Place {
    folder: TempDir,
}

/// What a run did.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Place {
    pub(crate) fn new() -> Place {
        Place { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    /// A path in this place.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where the store keeps models.
    pub(crate) fn models(&self) -> PathBuf {
        self.path("home").join("models")
    }

    /// The program, about to run here.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qwenkit"));
        command.args(args).current_dir(self.folder.path());
        command.env("QWENKIT_HOME", self.path("home")).env("HF_HOME", self.path("hugging-face"));
        command.env_remove("HF_HUB_CACHE").env_remove("HUGGINGFACE_HUB_CACHE").env("HF_HUB_OFFLINE", "1");
        command
    }

    /// Runs the program with nothing on stdin.
    pub(crate) fn run(&self, args: &[&str]) -> Outcome {
        self.run_with(args, b"")
    }

    /// Runs the program with `input` on stdin.
    pub(crate) fn run_with(&self, args: &[&str], input: &[u8]) -> Outcome {
        let mut command = self.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary starts");
        let mut stdin = child.stdin.take().expect("stdin is a pipe");
        let output = std::thread::scope(|scope| {
            scope.spawn(move || {
                // A program that fails early does not read all of it.
                let _ = stdin.write_all(input);
            });
            child.wait_with_output().expect("the binary ends")
        });
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is text");
        let outcome = Outcome { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) };
        assert!(!outcome.err.contains("panicked"), "{args:?} panicked: {}", outcome.err);
        outcome
    }
}

impl Outcome {
    /// The outcome, having exited with `code`.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Outcome {
        assert_eq!(self.code, Some(code), "{self:?}");
        self
    }

    /// The outcome, having failed with exactly one `error:` line that holds every one of `parts`.
    #[track_caller]
    pub(crate) fn fails_with(self, code: i32, parts: &[&str]) -> Outcome {
        let outcome = self.exits(code);
        let errors: Vec<&str> = outcome.err.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{outcome:?}");
        for part in parts {
            assert!(outcome.err.contains(part), "`{part}` is not in: {}", outcome.err);
        }
        outcome
    }

    /// Stdout as one JSON value.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Stdout as a JSON value a line.
    #[track_caller]
    pub(crate) fn json_lines(&self) -> Vec<Value> {
        let value = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        self.out.lines().map(value).collect()
    }
}

/// A file or folder of the project's fixtures.
pub(crate) fn fixture(name: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    let path = root.join(name);
    assert!(path.exists(), "no fixture {}", path.display());
    path.to_str().expect("a plain path").to_owned()
}

/// Every model that has recorded answers: its path, and the folder of its record.
pub(crate) fn parity_models() -> Vec<(String, String)> {
    let mut models = Vec::new();
    for name in ["qwen2", "qwen2-tied", "qwen2-sliding", "qwen2-yarn", "qwen3"] {
        models.push((fixture(&format!("parity/{name}")), fixture(&format!("parity/{name}"))));
    }
    for name in ["qwen2", "qwen3"] {
        models.push((fixture(&format!("parity/{name}/model.gguf")), fixture(&format!("parity/{name}"))));
    }
    models
}

/// Ids as `--ids` takes them.
pub(crate) fn list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}
