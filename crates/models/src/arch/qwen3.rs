//! `qwen3`: Qwen3 dense with its 2507, Embedding, Reranker and Guard models. No biases; q and k are normed head by head.

use super::hyper::{Hyper, Switches};
use crate::{error::Error, plan::Plan};

pub(super) fn plan(hyper: &Hyper) -> Result<Plan, Error> {
    hyper.dense(switches(hyper)?)
}

/// Attention of this generation, with and without experts.
pub(super) fn switches(hyper: &Hyper) -> Result<Switches, Error> {
    match hyper.attention_bias {
        None | Some(false) => Ok(Switches { qk_norm: true, ..Switches::default() }),
        Some(true) => Err(hyper.wrong("attention_bias", "true", "false, as in every published Qwen3")),
    }
}
