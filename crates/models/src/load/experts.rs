//! Loads mixtures of experts from every layout that files have: a tensor for each matrix, all experts stacked, gate and
//! up packed together, and the packed form transposed.

use std::ops::Range;

use qwenkit_formats::TensorInfo;
use qwenkit_kernels::Weight;
use qwenkit_tensor::DType;

use super::tensors::Loader;
use crate::{
    blocks::{DenseFfn, Moe, SharedExpert},
    error::Error,
    names::{self, Naming},
    plan::MoePlan,
};

/// How a stacked tensor's matrices stand.
#[derive(Clone, Copy, PartialEq)]
enum Stacking {
    /// (E, outputs, inputs), as matrices stand elsewhere.
    Plain,
    /// (E, inputs, outputs)
    Transposed,
}

impl Loader<'_> {
    pub(super) fn moe(&mut self, i: usize, plan: &MoePlan) -> Result<Moe, Error> {
        let width = self.width;
        let router = self.matrix_f32(self.naming.inner(i, names::ROUTER), plan.router.experts, width)?;
        let first = |matrix| self.naming.expert(i, 0, matrix).is_some_and(|name| self.has(&name));
        let own_names = ["gate_proj", "up_proj", "down_proj"].into_iter().any(first);
        let experts = match self.naming {
            _ if own_names => self.experts_apart(i, plan)?,
            Naming::HuggingFace { .. } => self.experts_packed(i, plan)?,
            Naming::Gguf => self.experts_stacked(i, plan)?,
        };
        let shared = match plan.shared_width {
            None => None,
            Some(f) => Some(SharedExpert {
                router: self.matrix_f32(self.naming.inner(i, names::SHARED_ROUTER), 1, width)?,
                ffn: self.dense(i, [names::SHARED_GATE, names::SHARED_UP, names::SHARED_DOWN], f)?,
            }),
        };
        Ok(Moe { plan: *plan, router, experts, shared })
    }

    /// A tensor for each matrix of each expert.
    fn experts_apart(&mut self, i: usize, plan: &MoePlan) -> Result<Vec<DenseFfn>, Error> {
        let (width, f) = (self.width, plan.width);
        let naming = self.naming;
        let mut matrix =
            |e: usize, name: &str, rows, cols| self.matrix(naming.expert(i, e, name).unwrap_or_default(), rows, cols);
        (0..plan.router.experts)
            .map(|e| {
                Ok(DenseFfn {
                    gate: matrix(e, "gate_proj", f, width)?,
                    up: matrix(e, "up_proj", f, width)?,
                    down: matrix(e, "down_proj", width, f)?,
                })
            })
            .collect()
    }

    /// Three tensors of all experts.
    fn experts_stacked(&mut self, i: usize, plan: &MoePlan) -> Result<Vec<DenseFfn>, Error> {
        let (experts, width, f) = (plan.router.experts, self.width, plan.width);
        if self.is_turned(i, plan) {
            return self.experts_turned(i, plan);
        }
        let gate = self.find(self.naming.inner(i, names::EXPERTS_GATE), &[&[experts, f, width]])?;
        let up = self.find(self.naming.inner(i, names::EXPERTS_UP), &[&[experts, f, width]])?;
        let down = self.find(self.naming.inner(i, names::EXPERTS_DOWN), &[&[experts, width, f]])?;
        (0..experts)
            .map(|e| {
                Ok(DenseFfn {
                    gate: self.stacked(gate, Stacking::Plain, (e, f, width), 0..f)?,
                    up: self.stacked(up, Stacking::Plain, (e, f, width), 0..f)?,
                    down: self.stacked(down, Stacking::Plain, (e, width, f), 0..width)?,
                })
            })
            .collect()
    }

    /// Whether a GGUF file was made of a packed checkpoint by a converter that took it for a transposed one, as happens to
    /// Qwen3-VL mixtures that newer versions of transformers have saved: gate and up are then the left and the right half of
    /// the packed matrix instead of its upper and lower, and everything is transposed.
    fn is_turned(&self, i: usize, plan: &MoePlan) -> bool {
        let (experts, width, f) = (plan.router.experts, self.width, plan.width);
        let has =
            |pair, shape: [usize; 3]| self.files.tensor(&self.naming.inner(i, pair)).is_some_and(|t| t.shape == shape);
        let halves = [experts, width / 2, 2 * f];
        let turned_down = has(names::EXPERTS_DOWN, [experts, f, width]);
        let plain_gate = has(names::EXPERTS_GATE, [experts, f, width]);
        // Where a shape is right both ways the other tensor tells; both cannot be, as that would ask for D = F and D = 2 F.
        has(names::EXPERTS_GATE, halves) && has(names::EXPERTS_UP, halves) && turned_down && (!plain_gate || f != width)
    }

    /// Puts right what `is_turned` has found.
    fn experts_turned(&mut self, i: usize, plan: &MoePlan) -> Result<Vec<DenseFfn>, Error> {
        let (experts, width, f) = (plan.router.experts, self.width, plan.width);
        let halves = [experts, width / 2, 2 * f];
        let left = self.find(self.naming.inner(i, names::EXPERTS_GATE), &[&halves])?;
        let right = self.find(self.naming.inner(i, names::EXPERTS_UP), &[&halves])?;
        let down = self.find(self.naming.inner(i, names::EXPERTS_DOWN), &[&[experts, f, width]])?;
        (0..experts)
            .map(|e| {
                let halves = [self.turned(left, e, 0..2 * f)?, self.turned(right, e, 0..2 * f)?];
                let row = (halves[0].len() / (2 * f)).max(1);
                let rows = halves[0].chunks_exact(row).zip(halves[1].chunks_exact(row));
                let packed: Vec<u8> = rows.flat_map(|(left, right)| left.iter().chain(right)).copied().collect();
                let (gate, up) = packed.split_at(packed.len() / 2);
                let own_down = self.turned(down, e, 0..width)?;
                Ok(DenseFfn {
                    gate: self.weight_from(left, left.dtype, (f, width), gate)?,
                    up: self.weight_from(right, left.dtype, (f, width), up)?,
                    down: self.weight_from(down, down.dtype, (width, f), &own_down)?,
                })
            })
            .collect()
    }

    /// Two tensors of all experts: gate above up, and down; or both transposed.
    fn experts_packed(&mut self, i: usize, plan: &MoePlan) -> Result<Vec<DenseFfn>, Error> {
        let (experts, width, f) = (plan.router.experts, self.width, plan.width);
        let (packed, turned) = ([experts, 2 * f, width], [experts, width, 2 * f]);
        let gate_up = self.find(self.naming.inner(i, names::EXPERTS_GATE), &[&packed, &turned])?;
        // Where one tensor is square the other tells; both cannot be, as that would ask for D = F and D = 2 F.
        let down_name = self.naming.inner(i, names::EXPERTS_DOWN);
        let down_plain = self.files.tensor(&down_name).is_some_and(|t| t.shape == [experts, width, f]);
        let plain = if packed == turned { down_plain } else { gate_up.shape == packed };
        let (stacking, down_shape) = match plain {
            true => (Stacking::Plain, [experts, width, f]),
            false => (Stacking::Transposed, [experts, f, width]),
        };
        let down = self.find(down_name, &[&down_shape])?;
        (0..experts)
            .map(|e| {
                Ok(DenseFfn {
                    gate: self.stacked(gate_up, stacking, (e, 2 * f, width), 0..f)?,
                    up: self.stacked(gate_up, stacking, (e, 2 * f, width), f..2 * f)?,
                    down: self.stacked(down, stacking, (e, width, f), 0..width)?,
                })
            })
            .collect()
    }

    /// Outputs `wanted` of expert `e`, whose matrix computes `outputs` from `inputs`.
    fn stacked(
        &mut self,
        info: &TensorInfo,
        stacking: Stacking,
        (e, outputs, inputs): (usize, usize, usize),
        wanted: Range<usize>,
    ) -> Result<Weight, Error> {
        if stacking == Stacking::Plain {
            let first = e * outputs;
            let rows = first + wanted.start..first + wanted.end;
            return self.matrix_of(info, inputs, std::slice::from_ref(&rows));
        }
        let turned = self.turned(info, e, wanted.clone())?;
        self.weight_from(info, info.dtype, (wanted.len(), inputs), &turned)
    }

    /// Columns `wanted` of matrix `e` of a stack (E, rows, columns), as rows.
    fn turned(&mut self, info: &TensorInfo, e: usize, wanted: Range<usize>) -> Result<Vec<u8>, Error> {
        let size = match info.dtype {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            // Blocks of quantised types lie along the wrong axis here.
            _ => return Err(self.wrong_type(info, "F32, F16 or BF16, as experts are stored transposed here")),
        };
        let &[_, rows, cols] = info.shape.as_slice() else { return Ok(Vec::new()) };
        let matrix_bytes = rows * cols * size;
        let stored = self.bytes(info, e * matrix_bytes, matrix_bytes)?;
        let mut turned = Vec::with_capacity(wanted.len() * rows * size);
        for col in wanted {
            for value in stored.chunks_exact(size).skip(col).step_by(cols) {
                turned.extend_from_slice(value);
            }
        }
        self.done(turned.len());
        Ok(turned)
    }
}
