//! Which type each tensor gets: the kinds of files that people ask for by name, and the tensors that a kind treats better
//! than the rest. The choices are those that llama.cpp makes, so that a name means the same everywhere.

use std::str::FromStr;

use qwenkit_tensor::DType;

use crate::{Error, tensors::Spec};

/// A kind of file: a type for most tensors, and a rule for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    name: &'static str,
    /// `general.file_type`
    file_type: u32,
    base: DType,
    mix: Mix,
}

/// How much better than the rest a kind treats tensors that matter more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mix {
    /// All alike, but for the output head.
    Plain,
    /// A few.
    Small,
    /// More.
    Medium,
    /// Most.
    Large,
}

const fn kind(name: &'static str, file_type: u32, base: DType, mix: Mix) -> Kind {
    Kind { name, file_type, base, mix }
}

const KINDS: [Kind; 20] = {
    use DType::*;
    use Mix::*;
    [
        kind("F32", 0, F32, Plain),
        kind("F16", 1, F16, Plain),
        kind("BF16", 32, BF16, Plain),
        kind("Q8_0", 7, Q8_0, Plain),
        kind("Q6_K", 18, Q6_K, Plain),
        kind("Q5_K_M", 17, Q5_K, Medium),
        kind("Q5_K_S", 16, Q5_K, Small),
        kind("Q5_1", 9, Q5_1, Plain),
        kind("Q5_0", 8, Q5_0, Plain),
        kind("Q4_K_M", 15, Q4_K, Medium),
        kind("Q4_K_S", 14, Q4_K, Small),
        kind("IQ4_NL", 25, IQ4_NL, Plain),
        kind("IQ4_XS", 30, IQ4_XS, Plain),
        kind("Q4_1", 3, Q4_1, Plain),
        kind("Q4_0", 2, Q4_0, Plain),
        kind("Q3_K_L", 13, Q3_K, Large),
        kind("Q3_K_M", 12, Q3_K, Medium),
        kind("Q3_K_S", 11, Q3_K, Small),
        kind("Q2_K", 10, Q2_K, Medium),
        kind("Q2_K_S", 21, Q2_K, Small),
    ]
};

/// Short names of the usual mix.
const ALIASES: [(&str, &str); 3] = [("Q5_K", "Q5_K_M"), ("Q4_K", "Q4_K_M"), ("Q3_K", "Q3_K_M")];

impl FromStr for Kind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Kind, Error> {
        let upper = name.to_ascii_uppercase();
        let full = ALIASES.iter().find(|(short, _)| *short == upper).map_or(upper.as_str(), |(_, full)| full);
        let found = KINDS.into_iter().find(|kind| kind.name == full);
        found.ok_or_else(|| Error::UnknownType {
            found: name.to_owned(),
            known: Kind::names().collect::<Vec<_>>().join(", "),
        })
    }
}

/// What a choice depends on beside the tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts<'a> {
    /// `general.architecture`
    pub(crate) architecture: &'a str,
    pub(crate) layers: usize,
    /// Query heads for each key head.
    pub(crate) heads_per_key: usize,
    /// Experts of a layer; 0 in dense models.
    pub(crate) experts: usize,
    /// Whether the head is the embedding.
    pub(crate) tied: bool,
    /// Whether importance is known.
    pub(crate) has_importance: bool,
}

/// The widths of the models that the limits were measured on.
const WIDTH_TRAINED: f64 = 896.0;
const WIDTH_NARROW: f64 = 64.0;

