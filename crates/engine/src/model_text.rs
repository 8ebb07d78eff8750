//! What a model's files say about text: tokenizer, chat template, the tokens that end an answer, recommended sampling.

use qwenkit_formats::{Checkpoint, Config, Gguf, ModelFiles};
use qwenkit_tensor::TokenId;
use qwenkit_text::{ChatTemplate, Tokenizer, Vocab};

use crate::{error::Error, sampler::Sampling};

/// A model's text side.
pub struct ModelText {
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Conversations to text, where the model has a template.
    pub template: Option<ChatTemplate>,
    /// Every token that the files declare to end an answer, and Qwen's own two.
    pub stop_tokens: Vec<TokenId>,
    /// The sampling that the model's makers recommend, as its files say; the model's own distribution otherwise.
    pub defaults: Sampling,
}

/// Tokens that end an answer in every Qwen, whatever a file forgets to declare.
const END_TOKENS: [&str; 2] = ["<|im_end|>", "<|endoftext|>"];

/// How Qwen's first chat models are spoken to (ChatML), whose files have no template.
const FIRST_TEMPLATE: &str = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.\
    <|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}\
    <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Reads the text side of a model; weights are not touched.
///
/// # Errors
/// When there is no tokenizer, or tokenizer or template cannot be read.
pub fn text_of(files: &ModelFiles) -> Result<ModelText, Error> {
    match files {
        ModelFiles::Gguf(gguf) => of_gguf(gguf),
        ModelFiles::Checkpoint(checkpoint) => of_checkpoint(checkpoint),
    }
}

fn of_gguf(gguf: &Gguf) -> Result<ModelText, Error> {
    let (meta, origin) = (gguf.metadata(), gguf.path().display().to_string());
    let Some(tokens) = meta.strings("tokenizer.ggml.tokens")? else {
        return Err(Error::NoTokenizer { origin, expected: "the key tokenizer.ggml.tokens" });
    };
    let tokens: Vec<String> = tokens.iter().map(str::to_owned).collect();
    let vocab = Vocab {
        origin: origin.clone(),
        model: meta.require_string("tokenizer.ggml.model")?.to_owned(),
        pre: meta.string("tokenizer.ggml.pre")?.unwrap_or("qwen2").to_owned(),
        // Files without types hold normal tokens only.
        token_types: meta.i32s("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![1; tokens.len()]),
        tokens,
        merges: meta.require_strings("tokenizer.ggml.merges")?.iter().map(str::to_owned).collect(),
    };
    let tokenizer = Tokenizer::from_vocab(vocab)?;
    let family = meta.require_string("general.architecture")?;
    let template = match meta.string("tokenizer.chat_template")? {
        // Templates came with the second generation; the first one's chat models speak this way by definition.
        None if family == "qwen" && tokenizer.token_id("<|im_start|>").is_some() => Some(FIRST_TEMPLATE),
        found => found,
    };
    let template = template.map(|t| ChatTemplate::new(t, &origin)).transpose()?;
    let mut stop_tokens = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        let id = meta.u64(&format!("tokenizer.ggml.{key}"))?.and_then(|id| u32::try_from(id).ok());
        stop_tokens.extend(id.map(TokenId));
    }
    let number = |key: &str| meta.f32(&format!("general.sampling.{key}"));
    let plain = Sampling::default();
    let defaults = Sampling {
        temperature: number("temp")?.unwrap_or(plain.temperature),
        top_k: meta.usize("general.sampling.top_k")?.unwrap_or(plain.top_k),
        top_p: number("top_p")?.unwrap_or(plain.top_p),
        min_p: number("min_p")?.unwrap_or(plain.min_p),
        repetition_penalty: number("penalty_repeat")?.unwrap_or(plain.repetition_penalty),
        ..plain.clone()
    };
    let defaults = if defaults == plain { family_defaults(family) } else { defaults };
    Ok(finish(tokenizer, template, stop_tokens, defaults))
}

