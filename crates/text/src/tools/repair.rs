//! One JSON value as a model wrote it becomes one valid JSON value, character by character.
//!
//! Contract: whatever comes in, what came out so far and [`Repair::finish`] together are JSON that any reader takes, and
//! valid JSON stays the same value. Mended are: line ends and tabs in strings, unknown escapes, single quotes, bare words,
//! `True`, `None`, commas too many or missing, brackets that are missing at the end or do not match.
//!
//! White space between values is dropped. Not here: what the value means.

/// Deeper lists and objects become `null`; JSON readers give up at 128 levels.
const DEPTH_MAX: usize = 100;

/// What became of a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fed {
    /// It was taken, the value goes on.
    Taken,
    /// It was taken and ended the value.
    Ended,
    /// It ended the value and is not part of it.
    EndedBefore,
}

#[derive(Clone, Debug)]
struct Frame {
    is_object: bool,
    has_items: bool,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A key may come.
    Key,
    /// Behind a key.
    Colon,
    /// A value may come.
    Value,
    /// Behind a value.
    After,
}

#[derive(Clone, Debug)]
enum Token {
    None,
    Text { quote: char, escape: String, high: Option<u32> },
    Word(String),
}

/// The machine for one value.
#[derive(Clone, Debug)]
pub(super) struct Repair {
    stack: Vec<Frame>,
    token: Token,
    /// Levels below the deepest that is kept.
    skipped: usize,
    out: String,
    is_mended: bool,
}

impl Repair {
    pub(super) fn new() -> Repair {
        Repair { stack: Vec::new(), token: Token::None, skipped: 0, out: String::new(), is_mended: false }
    }

    /// Whether anything had to be mended.
    pub(super) fn is_mended(&self) -> bool {
        self.is_mended
    }

    /// Whether the next character would stand inside a string.
    pub(super) fn is_in_text(&self) -> bool {
        matches!(self.token, Token::Text { .. })
    }

    /// Takes what has come out since the last call.
    pub(super) fn take(&mut self) -> String {
        std::mem::take(&mut self.out)
    }

    /// Takes one character.
    pub(super) fn feed(&mut self, character: char) -> Fed {
        match &mut self.token {
            Token::Text { .. } => self.feed_text(character),
            Token::Word(word) => {
                let is_key = self.stack.last().is_some_and(|frame| frame.place == Place::Key);
                let ends = match character {
                    ',' | '}' | ']' | '\n' => true,
                    ':' => is_key,
                    _ => self.stack.is_empty() && character.is_whitespace(),
                };
                if !ends {
                    word.push(character);
                    return Fed::Taken;
                }
                self.end_word();
                match self.stack.is_empty() {
                    true => Fed::EndedBefore,
                    false => self.feed_between(character),
                }
            }
            Token::None => self.feed_between(character),
        }
    }

    /// Ends the value wherever it stands.
    pub(super) fn finish(&mut self) {
        match std::mem::replace(&mut self.token, Token::None) {
            Token::None => {}
            Token::Word(word) => {
                self.token = Token::Word(word);
                self.end_word();
            }
            Token::Text { high, .. } => {
                if high.is_some() {
                    self.out.push('\u{FFFD}');
                }
                self.is_mended = true;
                self.out.push('"');
                self.after_item();
            }
        }
        self.is_mended |= !self.stack.is_empty();
        while !self.stack.is_empty() {
            self.close();
        }
    }

    fn feed_between(&mut self, character: char) -> Fed {
        if character.is_whitespace() {
            return Fed::Taken;
        }
        if self.skipped > 0 {
            return self.feed_skipped(character);
        }
        match character {
            ',' => self.comma(),
            ':' => self.colon(),
            '}' | ']' => {
                self.bracket(character == '}');
                if self.stack.is_empty() {
                    return Fed::Ended;
                }
            }
            '{' | '[' if !self.is_key_next() => self.open(character == '{'),
            '"' | '\'' => {
                self.begin_item();
                self.is_mended |= character == '\'';
                self.out.push('"');
                self.token = Token::Text { quote: character, escape: String::new(), high: None };
            }
            _ => {
                self.begin_item();
                self.token = Token::Word(character.to_string());
            }
        }
        Fed::Taken
    }

