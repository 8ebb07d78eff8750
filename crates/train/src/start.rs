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
    /// Names of the matrices, such as `q_proj`; of a mixture's, those outside its experts.
    pub targets: Vec<String>,
    /// The first layer that is adapted, counted from 0.
    pub from_layer: usize,
    /// Labels, for a classifier.
    pub labels: Option<usize>,
}

/// The matrices that are adapted unless somebody says otherwise: all of attention and of dense feed-forward blocks.
pub const USUAL_TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

impl AdapterShape {
    /// What B A is multiplied with.
    pub fn scale(&self) -> f32 {
        let divisor = if self.rslora { (self.rank as f64).sqrt() } else { self.rank as f64 };
        (self.alpha / divisor) as f32
    }

    /// The adapter before its first step: A of chance as PEFT has it, B and a classifier's head zero: all labels
    /// are equally probable.
    ///
    /// # Errors
    /// When no layer of the model has a matrix that is to be adapted.
    pub fn start(&self, plan: &Plan, seed: u64) -> Result<Adapter, Error> {
        let mut shapes = Vec::new();
        for name in &self.targets {
            let before = shapes.len();
            for (layer, module) in
                (self.from_layer..plan.layers.len()).flat_map(|layer| Module::ALL.map(|module| (layer, module)))
            {
                if module.name() == name && module.shape(plan, layer).is_some() {
                    shapes.push(LoraShape { layer, module, rank: self.rank, scale: self.scale() });
                }
            }
            if shapes.len() == before {
                let mut known: Vec<&str> = Module::ALL
                    .into_iter()
                    .filter(|module| (0..plan.layers.len()).any(|layer| module.shape(plan, layer).is_some()))
                    .map(Module::name)
                    .collect();
                known.dedup();
                return Err(Error::Adapter {
                    part: name.clone(),
                    found: "no layer with this matrix".to_owned(),
                    expected: format!("some of {}", known.join(", ")),
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
