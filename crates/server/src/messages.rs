//! A conversation in OpenAI's form, on its way to a chat template: messages, tools, switches for thinking.

use qwenkit_text::{ChatInput, ChatTemplate};
use serde_json::{Map, Value, json};

use crate::{
    error::ApiError,
    fields::{Fields, describe, wrong},
};

/// Messages of a request.
const MESSAGES_MAX: usize = 10_000;
/// Tools of a request.
const TOOLS_MAX: usize = 512;

/// Takes `messages` out of a request, checked and with plain text for content.
pub(crate) fn messages(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let list = fields.list("messages")?;
    let list = fields.required("messages", list)?;
    if list.is_empty() || list.len() > MESSAGES_MAX {
        let message = format!("`messages` has {} entries, expected 1 to {MESSAGES_MAX}", list.len());
        return Err(ApiError::invalid("messages", message));
    }
    list.into_iter().enumerate().map(|(i, value)| message(value, &format!("messages[{i}]"))).collect()
}

fn message(value: Value, path: &str) -> Result<Value, ApiError> {
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
    let content = fields.take("content").map(|content| text_of(content, &at)).transpose()?;
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
        message.insert("content".to_owned(), Value::String(content.or(refusal).unwrap_or_default()));
        if !calls.is_empty() {
            message.insert("tool_calls".to_owned(), Value::Array(calls));
        }
        for name in ["audio", "function_call"] {
            fields.unsupported(name, &[], "only text and tool calls are")?;
        }
        // What the server itself may have put there.
        fields.take("annotations");
    } else {
        message.insert("content".to_owned(), Value::String(fields.required("content", content)?));
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

/// Content as text: a string, or parts of text with a line break between them.
fn text_of(content: Value, path: &str) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(wrong(path, &other, "a string or a list of parts")),
    };
    let text = |(i, part): (usize, Value)| {
        let mut fields = Fields::new(part, format!("{path}[{i}]"))?;
        let kind = fields.string("type")?;
        match fields.required("type", kind)?.as_str() {
            "text" | "input_text" | "output_text" => {
                let text = fields.string("text")?;
                fields.required("text", text)
            }
            kind @ ("image_url" | "input_image" | "image" | "input_audio" | "file" | "video_url") => {
                Err(ApiError::invalid(
                    fields.at("type"),
                    format!("`{}` is {kind}: this model reads text only", fields.at("type")),
                ))
            }
            "refusal" => Ok(fields.string("refusal")?.unwrap_or_default()),
            kind => Err(wrong(&fields.at("type"), &json!(kind), "the type `text`")),
        }
    };
    let texts: Vec<String> = parts.into_iter().enumerate().map(text).collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
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
pub(crate) fn tools(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let list = fields.list("tools")?.unwrap_or_default();
    if list.len() > TOOLS_MAX {
        return Err(ApiError::invalid(
            "tools",
            format!("`tools` has {} entries; {TOOLS_MAX} are the most", list.len()),
        ));
    }
    for (i, tool) in list.iter().enumerate() {
        let mut fields = Fields::new(tool.clone(), format!("tools[{i}]"))?;
        let kind = fields.string("type")?;
        let kind = fields.required("type", kind)?;
        if kind != "function" {
            return Err(wrong(&fields.at("type"), &Value::String(kind), "`function`"));
        }
        let function = fields.object("function")?;
        let mut function = fields.required("function", function)?;
        let name = function.string("name")?;
        function.required("name", name)?;
        function.string("description")?;
        function.bool("strict")?;
        let at = function.at("parameters");
        if let Some(other) = function.take("parameters").filter(|schema| !schema.is_object()) {
            return Err(wrong(&at, &other, "a JSON schema"));
        }
        function.finish()?;
        fields.finish()?;
    }
    Ok(list)
}

