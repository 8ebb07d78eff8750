//! `qwen3_5` and `qwen3_5_moe`: Qwen3.5, Qwen3.6 and Qwen3.8-27B, and their models with experts. Gated DeltaNet and gated
//! attention as in Qwen3-Next; of multimodal checkpoints the text model alone.

use qwenkit_kernels::HeadOrder;

use super::{
    hyper::{Hyper, Source},
    mixture::{Mixture, NormTopk},
    qwen3_next,
};
use crate::{
    error::Error,
    plan::{Ffn, Plan},
};

pub(super) fn plan(hyper: &Hyper) -> Result<Plan, Error> {
    with_ffns(hyper, vec![hyper.dense_ffn()?; hyper.layers()])
}

pub(super) fn plan_moe(hyper: &Hyper) -> Result<Plan, Error> {
    with_ffns(hyper, hyper.mixture(&Mixture { norm_topk: NormTopk::Always, has_shared: true })?)
}

fn with_ffns(hyper: &Hyper, ffns: Vec<Ffn>) -> Result<Plan, Error> {
    Ok(hyper.hybrid(qwen3_next::switches(hyper)?, hyper.delta_net(head_order(hyper))?, ffns))
}

/// Value heads' order from this generation on.
pub(super) fn head_order(hyper: &Hyper) -> HeadOrder {
    match hyper.source {
        Source::Checkpoint => HeadOrder::Grouped,
        Source::Gguf => HeadOrder::Tiled,
    }
}
