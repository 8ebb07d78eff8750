//! How an answer is generated, in Ollama's words.

use qwenkit_engine::Sampling;
use qwenkit_text::Form;
use serde_json::{Value, json};

use crate::{
    error::ApiError,
    fields::{Fields, wrong},
    models::ServedModel,
    settings::{Settings, stop_list},
};

/// Options of Ollama's runner that say how it shall load or compute, which this server decides by itself; no answer differs
/// by them.
const WITHOUT_EFFECT: [&str; 9] =
    ["num_batch", "num_gpu", "main_gpu", "num_thread", "numa", "use_mmap", "use_mlock", "low_vram", "f16_kv"];

/// Takes `options`, `stream` and what else says how to generate.
pub(super) fn settings(fields: &mut Fields, model: &ServedModel) -> Result<Settings, ApiError> {
    let defaults = model.session.defaults();
    // Streams are the rule here.
    let stream = fields.bool("stream")?.unwrap_or(true);
    fields.take("keep_alive");
    let Some(mut options) = fields.object("options")? else {
        return Ok(Settings { stream, ..Settings::new(defaults.clone()) });
    };
    let sampling = Sampling {
        temperature: options.number("temperature")?.unwrap_or(defaults.temperature),
        top_k: options.integer("top_k", 0, i64::from(u32::MAX))?.map_or(defaults.top_k, |k| k as usize),
        top_p: options.number("top_p")?.unwrap_or(defaults.top_p),
        min_p: options.number("min_p")?.unwrap_or(defaults.min_p),
        repetition_penalty: options.number("repeat_penalty")?.unwrap_or(defaults.repetition_penalty),
        presence_penalty: options.number("presence_penalty")?.unwrap_or(defaults.presence_penalty),
        frequency_penalty: options.number("frequency_penalty")?.unwrap_or(defaults.frequency_penalty),
        seed: options.integer("seed", i64::MIN, i64::MAX)?.map(|seed| seed as u64),
        ..defaults.clone()
    };
    let at = options.at("stop");
    let stop = match options.take("stop") {
        None => Vec::new(),
        Some(Value::Array(list)) => stop_list(&at, list)?,
        Some(text) => stop_list(&at, vec![text])?,
    };
    // Below zero: as many as there are.
    let limit = options.integer("num_predict", -2, i64::from(u32::MAX))?.and_then(|n| usize::try_from(n).ok());
    let whole = "penalties look at all of the context, which is -1";
    options.unsupported("repeat_last_n", &[json!(-1)], whole)?;
    runner(&mut options, model)?;
    for name in ["mirostat", "tfs_z", "typical_p"] {
        options.unsupported(
            name,
            &[json!(0), json!(1), json!(1.0), json!(0.0)],
            "temperature, top_k, top_p and min_p are",
        )?;
    }
    options.finish()?;
    Ok(Settings { max_tokens: limit, stop, stream, ..Settings::new(sampling) })
}

/// Takes `options` of a request for vectors, which can only be about the runner.
pub(super) fn of_vectors(fields: &mut Fields, model: &ServedModel) -> Result<(), ApiError> {
    let Some(mut options) = fields.object("options")? else { return Ok(()) };
    runner(&mut options, model)?;
    options.finish()
}

/// Takes what is said to Ollama's runner.
fn runner(options: &mut Fields, model: &ServedModel) -> Result<(), ApiError> {
    let context = model.session.info().context_tokens;
    let at = options.at("num_ctx");
    if let Some(wanted) = options.integer("num_ctx", 1, i64::MAX)?.filter(|&wanted| wanted > context as i64) {
        let message = format!(
            "`{at}` is {wanted} and the context holds {context} tokens; ask for no more, or start the server with a larger --ctx"
        );
        return Err(ApiError::invalid(at, message).with_code("unsupported_parameter"));
    }
    // Of a prompt that is never cut, all is kept.
    options.unsupported("num_keep", &[json!(-1), json!(0)], "a prompt that is too long is refused, not cut")?;
    options.unsupported("vocab_only", &[json!(false)], "models are loaded whole")?;
    for name in WITHOUT_EFFECT {
        options.take(name);
    }
    Ok(())
}

/// Takes `format`: `json`, or a schema.
pub(super) fn form(fields: &mut Fields) -> Result<Option<Form>, ApiError> {
    let at = fields.at("format");
    match fields.take("format") {
        None => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) if text == "json" => Ok(Some(Form::AnyJson)),
        Some(schema @ Value::Object(_)) => Ok(Some(Form::Json(schema))),
        Some(other) => Err(wrong(&at, &other, "`json` or a JSON schema")),
    }
}
