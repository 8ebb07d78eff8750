//! A request of Anthropic's interface, in the terms of this server.

use qwenkit_engine::Sampling;
use qwenkit_text::Form;
use serde_json::{Map, Value, json};

use crate::{
    conversation::{Conversation, Names, ToolChoice, wish},
    error::ApiError,
    fields::{Fields, wrong},
    forms,
    images::{Content, Gathering},
    messages,
    models::ServedModel,
    settings::{Settings, stop_list},
};

const NAMES: Names = Names { messages: "messages", choice: "tool_choice", form: "output_config" };

/// Reads a request for an answer.
pub(super) fn read(mut fields: Fields, model: &ServedModel) -> Result<Conversation, ApiError> {
    let limit = fields.integer("max_tokens", 1, i64::from(u32::MAX))?;
    let limit = fields.required("max_tokens", limit)?;
    let defaults = model.session.defaults();
    let sampling = Sampling {
        temperature: fields.number("temperature")?.unwrap_or(defaults.temperature),
        top_k: fields.integer("top_k", 0, i64::from(u32::MAX))?.map_or(defaults.top_k, |k| k as usize),
        top_p: fields.number("top_p")?.unwrap_or(defaults.top_p),
        ..defaults.clone()
    };
    let stop = fields.list("stop_sequences")?.unwrap_or_default();
    let settings = Settings {
        max_tokens: Some(limit as usize),
        stop: stop_list(&fields.at("stop_sequences"), stop)?,
        stream: fields.bool("stream")?.unwrap_or(false),
        ..Settings::new(sampling)
    };
    without_effect(&mut fields)?;
    read_rest(fields, settings, model)
}

/// Reads a request whose prompt shall be counted.
pub(super) fn read_to_count(fields: Fields, model: &ServedModel) -> Result<Conversation, ApiError> {
    let mut fields = fields;
    without_effect(&mut fields)?;
    read_rest(fields, Settings::new(model.session.defaults().clone()), model)
}

/// What means nothing to a server of one's own.
fn without_effect(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["inference_geo", "cache_control"] {
        fields.take(name);
    }
    fields.object("metadata")?;
    fields.unsupported("service_tier", &[json!("auto"), json!("standard_only")], "there is one tier")?;
    fields.unsupported("betas", &[json!([])], "nothing here is switched on by the name of a beta")?;
    context_management(fields)?;
    for name in ["mcp_servers", "container"] {
        fields.unsupported(name, &[json!([])], "tools run where the client is")?;
    }
    Ok(())
}

/// Edits of the conversation are refused, but for the one that coding agents send and that keeps everything.
fn context_management(fields: &mut Fields) -> Result<(), ApiError> {
    let Some(mut management) = fields.object("context_management")? else { return Ok(()) };
    let keeps_all = |edit: &Value| {
        edit["type"] == "clear_thinking_20251015" && (edit["keep"] == "all" || edit["keep"]["type"] == "all")
    };
    let edits = management.list("edits")?.unwrap_or_default();
    if let Some((i, edit)) = edits.iter().enumerate().find(|(_, edit)| !keeps_all(edit)) {
        let at = management.at(&format!("edits[{i}]"));
        let message =
            format!("`{at}` is {}, and nothing is edited out of conversations here; leave it out", edit["type"]);
        return Err(ApiError::invalid(at, message).with_code("unsupported_parameter"));
    }
    management.finish()
}

fn read_rest(mut fields: Fields, settings: Settings, model: &ServedModel) -> Result<Conversation, ApiError> {
    let (mut list, mut images) = (Vec::new(), Gathering::new(model));
    if let Some(system) = fields.take("system") {
        let text = without_headers(&text_of(system, "system")?);
        if !text.is_empty() {
            list.push(json!({ "role": "system", "content": text }));
        }
    }
    let given = fields.list("messages")?;
    let given = fields.required("messages", given)?;
    messages::check_count(given.len())?;
    for (i, message) in given.into_iter().enumerate() {
        read_message(message, &format!("messages[{i}]"), &mut list, &mut images)?;
    }
    // An answer that has begun is gone on with.
    let mut answer_start = String::new();
    if let Some(last) = list.pop_if(|last| last["role"] == "assistant" && last.get("tool_calls").is_none()) {
        answer_start = last["content"].as_str().unwrap_or_default().trim_end().to_owned();
    }
    let tools = messages::tools(&mut fields)?;
    let (choice, many_calls) = match fields.object("tool_choice")? {
        Some(choice) => tool_choice(choice)?,
        None => (ToolChoice::Auto, true),
    };
    choice.check("tool_choice", &tools)?;
    let mut switches = Map::new();
    if let Some(thinking) = fields.take("thinking") {
        switches.insert("thinking".to_owned(), thinking);
    }
    let mut form = None;
    for name in ["output_format", "output_config"] {
        let Some(mut config) = fields.object(name)? else { continue };
        if name == "output_format" {
            form = forms::response_format(config)?;
            continue;
        }
        if let Some(effort) = config.take("effort") {
            switches.insert("reasoning_effort".to_owned(), effort);
        }
        if let Some(format) = config.object("format")? {
            form = forms::response_format(format)?;
        }
        config.finish()?;
    }
    fields.finish()?;
    let mut wish = wish(&switches)?;
    if !answer_start.is_empty() {
        wish.thinks = Some(false);
        wish.switch = "/no_think".to_owned();
    }
    let (form, images): (Option<Form>, _) = (form, images.done());
    Ok(Conversation {
        images,
        tools,
        choice,
        many_calls,
        form,
        wish,
        answer_start,
        ..Conversation::new(list, settings, NAMES)
    })
}

