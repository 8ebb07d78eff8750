//! The chat in the terminal: a line typed, an answer streamed, the conversation kept.
//!
//! Contract: Ctrl-C ends an answer and not the chat, Ctrl-D leaves it; a question that fails leaves the conversation as
//! it was. Not here: how an answer is made.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use qwenkit_engine::{Ask, Session, Visual};
use qwenkit_hub::Store;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};

use crate::answer::{self, Show};
use crate::images::{self, Shown};
use crate::terminal::{self, StdoutClosed, note};

const HELP: &str = "\
/system TEXT   what the model is told first; without TEXT, shows it
/image FILE    show an image, or a folder of frames, with the next message
/clear         forget the conversation
/save FILE     write the conversation as JSON
/help          this list
/exit          leave, as Ctrl-D does
Ctrl-C ends an answer. A line that begins with // is sent with one slash.";

/// Makes the question for a conversation and the images in it.
type MakeAsk<'a> = dyn Fn(Vec<Value>, Vec<Visual>) -> Ask + 'a;

/// What a typed line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Nothing,
    Say(&'a str),
    System(&'a str),
    Image(&'a str),
    Clear,
    Save(&'a str),
    Help,
    Exit,
    Unknown(&'a str),
}

struct Conversation {
    system: Option<String>,
    /// Without the system message.
    messages: Vec<Value>,
    /// Of all messages, in order.
    visuals: Vec<Visual>,
    /// What goes with the next message.
    shown: Vec<Shown>,
    /// Of films.
    frames_per_second: f32,
}

/// Talks until the person leaves.
///
/// # Errors
/// When the terminal or stdout fails.
pub(crate) fn chat(
    session: &Session,
    model: &str,
    system: Option<String>,
    shown: Vec<Shown>,
    frames_per_second: f32,
    ask: &MakeAsk,
) -> anyhow::Result<()> {
    let mut editor = DefaultEditor::new().map_err(editor_error)?;
    let history = history_path();
    if let Some(path) = &history {
        // There is none before the first chat.
        let _ = editor.load_history(path);
    }
    let info = session.info();
    note(&format!("{model}: {}, {} tokens of context. /help lists commands.", info.architecture, info.context_tokens));
    let (messages, visuals) = (Vec::new(), Vec::new());
    let mut conversation = Conversation { system, messages, visuals, shown, frames_per_second };
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => {
                note("(Ctrl-D or /exit leaves)");
                continue;
            }
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(editor_error(error)),
        };
        if line.trim().is_empty() {
            continue;
        }
        let _ = editor.add_history_entry(line.as_str());
        if conversation.take(&line, session, ask)? == Next::Leave {
            break;
        }
    }
    if let Some(path) = &history
        && let Err(error) = save_history(&mut editor, path)
    {
        note(&format!("note: the history of typed lines was not kept: {error}"));
    }
    Ok(())
}

#[derive(PartialEq, Eq)]
enum Next {
    GoOn,
    Leave,
}

impl Conversation {
    fn take(&mut self, line: &str, session: &Session, ask: &MakeAsk) -> anyhow::Result<Next> {
        match parse(line) {
            Line::Nothing => {}
            Line::Say(text) => self.say(text, session, ask)?,
            Line::System("") => match &self.system {
                Some(text) => note(text),
                None => note("no system message; /system TEXT sets one"),
            },
            Line::System(text) => self.system = Some(text.to_owned()),
            Line::Image("") => match self.shown.len() {
                0 => note("no image goes with the next message; /image FILE adds one"),
                count => note(&format!("{count} to go with the next message")),
            },
            Line::Image(file) => {
                let shown = images::open(Path::new(file)).and_then(|named| named.show(session, self.frames_per_second));
                match shown {
                    Ok(shown) => self.shown.push(shown),
                    Err(error) => terminal::print_error(&error.to_string()),
                }
            }
            Line::Clear => {
                (self.messages, self.visuals, self.shown) = (Vec::new(), Vec::new(), Vec::new());
                note("the conversation is forgotten");
            }
            Line::Save(file) => match self.save(Path::new(file)) {
                Ok(()) => note(&format!("saved to {file}")),
                Err(error) => terminal::print_error(&error.to_string()),
            },
            Line::Help => note(HELP),
            Line::Exit => return Ok(Next::Leave),
            Line::Unknown(command) => note(&format!("there is no command {command}; /help lists them")),
        }
        Ok(Next::GoOn)
    }

    /// Asks. A failed question is taken back with its images, so that the next one does not fail for the same reason.
    fn say(&mut self, text: &str, session: &Session, ask: &MakeAsk) -> anyhow::Result<()> {
        let (shown, visuals_before) = (std::mem::take(&mut self.shown), self.visuals.len());
        self.messages.push(json!({ "role": "user", "content": images::content(&shown, text) }));
        self.visuals.extend(images::visuals(&shown));
        match answer::answer(session, ask(self.all_messages(), self.visuals.clone()), Show::Stream) {
            Ok(reply) => {
                answer::remark(session, &reply.summary);
                self.messages.push(json!({ "role": "assistant", "content": reply.summary.text }));
                Ok(())
            }
            Err(error) if error.is::<StdoutClosed>() => Err(error),
            Err(error) => {
                self.messages.pop();
                self.visuals.truncate(visuals_before);
                terminal::print_error(&error.to_string());
                if matches!(error.downcast_ref(), Some(qwenkit_engine::Error::PromptTooLong { .. })) {
                    note("  hint: /clear starts a new conversation");
                }
                match error.downcast_ref() {
                    Some(qwenkit_engine::Error::Stopped) => Err(error),
                    _ => Ok(()),
                }
            }
        }
    }

    fn all_messages(&self) -> Vec<Value> {
        let system = self.system.iter().map(|text| json!({ "role": "system", "content": text }));
        system.chain(self.messages.iter().cloned()).collect()
    }

    /// Writes the conversation in the form that `template render` reads. An existing file is never overwritten.
    fn save(&self, path: &Path) -> anyhow::Result<()> {
        let text = format!("{}\n", json!({ "messages": self.all_messages() }));
        let create = || fs::File::create_new(path)?.write_all(text.as_bytes());
        create().with_context(|| format!("cannot write `{}`", path.display())).map_err(|error| {
            let cause = error.root_cause().to_string();
            anyhow::anyhow!("{error}: {cause}\nhint: name a file that does not exist, in a folder that does")
        })
    }
}

fn parse(line: &str) -> Line<'_> {
    let line = line.trim();
    if line.is_empty() {
        return Line::Nothing;
    }
    if line.starts_with("//") {
        return Line::Say(&line[1..]);
    }
    if !line.starts_with('/') {
        return Line::Say(line);
    }
    let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    match (command, rest.trim()) {
        ("/system", text) => Line::System(text),
        ("/image", file) => Line::Image(file),
        ("/clear", "") => Line::Clear,
        ("/save", file) if !file.is_empty() => Line::Save(file),
        ("/help" | "/?", "") => Line::Help,
        ("/exit" | "/quit" | "/bye", "") => Line::Exit,
        _ => Line::Unknown(line),
    }
}

/// Typed lines are kept beside the models.
fn history_path() -> Option<PathBuf> {
    Some(Store::open(None).ok()?.root().join("chat_history.txt"))
}

fn save_history(editor: &mut DefaultEditor, path: &Path) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    editor.save_history(path)?;
    Ok(())
}