/// Takes the switches for thinking, in every spelling, and the template's other variables.
pub(crate) fn template_variables(
    fields: &mut Fields,
    template: Option<&ChatTemplate>,
) -> Result<Map<String, Value>, ApiError> {
    let at = fields.at("chat_template_kwargs");
    let mut variables = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong(&at, &other, "an object")),
    };
    let mut switches: Vec<(String, bool)> = Vec::new();
    for name in ["enable_thinking", "think"] {
        let at = fields.at(name);
        match fields.take(name) {
            None => {}
            Some(Value::Bool(on)) => switches.push((at, on)),
            Some(Value::String(effort)) if name == "think" => switches.push((at.clone(), thinks(&at, &effort)?)),
            Some(other) => return Err(wrong(&at, &other, "true or false")),
        }
    }
    if let Some(effort) = fields.string("reasoning_effort")? {
        switches.push((fields.at("reasoning_effort"), thinks("reasoning_effort", &effort)?));
    }
    if let Some(mut reasoning) = fields.object("reasoning")? {
        if let Some(effort) = reasoning.string("effort")? {
            switches.push((reasoning.at("effort"), thinks(&reasoning.at("effort"), &effort)?));
        }
        if let Some(on) = reasoning.bool("enabled")? {
            switches.push((reasoning.at("enabled"), on));
        }
        reasoning.take("summary");
        reasoning.finish()?;
    }
    if let Some(mut thinking) = fields.object("thinking")? {
        let kind = thinking.string("type")?;
        let kind = thinking.required("type", kind)?;
        match kind.as_str() {
            "enabled" | "adaptive" => switches.push((thinking.at("type"), true)),
            "disabled" => switches.push((thinking.at("type"), false)),
            _ => return Err(wrong(&thinking.at("type"), &Value::String(kind), "`enabled` or `disabled`")),
        }
        thinking.finish()?;
    }
    if let Some(Value::Bool(on)) = variables.get("enable_thinking") {
        switches.push((format!("{at}.enable_thinking"), *on));
    }
    if let Some(((first, on), (second, _))) = switches.first().zip(switches.iter().find(|s| s.1 != switches[0].1)) {
        let message =
            format!("`{first}` switches thinking {} and `{second}` the other way", if *on { "on" } else { "off" });
        return Err(ApiError::invalid(second, message));
    }
    if let Some((at, on)) = switches.into_iter().next() {
        if template.is_some_and(can_switch_thinking) {
            variables.insert("enable_thinking".to_owned(), Value::Bool(on));
        } else if on && !template.is_some_and(can_think) {
            let message = format!("`{at}` asks for thinking, and this model has no thinking mode");
            return Err(ApiError::invalid(at, message).with_code("unsupported_parameter"));
        } else if !on && template.is_some_and(can_think) {
            let message = format!("`{at}` asks for no thinking, and this model always thinks");
            return Err(ApiError::invalid(at, message).with_code("unsupported_parameter"));
        }
    }
    Ok(variables)
}

/// Whether an effort means thinking at all.
fn thinks(at: &str, effort: &str) -> Result<bool, ApiError> {
    match effort {
        "none" => Ok(false),
        "minimal" | "low" | "medium" | "high" | "xhigh" | "max" => Ok(true),
        other => Err(wrong(at, &json!(other), "none, minimal, low, medium or high")),
    }
}

/// Whether the model of this template thinks before it speaks, or may.
pub(crate) fn can_think(template: &ChatTemplate) -> bool {
    template.source().contains("<think>")
}

/// Whether a request can switch it.
pub(crate) fn can_switch_thinking(template: &ChatTemplate) -> bool {
    template.source().contains("enable_thinking")
}

/// What the template gets.
pub(crate) fn input(messages: Vec<Value>, tools: &[Value], variables: Map<String, Value>) -> ChatInput {
    ChatInput {
        messages: Value::Array(messages),
        tools: (!tools.is_empty()).then(|| Value::Array(tools.to_vec())),
        add_generation_prompt: true,
        kwargs: variables,
    }
}

/// `tool_choice` of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// The model decides.
    Auto,
    /// No call; the tools are not even shown.
    Never,
    /// At least one call.
    Required,
    /// A call of this tool.
    Named(String),
}

impl ToolChoice {
    /// Takes it out of a request with these tools.
    pub(crate) fn take(fields: &mut Fields, tools: &[Value]) -> Result<ToolChoice, ApiError> {
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
        if let ToolChoice::Named(name) = &choice {
            let known = |tool: &Value| tool["function"]["name"] == json!(name);
            if !tools.iter().any(known) {
                return Err(ApiError::invalid(&at, format!("`{at}` names {name:?}, which is not among the tools")));
            }
        }
        if choice == ToolChoice::Required && tools.is_empty() {
            return Err(ApiError::invalid(
                &at,
                format!("`{at}` is {} and there are no tools", describe(&value.unwrap_or_default())),
            ));
        }
        Ok(choice)
    }
}
