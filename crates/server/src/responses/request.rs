//! A request for a response, in the terms of this server.

use qwenkit_engine::Sampling;
use serde_json::{Map, Value, json};

use crate::{
    conversation::{Conversation, Names, ToolChoice},
    error::ApiError,
    fields::{Fields, describe, wrong},
    forms,
    images::Gathering,
    messages,
    models::ServedModel,
    settings::Settings,
};

const NAMES: Names = Names { messages: "input", choice: "tool_choice", form: "text.format" };

/// A request, read.
pub(super) struct Request {
    pub(super) conversation: Conversation,
    /// The items of this request, each with an id.
    pub(super) input: Vec<Value>,
    /// Parameters that the response repeats.
    pub(super) echoed: Map<String, Value>,
    pub(super) store: bool,
}

/// Reads a request that follows on items of earlier ones.
pub(super) fn read(
    mut fields: Fields,
    model: &ServedModel,
    history: Vec<Value>,
    background: bool,
) -> Result<Request, ApiError> {
    let mut echoed = Map::new();
    echoed.insert("background".to_owned(), json!(background));
    let given = fields.take("input");
    let input = items(fields.required("input", given)?)?;
    let (mut list, mut images) = (Vec::new(), Gathering::new(model));
    let instructions = fields.string("instructions")?;
    echoed.insert("instructions".to_owned(), json!(instructions));
    if let Some(text) = instructions {
        list.push(json!({ "role": "system", "content": text }));
    }
    for (i, item) in history.into_iter().enumerate() {
        add(item, &format!("previous_response_id[{i}]"), &mut list, &mut images)?;
    }
    for (i, item) in input.iter().enumerate() {
        add(item.clone(), &format!("input[{i}]"), &mut list, &mut images)?;
    }
    messages::check_count(list.len())?;
    for name in [
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "text",
        "reasoning",
        "metadata",
        "temperature",
        "top_p",
        "max_output_tokens",
        "truncation",
        "user",
    ] {
        echoed.insert(name.to_owned(), fields.peek(name).cloned().unwrap_or(Value::Null));
    }
    let tools = messages::tools(&mut fields)?;
    let choice = ToolChoice::take(&mut fields, &tools)?;
    let many_calls = fields.bool("parallel_tool_calls")?.unwrap_or(true);
    let form = match fields.object("text")? {
        Some(mut text) => {
            let form = text.object("format")?.map(forms::response_format).transpose()?.flatten();
            text.unsupported("verbosity", &[json!("medium")], "say in the prompt how long the answer shall be")?;
            text.finish()?;
            form
        }
        None => None,
    };
    let (thinking, variables) = messages::thinking(&mut fields, &list)?;
    let settings = settings(&mut fields, model.session.defaults())?;
    let store = fields.bool("store")?.unwrap_or(true);
    without_effect(&mut fields)?;
    fields.finish()?;
    for (name, value) in [
        ("tools", json!([])),
        ("tool_choice", json!("auto")),
        ("parallel_tool_calls", json!(true)),
        ("text", json!({ "format": { "type": "text" } })),
        ("metadata", json!({})),
        ("temperature", json!(settings.sampling.temperature)),
        ("top_p", json!(settings.sampling.top_p)),
        ("truncation", json!("disabled")),
    ] {
        if echoed[name].is_null() {
            echoed.insert(name.to_owned(), value);
        }
    }
    let conversation = Conversation {
        images: images.done(),
        tools,
        choice,
        many_calls,
        form,
        wish: thinking,
        variables,
        ..Conversation::new(list, settings, NAMES)
    };
    Ok(Request { conversation, input, echoed, store })
}

fn settings(fields: &mut Fields, defaults: &Sampling) -> Result<Settings, ApiError> {
    let limit = fields.integer("max_output_tokens", 1, i64::from(u32::MAX))?;
    Settings::of_answer(fields, defaults, limit.map(|n| n as usize))
}

/// What describes the request for others, or asks for what is so anyway.
fn without_effect(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"] {
        fields.string(name)?;
    }
    fields.object("metadata")?;
    include(fields)?;
    fields.unsupported("truncation", &[json!("disabled")], "a prompt that is too long is refused, not cut")?;
    fields.unsupported("service_tier", &[json!("auto"), json!("default")], "there is one tier")?;
    fields.unsupported("top_logprobs", &[json!(0)], "/v1/chat/completions gives log-probabilities")?;
    for name in ["prompt", "conversation", "max_tool_calls", "context_management"] {
        fields.unsupported(name, &[], "this server keeps responses, and follows on them by previous_response_id")?;
    }
    Ok(())
}

