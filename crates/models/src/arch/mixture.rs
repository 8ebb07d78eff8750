//! The numbers of a mixture of experts, read from config.json and from GGUF metadata and checked.

use qwenkit_formats::{Config, Gguf};
use qwenkit_kernels::RouterRule;

use super::hyper::{Hyper, LAYERS_MAX, SIZE_MAX};
use crate::{
    error::Error,
    plan::{Ffn, MoePlan},
};

/// No Qwen has more than a fraction of these.
const EXPERTS_MAX: usize = 1 << 14;

/// What a file says of its experts; names are those of config.json. All of it may be absent.
#[derive(Debug, Default)]
pub(super) struct ExpertNumbers {
    num_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    moe_intermediate_size: Option<usize>,
    shared_expert_intermediate_size: Option<usize>,
    norm_topk_prob: Option<bool>,
    /// Every so many layers one is a mixture.
    decoder_sparse_step: usize,
    /// Layers that are none.
    mlp_only_layers: Vec<usize>,
}

/// What an architecture knows of its experts.
pub(super) struct Mixture {
    /// Whether the weights of the chosen are divided by their sum.
    pub(super) norm_topk: NormTopk,
    /// Whether there is an expert that every token visits.
    pub(super) has_shared: bool,
}

/// Who says whether weights are divided by their sum.
pub(super) enum NormTopk {
    /// `norm_topk_prob` of the file, and this where it does not say.
    File(bool),
    /// The architecture; no file can change it.
    Always,
}

impl ExpertNumbers {
    pub(super) fn of_gguf(gguf: &Gguf, key: &impl Fn(&str) -> String) -> Result<ExpertNumbers, Error> {
        let meta = gguf.metadata();
        // Files of before these keys have the widths in their tensors' shapes only.
        let axis = |name: &str, axis: usize| gguf.tensor(name).and_then(|t| t.shape.get(axis).copied());
        let width = match meta.usize(&key("expert_feed_forward_length"))? {
            Some(width) => Some(width),
            None => axis("blk.0.ffn_gate_exps.weight", 1),
        };
        let shared = match meta.usize(&key("expert_shared_feed_forward_length"))? {
            Some(width) => Some(width),
            None => axis("blk.0.ffn_gate_shexp.weight", 0),
        };
        // Layers with neither a router nor experts are dense; those with one of both are mixtures that are not whole.
        let blocks = meta.usize(&key("block_count"))?.unwrap_or(0).min(LAYERS_MAX);
        let lacks = |part: &str, i: usize| gguf.tensor(&format!("blk.{i}.{part}.weight")).is_none();
        let is_dense = |&i: &usize| lacks("ffn_gate_inp", i) && lacks("ffn_gate_exps", i);
        let mlp_only_layers: Vec<usize> = (0..blocks).filter(is_dense).collect();
        Ok(ExpertNumbers {
            num_experts: meta.usize(&key("expert_count"))?,
            num_experts_per_tok: meta.usize(&key("expert_used_count"))?,
            moe_intermediate_size: width,
            shared_expert_intermediate_size: shared,
            norm_topk_prob: meta.bool(&key("expert_weights_norm"))?,
            decoder_sparse_step: 1,
            // A file without any is broken, not dense.
            mlp_only_layers: if mlp_only_layers.len() < blocks { mlp_only_layers } else { Vec::new() },
        })
    }

    pub(super) fn of_config(config: &Config) -> Result<ExpertNumbers, Error> {
        let experts = match config.usize("num_experts")? {
            Some(experts) => Some(experts),
            None => config.usize("num_local_experts")?,
        };
        Ok(ExpertNumbers {
            num_experts: experts,
            num_experts_per_tok: config.usize("num_experts_per_tok")?,
            moe_intermediate_size: config.usize("moe_intermediate_size")?,
            shared_expert_intermediate_size: config.usize("shared_expert_intermediate_size")?,
            norm_topk_prob: config.bool("norm_topk_prob")?,
            decoder_sparse_step: config.usize("decoder_sparse_step")?.unwrap_or(1),
            mlp_only_layers: config.usizes("mlp_only_layers")?.unwrap_or_default(),
        })
    }
}

impl Hyper {
    /// The feed-forward blocks of a model with experts, layer by layer.
    pub(super) fn mixture(&self, mixture: &Mixture) -> Result<Vec<Ffn>, Error> {
        let numbers = &self.experts;
        let experts = self.required("num_experts", numbers.num_experts, EXPERTS_MAX)?;
        let experts_per_token = self.required("num_experts_per_tok", numbers.num_experts_per_tok, experts)?;
        let width = self.required("moe_intermediate_size", numbers.moe_intermediate_size, SIZE_MAX)?;
        let shared_width = match mixture.has_shared {
            false => None,
            true => {
                let found = numbers.shared_expert_intermediate_size;
                Some(self.required("shared_expert_intermediate_size", found, SIZE_MAX)?)
            }
        };
        let norm_topk = match mixture.norm_topk {
            NormTopk::File(default) => numbers.norm_topk_prob.unwrap_or(default),
            NormTopk::Always => true,
        };
        if numbers.decoder_sparse_step == 0 {
            return Err(self.wrong("decoder_sparse_step", 0, "1 or more layers"));
        }
        let router = RouterRule { experts, experts_per_token, norm_topk };
        let moe = MoePlan { router, width, shared_width };
        let is_sparse =
            |i: &usize| (i + 1).is_multiple_of(numbers.decoder_sparse_step) && !numbers.mlp_only_layers.contains(i);
        (0..self.layers()).map(|i| if is_sparse(&i) { Ok(Ffn::Moe(moe)) } else { self.dense_ffn() }).collect()
    }
}
