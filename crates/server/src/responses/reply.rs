//! A response as it grows, whole and as events.

use std::sync::Arc;

use qwenkit_engine::{Finish, Piece};
use qwenkit_text::AnswerReader;
use serde_json::{Map, Value, json};

use super::{keep, request::Request};
use crate::{
    app::{App, unix_s},
    blocks::{Block, Blocks, Change},
    error::ApiError,
    keys::Caller,
    sse::{Events, Narrator},
    told::{Told, Usage},
};

pub(super) struct Reply {
    pub(super) app: Arc<App>,
    owner: String,
    id: String,
    created: u64,
    model: String,
    previous: Option<String>,
    input: Vec<Value>,
    echoed: Map<String, Value>,
    pub(super) store: bool,
    pub(super) stream: bool,
    told: Told,
    blocks: Blocks,
    /// Events so far.
    sequence: u64,
}

impl Reply {
    pub(super) fn new(
        app: &Arc<App>,
        caller: &Caller,
        model: &str,
        request: Request,
        previous: Option<String>,
        reader: AnswerReader,
    ) -> Reply {
        let id = app.new_id("resp_");
        Reply {
            app: Arc::clone(app),
            owner: caller.id.clone(),
            created: unix_s(),
            model: model.to_owned(),
            previous,
            input: request.input,
            echoed: request.echoed,
            store: request.store,
            stream: request.conversation.settings.stream,
            told: Told::new(reader, id.trim_start_matches("resp_")),
            blocks: Blocks::default(),
            sequence: 0,
            id,
        }
    }

    pub(super) fn take_in(&mut self, piece: Piece) -> Vec<Change> {
        let mut changes = Vec::new();
        for event in self.told.take_in(piece) {
            changes.extend(self.blocks.take_in(&self.told, event));
        }
        if self.told.summary.is_some() {
            changes.extend(self.blocks.close());
        }
        changes
    }

    /// Whether nobody waits for it.
    pub(super) fn is_background(&self) -> bool {
        self.echoed.get("background") == Some(&json!(true))
    }

