//! A model's answer as it arrives: thoughts, content and tool calls, each apart.
//!
//! Contract: [`ReasoningSplitter`] and [`ToolReader`] one behind the other. Calls are looked for only where tools were
//! declared; a call in a thought that never ended counts, with a warning.

use crate::{AnswerEvent, Opening, Part, ReasoningSplitter, ToolReader, ToolSet, ToolWarning};

/// Reads one answer. Push its pieces, then finish.
#[derive(Clone, Debug)]
pub struct AnswerReader {
    splitter: ReasoningSplitter,
    calls: Option<ToolReader>,
}

impl AnswerReader {
    /// A reader at the start of an answer to a prompt with this opening. Without tools, calls are text like any other.
    pub fn new(opening: Opening, tools: &ToolSet) -> AnswerReader {
        let calls = (!tools.is_empty()).then(|| ToolReader::new(tools.clone()));
        AnswerReader { splitter: ReasoningSplitter::new(opening, calls.is_some()), calls }
    }

    /// Whether the text so far ends inside a thought.
    pub fn is_thinking(&self) -> bool {
        self.splitter.is_thinking()
    }

    /// Takes the next piece of text; what it makes certain comes back.
    pub fn push(&mut self, piece: &str) -> Vec<AnswerEvent> {
        let mut parts = Vec::new();
        self.splitter.push(piece, &mut parts);
        let mut events = Vec::new();
        read(&mut self.calls, parts, &mut events);
        events
    }

    /// The answer is over: what was held back comes out.
    pub fn finish(self) -> Vec<AnswerEvent> {
        let AnswerReader { splitter, mut calls } = self;
        let (mut parts, mut events) = (Vec::new(), Vec::new());
        splitter.finish(&mut parts);
        read(&mut calls, parts, &mut events);
        if let Some(calls) = calls {
            calls.finish(&mut events);
        }
        events
    }
}

fn read(calls: &mut Option<ToolReader>, parts: Vec<Part>, events: &mut Vec<AnswerEvent>) {
    for part in parts {
        match (part, calls.as_mut()) {
            (Part::Reasoning(text), _) => events.push(AnswerEvent::Reasoning(text)),
            (Part::Content(text), Some(calls)) => calls.push(&text, events),
            (Part::CallInThought(text), Some(calls)) => {
                events.push(AnswerEvent::Warning(ToolWarning::InThought));
                calls.push(&text, events);
            }
            (Part::Content(text) | Part::CallInThought(text), None) => events.push(AnswerEvent::Content(text)),
        }
    }
}
