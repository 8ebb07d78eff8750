//! The numbers of a model as its file states them, read alike from config.json and from GGUF metadata and checked
//! before anybody computes with them.

use std::path::{Path, PathBuf};

use qwenkit_formats::{Config, Gguf};
use qwenkit_kernels::HEAD_DIM_MAX;

use crate::{
    error::Error,
    plan::{AttentionPlan, Ffn, LayerPlan, Mixer, Plan, RopePlan, Yarn},
};

/// No Qwen is deeper or wider than a fraction of these; beyond them a file is broken or hostile.
const LAYERS_MAX: usize = 1_000;
const SIZE_MAX: usize = 1 << 24;
const CONTEXT_MAX: usize = 1 << 30;
/// What transformers takes where a config has no `max_window_layers`.
const MAX_WINDOW_LAYERS: usize = 28;

/// A model's numbers. Names are those of config.json.
pub(super) struct Hyper {
    path: PathBuf,
    model_type: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
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
    /// The window of each layer.
    windows: Vec<Option<usize>>,
}

impl Hyper {
    pub(super) fn from_gguf(model_type: &'static str, prefix: &str, gguf: &Gguf) -> Result<Hyper, Error> {
        let meta = gguf.metadata();
        let key = |name: &str| format!("{prefix}.{name}");
        let hidden_size = meta.require_usize(&key("embedding_length"))?;
        let heads = meta.require_usize(&key("attention.head_count"))?;
        let layers = layer_count(gguf.path(), &key("block_count"), meta.require_usize(&key("block_count"))?)?;
        let head_dim = match meta.usize(&key("attention.key_length"))? {
            Some(dim) => dim,
            None => hidden_size.checked_div(heads).unwrap_or(0),
        };
        // GGUF does not state the vocabulary's size; the embedding has one row for each token.
        let vocab_size = embedding_rows(gguf, model_type, hidden_size)?;
        let context = meta.require_usize(&key("context_length"))?;
        let hyper = Hyper {
            path: gguf.path().to_owned(),
            model_type,
            hidden_size,
            intermediate_size: meta.require_usize(&key("feed_forward_length"))?,
            num_attention_heads: heads,
            num_key_value_heads: meta.usize(&key("attention.head_count_kv"))?.unwrap_or(heads),
            head_dim,
            vocab_size,
            max_position_embeddings: context,
            rms_norm_eps: meta.require_f32(&key("attention.layer_norm_rms_epsilon"))?,
            tie_word_embeddings: gguf.tensor("output.weight").is_none(),
            rope: RopePlan {
                dims: meta.usize(&key("rope.dimension_count"))?.unwrap_or(head_dim),
                theta: f64::from(meta.f32(&key("rope.freq_base"))?.unwrap_or(10_000.0)),
                yarn: gguf_yarn(gguf, &key, context)?,
            },
            attention_bias: None,
            windows: vec![None; layers],
        };
        hyper.check()
    }

