//! Anthropic's messages interface: `/v1/messages` and `/v1/messages/count_tokens`.

mod request;

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use qwenkit_engine::{Finish, Piece};
use serde_json::{Value, json};

use crate::{
    app::App,
    blocks::{Block, Blocks, Change},
    error::ApiError,
    fields::Fields,
    sse::{self, Events, Narrator},
    text::blocking,
    told::{Told, Usage},
};

/// `/v1/messages`
pub(crate) async fn messages(State(app): State<Arc<App>>, body: Bytes) -> Result<Response, ApiError> {
    let mut fields = Fields::of_body(&body)?;
    let name = fields.string("model")?;
    let model = app.model(Some(&fields.required("model", name)?)).await?;
    let request = request::read(fields, &model)?;
    let stream = request.settings.stream;
    let mut answering = request.start(&model).await?;
    let id = app.new_id("msg_");
    let prompt_tokens = answering.run.transcripts().first().map_or(0, |t| t.prompt_ids().len());
    let told = Told::new(answering.reader(), id.trim_start_matches("msg_"));
    let mut reply = Reply { id, model: model.name.clone(), prompt_tokens, told, blocks: Blocks::default() };
    if stream {
        return Ok(sse::respond(answering.run, reply));
    }
    answering.run.drain(|_, piece| drop(reply.take_in(piece))).await?;
    Ok(Json(reply.message(reply.content(), reply.usage())).into_response())
}

/// `/v1/messages/count_tokens`
pub(crate) async fn count_tokens(State(app): State<Arc<App>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of_body(&body)?;
    let name = fields.string("model")?;
    let model = app.model(Some(&fields.required("model", name)?)).await?;
    let request = request::read_to_count(fields, &model)?;
    let count = blocking(move || request.count(&model)).await?;
    Ok(Json(json!({ "input_tokens": count })))
}

/// The error object of this interface.
pub(crate) fn error_body(error: &ApiError) -> Value {
    let kind = match error.status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    };
    json!({ "type": "error", "error": { "type": kind, "message": error.message } })
}

struct Reply {
    id: String,
    model: String,
    prompt_tokens: usize,
    told: Told,
    blocks: Blocks,
}

impl Reply {
    fn take_in(&mut self, piece: Piece) -> Vec<Change> {
        let mut changes = Vec::new();
        for event in self.told.take_in(piece) {
            changes.extend(self.blocks.take_in(&self.told, event));
        }
        changes
    }

    fn content(&self) -> Value {
        self.blocks.all().iter().map(whole_block).collect()
    }

    fn message(&self, content: Value, usage: Value) -> Value {
        let mut message = json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": self.stop_reason(),
            "stop_sequence": self.told.summary.as_ref().and_then(|summary| summary.stop_text.as_ref()),
            "usage": usage,
        });
        self.told.warn(&mut message);
        message
    }

    fn stop_reason(&self) -> Value {
        let Some(summary) = &self.told.summary else { return Value::Null };
        match summary.finish {
            _ if self.told.wants_calls() => json!("tool_use"),
            _ if summary.stop_text.is_some() => json!("stop_sequence"),
            Finish::Length => json!("max_tokens"),
            Finish::Stop | Finish::Cancelled => json!("end_turn"),
        }
    }

    /// Tokens read from the cache are counted apart here.
    fn usage(&self) -> Value {
        let usage = Usage::of(self.told.summary.iter());
        let (cached, generated) = (usage.cached.min(self.prompt_tokens), usage.generated);
        let mut told = json!({
            "input_tokens": self.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": generated,
        });
        usage.tell_thought_end(&mut told);
        told
    }
}

fn whole_block(block: &Block) -> Value {
    match block {
        Block::Thought(text) => json!({ "type": "thinking", "thinking": text, "signature": "" }),
        Block::Text(text) => json!({ "type": "text", "text": text }),
        Block::Call(call) => {
            let input = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
            json!({ "type": "tool_use", "id": tool_id(&call.id), "name": call.name, "input": input })
        }
    }
}

/// Ids of calls begin as they do at Anthropic.
fn tool_id(id: &str) -> String {
    id.replacen("call_", "toolu_", 1)
}

impl Narrator for Reply {
    fn begin(&mut self, out: &mut Events) {
        let message = self.message(json!([]), self.usage());
        out.event("message_start", &json!({ "type": "message_start", "message": message }));
        out.event("ping", &json!({ "type": "ping" }));
    }

    fn pieces(&mut self, _: usize, pieces: Vec<Piece>, out: &mut Events) {
        for piece in pieces {
            out.progress(&piece);
            for change in self.take_in(piece) {
                self.tell(change, out);
            }
        }
    }

    fn end(&mut self, out: &mut Events) {
        for change in self.blocks.close() {
            self.tell(change, out);
        }
        let stop_text = self.told.summary.as_ref().and_then(|summary| summary.stop_text.as_ref());
        let delta = json!({ "stop_reason": self.stop_reason(), "stop_sequence": stop_text });
        let mut end = json!({ "type": "message_delta", "delta": delta, "usage": self.usage() });
        self.told.warn(&mut end);
        out.event("message_delta", &end);
        out.event("message_stop", &json!({ "type": "message_stop" }));
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        out.event("error", &error_body(error));
    }
}

impl Reply {
    fn tell(&self, change: Change, out: &mut Events) {
        match change {
            Change::Opens(index) => {
                let block = match &self.blocks.all()[index] {
                    Block::Thought(_) => json!({ "type": "thinking", "thinking": "", "signature": "" }),
                    Block::Text(_) => json!({ "type": "text", "text": "" }),
                    Block::Call(call) => {
                        json!({ "type": "tool_use", "id": tool_id(&call.id), "name": call.name, "input": {} })
                    }
                };
                let event = json!({ "type": "content_block_start", "index": index, "content_block": block });
                out.event("content_block_start", &event);
            }
            Change::Grows(index, text) => {
                let delta = match &self.blocks.all()[index] {
                    Block::Thought(_) => json!({ "type": "thinking_delta", "thinking": text }),
                    Block::Text(_) => json!({ "type": "text_delta", "text": text }),
                    Block::Call(_) => json!({ "type": "input_json_delta", "partial_json": text }),
                };
                let event = json!({ "type": "content_block_delta", "index": index, "delta": delta });
                out.event("content_block_delta", &event);
            }
            Change::Closes(index) => {
                out.event("content_block_stop", &json!({ "type": "content_block_stop", "index": index }));
            }
        }
    }
}
