//! `qwen3`: Qwen3 dense with its 2507, Embedding, Reranker and Guard models. No biases; q and k are normed head by head.

use super::hyper::Hyper;
use crate::{error::Error, plan::Plan};

pub(super) fn plan(hyper: &Hyper) -> Result<Plan, Error> {
    match hyper.attention_bias {
        None | Some(false) => Ok(hyper.dense(false, true)),
        Some(true) => Err(hyper.wrong("attention_bias", "true", "false, as in every published Qwen3")),
    }
}
