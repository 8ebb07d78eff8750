//! `qwen3_moe`: Qwen3-30B-A3B, 235B-A22B, Coder 30B and 480B. Attention of Qwen3; experts without a shared one. And the text part of
//! `qwen3_vl_moe`.

use super::{
    hyper::{Hyper, Source},
    mixture::{Mixture, NormTopk},
    qwen3,
};
use crate::{error::Error, plan::Plan};

pub(super) fn plan(hyper: &Hyper) -> Result<Plan, Error> {
    // GGUF files do not state what every published model has; a config.json without the key means no division.
    let norm_topk = NormTopk::File(hyper.source == Source::Gguf);
    let ffns = hyper.mixture(&Mixture { norm_topk, has_shared: false })?;
    Ok(hyper.plan(qwen3::switches(hyper)?, ffns))
}

/// With images transformers divides whatever the file says (`Qwen3VLMoeTextTopKRouter`).
pub(super) fn plan_vl(hyper: &Hyper) -> Result<Plan, Error> {
    let ffns = hyper.mixture(&Mixture { norm_topk: NormTopk::Always, has_shared: false })?;
    Ok(hyper.plan(qwen3::switches(hyper)?, ffns))
}
