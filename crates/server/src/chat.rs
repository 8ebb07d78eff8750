//! `/v1/chat/completions`: a conversation in, an answer out, whole or as it comes.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use qwenkit_engine::{Ask, Finish, Piece, Prompt, Summary, TextPiece, TokenLogprobs};
use qwenkit_text::{ChatInput, ReplyParser, ReplyPart};
use serde_json::{Map, Value, json};

use crate::{
    app::{App, ServedModel, unix_s},
    error::ApiError,
    fields::Fields,
    logprobs,
    messages::{self, ToolChoice},
    run::Run,
    settings::Settings,
    sse::{self, Events, Narrator},
};

/// Best tokens that may be asked for beside each token.
const TOP_LOGPROBS_MAX: i64 = 20;

/// A request, read.
pub(crate) struct ChatRequest {
    pub(crate) input: ChatInput,
    pub(crate) settings: Settings,
    /// So many best tokens beside each token's log-probability.
    pub(crate) logprobs: Option<usize>,
    /// Those that the model may call.
    pub(crate) tools: Vec<Value>,
}

impl ChatRequest {
    /// Reads a request to `model`.
    pub(crate) fn read(mut fields: Fields, model: &ServedModel) -> Result<ChatRequest, ApiError> {
        let template = model.session.template();
        let messages = messages::messages(&mut fields)?;
        let declared = messages::tools(&mut fields)?;
        let choice = ToolChoice::take(&mut fields, &declared)?;
        if matches!(choice, ToolChoice::Required | ToolChoice::Named(_)) {
            let message = "`tool_choice` asks for a call that the model must make; only auto and none are supported";
            return Err(ApiError::invalid("tool_choice", message).with_code("unsupported_parameter"));
        }
        fields.unsupported("parallel_tool_calls", &[json!(true)], "the model decides how many tools it calls")?;
        fields.unsupported(
            "response_format",
            &[json!({"type": "text"})],
            "ask for JSON in the prompt, and check it",
        )?;
        let tools = if choice == ToolChoice::Never { Vec::new() } else { declared };
        let variables = messages::template_variables(&mut fields, template)?;
        let settings = Settings::take(&mut fields, model.session.defaults())?;
        let wanted = fields.bool("logprobs")?.unwrap_or(false);
        let top = fields.integer("top_logprobs", 0, TOP_LOGPROBS_MAX)?;
        if top.is_some() && !wanted {
            return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs`: true"));
        }
        refuse_unsupported(&mut fields)?;
        fields.finish()?;
        let input = messages::input(messages, &tools, variables);
        Ok(ChatRequest { input, settings, logprobs: wanted.then(|| top.unwrap_or(0) as usize), tools })
    }

    /// The question for the answer `i`.
    pub(crate) fn ask(&self, i: usize) -> Ask {
        let settings = &self.settings;
        Ask {
            prompt: Prompt::Chat(self.input.clone()),
            sampling: settings.sampling_of(i),
            max_tokens: settings.max_tokens,
            stop: settings.stop.clone(),
            logprobs: self.logprobs,
            ignore_stop_tokens: settings.ignore_stop_tokens,
            stop_tokens: settings.stop_tokens.clone(),
            ..Ask::default()
        }
    }
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

/// What a reply needs to know of its request.
pub(crate) struct ReplyPlan {
    pub(crate) model: Arc<ServedModel>,
    pub(crate) logprobs: bool,
    pub(crate) tools: Vec<Value>,
    /// Whether the model may think, and if so whether the prompt has opened a thought.
    pub(crate) thinks: Option<bool>,
}

impl ReplyPlan {
    /// For answers to `request` that run.
    pub(crate) fn new(model: &Arc<ServedModel>, request: &ChatRequest, run: &Run) -> ReplyPlan {
        ReplyPlan {
            model: Arc::clone(model),
            logprobs: request.logprobs.is_some(),
            tools: request.tools.clone(),
            thinks: model.session.template().filter(|t| messages::can_think(t)).map(|_| opens_thought(model, run)),
        }
    }

    /// A fresh reader of one answer.
    pub(crate) fn parser(&self) -> ReplyParser {
        ReplyParser::new(self.thinks, &self.tools)
    }
}

/// Whether the prompt ends inside a thought.
fn opens_thought(model: &ServedModel, run: &Run) -> bool {
    let ids = run.transcripts().first().map_or(&[][..], |t| t.prompt_ids());
    let end = model.session.tokenizer().decode(&ids[ids.len().saturating_sub(8)..], true);
    end.trim_end().ends_with("<think>")
}

/// The handler.
pub(crate) async fn completions(State(app): State<Arc<App>>, body: Bytes) -> Result<Response, ApiError> {
    let mut fields = Fields::of_body(&body)?;
    let name = fields.string("model")?;
    let model = app.model(name.as_deref())?;
    let request = ChatRequest::read(fields, &model)?;
    let (stream, include_usage, answers) =
        (request.settings.stream, request.settings.include_usage, request.settings.answers);
    let request = Arc::new(request);
    let asked = Arc::clone(&request);
    let asks = move |_: &ServedModel| Ok((0..answers).map(|i| asked.ask(i)).collect());
    let run = Run::start(&model, asks, "messages").await?;
    let plan = ReplyPlan::new(&model, &request, &run);
    let id = app.new_id("chatcmpl");
    let choices = (0..answers).map(|_| Choice::new(&plan)).collect();
    let reply = Reply { id, created: unix_s(), plan, choices, include_usage };
    if stream { Ok(sse::respond(run, reply)) } else { whole(run, reply).await }
}

/// One of a request's answers.
struct Choice {
    parser: ReplyParser,
    message: Message,
    logprobs: Vec<TokenLogprobs>,
    summary: Option<Summary>,
    /// Log-probabilities of tokens whose text is still held back.
    untold: Vec<TokenLogprobs>,
}

impl Choice {
    fn new(plan: &ReplyPlan) -> Choice {
        Choice {
            parser: plan.parser(),
            message: Message::default(),
            logprobs: Vec::new(),
            summary: None,
            untold: Vec::new(),
        }
    }

    fn finish_reason(&self) -> Value {
        match &self.summary {
            Some(summary) if summary.finish == Finish::Stop && self.message.has_calls() => json!("tool_calls"),
            Some(summary) => json!(summary.finish.name()),
            None => Value::Null,
        }
    }
}

/// An assistant's message as it grows.
#[derive(Default)]
pub(crate) struct Message {
    pub(crate) content: String,
    pub(crate) reasoning: String,
    /// (id, name, arguments)
    pub(crate) calls: Vec<(String, String, String)>,
}

impl Message {
    pub(crate) fn has_calls(&self) -> bool {
        !self.calls.is_empty()
    }

    /// Takes in a part of the answer; returns the delta that tells of it.
    pub(crate) fn add(&mut self, part: ReplyPart, call_id: impl FnOnce() -> String) -> Value {
        match part {
            ReplyPart::Content(text) => {
                self.content.push_str(&text);
                json!({ "content": text })
            }
            ReplyPart::Reasoning(text) => {
                self.reasoning.push_str(&text);
                json!({ "reasoning_content": text })
            }
            ReplyPart::Call { index, name } => {
                let id = call_id();
                self.calls.push((id.clone(), name.clone(), String::new()));
                let function = json!({ "name": name, "arguments": "" });
                json!({ "tool_calls": [{ "index": index, "id": id, "type": "function", "function": function }] })
            }
            ReplyPart::Arguments { index, text } => {
                if let Some(call) = self.calls.get_mut(index) {
                    call.2.push_str(&text);
                }
                json!({ "tool_calls": [{ "index": index, "function": { "arguments": text } }] })
            }
        }
    }

    /// The whole message.
    fn value(&self) -> Value {
        let mut message = Map::new();
        message.insert("role".to_owned(), json!("assistant"));
        let no_content = self.content.is_empty() && self.has_calls();
        message.insert("content".to_owned(), if no_content { Value::Null } else { json!(self.content) });
        if !self.reasoning.is_empty() {
            message.insert("reasoning_content".to_owned(), json!(self.reasoning));
        }
        if self.has_calls() {
            let call = |(id, name, arguments): &(String, String, String)| json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } });
            message.insert("tool_calls".to_owned(), self.calls.iter().map(call).collect());
        }
        message.insert("refusal".to_owned(), Value::Null);
        Value::Object(message)
    }
}

/// The whole reply, for a stream chunk by chunk.
struct Reply {
    id: String,
    created: u64,
    plan: ReplyPlan,
    choices: Vec<Choice>,
    include_usage: bool,
}

impl Reply {
    /// Takes in a piece of text of the answer `i`; returns the deltas that tell of it.
    fn text(&mut self, i: usize, piece: TextPiece) -> Vec<Value> {
        let parts = self.choices[i].parser.push(&piece.text);
        self.choices[i].untold.extend(piece.logprobs);
        self.deltas(i, parts)
    }

    fn deltas(&mut self, i: usize, parts: Vec<ReplyPart>) -> Vec<Value> {
        let (id, choice) = (&self.id, &mut self.choices[i]);
        let mut deltas = Vec::new();
        for part in parts {
            let count = choice.message.calls.len();
            deltas
                .push(choice.message.add(part, || format!("call_{}_{i}_{count}", id.trim_start_matches("chatcmpl-"))));
        }
        deltas
    }

    fn logprobs(&self, found: &[TokenLogprobs]) -> Value {
        if !self.plan.logprobs {
            return Value::Null;
        }
        let tokenizer = self.plan.model.session.tokenizer();
        let content: Vec<Value> = found.iter().map(|token| logprobs::chat(tokenizer, token)).collect();
        json!({ "content": content, "refusal": null })
    }

    fn object(&self, kind: &str, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.plan.model.name,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        })
    }

    fn chunk(&self, i: usize, delta: &Value, logprobs: Value, finish: Value) -> Value {
        let choice = json!({ "index": i, "delta": delta, "logprobs": logprobs, "finish_reason": finish });
        let mut chunk = self.object("chat.completion.chunk", json!([choice]));
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn usage(&self) -> Value {
        usage(self.choices.iter().filter_map(|choice| choice.summary.as_ref()))
    }
}

/// Answers depend on the program's version alone.
pub(crate) const FINGERPRINT: &str = concat!("qwenkit-", env!("CARGO_PKG_VERSION"));

/// Tokens in and out. Answers to one prompt share it.
pub(crate) fn usage<'a>(summaries: impl Iterator<Item = &'a Summary>) -> Value {
    let (mut prompt, mut cached, mut generated) = (0, 0, 0);
    for summary in summaries {
        prompt = summary.prompt_tokens;
        cached = cached.max(summary.cached_tokens);
        generated += summary.ids.len();
    }
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": { "cached_tokens": cached },
    })
}

impl Narrator for Reply {
    fn begin(&mut self, out: &mut Events) {
        for i in 0..self.choices.len() {
            let delta = json!({ "role": "assistant", "content": "" });
            out.data(&self.chunk(i, &delta, Value::Null, Value::Null));
        }
    }

    fn pieces(&mut self, i: usize, pieces: Vec<Piece>, out: &mut Events) {
        for piece in pieces {
            match piece {
                Piece::Prefill { done_tokens, total_tokens } => {
                    out.comment(&format!("prefill {done_tokens}/{total_tokens}"))
                }
                Piece::Prompt(_) => {}
                Piece::Text(piece) => {
                    for delta in self.text(i, piece) {
                        let found = std::mem::take(&mut self.choices[i].untold);
                        out.data(&self.chunk(i, &delta, self.logprobs(&found), Value::Null));
                    }
                }
                Piece::Done(summary) => {
                    let rest = self.choices[i].parser.finish();
                    for delta in self.deltas(i, rest) {
                        out.data(&self.chunk(i, &delta, Value::Null, Value::Null));
                    }
                    let choice = &mut self.choices[i];
                    choice.summary = Some(summary);
                    let found = std::mem::take(&mut choice.untold);
                    let (logprobs, reason) = (self.logprobs(&found), self.choices[i].finish_reason());
                    out.data(&self.chunk(i, &json!({}), logprobs, reason));
                }
            }
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

async fn whole(mut run: Run, mut reply: Reply) -> Result<Response, ApiError> {
    while let Some(next) = run.next().await {
        let (i, pieces) = next?;
        for piece in pieces {
            match piece {
                Piece::Text(piece) => {
                    reply.text(i, piece);
                    let found = std::mem::take(&mut reply.choices[i].untold);
                    reply.choices[i].logprobs.extend(found);
                }
                Piece::Done(summary) => {
                    let rest = reply.choices[i].parser.finish();
                    reply.deltas(i, rest);
                    reply.choices[i].summary = Some(summary);
                }
                Piece::Prefill { .. } | Piece::Prompt(_) => {}
            }
        }
    }
    let choice = |(i, choice): (usize, &Choice)| {
        json!({
            "index": i,
            "message": choice.message.value(),
            "logprobs": reply.logprobs(&choice.logprobs),
            "finish_reason": choice.finish_reason(),
        })
    };
    let choices = reply.choices.iter().enumerate().map(choice).collect();
    let mut object = reply.object("chat.completion", choices);
    object["usage"] = reply.usage();
    Ok(Json(object).into_response())
}
