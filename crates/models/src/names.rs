//! The two names of every tensor: Hugging Face's and GGUF's. Checkpoints differ in nothing else that the blocks could
//! see.

use std::ops::Range;

use qwenkit_formats::ModelFiles;

/// Whose names a file uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Naming {
    /// `model.layers.0.self_attn.q_proj.weight`, with what stands before `layers` and before `lm_head`: a model inside a
    /// multimodal one has a longer way to its tensors.
    HuggingFace {
        /// Before `embed_tokens`, `layers` and `norm`.
        body: &'static str,
        /// Before `lm_head`.
        head: &'static str,
    },
    /// `blk.0.attn_q.weight`
    Gguf,
}

/// (Hugging Face, GGUF) of a tensor.
pub(crate) type Pair = (&'static str, &'static str);

/// Where checkpoints keep the text model: on its own, inside a multimodal one, inside one of MLX's, without its head as
/// embedding models are saved.
pub(crate) const BODIES: [(&str, &str); 4] =
    [("model.", ""), ("model.language_model.", ""), ("language_model.model.", "language_model."), ("", "")];

/// What multimodal and self-speculating checkpoints hold beside the text model, which runs by itself. Where these parts are
/// not wanted, they are left on disk deliberately, here and nowhere else.
const BESIDE_TEXT: [&str; 5] = ["model.visual.", "visual.", "vision_tower.", "mtp.", "language_model.mtp."];

pub(crate) const EMBEDDING: Pair = ("embed_tokens.weight", "token_embd.weight");
pub(crate) const NORM: Pair = ("norm.weight", "output_norm.weight");
/// The one name that does not begin with the body's.
pub(crate) const HEAD: Pair = ("lm_head.weight", "output.weight");

/// Of a reranker's head the rows of yes and no, in GGUF files that have nothing else of it.
pub(crate) const JUDGE: &str = "cls.output.weight";

/// Inside a layer, after `layers.N.` and `blk.N.`.
pub(crate) const INPUT_NORM: Pair = ("input_layernorm.weight", "attn_norm.weight");
pub(crate) const POST_NORM: Pair = ("post_attention_layernorm.weight", "ffn_norm.weight");
/// The same in GGUF files of models with recurrent layers.
pub(crate) const POST_NORM_HYBRID: Pair = ("post_attention_layernorm.weight", "post_attention_norm.weight");
pub(crate) const Q_PROJ: Pair = ("self_attn.q_proj.weight", "attn_q.weight");
pub(crate) const K_PROJ: Pair = ("self_attn.k_proj.weight", "attn_k.weight");
pub(crate) const V_PROJ: Pair = ("self_attn.v_proj.weight", "attn_v.weight");
/// Queries, keys and values in one, with their biases: the first Qwen's.
pub(crate) const QKV_PROJ: Pair = ("", "attn_qkv.weight");
pub(crate) const QKV_BIAS: Pair = ("", "attn_qkv.bias");
pub(crate) const O_PROJ: Pair = ("self_attn.o_proj.weight", "attn_output.weight");
pub(crate) const Q_BIAS: Pair = ("self_attn.q_proj.bias", "attn_q.bias");
pub(crate) const K_BIAS: Pair = ("self_attn.k_proj.bias", "attn_k.bias");
pub(crate) const V_BIAS: Pair = ("self_attn.v_proj.bias", "attn_v.bias");
pub(crate) const Q_NORM: Pair = ("self_attn.q_norm.weight", "attn_q_norm.weight");
pub(crate) const K_NORM: Pair = ("self_attn.k_norm.weight", "attn_k_norm.weight");

pub(crate) const GATE_PROJ: Pair = ("mlp.gate_proj.weight", "ffn_gate.weight");
pub(crate) const UP_PROJ: Pair = ("mlp.up_proj.weight", "ffn_up.weight");
pub(crate) const DOWN_PROJ: Pair = ("mlp.down_proj.weight", "ffn_down.weight");

