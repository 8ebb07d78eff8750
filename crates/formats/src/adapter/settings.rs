//! `adapter_config.json`: what PEFT says about an adapter. Settings that change what is computed and are not understood are
//! refused by name; those without effect on a trained adapter are passed over.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{Config, Error};

/// Keys that must say nothing: anything else is a form of adapter that is not computed here.
const MUST_BE_UNSET: [&str; 14] = [
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "exclude_modules",
];

/// What an adapter was made with.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterSettings {
    /// R of modules that `rank_pattern` does not name; `None` where a file does not say (GGUF).
    pub rank: Option<usize>,
    /// What the scale is made of.
    pub alpha: f64,
    /// (end of a module's path, R) where it differs.
    pub rank_pattern: Vec<(String, usize)>,
    /// (end of a module's path, alpha) where it differs.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Whether the scale is `alpha / sqrt(R)`.
    pub use_rslora: bool,
    /// Whether rows have stored lengths.
    pub use_dora: bool,
    /// Ends of the paths of adapted modules; empty where a file does not list them.
    pub target_modules: Vec<String>,
    /// Modules that are stored whole.
    pub modules_to_save: Vec<String>,
    /// The base model's name or path, as whoever trained had it.
    pub base_model: Option<String>,
    /// `CAUSAL_LM`, `SEQ_CLS`, ...
    pub task_type: Option<String>,
    /// Dropout during training; has no effect afterwards.
    pub dropout: f64,
}

impl Default for AdapterSettings {
    fn default() -> Self {
        AdapterSettings {
            rank: None,
            alpha: 8.0,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            use_rslora: false,
            use_dora: false,
            target_modules: Vec::new(),
            modules_to_save: Vec::new(),
            base_model: None,
            task_type: None,
            dropout: 0.0,
        }
    }
}

impl AdapterSettings {
    /// The rank that a module is promised to have.
    pub fn rank_of(&self, module: &str) -> Option<usize> {
        let own = self.rank_pattern.iter().find(|(end, _)| is_end(module, end));
        own.map(|(_, rank)| *rank).or(self.rank)
    }

    /// What a module's product is multiplied with.
    pub fn scale_of(&self, module: &str, rank: usize) -> f32 {
        let own = self.alpha_pattern.iter().find(|(end, _)| is_end(module, end));
        let alpha = own.map_or(self.alpha, |(_, alpha)| *alpha);
        let divisor = if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        (alpha / divisor) as f32
    }

    pub(super) fn read(path: &Path) -> Result<AdapterSettings, Error> {
        let config = Config::open(path)?;
        let kind = config.require_string("peft_type")?;
        if kind != "LORA" {
            return Err(config.wrong("peft_type", kind, "LORA"));
        }
        for key in MUST_BE_UNSET {
            if let Some(value) = config.get(key).filter(|v| !says_nothing(v)) {
                return Err(config.wrong(key, value.to_string(), "nothing: this form of adapter is not supported"));
            }
        }
        if let Some(other) = config.string("bias")?.filter(|&bias| bias != "none") {
            return Err(config.wrong("bias", other, "none: adapters with biases are not supported"));
        }
        let rank = config.require_usize("r")?;
        let alpha = config.require_f64("lora_alpha")?;
        if rank == 0 || !alpha.is_finite() {
            return Err(config.wrong("r", rank.to_string(), "a rank above 0 and a finite lora_alpha"));
        }
        let target_modules = match config.get("target_modules") {
            // A word such as `all-linear`, or an expression over whole paths: the tensors themselves say more.
            Some(Value::String(_)) | None => Vec::new(),
            Some(_) => owned(config.require_strings("target_modules")?),
        };
        Ok(AdapterSettings {
            rank: Some(rank),
            alpha,
            rank_pattern: pattern(&config, "rank_pattern", |v| {
                v.as_u64().and_then(|r| usize::try_from(r).ok()).filter(|&r| r > 0)
            })?,
            alpha_pattern: pattern(&config, "alpha_pattern", |v| v.as_f64().filter(|a| a.is_finite()))?,
            use_rslora: config.bool("use_rslora")?.unwrap_or(false),
            use_dora: config.bool("use_dora")?.unwrap_or(false),
            target_modules,
            modules_to_save: config.strings("modules_to_save")?.map(owned).unwrap_or_default(),
            base_model: config.string("base_model_name_or_path")?.map(str::to_owned),
            task_type: config.string("task_type")?.map(str::to_owned),
            dropout: config.f64("lora_dropout")?.unwrap_or(0.0),
        })
    }

    /// The text of `adapter_config.json`, with the keys that PEFT needs to load it.
    pub(super) fn to_json(&self, rank: usize) -> String {
        let map = |pairs: Vec<(&String, Value)>| {
            Value::Object(pairs.into_iter().map(|(k, v)| (k.clone(), v)).collect::<Map<_, _>>())
        };
        let value = json!({
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model,
            "inference_mode": true,
            "r": self.rank.unwrap_or(rank),
            "lora_alpha": number(self.alpha),
            "lora_dropout": self.dropout,
            "target_modules": self.target_modules,
            "modules_to_save": if self.modules_to_save.is_empty() { Value::Null } else { json!(self.modules_to_save) },
            "rank_pattern": map(self.rank_pattern.iter().map(|(k, r)| (k, json!(r))).collect()),
            "alpha_pattern": map(self.alpha_pattern.iter().map(|(k, a)| (k, number(*a))).collect()),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "layers_to_transform": null,
            "layers_pattern": null,
            "loftq_config": {},
        });
        format!("{value:#}\n")
    }
}

/// Whether a module's path ends with whole steps of `end`.
pub(super) fn is_end(module: &str, end: &str) -> bool {
    module.strip_suffix(end).is_some_and(|start| start.is_empty() || start.ends_with('.'))
}

/// A whole number as PEFT writes it, without a point.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

fn owned(names: Vec<&str>) -> Vec<String> {
    let mut names: Vec<String> = names.into_iter().map(str::to_owned).collect();
    names.sort();
    names
}

fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// A map from ends of paths to values. PEFT takes its keys as regular expressions; those that are more than a path are
/// refused, as they would be matched differently here.
fn pattern<T>(config: &Config, key: &str, convert: impl Fn(&Value) -> Option<T>) -> Result<Vec<(String, T)>, Error> {
    let Some(map) = config.object(key)? else { return Ok(Vec::new()) };
    let mut pairs = Vec::new();
    for (end, value) in map.value().as_object().into_iter().flatten() {
        let plain = end.trim_start_matches('^');
        if plain.is_empty() || !plain.chars().all(|c| c.is_alphanumeric() || "._-".contains(c)) {
            return Err(map.wrong(end, "an expression", "the end of a module's path, such as layers.0.mlp.up_proj"));
        }
        let value = convert(value).ok_or_else(|| map.wrong(end, value.to_string(), "a number above 0"))?;
        pairs.push((plain.to_owned(), value));
    }
    Ok(pairs)
}