    pub(super) fn from_config(model_type: &'static str, config: &Config) -> Result<Hyper, Error> {
        let layers = config.require_usize("num_hidden_layers")?;
        let layers = layer_count(config.path(), "num_hidden_layers", layers)?;
        let hidden_size = config.require_usize("hidden_size")?;
        let heads = config.require_usize("num_attention_heads")?;
        let head_dim = match config.usize("head_dim")? {
            Some(dim) => dim,
            None => hidden_size.checked_div(heads).unwrap_or(0),
        };
        let context = config.require_usize("max_position_embeddings")?;
        let hyper = Hyper {
            path: config.path().to_owned(),
            model_type,
            hidden_size,
            intermediate_size: config.require_usize("intermediate_size")?,
            num_attention_heads: heads,
            num_key_value_heads: config.usize("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            vocab_size: config.require_usize("vocab_size")?,
            max_position_embeddings: context,
            rms_norm_eps: config.f32("rms_norm_eps")?.unwrap_or(1e-6),
            tie_word_embeddings: config.bool("tie_word_embeddings")?.unwrap_or(false),
            rope: config_rope(config, head_dim, context)?,
            attention_bias: config.bool("attention_bias")?,
            windows: config_windows(config, layers)?,
        };
        match config.string("hidden_act")? {
            None | Some("silu") => hyper.check(),
            Some(other) => Err(hyper.wrong("hidden_act", format!("`{other}`"), "`silu`")),
        }
    }

    /// A plan of equal dense layers with the given switches.
    pub(super) fn dense(&self, qkv_bias: bool, qk_norm: bool) -> Plan {
        let layer = |window: &Option<usize>| LayerPlan {
            mixer: Mixer::Attention(AttentionPlan {
                heads: self.num_attention_heads,
                kv_heads: self.num_key_value_heads,
                head_dim: self.head_dim,
                qkv_bias,
                qk_norm,
                window: *window,
            }),
            ffn: Ffn::Dense { width: self.intermediate_size },
        };
        Plan {
            architecture: self.model_type,
            width: self.hidden_size,
            vocab: self.vocab_size,
            context_tokens: self.max_position_embeddings,
            rms_norm_eps: self.rms_norm_eps,
            tied: self.tie_word_embeddings,
            rope: self.rope.clone(),
            layers: self.windows.iter().map(layer).collect(),
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
            ("intermediate_size", self.intermediate_size, SIZE_MAX),
            ("num_attention_heads", self.num_attention_heads, SIZE_MAX),
            ("num_key_value_heads", self.num_key_value_heads, SIZE_MAX),
            ("head_dim", self.head_dim, HEAD_DIM_MAX),
            ("vocab_size", self.vocab_size, SIZE_MAX),
            ("max_position_embeddings", self.max_position_embeddings, CONTEXT_MAX),
        ];
        for (key, found, largest) in sizes {
            if found == 0 || found > largest {
                return Err(self.wrong(key, found, &format!("1 to {largest}")));
            }
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

fn embedding_rows(gguf: &Gguf, architecture: &'static str, hidden_size: usize) -> Result<usize, Error> {
    let name = "token_embd.weight";
    match gguf.tensor(name).map(|t| t.shape.as_slice()) {
        Some([rows, ..]) => Ok(*rows),
        // The rows are what is not known; a whole model has at least one.
        _ => Err(Error::TensorMissing {
            path: gguf.path().to_owned(),
            name: name.to_owned(),
            shape: vec![1, hidden_size],
            architecture,
        }),
    }
}

fn wrong(path: &Path, key: &str, found: impl ToString, expected: &str) -> Error {
    Error::Value { path: path.to_owned(), key: key.to_owned(), found: found.to_string(), expected: expected.to_owned() }
}

fn gguf_yarn(gguf: &Gguf, key: &impl Fn(&str) -> String, context: usize) -> Result<Option<Yarn>, Error> {
    let meta = gguf.metadata();
    let name = key("rope.scaling.type");
    let factor = match meta.string(&name)? {
        None | Some("none") => return Ok(None),
        Some("yarn") => f64::from(meta.require_f32(&key("rope.scaling.factor"))?),
        Some(other) => return Err(wrong(gguf.path(), &name, format!("`{other}`"), "`none` or `yarn`")),
    };
    let number = |name: &str| meta.f32(&key(name)).map(|x| x.map(f64::from));
    Ok(Some(Yarn {
        factor,
        original_tokens: meta.usize(&key("rope.scaling.original_context_length"))?.unwrap_or(context),
        beta_fast: number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        attention_factor: None,
    }))
}

/// Both spellings: `rope_parameters` of transformers 5, or `rope_theta` with `rope_scaling` before it.
fn config_rope(config: &Config, head_dim: usize, context: usize) -> Result<RopePlan, Error> {
    let parameters = match config.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.object("rope_scaling")?,
    };
    let (mut theta, mut partial, mut yarn) = (config.f64("rope_theta")?, config.f64("partial_rotary_factor")?, None);
    if let Some(p) = parameters {
        theta = p.f64("rope_theta")?.or(theta);
        partial = p.f64("partial_rotary_factor")?.or(partial);
        let kind = match p.string("rope_type")? {
            Some(kind) => Some(kind),
            None => p.string("type")?,
        };
        yarn = match kind {
            None | Some("default" | "mrope") => None,
            Some("yarn") => Some(Yarn {
                factor: p.require_f64("factor")?,
                original_tokens: p.usize("original_max_position_embeddings")?.unwrap_or(context),
                beta_fast: p.f64("beta_fast")?.unwrap_or(32.0),
                beta_slow: p.f64("beta_slow")?.unwrap_or(1.0),
                attention_factor: p.f64("attention_factor")?,
            }),
            Some(other) => {
                return Err(wrong(config.path(), "rope_type", format!("`{other}`"), "`default` or `yarn`"));
            }
        };
    }
    let dims = (head_dim as f64 * partial.unwrap_or(1.0)) as usize;
    Ok(RopePlan { dims, theta: theta.unwrap_or(10_000.0), yarn })
}

/// `layer_types` where the file has it; else the layers from `max_window_layers` on, if `use_sliding_window`.
fn config_windows(config: &Config, layers: usize) -> Result<Vec<Option<usize>>, Error> {
    let used = config.bool("use_sliding_window")?.unwrap_or(false);
    let window = config.usize("sliding_window")?.filter(|_| used);
    if window == Some(0) {
        return Err(wrong(config.path(), "sliding_window", 0, "1 or more positions"));
    }
    let Some(types) = config.strings("layer_types")? else {
        let first = config.usize("max_window_layers")?.unwrap_or(MAX_WINDOW_LAYERS);
        return Ok((0..layers).map(|i| window.filter(|_| i >= first)).collect());
    };
    if types.len() != layers {
        return Err(wrong(config.path(), "layer_types", format!("{} entries", types.len()), &format!("{layers}")));
    }
    let layer = |kind: &str| match (kind, window) {
        ("full_attention", _) => Ok(None),
        ("sliding_attention", Some(window)) => Ok(Some(window)),
        ("sliding_attention", None) => {
            Err(wrong(config.path(), "sliding_window", "absent", "a width, since `layer_types` has sliding_attention"))
        }
        _ => Err(wrong(config.path(), "layer_types", format!("`{kind}`"), "full_attention or sliding_attention")),
    };
    types.into_iter().map(layer).collect()
}