pub(crate) const ROUTER: Pair = ("mlp.gate.weight", "ffn_gate_inp.weight");
pub(crate) const SHARED_ROUTER: Pair = ("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight");
pub(crate) const SHARED_GATE: Pair = ("mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight");
pub(crate) const SHARED_UP: Pair = ("mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight");
pub(crate) const SHARED_DOWN: Pair = ("mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight");
/// Experts stacked in one tensor; the Hugging Face names are those of packed checkpoints, gate and up in one.
pub(crate) const EXPERTS_GATE: Pair = ("mlp.experts.gate_up_proj", "ffn_gate_exps.weight");
pub(crate) const EXPERTS_UP: Pair = ("mlp.experts.gate_up_proj", "ffn_up_exps.weight");
pub(crate) const EXPERTS_DOWN: Pair = ("mlp.experts.down_proj", "ffn_down_exps.weight");

pub(crate) const IN_QKV: Pair = ("linear_attn.in_proj_qkv.weight", "attn_qkv.weight");
pub(crate) const IN_Z: Pair = ("linear_attn.in_proj_z.weight", "attn_gate.weight");
pub(crate) const IN_B: Pair = ("linear_attn.in_proj_b.weight", "ssm_beta.weight");
pub(crate) const IN_A: Pair = ("linear_attn.in_proj_a.weight", "ssm_alpha.weight");
/// Qwen3-Next's: q, k, v and z of each key head together, and b and a.
pub(crate) const IN_QKVZ: Pair = ("linear_attn.in_proj_qkvz.weight", "ssm_in.weight");
pub(crate) const IN_BA: Pair = ("linear_attn.in_proj_ba.weight", "ssm_ba.weight");
pub(crate) const CONV: Pair = ("linear_attn.conv1d.weight", "ssm_conv1d.weight");
pub(crate) const FADE_BIAS: Pair = ("linear_attn.dt_bias", "ssm_dt.bias");
/// Logarithms of minus the rates in checkpoints, the rates themselves in GGUF.
pub(crate) const RATE: Pair = ("linear_attn.A_log", "ssm_a");
pub(crate) const DELTA_NORM: Pair = ("linear_attn.norm.weight", "ssm_norm.weight");
pub(crate) const DELTA_OUT: Pair = ("linear_attn.out_proj.weight", "ssm_out.weight");

/// Norm, down, up and inject of what mixes residual streams: before the mixer, before the feed-forward block, at the end.
pub(crate) const STREAMS_MIXER: (Pair, Pair, Pair, Option<Pair>) = (
    ("attn_hyper_connection.hc_norm.weight", "hc_attn_norm.weight"),
    ("attn_hyper_connection.input_mix_weight_down.weight", "hc_attn_down.weight"),
    ("attn_hyper_connection.input_mix_weight_up.weight", "hc_attn_up.weight"),
    Some(("attn_hyper_connection.block_inject_weight.weight", "hc_attn_inject.weight")),
);
pub(crate) const STREAMS_FFN: (Pair, Pair, Pair, Option<Pair>) = (
    ("mlp_hyper_connection.hc_norm.weight", "hc_ffn_norm.weight"),
    ("mlp_hyper_connection.input_mix_weight_down.weight", "hc_ffn_down.weight"),
    ("mlp_hyper_connection.input_mix_weight_up.weight", "hc_ffn_up.weight"),
    Some(("mlp_hyper_connection.block_inject_weight.weight", "hc_ffn_inject.weight")),
);
pub(crate) const STREAMS_OUT: (Pair, Pair, Pair, Option<Pair>) = (
    ("hyper_connection_mixer.hc_norm.weight", "output_hc_norm.weight"),
    ("hyper_connection_mixer.input_mix_weight_down.weight", "output_hc_down.weight"),
    ("hyper_connection_mixer.input_mix_weight_up.weight", "output_hc_up.weight"),
    None,
);

/// The indexer's; checkpoints have queries and key in one.
pub(crate) const INDEX_Q: Pair = ("self_attn.indexer.index_qk_proj.weight", "indexer.q_proj.weight");
pub(crate) const INDEX_K: Pair = ("self_attn.indexer.index_qk_proj.weight", "indexer.k_proj.weight");
pub(crate) const INDEX_Q_NORM: Pair = ("self_attn.indexer.q_layernorm.weight", "indexer.q_norm.weight");
pub(crate) const INDEX_K_NORM: Pair = ("self_attn.indexer.k_layernorm.weight", "indexer.k_norm.weight");

