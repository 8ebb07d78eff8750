//! The XML form of a tool call from Qwen3-Coder on: `<function=NAME>`, `<parameter=KEY>`, values without quotes.
//!
//! Contract: the arguments come out as one JSON object, valid for any text; values follow the tool's schema, and those
//! that can only be strings come out while they arrive. One line end on either side of a value belongs to the form. Tags
//! that are missing are taken as read where the next tag shows it; a tag inside a value stays text where nothing that
//! could follow it follows.

use super::declared::ToolSet;
use super::repair::push_escaped;

pub(super) const FUNCTION: &str = "<function=";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";
const FUNCTION_END: &str = "</function>";
const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";
/// Longest name of a function or parameter, in bytes.
const NAME_MAX_BYTES: usize = 256;

/// One call on its way, behind `<function=NAME>`.
#[derive(Clone, Debug)]
pub(super) struct XmlCall {
    name: String,
    value: Option<Parameter>,
    has_parameters: bool,
    out: String,
    /// Text that belongs to no parameter.
    pub(super) stray: String,
    /// Whether a value was cut off.
    pub(super) is_cut: bool,
}

/// A value being read; its text stands at the start of the buffer.
#[derive(Clone, Debug)]
struct Parameter {
    key: String,
    is_text: bool,
    is_begun: bool,
    /// Bytes that were searched for the end.
    searched: usize,
    /// Where an end stands that nothing confirmed so far.
    doubtful_end: Option<usize>,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Goes,
    NeedsMore,
    /// The call is over; the buffer starts with what follows it.
    Over,
}

/// What an opening tag says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    /// The name, and the bytes of the whole tag.
    Named(String, usize),
    NeedsMore,
    No,
}

/// Reads `<function=NAME>` or `<parameter=NAME>` at the start of a text.
pub(super) fn named_tag(text: &str, tag: &str) -> Tag {
    let Some(rest) = text.strip_prefix(tag) else {
        return if tag.starts_with(text) { Tag::NeedsMore } else { Tag::No };
    };
    let end = rest.find(['>', '\n', '<']);
    match end.map(|at| (rest.get(..at).unwrap_or_default(), rest[at..].starts_with('>'))) {
        Some((name, true)) if name.len() <= NAME_MAX_BYTES => {
            let bare = name.trim().trim_matches(['"', '\'']);
            match bare.is_empty() {
                true => Tag::No,
                false => Tag::Named(bare.to_owned(), tag.len() + name.len() + 1),
            }
        }
        None if rest.len() <= NAME_MAX_BYTES => Tag::NeedsMore,
        _ => Tag::No,
    }
}

/// Whether one of the tags stands at the start of the text, or may once more of it is there.
enum Ahead {
    Yes,
    Perhaps,
    No,
}

fn ahead(text: &str, tags: &[&str]) -> Ahead {
    match () {
        () if tags.iter().any(|tag| text.starts_with(tag)) => Ahead::Yes,
        () if tags.iter().any(|tag| tag.starts_with(text)) => Ahead::Perhaps,
        () => Ahead::No,
    }
}

/// How the value ends.
enum End {
    /// At the first number, and the call goes on at the second.
    At(usize, usize),
    /// Not within what is there; everything before this byte is part of the value.
    Later(usize),
}

impl XmlCall {
    pub(super) fn new(name: String) -> XmlCall {
        let out = "{".to_owned();
        XmlCall { name, value: None, has_parameters: false, out, stray: String::new(), is_cut: false }
    }

    /// Arguments to give out.
    pub(super) fn take(&mut self) -> String {
        std::mem::take(&mut self.out)
    }

    /// One step on the buffer. At the end of the text (`is_over`) it never needs more.
    pub(super) fn step(&mut self, buffer: &mut String, is_over: bool, tools: &ToolSet) -> Step {
        match self.value.take() {
            Some(value) => self.step_value(value, buffer, is_over, tools),
            None => self.step_between(buffer, is_over, tools),
        }
    }

    fn step_between(&mut self, buffer: &mut String, is_over: bool, tools: &ToolSet) -> Step {
        let blank = buffer.len() - buffer.trim_start().len();
        let blank = buffer.drain(..blank);
        if !self.stray.is_empty() {
            self.stray.extend(blank);
        } else {
            drop(blank);
        }
        if buffer.is_empty() && !is_over {
            return Step::NeedsMore;
        }
        match named_tag(buffer, PARAMETER) {
            Tag::Named(key, bytes) => {
                buffer.drain(..bytes);
                let is_text = tools.is_text(&self.name, &key);
                self.value = Some(Parameter { key, is_text, is_begun: false, searched: 0, doubtful_end: None });
                return Step::Goes;
            }
            Tag::NeedsMore if !is_over => return Step::NeedsMore,
            Tag::NeedsMore | Tag::No => {}
        }
        match ahead(buffer, &[FUNCTION_END, CALL_END, CALL, FUNCTION]) {
            Ahead::Yes => {
                if buffer.starts_with(FUNCTION_END) {
                    buffer.drain(..FUNCTION_END.len());
                }
                self.end_object();
                return Step::Over;
            }
            Ahead::Perhaps if !is_over => return Step::NeedsMore,
            Ahead::Perhaps | Ahead::No => {}
        }
        if buffer.is_empty() {
            self.end_object();
            return Step::Over;
        }
        let first = buffer.chars().next().map_or(0, char::len_utf8);
        let until = buffer.get(first..).and_then(|rest| rest.find('<')).map_or(buffer.len(), |at| first + at);
        self.stray.extend(buffer.drain(..until));
        Step::Goes
    }