    fn feed_skipped(&mut self, character: char) -> Fed {
        match character {
            '{' | '[' => self.skipped += 1,
            '}' | ']' => {
                self.skipped -= 1;
                if self.skipped == 0 {
                    self.after_item();
                }
            }
            _ => {}
        }
        Fed::Taken
    }

    fn is_key_next(&self) -> bool {
        self.stack.last().is_some_and(|frame| frame.is_object && matches!(frame.place, Place::Key | Place::After))
    }

    fn comma(&mut self) {
        let Some(frame) = self.stack.last_mut() else { return };
        match (frame.place, frame.is_object) {
            (Place::After, true) => frame.place = Place::Key,
            (Place::After, false) => frame.place = Place::Value,
            (Place::Colon, _) | (Place::Value, true) => {
                self.missing_value();
                self.comma();
            }
            (Place::Key, _) | (Place::Value, false) => self.is_mended = true,
        }
    }

    fn colon(&mut self) {
        match self.stack.last_mut() {
            Some(frame) if frame.place == Place::Colon => {
                frame.place = Place::Value;
                self.out.push(':');
            }
            _ => self.is_mended = true,
        }
    }

    fn bracket(&mut self, is_object: bool) {
        if !self.stack.iter().any(|frame| frame.is_object == is_object) {
            self.is_mended = true;
            return;
        }
        while let Some(frame) = self.stack.last() {
            let is_partner = frame.is_object == is_object;
            self.is_mended |= !is_partner;
            self.close();
            if is_partner {
                return;
            }
        }
    }

    fn open(&mut self, is_object: bool) {
        self.begin_item();
        if self.stack.len() >= DEPTH_MAX {
            self.out.push_str("null");
            self.skipped = 1;
            self.is_mended = true;
            return;
        }
        self.out.push(if is_object { '{' } else { '[' });
        let place = if is_object { Place::Key } else { Place::Value };
        self.stack.push(Frame { is_object, has_items: false, place });
    }

    /// Closes the innermost list or object.
    fn close(&mut self) {
        match self.stack.last().map(|frame| (frame.place, frame.is_object, frame.has_items)) {
            Some((Place::Colon, ..) | (Place::Value, true, _)) => self.missing_value(),
            Some((Place::Key, _, true) | (Place::Value, false, true)) => self.is_mended = true,
            _ => {}
        }
        if let Some(frame) = self.stack.pop() {
            self.out.push(if frame.is_object { '}' } else { ']' });
        }
        self.after_item();
    }

    /// A key without its value.
    fn missing_value(&mut self) {
        self.is_mended = true;
        if let Some(frame) = self.stack.last_mut() {
            self.out.push_str(if frame.place == Place::Colon { ":null" } else { "null" });
            frame.place = Place::After;
        }
    }

    /// Writes what stands before a key or a value.
    fn begin_item(&mut self) {
        let Some(frame) = self.stack.last_mut() else { return };
        if frame.place == Place::After {
            self.is_mended = true;
            frame.place = if frame.is_object { Place::Key } else { Place::Value };
        }
        match frame.place {
            Place::Colon => {
                self.is_mended = true;
                self.out.push(':');
                frame.place = Place::Value;
            }
            Place::Key | Place::Value => {
                if frame.has_items && (frame.place == Place::Key || !frame.is_object) {
                    self.out.push(',');
                }
                frame.has_items = true;
            }
            Place::After => {}
        }
    }

    /// A key or a value is written.
    fn after_item(&mut self) {
        if let Some(frame) = self.stack.last_mut() {
            frame.place = if frame.place == Place::Key { Place::Colon } else { Place::After };
        }
    }