/// Embeddings of runs of tokens. The table belongs to a layer in checkpoints, to none in GGUF; constants of the hashes are
/// tensors in checkpoints, metadata in GGUF.
pub(crate) const NGRAM_TABLE: Pair = ("ple.ple_embedding.ngram_embedding.weight", "per_layer_token_embd.weight");
pub(crate) const NGRAM_MULTIPLIERS: Pair = ("ple.ple_embedding.layer_multipliers", "");
pub(crate) const NGRAM_STARTS: Pair = ("ple.ple_embedding.ngram_heads_offsets", "");
pub(crate) const NGRAM_SIZES: Pair = ("ple.ple_embedding.ngram_heads_vocab_sizes", "");
pub(crate) const NGRAM_KEY: Pair = ("ple.key_proj.weight", "ple_key.weight");
pub(crate) const NGRAM_VALUE: Pair = ("ple.value_proj.weight", "ple_value.weight");
pub(crate) const NGRAM_NORM_KEY: Pair = ("ple.norm_key.weight", "ple_norm_key.weight");
pub(crate) const NGRAM_NORM_QUERY: Pair = ("ple.norm_query.weight", "ple_norm_query.weight");
pub(crate) const NGRAM_NORM_CONV: Pair = ("ple.norm_conv.weight", "ple_norm_conv.weight");
pub(crate) const NGRAM_CONV: Pair = ("ple.conv1d.weight", "ple_conv1d.weight");

/// Of the block that guesses the token after the next, what other blocks do not have: after `mtp.` and `blk.N.nextn.`.
pub(crate) const MTP_FC: Pair = ("fc.weight", "eh_proj.weight");
pub(crate) const MTP_EMBEDDING_NORM: Pair = ("pre_fc_norm_embedding.weight", "enorm.weight");
pub(crate) const MTP_HIDDEN_NORM: Pair = ("pre_fc_norm_hidden.weight", "hnorm.weight");
pub(crate) const MTP_NORM: Pair = ("norm.weight", "shared_head_norm.weight");
pub(crate) const MTP_OUTER: [Pair; 4] = [MTP_FC, MTP_EMBEDDING_NORM, MTP_HIDDEN_NORM, MTP_NORM];
/// What a block has that does not share the model's embedding and head. No Qwen is known to.
pub(crate) const MTP_OWN: [Pair; 2] =
    [("embed_tokens.weight", "embed_tokens.weight"), ("lm_head.weight", "shared_head_head.weight")];

impl Naming {
    /// Of the tensors in these files.
    pub(crate) fn of_files(files: &ModelFiles) -> Naming {
        match files {
            ModelFiles::Gguf(_) => Naming::Gguf,
            ModelFiles::Checkpoint(_) => Naming::of_checkpoint(|name| files.tensor(name).is_some()),
        }
    }

    /// The name of a tensor of the block that guesses, behind `layers` others.
    pub(crate) fn mtp(self, layers: usize, pair: Pair) -> String {
        match self {
            Naming::HuggingFace { head, .. } => format!("{head}mtp.{}", pair.0),
            Naming::Gguf => format!("blk.{layers}.nextn.{}", pair.1),
        }
    }

    /// How that block's tensors are named that other blocks have too, and its number.
    pub(crate) fn of_mtp(self, layers: usize) -> (Naming, usize) {
        match self {
            Naming::HuggingFace { head: "", .. } => (Naming::HuggingFace { body: "mtp.", head: "" }, 0),
            Naming::HuggingFace { head, .. } => (Naming::HuggingFace { body: "language_model.mtp.", head }, 0),
            Naming::Gguf => (Naming::Gguf, layers),
        }
    }

    /// The way to the text model in a checkpoint that has the tensors `has` says.
    pub(crate) fn of_checkpoint(has: impl Fn(&str) -> bool) -> Naming {
        let found = BODIES.into_iter().find(|(body, _)| has(&format!("{body}{}", EMBEDDING.0)));
        let (body, head) = found.unwrap_or(BODIES[0]);
        Naming::HuggingFace { body, head }
    }

