//! A conversation in OpenAI's form, on its way to a chat template: messages, tools, switches for thinking.

use qwenkit_text::{ThinkingWish, ToolSet};
use serde_json::{Map, Value, json};

use crate::{
    conversation::{ToolChoice, wish},
    error::{ApiError, from_text},
    fields::{Fields, wrong},
    images::{Content, Gathering},
};

/// Messages of a request.
const MESSAGES_MAX: usize = 10_000;
/// Tools of a request.
const TOOLS_MAX: usize = 512;

/// Takes `messages` out of a request, checked, with text or a list of parts for content; images go into `images`.
pub(crate) fn messages(fields: &mut Fields, images: &mut Gathering<'_>) -> Result<Vec<Value>, ApiError> {
    let list = fields.list("messages")?;
    let list = fields.required("messages", list)?;
    check_count(list.len())?;
    list.into_iter().enumerate().map(|(i, value)| message(value, &format!("messages[{i}]"), images)).collect()
}

/// Refuses no messages, and too many.
pub(crate) fn check_count(count: usize) -> Result<(), ApiError> {
    if (1..=MESSAGES_MAX).contains(&count) {
        return Ok(());
    }
    let message = format!("`messages` has {count} entries, expected 1 to {MESSAGES_MAX}");
    Err(ApiError::invalid("messages", message))
}

fn message(value: Value, path: &str, images: &mut Gathering<'_>) -> Result<Value, ApiError> {
    let mut fields = Fields::new(value, path)?;
    let role = fields.string("role")?;
    let mut role = fields.required("role", role)?;
    if !["system", "developer", "user", "assistant", "tool"].contains(&role.as_str()) {
        let expected = "one of system, developer, user, assistant, tool";
        return Err(wrong(&fields.at("role"), &Value::String(role), expected));
    }
    // What newer interfaces call the system's words.
    if role == "developer" {
        role = "system".to_owned();
    }
    let mut message = Map::new();
    let at = fields.at("content");
    let images = Some(images).filter(|_| role == "user" || role == "tool");
    let content = fields.take("content").map(|content| content_of(content, &at, images)).transpose()?;
    message.insert("role".to_owned(), Value::String(role.clone()));
    if role == "assistant" {
        let calls = fields.list("tool_calls")?.unwrap_or_default();
        let calls = calls.into_iter().enumerate().map(|(i, call)| tool_call(call, &format!("{path}.tool_calls[{i}]")));
        let calls: Vec<Value> = calls.collect::<Result<_, _>>()?;
        // A refusal of an earlier model is what it said.
        let refusal = fields.string("refusal")?;
        let reasoning = fields.take_one(&["reasoning_content", "reasoning"])?;
        if let Some((at, other)) = reasoning.as_ref().filter(|(_, v)| !v.is_string()) {
            return Err(wrong(at, other, "a string"));
        }
        if let Some((_, text)) = reasoning {
            message.insert("reasoning_content".to_owned(), text);
        }
        if content.is_none() && calls.is_empty() && refusal.is_none() {
            return Err(ApiError::invalid(
                &at,
                format!("`{at}` is missing; only a message with tool calls may lack it"),
            ));
        }
        let said = content.or(refusal.map(Value::String)).unwrap_or_else(|| json!(""));
        message.insert("content".to_owned(), said);
        if !calls.is_empty() {
            message.insert("tool_calls".to_owned(), Value::Array(calls));
        }
        for name in ["audio", "function_call"] {
            fields.unsupported(name, &[], "only text and tool calls are")?;
        }
        // What the server itself may have put there.
        fields.take("annotations");
    } else {
        message.insert("content".to_owned(), fields.required("content", content)?);
        if role == "tool" {
            let id = fields.string("tool_call_id")?;
            message.insert("tool_call_id".to_owned(), Value::String(fields.required("tool_call_id", id)?));
        }
    }
    if let Some(name) = fields.string("name")? {
        message.insert("name".to_owned(), Value::String(name));
    }
    fields.finish()?;
    Ok(Value::Object(message))
}

/// Content for a template: text, or parts where there are images, which go into `images`; they are refused where it is absent.
pub(crate) fn content_of(
    content: Value,
    path: &str,
    mut images: Option<&mut Gathering<'_>>,
) -> Result<Value, ApiError> {
    let parts = match content {
        text @ Value::String(_) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong(path, &other, "a string or a list of parts")),
    };
    let mut found = Content::default();
    for (i, part) in parts.into_iter().enumerate() {
        let mut fields = Fields::new(part, format!("{path}[{i}]"))?;
        let kind = fields.string("type")?;
        match (fields.required("type", kind)?.as_str(), &mut images) {
            ("text" | "input_text" | "output_text", _) => {
                let text = fields.string("text")?;
                found.text(fields.required("text", text)?);
                // What a server, this one too, has said of its own text.
                for name in ["annotations", "logprobs", "citations", "parsed"] {
                    fields.take(name);
                }
            }
            (kind @ ("image_url" | "input_image" | "image"), Some(images)) => {
                found.image(images.part(&mut fields, kind)?);
            }
            (kind @ ("image_url" | "input_image" | "image"), None) => {
                let message = format!("`{}` is {kind}: images are for messages of users and tools", fields.at("type"));
                return Err(ApiError::invalid(fields.at("type"), message));
            }
            (kind @ ("input_audio" | "file" | "input_file" | "video_url" | "video"), _) => {
                let message = format!("`{}` is {kind}: this server takes text and images", fields.at("type"));
                return Err(ApiError::invalid(fields.at("type"), message).with_code("unsupported_content"));
            }
            ("refusal", _) => found.text(fields.string("refusal")?.unwrap_or_default()),
            (kind, _) => return Err(wrong(&fields.at("type"), &json!(kind), "the type `text` or `image_url`")),
        }
        // Beginnings are kept whether or not somebody asks for it.
        fields.take("cache_control");
        fields.finish()?;
    }
    Ok(found.value())
}

