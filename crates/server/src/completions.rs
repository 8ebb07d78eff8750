//! `/v1/completions`: text or token ids in, what follows out; with `echo` and `logprobs`, the prompt scored.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use qwenkit_engine::{Ask, Piece, Priority, Prompt, Summary};
use qwenkit_tensor::TokenId;
use serde_json::{Value, json};

use crate::{
    app::{App, unix_s},
    chat::{FINGERPRINT, usage},
    error::ApiError,
    fields::{Fields, wrong},
    images::Memory,
    logprobs::{TextLogprobs, token_text},
    models::ServedModel,
    run::{Asked, Run},
    settings::{Settings, ids},
    sse::{self, Events, Narrator},
    told::Usage,
};

/// Prompts of one request, and answers to all of them together.
const PROMPTS_MAX: usize = 1024;
/// Best tokens that may be asked for beside each token.
const LOGPROBS_MAX: i64 = 20;
/// Tokens of an answer where the request does not say, as OpenAI has it.
const MAX_TOKENS: usize = 16;

struct TextRequest {
    prompts: Vec<TextPrompt>,
    settings: Settings,
    logprobs: Option<usize>,
    echo: bool,
}

#[derive(Clone)]
enum TextPrompt {
    Text(String),
    Ids(Vec<TokenId>),
}

impl TextRequest {
    fn read(mut fields: Fields, model: &ServedModel) -> Result<TextRequest, ApiError> {
        let prompt = fields.take("prompt");
        let prompts = prompts(fields.required("prompt", prompt)?)?;
        let mut settings = Settings::take(&mut fields, model.session.defaults())?;
        settings.max_tokens = settings.max_tokens.or(Some(MAX_TOKENS.max(settings.min_tokens)));
        let logprobs = match fields.take("logprobs") {
            None | Some(Value::Bool(false)) => None,
            Some(Value::Bool(true)) => Some(1),
            Some(value) => Some(crate::fields::integer("logprobs", &value, 0, LOGPROBS_MAX)? as usize),
        };
        let echo = fields.bool("echo")?.unwrap_or(false);
        if let Some(best_of) = fields.integer("best_of", 1, i64::MAX)?.filter(|&n| n as usize != settings.answers) {
            let message = format!("`best_of` is {best_of}, and only as many answers as `n` are generated");
            return Err(ApiError::invalid("best_of", message).with_code("unsupported_parameter"));
        }
        fields.unsupported(
            "suffix",
            &[json!("")],
            "write the model's own fill-in-the-middle tokens into the prompt",
        )?;
        fields.finish()?;
        if prompts.len() * settings.answers > PROMPTS_MAX {
            let message =
                format!("{} answers are asked for; {PROMPTS_MAX} are the most", prompts.len() * settings.answers);
            return Err(ApiError::invalid("prompt", message));
        }
        Ok(TextRequest { prompts, settings, logprobs, echo })
    }

    fn ask(&self, i: usize, priority: Priority) -> Ask {
        let settings = &self.settings;
        let prompt = match &self.prompts[i / settings.answers] {
            TextPrompt::Text(text) => Prompt::Text(text.clone()),
            TextPrompt::Ids(ids) => Prompt::Ids(ids.clone()),
        };
        Ask {
            prompt,
            sampling: settings.sampling_of(i % settings.answers),
            max_tokens: settings.max_tokens,
            min_tokens: settings.min_tokens,
            stop: settings.stop.clone(),
            logprobs: self.logprobs,
            prompt_logprobs: self.logprobs.filter(|_| self.echo),
            ignore_stop_tokens: settings.ignore_stop_tokens,
            stop_tokens: settings.stop_tokens.clone(),
            priority,
            ..Ask::default()
        }
    }
}

fn prompts(value: Value) -> Result<Vec<TextPrompt>, ApiError> {
    let expected = "a string, a list of strings, a list of token ids, or a list of such lists";
    let list = match value {
        Value::String(text) => return Ok(vec![TextPrompt::Text(text)]),
        Value::Array(list) if !list.is_empty() => list,
        other => return Err(wrong("prompt", &other, expected)),
    };
    if list.iter().all(Value::is_number) {
        return Ok(vec![TextPrompt::Ids(ids("prompt", &list)?)]);
    }
    let one = |(i, value): (usize, Value)| match value {
        Value::String(text) => Ok(TextPrompt::Text(text)),
        Value::Array(list) => Ok(TextPrompt::Ids(ids(&format!("prompt[{i}]"), &list)?)),
        other => Err(wrong(&format!("prompt[{i}]"), &other, expected)),
    };
    list.into_iter().enumerate().map(one).collect()
}

/// The handler.
pub(crate) async fn completions(State(app): State<Arc<App>>, body: Bytes) -> Result<Response, ApiError> {
    let (run, reply) = start(&app, Fields::of_body(&body)?, Priority::Normal).await?;
    if reply.stream { Ok(sse::respond(run, reply)) } else { Ok(Json(whole(run, reply).await?).into_response()) }
}

