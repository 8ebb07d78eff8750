//! `qwenkit template render`: conversations to prompts, through a chat template in a file.
//!
//! Contract: a template that refuses a conversation has answered, with an error as its answer; only input that is no
//! conversation makes the command fail.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use qwenkit_text::{ChatInput, ChatTemplate, Error};
use serde_json::{Map, Value, json};

use crate::{jsonl, terminal};

/// Arguments of `template`.
#[derive(Args)]
pub(crate) struct TemplateArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Render conversations, one a line
    Render(RenderArgs),
}

/// Arguments of `template render`.
#[derive(Args)]
#[command(after_help = "\
Example:
  echo '{\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}]}' | qwenkit template render --template chat.jinja --jsonl

A line holds messages, and may hold tools, add_generation_prompt (true unless given) and kwargs, an object of further
variables. Each line gives {\"text\": ...}, or {\"error\": ...} where it cannot be used or the template refuses it.")]
struct RenderArgs {
    /// The template
    #[arg(long, value_name = "FILE")]
    template: PathBuf,
    /// JSON lines in, JSON lines out; the only form there is
    #[arg(long, required = true)]
    jsonl: bool,
}

/// The longest template; real ones are below 20 KB.
const TEMPLATE_BYTES_MAX: u64 = 4 << 20;

/// Runs the command.
pub(crate) fn run(args: &TemplateArgs) -> anyhow::Result<()> {
    let Action::Render(args) = &args.action;
    let template = ChatTemplate::new(&read(&args.template)?, &args.template.display().to_string())?;
    let mut noted = false;
    jsonl::answer_lines(|number, object| {
        let input = chat_input(object, |key| {
            if !std::mem::replace(&mut noted, true) {
                terminal::note(&format!(
                    "note: line {number} has `{key}`, which nothing reads; variables go into kwargs"
                ));
            }
        })?;
        match template.render(&input) {
            Ok(text) => Ok(json!({ "text": text })),
            Err(error @ Error::ChatInput { .. }) => Err(error.to_string()),
            Err(error) => Ok(json!({ "error": error.to_string() })),
        }
    })
}

fn chat_input(mut object: Map<String, Value>, mut unread: impl FnMut(&str)) -> Result<ChatInput, String> {
    let messages = object.remove("messages").ok_or("found no `messages`, expected an array of messages")?;
    let tools = object.remove("tools").filter(|tools| !tools.is_null());
    let add_generation_prompt = match object.remove("add_generation_prompt") {
        None | Some(Value::Null) => true,
        Some(Value::Bool(value)) => value,
        Some(_) => return Err("`add_generation_prompt` is neither true nor false".to_owned()),
    };
    let kwargs = match object.remove("kwargs") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(kwargs)) => kwargs,
        Some(_) => return Err("`kwargs` is no object".to_owned()),
    };
    object.keys().for_each(|key| unread(key));
    Ok(ChatInput { messages, tools, add_generation_prompt, kwargs, ..ChatInput::default() })
}

fn read(path: &Path) -> anyhow::Result<String> {
    let shown = path.display();
    let failed = |error: std::io::Error| anyhow::anyhow!("cannot read `{shown}`: {error}");
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > TEMPLATE_BYTES_MAX {
        anyhow::bail!("`{shown}` is {size} bytes, expected a chat template of at most {TEMPLATE_BYTES_MAX}");
    }
    let bytes = std::fs::read(path).map_err(failed)?;
    String::from_utf8(bytes).map_err(|_| anyhow::anyhow!("`{shown}` is not text: found bytes that are not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (Result<ChatInput, String>, Vec<String>) {
        let Ok(Value::Object(object)) = serde_json::from_str(text) else { panic!("{text} is no object") };
        let mut unread = Vec::new();
        (chat_input(object, |key| unread.push(key.to_owned())), unread)
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let (input, unread) = parse(r#"{"messages":[],"tools":null}"#);
        let input = input.expect("a conversation");
        assert!(input.add_generation_prompt && input.tools.is_none() && input.kwargs.is_empty() && unread.is_empty());
        let (input, unread) = parse(r#"{"messages":[],"add_generation_prompt":false,"kwargs":{"a":1},"odd":2}"#);
        let input = input.expect("a conversation");
        assert!(!input.add_generation_prompt && input.kwargs["a"] == 1);
        assert_eq!(unread, ["odd"]);
    }

    #[test]
    fn values_of_another_kind_are_refused() {
        for bad in [r#"{}"#, r#"{"messages":[],"kwargs":[]}"#, r#"{"messages":[],"add_generation_prompt":"no"}"#] {
            assert!(parse(bad).0.is_err(), "{bad}");
        }
    }
}
