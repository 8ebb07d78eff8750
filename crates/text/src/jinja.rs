//! The template engine, set up as transformers sets up Jinja: block trimming, loop controls, its filters and functions,
//! Python's string methods, Python's spelling of values.
//!
//! A template is a program from a downloaded file: no files, no other templates, a budget ([`fuel`](fuel_for)) and a
//! recursion limit. What a rendered conversation looks like is not decided here.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use minijinja_contrib::pycompat;

use crate::clock;
use crate::python::{self, JsonStyle, Sink};

/// The name of the only template of an environment.
pub(crate) const TEMPLATE: &str = "chat_template";

/// Nesting of macros, loops and blocks. A macro call counts several levels; Qwen's templates stay below ten calls.
const RECURSION_MAX: usize = 150;

/// Steps that any conversation may use: some 20 ms of work, 25 MB of text.
const FUEL_BASE: u64 = 400_000;
/// Steps per value of the input: templates visit every message a few times with about a hundred instructions.
const FUEL_PER_VALUE: u64 = 500;
/// Most steps. A value can be nested one level deeper in six steps, and dropping a level takes up to 300 bytes of stack,
/// so that this many fit into the stack that [`on_deep_stack`] provides.
const FUEL_MAX: u64 = 8_000_000;
const STACK_BYTES: usize = 512 << 20;

/// An exception that the template raised itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

/// The budget for a conversation of that many JSON values and bytes of text. One step pays for an instruction or for 64
/// bytes, and templates copy the text a dozen times, so one step a byte leaves a margin of five.
pub(crate) fn fuel_for(values: usize, text_bytes: usize) -> u64 {
    let values = (values as u64).saturating_mul(FUEL_PER_VALUE);
    FUEL_BASE.saturating_add(values).saturating_add(text_bytes as u64).min(FUEL_MAX)
}

/// Longest run of a template. Fuel does not count what one operation does inside: comparing lists that hold each other
/// twice, sixty levels deep, is one step. A thread cannot be ended from outside, so such a template is left to itself;
/// whoever asked gets an error, and the thread ends with the program.
const TIME_MAX: Duration = Duration::from_secs(5);

/// Runs the template engine where its recursion over syntax and values cannot overflow the stack, and where it cannot hold
/// up its caller for ever. Only the pages that are really used cost memory.
pub(crate) fn on_deep_stack<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> std::io::Result<T> {
    let (done, result) = channel();
    let thread = std::thread::Builder::new().name("chat-template".to_owned()).stack_size(STACK_BYTES);
    // The receiver is gone when the time was up; nobody wants the result then.
    let thread = thread.spawn(move || drop(done.send(work())))?;
    match result.recv_timeout(TIME_MAX) {
        Ok(result) => {
            // The result is there; what is left of the thread is its return.
            let _ = thread.join();
            Ok(result)
        }
        Err(RecvTimeoutError::Timeout) => {
            let seconds = TIME_MAX.as_secs();
            Err(std::io::Error::other(format!("it ran for more than {seconds} seconds and was given up")))
        }
        Err(RecvTimeoutError::Disconnected) => Err(std::io::Error::other("the template engine failed internally")),
    }
}

/// An environment without templates.
pub(crate) fn environment() -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_recursion_limit(RECURSION_MAX);
    env.set_debug(true);
    env.set_formatter(|out, state, value| {
        if let Some(text) = value.as_str() {
            return out.write_str(text).map_err(Error::from);
        }
        out.write_str(&to_python_str(state, value)?).map_err(Error::from)
    });
    env.remove_global("debug");
    env.add_filter("tojson", tojson);
    env.add_filter("string", |state: &State, value: &Value| match value.kind() {
        ValueKind::String => Ok(value.clone()),
        _ => to_python_str(state, value).map(Value::from),
    });
    env.add_filter("trim", |state: &State, value: &Value, chars: Option<&str>| -> Result<String, Error> {
        match value.as_str() {
            Some(text) => Ok(strip(text, chars, Side::Both).to_owned()),
            None => Ok(strip(&to_python_str(state, value)?, chars, Side::Both).to_owned()),
        }
    });
    env.add_filter("join", join_filter);
    env.remove_filter("pprint");
    env.add_test("iterable", |value: &Value| {
        !matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Plain)
    });
    // Python's test asks for a length and an index, which strings, objects and undefined values have as well.
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined)
    });
    env.add_function("raise_exception", |state: &State, message: &Value| -> Result<Value, Error> {
        let error = Error::new(ErrorKind::InvalidOperation, "raise_exception was called");
        Err(error.with_source(Raised(to_python_str(state, message)?)))
    });
    env.add_function("strftime_now", |format: &str| clock::strftime_now(format));
    env.set_unknown_method_callback(method);
    Ok(env)
}

fn to_python_str(state: &State, value: &Value) -> Result<String, Error> {
    let mut sink = Sink::new(state);
    python::write_str(&mut sink, value)?;
    Ok(sink.into_string())
}

