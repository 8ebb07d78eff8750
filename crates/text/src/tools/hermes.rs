//! The JSON form of a tool call, `{"name": ..., "arguments": {...}}`, character by character.
//!
//! Contract: arguments are given out as soon as the name is known, and always as valid JSON; a call that cannot be one
//! fails before anything of it was given out. Known as well: arguments before the name, as a string of JSON or under
//! `parameters`, and the call inside a `function` object.
//!
//! Not here: tags around the call, which belong to the reader.

use serde_json::Value;

use super::repair::{Fed, Repair};

/// One call on its way.
#[derive(Clone, Debug)]
pub(super) struct HermesCall {
    /// Everything read, for when it turns out to be no call.
    raw: String,
    place: Place,
    key: String,
    repair: Repair,
    /// Objects open around the one with the name.
    outer: usize,
    name: Option<String>,
    /// Arguments that wait for the name.
    arguments: Option<String>,
    is_begun: bool,
    is_mended: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Start,
    Key,
    KeyText,
    Colon,
    Value,
    InValue,
    /// In arguments that are given out as they come.
    InArguments,
    Over,
}

/// How a call stands after a character.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stand {
    Goes,
    /// The call is whole; the character was part of it.
    Over,
    /// It is none.
    Fails,
}

impl HermesCall {
    pub(super) fn new() -> HermesCall {
        HermesCall {
            raw: String::new(),
            place: Place::Start,
            key: String::new(),
            repair: Repair::new(),
            outer: 0,
            name: None,
            arguments: None,
            is_begun: false,
            is_mended: false,
        }
    }

    /// What was read so far, unless the call has begun to be given out.
    pub(super) fn take_raw(&mut self) -> String {
        std::mem::take(&mut self.raw)
    }

    /// Whether the next character stands inside a string.
    pub(super) fn is_in_text(&self) -> bool {
        matches!(self.place, Place::KeyText | Place::InValue | Place::InArguments) && self.repair.is_in_text()
    }

    pub(super) fn is_mended(&self) -> bool {
        self.is_mended
    }

    /// The name, once, as soon as the call is certain.
    pub(super) fn take_begin(&mut self) -> Option<String> {
        let is_certain = !self.is_begun && matches!(self.place, Place::InArguments | Place::Over);
        if !is_certain {
            return None;
        }
        self.is_begun = true;
        self.raw = String::new();
        self.name.clone()
    }

    /// Arguments to give out, behind [`HermesCall::take_begin`].
    pub(super) fn take_arguments(&mut self) -> String {
        match self.place {
            _ if !self.is_begun => String::new(),
            Place::InArguments => self.repair.take(),
            _ => self.arguments.take().unwrap_or_default(),
        }
    }

    pub(super) fn feed(&mut self, character: char) -> Stand {
        if !self.is_begun {
            self.raw.push(character);
        }
        let stand = self.read(character);
        match stand == Stand::Fails && self.is_begun {
            true => self.end_call(),
            false => stand,
        }
    }

    fn read(&mut self, character: char) -> Stand {
        match self.place {
            Place::InValue | Place::InArguments | Place::KeyText => {
                let fed = self.repair.feed(character);
                match fed {
                    Fed::Taken => Stand::Goes,
                    Fed::Ended | Fed::EndedBefore => {
                        let stand = self.end_value();
                        match (stand, fed) {
                            (Stand::Goes, Fed::EndedBefore) => self.feed_between(character),
                            (stand, _) => stand,
                        }
                    }
                }
            }
            _ => self.feed_between(character),
        }
    }

    fn feed_between(&mut self, character: char) -> Stand {
        if character.is_whitespace() {
            return Stand::Goes;
        }
        match (self.place, character) {
            (Place::Start, '{') => self.place = Place::Key,
            (Place::Key, ',') => {}
            (Place::Key, '}') => return self.end_object(),
            (Place::Key, '"' | '\'') => {
                self.place = Place::KeyText;
                self.repair = Repair::new();
                self.repair.feed(character);
            }
            (Place::Colon, ':') => self.place = Place::Value,
            (Place::Value, '}' | ']' | ',' | ':') => return Stand::Fails,
            (Place::Value, '{') if self.key == "function" && self.name.is_none() && self.outer < 4 => {
                self.outer += 1;
                self.place = Place::Key;
            }
            (Place::Value, _) => {
                let streams = self.is_arguments() && character == '{' && self.name.is_some() && !self.is_begun;
                self.place = if streams { Place::InArguments } else { Place::InValue };
                self.repair = Repair::new();
                if self.repair.feed(character) != Fed::Taken {
                    return self.end_value();
                }
            }
            _ => return Stand::Fails,
        }
        Stand::Goes
    }

    fn is_arguments(&self) -> bool {
        matches!(self.key.as_str(), "arguments" | "parameters")
    }

    /// A key or a value is complete in `repair`.
    fn end_value(&mut self) -> Stand {
        self.is_mended |= self.repair.is_mended();
        let text = self.repair.take();
        match self.place {
            Place::KeyText => {
                self.key = serde_json::from_str(&text).unwrap_or_default();
                self.place = Place::Colon;
                return Stand::Goes;
            }
            Place::InArguments => self.arguments = Some(text),
            _ if self.is_arguments() && self.is_begun => self.is_mended = true,
            _ if self.is_arguments() => match object_of(&text) {
                Some(object) => self.arguments = Some(object),
                None => return Stand::Fails,
            },
            _ if self.key == "name" || (self.key == "function" && self.name.is_none()) => {
                match serde_json::from_str::<Value>(&text) {
                    Ok(Value::String(name)) if !name.trim().is_empty() => self.name = Some(name.trim().to_owned()),
                    _ => return Stand::Fails,
                }
            }
            _ => {}
        }
        self.place = Place::Key;
        Stand::Goes
    }

    fn end_object(&mut self) -> Stand {
        if self.outer > 0 {
            self.outer -= 1;
            return Stand::Goes;
        }
        self.end_call()
    }

    fn end_call(&mut self) -> Stand {
        if self.name.is_none() {
            return Stand::Fails;
        }
        self.place = Place::Over;
        if !self.is_begun && self.arguments.is_none() {
            self.arguments = Some("{}".to_owned());
        }
        Stand::Over
    }

    /// The text or its block ends here: what is open is closed. `is_cut` where nothing says that the call was complete.
    pub(super) fn finish(&mut self, is_cut: bool) -> Stand {
        match self.place {
            Place::Over => return Stand::Over,
            Place::InArguments => {}
            Place::InValue if self.is_arguments() && self.name.is_some() => {}
            Place::Key if !is_cut || self.arguments.is_some() => return self.end_call(),
            _ if self.is_begun => return self.end_call(),
            _ => return Stand::Fails,
        }
        self.repair.finish();
        self.is_mended = true;
        match self.end_value() {
            Stand::Goes => self.end_call(),
            other => other,
        }
    }
}

/// Arguments as an object: as they are, out of a string of JSON, or none at all.
fn object_of(text: &str) -> Option<String> {
    if text.starts_with('{') {
        return Some(text.to_owned());
    }
    let inner = match serde_json::from_str::<Value>(text).ok()? {
        Value::Null => return Some("{}".to_owned()),
        Value::String(inner) => inner,
        _ => return None,
    };
    let inner = inner.trim();
    if inner.is_empty() || inner == "null" {
        return Some("{}".to_owned());
    }
    if !inner.starts_with('{') {
        return None;
    }
    let mut repair = Repair::new();
    let _ended = inner.chars().find(|&character| repair.feed(character) != Fed::Taken);
    repair.finish();
    Some(repair.take())
}
