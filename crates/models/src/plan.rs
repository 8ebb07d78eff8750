//! `Plan`: everything that distinguishes one Qwen model from another, as numbers and switches.
//!
//! Architecture files (`arch`) make plans; `load` turns a plan into weights and `forward` follows it. A new generation
//! adds a variant to `Mixer` or `Ffn` for a block that computes something new, and nothing else here.

use qwenkit_kernels::{ConvShape, DeltaGate, DeltaShape, RouterRule};
use qwenkit_tensor::TokenId;

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
    /// Whether the file has no output head at all, not even the embedding in its place: an embedding model, which turns texts
    /// into vectors and has no logits, or a reranker that `judges`.
    pub headless: bool,
    /// Whether there are two rows of an output head, those of yes and no: a reranker's GGUF file.
    pub judges: bool,
    /// How the file's norm weights are meant.
    pub norms: NormWeights,
    /// Rotary positions of the attention layers.
    pub rope: RopePlan,
    /// The residual streams, where there are several; one, with a norm in front of each block, where absent.
    pub streams: Option<StreamsPlan>,
    /// Blocks behind the last layer that guess the token after the next (MTP), as the file counts them. They are not part of
    /// the model's own answer.
    pub mtp_layers: usize,
    /// The first of these blocks, where the file holds it whole; of a loaded model, where it was loaded too.
    pub mtp: Option<LayerPlan>,
    /// The layers in order.
    pub layers: Vec<LayerPlan>,
    /// How images reach the model; absent where it reads text only.
    pub sight: Option<Sight>,
    /// Whether checkpoints of its kind may hold towers and blocks that guess beside the text model.
    pub has_parts_beside: bool,
}

/// What a text model's file says of images. The tower that turns them into vectors is another plan, `VisionPlan`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sight {
    /// Towers that go with the architecture, as `VisionPlan::architecture` names them.
    pub towers: &'static [&'static str],
    /// How many of the tower's inner layers are added to the first layers here, where the file says.
    pub deepstack: Option<usize>,
    /// The token that stands in a prompt for each vector of an image.
    pub image_token: TokenId,
    /// The same for films.
    pub video_token: TokenId,
}

/// How stored norm weights are meant. The weight in front of a gated norm (`linear_attn.norm`) is plain in every file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormWeights {
    /// As factors.
    Plain,
    /// As what is added to 1: checkpoints of Qwen3-Next and later. GGUF files have it added already.
    ZeroCentred,
}

/// Residual streams beside each other (hyper-connections): each block reads a mix of them and writes to all. Source: Zhu et
/// al. 2024, as in transformers' Qwen4-exp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamsPlan {
    /// S, `hc_count`
    pub count: usize,
    /// Rank of the matrices that mix, `hc_lowrank`.
    pub rank: usize,
}

/// One decoder layer: `x += mixer(norm(x)); x += ffn(norm(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerPlan {
    /// What is added to the residual streams before, from a table of short runs of tokens; nothing where absent.
    pub ngrams: Option<NgramPlan>,
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
    /// Linear attention with a state of fixed size (Gated DeltaNet).
    DeltaNet(DeltaNetPlan),
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
    /// Whether the heads' results are multiplied with the sigmoid of a gate, whose rows stand behind each head's in
    /// `q_proj` (Qwen3-Next).
    pub output_gate: bool,
    /// Whether files have q, k and v in one tensor (the first Qwen).
    pub fused_qkv: bool,
    /// How many positions a token sees, itself included; all where absent.
    pub window: Option<usize>,
    /// What chooses the positions that a token sees; all of them are seen where absent.
    pub indexer: Option<IndexerPlan>,
}

/// The choice of positions that a token sees (QSA): whole blocks by the score of a small key each, and the tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexerPlan {
    /// Query heads, `indexer_n_heads`; there is one key head.
    pub heads: usize,
    /// Size of a head, `indexer_head_dim`.
    pub head_dim: usize,
    /// Blocks that a token sees, `indexer_budget / indexer_compress_ratio`.
    pub blocks: usize,
    /// Positions of a block, `indexer_compress_ratio`.
    pub block_tokens: usize,
}

