//! `/v1/embeddings`: texts as vectors.

use std::sync::Arc;

use axum::{Json, body::Bytes, extract::State};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use qwenkit_engine::{Input, Priority, Reading, query_text, unit_vector};
use serde_json::{Value, json};

use crate::{
    app::App,
    error::{ApiError, from_engine},
    fields::{Fields, wrong},
    models::ServedModel,
    readings,
    settings::ids,
};

/// Texts of one request.
const INPUTS_MAX: usize = 2048;
/// The fewest dimensions that a shortened vector may have, as Qwen3-Embedding was trained.
const DIMENSIONS_MIN: i64 = 32;

/// The handler.
pub(crate) async fn embeddings(State(app): State<Arc<App>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    embed(&app, Fields::of_body(&body)?, Priority::Normal).await.map(Json)
}

/// What a request for vectors comes to.
pub(crate) async fn embed(app: &App, mut fields: Fields, priority: Priority) -> Result<Value, ApiError> {
    let name = fields.string("model")?;
    let model = app.model(name.as_deref()).await?;
    let input = fields.take("input");
    let inputs = inputs(fields.required("input", input)?)?;
    let width = model.session.info().width as i64;
    let dimensions = fields.integer("dimensions", DIMENSIONS_MIN.min(width), width)?.map(|n| n as usize);
    let is_base64 = match fields.string("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => return Err(wrong("encoding_format", &json!(other), "`float` or `base64`")),
    };
    fields.string("user")?;
    let instruction = fields.string("instruction")?;
    fields.finish()?;
    let make = move |model: &ServedModel| queries(model, &inputs, instruction.as_deref());
    let found = readings::read(&model, "input", priority, make).await?;
    let vector = |(i, state): (usize, &Vec<f32>)| {
        let vector = unit_vector(state, dimensions);
        let embedding = match is_base64 {
            true => json!(STANDARD.encode(vector.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())),
            false => json!(vector),
        };
        json!({ "object": "embedding", "index": i, "embedding": embedding })
    };
    let data: Vec<Value> = found.values.iter().enumerate().map(vector).collect();
    let usage = json!({ "prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens });
    Ok(json!({ "object": "list", "data": data, "model": model.name, "usage": usage }))
}

/// Readings of inputs; texts that stand for queries come behind an instruction.
pub(crate) fn queries(
    model: &ServedModel,
    inputs: &[Input],
    instruction: Option<&str>,
) -> Result<Vec<Reading>, ApiError> {
    let reading = |input: &Input| {
        let told = match (input, instruction) {
            (Input::Text(text), Some(task)) => Input::Text(query_text(task, text)),
            (input, _) => input.clone(),
        };
        model.session.embedding(&told).map_err(|error| from_engine(&error, "input"))
    };
    inputs.iter().map(reading).collect()
}

/// A text, a list of texts, a list of ids, or a list of such lists.
pub(crate) fn inputs(value: Value) -> Result<Vec<Input>, ApiError> {
    let expected = "a string, a list of strings, a list of token ids, or a list of such lists";
    let list = match value {
        Value::String(text) => return Ok(vec![Input::Text(text)]),
        Value::Array(list) if !list.is_empty() => list,
        other => return Err(wrong("input", &other, expected)),
    };
    if list.iter().all(Value::is_number) {
        return Ok(vec![Input::Ids(ids("input", &list)?)]);
    }
    if list.len() > INPUTS_MAX {
        let message = format!("`input` has {} texts; {INPUTS_MAX} are the most", list.len());
        return Err(ApiError::invalid("input", message));
    }
    let one = |(i, value): (usize, Value)| match value {
        Value::String(text) => Ok(Input::Text(text)),
        Value::Array(list) => Ok(Input::Ids(ids(&format!("input[{i}]"), &list)?)),
        other => Err(wrong(&format!("input[{i}]"), &other, expected)),
    };
    list.into_iter().enumerate().map(one).collect()
}