    fn status(&self) -> &'static str {
        match self.told.finish() {
            None => "in_progress",
            Some(Finish::Stop) => "completed",
            Some(Finish::Length | Finish::Cancelled) => "incomplete",
        }
    }

    /// What is kept.
    pub(super) fn record(&self) -> Value {
        json!({ "response": self.response(), "input": self.input, "owner": self.owner })
    }

    fn response(&self) -> Value {
        let status = self.status();
        let output: Vec<Value> = (0..self.blocks.all().len()).map(|i| self.item(i, status)).collect();
        let mut response = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": null,
            "incomplete_details": if status == "incomplete" { json!({ "reason": "max_output_tokens" }) } else { Value::Null },
            "model": self.model,
            "output": output,
            "previous_response_id": self.previous,
            "store": self.store,
            "usage": self.usage(),
        });
        if let Value::Object(map) = &mut response {
            map.extend(self.echoed.clone());
        }
        self.told.warn(&mut response);
        response
    }

    fn usage(&self) -> Value {
        if self.told.summary.is_none() {
            return Value::Null;
        }
        let usage = Usage::told(std::iter::once(&self.told));
        let mut details = json!({ "reasoning_tokens": usage.thought });
        usage.tell_thought_end(&mut details);
        json!({
            "input_tokens": usage.prompt,
            "input_tokens_details": { "cached_tokens": usage.cached },
            "output_tokens": usage.generated,
            "output_tokens_details": details,
            "total_tokens": usage.prompt + usage.generated,
        })
    }

    fn item_id(&self, i: usize) -> String {
        let kind = match &self.blocks.all()[i] {
            Block::Thought(_) => "rs",
            Block::Text(_) => "msg",
            Block::Call(_) => "fc",
        };
        format!("{kind}_{}_{i}", self.id.trim_start_matches("resp_"))
    }

    /// An output item; `completed` unless the answer was cut off in it.
    fn item(&self, i: usize, status: &str) -> Value {
        let is_last = i + 1 == self.blocks.all().len();
        let status = if is_last { status } else { "completed" };
        let id = self.item_id(i);
        match &self.blocks.all()[i] {
            Block::Thought(text) => {
                let content = json!([{ "type": "reasoning_text", "text": text }]);
                json!({ "id": id, "type": "reasoning", "summary": [], "content": content, "status": status })
            }
            Block::Text(text) => {
                let content = json!([text_part(text)]);
                json!({ "id": id, "type": "message", "role": "assistant", "status": status, "content": content })
            }
            Block::Call(call) => json!({
                "id": id,
                "type": "function_call",
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments,
                "status": status,
            }),
        }
    }

    /// An item that has begun and is empty.
    fn empty_item(&self, i: usize) -> Value {
        let mut item = self.item(i, "in_progress");
        match &self.blocks.all()[i] {
            Block::Thought(_) | Block::Text(_) => item["content"] = json!([]),
            Block::Call(_) => item["arguments"] = json!(""),
        }
        item
    }

    fn event(&mut self, kind: &str, mut data: Value, out: &mut Events) {
        data["type"] = json!(kind);
        data["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        out.event(kind, &data);
    }

    fn tell(&mut self, change: Change, out: &mut Events) {
        match change {
            Change::Opens(i) => {
                let item = self.empty_item(i);
                self.event("response.output_item.added", json!({ "output_index": i, "item": item }), out);
                if let Some(part) = part(&self.blocks.all()[i], "") {
                    let data =
                        json!({ "item_id": self.item_id(i), "output_index": i, "content_index": 0, "part": part });
                    self.event("response.content_part.added", data, out);
                }
            }
            Change::Grows(i, delta) => {
                let mut data = json!({ "item_id": self.item_id(i), "output_index": i, "delta": delta });
                let kind = match &self.blocks.all()[i] {
                    Block::Thought(_) => "response.reasoning_text.delta",
                    Block::Text(_) => "response.output_text.delta",
                    Block::Call(_) => "response.function_call_arguments.delta",
                };
                if !matches!(self.blocks.all()[i], Block::Call(_)) {
                    data["content_index"] = json!(0);
                    data["logprobs"] = json!([]);
                }
                self.event(kind, data, out);
            }
            Change::Closes(i) => self.tell_end(i, out),
        }
    }

    fn tell_end(&mut self, i: usize, out: &mut Events) {
        let block = self.blocks.all()[i].clone();
        let place = json!({ "item_id": self.item_id(i), "output_index": i });
        let with = |name: &str, value: Value| {
            let mut data = place.clone();
            data[name] = value;
            if name != "arguments" {
                data["content_index"] = json!(0);
            }
            data
        };
        match &block {
            Block::Thought(text) => self.event("response.reasoning_text.done", with("text", json!(text)), out),
            Block::Text(text) => {
                let mut data = with("text", json!(text));
                data["logprobs"] = json!([]);
                self.event("response.output_text.done", data, out);
            }
            Block::Call(call) => {
                let mut data = with("arguments", json!(call.arguments));
                data["name"] = json!(call.name);
                self.event("response.function_call_arguments.done", data, out);
            }
        }
        if let Some(part) = match &block {
            Block::Thought(text) | Block::Text(text) => part(&block, text),
            Block::Call(_) => None,
        } {
            self.event("response.content_part.done", with("part", part), out);
        }
        let item = self.item(i, if self.status() == "incomplete" { "incomplete" } else { "completed" });
        self.event("response.output_item.done", json!({ "output_index": i, "item": item }), out);
    }
}

fn text_part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

/// The part of content that a block is.
fn part(block: &Block, text: &str) -> Option<Value> {
    match block {
        Block::Thought(_) => Some(json!({ "type": "reasoning_text", "text": text })),
        Block::Text(_) => Some(text_part(text)),
        Block::Call(_) => None,
    }
}

impl Narrator for Reply {
    fn begin(&mut self, out: &mut Events) {
        let response = self.response();
        self.event("response.created", json!({ "response": response }), out);
        self.event("response.in_progress", json!({ "response": response }), out);
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
        let record = self.record();
        // Whoever hears that it is completed can fetch it.
        let kept = if self.store { tokio::task::block_in_place(|| keep(&self.app, &record)) } else { Ok(()) };
        match kept {
            Ok(()) => {
                let kind = if self.status() == "completed" { "response.completed" } else { "response.incomplete" };
                self.event(kind, json!({ "response": record["response"] }), out);
            }
            Err(error) => self.fail(&error, out),
        }
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        let mut response = self.response();
        response["status"] = json!("failed");
        response["error"] = json!({ "code": "server_error", "message": error.message });
        self.event("response.failed", json!({ "response": response }), out);
    }
}