    /// This world's of a tensor's two names, without what leads to it; empty where it has none.
    pub(crate) fn own(self, (hugging_face, gguf): Pair) -> &'static str {
        match self {
            Naming::HuggingFace { .. } => hugging_face,
            Naming::Gguf => gguf,
        }
    }

    /// The name of a tensor outside the layers.
    pub(crate) fn outer(self, pair: Pair) -> String {
        match self {
            Naming::HuggingFace { head, .. } if pair == HEAD => format!("{head}{}", pair.0),
            Naming::HuggingFace { body, .. } => format!("{body}{}", pair.0),
            Naming::Gguf => pair.1.to_owned(),
        }
    }

    /// The name of a tensor of layer `layer`.
    pub(crate) fn inner(self, layer: usize, pair: Pair) -> String {
        match self {
            Naming::HuggingFace { body, .. } => format!("{body}layers.{layer}.{}", pair.0),
            Naming::Gguf => format!("blk.{layer}.{}", pair.1),
        }
    }

    /// The name of one expert's matrix in checkpoints where each has a tensor of its own; `None` where no file has it.
    pub(crate) fn expert(self, layer: usize, expert: usize, matrix: &str) -> Option<String> {
        match self {
            Naming::HuggingFace { body, .. } => {
                Some(format!("{body}layers.{layer}.mlp.experts.{expert}.{matrix}.weight"))
            }
            Naming::Gguf => None,
        }
    }

    /// The name of one part of a table of runs in checkpoints that have it in parts; `None` where no file has.
    pub(crate) fn ngram_part(self, layer: usize, part: usize) -> Option<String> {
        match self {
            Naming::HuggingFace { body, .. } => {
                Some(format!("{body}layers.{layer}.ple.ple_embedding.ngram_embedding.shard_{part}.weight"))
            }
            Naming::Gguf => None,
        }
    }

    /// Whether a file may hold this tensor without the text model needing it: tables that are computed anew, towers of
    /// other senses, and `blocks` that guess behind the layers; `beside` says whether checkpoints of its kind have such parts.
    pub(crate) fn is_spare(self, name: &str, blocks: Range<usize>, beside: bool) -> bool {
        match self {
            Naming::HuggingFace { .. } => {
                let is_beside = || BESIDE_TEXT.iter().any(|part| name.starts_with(part));
                name.ends_with("rotary_emb.inv_freq") || beside && is_beside()
            }
            Naming::Gguf => {
                let block = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
                name == "rope_freqs.weight" || block.is_some_and(|i| blocks.contains(&i))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_model_is_found_inside_others() {
        for (embedding, layer, head) in [
            ("model.embed_tokens.weight", "model.layers.3.self_attn.q_proj.weight", "lm_head.weight"),
            (
                "model.language_model.embed_tokens.weight",
                "model.language_model.layers.3.self_attn.q_proj.weight",
                "lm_head.weight",
            ),
            (
                "language_model.model.embed_tokens.weight",
                "language_model.model.layers.3.self_attn.q_proj.weight",
                "language_model.lm_head.weight",
            ),
            ("embed_tokens.weight", "layers.3.self_attn.q_proj.weight", "lm_head.weight"),
        ] {
            let naming = Naming::of_checkpoint(|name| name == embedding);
            assert_eq!(naming.outer(EMBEDDING), embedding);
            assert_eq!(naming.inner(3, Q_PROJ), layer);
            assert_eq!(naming.outer(HEAD), head);
        }
    }

    #[test]
    fn only_blocks_behind_the_layers_are_spare() {
        for (name, spare) in [("blk.4.attn_q.weight", true), ("blk.3.attn_q.weight", false), ("blk.5.x", false)] {
            assert_eq!(Naming::Gguf.is_spare(name, 4..5, true), spare, "{name}");
            assert!(!Naming::Gguf.is_spare(name, 4..4, true), "{name}");
        }
        let naming = Naming::of_checkpoint(|_| false);
        for (name, spare) in
            [("model.visual.x", true), ("mtp.fc.weight", true), ("model.layers.9.mtp.x", false), ("model.x", false)]
        {
            assert_eq!(naming.is_spare(name, 4..4, true), spare, "{name}");
            let is_table = name.ends_with("inv_freq");
            assert_eq!(naming.is_spare(name, 4..4, false), is_table, "{name}: a model that has no such parts");
        }
    }
}
