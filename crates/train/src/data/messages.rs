//! Messages as people write them, on their way to a chat template: the same roles, the same joining of parts and the same
//! reading of arguments as in the server, so that a model is tuned on what it will see.

use qwenkit_text::ToolSet;
use serde_json::{Map, Value, json};

use super::fields::{Fields, shortened, wrong};
use super::{Problem, Remarks};

/// The messages at `path`, each with whether it is learnt from.
pub(crate) fn messages(value: Value, path: &str, remarks: &mut Remarks) -> Result<Vec<(Value, bool)>, Problem> {
    let list = match value {
        Value::Array(list) if !list.is_empty() => list,
        Value::Array(_) => {
            let (path, expected) = (path.to_owned(), "at least one message");
            return Err(Problem::Wrong { path, found: "an empty list".to_owned(), expected });
        }
        other => return Err(wrong(path, &other, "a list of messages")),
    };
    list.into_iter().enumerate().map(|(index, value)| message(value, format!("{path}[{index}]"), remarks)).collect()
}

/// Tools as templates print them.
pub(crate) fn tools(value: Option<Value>) -> Result<Option<Value>, Problem> {
    let Some(value) = value else { return Ok(None) };
    // Some data sets hold the list as its text.
    let value = match value {
        Value::String(text) => {
            serde_json::from_str(&text).map_err(|_| wrong("tools", &json!(text), "a list of tools"))?
        }
        value => value,
    };
    let tools = ToolSet::from_request(&value).map_err(|error| Problem::Tools { problem: error.to_string() })?;
    Ok(tools.for_template())
}

fn message(value: Value, path: String, remarks: &mut Remarks) -> Result<(Value, bool), Problem> {
    let mut fields = Fields::new(value, path, "an object with `role` and `content`")?;
    let at = fields.at("role");
    let role = fields.need_string("role")?;
    let role = match role.as_str() {
        "developer" => "system",
        "system" | "user" | "assistant" | "tool" => role.as_str(),
        _ => return Err(Problem::Role { path: at, found: role }),
    };
    let content_at = fields.at("content");
    let content = fields.take("content").map(|content| text_of(content, &content_at, remarks)).transpose()?;
    let mut message = Map::new();
    message.insert("role".to_owned(), json!(role));
    let mut is_trained = false;
    if role == "assistant" {
        if fields.take("function_call").is_some() {
            return Err(Problem::OldCall { path: fields.at("function_call") });
        }
        let calls = calls(&mut fields, remarks)?;
        let mut thought = None;
        for key in ["reasoning_content", "reasoning", "thinking"] {
            thought = thought.or(fields.string(key)?);
        }
        if content.is_none() && calls.is_empty() {
            return Err(Problem::Missing { path: content_at, expected: "the answer's text, or `tool_calls`" });
        }
        if let Some(thought) = thought {
            message.insert("reasoning_content".to_owned(), json!(thought));
        }
        message.insert("content".to_owned(), json!(content.unwrap_or_default()));
        if !calls.is_empty() {
            message.insert("tool_calls".to_owned(), Value::Array(calls));
        }
        let at = fields.at("weight");
        is_trained = match fields.take("weight") {
            None => true,
            Some(weight) if weight.as_f64() == Some(1.0) => true,
            Some(weight) if weight.as_f64() == Some(0.0) => false,
            Some(weight) => return Err(wrong(&at, &weight, "0 (not learnt from) or 1")),
        };
    } else {
        let content = content.ok_or(Problem::Missing { path: content_at, expected: "the message's text" })?;
        message.insert("content".to_owned(), json!(content));
        if let Some(id) = fields.string("tool_call_id")? {
            message.insert("tool_call_id".to_owned(), json!(id));
        }
    }
    if let Some(name) = fields.string("name")? {
        message.insert("name".to_owned(), json!(name));
    }
    fields.finish(remarks);
    Ok((Value::Object(message), is_trained))
}

/// Content as text: a string, or parts of text with a line break between them.
fn text_of(content: Value, path: &str, remarks: &mut Remarks) -> Result<String, Problem> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong(path, &other, "a string or a list of parts")),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.into_iter().enumerate() {
        let mut fields = Fields::new(part, format!("{path}[{index}]"), "a part: an object with `type` and `text`")?;
        match fields.need_string("type")?.as_str() {
            "text" | "input_text" | "output_text" => texts.push(fields.need_string("text")?),
            other => {
                let found = shortened(other);
                return Err(Problem::Wrong {
                    path: fields.at("type"),
                    found,
                    expected: "`text`; tuning reads text alone",
                });
            }
        }
        fields.finish(remarks);
    }
    Ok(texts.join("\n"))
}

/// The calls of an assistant's message, arguments as the object that templates want.
fn calls(fields: &mut Fields, remarks: &mut Remarks) -> Result<Vec<Value>, Problem> {
    let path = fields.at("tool_calls");
    let list = match fields.take("tool_calls") {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(&path, &other, "a list of calls")),
    };
    let mut calls = Vec::with_capacity(list.len());
    for (index, call) in list.into_iter().enumerate() {
        let mut call = Fields::new(call, format!("{path}[{index}]"), "an object with `function`")?;
        let id = call.string("id")?.unwrap_or_default();
        let at = call.at("type");
        if let Some(kind) = call.string("type")?.filter(|kind| kind != "function") {
            return Err(Problem::Wrong { path: at, found: shortened(&kind), expected: "`function`" });
        }
        let at = call.at("function");
        let function = call.need("function", "an object with `name` and `arguments`")?;
        let mut function = Fields::new(function, at, "an object with `name` and `arguments`")?;
        let name = function.need_string("name")?;
        let at = function.at("arguments");
        let expected = "a JSON object, or its text";
        let arguments = match function.take("arguments") {
            None => json!({}),
            Some(Value::String(text)) if text.trim().is_empty() => json!({}),
            Some(Value::String(text)) => match serde_json::from_str(&text) {
                Ok(object @ Value::Object(_)) => object,
                _ => return Err(Problem::Wrong { path: at, found: shortened(&text), expected }),
            },
            Some(object @ Value::Object(_)) => object,
            Some(other) => return Err(wrong(&at, &other, expected)),
        };
        function.finish(remarks);
        call.take("index");
        call.finish(remarks);
        calls.push(json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } }));
    }
    Ok(calls)
}