fn editor_error(error: ReadlineError) -> anyhow::Error {
    anyhow::anyhow!("cannot read from the terminal: {error}\nhint: give the prompt as an argument: qwenkit run \"...\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_said_and_slashes_command() {
        assert_eq!(parse("  "), Line::Nothing);
        assert_eq!(parse(" hello /clear "), Line::Say("hello /clear"));
        assert_eq!(parse("//etc"), Line::Say("/etc"));
        assert_eq!(parse("/system be brief"), Line::System("be brief"));
        assert_eq!(parse("/system"), Line::System(""));
        assert_eq!(parse("/save a b.json"), Line::Save("a b.json"));
        assert_eq!(parse("/image my cat.png"), Line::Image("my cat.png"));
        assert_eq!(parse("/exit"), Line::Exit);
        for slip in ["/save", "/cleer", "/clear all"] {
            assert_eq!(parse(slip), Line::Unknown(slip));
        }
    }

    #[test]
    fn a_conversation_is_saved_once_and_nothing_is_overwritten() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("talk.json");
        let conversation = Conversation {
            system: Some("s".into()),
            messages: vec![json!({ "role": "user", "content": "u" })],
            visuals: Vec::new(),
            shown: Vec::new(),
            frames_per_second: 2.0,
        };
        conversation.save(&path).expect("a new file");
        let text = fs::read_to_string(&path).expect("written");
        assert_eq!(text.trim(), r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"u"}]}"#);
        let error = conversation.save(&path).expect_err("it exists").to_string();
        assert!(error.starts_with("cannot write") && error.contains("hint:"), "{error}");
    }
}
