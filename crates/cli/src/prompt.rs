//! What follows `run`: which of the words name a model, which are the prompt, and what a pipe adds to it.
//!
//! Contract: text is never cut or dropped; what cannot be used is an error. Not here: chat templates.

use std::io::{self, IsTerminal, Read};

use crate::failure::usage;
use crate::locate;

/// The most text a pipe may bring; no context holds a fraction of it.
const PIPE_BYTES_MAX: u64 = 64 << 20;

/// The words after `run`, told apart.
pub(crate) struct Words {
    pub(crate) model: Option<String>,
    pub(crate) prompt: Option<String>,
}

/// Tells model and prompt apart. A model given as `--model` leaves all words to the prompt.
///
/// # Errors
/// When the first word has the shape of a model's name and is none.
pub(crate) fn words(model: Option<&str>, words: &[String]) -> anyhow::Result<Words> {
    let (model, rest) = match (model, words.split_first()) {
        (None, Some((first, rest))) if locate::is_model(first)? => (Some(first.clone()), rest),
        (model, _) => (model.map(str::to_owned), words),
    };
    let prompt = rest.join(" ");
    Ok(Words { model, prompt: Some(prompt).filter(|prompt| !prompt.trim().is_empty()) })
}

/// The prompt with what stdin holds, if stdin is not a terminal; `None` if there is neither.
///
/// # Errors
/// When stdin cannot be read, is not text, or is endless.
pub(crate) fn with_pipe(prompt: Option<String>) -> anyhow::Result<Option<String>> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Ok(prompt);
    }
    let mut bytes = Vec::new();
    let failed = |error: io::Error| anyhow::anyhow!("cannot read stdin: {error}");
    stdin.lock().take(PIPE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > PIPE_BYTES_MAX {
        anyhow::bail!(
            "stdin holds more than {PIPE_BYTES_MAX} bytes\nhint: no model reads that much at once; send a part"
        );
    }
    let piped = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!(
            "stdin is not text: found a byte that is not UTF-8 at position {at}\nhint: convert it to UTF-8 text"
        )
    })?;
    Ok(joined(prompt, piped.trim_end()))
}

/// The question first, then what it is about.
fn joined(prompt: Option<String>, piped: &str) -> Option<String> {
    match (prompt, piped.is_empty()) {
        (prompt, true) => prompt,
        (None, false) => Some(piped.to_owned()),
        (Some(prompt), false) => Some(format!("{prompt}\n\n{piped}")),
    }
}

/// `key=json` for the chat template.
pub(crate) fn template_arg(text: &str) -> Result<(String, serde_json::Value), String> {
    let (key, value) = text.split_once('=').ok_or("expected key=json, as in enable_thinking=false")?;
    let value =
        serde_json::from_str(value).map_err(|_| format!("expected JSON after `=`; text is written {key}='\"...\"'"))?;
    Ok((key.to_owned(), value))
}

/// Refuses a second way of giving the prompt.
pub(crate) fn no_words(words: &Words) -> anyhow::Result<()> {
    match &words.prompt {
        Some(prompt) => Err(usage(format!(
            "both --prompt-ids and the prompt `{prompt}` were given\nhint: give one of them; a model is named by its \
             name, hub id or path"
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(model: Option<&str>, given: &[&str]) -> (Option<String>, Option<String>) {
        let given: Vec<String> = given.iter().map(|&word| word.to_owned()).collect();
        let words = words(model, &given).expect("no slip");
        (words.model, words.prompt)
    }

    #[test]
    fn the_first_word_is_a_model_or_the_prompt_begins_there() {
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(split(None, &["qwen3:4b", "Hello", "you"]), (text("qwen3:4b"), text("Hello you")));
        assert_eq!(split(None, &["Reverse a string in C"]), (None, text("Reverse a string in C")));
        assert_eq!(split(Some("x.gguf"), &["qwen3:4b"]), (text("x.gguf"), text("qwen3:4b")));
        assert_eq!(split(None, &[]), (None, None));
        assert_eq!(split(None, &["qwen3:4b", " "]), (text("qwen3:4b"), None));
    }

    #[test]
    fn a_pipe_is_the_prompt_or_follows_it() {
        assert_eq!(joined(None, ""), None);
        assert_eq!(joined(None, "text").as_deref(), Some("text"));
        assert_eq!(joined(Some("Summarise:".into()), "text").as_deref(), Some("Summarise:\n\ntext"));
        assert_eq!(joined(Some("Hello".into()), "").as_deref(), Some("Hello"));
    }

    #[test]
    fn template_arguments_are_json() {
        assert_eq!(template_arg("a=false"), Ok(("a".into(), false.into())));
        assert_eq!(template_arg("a=\"b=c\""), Ok(("a".into(), "b=c".into())));
        assert!(template_arg("a").is_err() && template_arg("a=b").is_err());
    }
}
