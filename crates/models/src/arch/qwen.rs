//! `qwen`: the first Qwen, 1.8B to 72B, from GGUF. Attention of Qwen2 with as many key heads as query heads; q, k and v are one
//! tensor. Checkpoints of it come with code of their own and a vocabulary of another form, and are not read.
//!
//! Beyond the length of its training that code stretched rotary positions and queries by the length of the whole prompt
//! ("dynamic NTK", "log-n"). GGUF files state neither that length nor whether to; it is not done here, and not in llama.cpp.

use super::{
    hyper::{Hyper, SIZE_MAX, Switches},
    qwen2,
};
use crate::{
    error::Error,
    plan::{Ffn, Plan},
};

pub(super) fn plan(hyper: &Hyper) -> Result<Plan, Error> {
    // The number counts gate and up together.
    let both = hyper.required("intermediate_size", hyper.intermediate_size, 2 * SIZE_MAX)?;
    if both % 2 == 1 {
        return Err(hyper.wrong("intermediate_size", both, "an even number, twice the feed-forward width"));
    }
    let ffn = Ffn::Dense { width: both / 2 };
    Ok(hyper.plan(Switches { fused_qkv: true, ..qwen2::SWITCHES }, vec![ffn; hyper.layers()]))
}