impl Kind {
    /// Names of all kinds, the nearest to the original first.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KINDS.iter().map(|kind| kind.name)
    }

    /// The kind's name.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The type of most tensors.
    pub fn base(self) -> DType {
        self.base
    }

    /// What the answers of a file of this kind may differ, as the mean divergence over the built-in texts. For trained models it
    /// is three to thirty times what the 0.5B model's files differ (docs/LOG.md). In a narrow model each rounded weight is a larger
    /// share of every sum, and an expert more easily another one: there the limit grows towards what random models of a width of
    /// 64 differ at most, and a quarter more.
    /// A model whose activations are `rounded` answers a little otherwise in any type, by as much as one of BF16.
    pub(crate) fn limit(self, width: usize, rounded: bool) -> f64 {
        use DType::*;
        let base = match self.base {
            F32 | F16 if rounded => BF16,
            base => base,
        };
        let (trained, narrow) = match base {
            F32 => (1e-4, 1e-4),
            F16 => (1e-3, 4e-3),
            BF16 => (4e-3, 0.04),
            Q8_0 => (0.01, 0.1),
            Q6_K => (0.02, 0.1),
            Q5_K | Q5_0 | Q5_1 => (0.08, 0.5),
            Q4_K => (0.15, 0.6),
            Q3_K => (0.4, 1.2),
            Q2_K => (0.8, 1.2),
            _ => (0.3, 1.2),
        };
        let share = (WIDTH_TRAINED / width as f64 - 1.0) / (WIDTH_TRAINED / WIDTH_NARROW - 1.0);
        trained + (narrow - trained) * share.clamp(0.0, 1.0)
    }

    /// `general.file_type` of a GGUF file.
    pub(crate) fn file_type(self) -> u32 {
        self.file_type
    }

    /// The type of each tensor. What must stay precise is F32, or stays as it is in a file that has it in another type.
    pub(crate) fn choose(self, specs: &[Spec], from_gguf: bool, facts: Facts<'_>) -> Vec<DType> {
        // Values of attention, and what is joined with them, are counted in the order of layers.
        let mut values: Vec<(usize, usize)> = specs
            .iter()
            .enumerate()
            .filter(|(_, s)| is_value_like(&s.name))
            .map(|(i, s)| (layer_of(&s.name), i))
            .collect();
        values.sort_unstable();
        let place = |i: usize| values.iter().position(|(_, index)| *index == i).unwrap_or(0);
        specs
            .iter()
            .enumerate()
            .map(|(i, spec)| {
                if !is_quantized(spec) {
                    return if from_gguf { spec.dtype } else { DType::F32 };
                }
                match self.base.is_quantized() {
                    true => fallback(self.of(spec, (place(i), values.len()), facts), spec.cols()),
                    false => self.base,
                }
            })
            .collect()
    }

    fn of(self, spec: &Spec, value_place: (usize, usize), facts: Facts<'_>) -> DType {
        use DType::*;
        let (name, base, mix) = (spec.name.as_str(), self.base, self.mix);
        let Facts { layers, experts, heads_per_key, has_importance, .. } = facts;
        let is_embedding = matches!(name, "token_embd.weight" | "per_layer_token_embd.weight");
        if name == "output.weight" || facts.tied && is_embedding {
            return if base == Q8_0 || !spec.cols().is_multiple_of(base.block_len()) { Q8_0 } else { Q6_K };
        }
        if is_embedding {
            return base;
        }
        let layer = layer_of(name);
        let few_heads = heads_per_key >= 4;
        let is_medium = mix == Mix::Medium;
        if is_value_like(name) {
            let (i, n) = value_place;
            let chosen = match (base, mix) {
                (Q2_K, Mix::Medium) => {
                    if few_heads {
                        Q4_K
                    } else {
                        Q3_K
                    }
                }
                (Q2_K, _) if few_heads => Q4_K,
                (Q3_K, Mix::Medium) => {
                    if i < 2 {
                        Q5_K
                    } else {
                        Q4_K
                    }
                }
                (Q3_K, Mix::Large) => Q5_K,
                (IQ4_NL | IQ4_XS, _) if few_heads => Q5_K,
                (Q4_K | Q5_K, Mix::Medium) if gets_more(i, n) => Q6_K,
                (Q4_K, Mix::Small) if i < 4 => Q5_K,
                _ => base,
            };
            let is_large = layers == 80 && matches!(facts.architecture, "qwen2" | "qwen2vl");
            return match chosen {
                _ if experts == 8 => Q8_0,
                Q3_K | Q4_K if is_large => Q5_K,
                chosen => chosen,
            };
        }
        if name.contains("attn_k.weight") {
            return if experts == 8 { Q8_0 } else { base };
        }
        if name.contains("ffn_down") {
            let early = layer < layers / 8;
            return match (base, mix) {
                (Q2_K, Mix::Medium) => Q3_K,
                (Q2_K, _) if early => Q4_K,
                (Q3_K, Mix::Medium) => {
                    if layer < layers / 16 {
                        Q5_K
                    } else {
                        Q4_K
                    }
                }
                (Q3_K, Mix::Large) => Q5_K,
                (Q4_K | Q5_K, Mix::Medium) if gets_more(layer, layers) => Q6_K,
                (IQ4_NL | IQ4_XS, _) if early && !has_importance => Q5_K,
                (Q4_K, Mix::Small) if early => Q5_K,
                (Q4_0, _) if early && has_importance => Q4_1,
                (Q5_0, _) if early && has_importance => Q5_1,
                _ => base,
            };
        }
        if name.contains("attn_output.weight") {
            if experts == 8 {
                let raised = matches!(
                    (base, mix),
                    (Q2_K, Mix::Medium) | (Q3_K, Mix::Small | Mix::Medium) | (IQ4_NL | IQ4_XS | Q4_K, _)
                );
                return if raised { Q5_K } else { base };
            }
            return match (base, mix) {
                (Q2_K, _) if is_medium => Q3_K,
                (Q3_K, Mix::Medium) => Q4_K,
                (Q3_K, Mix::Large) => Q5_K,
                _ => base,
            };
        }
        base
    }
}