/// Embeddings of runs of the last tokens, found by hashing (PLE), gated into the residual streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NgramPlan {
    /// Tokens of the longest run, `ngram_size`; runs of 2 and more have tables.
    pub longest: usize,
    /// Tables of each length, `heads_per_ngram`.
    pub tables_each: usize,
    /// Values of one table's row.
    pub row_dim: usize,
    /// The odd number that the token so many places back is multiplied with: (longest)
    pub multipliers: Vec<i64>,
    /// Rows of each table, primes: (tables). They stand one after the other.
    pub sizes: Vec<usize>,
    /// Rows of all tables, padded.
    pub rows: usize,
    /// What stands for tokens before the sequence's first, and ends runs, `eos_token_id`.
    pub end: u32,
    /// The convolution behind the gate.
    pub conv: ConvShape,
}

/// Gated DeltaNet. Source: Yang et al. 2024, as in transformers' Qwen3-Next and Qwen3.5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaNetPlan {
    /// Heads and their sizes.
    pub shape: DeltaShape,
    /// Tokens that the convolution before it sees, `linear_conv_kernel_dim`.
    pub conv_width: usize,
    /// What the gate of its result goes through.
    pub gate: DeltaGate,
}

impl DeltaNetPlan {
    /// The convolution before it.
    pub fn conv(&self) -> ConvShape {
        ConvShape { width: self.conv_width, step: 1, channels: self.shape.channels() }
    }
}

/// The feed-forward block of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Ffn {
    /// `down(silu(gate(x)) * up(x))` with F = `intermediate_size`.
    Dense {
        /// F
        width: usize,
    },
    /// A weighted sum of a few of many such blocks, chosen token by token.
    Moe(MoePlan),
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoePlan {
    /// How many experts there are, and how a token's are chosen.
    pub router: RouterRule,
    /// F of one expert, `moe_intermediate_size`.
    pub width: usize,
    /// F of the expert that every token goes to, times the sigmoid of its own gate; none where absent.
    pub shared_width: Option<usize>,
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
    /// How the pairs of a head are shared out among time, height and width; all are time's where absent. Text has the same
    /// position in all three.
    pub sections: Option<RopeSections>,
}

/// The shares of time, height and width in a head's pairs (M-RoPE). Sources: Wang et al. 2024 (Qwen2-VL); transformers'
/// Qwen3-VL for the interleaved form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeSections {
    /// `mrope_section`: pairs of time, height and width.
    pub pairs: [usize; 3],
    /// Whether height and width have every third pair, from the second and the third on, instead of lying behind time's.
    pub interleaved: bool,
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

/// Something that a layer keeps of a sequence between tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateNeed {
    /// Keys and values of every position, in pages: G heads of K values each.
    Paged {
        /// G
        kv_heads: usize,
        /// K
        head_dim: usize,
    },
    /// Small keys by which positions are chosen, in the same pages.
    Index(IndexerPlan),
    /// A summary of all positions so far, in a slot of fixed size. It can be taken back by a few positions only.
    Recurrent(DeltaNetPlan),
    /// The last tokens, and the last columns of a convolution, in the same slot.
    Ngrams {
        /// Tokens kept.
        tokens: usize,
        /// The convolution.
        conv: ConvShape,
    },
}

impl Plan {
    /// Whether any layer keeps a state that cannot be taken back to any earlier position.
    pub fn has_recurrent_state(&self) -> bool {
        let in_slot = |need| matches!(need, StateNeed::Recurrent(_) | StateNeed::Ngrams { .. });
        self.layers.iter().any(|layer| layer.state().into_iter().any(in_slot))
    }

    /// The places of blocks that guess in GGUF files, behind the layers.
    pub fn spare_blocks(&self) -> std::ops::Range<usize> {
        self.layers.len()..self.layers.len() + self.mtp_layers
    }

    /// The block that guesses, where other programs find it in GGUF files: of Qwen3-Next they take every block for a layer.
    pub fn mtp_in_gguf(&self) -> Option<&LayerPlan> {
        self.mtp.as_ref().filter(|_| self.architecture != "qwen3_next")
    }

    /// How many residual streams there are.
    pub fn stream_count(&self) -> usize {
        self.streams.map_or(1, |streams| streams.count)
    }
}

impl LayerPlan {
    /// What the layer keeps of a sequence.
    pub fn state(&self) -> Vec<StateNeed> {
        let mut needs = match &self.mixer {
            Mixer::Attention(a) => {
                let index = a.indexer.map(StateNeed::Index);
                [StateNeed::Paged { kv_heads: a.kv_heads, head_dim: a.head_dim }].into_iter().chain(index).collect()
            }
            Mixer::DeltaNet(d) => vec![StateNeed::Recurrent(*d)],
        };
        needs.extend(self.ngrams.as_ref().map(|n| StateNeed::Ngrams { tokens: n.longest - 1, conv: n.conv }));
        needs
    }
}
