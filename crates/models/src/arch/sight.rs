//! Whether a text model takes images, and which tokens stand for them: read from config.json and from GGUF metadata.

use qwenkit_formats::{Config, Gguf, ModelFiles};
use qwenkit_tensor::TokenId;

use super::{Architecture, hyper::wrong};
use crate::{
    error::Error,
    plan::{Plan, Sight},
};

/// What stands for a vector of an image and of a film in every vocabulary that knows images.
const IMAGE_TOKEN: &str = "<|image_pad|>";
const VIDEO_TOKEN: &str = "<|video_pad|>";

/// How images reach the model of `plan`; `None` where it reads text only: its architecture knows none, its checkpoint was
/// exported without tower, its vocabulary has no token for images.
pub(super) fn read(architecture: &Architecture, files: &ModelFiles, plan: &Plan) -> Result<Option<Sight>, Error> {
    if architecture.towers.is_empty() {
        return Ok(None);
    }
    let tokens = match files {
        ModelFiles::Gguf(gguf) => of_gguf(gguf)?,
        ModelFiles::Checkpoint(checkpoint) => of_config(checkpoint.config(), plan.vocab)?,
    };
    let Some([image_token, video_token]) = tokens else { return Ok(None) };
    let deepstack = match files {
        // A file that does not speak of them has none, as llama.cpp reads it.
        ModelFiles::Gguf(gguf) => {
            Some(gguf.metadata().usize(&format!("{}.n_deepstack_layers", architecture.gguf))?.unwrap_or(0))
        }
        ModelFiles::Checkpoint(_) => None,
    };
    // GGUF files have one name for several, a config.json says which of them it is.
    let own = architecture.towers.iter().position(|tower| *tower == architecture.model_type);
    let towers = match (files, own) {
        (ModelFiles::Checkpoint(_), Some(i)) => &architecture.towers[i..=i],
        _ => architecture.towers,
    };
    Ok(Some(Sight { towers, deepstack, image_token, video_token }))
}

fn of_gguf(gguf: &Gguf) -> Result<Option<[TokenId; 2]>, Error> {
    let Some(tokens) = gguf.metadata().strings("tokenizer.ggml.tokens")? else { return Ok(None) };
    let mut found = [None, None];
    for (id, token) in tokens.iter().enumerate() {
        if let Some(place) = [IMAGE_TOKEN, VIDEO_TOKEN].iter().position(|name| *name == token) {
            found[place] = u32::try_from(id).ok().map(TokenId);
        }
    }
    // A vocabulary for images alone has one of them.
    let [image, video] = found;
    Ok(image.map(|image| [image, video.unwrap_or(image)]))
}

fn of_config(config: &Config, vocab: usize) -> Result<Option<[TokenId; 2]>, Error> {
    if config.object("vision_config")?.is_none() {
        return Ok(None);
    }
    let id = |key: &str| match config.usize(key)? {
        Some(id) if id < vocab => Ok(Some(TokenId(id as u32))),
        Some(id) => Err(wrong(config.path(), key, id, &format!("a token below {vocab}"))),
        None => Ok(None),
    };
    let Some(image) = id("image_token_id")? else { return Ok(None) };
    Ok(Some([image, id("video_token_id")?.unwrap_or(image)]))
}
