//! Ollama's answers: to conversations and to single prompts, line by line.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use qwenkit_engine::{Ask, Finish, Piece, Prompt};
use qwenkit_text::{AnswerEvent, AnswerReader, Opening, ToolSet};
use serde_json::{Map, Value, json};

use super::{now, options};
use crate::{
    app::App,
    conversation::{Conversation, Names, ToolChoice, wish},
    error::ApiError,
    fields::{Fields, wrong},
    images::{Content, Gathering, Memory},
    messages,
    models::ServedModel,
    run::{Asked, Run},
    sse::{self, Events, Narrator},
    told::{Call, Told},
};

const NAMES: Names = Names { messages: "messages", choice: "tools", form: "format" };

/// `/api/chat`
pub(crate) async fn chat(State(app): State<Arc<App>>, body: Bytes) -> Result<Response, ApiError> {
    let (model, mut fields) = model_of(&app, &body).await?;
    let given = fields.list("messages")?.unwrap_or_default();
    if given.is_empty() {
        return Ok(loaded(&model, Shape::Chat));
    }
    messages::check_count(given.len())?;
    let mut images = Gathering::new(&model);
    let read = |(i, message)| message_of(message, &format!("messages[{i}]"), &mut images);
    let list = given.into_iter().enumerate().map(read).collect::<Result<Vec<_>, _>>()?;
    let images = images.done();
    let tools = messages::tools(&mut fields)?;
    let rest = conversation(&mut fields, &model, list)?;
    fields.finish()?;
    answer(&app, &model, Conversation { images, tools, choice: ToolChoice::Auto, ..rest }, Shape::Chat).await
}

/// `/api/generate`
pub(crate) async fn generate(State(app): State<Arc<App>>, body: Bytes) -> Result<Response, ApiError> {
    let (model, mut fields) = model_of(&app, &body).await?;
    let prompt = fields.string("prompt")?.unwrap_or_default();
    let system = fields.string("system")?.filter(|text| !text.is_empty());
    let raw = fields.bool("raw")?.unwrap_or(false);
    fields.unsupported("suffix", &[json!("")], "write the model's own fill-in-the-middle tokens into a raw prompt")?;
    let given = fields.list("images")?.unwrap_or_default();
    fields.unsupported("template", &[json!("")], "the model's own template is used")?;
    fields.unsupported("context", &[json!([])], "send the conversation to /api/chat")?;
    let mut list: Vec<Value> = system.map(|text| json!({ "role": "system", "content": text })).into_iter().collect();
    if raw && !given.is_empty() {
        return Err(ApiError::invalid(
            "images",
            "`images` and `raw`: a raw prompt has no place for them; send it to /api/chat",
        ));
    }
    let mut images = Gathering::new(&model);
    list.push(json!({ "role": "user", "content": content_of(&prompt, given, "images", &mut images)? }));
    let images = images.done();
    let conversation = Conversation { images, ..conversation(&mut fields, &model, list)? };
    fields.finish()?;
    if prompt.is_empty() {
        return Ok(loaded(&model, Shape::Text));
    }
    if !raw {
        return answer(&app, &model, conversation, Shape::Text).await;
    }
    let settings = conversation.settings;
    let stream = settings.stream;
    let asks = move |model: &ServedModel| {
        let sampling = settings.sampling_of(0);
        let (max_tokens, stop) = (settings.max_tokens, settings.stop);
        let adapter = model.adapter.clone();
        let ask = Ask { prompt: Prompt::Text(prompt), sampling, max_tokens, stop, adapter, ..Ask::default() };
        Ok(Asked { asks: vec![ask], memory: Memory::default() })
    };
    let run = Run::start(&model, asks, "prompt").await?;
    let reader = AnswerReader::new(Opening::Closed, &ToolSet::default());
    reply(
        run,
        Reply { model: model.name.clone(), shape: Shape::Text, told: Told::new(reader, ""), started: None },
        stream,
    )
    .await
}