    fn end_word(&mut self) {
        let Token::Word(word) = std::mem::replace(&mut self.token, Token::None) else { return };
        let word = word.trim_end();
        let is_key = self.stack.last().is_some_and(|frame| frame.place == Place::Key);
        let literal = match word {
            "True" => "true",
            "False" => "false",
            "None" => "null",
            word => word,
        };
        let is_valid = matches!(
            serde_json::from_str::<serde_json::Value>(literal),
            Ok(serde_json::Value::Null | serde_json::Value::Bool(_) | serde_json::Value::Number(_))
        );
        self.is_mended |= is_key || !is_valid || literal != word;
        match is_valid && !is_key {
            true => self.out.push_str(literal),
            false => self.out.push_str(&serde_json::Value::from(word).to_string()),
        }
        self.after_item();
    }

    fn feed_text(&mut self, character: char) -> Fed {
        let Token::Text { quote, escape, high } = &mut self.token else { return Fed::Taken };
        if escape.len() > 1 && !character.is_ascii_hexdigit() {
            // No number: the letters stand for themselves.
            self.is_mended = true;
            if high.take().is_some() {
                self.out.push('\u{FFFD}');
            }
            self.out.push('\\');
            self.out.push_str(&std::mem::take(escape));
        }
        if !escape.is_empty() {
            self.is_mended |= feed_escape(&mut self.out, escape, high, character);
            return Fed::Taken;
        }
        if character == '\\' {
            escape.push('\\');
            return Fed::Taken;
        }
        if high.take().is_some() {
            self.is_mended = true;
            self.out.push('\u{FFFD}');
        }
        if character == *quote {
            self.out.push('"');
            self.token = Token::None;
            self.after_item();
            return if self.stack.is_empty() { Fed::Ended } else { Fed::Taken };
        }
        self.is_mended |= (character as u32) < 0x20;
        push_escaped(&mut self.out, character);
        Fed::Taken
    }
}

/// Writes a character as it stands inside a JSON string.
pub(super) fn push_escaped(out: &mut String, character: char) {
    match character {
        '"' => out.push_str("\\\""),
        '\\' => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        control if (control as u32) < 0x20 => out.push_str(&format!("\\u{:04x}", control as u32)),
        other => out.push(other),
    }
}

/// Goes on with an escape; `high` is the first half of a pair that came before. True where something was mended.
fn feed_escape(out: &mut String, escape: &mut String, high: &mut Option<u32>, character: char) -> bool {
    if escape.len() == 1 {
        if character == 'u' {
            escape.push('u');
            return false;
        }
        escape.clear();
        let lost_half = high.take().is_some();
        if lost_half {
            out.push('\u{FFFD}');
        }
        match character {
            '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => {
                out.push('\\');
                out.push(character);
                return lost_half;
            }
            '\'' => out.push('\''),
            other => {
                out.push_str("\\\\");
                push_escaped(out, other);
            }
        }
        return true;
    }
    escape.push(character);
    if escape.len() < 6 {
        return false;
    }
    let code = escape.get(2..).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0xFFFD);
    escape.clear();
    let (before, is_high, is_low) = (high.take(), (0xD800..0xDC00).contains(&code), (0xDC00..0xE000).contains(&code));
    match (before, is_low) {
        (Some(first), true) => {
            let joined = 0x10000 + ((first - 0xD800) << 10) + (code - 0xDC00);
            push_escaped(out, char::from_u32(joined).unwrap_or('\u{FFFD}'));
            false
        }
        (lost, _) => {
            if lost.is_some() {
                out.push('\u{FFFD}');
            }
            match is_high {
                true => *high = Some(code),
                false => push_escaped(out, char::from_u32(code).unwrap_or('\u{FFFD}')),
            }
            lost.is_some() || is_low
        }
    }
}
