//! `qwen2_moe`: Qwen1.5-MoE and Qwen2-57B-A14B. Attention of Qwen2; experts beside a shared one with a gate of its own.

use super::{
    hyper::Hyper,
    mixture::{Mixture, NormTopk},
    qwen2,
};
use crate::{error::Error, plan::Plan};

pub(super) fn plan(hyper: &Hyper) -> Result<Plan, Error> {
    let ffns = hyper.mixture(&Mixture { norm_topk: NormTopk::File(false), has_shared: true })?;
    Ok(hyper.plan(qwen2::SWITCHES, ffns))
}
