//! Takes tool calls out of an answer while it comes, in the forms of all Qwen generations.
//!
//! Contract: calls stand in `<tool_call>`, as a JSON object with `name` and `arguments` (Qwen2.5, Qwen3) or as
//! `<function=NAME>` with `<parameter=KEY>` (Qwen3-Coder, Qwen3.5). Tags may be missing at an end, a call may lack its
//! opening. The pieces of a call's arguments together are JSON. What is no call after all comes out as text: nothing is
//! lost, and nothing is an error. Any cut of the text into pieces gives the same result. Not here: thoughts.

use serde_json::{Map, Value};

use crate::{reasoning::overlap, tool_json};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";

/// A part of an answer that may call tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolText {
    /// What stands outside calls.
    Content(String),
    /// A call begins; calls are counted from 0.
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
#[derive(Clone, Debug)]
pub struct ToolParser {
    /// Parameters of each declared tool: name to schema.
    schemas: Map<String, Value>,
    state: State,
    /// Text that is not certain yet.
    held: String,
    calls: usize,
    /// The tool of the latest call.
    tool: String,
    parts: Vec<ToolText>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but white space has come.
    Start,
    Text,
    /// Inside a call whose form is not known; `tagged` if it was opened.
    Call {
        tagged: bool,
    },
    /// In a JSON call; its name has been told, and so many bytes of its arguments' text.
    Json {
        tagged: bool,
        told: Option<usize>,
    },
    /// In a call in XML form with so many parameters told.
    Xml {
        parameters: usize,
    },
    /// Behind a call.
    After,
}

impl ToolParser {
    /// For an answer to a request that declares `tools`, as OpenAI has them.
    pub fn new(tools: &[Value]) -> ToolParser {
        let function = |tool: &Value| {
            let function = tool.get("function").unwrap_or(tool);
            Some((function.get("name")?.as_str()?.to_owned(), function.get("parameters").cloned().unwrap_or_default()))
        };
        let schemas = tools.iter().filter_map(function).collect();
        ToolParser {
            schemas,
            state: State::Start,
            held: String::new(),
            calls: 0,
            tool: String::new(),
            parts: Vec::new(),
        }
    }

    /// Calls so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// What a piece of text makes certain.
    pub fn push(&mut self, text: &str) -> Vec<ToolText> {
        self.held.push_str(text);
        while self.step(false) {}
        std::mem::take(&mut self.parts)
    }

    /// The end of the answer: what was held back comes out.
    pub fn finish(mut self) -> Vec<ToolText> {
        while self.step(true) {}
        if !self.held.is_empty() && self.state != State::After {
            let rest = std::mem::take(&mut self.held);
            self.content(&rest);
        }
        self.parts
    }

    /// Goes on as far as is certain; whether more may be. `last` if nothing more comes.
    fn step(&mut self, last: bool) -> bool {
        match self.state {
            State::Start => {
                let start = self.held.trim_start();
                if start.is_empty() {
                    return false;
                }
                self.state = if start.starts_with('{') { State::Call { tagged: false } } else { State::Text };
                true
            }
            State::Text => self.text(last),
            State::Call { tagged } => self.call(tagged, last),
            State::Json { tagged, told } => self.json(tagged, told, last),
            State::Xml { parameters } => self.xml(parameters, last),
            State::After => {
                self.held = self.held.trim_start().to_owned();
                if let Some(rest) = self.held.strip_prefix(CLOSE) {
                    self.held = rest.to_owned();
                    return true;
                }
                if !last && CLOSE.starts_with(self.held.as_str()) {
                    return false;
                }
                self.state = if self.held.is_empty() { State::After } else { State::Text };
                !self.held.is_empty()
            }
        }
    }

    fn text(&mut self, last: bool) -> bool {
        let open = self.held.find(OPEN).map(|at| (at, OPEN.len()));
        // An opening may be missing before a function.
        let bare = self.held.find(FUNCTION).map(|at| (at, 0));
        if let Some((at, tag)) = open.into_iter().chain(bare).min() {
            let before = self.held[..at].trim_end().to_owned();
            self.content(&before);
            self.held = self.held[at + tag..].to_owned();
            self.state = State::Call { tagged: tag > 0 };
            return true;
        }
        if last {
            return false;
        }
        let tag = overlap(&self.held, OPEN).max(overlap(&self.held, FUNCTION));
        // White space before a call belongs to nobody.
        let certain = self.held[..self.held.len() - tag].trim_end().len();
        let text: String = self.held.drain(..certain).collect();
        self.content(&text);
        false
    }

