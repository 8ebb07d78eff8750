//! Magnitudes (DoRA): `m / |W + s B A| * (W x + s B (A x))`, row by row. A bias is added afterwards. Source: Liu et al. 2024,
//! and PEFT's `DoraLinearLayer`, which takes the lengths for constants when it makes gradients (section 4.3 there).
//!
//! The lengths are made from the weights as they are in their file, whenever an adapter's numbers have changed.

use qwenkit_kernels::{Compute, LowRank, Mat, Weight};

use super::{Adapter, Lora, Module};
use crate::{
    blocks::{FfnBlock, Layer, MixerBlock},
    load::Model,
};

impl Adapter {
    /// Whether any module has magnitudes.
    pub fn has_magnitudes(&self) -> bool {
        self.loras.iter().any(|lora| lora.factors_at.is_some())
    }

    /// What the outputs of `lora` are multiplied with, (outputs), if it has magnitudes.
    ///
    /// # Panics
    /// If the model has not measured the adapter.
    pub(crate) fn factors(&self, lora: &Lora) -> Option<&[f32]> {
        lora.factors().map(|range| &self.factors.get().expect("the model has measured the adapter")[range])
    }
}

impl Model {
    /// Makes the factors of an adapter of this model, unless they are there.
    pub(crate) fn measure(&self, compute: &Compute, adapter: &Adapter) {
        adapter.factors.get_or_init(|| {
            let mut factors = Vec::new();
            for lora in &adapter.loras {
                let Some(range) = lora.magnitudes() else { continue };
                let lengths = self.lengths(compute, adapter, lora);
                // A row without length stays zero.
                let factor = |(m, length): (&f32, f32)| if length > 0.0 { m / length } else { 0.0 };
                factors.extend(adapter.values[range].iter().zip(lengths).map(factor));
            }
            factors
        });
    }

    /// Makes all magnitudes of an adapter of this model the lengths that its rows have: with B zero it changes nothing.
    pub fn set_magnitudes(&self, compute: &Compute, adapter: &mut Adapter) {
        for lora in adapter.loras.clone() {
            if let Some(range) = lora.magnitudes() {
                let lengths = self.lengths(compute, adapter, &lora);
                adapter.values_mut()[range].copy_from_slice(&lengths);
            }
        }
    }

    /// Lengths of the rows of the adapted matrix, (outputs).
    fn lengths(&self, compute: &Compute, adapter: &Adapter, lora: &Lora) -> Vec<f32> {
        let (mut lengths, mut first) = (vec![0.0; lora.outputs], 0);
        let a = Mat::new(&adapter.values[lora.a()], lora.inputs, lora.rank);
        for weight in self.layers[lora.layer].weights(lora.module) {
            let b = &adapter.values[lora.b()][first..];
            let b = Mat::strided(b, lora.rank, weight.rows(), lora.outputs);
            let added = LowRank { left: b.t(), right: a.t(), alpha: lora.scale };
            compute.row_lengths(weight, &added, &mut lengths[first..first + weight.rows()]);
            first += weight.rows();
        }
        assert_eq!(first, lora.outputs, "rows of {:?}", lora.module);
        lengths
    }
}

impl Layer {
    /// The weights whose outputs, side by side, are a module's; none where the layer has no such module.
    fn weights(&self, module: Module) -> Vec<&Weight> {
        let ffn = match &self.ffn {
            FfnBlock::Dense(dense) => Some(dense),
            FfnBlock::Moe(moe) => moe.shared.as_ref().map(|shared| &shared.ffn),
        };
        match (module, &self.mixer, ffn) {
            (Module::QProj, MixerBlock::Attention(a), _) => [&a.q_proj].into_iter().chain(&a.gate_proj).collect(),
            (Module::KProj, MixerBlock::Attention(a), _) => vec![&a.k_proj],
            (Module::VProj, MixerBlock::Attention(a), _) => vec![&a.v_proj],
            (Module::OProj, MixerBlock::Attention(a), _) => vec![&a.o_proj],
            (Module::InProjQkv, MixerBlock::DeltaNet(d), _) => vec![&d.in_qkv],
            (Module::InProjZ, MixerBlock::DeltaNet(d), _) => vec![&d.in_z],
            (Module::InProjB, MixerBlock::DeltaNet(d), _) => vec![&d.in_b],
            (Module::InProjA, MixerBlock::DeltaNet(d), _) => vec![&d.in_a],
            (Module::OutProj, MixerBlock::DeltaNet(d), _) => vec![&d.out_proj],
            (Module::GateProj | Module::SharedGateProj, _, Some(ffn)) => vec![&ffn.gate],
            (Module::UpProj | Module::SharedUpProj, _, Some(ffn)) => vec![&ffn.up],
            (Module::DownProj | Module::SharedDownProj, _, Some(ffn)) => vec![&ffn.down],
            _ => Vec::new(),
        }
    }
}
