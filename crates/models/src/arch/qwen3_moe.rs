//! `qwen3_moe`: Qwen3-30B-A3B, 235B-A22B, Coder 30B and 480B. Attention of Qwen3; experts without a shared one.

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