    fn call(&mut self, tagged: bool, last: bool) -> bool {
        let start = self.held.trim_start();
        if start.starts_with('{') {
            self.held = start.to_owned();
            self.state = State::Json { tagged, told: None };
            return true;
        }
        if let Some(rest) = start.strip_prefix(FUNCTION) {
            let Some(end) = rest.find('>') else { return last && self.give_up(tagged) };
            let name = rest[..end].trim().trim_matches('"').to_owned();
            self.held = rest[end + 1..].to_owned();
            self.begin(name);
            self.state = State::Xml { parameters: 0 };
            return true;
        }
        let undecided = FUNCTION.starts_with(start);
        if undecided && !last { false } else { self.give_up(tagged) }
    }

    /// What was taken for a call is text.
    fn give_up(&mut self, tagged: bool) -> bool {
        if tagged {
            self.content(OPEN);
        }
        let rest = std::mem::take(&mut self.held);
        // Up to where another call may begin.
        let next = rest.find(OPEN).unwrap_or(rest.len()).max(usize::from(!tagged).min(rest.len()));
        let next = (next..=rest.len()).find(|&at| rest.is_char_boundary(at)).unwrap_or(rest.len());
        self.content(&rest[..next]);
        self.held = rest[next..].to_owned();
        self.state = State::Text;
        !self.held.is_empty()
    }

    fn json(&mut self, tagged: bool, told: Option<usize>, last: bool) -> bool {
        let scanned = tool_json::scan(&self.held);
        let name = scanned.name.and_then(|(from, to)| serde_json::from_str::<String>(&self.held[from..to]).ok());
        let Some(name) = name else {
            // Without its tags, an object without a name is what was asked for: JSON.
            let over = scanned.broken || scanned.end.is_some() || last;
            return over && self.give_up(tagged);
        };
        if !tagged && !self.schemas.contains_key(&name) {
            return self.give_up(false);
        }
        let (from, to) = scanned.arguments.unwrap_or((self.held.len(), None));
        let is_object = self.held[from..].starts_with('{');
        let mut done = told.unwrap_or(0);
        // An object goes out as it comes; a string that spells one, when it is whole.
        if told.is_none() && (is_object || scanned.end.is_some()) {
            self.begin(name);
        }
        let known = told.is_some() || is_object || scanned.end.is_some();
        if known && is_object {
            let text = self.held[from + done..to.unwrap_or(self.held.len())].to_owned();
            done += text.len();
            self.arguments(&text);
        } else if known {
            let text = to.map_or("{}", |to| &self.held[from..to]);
            let text = match serde_json::from_str::<Value>(text) {
                Ok(Value::String(spelled)) => spelled,
                Ok(Value::Null) | Err(_) => "{}".to_owned(),
                Ok(other) => other.to_string(),
            };
            self.arguments(&text);
        }
        if let Some(end) = scanned.end {
            self.held.drain(..end);
            self.state = State::After;
            return true;
        }
        if known {
            self.state = State::Json { tagged, told: Some(done) };
        }
        match (last, known) {
            (true, true) => {
                // Cut off in the middle: what there is has been told.
                self.held.clear();
                self.state = State::After;
                false
            }
            (true, false) => self.give_up(tagged),
            (false, _) => false,
        }
    }

