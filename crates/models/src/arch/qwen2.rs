//! `qwen2`: Qwen1.5, Qwen2, Qwen2.5 with Coder and Math, QwQ. Dense, with biases on q, k and v.

use super::hyper::{Hyper, Switches};
use crate::{error::Error, plan::Plan};

pub(super) fn plan(hyper: &Hyper) -> Result<Plan, Error> {
    hyper.dense(SWITCHES)
}

/// Attention of this generation, with and without experts.
pub(super) const SWITCHES: Switches = Switches { qkv_bias: true, qk_norm: false, output_gate: false, fused_qkv: false };
