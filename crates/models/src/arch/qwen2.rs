//! `qwen2`: Qwen1.5, Qwen2, Qwen2.5 with Coder and Math, QwQ. Dense, with biases on q, k and v.

use super::hyper::Hyper;
use crate::{error::Error, plan::Plan};

pub(super) fn plan(hyper: &Hyper) -> Result<Plan, Error> {
    Ok(hyper.dense(true, false))
}