    fn xml(&mut self, parameters: usize, last: bool) -> bool {
        self.held = self.held.trim_start().to_owned();
        for end in [FUNCTION_END, CLOSE] {
            if let Some(rest) = self.held.strip_prefix(end) {
                self.held = rest.to_owned();
                self.end_xml(parameters);
                return true;
            }
        }
        if let Some(rest) = self.held.strip_prefix(PARAMETER) {
            let ends = |text: &str| {
                let found = [PARAMETER_END, PARAMETER, FUNCTION_END, CLOSE].map(|tag| (text.find(tag), tag));
                found.into_iter().filter_map(|(at, tag)| Some((at?, tag))).min()
            };
            let Some(name_end) = rest.find('>') else { return last && self.cut_xml(parameters) };
            let value = &rest[name_end + 1..];
            let (end, tag) = match ends(value) {
                Some((end, tag)) => (end, tag),
                None if last => (value.len(), ""),
                None => return false,
            };
            let key = rest[..name_end].trim().trim_matches('"').to_owned();
            let text = value[..end].to_owned();
            let skip = if tag == PARAMETER_END { tag.len() } else { 0 };
            self.held = value[end + skip..].to_owned();
            self.parameter(parameters, &key, &text);
            self.state = State::Xml { parameters: parameters + 1 };
            return true;
        }
        let undecided = [FUNCTION_END, CLOSE, PARAMETER].iter().any(|tag| tag.starts_with(self.held.as_str()));
        if undecided && !last {
            return false;
        }
        // The end is missing, or something stands here that belongs to nobody.
        self.cut_xml(parameters)
    }

    /// A call in XML form ends without its tag.
    fn cut_xml(&mut self, parameters: usize) -> bool {
        self.end_xml(parameters);
        !self.held.is_empty()
    }

    fn end_xml(&mut self, parameters: usize) {
        self.arguments(if parameters == 0 { "{}" } else { "}" });
        self.state = State::After;
    }

    /// Tells a parameter of a call in XML form, as a value of the type that the tool's schema has for it.
    fn parameter(&mut self, before: usize, key: &str, text: &str) {
        let text = text.strip_prefix('\n').unwrap_or(text);
        let text = text.strip_suffix('\n').unwrap_or(text);
        let value = typed(text, self.schemas.get(&self.tool).and_then(|schema| schema.get("properties")?.get(key)));
        let separator = if before == 0 { "{" } else { ", " };
        let text = format!("{separator}{}: {value}", Value::String(key.to_owned()));
        self.arguments(&text);
    }

    fn begin(&mut self, name: String) {
        self.tool.clone_from(&name);
        self.parts.push(ToolText::Call { index: self.calls, name });
        self.calls += 1;
    }

    fn arguments(&mut self, text: &str) {
        if !text.is_empty() {
            self.parts.push(ToolText::Arguments { index: self.calls - 1, text: text.to_owned() });
        }
    }

    fn content(&mut self, text: &str) {
        if !text.is_empty() {
            self.parts.push(ToolText::Content(text.to_owned()));
        }
    }
}

/// A parameter's text as JSON: of a type that the schema allows, or else a string.
fn typed(text: &str, schema: Option<&Value>) -> Value {
    let mut types = Vec::new();
    if let Some(schema) = schema {
        types_of(schema, &mut types);
    }
    let trimmed = text.trim();
    let parsed = match trimmed {
        "True" => Some(Value::Bool(true)),
        "False" => Some(Value::Bool(false)),
        "None" => Some(Value::Null),
        other => serde_json::from_str(other).ok(),
    };
    let fits = |value: &Value| {
        types.iter().any(|t| match t.as_str() {
            "integer" => value.is_i64() || value.is_u64(),
            "number" => value.is_number(),
            "boolean" => value.is_boolean(),
            "object" => value.is_object(),
            "array" => value.is_array(),
            "null" => value.is_null(),
            _ => false,
        })
    };
    parsed.filter(fits).unwrap_or_else(|| Value::String(text.to_owned()))
}

