//! `qwen2_moe`: Qwen1.5-MoE and Qwen2-57B-A14B. Attention of Qwen2, whose biases a file may go without; experts beside a shared one with
//! a gate of its own.

use super::{
    hyper::{Hyper, Switches},
    mixture::{Mixture, NormTopk},
    qwen2,
};
use crate::{error::Error, plan::Plan};

pub(super) fn plan(hyper: &Hyper) -> Result<Plan, Error> {
    let ffns = hyper.mixture(&Mixture { norm_topk: NormTopk::File(false), has_shared: true })?;
    let qkv_bias = hyper.qkv_bias.unwrap_or(qwen2::SWITCHES.qkv_bias);
    Ok(hyper.plan(Switches { qkv_bias, ..qwen2::SWITCHES }, ffns))
}
