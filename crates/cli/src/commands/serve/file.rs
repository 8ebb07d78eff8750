//! A file of settings for `serve`: flags by their names.
//!
//! Contract: what the command line or the environment says of a setting is all that counts of it, also where it is a list.

use std::{ffi::OsString, path::Path};

use anyhow::Context as _;
use clap::{Arg, ArgMatches, Command, CommandFactory as _, Parser as _, parser::ValueSource};
use serde_json::Value;

use super::ServeArgs;
use crate::{
    args::{Cli, Command as Given, NetworkArgs},
    failure,
};

/// What no file says: where it is, and what only explains.
const NOT_SETTINGS: [&str; 3] = ["config", "help", "version"];

/// The arguments in force, those of the command line `words` and the file's where neither these nor the environment say
/// anything; and what may leave the machine.
///
/// # Errors
/// When the file cannot be read or has a setting that `serve` has not.
pub(super) fn merged(path: &Path, mut words: Vec<OsString>) -> anyhow::Result<(ServeArgs, NetworkArgs)> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut command = Cli::command();
    command.build();
    let given = command.try_get_matches_from_mut(&words).map_err(refused)?;
    let (Some(serve), Some(given)) = (command.find_subcommand("serve"), given.subcommand_matches("serve")) else {
        return Err(failure::usage("--config is for `serve`"));
    };
    let settings = flags(&text, path, serve, given)?;
    // No argument before the subcommand has a value, so the first such word is it.
    let at = words.iter().position(|word| word == "serve").map_or(words.len(), |at| at + 1);
    words.splice(at..at, settings);
    match Cli::try_parse_from(words).map_err(refused)? {
        Cli { command: Given::Serve(args), network } => Ok((args, network)),
        Cli { .. } => Err(failure::usage("--config is for `serve`")),
    }
}

/// What clap says, without the word that begins every error.
fn refused(error: clap::Error) -> anyhow::Error {
    let message = error.to_string();
    failure::usage(message.strip_prefix("error: ").unwrap_or(&message))
}

/// The file's settings as flags, without those that are `given`.
fn flags(text: &str, path: &Path, serve: &Command, given: &ArgMatches) -> anyhow::Result<Vec<OsString>> {
    let wrong = |what: String| {
        failure::usage(format!(
            "{}: {what}\nhint: {{\"port\": 9000, \"model\": [\"qwen3:4b\"], \"api-key\": [\"...\"]}}",
            path.display()
        ))
    };
    let Ok(Value::Object(settings)) = serde_json::from_str(text) else {
        return Err(wrong("expected a JSON object of settings".to_owned()));
    };
    let is_given = |argument: &Arg| {
        let source = given.value_source(argument.get_id().as_str());
        matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable))
    };
    let (mut flags, mut models) = (Vec::new(), Vec::new());
    for (name, value) in settings {
        let texts = texts(&value).ok_or_else(|| wrong(format!("`{name}` is an object, expected a value or a list")))?;
        let of_name = |argument: &&Arg| match argument.get_long() {
            Some(long) => long == name && !NOT_SETTINGS.contains(&long),
            None => name == "model" && argument.get_id() == "models",
        };
        let known = serve.get_arguments().find(of_name);
        let Some(argument) = known else { return Err(wrong(format!("`serve` has no setting `{name}`"))) };
        if is_given(argument) {
            continue;
        }
        if name == "model" {
            models = texts;
        } else if argument.get_action().takes_values() {
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

    fn merge(text: &str, words: &[&str]) -> Result<(ServeArgs, NetworkArgs), String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serve.json");
        std::fs::write(&path, text).unwrap();
        let words = ["qwenkit"].iter().chain(words).map(OsString::from).collect();
        merged(&path, words).map_err(|error| error.to_string())
    }

    #[test]
    fn the_file_says_what_the_command_line_does_not() {
        let text = r#"{"port": 9000, "host": "127.0.0.2", "api-key": ["a", "b"], "check": true, "model": ["x.gguf"]}"#;
        let (args, network) = merge(text, &["serve", "--port", "9001"]).unwrap();
        assert_eq!((args.port, args.host.as_str(), args.check), (9001, "127.0.0.2", true));
        assert!(!network.is_offline());
        assert_eq!((args.api_key.len(), args.models), (2, vec!["x.gguf".to_owned()]));
        for (text, word) in [
            ("[]", "JSON object"),
            (r#"{"colour": 1}"#, "colour"),
            (r#"{"config": "x"}"#, "config"),
            (r#"{"port": {}}"#, "object"),
            (r#"{"port": "many"}"#, "many"),
            (r#"{"check": 3}"#, "true or false"),
        ] {
            let error = merge(text, &["serve"]).err().unwrap();
            assert!(error.contains(word) && !error.starts_with("error"), "{text}: {error}");
        }
    }

    #[test]
    fn a_list_that_is_given_takes_the_files_place() {
        let text = r#"{"model": ["a.gguf"], "api-key": ["a"], "cors": ["https://a.example"], "adapter": ["a=a"]}"#;
        let words = ["serve", "b.gguf", "--api-key", "b", "--cors", "https://b.example", "--adapter", "b=b"];
        let (args, _) = merge(text, &words).unwrap();
        assert_eq!((args.models, args.api_key), (vec!["b.gguf".to_owned()], vec!["b".to_owned()]));
        assert_eq!((args.cors, args.adapter.len()), (vec!["https://b.example".to_owned()], 1));
    }

    #[test]
    fn flags_of_the_whole_program_go_with_a_file() {
        for words in [&["serve", "--offline"][..], &["--offline", "serve"], &["serve", "--offline", "--", "b.gguf"]] {
            let (args, network) = merge(r#"{"port": 9000}"#, words).unwrap();
            assert_eq!((args.port, network.is_offline(), network.air_gap), (9000, true, false), "{words:?}");
        }
        assert!(merge(r#"{"offline": true}"#, &["serve"]).unwrap().1.is_offline());
        let (_, network) = merge(r#"{"air-gap": true}"#, &["serve"]).unwrap();
        assert!(network.air_gap && network.is_offline());
    }

    #[test]
    fn every_setting_has_a_variable() {
        let command = Cli::command();
        let serve = command.find_subcommand("serve").unwrap();
        let without = ["check", "verify-audit-log"];
        for argument in serve.get_arguments() {
            let expected = match argument.get_long() {
                Some(long) if without.contains(&long) => continue,
                None => "QWENKIT_MODEL".to_owned(),
                Some("config") => "QWENKIT_SERVE_CONFIG".to_owned(),
                Some(long) => format!("QWENKIT_{}", long.replace('-', "_").to_uppercase()),
            };
            assert_eq!(argument.get_env().map(|name| name.to_string_lossy().into_owned()), Some(expected));
        }
        assert!(serve.get_arguments().count() > 25);
    }
}
