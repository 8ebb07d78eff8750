//! An answer as interfaces show it: thoughts, content and tool calls, taken apart while it comes.

use serde_json::Value;

use crate::{
    reasoning::{ReasoningParser, ReplyText},
    tools::{ToolParser, ToolText},
};

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplyPart {
    /// What the model thought.
    Reasoning(String),
    /// What it says.
    Content(String),
    /// A tool call begins; calls are counted from 0.
    Call {
        /// Which.
        index: usize,
        /// The tool.
        name: String,
    },
    /// More of a call's arguments.
    Arguments {
        /// Of which call.
        index: usize,
        /// A part of a JSON object.
        text: String,
    },
}

/// Reads one answer.
#[derive(Clone, Debug, Default)]
pub struct ReplyParser {
    reasoning: Option<ReasoningParser>,
    tools: Option<ToolParser>,
    /// The thought under way, from its latest opening of a call: models forget to end a thought before they call.
    thought: String,
}

impl ReplyParser {
    /// Thoughts are looked for if `thinks`, which says whether the prompt has opened one; calls if there are `tools`.
    pub fn new(thinks: Option<bool>, tools: &[Value]) -> ReplyParser {
        ReplyParser {
            reasoning: thinks.map(ReasoningParser::new),
            tools: (!tools.is_empty()).then(|| ToolParser::new(tools)),
            thought: String::new(),
        }
    }

    /// Calls so far.
    pub fn calls(&self) -> usize {
        self.tools.as_ref().map_or(0, ToolParser::calls)
    }

    /// What a piece of text makes certain.
    pub fn push(&mut self, text: &str) -> Vec<ReplyPart> {
        let parts = match &mut self.reasoning {
            Some(reasoning) => reasoning.push(text),
            None => vec![ReplyText::Content(text.to_owned())],
        };
        self.through_tools(parts)
    }

    /// The end of the answer: what was held back comes out.
    pub fn finish(&mut self) -> Vec<ReplyPart> {
        let mut parts = Vec::new();
        let reasoning = self.reasoning.take();
        let unended = reasoning.as_ref().is_some_and(ReasoningParser::is_thinking);
        if let Some(reasoning) = reasoning {
            let rest = reasoning.finish();
            parts = self.through_tools(rest);
        }
        let Some(mut tools) = self.tools.take() else { return parts };
        if unended && let Some(at) = self.thought.rfind("<tool_call>") {
            parts.extend(tools.push(&self.thought[at..]).into_iter().map(part));
        }
        parts.extend(tools.finish().into_iter().map(part));
        parts
    }

    fn through_tools(&mut self, parts: Vec<ReplyText>) -> Vec<ReplyPart> {
        let mut out = Vec::new();
        for found in parts {
            match (found, &mut self.tools) {
                (ReplyText::Reasoning(text), tools) => {
                    if tools.is_some() {
                        self.thought.push_str(&text);
                    }
                    out.push(ReplyPart::Reasoning(text));
                }
                (ReplyText::Content(text), Some(tools)) => out.extend(tools.push(&text).into_iter().map(part)),
                (ReplyText::Content(text), None) if text.is_empty() => {}
                (ReplyText::Content(text), None) => out.push(ReplyPart::Content(text)),
            }
        }
        out
    }
}

fn part(found: ToolText) -> ReplyPart {
    match found {
        ToolText::Content(text) => ReplyPart::Content(text),
        ToolText::Call { index, name } => ReplyPart::Call { index, name },
        ToolText::Arguments { index, text } => ReplyPart::Arguments { index, text },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_call_in_a_thought_without_end_is_a_call() {
        let tools = [json!({"type": "function", "function": {"name": "now"}})];
        let mut parser = ReplyParser::new(Some(true), &tools);
        let mut parts = parser.push("What time?\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>");
        parts.extend(parser.finish());
        assert!(parts.contains(&ReplyPart::Call { index: 0, name: "now".into() }), "{parts:?}");
        let mut parser = ReplyParser::new(Some(true), &tools);
        let mut parts = parser.push("I could say <tool_call> now.</think>\nNo.");
        parts.extend(parser.finish());
        assert_eq!(parts.last(), Some(&ReplyPart::Content("No.".into())));
        assert!(!parts.iter().any(|p| matches!(p, ReplyPart::Call { .. })));
    }
}