/// Starts what a request asks for.
pub(crate) async fn start(app: &App, mut fields: Fields, priority: Priority) -> Result<(Run, Reply), ApiError> {
    let name = fields.string("model")?;
    let model = app.model(name.as_deref()).await?;
    let request = Arc::new(TextRequest::read(fields, &model)?);
    let answers = request.prompts.len() * request.settings.answers;
    let asked = Arc::clone(&request);
    let asks = move |model: &ServedModel| {
        let ask = |i| Ask { adapter: model.adapter.clone(), ..asked.ask(i, priority) };
        Ok(Asked { asks: (0..answers).map(ask).collect(), memory: Memory::default() })
    };
    let run = Run::start(&model, asks, "prompt").await?;
    let choices: Vec<Choice> =
        run.transcripts().iter().map(|t| Choice::new(&model, &request, t.prompt_ids())).collect();
    let settings = &request.settings;
    let reply = Reply {
        id: app.new_id("cmpl-"),
        created: unix_s(),
        model,
        count: request.logprobs,
        stream: settings.stream,
        include_usage: settings.include_usage,
        answers: settings.answers,
        choices,
    };
    Ok((run, reply))
}

/// One of a request's answers.
struct Choice {
    /// Not told yet.
    text: String,
    logprobs: TextLogprobs,
    summary: Option<Summary>,
}

impl Choice {
    fn new(model: &ServedModel, request: &TextRequest, prompt_ids: &[TokenId]) -> Choice {
        let tokenizer = model.session.tokenizer();
        let mut choice = Choice { text: String::new(), logprobs: TextLogprobs::default(), summary: None };
        if request.echo {
            choice.text = prompt_ids.iter().map(|&id| token_text(tokenizer, id)).collect();
            if let TextPrompt::Text(text) = &request.prompts[0]
                && request.prompts.len() == 1
            {
                choice.text.clone_from(text);
            }
            if let (Some(_), Some(&first)) = (request.logprobs, prompt_ids.first()) {
                choice.logprobs.push_first(tokenizer, first);
            }
        }
        choice
    }
}

pub(crate) struct Reply {
    id: String,
    created: u64,
    model: Arc<ServedModel>,
    /// Best tokens beside each, if log-probabilities are wanted.
    count: Option<usize>,
    stream: bool,
    include_usage: bool,
    /// Answers to each prompt.
    answers: usize,
    choices: Vec<Choice>,
}

impl Reply {
    fn take_in(&mut self, i: usize, piece: Piece) {
        let (tokenizer, count) = (self.model.session.tokenizer(), self.count.unwrap_or(0));
        let choice = &mut self.choices[i];
        match piece {
            Piece::Prefill { .. } => {}
            Piece::Prompt(scored) => scored.iter().for_each(|token| choice.logprobs.push(tokenizer, token, count)),
            Piece::Text(piece) => {
                choice.text.push_str(&piece.text);
                piece.logprobs.iter().for_each(|token| choice.logprobs.push(tokenizer, token, count));
            }
            Piece::Done(summary) => choice.summary = Some(summary),
        }
    }

    /// What was not told of the answer `i`.
    fn choice(&mut self, i: usize) -> Value {
        let choice = &mut self.choices[i];
        let finish = choice.summary.as_ref().map(|summary| summary.finish.name());
        let logprobs = if self.count.is_some() { choice.logprobs.take() } else { Value::Null };
        let text = std::mem::take(&mut choice.text);
        json!({ "index": i, "text": text, "logprobs": logprobs, "finish_reason": finish })
    }

    fn object(&self, choices: &Value) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        })
    }

    /// Unlike chats, text completions have many prompts, each of which counts.
    fn usage(&self) -> Value {
        let all = || self.choices.iter().filter_map(|choice| choice.summary.as_ref());
        // Answers to one prompt share it.
        let prompt = all().step_by(self.answers).map(|summary| summary.prompt_tokens).sum();
        usage(Usage { prompt, ..Usage::of(all()) })
    }
}

impl Narrator for Reply {
    fn begin(&mut self, _: &mut Events) {}

    fn pieces(&mut self, i: usize, pieces: Vec<Piece>, out: &mut Events) {
        for piece in pieces {
            out.progress(&piece);
            if matches!(piece, Piece::Prefill { .. }) {
                continue;
            }
            self.take_in(i, piece);
            let choice = &self.choices[i];
            if choice.summary.is_some() || !choice.text.is_empty() || !choice.logprobs.is_empty() {
                let choice = self.choice(i);
                out.data(&self.object(&json!([choice])));
            }
        }
    }

    fn end(&mut self, out: &mut Events) {
        if self.include_usage {
            let mut chunk = self.object(&json!([]));
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
    run.drain(|i, piece| reply.take_in(i, piece)).await?;
    let choices: Vec<Value> = (0..reply.choices.len()).map(|i| reply.choice(i)).collect();
    let mut object = reply.object(&json!(choices));
    object["usage"] = reply.usage();
    Ok(object)
}