/// A call that an assistant's message made: arguments stay the string they are, which templates get as an object.
fn tool_call(value: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::new(value, path)?;
    let id = fields.string("id")?.unwrap_or_default();
    fields.integer("index", 0, i64::MAX)?;
    let kind = fields.string("type")?.unwrap_or_else(|| "function".to_owned());
    if kind != "function" {
        return Err(wrong(&fields.at("type"), &Value::String(kind), "`function`"));
    }
    let function = fields.object("function")?;
    let mut function = fields.required("function", function)?;
    let name = function.string("name")?;
    let name = function.required("name", name)?;
    let at = function.at("arguments");
    let arguments = match function.take("arguments") {
        None => json!({}),
        Some(Value::String(text)) if text.trim().is_empty() => json!({}),
        Some(Value::String(text)) => match serde_json::from_str::<Value>(&text) {
            Ok(value @ Value::Object(_)) => value,
            Ok(other) => return Err(wrong(&at, &other, "the text of a JSON object")),
            Err(error) => return Err(ApiError::invalid(&at, format!("`{at}` is no JSON: {error}"))),
        },
        Some(value @ Value::Object(_)) => value,
        Some(other) => return Err(wrong(&at, &other, "the text of a JSON object")),
    };
    function.finish()?;
    fields.finish()?;
    Ok(json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } }))
}

/// Takes `tools` out of a request, each checked.
pub(crate) fn tools(fields: &mut Fields) -> Result<ToolSet, ApiError> {
    let value = fields.take("tools").unwrap_or_default();
    if let Some(list) = value.as_array().filter(|list| list.len() > TOOLS_MAX) {
        let message = format!("`tools` has {} entries; {TOOLS_MAX} are the most", list.len());
        return Err(ApiError::invalid("tools", message));
    }
    ToolSet::from_request(&value).map_err(|error| from_text(&error, "tools"))
}

/// The switches for thinking, in every spelling, which count together.
const SWITCHES: [&str; 6] =
    ["enable_thinking", "think", "thinking", "thinking_budget", "reasoning_effort", "reasoning"];

/// Takes the switches for thinking and the template's other variables; `messages` may hold switches of their own.
pub(crate) fn thinking(
    fields: &mut Fields,
    messages: &[Value],
) -> Result<(ThinkingWish, Map<String, Value>), ApiError> {
    let at = fields.at("chat_template_kwargs");
    let mut variables = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong(&at, &other, "an object")),
    };
    let mut switches = Map::new();
    for name in SWITCHES {
        if let Some(value) = fields.take(name) {
            switches.insert(name.to_owned(), value);
        }
    }
    switches.insert("chat_template_kwargs".to_owned(), Value::Object(variables.clone()));
    switches.insert("messages".to_owned(), Value::Array(messages.to_vec()));
    for name in ["enable_thinking", "reasoning_effort", "thinking_budget"] {
        variables.remove(name);
    }
    Ok((wish(&switches)?, variables))
}

impl ToolChoice {
    /// Takes it out of a request with these tools.
    pub(crate) fn take(fields: &mut Fields, tools: &ToolSet) -> Result<ToolChoice, ApiError> {
        let at = fields.at("tool_choice");
        let value = fields.take("tool_choice");
        let choice = match &value {
            None => return Ok(ToolChoice::Auto),
            Some(Value::String(word)) => match word.as_str() {
                "auto" => ToolChoice::Auto,
                "none" => ToolChoice::Never,
                "required" | "any" => ToolChoice::Required,
                _ => return Err(wrong(&at, &json!(word), "auto, none, required or a function")),
            },
            Some(Value::Object(map)) => {
                let name = map.get("function").and_then(|f| f.get("name")).or(map.get("name")).and_then(Value::as_str);
                match name {
                    Some(name) => ToolChoice::Named(name.to_owned()),
                    None => return Err(ApiError::invalid(&at, format!("`{at}` names no function"))),
                }
            }
            Some(other) => return Err(wrong(&at, other, "auto, none, required or a function")),
        };
        choice.check(&at, tools)?;
        Ok(choice)
    }

    /// Refuses to force what there is not.
    pub(crate) fn check(&self, at: &str, tools: &ToolSet) -> Result<(), ApiError> {
        if let ToolChoice::Named(name) = self
            && tools.get(name).is_none()
        {
            return Err(ApiError::invalid(at, format!("`{at}` names {name:?}, which is not among the tools")));
        }
        if *self == ToolChoice::Required && tools.is_empty() {
            return Err(ApiError::invalid(at, format!("`{at}` asks for a call and there are no tools")));
        }
        Ok(())
    }
}
