//! A new adapter: which matrices it adapts, and the numbers it begins with.

use qwenkit_models::{Adapter, Error, LoraShape, Module, Plan};

use crate::order::Numbers;

/// What a new adapter is to be.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterShape {
    /// R
    pub rank: usize,
    /// What the scale is made of.
    pub alpha: f64,
    /// Whether the scale is alpha / sqrt(R) instead of alpha / R. Source: Kalajdzievski 2023.
    pub rslora: bool,
    /// Whether each row of an adapted matrix has a length of its own, as DoRA has it. Source: Liu et al. 2024.
    pub dora: bool,
    /// Names of the matrices, such as `q_proj`; of a mixture's, those outside its experts.
    pub targets: Vec<String>,
    /// The first layer that is adapted, counted from 0.
    pub from_layer: usize,
    /// Labels, for a classifier.
    pub labels: Option<usize>,
}

/// The matrices that are adapted unless somebody says otherwise: all of attention and of dense feed-forward blocks.
pub const USUAL_TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Those of them that a model has from a layer on: mixtures may have no dense block.
pub fn usual_targets(plan: &Plan, from_layer: usize) -> Vec<String> {
    let known = known(plan, from_layer);
    USUAL_TARGETS.into_iter().filter(|name| known.contains(name)).map(str::to_owned).collect()
}

/// Names of the matrices of a model that can be adapted from a layer on.
fn known(plan: &Plan, from_layer: usize) -> Vec<&'static str> {
    let mut known = Vec::new();
    for module in Module::ALL {
        let is_there = (from_layer..plan.layers.len()).any(|layer| module.shape(plan, layer).is_some());
        if is_there && !known.contains(&module.name()) {
            known.push(module.name());
        }
    }
    known
}

impl AdapterShape {
    /// What B A is multiplied with.
    pub fn scale(&self) -> f32 {
        let divisor = if self.rslora { (self.rank as f64).sqrt() } else { self.rank as f64 };
        (self.alpha / divisor) as f32
    }

    /// The adapter before its first step: A of chance as PEFT has it, B and a classifier's head zero: all labels
    /// are equally probable. Magnitudes are zero until `Model::set_magnitudes` makes them the model's own.
    ///
    /// # Errors
    /// When no layer of the model from the first on has a matrix that is to be adapted.
    pub fn start(&self, plan: &Plan, seed: u64) -> Result<Adapter, Error> {
        let layers = plan.layers.len();
        if self.from_layer >= layers {
            return Err(Error::Adapter {
                part: "the first layer".to_owned(),
                found: format!("layer {}", self.from_layer),
                expected: format!("one of 0 to {}: the model has {layers} layers", layers.saturating_sub(1)),
            });
        }
        let mut shapes = Vec::new();
        for name in &self.targets {
            let before = shapes.len();
            for (layer, module) in
                (self.from_layer..plan.layers.len()).flat_map(|layer| Module::ALL.map(|module| (layer, module)))
            {
                if module.name() == name && module.shape(plan, layer).is_some() {
                    shapes.push(LoraShape {
                        layer,
                        module,
                        rank: self.rank,
                        scale: self.scale(),
                        magnitudes: self.dora,
                    });
                }
            }
            if shapes.len() == before {
                let from = if self.from_layer == 0 { String::new() } else { format!(" from {} on", self.from_layer) };
                return Err(Error::Adapter {
                    part: name.clone(),
                    found: format!("no layer{from} with this matrix"),
                    expected: format!("some of {}", known(plan, self.from_layer).join(", ")),
                });
            }
        }
        let mut adapter = Adapter::zeroed(plan, &shapes, self.labels)?;
        let mut numbers = Numbers::new(seed, 0);
        for lora in adapter.loras().to_vec() {
            // Kaiming's uniform with a = sqrt(5), as PEFT's.
            let most = 1.0 / (lora.inputs as f32).sqrt();
            adapter.values_mut()[lora.a()].iter_mut().for_each(|x| *x = numbers.signed() * most);
        }
        Ok(adapter)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use qwenkit_formats::ModelFiles;
    use qwenkit_models::arch;

    use super::*;

    fn plan(name: &str) -> Plan {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity").join(name);
        arch::plan(&ModelFiles::open(&path).unwrap()).unwrap()
    }

    #[test]
    fn a_mixture_without_dense_blocks_is_adapted_in_its_attention() {
        let plan = plan("qwen3-moe");
        let targets = usual_targets(&plan, 0);
        assert_eq!(targets, USUAL_TARGETS[..4]);
        let shape =
            AdapterShape { rank: 2, alpha: 4.0, rslora: false, dora: false, targets, from_layer: 0, labels: None };
        assert_eq!(shape.start(&plan, 0).unwrap().loras().len(), 4 * plan.layers.len());
    }

    #[test]
    fn what_is_not_there_is_said_with_what_is() {
        let plan = plan("qwen3-moe");
        let message = |target: &str, from_layer: usize| {
            let targets = vec![target.to_owned()];
            let shape =
                AdapterShape { rank: 2, alpha: 4.0, rslora: false, dora: false, targets, from_layer, labels: None };
            shape.start(&plan, 0).err().unwrap().to_string()
        };
        let of_module = message("up_proj", 1);
        assert!(of_module.contains("from 1 on") && of_module.contains("q_proj, k_proj, v_proj, o_proj"), "{of_module}");
        let of_layer = message("q_proj", plan.layers.len());
        assert!(of_layer.contains(&format!("0 to {}", plan.layers.len() - 1)), "{of_layer}");
    }
}