    fn step_value(&mut self, mut value: Parameter, buffer: &mut String, is_over: bool, tools: &ToolSet) -> Step {
        if !value.is_begun {
            // The line end behind the tag.
            if !is_over && (buffer.is_empty() || buffer == "\r") {
                self.value = Some(value);
                return Step::NeedsMore;
            }
            let rest = buffer.strip_prefix('\r').unwrap_or(buffer);
            let dropped = rest.strip_prefix('\n').map_or(0, |rest| buffer.len() - rest.len());
            buffer.drain(..dropped);
            self.begin(&mut value);
        }
        let (end, next) = match self.find_end(&mut value, buffer, is_over, tools) {
            End::At(end, next) => (end, next),
            End::Later(safe) => {
                if value.is_text {
                    let text: String = buffer.drain(..safe).collect();
                    text.chars().for_each(|character| push_escaped(&mut self.out, character));
                    value.searched -= safe;
                    value.doubtful_end = value.doubtful_end.map(|at| at - safe);
                }
                self.value = Some(value);
                return Step::NeedsMore;
            }
        };
        let text = without_line_end(buffer.get(..end).unwrap_or_default());
        if value.is_text {
            text.chars().for_each(|character| push_escaped(&mut self.out, character));
            self.out.push('"');
        } else {
            self.out.push_str(&tools.value_of(&self.name, &value.key, text).to_string());
        }
        buffer.drain(..next);
        Step::Goes
    }

    /// Writes what stands before the value.
    fn begin(&mut self, value: &mut Parameter) {
        value.is_begun = true;
        if std::mem::replace(&mut self.has_parameters, true) {
            self.out.push(',');
        }
        self.out.push_str(&serde_json::Value::from(value.key.as_str()).to_string());
        self.out.push_str(if value.is_text { ":\"" } else { ":" });
    }

    fn end_object(&mut self) {
        self.out.push('}');
    }

    fn find_end(&mut self, value: &mut Parameter, buffer: &str, is_over: bool, tools: &ToolSet) -> End {
        while let Some(found) = buffer.get(value.searched..).and_then(|rest| rest.find('<')) {
            let at = value.searched + found;
            let tail = buffer.get(at..).unwrap_or_default();
            match self.sign(tail, &value.key, is_over, tools) {
                Sign::Ends(bytes) => return End::At(at, at + bytes),
                Sign::Nothing => {}
                Sign::Doubtful => value.doubtful_end = value.doubtful_end.or(Some(at)),
                Sign::NeedsMore => {
                    value.searched = at;
                    let safe = value.doubtful_end.unwrap_or(at).min(at);
                    return End::Later(without_line_end(buffer.get(..safe).unwrap_or_default()).len());
                }
            }
            value.searched = at + 1;
        }
        value.searched = buffer.len();
        if !is_over {
            let safe = value.doubtful_end.unwrap_or(buffer.len());
            let safe = buffer.get(..safe).unwrap_or_default();
            return End::Later(without_line_end(safe.strip_suffix('\r').unwrap_or(safe)).len());
        }
        match value.doubtful_end {
            Some(at) => End::At(at, at + PARAMETER_END.len()),
            None => {
                self.is_cut = true;
                End::At(buffer.len(), buffer.len())
            }
        }
    }

    /// What a `<` inside the value of `key` means.
    fn sign(&self, tail: &str, key: &str, is_over: bool, tools: &ToolSet) -> Sign {
        let follows = |tag: &str, followers: &[&str]| {
            let rest = tail.get(tag.len()..).unwrap_or_default().trim_start();
            match ahead(rest, followers) {
                _ if rest.is_empty() && is_over => Ahead::Yes,
                Ahead::Perhaps if is_over => Ahead::No,
                found => found,
            }
        };
        if tail.starts_with(PARAMETER_END) {
            return match follows(PARAMETER_END, &[PARAMETER, FUNCTION_END, CALL_END, FUNCTION, CALL]) {
                Ahead::Yes => Sign::Ends(PARAMETER_END.len()),
                Ahead::Perhaps => Sign::NeedsMore,
                Ahead::No => Sign::Doubtful,
            };
        }
        if tail.starts_with(FUNCTION_END) {
            return match follows(FUNCTION_END, &[CALL_END, CALL, FUNCTION]) {
                Ahead::Yes => Sign::Ends(0),
                Ahead::Perhaps => Sign::NeedsMore,
                Ahead::No => Sign::Nothing,
            };
        }
        if tail.starts_with(CALL_END) {
            return Sign::Ends(0);
        }
        match named_tag(tail, PARAMETER) {
            Tag::Named(other, _) if other != key && tools.has_parameter(&self.name, &other) => return Sign::Ends(0),
            Tag::NeedsMore if !is_over => return Sign::NeedsMore,
            _ => {}
        }
        match ahead(tail, &[PARAMETER_END, FUNCTION_END, CALL_END]) {
            Ahead::Perhaps if !is_over => Sign::NeedsMore,
            _ => Sign::Nothing,
        }
    }
}

/// What a `<` inside a value means.
enum Sign {
    /// The value ends here, and so many bytes of tag with it.
    Ends(usize),
    /// It may end here; the end of the text decides.
    Doubtful,
    NeedsMore,
    Nothing,
}

fn without_line_end(text: &str) -> &str {
    text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text))
}
