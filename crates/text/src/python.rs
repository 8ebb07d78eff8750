//! Values written the way Python writes them: `str`, `repr` and `json.dumps`.
//!
//! Chat templates were written against Python; a model was trained on prompts that say `True`, `None`, `1e-07` and
//! `{"a": 1}`. Everything goes through a [`Sink`], which pays for each byte from the template's budget: a small value
//! that contains itself many times over may spell out to terabytes.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

/// Deepest nesting of lists and objects that is written; Python's own limit is about 1000.
const DEPTH_MAX: usize = 120;

/// A string that grows at the expense of the template's budget.
pub(crate) struct Sink<'a, 'template, 'env> {
    state: &'a State<'template, 'env>,
    text: String,
    /// Bytes that have been paid for.
    paid_bytes: usize,
}

impl<'a, 'template, 'env> Sink<'a, 'template, 'env> {
    /// An empty string on the budget of a running template.
    pub(crate) fn new(state: &'a State<'template, 'env>) -> Self {
        Sink { state, text: String::new(), paid_bytes: 0 }
    }

    /// The finished string.
    pub(crate) fn into_string(self) -> String {
        self.text
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        if self.text.len() + text.len() > self.paid_bytes {
            // One step of budget pays for 64 bytes, as in the template engine itself.
            let steps = (self.text.len() + text.len() - self.paid_bytes) / 64 + 1;
            self.state.consume_fuel(steps as u64)?;
            self.paid_bytes += steps * 64;
        }
        self.text.push_str(text);
        Ok(())
    }
}

/// `str(value)`.
pub(crate) fn write_str(sink: &mut Sink, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(()),
        ValueKind::String => sink.push(value.as_str().unwrap_or_default()),
        _ => write_repr(sink, value, 0),
    }
}

/// `repr(value)`.
fn write_repr(sink: &mut Sink, value: &Value, depth: usize) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::None => sink.push("None"),
        ValueKind::Bool => sink.push(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => sink.push(&number(value, NumberStyle::Python)),
        ValueKind::String => sink.push(&quoted(value.as_str().unwrap_or_default())),
        ValueKind::Seq => {
            let (open, close) = if value.is_tuple() { ("(", ")") } else { ("[", "]") };
            sink.push(open)?;
            let mut count = 0;
            for item in value.try_iter()?.checked() {
                if count > 0 {
                    sink.push(", ")?;
                }
                write_repr(sink, &item?, depth + 1)?;
                count += 1;
            }
            if count == 1 && value.is_tuple() {
                sink.push(",")?;
            }
            sink.push(close)
        }
        ValueKind::Map => {
            sink.push("{")?;
            for (index, key) in value.try_iter()?.checked().enumerate() {
                let key = key?;
                if index > 0 {
                    sink.push(", ")?;
                }
                write_repr(sink, &key, depth + 1)?;
                sink.push(": ")?;
                write_repr(sink, &value.get_item(&key)?, depth + 1)?;
            }
            sink.push("}")
        }
        _ => sink.push(&value.to_string()),
    }
}

/// A string literal of Python, single quotes preferred.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if character == quote => {
                out.push('\\');
                out.push(character);
            }
            _ if character.is_control() || character == '\u{AD}' => {
                out.push_str(&format!("\\x{:02x}", u32::from(character)));
            }
            '\u{2028}' | '\u{2029}' | '\u{200B}'..='\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{FEFF}' => {
                out.push_str(&format!("\\u{:04x}", u32::from(character)));
            }
            '\u{A0}' | '\u{3000}' | '\u{2000}'..='\u{200A}' | '\u{202F}' | '\u{205F}' | '\u{1680}' => {
                let code = u32::from(character);
                out.push_str(&if code < 0x100 { format!("\\x{code:02x}") } else { format!("\\u{code:04x}") });
            }
            _ => out.push(character),
        }
    }
    out.push(quote);
    out
}

/// How numbers that JSON does not know are written.
#[derive(Clone, Copy)]
enum NumberStyle {
    /// `inf`, `nan`
    Python,
    /// `Infinity`, `NaN`
    Json,
}

fn number(value: &Value, style: NumberStyle) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(float) => float_text(float, style),
        Err(_) => value.to_string(),
    }
}

