//! `/tokenize`, `/detokenize`, `/apply-template`: what a model gets to see, for who wants to know.

use std::sync::Arc;

use axum::{Json, body::Bytes, extract::State};
use qwenkit_engine::Prompt;
use qwenkit_text::{ChatInput, SpecialTokens, chat_text};
use serde_json::{Value, json};

use crate::{
    app::App,
    error::{ApiError, from_engine, from_text},
    fields::Fields,
    images::{Gathering, Images},
    logprobs::token_text,
    messages,
    settings::ids,
};

/// Text, or a conversation, to token ids.
pub(crate) async fn tokenize(State(app): State<Arc<App>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of_body(&body)?;
    let name = fields.string("model")?;
    let model = app.model(name.as_deref()).await?;
    let with_texts = fields.bool("return_token_strs")?.unwrap_or(false);
    let text = fields.take_one(&["prompt", "content", "text"])?;
    let parse_special = fields.bool("parse_special")?.unwrap_or(true);
    // Qwen's tokenizers add none.
    fields.bool("add_special_tokens")?;
    let work = move || {
        let session = &model.session;
        let found = match text {
            Some((_, Value::String(text))) => {
                fields.finish()?;
                let special = if parse_special { SpecialTokens::Parse } else { SpecialTokens::AsText };
                session.tokenizer().encode(&text, special).map_err(|e| from_engine(&e.into(), "prompt"))?
            }
            Some((at, other)) => return Err(crate::fields::wrong(&at, &other, "a string")),
            None => {
                let (input, images) = conversation(fields, &model)?;
                let held = images.held(&model)?;
                let prompt = Prompt::Chat(Box::new(input));
                session.prompt_ids_with(&prompt, held.visuals).map_err(|e| from_engine(&e, "messages"))?
            }
        };
        let mut object = json!({
            "tokens": found.iter().map(|id| id.0).collect::<Vec<_>>(),
            "count": found.len(),
            "max_model_len": session.info().context_tokens,
        });
        if with_texts {
            object["token_strs"] = found.iter().map(|&id| json!(token_text(session.tokenizer(), id))).collect();
        }
        Ok(Json(object))
    };
    blocking(work).await
}

/// Token ids to text.
pub(crate) async fn detokenize(State(app): State<Arc<App>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of_body(&body)?;
    let name = fields.string("model")?;
    let model = app.model(name.as_deref()).await?;
    let list = fields.list("tokens")?;
    let found = ids("tokens", &fields.required("tokens", list)?)?;
    fields.finish()?;
    let text = blocking(move || Ok(model.session.tokenizer().decode(&found, true))).await?;
    Ok(Json(json!({ "prompt": text, "content": text })))
}

/// What a client needs to count as the server does. Qwen's prompts have no token of their own at the beginning.
pub(crate) async fn tokenizer_info(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let model = app.model(None).await?;
    let (session, tokenizer) = (&model.session, model.session.tokenizer());
    let ends = session.stop_tokens();
    // Of several, the one that ends a turn.
    let turn = tokenizer.token_id("<|im_end|>").filter(|id| ends.contains(id));
    let end = turn.or(ends.first().copied()).map(|id| token_text(tokenizer, id));
    let pad = tokenizer.token_id("<|endoftext|>").map(|id| token_text(tokenizer, id));
    Ok(Json(json!({
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": null,
        "eos_token": end,
        "pad_token": pad,
        "unk_token": null,
        "add_bos_token": false,
        "model_max_length": session.info().context_tokens,
        "chat_template": session.template().map(|template| template.source()),
    })))
}

/// A conversation to the prompt that the model gets.
pub(crate) async fn apply_template(State(app): State<Arc<App>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of_body(&body)?;
    let name = fields.string("model")?;
    let model = app.model(name.as_deref()).await?;
    let work = move || {
        let (input, _) = conversation(fields, &model)?;
        let Some(template) = model.session.template() else {
            return Err(ApiError::invalid("model", format!("{} has no chat template", model.name)));
        };
        chat_text(template, &input).map_err(|e| from_engine(&e.into(), "messages"))
    };
    let prompt = blocking(work).await?;
    Ok(Json(json!({ "prompt": prompt })))
}

fn conversation(mut fields: Fields, model: &crate::models::ServedModel) -> Result<(ChatInput, Images), ApiError> {
    let mut images = Gathering::new(model);
    let messages = messages::messages(&mut fields, &mut images)?;
    let tools = messages::tools(&mut fields)?;
    let (wish, mut kwargs) = messages::thinking(&mut fields, &messages)?;
    let add_generation_prompt = fields.bool("add_generation_prompt")?.unwrap_or(true);
    fields.finish()?;
    let plan = model.thinking.plan(&wish).map_err(|error| from_text(&error, &wish.switch))?;
    kwargs.extend(plan.kwargs);
    let (messages, tools) = (Value::Array(messages), tools.for_template());
    let suffix = plan.suffix;
    let input = ChatInput { messages, tools, add_generation_prompt, kwargs, suffix, ..ChatInput::default() };
    Ok((input, images.done()))
}

/// Work that takes a while, away from the threads that serve connections.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| ApiError::internal("the work failed; the server's log says why"))?
}
