//! One answer as it is told: what the model wrote, taken apart into thoughts, content and calls, and what came of it.

use qwenkit_engine::{Finish, Piece, Summary, ThoughtEnd, TokenLogprobs};
use qwenkit_text::{AnswerEvent, AnswerReader};
use serde_json::{Value, json};

/// A call in an answer.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) id: String,
    pub(crate) name: String,
    /// JSON.
    pub(crate) arguments: String,
}

/// One answer of a request.
pub(crate) struct Told {
    reader: Option<AnswerReader>,
    /// What ids of calls begin with.
    id: String,
    pub(crate) content: String,
    pub(crate) reasoning: String,
    pub(crate) calls: Vec<Call>,
    /// What was not as it should be in the calls, in words.
    pub(crate) warnings: Vec<String>,
    pub(crate) summary: Option<Summary>,
    /// Tokens after which the thought was still going on.
    pub(crate) thought_tokens: usize,
    /// Log-probabilities of tokens, of which the first `told` have been shown.
    pub(crate) logprobs: Vec<TokenLogprobs>,
}

impl Told {
    /// An answer that has not begun; `id` is its own among all answers.
    pub(crate) fn new(reader: AnswerReader, id: impl Into<String>) -> Told {
        Told {
            reader: Some(reader),
            id: id.into(),
            content: String::new(),
            reasoning: String::new(),
            calls: Vec::new(),
            warnings: Vec::new(),
            summary: None,
            thought_tokens: 0,
            logprobs: Vec::new(),
        }
    }

    /// Takes in a piece; returns what it makes certain.
    pub(crate) fn take_in(&mut self, piece: Piece) -> Vec<AnswerEvent> {
        let events = match piece {
            Piece::Text(piece) => {
                self.logprobs.extend(piece.logprobs);
                let Some(reader) = &mut self.reader else { return Vec::new() };
                let events = reader.push(&piece.text);
                self.thought_tokens += if reader.is_thinking() { piece.ids.len() } else { 0 };
                events
            }
            Piece::Done(summary) => {
                self.summary = Some(summary);
                self.reader.take().map(AnswerReader::finish).unwrap_or_default()
            }
            Piece::Prefill { .. } | Piece::Prompt(_) => Vec::new(),
        };
        events.iter().for_each(|event| self.record(event));
        events
    }

    fn record(&mut self, event: &AnswerEvent) {
        match event {
            AnswerEvent::Reasoning(text) => self.reasoning.push_str(text),
            AnswerEvent::Content(text) => self.content.push_str(text),
            AnswerEvent::CallBegin { index, name } => {
                let id = format!("call_{}_{index}", self.id);
                self.calls.push(Call { id, name: name.clone(), arguments: String::new() });
            }
            AnswerEvent::CallArguments { index, delta } => {
                if let Some(call) = self.calls.get_mut(*index) {
                    call.arguments.push_str(delta);
                }
            }
            AnswerEvent::CallEnd { .. } => {}
            AnswerEvent::Warning(warning) => self.warnings.push(warning.to_string()),
        }
    }

    /// How the answer ended.
    pub(crate) fn finish(&self) -> Option<Finish> {
        self.summary.as_ref().map(|summary| summary.finish)
    }

    /// Adds its warnings to what tells of its end, where there are any.
    pub(crate) fn warn(&self, end: &mut Value) {
        if !self.warnings.is_empty() {
            end["warnings"] = json!(self.warnings);
        }
    }

    /// Whether it ended with calls for the client to make.
    pub(crate) fn wants_calls(&self) -> bool {
        !self.calls.is_empty() && self.finish() == Some(Finish::Stop)
    }

    /// Log-probabilities that came since this was last asked.
    pub(crate) fn take_logprobs(&mut self) -> Vec<TokenLogprobs> {
        std::mem::take(&mut self.logprobs)
    }
}

/// Tokens of a request's answers. Answers to one prompt share it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt: usize,
    pub(crate) cached: usize,
    pub(crate) generated: usize,
    /// Of these, tokens of thought.
    pub(crate) thought: usize,
    /// Why a thought was ended for the model.
    pub(crate) thought_end: Option<ThoughtEnd>,
}

impl Usage {
    pub(crate) fn of<'a>(summaries: impl Iterator<Item = &'a Summary>) -> Usage {
        summaries.fold(Usage::default(), |usage, summary| Usage {
            prompt: summary.prompt_tokens,
            cached: usage.cached.max(summary.cached_tokens),
            generated: usage.generated + summary.ids.len(),
            thought: 0,
            thought_end: usage.thought_end.or(summary.thought_end),
        })
    }

    /// Says in `details` that a thought was ended, and why, if one was.
    pub(crate) fn tell_thought_end(&self, details: &mut Value) {
        if let Some(why) = self.thought_end {
            details["thinking_ended"] = json!(why.name());
        }
    }

    /// Of answers that were taken apart.
    pub(crate) fn told<'a>(answers: impl Iterator<Item = &'a Told> + Clone) -> Usage {
        let thought = answers.clone().map(|told| told.thought_tokens).sum();
        Usage { thought, ..Usage::of(answers.filter_map(|told| told.summary.as_ref())) }
    }
}
