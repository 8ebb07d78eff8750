//! `Plan`: everything that distinguishes one Qwen model from another, as numbers and switches.
//!
//! Architecture files (`arch`) make plans; `load` turns a plan into weights and `forward` follows it. A new generation
//! adds a variant to `Mixer` or `Ffn` for a block that computes something new, and nothing else here.

/// A model's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The architecture's name, as Hugging Face's `model_type` has it.
    pub architecture: &'static str,
    /// D, `hidden_size`.
    pub width: usize,
    /// V, rows of the embedding; may exceed the tokenizer's tokens.
    pub vocab: usize,
    /// Positions that the model was made for, `max_position_embeddings`.
    pub context_tokens: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// Rotary positions of the attention layers.
    pub rope: RopePlan,
    /// The layers in order.
    pub layers: Vec<LayerPlan>,
}

/// One decoder layer: `x += mixer(norm(x)); x += ffn(norm(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerPlan {
    /// What looks at other tokens.
    pub mixer: Mixer,
    /// What looks at the token alone.
    pub ffn: Ffn,
}

/// The token mixer of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Softmax attention over cached keys and values.
    Attention(AttentionPlan),
}

/// Softmax attention.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionPlan {
    /// H, `num_attention_heads`.
    pub heads: usize,
    /// G, `num_key_value_heads`.
    pub kv_heads: usize,
    /// K, `head_dim`.
    pub head_dim: usize,
    /// Whether q, k and v have biases (Qwen2).
    pub qkv_bias: bool,
    /// Whether each head of q and k is normed before its rotation (Qwen3).
    pub qk_norm: bool,
    /// How many positions a token sees, itself included; all where absent.
    pub window: Option<usize>,
}

/// The feed-forward block of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Ffn {
    /// `down(silu(gate(x)) * up(x))` with F = `intermediate_size`.
    Dense {
        /// F
        width: usize,
    },
}

/// Rotary positions.
#[derive(Clone, Debug, PartialEq)]
pub struct RopePlan {
    /// Values of a head that are rotated; the head size except where `partial_rotary_factor` is below 1.
    pub dims: usize,
    /// The base of the frequencies, `rope_theta`.
    pub theta: f64,
    /// Extension of the context; static, so it changes short contexts too.
    pub yarn: Option<Yarn>,
}

/// YaRN context extension. Source: Peng et al. 2023.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How many times the original context.
    pub factor: f64,
    /// `original_max_position_embeddings`
    pub original_tokens: usize,
    /// Rotations over the original context above which a frequency is kept.
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by the factor.
    pub beta_slow: f64,
    /// Multiplied into cos and sin; `0.1 ln(factor) + 1` where absent.
    pub attention_factor: Option<f64>,
}

/// What a layer keeps of a sequence between tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateNeed {
    /// Keys and values of every position, in pages: G heads of K values each.
    Paged {
        /// G
        kv_heads: usize,
        /// K
        head_dim: usize,
    },
}

impl LayerPlan {
    /// What the layer keeps of a sequence.
    pub fn state(&self) -> StateNeed {
        match &self.mixer {
            Mixer::Attention(a) => StateNeed::Paged { kv_heads: a.kv_heads, head_dim: a.head_dim },
        }
    }
}