/// The shortest digits that read back as the same float, with an exponent below 1e-4 and from 1e16 on.
fn float_text(float: f64, style: NumberStyle) -> String {
    if float.is_nan() {
        return match style {
            NumberStyle::Python => "nan".to_owned(),
            NumberStyle::Json => "NaN".to_owned(),
        };
    }
    if float.is_infinite() {
        let word = match style {
            NumberStyle::Python => "inf",
            NumberStyle::Json => "Infinity",
        };
        return format!("{}{word}", if float < 0.0 { "-" } else { "" });
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = float.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// How `json.dumps` lays its text out.
pub(crate) struct JsonStyle {
    /// What each level of an indented layout starts with; `None` writes one line.
    pub(crate) indent: Option<String>,
    /// Between items.
    pub(crate) item_separator: String,
    /// Between key and value.
    pub(crate) key_separator: String,
    /// Whether characters beyond ASCII are escaped.
    pub(crate) ensure_ascii: bool,
    /// Whether keys are sorted.
    pub(crate) sort_keys: bool,
}

/// `json.dumps(value)`.
pub(crate) fn write_json(sink: &mut Sink, value: &Value, style: &JsonStyle, depth: usize) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::None => sink.push("null"),
        ValueKind::Bool => sink.push(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => sink.push(&number(value, NumberStyle::Json)),
        ValueKind::String => sink.push(&json_string(value.as_str().unwrap_or_default(), style.ensure_ascii)),
        ValueKind::Seq => {
            let mut first = true;
            sink.push("[")?;
            for item in value.try_iter()?.checked() {
                json_separate(sink, style, depth + 1, &mut first)?;
                write_json(sink, &item?, style, depth + 1)?;
            }
            json_close(sink, style, depth, first, "]")
        }
        ValueKind::Map => {
            let mut keys = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
            if style.sort_keys {
                keys.sort();
            }
            let mut first = true;
            sink.push("{")?;
            for key in keys {
                json_separate(sink, style, depth + 1, &mut first)?;
                sink.push(&json_string(&json_key(&key)?, style.ensure_ascii))?;
                sink.push(&style.key_separator)?;
                write_json(sink, &value.get_item(&key)?, style, depth + 1)?;
            }
            json_close(sink, style, depth, first, "}")
        }
        kind => Err(Error::new(ErrorKind::InvalidOperation, format!("tojson cannot write a value of type {kind}"))),
    }
}

/// What stands before an item: a separator unless it is the first, and in an indented layout a new line.
fn json_separate(sink: &mut Sink, style: &JsonStyle, depth: usize, first: &mut bool) -> Result<(), Error> {
    if !std::mem::take(first) {
        // Python drops the space after the comma where a new line follows.
        match style.indent {
            Some(_) => sink.push(style.item_separator.trim_end_matches(' '))?,
            None => sink.push(&style.item_separator)?,
        }
    }
    json_new_line(sink, style, depth)
}

fn json_close(sink: &mut Sink, style: &JsonStyle, depth: usize, empty: bool, close: &str) -> Result<(), Error> {
    if !empty {
        json_new_line(sink, style, depth)?;
    }
    sink.push(close)
}

fn json_new_line(sink: &mut Sink, style: &JsonStyle, depth: usize) -> Result<(), Error> {
    let Some(indent) = &style.indent else { return Ok(()) };
    sink.push("\n")?;
    for _ in 0..depth {
        sink.push(indent)?;
    }
    Ok(())
}

/// Keys that are not strings become strings, as in Python.
fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(number(key, NumberStyle::Json)),
        kind => Err(Error::new(ErrorKind::InvalidOperation, format!("tojson cannot use a {kind} as a key"))),
    }
}

fn json_string(text: &str, ensure_ascii: bool) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{C}' => out.push_str("\\f"),
            '\0'..='\u{1F}' => out.push_str(&format!("\\u{:04x}", u32::from(character))),
            '\u{7F}'.. if ensure_ascii && character != '\u{7F}' => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            _ => out.push(character),
        }
    }
    out.push('"');
    out
}

fn check_depth(depth: usize) -> Result<(), Error> {
    if depth > DEPTH_MAX {
        let detail = format!("a value is nested more than {DEPTH_MAX} levels deep");
        return Err(Error::new(ErrorKind::InvalidOperation, detail));
    }
    Ok(())
}

/// What `str.strip()` removes: Unicode white space and the four separators U+001C to U+001F.
pub(crate) fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1C}'..='\u{1F}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_as_cpython_prints_them() {
        for (float, text) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (1e-7, "1e-07"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e300, "1.5e+300"),
            (5e-324, "5e-324"),
            (f64::INFINITY, "inf"),
            (f64::NEG_INFINITY, "-inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(float_text(float, NumberStyle::Python), text);
        }
        assert_eq!(float_text(f64::NAN, NumberStyle::Json), "NaN");
        assert_eq!(float_text(f64::NEG_INFINITY, NumberStyle::Json), "-Infinity");
    }

    #[test]
    fn strings_as_cpython_quotes_them() {
        assert_eq!(quoted("a'b"), "\"a'b\"");
        assert_eq!(quoted("a'\"b"), "'a\\'\"b'");
        assert_eq!(quoted("\n\\\u{7f}é中\u{a0}"), "'\\n\\\\\\x7fé中\\xa0'");
        assert_eq!(json_string("\u{1}\"/\u{7f}é😀", false), "\"\\u0001\\\"/\u{7f}é😀\"");
        assert_eq!(json_string("é😀\u{7f}", true), "\"\\u00e9\\ud83d\\ude00\u{7f}\"");
    }
}
