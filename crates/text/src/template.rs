//! A model's chat template: a conversation becomes the one string the model was trained on.
//!
//! Equal to transformers' `apply_chat_template` for what a template can see: messages, tools, keyword arguments. Which
//! parts of the result are control tokens is decided in [`crate::encode_chat`].

use std::io;

use minijinja::{Environment, ErrorKind, Value};

use crate::chat::{ChatInput, Prepared};
use crate::{Error, jinja, vetting};

/// A compiled chat template.
#[derive(Clone)]
pub struct ChatTemplate {
    origin: String,
    source: String,
    env: Environment<'static>,
}

impl ChatTemplate {
    /// Compiles a template. `origin` is the file or model it came with, for messages.
    ///
    /// # Errors
    /// [`Error::TemplateSyntax`] with line and column.
    pub fn new(source: &str, origin: &str) -> Result<ChatTemplate, Error> {
        let syntax_error = |(line, column), problem| {
            let origin = origin.to_owned();
            Error::TemplateSyntax { origin, line, column, problem }
        };
        vetting::check(source).map_err(|fault| syntax_error(position(source, fault.at), fault.problem))?;
        let cleaned = jinja::without_generation_tags(source);
        let compile = || -> Result<Environment<'static>, minijinja::Error> {
            let mut env = jinja::environment()?;
            env.add_template_owned(jinja::TEMPLATE, cleaned)?;
            Ok(env)
        };
        let compiled = jinja::on_deep_stack(compile).map_err(|error| syntax_error((1, 1), error.to_string()))?;
        let env = compiled.map_err(|error| {
            let (line, column) = position(source, error.range().map_or(0, |range| range.start));
            syntax_error((error.line().unwrap_or(line), column), describe(&error))
        })?;
        Ok(ChatTemplate { origin: origin.to_owned(), source: source.to_owned(), env })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt for a conversation.
    ///
    /// # Errors
    /// When the input has not the shape of a conversation, the template refuses it, fails, or runs too long.
    pub fn render(&self, input: &ChatInput) -> Result<String, Error> {
        self.render_prepared(Prepared::new(input)?)
    }

    pub(crate) fn render_prepared(&self, input: Prepared) -> Result<String, Error> {
        let fuel = jinja::fuel_for(input.values(), input.text_bytes());
        // Templates say everything at most a few times, whatever the tools and system texts they add.
        let limit_bytes = input.text_bytes().saturating_mul(8).saturating_add(4 << 20);
        let template = self.clone();
        let work = move || template.run(input, fuel, limit_bytes);
        jinja::on_deep_stack(work).map_err(|error| self.failed((0, 0), error.to_string()))?
    }

    fn run(&self, input: Prepared, fuel: u64, limit_bytes: usize) -> Result<String, Error> {
        let mut env = self.env.clone();
        env.set_fuel(Some(fuel));
        let mut out = Bounded { bytes: Vec::new(), limit_bytes };
        let rendered = env
            .get_template(jinja::TEMPLATE)
            .and_then(|template| template.render_captured_to(input.into_context(), &mut out).map(|_| ()));
        if let Err(error) = rendered {
            return Err(match out.limit_bytes {
                0 => Error::TemplateOutput { origin: self.origin.clone(), limit_bytes },
                _ => self.run_error(&error, fuel),
            });
        }
        String::from_utf8(out.bytes).map_err(|_| self.failed((0, 0), "it wrote bytes that are not UTF-8".to_owned()))
    }

    fn run_error(&self, error: &minijinja::Error, fuel: u64) -> Error {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(current) = cause {
            if let Some(raised) = current.downcast_ref::<jinja::Raised>() {
                return Error::TemplateRaised { message: raised.0.clone() };
            }
            if current.downcast_ref::<minijinja::Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
                return Error::TemplateTooLong { origin: self.origin.clone(), fuel };
            }
            cause = current.source();
        }
        let (line, column) = error.range().map_or((0, 0), |range| position(&self.source, range.start));
        self.failed((error.line().unwrap_or(line), column), describe(error))
    }

    fn failed(&self, (line, column): (usize, usize), problem: String) -> Error {
        Error::TemplateRun { origin: self.origin.clone(), line, column, problem }
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("origin", &self.origin)
            .field("bytes", &self.source.len())
            .finish_non_exhaustive()
    }
}

/// Line and column of a byte, from 1.
fn position(source: &str, at: usize) -> (usize, usize) {
    let before = source.get(..at).unwrap_or_default();
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    (before.matches('\n').count() + 1, column)
}

/// The engine's words without its repetition of place and source.
fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// Output up to a limit. A limit of 0 afterwards says that it was passed.
struct Bounded {
    bytes: Vec<u8>,
    limit_bytes: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit_bytes {
            self.limit_bytes = 0;
            return Err(io::Error::other("the output limit was passed"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A JSON value as the template engine holds it. Depth was checked by [`Prepared::new`].
pub(crate) fn to_engine(value: serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(value),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::from(value),
            (None, Some(value)) => Value::from(value),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text),
        serde_json::Value::Array(list) => Value::from(list.into_iter().map(to_engine).collect::<Vec<_>>()),
        serde_json::Value::Object(map) => {
            Value::from_pairs(map.into_iter().map(|(key, value)| (key, to_engine(value))))
        }
    }
}