/// The types that a schema allows, through its alternatives.
fn types_of(schema: &Value, types: &mut Vec<String>) {
    match schema.get("type") {
        Some(Value::String(name)) => types.push(name.clone()),
        Some(Value::Array(names)) => types.extend(names.iter().filter_map(Value::as_str).map(str::to_owned)),
        _ => {}
    }
    for key in ["anyOf", "oneOf"] {
        let alternatives = schema.get(key).and_then(Value::as_array);
        alternatives.into_iter().flatten().take(32).for_each(|schema| types_of(schema, types));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tools() -> Vec<Value> {
        let properties = json!({
            "city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"},
            "tags": {"anyOf": [{"type": "array"}, {"type": "null"}]},
        });
        let function = json!({"name": "weather", "parameters": {"type": "object", "properties": properties}});
        vec![
            json!({"type": "function", "function": function}),
            json!({"type": "function", "function": {"name": "now"}}),
        ]
    }

    /// (content, calls), the same for every cut.
    fn read(text: &str) -> (String, Vec<(String, String)>) {
        let chars: Vec<char> = text.chars().collect();
        let mut results: Vec<(String, Vec<(String, String)>)> = (1..=chars.len().max(1))
            .map(|size| {
                let mut parser = ToolParser::new(&tools());
                let mut parts: Vec<ToolText> =
                    chars.chunks(size).flat_map(|piece| parser.push(&piece.iter().collect::<String>())).collect();
                parts.extend(parser.finish());
                let (mut content, mut calls) = (String::new(), Vec::<(String, String)>::new());
                for part in parts {
                    match part {
                        ToolText::Content(text) => content.push_str(&text),
                        ToolText::Call { index, name } => {
                            assert_eq!(index, calls.len());
                            calls.push((name, String::new()));
                        }
                        ToolText::Arguments { index, text } => {
                            assert_eq!(index + 1, calls.len());
                            calls[index].1.push_str(&text);
                        }
                    }
                }
                (content, calls)
            })
            .collect();
        results.dedup();
        assert_eq!(results.len(), 1, "the cut decides: {results:?}");
        results.remove(0)
    }

    fn check(text: &str, content: &str, calls: &[(&str, Value)]) {
        let (found, found_calls) = read(text);
        assert_eq!(found, content, "{text}");
        let found_calls: Vec<(&str, Value)> = found_calls
            .iter()
            .map(|(name, arguments)| (name.as_str(), serde_json::from_str(arguments).expect(arguments)))
            .collect();
        assert_eq!(found_calls, calls, "{text}");
    }

    #[test]
    fn json_calls() {
        let call = r#"{"name": "weather", "arguments": {"city": "पुणे {\"}", "days": 2}}"#;
        let value = json!({"city": "पुणे {\"}", "days": 2});
        check(&format!("<tool_call>\n{call}\n</tool_call>"), "", &[("weather", value.clone())]);
        check(&format!("Let me look.\n<tool_call>{call}"), "Let me look.", &[("weather", value.clone())]);
        check(call, "", &[("weather", value.clone())]);
        let two = format!("<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{{\"name\": \"now\"}}\n</tool_call>\n");
        check(&two, "", &[("weather", value), ("now", json!({}))]);
        let spelled = r#"<tool_call>{"arguments": "{\"days\": 1}", "name": "weather"}</tool_call> Done."#;
        check(spelled, "Done.", &[("weather", json!({"days": 1}))]);
    }

    #[test]
    fn xml_calls() {
        let text = "I look.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nPune\n12\n</parameter>\n<parameter=days>\n3\n\
            </parameter>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=tags>\n[1, \"a\"]\n</parameter>\n</function>\n</tool_call>";
        let value = json!({"city": "Pune\n12", "days": 3, "exact": true, "tags": [1, "a"]});
        check(text, "I look.", &[("weather", value)]);
        let loose = "<function=weather>\n<parameter=city>Pune\n<parameter=days>\nsoon\n</function>\n<function=now>\n</function>";
        check(loose, "", &[("weather", json!({"city": "Pune", "days": "soon"})), ("now", json!({}))]);
        check("<tool_call>\n<function=now>\n</tool_call>\nSo.", "So.", &[("now", json!({}))]);
        check("<tool_call>\n<function=weather>\n<parameter=city>\nPu", "", &[("weather", json!({"city": "Pu"}))]);
    }

    #[test]
    fn what_is_no_call_is_text() {
        for text in [
            "Plain text, with < and <tool and {braces}.",
            "{\"answer\": [1, 2]}",
            "{\"name\": \"Asha\", \"age\": 3} is a record.",
            "<tool_call>\nnothing\n</tool_call>",
            "<tool_call>{\"nam\": 1}</tool_call> and more",
            "{not json",
            "<tool_cal",
            "",
        ] {
            let (content, calls) = read(text);
            assert_eq!((content.as_str(), calls.len()), (text, 0));
        }
    }
}
