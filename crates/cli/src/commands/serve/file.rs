//! A file of settings for `serve`: flags by their names. The command line and the environment come before it.

use std::{ffi::OsString, path::Path};

use anyhow::Context as _;
use clap::{Args, Command, FromArgMatches};
use serde_json::Value;

use super::ServeArgs;
use crate::failure;

/// The arguments in force: those given, and the file's where neither command line nor environment says anything.
///
/// # Errors
/// When the file cannot be read or has a setting that `serve` has not.
pub(super) fn merged(path: &Path, given: impl Iterator<Item = OsString>) -> anyhow::Result<ServeArgs> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let command = ServeArgs::augment_args(Command::new("serve").args_override_self(true));
    let mut words = vec![OsString::from("serve")];
    words.extend(flags(&text, path, &command)?);
    words.extend(given);
    let mut matches = command.try_get_matches_from(words).map_err(|error| failure::usage(error.to_string()))?;
    ServeArgs::from_arg_matches_mut(&mut matches).map_err(|error| failure::usage(error.to_string()))
}

/// The file's settings as flags.
fn flags(text: &str, path: &Path, command: &Command) -> anyhow::Result<Vec<OsString>> {
    let wrong = |what: String| {
        failure::usage(format!(
            "{}: {what}\nhint: {{\"port\": 9000, \"model\": [\"qwen3:4b\"], \"api-key\": [\"...\"]}}",
            path.display()
        ))
    };
    let Ok(Value::Object(settings)) = serde_json::from_str(text) else {
        return Err(wrong("expected a JSON object of settings".to_owned()));
    };
    let (mut flags, mut models) = (Vec::new(), Vec::new());
    for (name, value) in settings {
        let texts = texts(&value).ok_or_else(|| wrong(format!("`{name}` is an object, expected a value or a list")))?;
        if name == "model" {
            models = texts;
            continue;
        }
        let known =
            command.get_arguments().find(|argument| argument.get_long() == Some(name.as_str()) && name != "config");
        let Some(argument) = known else { return Err(wrong(format!("`serve` has no setting `{name}`"))) };
        if argument.get_env().is_some_and(|variable| std::env::var_os(variable).is_some()) {
            continue;
        }
        if argument.get_action().takes_values() {
            flags.extend(texts.iter().map(|text| OsString::from(format!("--{name}={text}"))));
        } else if texts == ["true"] {
            flags.push(OsString::from(format!("--{name}")));
        } else if texts != ["false"] {
            return Err(wrong(format!("`{name}` is {value}, expected true or false")));
        }
    }
    flags.extend(models.into_iter().map(OsString::from));
    Ok(flags)
}

fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Null => Some(Vec::new()),
        Value::Object(_) => None,
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(list) => {
            list.iter().map(|value| texts(value).filter(|t| t.len() == 1).map(|mut t| t.remove(0))).collect()
        }
        other => Some(vec![other.to_string()]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(text: &str, given: &[&str]) -> Result<ServeArgs, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serve.json");
        std::fs::write(&path, text).unwrap();
        merged(&path, given.iter().map(OsString::from)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_file_says_what_the_command_line_does_not() {
        let text = r#"{"port": 9000, "host": "127.0.0.2", "api-key": ["a", "b"], "check": true, "model": ["x.gguf"]}"#;
        let args = serve(text, &["--port", "9001"]).unwrap();
        assert_eq!((args.port, args.host.as_str(), args.check), (9001, "127.0.0.2", true));
        assert_eq!((args.api_key.len(), args.models), (2, vec!["x.gguf".to_owned()]));
        for (text, word) in [
            ("[]", "JSON object"),
            (r#"{"colour": 1}"#, "colour"),
            (r#"{"port": {}}"#, "object"),
            (r#"{"port": "many"}"#, "many"),
            (r#"{"check": 3}"#, "true or false"),
        ] {
            let error = serve(text, &[]).err().unwrap();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
