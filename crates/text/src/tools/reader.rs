//! Finds the calls in a model's answer while it arrives.
//!
//! Contract: as [`crate::tools`] says. A call begins at `<tool_call>`, or at `<function=NAME>` and `{"name": "NAME",
//! "arguments":` with the name of a declared tool, the latter at the start of the answer only, where a fence of code or
//! `<tools>` may stand before it. White space next to calls is dropped.

use crate::reasoning::short_pieces;

use super::declared::ToolSet;
use super::hermes::{HermesCall, Stand};
use super::xml::{FUNCTION, Step, Tag, XmlCall, named_tag};

const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";
/// What may stand around a bare JSON call at the start of an answer.
const WRAPPERS: [&str; 3] = ["```json", "```", "<tools>"];
/// Ends of what stands around calls.
const CLOSERS: [&str; 3] = [CALL_END, "</tools>", "```"];

/// What an answer is made of, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerEvent {
    /// A part of the model's thoughts.
    Reasoning(String),
    /// A part of the text for the reader.
    Content(String),
    /// A call begins.
    CallBegin {
        /// Which call, from 0.
        index: usize,
        /// The tool.
        name: String,
    },
    /// A part of a call's arguments; all parts of one call, joined, are a JSON object.
    CallArguments {
        /// Which call.
        index: usize,
        /// The part.
        delta: String,
    },
    /// A call's arguments are complete.
    CallEnd {
        /// Which call.
        index: usize,
    },
    /// Something was not as it should be.
    Warning(ToolWarning),
}

/// What was not as it should be in a model's calls.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ToolWarning {
    /// Text that began like a call stays text.
    #[error("the model wrote `{text}`, which begins like a tool call but is none; it stays in the content")]
    NotACall {
        /// Its first characters.
        text: String,
    },
    /// A call to something that is not on offer.
    #[error("the model called the tool `{name}`, which the request does not declare")]
    UnknownTool {
        /// The name.
        name: String,
    },
    /// Arguments that were not JSON before they were mended.
    #[error("the arguments of tool call {index} were not valid JSON and were mended")]
    Mended {
        /// Which call.
        index: usize,
    },
    /// The answer ended inside a call.
    #[error("the answer ended inside tool call {index}; its arguments may be cut short")]
    Cut {
        /// Which call.
        index: usize,
    },
    /// Text inside a call that belongs to none of its parameters.
    #[error("tool call {index} contains `{text}` outside its parameters; it was left out")]
    Stray {
        /// Which call.
        index: usize,
        /// Its first characters.
        text: String,
    },
    /// The call stood in a thought that never ended.
    #[error("the model called a tool without ending its thought; the call counts")]
    InThought,
}

/// Reads the calls of one answer. Push its pieces, then finish.
#[derive(Clone, Debug)]
pub struct ToolReader {
    tools: ToolSet,
    buffer: String,
    place: Place,
    /// Calls begun.
    calls: usize,
    /// White space that is content if content follows.
    blank: String,
    has_content: bool,
}

#[derive(Clone, Debug)]
enum Place {
    /// At the start, where a bare call may stand.
    Start,
    Prose,
    /// Behind a call: more calls of the same block, or its end.
    Block {
        has_tag: bool,
    },
    /// `opening` is what stood before the object, from the tag on.
    Hermes {
        call: Box<HermesCall>,
        opening: String,
    },
    Xml {
        call: Box<XmlCall>,
        has_tag: bool,
    },
}

impl ToolReader {
    /// A reader at the start of an answer to a request that declares these tools.
    pub fn new(tools: ToolSet) -> ToolReader {
        ToolReader {
            tools,
            buffer: String::new(),
            place: Place::Start,
            calls: 0,
            blank: String::new(),
            has_content: false,
        }
    }

    /// Takes the next piece of the answer and adds what is certain to `events`.
    pub fn push(&mut self, piece: &str, events: &mut Vec<AnswerEvent>) {
        for part in short_pieces(piece) {
            self.buffer.push_str(part);
            while self.step(false, events) {}
        }
    }

