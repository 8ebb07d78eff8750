//! `/openapi.json`: what there is, for programs that make clients or show it to people.

mod requests;

use std::sync::Arc;

use axum::{Json, extract::State};
use serde_json::{Map, Value, json};

use self::requests::REQUESTS;
use crate::app::App;

/// Method, path, what it does.
const PATHS: [(&str, &str, &str); 57] = [
    ("get", "/health", "Whether the process answers"),
    ("get", "/ready", "Whether requests are taken"),
    ("get", "/version", "The program's version"),
    ("get", "/server_info", "What is served and how, and how fine-tuning stands"),
    ("get", "/metrics", "Load and work in Prometheus' format"),
    ("get", "/openapi.json", "This document"),
    ("get", "/v1/loads", "How busy each model is"),
    ("get", "/v1/models", "The models"),
    ("post", "/v1/load_lora_adapter", "Take an adapter in, as a model of its own name; for keys with the scope admin"),
    ("post", "/v1/unload_lora_adapter", "Let an adapter go"),
    ("get", "/v1/models/{name}", "One model"),
    ("delete", "/v1/models/{name}", "Forget a model that a fine-tuning job has made"),
    ("post", "/v1/chat/completions", "An answer to a conversation, which may have images as data URLs (OpenAI)"),
    ("post", "/v1/completions", "What follows a text (OpenAI)"),
    ("post", "/v1/responses", "A response that can be followed on; input may have images as data URLs (OpenAI)"),
    ("get", "/v1/responses/{id}", "A kept response"),
    ("delete", "/v1/responses/{id}", "Forget a response"),
    ("get", "/v1/responses/{id}/input_items", "What a response answers"),
    ("post", "/v1/responses/{id}/cancel", "End a response that runs in the background"),
    ("post", "/v1/embeddings", "Texts as vectors"),
    ("post", "/v1/rerank", "Documents in the order of their fit to a query"),
    ("post", "/rerank", "The same"),
    ("post", "/v1/score", "How well pairs of texts fit"),
    ("post", "/score", "The same"),
    ("post", "/v1/files", "A new file"),
    ("get", "/v1/files", "The files"),
    ("get", "/v1/files/{id}", "One file"),
    ("delete", "/v1/files/{id}", "Forget a file"),
    ("get", "/v1/files/{id}/content", "A file's content"),
    ("post", "/v1/batches", "A new batch"),
    ("get", "/v1/batches", "The batches"),
    ("get", "/v1/batches/{id}", "One batch"),
    ("post", "/v1/batches/{id}/cancel", "End a batch early"),
    ("post", "/v1/fine_tuning/jobs", "Tune a model on a file, beside serving (OpenAI); for keys with the scope jobs"),
    ("get", "/v1/fine_tuning/jobs", "The fine-tuning jobs"),
    ("get", "/v1/fine_tuning/jobs/{id}", "One job"),
    ("post", "/v1/fine_tuning/jobs/{id}/cancel", "End a job early"),
    ("post", "/v1/fine_tuning/jobs/{id}/pause", "Have a job wait where it is"),
    ("post", "/v1/fine_tuning/jobs/{id}/resume", "Have a paused job go on"),
    ("get", "/v1/fine_tuning/jobs/{id}/events", "What has happened in a job"),
    ("get", "/v1/fine_tuning/jobs/{id}/checkpoints", "What a job has made"),
    ("post", "/v1/messages", "An answer to a conversation, which may have images in base64 (Anthropic)"),
    ("post", "/v1/messages/count_tokens", "The tokens of a conversation (Anthropic)"),
    ("post", "/api/chat", "An answer to a conversation, which may have images in base64 (Ollama)"),
    ("post", "/api/generate", "An answer to a prompt (Ollama)"),
    ("get", "/api/tags", "The models (Ollama)"),
    ("get", "/api/ps", "The models that are loaded (Ollama)"),
    ("post", "/api/show", "One model (Ollama)"),
    ("get", "/api/version", "The version (Ollama)"),
    ("post", "/api/embed", "Texts as vectors (Ollama)"),
    ("post", "/api/embeddings", "A text as a vector (Ollama)"),
    ("post", "/tokenize", "Text to token ids"),
    ("post", "/detokenize", "Token ids to text"),
    ("get", "/tokenizer_info", "The tokenizer"),
    ("post", "/apply-template", "A conversation as the model gets it"),
    ("get", "/", "The page"),
    ("get", "/web/{path}", "The page's parts"),
];

/// The handler.
pub(crate) async fn document(State(app): State<Arc<App>>) -> Json<Value> {
    let mut paths: Map<String, Value> = Map::new();
    for (method, path, summary) in PATHS {
        let mut operation = json!({
            "summary": summary,
            "responses": { "200": { "description": "As asked" }, "4XX": { "description": "An error that names the fault" } },
        });
        let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        let parameter = |name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } });
        let parameters: Vec<Value> = names.map(parameter).collect();
        if !parameters.is_empty() {
            operation["parameters"] = Value::Array(parameters);
        }
        if let Some(body) = body(path).filter(|_| method == "post") {
            operation["requestBody"] = body;
        }
        if let Value::Object(entry) = paths.entry(path).or_insert_with(|| json!({})) {
            entry.insert(method.to_owned(), operation);
        }
    }
    let jobs: Map<String, Value> = app.jobs.iter().map(|job| (job.name().to_owned(), job.schema())).collect();
    Json(json!({
        "openapi": "3.1.0",
        "info": {
            "title": "QwenKit",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Open Qwen models behind the interfaces that programs already speak. A parameter that is unknown or cannot be obeyed is refused by name. Images come with the request; no URL is fetched.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": { "key": { "type": "http", "scheme": "bearer" } },
            // What jobs are told; of `tune`, what `method` comes to.
            "schemas": jobs,
        },
        "security": [{ "key": [] }, {}],
    }))
}

/// What a path's request holds; nothing where its address says all.
fn body(path: &str) -> Option<Value> {
    if path == "/v1/files" {
        let properties = json!({ "purpose": { "type": "string" }, "file": { "type": "string", "format": "binary" } });
        let schema = json!({ "type": "object", "required": ["purpose", "file"], "properties": properties });
        return Some(json!({ "required": true, "content": { "multipart/form-data": { "schema": schema } } }));
    }
    let (_, required, groups) = REQUESTS.iter().find(|(known, ..)| *known == path)?;
    let property = |(name, kind): &(&str, &str)| {
        let kind = if *kind == "any" { json!({}) } else { json!({ "type": kind }) };
        ((*name).to_owned(), kind)
    };
    let properties: Map<String, Value> = groups.iter().copied().flatten().map(property).collect();
    let schema = json!({ "type": "object", "required": required, "properties": properties });
    Some(json!({ "required": true, "content": { "application/json": { "schema": schema } } }))
}