async fn model_of(app: &App, body: &[u8]) -> Result<(Arc<ServedModel>, Fields), ApiError> {
    let mut fields = Fields::of_body(body)?;
    let name = fields.string("model")?;
    let model = app.model(Some(&fields.required("model", name)?)).await?;
    Ok((model, fields))
}

/// What both requests have in common.
fn conversation(fields: &mut Fields, model: &ServedModel, list: Vec<Value>) -> Result<Conversation, ApiError> {
    let settings = options::settings(fields, model)?;
    let form = options::form(fields)?;
    let mut switches = Map::new();
    if let Some(think) = fields.take("think") {
        switches.insert("think".to_owned(), think);
    }
    switches.insert("messages".to_owned(), Value::Array(list.clone()));
    Ok(Conversation { form, wish: wish(&switches)?, ..Conversation::new(list, settings, NAMES) })
}

/// A message's text behind its images, which go into `images`.
fn content_of(text: &str, given: Vec<Value>, at: &str, images: &mut Gathering<'_>) -> Result<Value, ApiError> {
    let mut content = Content::default();
    for (i, image) in given.into_iter().enumerate() {
        let at = format!("{at}[{i}]");
        match image {
            Value::String(text) => content.image(images.bare(&at, &text)?),
            other => return Err(wrong(&at, &other, "an image in base64")),
        }
    }
    content.text(text.to_owned());
    Ok(content.value())
}

fn message_of(value: Value, path: &str, images: &mut Gathering<'_>) -> Result<Value, ApiError> {
    let mut fields = Fields::new(value, path)?;
    let role = fields.string("role")?;
    let role = fields.required("role", role)?;
    if !["system", "user", "assistant", "tool"].contains(&role.as_str()) {
        return Err(wrong(&fields.at("role"), &json!(role), "one of system, user, assistant, tool"));
    }
    let content = fields.string("content")?.unwrap_or_default();
    let thinking = fields.string("thinking")?;
    let name = fields.take_one(&["tool_name", "name"])?;
    fields.string("tool_call_id")?;
    let given = fields.list("images")?.unwrap_or_default();
    if !given.is_empty() && role != "user" && role != "tool" {
        let at = fields.at("images");
        return Err(ApiError::invalid(&at, format!("`{at}`: images are for messages of users and tools")));
    }
    let content = content_of(&content, given, &fields.at("images"), images)?;
    let calls = fields.list("tool_calls")?.unwrap_or_default();
    let call = |(i, call): (usize, Value)| {
        let mut call = Fields::new(call, format!("{path}.tool_calls[{i}]"))?;
        let function = call.object("function")?;
        let mut function = call.required("function", function)?;
        let name = function.string("name")?;
        let name = function.required("name", name)?;
        let at = function.at("arguments");
        let arguments = function.take("arguments").unwrap_or_else(|| json!({}));
        if !arguments.is_object() {
            return Err(wrong(&at, &arguments, "an object"));
        }
        Ok(json!({ "type": "function", "function": { "name": name, "arguments": arguments } }))
    };
    let calls: Vec<Value> = calls.into_iter().enumerate().map(call).collect::<Result<_, ApiError>>()?;
    fields.finish()?;
    let mut message = json!({ "role": role, "content": content });
    if let Some(thinking) = thinking {
        message["reasoning_content"] = json!(thinking);
    }
    if let Some((_, name)) = name {
        message["name"] = name;
    }
    if !calls.is_empty() {
        message["tool_calls"] = Value::Array(calls);
    }
    Ok(message)
}

#[derive(Clone, Copy)]
enum Shape {
    Chat,
    Text,
}

/// What a request without a question is told: the model is there.
fn loaded(model: &ServedModel, shape: Shape) -> Response {
    let mut line = json!({ "model": model.name, "created_at": now(), "done": true, "done_reason": "load" });
    match shape {
        Shape::Chat => line["message"] = json!({ "role": "assistant", "content": "" }),
        Shape::Text => line["response"] = json!(""),
    }
    Json(line).into_response()
}