    /// The answer is over: what is open is closed.
    pub fn finish(mut self, events: &mut Vec<AnswerEvent>) {
        while self.step(true, events) {}
        if self.calls == 0 && !self.blank.is_empty() {
            events.push(AnswerEvent::Content(std::mem::take(&mut self.blank)));
        }
    }

    /// One step; false where more text is needed or, at the end, nothing is left to do.
    fn step(&mut self, is_over: bool, events: &mut Vec<AnswerEvent>) -> bool {
        match std::mem::replace(&mut self.place, Place::Prose) {
            Place::Start => self.step_start(is_over),
            Place::Prose => self.step_prose(is_over, events),
            Place::Block { has_tag } => self.step_block(has_tag, is_over),
            Place::Hermes { call, opening } => self.step_hermes(call, opening, is_over, events),
            Place::Xml { call, has_tag } => self.step_xml(call, has_tag, is_over, events),
        }
    }

    fn step_start(&mut self, is_over: bool) -> bool {
        let mut rest = self.buffer.trim_start();
        let is_open = WRAPPERS.iter().any(|wrapper| wrapper.len() > rest.len() && wrapper.starts_with(rest));
        if let Some(wrapper) = WRAPPERS.iter().find(|wrapper| rest.starts_with(**wrapper)) {
            rest = rest.get(wrapper.len()..).unwrap_or_default().trim_start();
        }
        match self.bare_head(rest) {
            Match::Yes => {
                let at = self.buffer.len() - rest.len();
                self.buffer.drain(..at);
                self.place = Place::Hermes { call: Box::new(HermesCall::new()), opening: String::new() };
                true
            }
            Match::NeedsMore if !is_over => {
                self.place = Place::Start;
                false
            }
            _ if is_open && !is_over => {
                self.place = Place::Start;
                false
            }
            _ => true,
        }
    }

    fn step_prose(&mut self, is_over: bool, events: &mut Vec<AnswerEvent>) -> bool {
        let until = self.buffer.find('<').unwrap_or(self.buffer.len());
        let before: String = self.buffer.drain(..until).collect();
        self.content(&before, events);
        if self.buffer.is_empty() {
            return false;
        }
        match self.opening() {
            Opening::Hermes(bytes) => {
                let opening = self.buffer.drain(..bytes).collect();
                self.place = Place::Hermes { call: Box::new(HermesCall::new()), opening };
            }
            Opening::Xml { name, bytes, has_tag } => {
                self.buffer.drain(..bytes);
                self.begin_xml(name, has_tag, events);
            }
            Opening::NeedsMore if !is_over => return false,
            Opening::NeedsMore | Opening::None => {
                let bytes = if self.buffer.starts_with(CALL) { CALL.len() } else { 1 };
                let text: String = self.buffer.drain(..bytes).collect();
                if bytes > 1 {
                    events.push(AnswerEvent::Warning(ToolWarning::NotACall { text: text.clone() }));
                }
                self.content(&text, events);
            }
        }
        true
    }

    /// What the `<` at the start of the buffer opens.
    fn opening(&self) -> Opening {
        let text = self.buffer.as_str();
        let Some(body) = text.strip_prefix(CALL) else {
            return match named_tag(text, FUNCTION) {
                Tag::Named(name, bytes) if self.tools.get(&name).is_some() => {
                    Opening::Xml { name, bytes, has_tag: false }
                }
                Tag::NeedsMore => Opening::NeedsMore,
                _ if CALL.starts_with(text) => Opening::NeedsMore,
                _ => Opening::None,
            };
        };
        let body = body.trim_start();
        let skipped = text.len() - body.len();
        match named_tag(body, FUNCTION) {
            Tag::Named(name, bytes) => return Opening::Xml { name, bytes: skipped + bytes, has_tag: true },
            Tag::NeedsMore => return Opening::NeedsMore,
            Tag::No => {}
        }
        let object = body.strip_prefix('[').map_or(body, str::trim_start);
        match object.chars().next() {
            Some('{') => Opening::Hermes(text.len() - object.len()),
            None => Opening::NeedsMore,
            _ => Opening::None,
        }
    }