/// What the response shall hold beyond the usual. Thoughts come in plain words, which can be sent back as they are; what
/// encryption is for is given without it.
fn include(fields: &mut Fields) -> Result<(), ApiError> {
    let wanted = fields.list("include")?.unwrap_or_default();
    let Some((i, value)) = wanted.iter().enumerate().find(|(_, value)| *value != "reasoning.encrypted_content") else {
        return Ok(());
    };
    let at = fields.at(&format!("include[{i}]"));
    let message = format!("`{at}` is {}, which responses here do not have", describe(value));
    Err(ApiError::invalid(at, message).with_code("unsupported_parameter"))
}

/// The input as items.
fn items(input: Value) -> Result<Vec<Value>, ApiError> {
    let list = match input {
        Value::String(text) => vec![json!({ "role": "user", "content": [{ "type": "input_text", "text": text }] })],
        Value::Array(list) if !list.is_empty() => list,
        other => return Err(wrong("input", &other, "a string or a list of items")),
    };
    let named = |(i, mut item): (usize, Value)| {
        let Value::Object(map) = &mut item else { return Err(wrong(&format!("input[{i}]"), &item, "an object")) };
        map.entry("type").or_insert(json!("message"));
        map.entry("id").or_insert(json!(format!("item_{i}")));
        Ok(item)
    };
    list.into_iter().enumerate().map(named).collect()
}

/// Adds an item to a conversation.
fn add(item: Value, path: &str, list: &mut Vec<Value>, images: &mut Gathering<'_>) -> Result<(), ApiError> {
    let mut item = Fields::new(item, path)?;
    let kind = item.string("type")?.unwrap_or_else(|| "message".to_owned());
    for name in ["id", "status"] {
        item.string(name)?;
    }
    match kind.as_str() {
        "message" => {
            let role = item.string("role")?;
            let role = item.required("role", role)?;
            let at = item.at("content");
            let content = item.take("content");
            let images = Some(images).filter(|_| role == "user");
            let content = messages::content_of(item.required("content", content)?, &at, images)?;
            item.take("phase");
            let role = match role.as_str() {
                "developer" => "system",
                role @ ("system" | "user" | "assistant") => role,
                _ => return Err(wrong(&item.at("role"), &json!(role), "user, assistant, system or developer")),
            };
            match list.last_mut().filter(|last| role == "assistant" && is_open(last)) {
                Some(last) => last["content"] = content,
                None => list.push(json!({ "role": role, "content": content })),
            }
        }
        "reasoning" => {
            let mut text = String::new();
            for name in ["content", "summary"] {
                for part in item.list(name)?.unwrap_or_default() {
                    if text.is_empty() || name == "content" {
                        text.push_str(part["text"].as_str().unwrap_or_default());
                    }
                }
            }
            item.take("encrypted_content");
            list.push(json!({ "role": "assistant", "content": "", "reasoning_content": text }));
        }
        "function_call" => {
            let (id, name) = (item.string("call_id")?, item.string("name")?);
            let (id, name) = (item.required("call_id", id)?, item.required("name", name)?);
            let at = item.at("arguments");
            let arguments = item.string("arguments")?.unwrap_or_else(|| "{}".to_owned());
            let arguments: Value = serde_json::from_str(&arguments)
                .map_err(|error| ApiError::invalid(&at, format!("`{at}` is no JSON: {error}")))?;
            let call = json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } });
            // Calls of one turn are one message's.
            if list.last().is_none_or(|last| last["role"] != "assistant") {
                list.push(json!({ "role": "assistant", "content": "" }));
            }
            if let Some(Value::Object(last)) = list.last_mut()
                && let Value::Array(calls) = last.entry("tool_calls").or_insert_with(|| json!([]))
            {
                calls.push(call);
            }
        }
        "function_call_output" => {
            let id = item.string("call_id")?;
            let id = item.required("call_id", id)?;
            let at = item.at("output");
            let output = item.take("output");
            let content = messages::content_of(item.required("output", output)?, &at, Some(images))?;
            list.push(json!({ "role": "tool", "tool_call_id": id, "content": content }));
        }
        other => {
            let expected = "message, reasoning, function_call or function_call_output";
            return Err(wrong(&item.at("type"), &json!(other), expected));
        }
    }
    item.finish()
}

/// Whether a message is a thought alone so far.
fn is_open(message: &Value) -> bool {
    message["role"] == "assistant" && message["content"] == "" && message.get("tool_calls").is_none()
}
