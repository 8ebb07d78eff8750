//! Which mixer each layer has: read from config.json and from GGUF metadata.

use qwenkit_formats::{Config, Gguf};

use super::hyper::wrong;
use crate::error::Error;

/// Every so many layers one has softmax attention, where the file does not say otherwise.
const FULL_ATTENTION_INTERVAL: usize = 4;

/// What transformers takes where a config has no `max_window_layers`.
const MAX_WINDOW_LAYERS: usize = 28;

/// What a layer's mixer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LayerKind {
    /// Softmax attention over so many positions; over all where absent.
    Attention(Option<usize>),
    /// Linear attention.
    Linear,
}

/// Of models without linear attention in a GGUF file: full attention throughout, except where
/// `attention.sliding_window_pattern` has `true`: there a window of `attention.sliding_window`. Of hybrid ones:
/// `attention.recurrent_layers`, else every `full_attention_interval`-th has full attention.
pub(super) fn of_gguf(
    gguf: &Gguf,
    key: &impl Fn(&str) -> String,
    layers: usize,
    hybrid: bool,
) -> Result<Vec<LayerKind>, Error> {
    if !hybrid {
        return windows_of_gguf(gguf, key, layers);
    }
    let name = key("attention.recurrent_layers");
    let Some(recurrent) = gguf.metadata().bools(&name)? else {
        let name = key("full_attention_interval");
        let interval = gguf.metadata().usize(&name)?.unwrap_or(FULL_ATTENTION_INTERVAL);
        return every(interval, layers).ok_or_else(|| wrong(gguf.path(), &name, 0, "1 or more layers"));
    };
    // Blocks behind the layers may be listed too.
    if recurrent.len() < layers {
        let found = format!("{} entries", recurrent.len());
        return Err(wrong(gguf.path(), &name, found, &format!("one for each of {layers} layers")));
    }
    let kind = |recurrent: &bool| if *recurrent { LayerKind::Linear } else { LayerKind::Attention(None) };
    Ok(recurrent.iter().take(layers).map(kind).collect())
}

fn windows_of_gguf(gguf: &Gguf, key: &impl Fn(&str) -> String, layers: usize) -> Result<Vec<LayerKind>, Error> {
    let (pattern, window) = (key("attention.sliding_window_pattern"), key("attention.sliding_window"));
    // A width alone says nothing: some converters write it for models that do not use it.
    let Some(windowed) = gguf.metadata().bools(&pattern)? else {
        return Ok(vec![LayerKind::Attention(None); layers]);
    };
    let width = gguf.metadata().require_usize(&window)?;
    if width == 0 {
        return Err(wrong(gguf.path(), &window, 0, "1 or more positions"));
    }
    if windowed.len() != layers {
        return Err(wrong(gguf.path(), &pattern, format!("{} entries", windowed.len()), &format!("{layers}")));
    }
    Ok(windowed.iter().map(|&has| LayerKind::Attention(has.then_some(width))).collect())
}

/// `layer_types` where the file has it. Else, of hybrid models, every `full_attention_interval`-th layer has full
/// attention; of others, layers from `max_window_layers` on have a window, if `use_sliding_window`, as transformers has it.
pub(super) fn of_config(config: &Config, layers: usize, hybrid: bool, indexed: bool) -> Result<Vec<LayerKind>, Error> {
    let used = config.bool("use_sliding_window")?.unwrap_or(false);
    let window = config.usize("sliding_window")?.filter(|_| used);
    if window == Some(0) {
        return Err(wrong(config.path(), "sliding_window", 0, "1 or more positions"));
    }
    let Some(types) = config.strings("layer_types")? else {
        if hybrid {
            let interval = config.usize("full_attention_interval")?.unwrap_or(FULL_ATTENTION_INTERVAL);
            let none = || wrong(config.path(), "full_attention_interval", 0, "1 or more layers");
            return every(interval, layers).ok_or_else(none);
        }
        // Qwen3's mixtures have it in all layers there.
        let first = match config.string("model_type")? {
            Some("qwen3_moe") => 0,
            _ => config.usize("max_window_layers")?.unwrap_or(MAX_WINDOW_LAYERS),
        };
        return Ok((0..layers).map(|i| LayerKind::Attention(window.filter(|_| i >= first))).collect());
    };
    if types.len() != layers {
        return Err(wrong(config.path(), "layer_types", format!("{} entries", types.len()), &format!("{layers}")));
    }
    let layer = |kind: &str| match (kind, window) {
        ("full_attention", _) => Ok(LayerKind::Attention(None)),
        // Published files of such models say `full_attention`.
        ("indexed_attention", _) if indexed => Ok(LayerKind::Attention(None)),
        ("sliding_attention", Some(window)) => Ok(LayerKind::Attention(Some(window))),
        ("sliding_attention", None) => {
            Err(wrong(config.path(), "sliding_window", "absent", "a width, since `layer_types` has sliding_attention"))
        }
        ("linear_attention", _) if hybrid => Ok(LayerKind::Linear),
        _ if hybrid => {
            Err(wrong(config.path(), "layer_types", format!("`{kind}`"), "full_attention or linear_attention"))
        }
        _ => Err(wrong(config.path(), "layer_types", format!("`{kind}`"), "full_attention or sliding_attention")),
    };
    types.into_iter().map(layer).collect()
}

/// Full attention in every `interval`-th layer; `None` for an interval of 0.
fn every(interval: usize, layers: usize) -> Option<Vec<LayerKind>> {
    let kind = |i: usize| if (i + 1).is_multiple_of(interval) { LayerKind::Attention(None) } else { LayerKind::Linear };
    (interval > 0).then(|| (0..layers).map(kind).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fourth_of_six() {
        let full = LayerKind::Attention(None);
        let linear = LayerKind::Linear;
        assert_eq!(every(4, 6), Some(vec![linear, linear, linear, full, linear, linear]));
        assert_eq!(every(1, 2), Some(vec![full, full]));
        assert_eq!(every(0, 2), None);
    }
}
