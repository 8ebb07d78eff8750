//! How an answer is generated: the parameters that chat and text completions share.

use qwenkit_engine::Sampling;
use qwenkit_tensor::TokenId;
use serde_json::{Value, json};

use crate::{
    error::ApiError,
    fields::{Fields, describe, integer, wrong},
};

/// Stop texts of a request; each piece of an answer is searched for all of them.
const STOPS_MAX: usize = 64;
/// Bytes of a stop text; so much of an answer may have to be held back.
const STOP_BYTES_MAX: usize = 1024;
/// Answers to one prompt.
const ANSWERS_MAX: i64 = 64;
/// Entries of a logit bias, as OpenAI has it.
const BIASES_MAX: usize = 1024;

/// How answers are generated and sent.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) sampling: Sampling,
    pub(crate) max_tokens: Option<usize>,
    /// Nothing ends the answer before it has so many.
    pub(crate) min_tokens: usize,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_tokens: Vec<TokenId>,
    pub(crate) ignore_stop_tokens: bool,
    /// Answers to the prompt.
    pub(crate) answers: usize,
    pub(crate) stream: bool,
    /// Usage at the end of a stream.
    pub(crate) include_usage: bool,
}

impl Settings {
    /// One whole answer, sampled so.
    pub(crate) fn new(sampling: Sampling) -> Settings {
        Settings {
            sampling,
            max_tokens: None,
            min_tokens: 0,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_stop_tokens: false,
            answers: 1,
            stream: false,
            include_usage: false,
        }
    }

    /// Takes these parameters out of a request; what is absent is as the model's makers recommend.
    pub(crate) fn take(fields: &mut Fields, defaults: &Sampling) -> Result<Settings, ApiError> {
        let limit = fields.take_one(&["max_completion_tokens", "max_tokens"])?;
        let max_tokens = limit.map(|(at, value)| integer(&at, &value, 0, i64::from(u32::MAX))).transpose()?;
        let settings = Settings {
            answers: fields.integer("n", 1, ANSWERS_MAX)?.unwrap_or(1) as usize,
            ..Settings::of_answer(fields, defaults, max_tokens.map(|n| n as usize))?
        };
        accepted_without_effect(fields)?;
        Ok(settings)
    }

    /// Takes what says how one answer is generated and sent, of at most `max_tokens`.
    pub(crate) fn of_answer(
        fields: &mut Fields,
        defaults: &Sampling,
        max_tokens: Option<usize>,
    ) -> Result<Settings, ApiError> {
        let min_tokens = fields.integer("min_tokens", 0, i64::from(u32::MAX))?.unwrap_or(0) as usize;
        if let Some(most) = max_tokens.filter(|&most| most < min_tokens) {
            let message = format!("`min_tokens` is {min_tokens}, more than the {most} tokens that the answer may have");
            return Err(ApiError::invalid(fields.at("min_tokens"), message));
        }
        Ok(Settings {
            max_tokens,
            min_tokens,
            stop: stops(fields)?,
            stop_tokens: token_ids(fields, "stop_token_ids")?,
            ignore_stop_tokens: fields.bool("ignore_eos")?.unwrap_or(false),
            stream: fields.bool("stream")?.unwrap_or(false),
            include_usage: stream_options(fields)?,
            ..Settings::new(sampling(fields, defaults)?)
        })
    }

    /// The sampling of the answer `i`: each has its own seed.
    pub(crate) fn sampling_of(&self, i: usize) -> Sampling {
        let seed = self.sampling.seed.map(|seed| seed.wrapping_add(i as u64));
        Sampling { seed, ..self.sampling.clone() }
    }
}

