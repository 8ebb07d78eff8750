//! `qwen3_next`: Qwen3-Next-80B-A3B and Qwen3-Coder-Next. Three layers of Gated DeltaNet to one of gated attention;
//! experts beside a shared one.

use qwenkit_kernels::HeadOrder;

use super::{
    hyper::{Hyper, Switches},
    mixture::{Mixture, NormTopk},
    qwen3,
};
use crate::{error::Error, plan::Plan};

pub(super) fn plan(hyper: &Hyper) -> Result<Plan, Error> {
    let ffns = hyper.mixture(&Mixture { norm_topk: NormTopk::File(true), has_shared: true })?;
    // GGUF files of this one keep the checkpoint's order of heads.
    Ok(hyper.hybrid(switches(hyper)?, hyper.delta_net(HeadOrder::Grouped)?, ffns))
}

/// Attention of hybrid models: Qwen3's with an output gate.
pub(super) fn switches(hyper: &Hyper) -> Result<Switches, Error> {
    Ok(Switches { output_gate: true, ..qwen3::switches(hyper)? })
}