    fn begin_xml(&mut self, name: String, has_tag: bool, events: &mut Vec<AnswerEvent>) {
        self.begin_call(&name, events);
        self.place = Place::Xml { call: Box::new(XmlCall::new(name)), has_tag };
    }

    fn begin_call(&mut self, name: &str, events: &mut Vec<AnswerEvent>) {
        self.blank.clear();
        events.push(AnswerEvent::CallBegin { index: self.calls, name: name.to_owned() });
        if self.tools.get(name).is_none() {
            events.push(AnswerEvent::Warning(ToolWarning::UnknownTool { name: name.to_owned() }));
        }
        self.calls += 1;
    }

    fn arguments(&self, delta: String, events: &mut Vec<AnswerEvent>) {
        if !delta.is_empty() {
            events.push(AnswerEvent::CallArguments { index: self.calls.saturating_sub(1), delta });
        }
    }

    fn end_call(&mut self, warnings: impl IntoIterator<Item = ToolWarning>, events: &mut Vec<AnswerEvent>) {
        events.push(AnswerEvent::CallEnd { index: self.calls.saturating_sub(1) });
        events.extend(warnings.into_iter().map(AnswerEvent::Warning));
    }

    fn step_xml(
        &mut self,
        mut call: Box<XmlCall>,
        has_tag: bool,
        is_over: bool,
        events: &mut Vec<AnswerEvent>,
    ) -> bool {
        let step = call.step(&mut self.buffer, is_over, &self.tools);
        self.arguments(call.take(), events);
        if step != Step::Over {
            self.place = Place::Xml { call, has_tag };
            return step == Step::Goes;
        }
        let index = self.calls.saturating_sub(1);
        let stray = (!call.stray.trim().is_empty())
            .then(|| ToolWarning::Stray { index, text: call.stray.trim().chars().take(80).collect() });
        let cut = call.is_cut.then_some(ToolWarning::Cut { index });
        self.end_call(stray.into_iter().chain(cut), events);
        self.place = Place::Block { has_tag };
        true
    }

    fn step_hermes(
        &mut self,
        mut call: Box<HermesCall>,
        opening: String,
        is_over: bool,
        events: &mut Vec<AnswerEvent>,
    ) -> bool {
        let mut read = 0;
        let mut stand = Stand::Goes;
        let mut waits = false;
        while stand == Stand::Goes && !waits {
            let rest = self.buffer.get(read..).unwrap_or_default();
            let Some(character) = rest.chars().next() else { break };
            match ends_call(rest, call.is_in_text()) {
                Match::Yes => {
                    stand = call.finish(false);
                    break;
                }
                Match::NeedsMore if !is_over => waits = true,
                Match::NeedsMore | Match::No => {
                    stand = call.feed(character);
                    read += character.len_utf8();
                    self.give_out(&mut call, events);
                }
            }
        }
        self.buffer.drain(..read);
        let is_cut = stand == Stand::Goes && is_over;
        if is_cut {
            stand = call.finish(true);
        }
        self.give_out(&mut call, events);
        self.arguments(call.take_arguments(), events);
        match stand {
            Stand::Goes => {
                self.place = Place::Hermes { call, opening };
                return false;
            }
            Stand::Over => {
                let index = self.calls.saturating_sub(1);
                let cut = is_cut.then_some(ToolWarning::Cut { index });
                let mended = (call.is_mended() && !is_cut).then_some(ToolWarning::Mended { index });
                self.end_call(cut.into_iter().chain(mended), events);
                self.place = Place::Block { has_tag: !opening.is_empty() };
            }
            Stand::Fails => {
                let text = format!("{opening}{}", call.take_raw());
                let shown = text.chars().take(80).collect();
                events.push(AnswerEvent::Warning(ToolWarning::NotACall { text: shown }));
                self.content(&text, events);
            }
        }
        true
    }

    fn give_out(&mut self, call: &mut HermesCall, events: &mut Vec<AnswerEvent>) {
        if let Some(name) = call.take_begin() {
            self.begin_call(&name, events);
        }
    }

