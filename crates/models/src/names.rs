//! The two names of every tensor: Hugging Face's and GGUF's. Checkpoints differ in nothing else that the blocks could
//! see.

/// Whose names a file uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Naming {
    /// `model.layers.0.self_attn.q_proj.weight`
    HuggingFace,
    /// `blk.0.attn_q.weight`
    Gguf,
}

/// (Hugging Face, GGUF) of a tensor outside the layers.
pub(crate) type Pair = (&'static str, &'static str);

pub(crate) const EMBEDDING: Pair = ("model.embed_tokens.weight", "token_embd.weight");
pub(crate) const NORM: Pair = ("model.norm.weight", "output_norm.weight");
pub(crate) const HEAD: Pair = ("lm_head.weight", "output.weight");

/// Inside a layer, after `model.layers.N.` and `blk.N.`.
pub(crate) const INPUT_NORM: Pair = ("input_layernorm.weight", "attn_norm.weight");
pub(crate) const POST_NORM: Pair = ("post_attention_layernorm.weight", "ffn_norm.weight");
pub(crate) const Q_PROJ: Pair = ("self_attn.q_proj.weight", "attn_q.weight");
pub(crate) const K_PROJ: Pair = ("self_attn.k_proj.weight", "attn_k.weight");
pub(crate) const V_PROJ: Pair = ("self_attn.v_proj.weight", "attn_v.weight");
pub(crate) const O_PROJ: Pair = ("self_attn.o_proj.weight", "attn_output.weight");
pub(crate) const Q_BIAS: Pair = ("self_attn.q_proj.bias", "attn_q.bias");
pub(crate) const K_BIAS: Pair = ("self_attn.k_proj.bias", "attn_k.bias");
pub(crate) const V_BIAS: Pair = ("self_attn.v_proj.bias", "attn_v.bias");
pub(crate) const Q_NORM: Pair = ("self_attn.q_norm.weight", "attn_q_norm.weight");
pub(crate) const K_NORM: Pair = ("self_attn.k_norm.weight", "attn_k_norm.weight");
pub(crate) const GATE_PROJ: Pair = ("mlp.gate_proj.weight", "ffn_gate.weight");
pub(crate) const UP_PROJ: Pair = ("mlp.up_proj.weight", "ffn_up.weight");
pub(crate) const DOWN_PROJ: Pair = ("mlp.down_proj.weight", "ffn_down.weight");

impl Naming {
    /// The name of a tensor outside the layers.
    pub(crate) fn outer(self, pair: Pair) -> String {
        match self {
            Naming::HuggingFace => pair.0.to_owned(),
            Naming::Gguf => pair.1.to_owned(),
        }
    }

    /// The name of a tensor of layer `layer`.
    pub(crate) fn inner(self, layer: usize, pair: Pair) -> String {
        match self {
            Naming::HuggingFace => format!("model.layers.{layer}.{}", pair.0),
            Naming::Gguf => format!("blk.{layer}.{}", pair.1),
        }
    }

    /// Whether a file may hold this tensor without any model needing it: tables that are computed anew.
    pub(crate) fn is_spare(self, name: &str) -> bool {
        match self {
            Naming::HuggingFace => name.ends_with("rotary_emb.inv_freq"),
            Naming::Gguf => name == "rope_freqs.weight",
        }
    }
}
