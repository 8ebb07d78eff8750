//! A conversation on its way to token ids.
//!
//! Contract: control tokens come from the template alone. Whatever a message, a tool or an argument spells, it stays text
//! ([`crate::guard`] says how). Tool call arguments given as a JSON string reach the template as the object they spell.

use qwenkit_tensor::TokenId;
use serde_json::{Map, Value};

use crate::guard::Guard;
use crate::template::to_engine;
use crate::{ChatTemplate, Error, Opening, SpecialTokens, Tokenizer, visuals};

/// Deepest nesting of lists and objects in a conversation; JSON readers stop at the same depth.
const DEPTH_MAX: usize = 128;

/// What a chat template gets to see.
#[derive(Clone, Debug, Default)]
pub struct ChatInput {
    /// The messages: an array of objects with `role`, `content` and so on, as in the OpenAI interface. Content may be a list of
    /// parts, `{"type": "text", "text": ..}`, `{"type": "image"}` and `{"type": "video", "times": [..]}`; what these show comes
    /// beside the conversation.
    pub messages: Value,
    /// The tools on offer: an array, or nothing.
    pub tools: Option<Value>,
    /// Whether the prompt ends with the opening of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Further variables: `enable_thinking`, `bos_token` and so on.
    pub kwargs: Map<String, Value>,
    /// What this program itself adds behind the template's prompt, control tokens included: [`crate::ThinkingPlan`].
    pub suffix: &'static str,
    /// The words with which the answer shall begin, as text.
    pub answer_start: String,
}

/// A conversation as a model gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatPrompt {
    /// The tokens.
    pub ids: Vec<TokenId>,
    /// How the prompt leaves the thought of the answer.
    pub opening: Opening,
}

/// Renders a conversation and turns it into ids, keeping everything that was not written by the template out of the
/// control tokens.
///
/// # Errors
/// Those of [`ChatTemplate::render`] and [`Tokenizer::encode`].
pub fn encode_chat(template: &ChatTemplate, tokenizer: &Tokenizer, input: &ChatInput) -> Result<ChatPrompt, Error> {
    let mut prepared = Prepared::new(input)?;
    let guard = Guard::new(tokenizer, template.source(), &prepared.variables)?;
    guard.mark_all(&mut prepared.variables);
    let films = visuals::prepare(template, &mut prepared.variables)?;
    let prompt = films.spread(template.render_prepared(prepared)?) + input.suffix;
    // What people wrote is marked, so it cannot look like a thought here.
    let opening = Opening::of_prompt(&prompt);
    let mut ids = guard.encode(tokenizer, &prompt)?;
    if !input.answer_start.is_empty() {
        ids.extend(tokenizer.encode(&input.answer_start, SpecialTokens::AsText)?);
    }
    Ok(ChatPrompt { ids, opening })
}

/// The prompt of a conversation as text, as [`encode_chat`] makes it before its tokens.
///
/// # Errors
/// Those of [`ChatTemplate::render`].
pub fn chat_text(template: &ChatTemplate, input: &ChatInput) -> Result<String, Error> {
    let mut prepared = Prepared::new(input)?;
    let films = visuals::prepare(template, &mut prepared.variables)?;
    Ok(films.spread(template.render_prepared(prepared)?))
}

/// The variables of a template, checked and brought into the form templates expect.
pub(crate) struct Prepared {
    variables: Map<String, Value>,
    values: usize,
    text_bytes: usize,
}

impl Prepared {
    pub(crate) fn new(input: &ChatInput) -> Result<Prepared, Error> {
        let mut variables = input.kwargs.clone();
        let mut messages = input.messages.clone();
        let unexpected = |what, found: &Value, expected| Error::ChatInput { what, found: kind(found), expected };
        let Value::Array(list) = &mut messages else {
            return Err(unexpected("messages", &messages, "an array of messages"));
        };
        for message in list {
            let Value::Object(message) = message else {
                return Err(unexpected("a message", message, "an object with `role` and `content`"));
            };
            arguments_as_objects(message);
        }
        if let Some(tools) = input.tools.as_ref().filter(|tools| !tools.is_array() && !tools.is_null()) {
            return Err(unexpected("tools", tools, "an array of tools"));
        }
        for (name, value) in [
            ("messages", messages),
            ("tools", input.tools.clone().unwrap_or_default()),
            ("add_generation_prompt", Value::Bool(input.add_generation_prompt)),
        ] {
            if variables.insert(name.to_owned(), value).is_some() {
                let what = "the template's keyword arguments";
                let found = format!("`{name}`");
                return Err(Error::ChatInput { what, found, expected: "names other than those of the conversation" });
            }
        }
        // transformers always passes it
        variables.entry("documents").or_insert(Value::Null);
        let mut prepared = Prepared { variables: Map::new(), values: 0, text_bytes: 0 };
        for (name, value) in &variables {
            prepared.text_bytes += name.len();
            prepared.measure(value, 0)?;
        }
        prepared.variables = variables;
        Ok(prepared)
    }

    fn measure(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            let found = format!("more than {DEPTH_MAX} levels");
            return Err(Error::ChatInput {
                what: "the nesting of the conversation",
                found,
                expected: "a flatter value",
            });
        }
        self.values += 1;
        match value {
            Value::String(text) => self.text_bytes += text.len(),
            Value::Array(list) => list.iter().try_for_each(|value| self.measure(value, depth + 1))?,
            Value::Object(map) => {
                for (key, value) in map {
                    self.text_bytes += key.len();
                    self.measure(value, depth + 1)?;
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
        Ok(())
    }

    /// The variables by name.
    pub(crate) fn variables(&self) -> &Map<String, Value> {
        &self.variables
    }

    /// The variables, to be marked.
    pub(crate) fn variables_mut(&mut self) -> &mut Map<String, Value> {
        &mut self.variables
    }

    /// Number of JSON values in the input.
    pub(crate) fn values(&self) -> usize {
        self.values
    }

    /// Bytes of all strings in the input.
    pub(crate) fn text_bytes(&self) -> usize {
        self.text_bytes
    }

    /// The variables in the template engine's form.
    pub(crate) fn into_context(self) -> minijinja::Value {
        to_engine(Value::Object(self.variables))
    }
}

/// OpenAI clients send arguments as a string of JSON; templates want the object.
fn arguments_as_objects(message: &mut Map<String, Value>) {
    let Some(Value::Array(calls)) = message.get_mut("tool_calls") else { return };
    for call in calls {
        let function = match call.get("function") {
            Some(_) => call.get_mut("function"),
            None => Some(call),
        };
        let Some(arguments) = function.and_then(|function| function.get_mut("arguments")) else { continue };
        if let Value::String(text) = arguments
            && let Ok(object @ Value::Object(_)) = serde_json::from_str(text)
        {
            *arguments = object;
        }
    }
}

pub(crate) fn kind(value: &Value) -> String {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
    .to_owned()
}