fn tool_choice(mut choice: Fields) -> Result<(ToolChoice, bool), ApiError> {
    let kind = choice.string("type")?;
    let kind = choice.required("type", kind)?;
    let name = choice.string("name")?;
    let one = choice.bool("disable_parallel_tool_use")?.unwrap_or(false);
    let found = match kind.as_str() {
        "auto" => ToolChoice::Auto,
        "none" => ToolChoice::Never,
        "any" => ToolChoice::Required,
        "tool" => ToolChoice::Named(choice.required("name", name)?),
        _ => return Err(wrong(&choice.at("type"), &json!(kind), "auto, any, tool or none")),
    };
    choice.finish()?;
    Ok((found, !one))
}

/// System prompts of coding agents begin with lines like `x-...-header: ...` that differ from request to request; what
/// follows them would never be found in the cache.
fn without_headers(text: &str) -> String {
    let is_header = |line: &&str| {
        line.split_once(':').is_some_and(|(name, _)| {
            name.starts_with("x-") && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
    };
    let count = text.lines().take_while(is_header).count();
    let rest: Vec<&str> = text.split('\n').skip(count).collect();
    rest.join("\n")
}

/// A string, or blocks of text.
fn text_of(value: Value, path: &str) -> Result<String, ApiError> {
    let text = content_of(value, path, None)?;
    Ok(text.as_str().unwrap_or_default().to_owned())
}

/// A string, or blocks of text, and of images where there may be any.
fn content_of(value: Value, path: &str, mut images: Option<&mut Gathering<'_>>) -> Result<Value, ApiError> {
    let blocks = match value {
        text @ Value::String(_) => return Ok(text),
        Value::Array(blocks) => blocks,
        other => return Err(wrong(path, &other, "a string or a list of blocks")),
    };
    let mut found = Content::default();
    for (i, block) in blocks.into_iter().enumerate() {
        let mut block = Fields::new(block, format!("{path}[{i}]"))?;
        let kind = block.string("type")?;
        match (block.required("type", kind)?.as_str(), &mut images) {
            ("text", _) => {
                let text = text_of_block(&mut block)?;
                if !text.is_empty() {
                    found.text(text);
                }
            }
            ("image", Some(images)) => found.image(image(&mut block, images)?),
            (kind, _) => return Err(not_taken(&block.at("type"), kind)),
        }
        finish(block)?;
    }
    Ok(found.value())
}

fn text_of_block(block: &mut Fields) -> Result<String, ApiError> {
    // Where the text was found elsewhere, said to those who read on.
    block.take("citations");
    let text = block.string("text")?;
    block.required("text", text)
}

/// The end of a block, which may say that its provider shall keep what comes before it.
fn finish(mut block: Fields) -> Result<(), ApiError> {
    block.take("cache_control");
    block.finish()
}

/// The image of a block.
fn image(block: &mut Fields, images: &mut Gathering<'_>) -> Result<Value, ApiError> {
    images.admit(&block.at("type"))?;
    let source = block.object("source")?;
    let mut source = block.required("source", source)?;
    let kind = source.string("type")?;
    let at = source.at("type");
    match source.required("type", kind)?.as_str() {
        "base64" => {
            source.string("media_type")?;
            let data = source.string("data")?;
            let data = source.required("data", data)?;
            let at = source.at("data");
            source.finish()?;
            images.bare(&at, &data)
        }
        "url" => {
            let url = source.string("url")?;
            images.url(&source.at("url"), &source.required("url", url)?, None)
        }
        kind => Err(wrong(&at, &json!(kind), "`base64`: the image itself")),
    }
}

fn not_taken(at: &str, kind: &str) -> ApiError {
    match kind {
        "image" => ApiError::invalid(at, format!("`{at}` is image: images are for messages of users and tools")),
        "document" | "search_result" => {
            ApiError::invalid(at, format!("`{at}` is {kind}: this server takes text and images"))
        }
        _ => wrong(at, &json!(kind), "a block that this place takes, such as `text`"),
    }
}

fn read_message(value: Value, path: &str, list: &mut Vec<Value>, images: &mut Gathering<'_>) -> Result<(), ApiError> {
    let mut fields = Fields::new(value, path)?;
    let role = fields.string("role")?;
    let role = fields.required("role", role)?;
    let at = fields.at("content");
    let content = fields.take("content");
    let content = fields.required("content", content)?;
    fields.finish()?;
    let blocks = match content {
        Value::String(text) => vec![json!({ "type": "text", "text": text })],
        Value::Array(blocks) => blocks,
        other => return Err(wrong(&at, &other, "a string or a list of blocks")),
    };
    match role.as_str() {
        "user" => user(blocks, &at, list, images),
        "assistant" => assistant(blocks, &at, list),
        "system" => {
            list.push(json!({ "role": "system", "content": text_of(Value::Array(blocks), &at)? }));
            Ok(())
        }
        _ => Err(wrong(&format!("{path}.role"), &json!(role), "`user` or `assistant`")),
    }
}

/// What tools gave comes before what the user says to it.
fn user(blocks: Vec<Value>, path: &str, list: &mut Vec<Value>, images: &mut Gathering<'_>) -> Result<(), ApiError> {
    let mut said = Content::default();
    for (i, block) in blocks.into_iter().enumerate() {
        let mut block = Fields::new(block, format!("{path}[{i}]"))?;
        let kind = block.string("type")?;
        match block.required("type", kind)?.as_str() {
            "text" => said.text(text_of_block(&mut block)?),
            "image" => said.image(image(&mut block, images)?),
            "tool_result" => {
                let id = block.string("tool_use_id")?;
                let id = block.required("tool_use_id", id)?;
                let failed = block.bool("is_error")?.unwrap_or(false);
                let at = block.at("content");
                let given = block.take("content").unwrap_or_else(|| json!(""));
                let mut content = content_of(given, &at, Some(images))?;
                if failed {
                    content = with_error(content);
                }
                list.push(json!({ "role": "tool", "tool_call_id": id, "content": content }));
            }
            kind => return Err(not_taken(&block.at("type"), kind)),
        }
        finish(block)?;
    }
    if !said.is_empty() {
        list.push(json!({ "role": "user", "content": said.value() }));
    }
    Ok(())
}

/// A tool's result that says it is an error.
fn with_error(content: Value) -> Value {
    match content {
        Value::Array(mut parts) => {
            parts.insert(0, json!({ "type": "text", "text": "Error: " }));
            Value::Array(parts)
        }
        text => json!(format!("Error: {}", text.as_str().unwrap_or_default())),
    }
}

fn assistant(blocks: Vec<Value>, path: &str, list: &mut Vec<Value>) -> Result<(), ApiError> {
    let (mut texts, mut thoughts, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for (i, block) in blocks.into_iter().enumerate() {
        let mut block = Fields::new(block, format!("{path}[{i}]"))?;
        let kind = block.string("type")?;
        match block.required("type", kind)?.as_str() {
            "text" => texts.push(text_of_block(&mut block)?),
            "thinking" => {
                let text = block.string("thinking")?;
                thoughts.push(block.required("thinking", text)?);
                block.take("signature");
            }
            // Nobody but its maker can read it.
            "redacted_thinking" => drop(block.take("data")),
            "tool_use" => {
                // Who made the call: here, always the model itself.
                block.take("caller");
                let (id, name) = (block.string("id")?, block.string("name")?);
                let name = block.required("name", name)?;
                let at = block.at("input");
                let input = match block.take("input") {
                    None => json!({}),
                    Some(input @ Value::Object(_)) => input,
                    Some(other) => return Err(wrong(&at, &other, "an object")),
                };
                let function = json!({ "name": name, "arguments": input });
                calls.push(json!({ "id": id.unwrap_or_default(), "type": "function", "function": function }));
            }
            kind => return Err(not_taken(&block.at("type"), kind)),
        }
        finish(block)?;
    }
    let mut message = json!({ "role": "assistant", "content": texts.join("\n") });
    if !thoughts.is_empty() {
        message["reasoning_content"] = json!(thoughts.join("\n"));
    }
    if !calls.is_empty() {
        message["tool_calls"] = Value::Array(calls);
    }
    list.push(message);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::without_headers;

    #[test]
    fn header_lines_go_and_other_lines_stay() {
        assert_eq!(without_headers("x-some-header: a=1; b=2\nYou are kind."), "You are kind.");
        assert_eq!(without_headers("You are kind.\nx-some-header: 1"), "You are kind.\nx-some-header: 1");
        assert_eq!(without_headers("x marks: the spot"), "x marks: the spot");
        assert_eq!(without_headers("x-a: 1"), "");
    }
}
