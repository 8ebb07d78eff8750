//! `qwen4_exp`: Qwen3.8-Flash-Next. Gated DeltaNet and experts as in Qwen3.5, gated attention to chosen positions, several
//! residual streams in place of norms, and embeddings of runs of tokens; of multimodal checkpoints the text model alone.

use super::{
    hyper::Hyper,
    mixture::{Mixture, NormTopk},
    qwen3_5, qwen3_next,
};
use crate::{
    error::Error,
    plan::{Mixer, Plan},
};

pub(super) fn plan(hyper: &Hyper) -> Result<Plan, Error> {
    let ffns = hyper.mixture(&Mixture { norm_topk: NormTopk::File(true), has_shared: true })?;
    let linear = hyper.delta_net(qwen3_5::head_order(hyper))?;
    let mut plan = hyper.hybrid(qwen3_next::switches(hyper)?, linear, ffns);
    let (streams, indexer) = (hyper.streams()?, hyper.indexer()?);
    plan.streams = Some(streams);
    for (layer, ngrams) in plan.layers.iter_mut().zip(hyper.ngrams(streams)?) {
        layer.ngrams = ngrams;
        if let Mixer::Attention(attention) = &mut layer.mixer {
            attention.indexer = Some(indexer);
        }
    }
    Ok(plan)
}