fn sampling(fields: &mut Fields, defaults: &Sampling) -> Result<Sampling, ApiError> {
    let top_k = fields.integer("top_k", -1, i64::from(u32::MAX))?.map(|k| k.max(0) as usize);
    let repetition = fields.take_one(&["repetition_penalty", "repeat_penalty"])?;
    let repetition = repetition.map(|(at, v)| v.as_f64().ok_or_else(|| wrong(&at, &v, "a number"))).transpose()?;
    let seed = fields.take("seed");
    let seed = seed.map(|value| integer(&fields.at("seed"), &value, i64::MIN, i64::MAX)).transpose()?;
    Ok(Sampling {
        temperature: fields.number("temperature")?.unwrap_or(defaults.temperature),
        top_k: top_k.unwrap_or(defaults.top_k),
        top_p: fields.number("top_p")?.unwrap_or(defaults.top_p),
        min_p: fields.number("min_p")?.unwrap_or(defaults.min_p),
        repetition_penalty: repetition.map_or(defaults.repetition_penalty, |n| n as f32),
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(defaults.presence_penalty),
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(defaults.frequency_penalty),
        logit_bias: logit_bias(fields)?,
        seed: seed.map(|seed| seed as u64),
    })
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let at = fields.at("logit_bias");
    let map = match fields.take("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong(&at, &other, "an object of token ids and numbers")),
    };
    if map.len() > BIASES_MAX {
        return Err(ApiError::invalid(
            at,
            format!("`logit_bias` has {} entries; {BIASES_MAX} are the most", map.len()),
        ));
    }
    let entry = |(key, value): (&String, &Value)| {
        let id = key.parse::<u32>().ok().map(TokenId);
        match (id, value.as_f64()) {
            (Some(id), Some(bias)) => Ok((id, bias as f32)),
            (None, _) => Err(ApiError::invalid(&at, format!("`logit_bias` has the key {key:?}, expected a token id"))),
            (_, None) => Err(wrong(&format!("{at}.{key}"), value, "a number")),
        }
    };
    map.iter().map(entry).collect()
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let at = fields.at("stop");
    let list = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![Value::String(text)],
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(&at, &other, "a string or a list of strings")),
    };
    stop_list(&at, list)
}

/// Texts that end an answer.
pub(crate) fn stop_list(at: &str, list: Vec<Value>) -> Result<Vec<String>, ApiError> {
    if list.len() > STOPS_MAX {
        return Err(ApiError::invalid(at, format!("`{at}` has {} texts; {STOPS_MAX} are the most", list.len())));
    }
    let text = |(i, value): (usize, Value)| match value {
        Value::String(text) if text.len() <= STOP_BYTES_MAX => Ok(text),
        other => Err(wrong(&format!("{at}[{i}]"), &other, &format!("a string of at most {STOP_BYTES_MAX} bytes"))),
    };
    list.into_iter().enumerate().map(text).collect()
}

fn token_ids(fields: &mut Fields, name: &'static str) -> Result<Vec<TokenId>, ApiError> {
    let at = fields.at(name);
    let list = fields.list(name)?.unwrap_or_default();
    if list.len() > STOPS_MAX {
        return Err(ApiError::invalid(&at, format!("`{at}` has {} ids; {STOPS_MAX} are the most", list.len())));
    }
    ids(&at, &list)
}

/// A list of token ids.
pub(crate) fn ids(at: &str, list: &[Value]) -> Result<Vec<TokenId>, ApiError> {
    let id = |(i, value)| Ok(TokenId(integer(&format!("{at}[{i}]"), value, 0, i64::from(u32::MAX))? as u32));
    list.iter().enumerate().map(id).collect()
}

fn stream_options(fields: &mut Fields) -> Result<bool, ApiError> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(false) };
    let include_usage = options.bool("include_usage")?.unwrap_or(false);
    // Padding against guessing text from the length of packets; there is none here to switch off.
    options.unsupported("include_obfuscation", &[json!(false)], "streams are not padded")?;
    options.unsupported("continuous_usage_stats", &[json!(false)], "usage comes at the end of a stream")?;
    options.finish()?;
    Ok(include_usage)
}

/// Parameters that describe the request for the provider's own records, or ask for what is so anyway.
fn accepted_without_effect(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"] {
        fields.string(name)?;
    }
    if let Some(metadata) = fields.take("metadata").filter(|m| !m.is_object()) {
        return Err(wrong(&fields.at("metadata"), &metadata, "an object"));
    }
    fields.unsupported("store", &[json!(false)], "only /v1/responses are stored")?;
    fields.unsupported("service_tier", &[json!("auto"), json!("default")], "there is one tier")?;
    let absent = |name: &str, value: Option<Value>| match value {
        Some(value) => {
            Err(ApiError::invalid(name, format!("`{name}` is {}, which is not supported", describe(&value)))
                .with_code("unsupported_parameter"))
        }
        None => Ok(()),
    };
    for name in ["use_beam_search", "length_penalty", "bad_words", "typical_p", "mirostat", "lora_request"] {
        let value = fields.take(name).filter(|v| *v != json!(false) && *v != json!(0));
        absent(name, value)?;
    }
    Ok(())
}
