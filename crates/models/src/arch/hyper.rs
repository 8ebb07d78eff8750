//! The numbers of a model as its file states them, read alike from config.json and from GGUF metadata and checked
//! before anybody computes with them. Numbers that only some architectures have are in `mixture` and `delta_net`.

use std::path::{Path, PathBuf};

use qwenkit_formats::{Config, Gguf};
use qwenkit_kernels::HEAD_DIM_MAX;

use super::{
    Architecture,
    delta_net::LinearNumbers,
    layer_kinds::{self, LayerKind},
    mixture::ExpertNumbers,
    ngrams::NgramNumbers,
    rotary,
    streams::{IndexerNumbers, StreamNumbers},
};
use crate::{
    error::Error,
    missing::Place,
    names,
    plan::{AttentionPlan, DeltaNetPlan, Ffn, LayerPlan, Mixer, NormWeights, Plan, RopePlan, RopeSections, Yarn},
};

/// No Qwen is deeper or wider than a fraction of these; beyond them a file is broken or hostile.
pub(super) const LAYERS_MAX: usize = 1_000;
pub(super) const SIZE_MAX: usize = 1 << 24;
pub(super) const HEADS_MAX: usize = 1 << 14;
pub(super) const CONTEXT_MAX: usize = 1 << 30;
const MTP_LAYERS_MAX: usize = 100;
/// `partial_rotary_factor` of hybrid models whose file does not say.
const HYBRID_ROTATED_SHARE: f64 = 0.25;

/// A model's numbers. Names are those of config.json.
pub(super) struct Hyper {
    path: PathBuf,
    model_type: &'static str,
    pub(super) source: Source,
    mtp_layers: usize,
    hidden_size: usize,
    /// Absent where no layer is dense.
    pub(super) intermediate_size: Option<usize>,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    tie_word_embeddings: bool,
    rope: RopePlan,
    /// `attention_bias`, where the file says.
    pub(super) attention_bias: Option<bool>,
    /// `qkv_bias`, where the file says; a GGUF file says by having such tensors or none.
    pub(super) qkv_bias: Option<bool>,
    kinds: Vec<LayerKind>,
    pub(super) experts: ExpertNumbers,
    pub(super) linear: LinearNumbers,
    pub(super) streams: StreamNumbers,
    pub(super) indexer: IndexerNumbers,
    pub(super) ngrams: NgramNumbers,
}

/// Where the numbers come from: weights are stored differently in some places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Checkpoint,
    Gguf,
}

/// What an architecture's attention layers do.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Switches {
    pub(super) qkv_bias: bool,
    pub(super) qk_norm: bool,
    pub(super) output_gate: bool,
    pub(super) fused_qkv: bool,
}

impl Hyper {
    /// Reads a GGUF file whose keys begin with the architecture's name there.
    pub(super) fn from_gguf(architecture: &Architecture, gguf: &Gguf) -> Result<Hyper, Error> {
        let meta = gguf.metadata();
        let key = |name: &str| format!("{}.{name}", architecture.gguf);
        let hidden_size = meta.require_usize(&key("embedding_length"))?;
        let heads = meta.require_usize(&key("attention.head_count"))?;
        let blocks = meta.require_usize(&key("block_count"))?;
        let mtp_layers = meta.usize(&key("nextn_predict_layers"))?.unwrap_or(0);
        let Some(layers) = blocks.checked_sub(mtp_layers) else {
            let expected = format!("at most the {blocks} blocks of the file");
            return Err(wrong(gguf.path(), &key("nextn_predict_layers"), mtp_layers, &expected));
        };
        let layers = layer_count(gguf.path(), &key("block_count"), layers)?;
        let head_dim = match meta.usize(&key("attention.key_length"))? {
            Some(dim) => dim,
            None => hidden_size.checked_div(heads).unwrap_or(0),
        };
        // GGUF does not state the vocabulary's size; the embedding has one row for each token.
        let vocab_size = embedding_rows(gguf, architecture.model_type, hidden_size)?;
        let context = meta.require_usize(&key("context_length"))?;
        let hyper = Hyper {
            path: gguf.path().to_owned(),
            model_type: architecture.model_type,
            source: Source::Gguf,
            mtp_layers,
            hidden_size,
            intermediate_size: meta.usize(&key("feed_forward_length"))?,
            num_attention_heads: heads,
            num_key_value_heads: meta.usize(&key("attention.head_count_kv"))?.unwrap_or(heads),
            head_dim,
            vocab_size,
            max_position_embeddings: context,
            rms_norm_eps: meta.require_f32(&key("attention.layer_norm_rms_epsilon"))?,
            tie_word_embeddings: gguf.tensor("output.weight").is_none(),
            rope: rotary::of_gguf(gguf, &key, head_dim, context, architecture.interleaved)?,
            attention_bias: None,
            qkv_bias: Some(has_qkv_bias(gguf)),
            kinds: layer_kinds::of_gguf(gguf, &key, layers, architecture.is_hybrid)?,
            experts: ExpertNumbers::of_gguf(gguf, &key)?,
            linear: LinearNumbers::of_gguf(gguf, &key, architecture.is_indexed)?,
            streams: StreamNumbers::of_gguf(gguf, &key)?,
            indexer: IndexerNumbers::of_gguf(gguf, &key)?,
            ngrams: NgramNumbers::of_gguf(gguf, &key)?,
        };
        hyper.check()
    }

