//! `qwenkit template`: conversations to prompts, through a chat template in a file (`render`), and whether a template does
//! what conversations need (`check`).
//!
//! Contract: a template that refuses a conversation has answered, with an error as its answer; what makes `render` fail is
//! input that is no conversation, and `check` a template that breaks.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use qwenkit_text::{CallSyntax, ChatInput, ChatTemplate, Error, ThinkingSupport};
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
    /// Say what a template does with conversations of every kind, and where it breaks
    Check(CheckArgs),
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

/// Arguments of `template check`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit template check chat.jinja
  qwenkit template check ./checkpoint/chat_template.jinja --json

A conversation of each kind is rendered. `ok` stands for a prompt, `refused` for a template that says by itself that it does not
take this; a template that breaks is told with line and column, and the exit code is 1.")]
struct CheckArgs {
    /// The template
    #[arg(value_name = "FILE")]
    template: PathBuf,
    /// A JSON object instead of lines
    #[arg(long)]
    json: bool,
}

/// The longest template; real ones are below 20 KB.
const TEMPLATE_BYTES_MAX: u64 = 4 << 20;

/// Runs the command.
pub(crate) fn run(args: &TemplateArgs) -> anyhow::Result<()> {
    match &args.action {
        Action::Render(args) => render(args),
        Action::Check(args) => check(args),
    }
}

fn render(args: &RenderArgs) -> anyhow::Result<()> {
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

/// What came of a conversation.
enum Found {
    Prompt,
    /// The template's own words.
    Refused(String),
    Broken(String),
}

fn check(args: &CheckArgs) -> anyhow::Result<()> {
    let template = ChatTemplate::new(&read(&args.template)?, &args.template.display().to_string())?;
    let thinking = ThinkingSupport::of_template(&template);
    let calls = CallSyntax::of_template(&template).is_some();
    let mut found = Vec::new();
    for (kind, input) in conversations() {
        found.push((
            kind,
            match template.render(&input) {
                Ok(_) => Found::Prompt,
                Err(Error::TemplateRaised { message }) => Found::Refused(message),
                Err(error) => Found::Broken(error.to_string()),
            },
        ));
    }
    let broken = found.iter().filter(|(_, found)| matches!(found, Found::Broken(_))).count();
    if args.json {
        let told = |(kind, found): &(&str, Found)| {
            let told = match found {
                Found::Prompt => json!({ "result": "ok" }),
                Found::Refused(message) => json!({ "result": "refused", "message": message }),
                Found::Broken(message) => json!({ "result": "broken", "message": message }),
            };
            ((*kind).to_owned(), told)
        };
        let conversations: Map<String, Value> = found.iter().map(told).collect();
        let object = json!({
            "conversations": conversations, "thinks": thinking.thinks, "thinking_switch": thinking.has_switch, "tool_calls": calls
        });
        terminal::print_json(&object)?;
    } else {
        let yes = |known: bool| if known { "yes" } else { "no" };
        let mut text = String::new();
        for (kind, found) in &found {
            text += &match found {
                Found::Prompt => format!("{kind:24} ok\n"),
                Found::Refused(message) => format!("{kind:24} refused: {message}\n"),
                Found::Broken(message) => format!("{kind:24} BROKEN: {message}\n"),
            };
        }
        text += &format!("{:24} {}\n", "knows thoughts", yes(thinking.thinks));
        text += &format!("{:24} {}\n", "can switch them off", yes(thinking.has_switch));
        text += &format!("{:24} {}\n", "knows tool calls", yes(calls));
        terminal::print_foreign(&text)?;
    }
    match broken {
        0 => Ok(()),
        _ => anyhow::bail!(
            "the template breaks on {broken} of {} kinds of conversations\nhint: use the one that was published with the model",
            found.len()
        ),
    }
}

/// A conversation of each kind that servers get.
fn conversations() -> Vec<(&'static str, ChatInput)> {
    let system = json!({ "role": "system", "content": "Be brief." });
    let user = json!({ "role": "user", "content": "What is the weather in Oslo?" });
    let answer = json!({ "role": "assistant", "content": "Cold." });
    let thought = json!({ "role": "assistant", "content": "Cold.", "reasoning_content": "It is winter." });
    let function = json!({ "name": "weather", "arguments": { "city": "Oslo", "days": 2 } });
    let call =
        json!({ "role": "assistant", "content": "", "tool_calls": [{ "type": "function", "function": function }] });
    let result = json!({ "role": "tool", "content": "{\"degrees\": -3}" });
    let parameters = json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
    let tool = json!({ "type": "function", "function": { "name": "weather", "description": "Looks.", "parameters": parameters } });
    let input = |messages: Vec<&Value>| ChatInput {
        messages: messages.into_iter().cloned().collect(),
        add_generation_prompt: true,
        ..ChatInput::default()
    };
    let with_tools = |messages| ChatInput { tools: Some(json!([tool])), ..input(messages) };
    let thinks = |on: bool| Map::from_iter([("enable_thinking".to_owned(), json!(on))]);
    let question = input(vec![&user]);
    vec![
        ("a question", question.clone()),
        ("a system's words", input(vec![&system, &user])),
        ("several turns", input(vec![&system, &user, &answer, &user])),
        ("an earlier thought", input(vec![&user, &thought, &user])),
        ("tools on offer", with_tools(vec![&user])),
        ("a call and its result", with_tools(vec![&system, &user, &call, &result])),
        ("two results", with_tools(vec![&user, &call, &result, &result])),
        ("thinking switched on", ChatInput { kwargs: thinks(true), ..question.clone() }),
        ("thinking switched off", ChatInput { kwargs: thinks(false), ..question.clone() }),
        ("no answer to come", ChatInput { add_generation_prompt: false, ..input(vec![&user, &answer]) }),
    ]
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