/// transformers' `tojson`: `json.dumps` with `ensure_ascii=False` and the dictionary's own order.
/// Positional arguments come in the order ensure_ascii, indent, separators, sort_keys.
fn tojson(state: &State, value: &Value, positional: Rest<Value>, args: Kwargs) -> Result<String, Error> {
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let given = match positional.get(index) {
            Some(value) => Some(value.clone()),
            None => args.get::<Option<Value>>(name)?,
        };
        Ok(given.filter(|value| !value.is_none()))
    };
    if positional.len() > 4 {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let indent = match argument(1, "indent")? {
        None => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(value)?.min(64)),
        }),
    };
    let separators: Option<(String, String)> = match argument(2, "separators")? {
        Some(pair) => {
            let text = |index| pair.get_item_by_index(index).map(|value| value.to_string());
            Some((text(0)?, text(1)?))
        }
        None => None,
    };
    let (item_separator, key_separator) = separators.unwrap_or_else(|| (", ".to_owned(), ": ".to_owned()));
    let style = JsonStyle {
        indent,
        item_separator,
        key_separator,
        ensure_ascii: argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true()),
        sort_keys: argument(3, "sort_keys")?.is_some_and(|value| value.is_true()),
    };
    args.assert_all_used()?;
    let mut sink = Sink::new(state);
    python::write_json(&mut sink, value, &style, 0)?;
    Ok(sink.into_string())
}

fn has_long_number(text: &str) -> bool {
    text.as_bytes().windows(4).any(|window| window.iter().all(u8::is_ascii_digit))
}

fn join_filter(
    state: &State,
    items: &Value,
    separator: Option<&str>,
    attribute: Option<&str>,
    args: Kwargs,
) -> Result<String, Error> {
    let separator = separator.or(args.get("d")?).unwrap_or_default();
    let attribute = attribute.or(args.get("attribute")?);
    args.assert_all_used()?;
    join(state, separator, items, attribute)
}

fn join(state: &State, separator: &str, items: &Value, attribute: Option<&str>) -> Result<String, Error> {
    let mut sink = Sink::new(state);
    for (index, item) in items.try_iter()?.checked().enumerate() {
        let mut item = item?;
        for part in attribute.into_iter().flat_map(|path| path.split('.')) {
            item = item.get_attr(part)?;
        }
        if index > 0 {
            python::write_str(&mut sink, &Value::from(separator))?;
        }
        python::write_str(&mut sink, &item)?;
    }
    Ok(sink.into_string())
}

#[derive(Clone, Copy)]
enum Side {
    Left,
    Right,
    Both,
}

/// `str.strip` and its one-sided forms.
fn strip<'a>(text: &'a str, chars: Option<&str>, side: Side) -> &'a str {
    let removed = |character: char| match chars {
        Some(chars) => chars.contains(character),
        None => python::is_space(character),
    };
    match side {
        Side::Left => text.trim_start_matches(removed),
        Side::Right => text.trim_end_matches(removed),
        Side::Both => text.trim_matches(removed),
    }
}

/// Python's methods: those that differ from the compatibility layer's or are missing there, then that layer.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, name, args);
    };
    let stripped = |side| -> Result<Value, Error> {
        let (chars,): (Option<&str>,) = from_args(args)?;
        Ok(Value::from(strip(text, chars, side)))
    };
    match name {
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            join(state, text, items, None).map(Value::from)
        }
        // A width is written in few digits and filled with many bytes, before the engine could count them.
        "format" if has_long_number(text) => {
            Err(Error::new(ErrorKind::InvalidOperation, "a width of more than three digits in a format"))
        }
        "strip" | "lstrip" | "rstrip" if args.first().and_then(Value::as_str).is_some_and(|chars| chars.len() > 64) => {
            Err(Error::new(ErrorKind::InvalidOperation, "more than 64 bytes of characters to strip"))
        }
        "strip" => stripped(Side::Both),
        "lstrip" => stripped(Side::Left),
        "rstrip" => stripped(Side::Right),
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (found, rest) = match name {
                "partition" => (text.split_once(separator), (text, "", "")),
                _ => (text.rsplit_once(separator), ("", "", text)),
            };
            let (before, middle, after) = found.map_or(rest, |(before, after)| (before, separator, after));
            Ok(Value::from((before, middle, after)))
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// `{% generation %}` marks the assistant's words for training and prints nothing. It becomes a block that is always
/// taken, of the same width, so that lines and columns in messages stay those of the file.
pub(crate) fn without_generation_tags(source: &str) -> String {
    let mut out = source.to_owned();
    for (tag, block) in [("generation", "if true"), ("endgeneration", "endif")] {
        let mut from = 0;
        while let Some(found) = out.get(from..).and_then(|rest| rest.find(tag)) {
            let start = from + found;
            let end = start + tag.len();
            let before = out.get(..start).unwrap_or_default().trim_end();
            let after = out.get(end..).unwrap_or_default().trim_start();
            let opens = before.strip_suffix(['-', '+']).unwrap_or(before).ends_with("{%");
            let closes = after.strip_prefix(['-', '+']).unwrap_or(after).starts_with("%}");
            if opens && closes {
                out.replace_range(start..end, &format!("{block:width$}", width = tag.len()));
            }
            from = end;
        }
    }
    out
}