    fn step_block(&mut self, has_tag: bool, is_over: bool) -> bool {
        let rest =
            self.buffer.trim_start().trim_start_matches(|c: char| has_tag && (c.is_whitespace() || ",[]}".contains(c)));
        let at = self.buffer.len() - rest.len();
        let wait = |reader: &mut ToolReader| {
            reader.place = Place::Block { has_tag };
            false
        };
        if rest.is_empty() {
            return match is_over {
                true => {
                    self.buffer.clear();
                    false
                }
                false => wait(self),
            };
        }
        if let Some(closer) = CLOSERS.iter().find(|closer| rest.starts_with(**closer)) {
            let until = at + closer.len();
            self.buffer.drain(..until);
            return true;
        }
        let is_perhaps = [&CLOSERS[..], &[CALL, FUNCTION]].concat().iter().any(|tag| tag.starts_with(rest));
        let next = match rest.starts_with('{') {
            true if has_tag => Match::Yes,
            true => self.bare_head(rest),
            false => Match::No,
        };
        match next {
            Match::Yes => {
                self.buffer.drain(..at);
                let opening = if has_tag { CALL } else { "" }.to_owned();
                self.place = Place::Hermes { call: Box::new(HermesCall::new()), opening };
                true
            }
            Match::NeedsMore if !is_over => wait(self),
            Match::No if is_perhaps && !is_over => wait(self),
            Match::NeedsMore | Match::No => true,
        }
    }

    /// Whether a JSON call to a declared tool begins here.
    fn bare_head(&self, text: &str) -> Match {
        let mut rest = text;
        for (index, word) in ["{", "\"name\"", ":", "\"", "\"", ",", "\"arguments\"", ":", "{"].into_iter().enumerate()
        {
            if index == 4 {
                let Some(end) = rest.find('"') else {
                    let may_grow = self.tools.tools().iter().any(|tool| tool.name.starts_with(rest));
                    return if may_grow { Match::NeedsMore } else { Match::No };
                };
                if self.tools.get(rest.get(..end).unwrap_or_default()).is_none() {
                    return Match::No;
                }
                rest = rest.get(end..).unwrap_or_default();
            } else {
                rest = rest.trim_start();
            }
            match rest.strip_prefix(word) {
                Some(tail) => rest = tail,
                None if word.starts_with(rest) => return Match::NeedsMore,
                None => return Match::No,
            }
        }
        Match::Yes
    }

    /// Gives out content; white space at its end waits.
    fn content(&mut self, text: &str, events: &mut Vec<AnswerEvent>) {
        let kept = text.trim_end();
        if kept.is_empty() {
            self.blank.push_str(text);
            return;
        }
        let mut blank = std::mem::take(&mut self.blank);
        if self.calls > 0 && !self.has_content {
            blank.clear();
        }
        let kept_text = if blank.is_empty() && self.calls > 0 && !self.has_content { kept.trim_start() } else { kept };
        self.has_content = true;
        self.blank = text.get(kept.len()..).unwrap_or_default().to_owned();
        events.push(AnswerEvent::Content(format!("{blank}{kept_text}")));
    }
}

enum Opening {
    /// A call in JSON, behind so many bytes.
    Hermes(usize),
    Xml {
        name: String,
        bytes: usize,
        has_tag: bool,
    },
    NeedsMore,
    None,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Match {
    Yes,
    No,
    NeedsMore,
}

/// Whether the block ends here although the call's JSON does not. No JSON string holds a line end, so one before the tag
/// tells it from a tag that a string speaks of.
fn ends_call(rest: &str, is_in_text: bool) -> Match {
    let tag = match (rest.starts_with('<'), rest.starts_with(['\n', '\r'])) {
        (true, _) if !is_in_text => rest,
        (_, true) if is_in_text => rest.trim_start(),
        _ => return Match::No,
    };
    match () {
        () if tag.starts_with(CALL_END) || tag.starts_with(CALL) => Match::Yes,
        () if CALL_END.starts_with(tag) || CALL.starts_with(tag) => Match::NeedsMore,
        () => Match::No,
    }
}