async fn answer(
    app: &App,
    model: &Arc<ServedModel>,
    conversation: Conversation,
    shape: Shape,
) -> Result<Response, ApiError> {
    let stream = conversation.settings.stream;
    let answering = conversation.start(model).await?;
    let id = app.new_id("chat-");
    let told = Told::new(answering.reader(), id.trim_start_matches("chat-"));
    reply(answering.run, Reply { model: model.name.clone(), shape, told, started: None }, stream).await
}

async fn reply(mut run: Run, mut reply: Reply, stream: bool) -> Result<Response, ApiError> {
    reply.started = Some(std::time::Instant::now());
    if stream {
        return Ok(sse::respond(run, reply));
    }
    run.drain(|_, piece| drop(reply.told.take_in(piece))).await?;
    let told = &reply.told;
    let calls = told.calls.iter().map(call_value).collect();
    Ok(Json(reply.last(&told.content, &told.reasoning, calls)).into_response())
}

struct Reply {
    model: String,
    shape: Shape,
    told: Told,
    started: Option<std::time::Instant>,
}

fn call_value(call: &Call) -> Value {
    let arguments = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
    json!({ "id": call.id, "function": { "name": call.name, "arguments": arguments } })
}

impl Reply {
    fn line(&self, content: &str, thinking: &str, calls: Vec<Value>, done: bool) -> Value {
        let mut line = json!({ "model": self.model, "created_at": now() });
        match self.shape {
            Shape::Chat => {
                let mut message = json!({ "role": "assistant", "content": content });
                if !thinking.is_empty() {
                    message["thinking"] = json!(thinking);
                }
                if !calls.is_empty() {
                    message["tool_calls"] = Value::Array(calls);
                }
                line["message"] = message;
            }
            Shape::Text => {
                line["response"] = json!(content);
                if !thinking.is_empty() {
                    line["thinking"] = json!(thinking);
                }
            }
        }
        line["done"] = json!(done);
        line
    }

    /// The last line, with what the answer took; durations are nanoseconds.
    fn last(&self, content: &str, thinking: &str, calls: Vec<Value>) -> Value {
        let mut line = self.line(content, thinking, calls, true);
        let Some(summary) = &self.told.summary else { return line };
        let nanoseconds = |ms: f64| (ms * 1e6) as u64;
        line["done_reason"] = json!(if summary.finish == Finish::Length { "length" } else { "stop" });
        line["total_duration"] = json!(self.started.map_or(0, |started| started.elapsed().as_nanos() as u64));
        line["load_duration"] = json!(0);
        line["prompt_eval_count"] = json!(summary.prompt_tokens);
        line["prompt_eval_duration"] = json!(nanoseconds(summary.prompt_ms));
        line["eval_count"] = json!(summary.ids.len());
        line["eval_duration"] = json!(nanoseconds(summary.generate_ms));
        if let Some(why) = summary.thought_end {
            line["thinking_ended"] = json!(why.name());
        }
        self.told.warn(&mut line);
        line
    }
}

impl Narrator for Reply {
    const KIND: &'static str = "application/x-ndjson";
    const HAS_COMMENTS: bool = false;

    fn begin(&mut self, _: &mut Events) {}

    fn pieces(&mut self, _: usize, pieces: Vec<Piece>, out: &mut Events) {
        for piece in pieces {
            for event in self.told.take_in(piece) {
                let line = match event {
                    AnswerEvent::Content(text) => self.line(&text, "", Vec::new(), false),
                    AnswerEvent::Reasoning(text) => self.line("", &text, Vec::new(), false),
                    // Calls come whole here.
                    AnswerEvent::CallEnd { index } => {
                        let calls = self.told.calls.get(index).map(call_value).into_iter().collect();
                        self.line("", "", calls, false)
                    }
                    _ => continue,
                };
                out.line(&line);
            }
        }
    }

    fn end(&mut self, out: &mut Events) {
        let line = self.last("", "", Vec::new());
        out.line(&line);
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        out.line(&super::error_body(error));
    }
}
