//! `/v1/chat/completions`: a conversation in, an answer out, whole or as it comes.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use qwenkit_engine::{Piece, Priority, TokenLogprobs};
use qwenkit_text::AnswerEvent;
use serde_json::{Map, Value, json};

use crate::{
    app::{App, unix_s},
    conversation::{Conversation, Names, ToolChoice},
    error::ApiError,
    fields::Fields,
    forms,
    images::Gathering,
    logprobs, messages,
    models::ServedModel,
    run::Run,
    settings::Settings,
    sse::{self, Events, Narrator},
    told::{Call, Told, Usage},
};

/// Best tokens that may be asked for beside each token.
const TOP_LOGPROBS_MAX: i64 = 20;
/// What this interface calls things.
const NAMES: Names = Names { messages: "messages", choice: "tool_choice", form: "response_format" };

/// Reads a request to `model`.
pub(crate) fn read(mut fields: Fields, model: &ServedModel) -> Result<Conversation, ApiError> {
    let mut images = Gathering::new(model);
    let list = messages::messages(&mut fields, &mut images)?;
    let images = images.done();
    let tools = messages::tools(&mut fields)?;
    let choice = ToolChoice::take(&mut fields, &tools)?;
    let many_calls = fields.bool("parallel_tool_calls")?.unwrap_or(true);
    let form = forms::take(&mut fields)?;
    let (wish, variables) = messages::thinking(&mut fields, &list)?;
    let settings = Settings::take(&mut fields, model.session.defaults())?;
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0, TOP_LOGPROBS_MAX)?;
    if top.is_some() && !wanted {
        return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs`: true"));
    }
    refuse_unsupported(&mut fields)?;
    fields.finish()?;
    let names = Names { form: form.as_ref().map_or(NAMES.form, |(_, name)| name), ..NAMES };
    let form = form.map(|(form, _)| form);
    let logprobs = wanted.then(|| top.unwrap_or(0) as usize);
    let rest = Conversation::new(list, settings, names);
    Ok(Conversation { images, tools, choice, many_calls, form, wish, variables, logprobs, ..rest })
}

/// Parameters of OpenAI's interface for what this server does not do.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    fields.unsupported("modalities", &[json!(["text"])], "answers are text")?;
    fields.unsupported("verbosity", &[json!("medium")], "say in the prompt how long the answer shall be")?;
    for name in ["audio", "prediction", "web_search_options", "functions", "function_call"] {
        fields.unsupported(name, &[], "this server answers with text and calls of `tools`")?;
    }
    Ok(())
}

/// The handler.
pub(crate) async fn completions(State(app): State<Arc<App>>, body: Bytes) -> Result<Response, ApiError> {
    let fields = Fields::of_body(&body)?;
    let (run, reply) = start(&app, fields, Priority::Normal).await?;
    if reply.stream { Ok(sse::respond(run, reply)) } else { Ok(Json(whole(run, reply).await?).into_response()) }
}

/// Starts what a request asks for.
pub(crate) async fn start(app: &App, mut fields: Fields, priority: Priority) -> Result<(Run, Reply), ApiError> {
    let name = fields.string("model")?;
    let model = app.model(name.as_deref()).await?;
    let request = Conversation { priority, ..read(fields, &model)? };
    let (stream, include_usage) = (request.settings.stream, request.settings.include_usage);
    let (answers, logprobs) = (request.settings.answers, request.logprobs.is_some());
    let answering = request.start(&model).await?;
    let id = app.new_id("chatcmpl-");
    let own = id.trim_start_matches("chatcmpl-");
    let choices = (0..answers).map(|i| Told::new(answering.reader(), format!("{own}_{i}"))).collect();
    let reply = Reply { id, created: unix_s(), model, logprobs, choices, stream, include_usage };
    Ok((answering.run, reply))
}

/// The reply, for a stream chunk by chunk.
pub(crate) struct Reply {
    id: String,
    created: u64,
    model: Arc<ServedModel>,
    logprobs: bool,
    choices: Vec<Told>,
    pub(crate) stream: bool,
    include_usage: bool,
}

/// Answers depend on the program's version alone.
pub(crate) const FINGERPRINT: &str = concat!("qwenkit-", env!("CARGO_PKG_VERSION"));

impl Reply {
    fn object(&self, kind: &str, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        })
    }

    fn chunk(&mut self, i: usize, delta: &Value, finish: &Value) -> Value {
        let found = self.choices[i].take_logprobs();
        let logprobs = if found.is_empty() { Value::Null } else { self.logprobs(&found) };
        let choice = json!({ "index": i, "delta": delta, "logprobs": logprobs, "finish_reason": finish });
        let mut chunk = self.object("chat.completion.chunk", json!([choice]));
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn logprobs(&self, found: &[TokenLogprobs]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let tokenizer = self.model.session.tokenizer();
        let content: Vec<Value> = found.iter().map(|token| logprobs::chat(tokenizer, token)).collect();
        json!({ "content": content, "refusal": null })
    }

    fn usage(&self) -> Value {
        usage(Usage::told(self.choices.iter()))
    }
}

/// Tokens in and out, in OpenAI's words.
pub(crate) fn usage(usage: Usage) -> Value {
    let mut details = json!({ "reasoning_tokens": usage.thought });
    usage.tell_thought_end(&mut details);
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.generated,
        "total_tokens": usage.prompt + usage.generated,
        "prompt_tokens_details": { "cached_tokens": usage.cached },
        "completion_tokens_details": details,
    })
}

/// What a stream tells of an event; warnings come with the last chunk.
fn delta(told: &Told, event: AnswerEvent) -> Option<Value> {
    match event {
        AnswerEvent::Content(text) => Some(json!({ "content": text })),
        AnswerEvent::Reasoning(text) => Some(json!({ "reasoning_content": text })),
        AnswerEvent::CallBegin { index, name } => {
            let id = told.calls.get(index).map(|call| call.id.as_str());
            let function = json!({ "name": name, "arguments": "" });
            Some(json!({ "tool_calls": [{ "index": index, "id": id, "type": "function", "function": function }] }))
        }
        AnswerEvent::CallArguments { index, delta } => {
            Some(json!({ "tool_calls": [{ "index": index, "function": { "arguments": delta } }] }))
        }
        AnswerEvent::CallEnd { .. } | AnswerEvent::Warning(_) => None,
    }
}

fn finish_reason(told: &Told) -> Value {
    if told.wants_calls() { json!("tool_calls") } else { json!(told.finish().map(qwenkit_engine::Finish::name)) }
}

fn message(told: &Told) -> Value {
    let mut message = Map::new();
    message.insert("role".to_owned(), json!("assistant"));
    let no_content = told.content.is_empty() && !told.calls.is_empty();
    message.insert("content".to_owned(), if no_content { Value::Null } else { json!(told.content) });
    if !told.reasoning.is_empty() {
        message.insert("reasoning_content".to_owned(), json!(told.reasoning));
    }
    if !told.calls.is_empty() {
        let call = |Call { id, name, arguments }: &Call| json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } });
        message.insert("tool_calls".to_owned(), told.calls.iter().map(call).collect());
    }
    message.insert("refusal".to_owned(), Value::Null);
    Value::Object(message)
}

impl Narrator for Reply {
    fn begin(&mut self, out: &mut Events) {
        for i in 0..self.choices.len() {
            let delta = json!({ "role": "assistant", "content": "" });
            let chunk = self.chunk(i, &delta, &Value::Null);
            out.data(&chunk);
        }
    }

    fn pieces(&mut self, i: usize, pieces: Vec<Piece>, out: &mut Events) {
        for piece in pieces {
            out.progress(&piece);
            for event in self.choices[i].take_in(piece) {
                if let Some(delta) = delta(&self.choices[i], event) {
                    let chunk = self.chunk(i, &delta, &Value::Null);
                    out.data(&chunk);
                }
            }
        }
        if self.choices[i].summary.is_some() {
            let reason = finish_reason(&self.choices[i]);
            let mut chunk = self.chunk(i, &json!({}), &reason);
            self.choices[i].warn(&mut chunk["choices"][0]);
            out.data(&chunk);
        }
    }

    fn end(&mut self, out: &mut Events) {
        if self.include_usage {
            let mut chunk = self.object("chat.completion.chunk", json!([]));
            chunk["usage"] = self.usage();
            out.data(&chunk);
        }
        out.done();
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        out.data(&error.body());
    }
}

/// The whole reply.
///
/// # Errors
/// When the engine stops in the middle.
pub(crate) async fn whole(mut run: Run, mut reply: Reply) -> Result<Value, ApiError> {
    run.drain(|i, piece| drop(reply.choices[i].take_in(piece))).await?;
    let choice = |(i, told): (usize, &Told)| {
        let mut choice = json!({
            "index": i,
            "message": message(told),
            "logprobs": reply.logprobs(&told.logprobs),
            "finish_reason": finish_reason(told),
        });
        told.warn(&mut choice);
        choice
    };
    let choices = reply.choices.iter().enumerate().map(choice).collect();
    let mut object = reply.object("chat.completion", choices);
    object["usage"] = reply.usage();
    Ok(object)
}
