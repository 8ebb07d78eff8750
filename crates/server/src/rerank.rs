//! `/v1/rerank` and `/v1/score`: how well documents fit a query.

use std::sync::Arc;

use axum::{Json, body::Bytes, extract::State};
use qwenkit_engine::Priority;
use serde_json::{Value, json};

use crate::{
    app::App,
    error::{ApiError, from_engine},
    fields::{Fields, wrong},
    models::ServedModel,
    readings,
};

/// Documents of one request.
const DOCUMENTS_MAX: usize = 2048;

/// Documents in the order of their fit.
pub(crate) async fn rerank(State(app): State<Arc<App>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of_body(&body)?;
    let name = fields.string("model")?;
    let model = app.model(name.as_deref()).await?;
    let query = fields.string("query")?;
    let query = fields.required("query", query)?;
    let documents = fields.take("documents");
    let documents = texts("documents", fields.required("documents", documents)?)?;
    let top = fields.integer("top_n", 1, i64::MAX)?.map_or(usize::MAX, |n| n as usize);
    let shows = fields.bool("return_documents")?.unwrap_or(true);
    let instruction = fields.string("instruction")?;
    fields.finish()?;
    let count = documents.len();
    let pairs = documents.iter().map(|document| (query.clone(), document.clone())).collect();
    let (scores, tokens) = scores(&model, pairs, instruction, "documents").await?;
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let result = |i: usize| {
        let mut result = json!({ "index": i, "relevance_score": scores[i] });
        if shows {
            result["document"] = json!({ "text": documents[i] });
        }
        result
    };
    let results: Vec<Value> = order.into_iter().take(top).map(result).collect();
    let usage = json!({ "prompt_tokens": tokens, "total_tokens": tokens });
    Ok(Json(json!({ "id": app.new_id("rerank-"), "model": model.name, "results": results, "usage": usage })))
}

/// A score for each pair of texts.
pub(crate) async fn score(State(app): State<Arc<App>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of_body(&body)?;
    let name = fields.string("model")?;
    let model = app.model(name.as_deref()).await?;
    let mut side = |names: [&'static str; 2]| {
        let found = fields.take_one(&names)?;
        let (at, value) = fields.required(names[0], found)?;
        Ok::<_, ApiError>((at.clone(), texts(&at, value)?))
    };
    let (_, mut first) = side(["text_1", "queries"])?;
    let (at, second) = side(["text_2", "documents"])?;
    let instruction = fields.string("instruction")?;
    fields.string("encoding_format")?;
    fields.finish()?;
    if first.len() == 1 {
        first = vec![first[0].clone(); second.len()];
    }
    if first.len() != second.len() {
        let message = format!("`{at}` has {} texts for {}; give as many, or one query", second.len(), first.len());
        return Err(ApiError::invalid(at, message));
    }
    let pairs = first.into_iter().zip(second).collect();
    let (scores, tokens) = scores(&model, pairs, instruction, "text_2").await?;
    let data = |(i, score): (usize, &f32)| json!({ "index": i, "object": "score", "score": score });
    let data: Vec<Value> = scores.iter().enumerate().map(data).collect();
    let usage = json!({ "prompt_tokens": tokens, "total_tokens": tokens });
    Ok(Json(json!({
        "id": app.new_id("score-"),
        "object": "list",
        "model": model.name,
        "data": data,
        "usage": usage,
    })))
}

async fn scores(
    model: &Arc<ServedModel>,
    pairs: Vec<(String, String)>,
    instruction: Option<String>,
    at: &'static str,
) -> Result<(Vec<f32>, usize), ApiError> {
    let make = move |model: &ServedModel| {
        let reading = |(query, document): &(String, String)| {
            let reading = model.session.relevance(instruction.as_deref(), query, document);
            reading.map_err(|error| from_engine(&error, at))
        };
        pairs.iter().map(reading).collect()
    };
    let found = readings::read(model, at, Priority::Normal, make).await?;
    Ok((found.values.iter().map(|values| model.session.relevance_score(values)).collect(), found.prompt_tokens))
}

/// A text, texts, or objects with a text.
fn texts(at: &str, value: Value) -> Result<Vec<String>, ApiError> {
    let list = match value {
        Value::String(text) => return Ok(vec![text]),
        Value::Array(list) if (1..=DOCUMENTS_MAX).contains(&list.len()) => list,
        Value::Array(list) => {
            let message = format!("`{at}` has {} texts, expected 1 to {DOCUMENTS_MAX}", list.len());
            return Err(ApiError::invalid(at, message));
        }
        other => return Err(wrong(at, &other, "a string or a list of strings")),
    };
    let one = |(i, value): (usize, Value)| match value {
        Value::String(text) => Ok(text),
        Value::Object(mut object) if matches!(object.get("text"), Some(Value::String(_))) => {
            Ok(object.remove("text").and_then(|text| text.as_str().map(str::to_owned)).unwrap_or_default())
        }
        other => Err(wrong(&format!("{at}[{i}]"), &other, "a string, or an object with `text`")),
    };
    list.into_iter().enumerate().map(one).collect()
}