    /// Reads a config.json; of a multimodal model the `text_config` in it.
    pub(super) fn from_config(architecture: &Architecture, whole: &Config) -> Result<Hyper, Error> {
        let text = whole.object("text_config")?;
        let config = text.as_ref().unwrap_or(whole);
        let layers = layer_count(config.path(), "num_hidden_layers", config.require_usize("num_hidden_layers")?)?;
        let hidden_size = config.require_usize("hidden_size")?;
        let heads = config.require_usize("num_attention_heads")?;
        let head_dim = match config.usize("head_dim")? {
            Some(dim) => dim,
            None => hidden_size.checked_div(heads).unwrap_or(0),
        };
        let context = config.require_usize("max_position_embeddings")?;
        // The model that ties is the whole one; the text part of it may say so too.
        let tied = match whole.bool("tie_word_embeddings")? {
            Some(tied) => Some(tied),
            None => config.bool("tie_word_embeddings")?,
        };
        let rotated_share = if architecture.is_hybrid { HYBRID_ROTATED_SHARE } else { 1.0 };
        let hyper = Hyper {
            path: config.path().to_owned(),
            model_type: architecture.model_type,
            source: Source::Checkpoint,
            mtp_layers: config.usize("mtp_num_hidden_layers")?.unwrap_or(0),
            hidden_size,
            intermediate_size: config.usize("intermediate_size")?,
            num_attention_heads: heads,
            num_key_value_heads: config.usize("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            vocab_size: config.require_usize("vocab_size")?,
            max_position_embeddings: context,
            rms_norm_eps: config.f32("rms_norm_eps")?.unwrap_or(1e-6),
            tie_word_embeddings: tied.unwrap_or(false),
            rope: rotary::of_config(config, head_dim, context, rotated_share)?,
            attention_bias: config.bool("attention_bias")?,
            qkv_bias: config.bool("qkv_bias")?,
            kinds: layer_kinds::of_config(config, layers, architecture.is_hybrid, architecture.is_indexed)?,
            experts: ExpertNumbers::of_config(config)?,
            linear: LinearNumbers::of_config(config, architecture.is_indexed)?,
            streams: StreamNumbers::of_config(config)?,
            indexer: IndexerNumbers::of_config(config)?,
            ngrams: NgramNumbers::of_config(config, whole)?,
        };
        match config.string("hidden_act")? {
            None | Some("silu") => hyper.check(),
            Some(other) => Err(hyper.wrong("hidden_act", format!("`{other}`"), "`silu`")),
        }
    }

    /// How many layers there are.
    pub(super) fn layers(&self) -> usize {
        self.kinds.len()
    }

    /// D
    pub(super) fn width(&self) -> usize {
        self.hidden_size
    }

    /// V
    pub(super) fn vocab(&self) -> usize {
        self.vocab_size
    }

    /// Values of a head that are rotated.
    pub(super) fn rotated_dims(&self) -> usize {
        self.rope.dims
    }

    /// Whether layer `i` has linear attention.
    pub(super) fn is_linear(&self, i: usize) -> bool {
        self.kinds.get(i) == Some(&LayerKind::Linear)
    }

    /// The dense feed-forward block that every layer has which has no other.
    pub(super) fn dense_ffn(&self) -> Result<Ffn, Error> {
        Ok(Ffn::Dense { width: self.required("intermediate_size", self.intermediate_size, SIZE_MAX)? })
    }

    /// A plan of layers that are all dense and have softmax attention.
    pub(super) fn dense(&self, switches: Switches) -> Result<Plan, Error> {
        let ffn = self.dense_ffn()?;
        Ok(self.plan(switches, vec![ffn; self.layers()]))
    }

    /// A plan of layers with softmax attention and the given feed-forward blocks, one for each.
    pub(super) fn plan(&self, switches: Switches, ffns: Vec<Ffn>) -> Plan {
        let attention = |window| self.attention(switches, window);
        // Only hybrid architectures read layers of the second kind, and they say what those are.
        let mixer = |kind: &LayerKind| match kind {
            LayerKind::Attention(window) => attention(*window),
            LayerKind::Linear => attention(None),
        };
        self.plan_of(self.kinds.iter().map(mixer).zip(ffns), NormWeights::Plain)
    }

    /// As `plan`, for architectures with linear attention layers; checkpoints of these have zero-centred norms.
    pub(super) fn hybrid(&self, switches: Switches, linear: DeltaNetPlan, ffns: Vec<Ffn>) -> Plan {
        let mixer = |kind: &LayerKind| match kind {
            LayerKind::Attention(window) => self.attention(switches, *window),
            LayerKind::Linear => Mixer::DeltaNet(linear),
        };
        let norms = match self.source {
            Source::Checkpoint => NormWeights::ZeroCentred,
            Source::Gguf => NormWeights::Plain,
        };
        self.plan_of(self.kinds.iter().map(mixer).zip(ffns), norms)
    }

    fn attention(&self, switches: Switches, window: Option<usize>) -> Mixer {
        let Switches { qkv_bias, qk_norm, output_gate, fused_qkv } = switches;
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        Mixer::Attention(AttentionPlan {
            heads,
            kv_heads,
            head_dim: self.head_dim,
            qkv_bias,
            qk_norm,
            output_gate,
            fused_qkv,
            window,
            indexer: None,
        })
    }

    fn plan_of(&self, layers: impl Iterator<Item = (Mixer, Ffn)>, norms: NormWeights) -> Plan {
        Plan {
            architecture: self.model_type,
            width: self.hidden_size,
            vocab: self.vocab_size,
            context_tokens: self.max_position_embeddings,
            rms_norm_eps: self.rms_norm_eps,
            tied: self.tie_word_embeddings,
            headless: false,
            judges: false,
            norms,
            rope: self.rope.clone(),
            streams: None,
            mtp_layers: self.mtp_layers,
            mtp: None,
            layers: layers.map(|(mixer, ffn)| LayerPlan { ngrams: None, mixer, ffn }).collect(),
            sight: None,
            has_parts_beside: false,
        }
    }

    /// A number that this architecture cannot do without, from 1 to `largest`.
    pub(super) fn required(&self, key: &str, found: Option<usize>, largest: usize) -> Result<usize, Error> {
        match found {
            Some(found) if (1..=largest).contains(&found) => Ok(found),
            Some(found) => Err(self.wrong(key, found, &format!("1 to {largest}"))),
            None => Err(self.wrong(key, "absent", &format!("1 to {largest}"))),
        }
    }

    /// An error about one of the model's numbers.
    pub(super) fn wrong(&self, key: &str, found: impl ToString, expected: &str) -> Error {
        wrong(&self.path, key, found, expected)
    }

    /// Each comparison is written so that NaN fails it.
    fn check_yarn(&self, yarn: &Yarn) -> Result<(), Error> {
        let attention_factor = yarn.attention_factor.unwrap_or(1.0);
        let (fast, slow) = (yarn.beta_fast, yarn.beta_slow);
        let checks = [
            ("factor", yarn.factor, yarn.factor >= 1.0 && yarn.factor.is_finite(), "1 or more"),
            ("beta_slow", slow, slow > 0.0 && slow.is_finite(), "above 0"),
            ("beta_fast", fast, fast >= slow && fast.is_finite(), "beta_slow or more"),
            ("attention_factor", attention_factor, attention_factor > 0.0 && attention_factor.is_finite(), "above 0"),
        ];
        if let Some((key, found, _, expected)) = checks.into_iter().find(|(_, _, is_right, _)| !is_right) {
            return Err(self.wrong(&format!("rope scaling {key}"), found, expected));
        }
        match yarn.original_tokens {
            1..=CONTEXT_MAX => Ok(()),
            found => {
                let key = "rope scaling original_max_position_embeddings";
                Err(self.wrong(key, found, &format!("1 to {CONTEXT_MAX}")))
            }
        }
    }

    fn check(self) -> Result<Hyper, Error> {
        let sizes = [
            ("hidden_size", self.hidden_size, SIZE_MAX),
            ("num_attention_heads", self.num_attention_heads, HEADS_MAX),
            ("num_key_value_heads", self.num_key_value_heads, HEADS_MAX),
            ("head_dim", self.head_dim, HEAD_DIM_MAX),
            ("vocab_size", self.vocab_size, SIZE_MAX),
            ("max_position_embeddings", self.max_position_embeddings, CONTEXT_MAX),
        ];
        for (key, found, largest) in sizes {
            if found == 0 || found > largest {
                return Err(self.wrong(key, found, &format!("1 to {largest}")));
            }
        }
        if self.mtp_layers > MTP_LAYERS_MAX {
            return Err(self.wrong("mtp_num_hidden_layers", self.mtp_layers, &format!("0 to {MTP_LAYERS_MAX}")));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of the {} attention heads", self.num_attention_heads);
            return Err(self.wrong("num_key_value_heads", self.num_key_value_heads, &expected));
        }
        let dims = self.rope.dims;
        if dims == 0 || dims % 2 == 1 || dims > self.head_dim {
            let expected = format!("an even number up to the head size {}", self.head_dim);
            return Err(self.wrong("rotary dimensions", dims, &expected));
        }
        // Written so that NaN fails too.
        if !(self.rope.theta > 1.0 && self.rope.theta.is_finite()) {
            return Err(self.wrong("rope_theta", self.rope.theta, "a number above 1"));
        }
        if !(self.rms_norm_eps >= 0.0 && self.rms_norm_eps < 1.0) {
            return Err(self.wrong("rms_norm_eps", self.rms_norm_eps, "0 or a small positive number"));
        }
        if let Some(yarn) = &self.rope.yarn {
            self.check_yarn(yarn)?;
        }
        if let Some(RopeSections { pairs, .. }) = self.rope.sections {
            let sum = pairs.iter().try_fold(0usize, |sum, &n| sum.checked_add(n));
            if sum != Some(dims / 2) {
                let expected = format!("three numbers with the sum {}, half the rotary dimensions", dims / 2);
                return Err(self.wrong("mrope_section", format!("{pairs:?}"), &expected));
            }
        }
        Ok(self)
    }
}

/// The number of layers, before anything is made for each of them.
fn layer_count(path: &Path, key: &str, found: usize) -> Result<usize, Error> {
    match found {
        1..=LAYERS_MAX => Ok(found),
        _ => Err(wrong(path, key, found, &format!("1 to {LAYERS_MAX}"))),
    }
}

/// Whether any layer has a bias on queries, keys or values. A layer without one among others with it is not whole.
fn has_qkv_bias(gguf: &Gguf) -> bool {
    let biases = [names::Q_BIAS, names::K_BIAS, names::V_BIAS].map(|pair| pair.1);
    gguf.tensors().iter().any(|tensor| biases.iter().any(|bias| tensor.name.ends_with(bias)))
}

fn embedding_rows(gguf: &Gguf, architecture: &'static str, hidden_size: usize) -> Result<usize, Error> {
    let name = "token_embd.weight";
    match gguf.tensor(name).map(|t| t.shape.as_slice()) {
        Some([rows, ..]) => Ok(*rows),
        // The rows are what is not known; a whole model has at least one.
        _ => {
            let place = Place { path: gguf.path(), architecture, tensors: gguf.tensors(), plan: None };
            Err(place.missing(name.to_owned(), vec![1, hidden_size]))
        }
    }
}

/// An error about a value of the file at `path`.
pub(crate) fn wrong(path: &Path, key: &str, found: impl ToString, expected: &str) -> Error {
    Error::Value { path: path.to_owned(), key: key.to_owned(), found: found.to_string(), expected: expected.to_owned() }
}
