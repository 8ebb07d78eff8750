//! Takes an answer apart, while it comes, into what the model thought and what it says.
//!
//! Contract: thoughts stand between `<think>` and `</think>`; the prompt may have opened them, and they may lack their end.
//! White space around the tags belongs to neither part. Any cut of the text into pieces gives the same result.

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplyText {
    /// What the model thought.
    Reasoning(String),
    /// What it says.
    Content(String),
}

/// Splits one answer.
#[derive(Clone, Debug)]
pub struct ReasoningParser {
    state: State,
    /// Text whose part is not certain yet: white space at an edge, or what may be the beginning of a tag.
    held: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but white space has come.
    Start,
    /// After an opening; nothing but white space has come since.
    Opened,
    Thinking,
    /// After a closing; nothing but white space has come since.
    Closed,
    Speaking,
}

impl ReasoningParser {
    /// At the start of an answer. `opened` if the prompt ends with the opening of a thought.
    pub fn new(opened: bool) -> ReasoningParser {
        ReasoningParser { state: if opened { State::Opened } else { State::Start }, held: String::new() }
    }

    /// Whether the model is thinking now.
    pub fn is_thinking(&self) -> bool {
        matches!(self.state, State::Opened | State::Thinking)
    }

    /// What a piece of text makes certain.
    pub fn push(&mut self, text: &str) -> Vec<ReplyText> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        parts
    }

    /// The end of the answer: what was held back comes out.
    pub fn finish(mut self) -> Vec<ReplyText> {
        let rest = std::mem::take(&mut self.held);
        match self.state {
            State::Start | State::Opened | State::Closed if rest.trim().is_empty() => Vec::new(),
            State::Opened | State::Thinking => {
                let rest = rest.trim_end();
                if rest.is_empty() { Vec::new() } else { vec![ReplyText::Reasoning(rest.to_owned())] }
            }
            _ if rest.is_empty() => Vec::new(),
            _ => vec![ReplyText::Content(rest)],
        }
    }

    /// Goes on as far as is certain; whether more may be.
    fn step(&mut self, parts: &mut Vec<ReplyText>) -> bool {
        match self.state {
            State::Start => {
                let start = self.held.trim_start();
                if let Some(rest) = start.strip_prefix(OPEN) {
                    self.held = rest.to_owned();
                    self.state = State::Opened;
                    return true;
                }
                if OPEN.starts_with(start) {
                    return false;
                }
                // White space before an answer without a thought is the answer's own.
                self.state = State::Speaking;
                true
            }
            State::Opened | State::Closed => {
                self.held = self.held.trim_start().to_owned();
                if self.held.is_empty() {
                    return false;
                }
                self.state = if self.state == State::Opened { State::Thinking } else { State::Speaking };
                true
            }
            State::Thinking => {
                if let Some(at) = self.held.find(CLOSE) {
                    push(parts, ReplyText::Reasoning, self.held[..at].trim_end());
                    self.held = self.held[at + CLOSE.len()..].to_owned();
                    self.state = State::Closed;
                    return true;
                }
                let without_tag = self.held.len() - overlap(&self.held, CLOSE);
                let certain = self.held[..without_tag].trim_end().len();
                push(parts, ReplyText::Reasoning, &self.held[..certain]);
                self.held.drain(..certain);
                false
            }
            State::Speaking => {
                // A later thought, as models open after a tool's result or in the middle of an answer.
                if let Some(at) = self.held.find(OPEN) {
                    push(parts, ReplyText::Content, &self.held[..at]);
                    self.held = self.held[at + OPEN.len()..].to_owned();
                    self.state = State::Opened;
                    return true;
                }
                let certain = self.held.len() - overlap(&self.held, OPEN);
                push(parts, ReplyText::Content, &self.held[..certain]);
                self.held.drain(..certain);
                false
            }
        }
    }
}

fn push(parts: &mut Vec<ReplyText>, kind: fn(String) -> ReplyText, text: &str) {
    if !text.is_empty() {
        parts.push(kind(text.to_owned()));
    }
}

/// Bytes at the end of `text` that are the beginning, and not all, of `tag`.
pub(crate) fn overlap(text: &str, tag: &str) -> usize {
    (1..tag.len()).rev().find(|&n| text.as_bytes().ends_with(&tag.as_bytes()[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (reasoning, content), the same for every cut.
    fn split(opened: bool, text: &str) -> (String, String) {
        let chars: Vec<char> = text.chars().collect();
        let mut results: Vec<(String, String)> = (1..=chars.len().max(1))
            .map(|size| {
                let mut parser = ReasoningParser::new(opened);
                let mut parts: Vec<ReplyText> =
                    chars.chunks(size).flat_map(|piece| parser.push(&piece.iter().collect::<String>())).collect();
                parts.extend(parser.finish());
                let mut both = (String::new(), String::new());
                for part in parts {
                    match part {
                        ReplyText::Reasoning(text) => both.0.push_str(&text),
                        ReplyText::Content(text) => both.1.push_str(&text),
                    }
                }
                both
            })
            .collect();
        results.dedup();
        assert_eq!(results.len(), 1, "the cut decides: {results:?}");
        results.remove(0)
    }

    #[test]
    fn thoughts_in_every_form() {
        let cases = [
            (false, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
            (true, "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
            (true, "\nHm. \n\n</think>Yes.\n", "Hm.", "Yes.\n"),
            (false, "\n<think>\n\n</think>\n\nYes.", "", "Yes."),
            (true, "Still going\n", "Still going", ""),
            (false, "<think>", "", ""),
            (false, "Plain <b>text</b> & <thin", "", "Plain <b>text</b> & <thin"),
            (false, "  spaced", "", "  spaced"),
            (false, "", "", ""),
            (false, "A\n<think>B</think>\nC", "B", "A\nC"),
            (true, "a < b </thin k> c</think> d", "a < b </thin k> c", "d"),
            (false, "नमस्ते <think>सोच</think> दुनिया", "सोच", "नमस्ते दुनिया"),
        ];
        for (opened, text, reasoning, content) in cases {
            assert_eq!(split(opened, text), (reasoning.to_owned(), content.to_owned()), "{text:?}");
        }
    }
}