fn of_checkpoint(checkpoint: &Checkpoint) -> Result<ModelText, Error> {
    let origin = checkpoint.path().display().to_string();
    let Some(path) = checkpoint.tokenizer_json() else {
        return Err(Error::NoTokenizer { origin, expected: "a file tokenizer.json in the folder" });
    };
    let name = path.display().to_string();
    let bytes =
        std::fs::read(&path).map_err(|error| qwenkit_formats::Error::Io { path, action: "read", source: error })?;
    let tokenizer = Tokenizer::from_json(&bytes, &name)?;
    let template = checkpoint.chat_template().map(|t| ChatTemplate::new(t, &origin)).transpose()?;
    let mut stop_tokens = Vec::new();
    for config in [Some(checkpoint.config()), checkpoint.generation_config()].into_iter().flatten() {
        stop_tokens.extend(end_tokens(config)?);
    }
    if let Some(config) = checkpoint.tokenizer_config() {
        stop_tokens.extend(end_token_of_tokenizer(config, &tokenizer));
    }
    let defaults = match checkpoint.generation_config() {
        Some(config) if config.get("temperature").or(config.get("top_p")).or(config.get("do_sample")).is_some() => {
            recommended(config)?
        }
        _ => family_defaults(checkpoint.config().string("model_type")?.unwrap_or_default()),
    };
    Ok(finish(tokenizer, template, stop_tokens, defaults))
}

fn finish(
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    mut stop_tokens: Vec<TokenId>,
    defaults: Sampling,
) -> ModelText {
    stop_tokens.extend(END_TOKENS.iter().filter_map(|token| tokenizer.token_id(token)));
    stop_tokens.sort_unstable();
    stop_tokens.dedup();
    ModelText { tokenizer, template, stop_tokens, defaults }
}

/// `eos_token_id`: a number or a list of them.
fn end_tokens(config: &Config) -> Result<Vec<TokenId>, Error> {
    let ids = match config.get("eos_token_id") {
        Some(value) if value.is_array() => config.usizes("eos_token_id")?.unwrap_or_default(),
        _ => config.usize("eos_token_id")?.into_iter().collect(),
    };
    Ok(ids.into_iter().filter_map(|id| u32::try_from(id).ok()).map(TokenId).collect())
}

/// `eos_token`: the token's text, or an object with it as `content`.
fn end_token_of_tokenizer(config: &Config, tokenizer: &Tokenizer) -> Option<TokenId> {
    let token = config.get("eos_token")?;
    let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
    tokenizer.token_id(text)
}

/// The sampling of a generation_config.json; `do_sample: false` is greedy.
fn recommended(config: &Config) -> Result<Sampling, Error> {
    let plain = Sampling::default();
    if config.bool("do_sample")? == Some(false) {
        return Ok(Sampling::greedy());
    }
    Ok(Sampling {
        temperature: config.f32("temperature")?.unwrap_or(plain.temperature),
        top_k: config.usize("top_k")?.unwrap_or(plain.top_k),
        top_p: config.f32("top_p")?.unwrap_or(plain.top_p),
        min_p: config.f32("min_p")?.unwrap_or(plain.min_p),
        repetition_penalty: config.f32("repetition_penalty")?.unwrap_or(plain.repetition_penalty),
        ..plain
    })
}

/// What Qwen recommends for a generation whose file says nothing: the values of its model cards.
fn family_defaults(architecture: &str) -> Sampling {
    let plain = Sampling::default();
    if architecture.starts_with("qwen2") {
        // Qwen2.5 instruct models.
        Sampling { temperature: 0.7, top_p: 0.8, top_k: 20, repetition_penalty: 1.05, ..plain }
    } else if architecture.starts_with("qwen3") {
        // Qwen3 thinking, which also serves its other mode; the other way round it would loop.
        Sampling { temperature: 0.6, top_p: 0.95, top_k: 20, ..plain }
    } else {
        plain
    }
}