/// Values of attention, alone or together with queries and keys.
fn is_value_like(name: &str) -> bool {
    name.contains("attn_v.weight") || name.contains("attn_qkv.weight")
}

/// The layer in a tensor's name; 0 for tensors outside the layers.
fn layer_of(name: &str) -> usize {
    name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse().ok()).unwrap_or(0)
}

/// The first eighth, the last eighth, and every third between.
fn gets_more(i: usize, n: usize) -> bool {
    i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2
}

/// Whether a tensor may be stored in another type than it was trained in: matrices, except those that are tiny or steer.
fn is_quantized(spec: &Spec) -> bool {
    let name = spec.name.as_str();
    let axes = spec.shape.iter().rev().skip(1).filter(|n| **n > 1).count();
    let kept = [
        "_norm.weight",
        "ffn_gate_inp.weight",
        "ssm_conv1d",
        "ple_conv1d",
        "indexer.k_proj.weight",
        "indexer.q_proj.weight",
    ];
    name.ends_with("weight") && axes > 0 && !kept.iter().any(|part| name.contains(part))
}

/// What a tensor gets whose rows are no whole number of the type's blocks.
fn fallback(dtype: DType, cols: usize) -> DType {
    use DType::*;
    if cols.is_multiple_of(dtype.block_len()) {
        return dtype;
    }
    let near = match dtype {
        IQ4_XS => IQ4_NL,
        Q2_K | Q3_K => Q4_0,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        other => other,
    };
    if cols.is_multiple_of(near.block_len()) { near } else { F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, shape: &[usize]) -> Spec {
        Spec { name: name.into(), shape: shape.to_vec(), dtype: DType::BF16 }
    }

    fn facts() -> Facts<'static> {
        Facts { architecture: "qwen2", layers: 24, heads_per_key: 7, experts: 0, tied: true, has_importance: false }
    }

    fn chosen(kind: &str, name: &str, shape: &[usize]) -> DType {
        kind.parse::<Kind>().unwrap().choose(&[spec(name, shape)], false, facts())[0]
    }

    #[test]
    fn names_are_found_in_any_case_and_others_are_refused() {
        assert_eq!("q4_k".parse::<Kind>().unwrap().name(), "Q4_K_M");
        assert_eq!("iq4_xs".parse::<Kind>().unwrap().base(), DType::IQ4_XS);
        let error = "Q4_K_XL".parse::<Kind>().unwrap_err().to_string();
        assert!(error.contains("Q4_K_XL") && error.contains("Q4_K_M"), "{error}");
    }

    #[test]
    fn what_must_stay_precise_does() {
        for (name, shape) in [
            ("blk.0.attn_norm.weight", &[896][..]),
            ("blk.0.attn_q.bias", &[896]),
            ("blk.0.ffn_gate_inp.weight", &[128, 2048]),
            ("blk.0.ffn_gate_inp_shexp.weight", &[1, 2048]),
            ("blk.0.ssm_conv1d.weight", &[8192, 4]),
            ("blk.0.ssm_a", &[32]),
        ] {
            assert_eq!(chosen("Q4_K_M", name, shape), DType::F32, "{name}");
        }
    }

    #[test]
    fn rows_that_no_block_fits_get_the_next_larger_type() {
        assert_eq!(chosen("Q4_K_M", "blk.1.ffn_up.weight", &[4864, 896]), DType::Q5_0);
        assert_eq!(chosen("Q2_K", "blk.1.ffn_up.weight", &[4864, 896]), DType::Q4_0);
        assert_eq!(chosen("Q4_K_M", "token_embd.weight", &[151936, 896]), DType::Q8_0);
        assert_eq!(chosen("Q4_K_M", "blk.9.ffn_down.weight", &[896, 4864]), DType::Q4_K);
        assert_eq!(chosen("Q4_K_M", "blk.0.ffn_down.weight", &[896, 4864]), DType::Q6_K);
        assert_eq!(chosen("Q8_0", "blk.0.ffn_down.weight", &[896, 4870]), DType::F16);
    }
}
