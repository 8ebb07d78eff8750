//! Matrix products in plain Rust. The order of operations here is the order that every instruction set keeps for
//! quantised weights: integer sums per unit (or half), then `acc = fma(sum, w_scale * x_scale, acc)` in ascending k.

use half::{bf16, f16};
use qwenkit_tensor::DType;

use crate::{
    activations::UnitFacts,
    layout::{GROUP_ROWS, Layout, UNIT},
    matmul::Task,
};

/// Sixteen output rows' sums.
type Lanes = [f32; GROUP_ROWS];

/// Computes the task's groups for all its rows.
pub(crate) fn run(task: &Task<'_>) {
    let weight = task.weight;
    let mut unpacked = Unpacked::default();
    for g in task.groups.clone() {
        let group = task.group(g);
        if let Some(layout) = &weight.layout {
            unpacked.fill(layout, group, weight.cols());
        }
        for t in 0..task.x.rows {
            let sums = match weight.dtype() {
                DType::F32 => dot_f32(bytemuck::cast_slice(group), task.x.f32(t)),
                DType::F16 => dot_f16(bytemuck::cast_slice(group), task.x.f32(t)),
                DType::BF16 => dot_bf16(bytemuck::cast_slice(group), task.x.f32(t)),
                _ => unpacked.dot(task, t),
            };
            // SAFETY: this thread alone computes group `g`, so these elements are written once.
            let out = unsafe { task.results(g, t) };
            out.copy_from_slice(&sums[..out.len()]);
        }
    }
}

fn dot_f32(group: &[f32], x: &[f32]) -> Lanes {
    let mut sums = [0.0; GROUP_ROWS];
    for (w, &x) in group.as_chunks::<GROUP_ROWS>().0.iter().zip(x) {
        sums.iter_mut().zip(w).for_each(|(sum, w)| *sum = w.mul_add(x, *sum));
    }
    sums
}

fn dot_f16(group: &[f16], x: &[f32]) -> Lanes {
    let mut sums = [0.0; GROUP_ROWS];
    for (w, &x) in group.as_chunks::<GROUP_ROWS>().0.iter().zip(x) {
        sums.iter_mut().zip(w).for_each(|(sum, w)| *sum = w.to_f32().mul_add(x, *sum));
    }
    sums
}

/// Weights of bf16 in pairs of k, the last one of an odd number being alone.
fn dot_bf16(group: &[bf16], x: &[f32]) -> Lanes {
    let mut sums = [0.0; GROUP_ROWS];
    for (w, x) in group.as_chunks::<{ 2 * GROUP_ROWS }>().0.iter().zip(x.chunks(2)) {
        for (sum, w) in sums.iter_mut().zip(w.as_chunks::<2>().0) {
            w.iter().zip(x).for_each(|(w, x)| *sum = w.to_f32().mul_add(*x, *sum));
        }
    }
    sums
}

/// One group with its quants spread to integers, so that many tokens share the work of unpacking.
#[derive(Default)]
struct Unpacked {
    cols: usize,
    halves: bool,
    addends: bool,
    /// (16 rows, K)
    quants: Vec<i8>,
    /// Scale and addend, (K/16, 16 rows)
    scales: Vec<(f32, f32)>,
}

impl Unpacked {
    fn fill(&mut self, layout: &Layout, group: &[u8], cols: usize) {
        (self.cols, self.halves, self.addends) = (cols, layout.has_half_scales(), layout.has_addend());
        self.quants.clear();
        self.scales.clear();
        for r in 0..GROUP_ROWS {
            // Every stored integer fits: -128..=127 for Q8_0 and the codebook, 0..=31 and -32..=31 for the others.
            self.quants.extend((0..cols).map(|k| layout.quant_value(layout.quant(group, k, r)) as i8));
        }
        for half in 0..cols / UNIT * 2 {
            self.scales.extend((0..GROUP_ROWS).map(|r| layout.scale(group, half / 2, half % 2, r)));
        }
    }

    fn dot(&self, task: &Task<'_>, t: usize) -> Lanes {
        let mut sums = [0.0; GROUP_ROWS];
        for (r, sum) in sums.iter_mut().enumerate() {
            let row = &self.quants[r * self.cols..][..self.cols];
            for (u, w) in row.chunks_exact(UNIT).enumerate() {
                let (x, facts) = task.x.unit(t, u);
                if self.halves {
                    for half in 0..2 {
                        let at = half * UNIT / 2..(half + 1) * UNIT / 2;
                        self.add(sum, dot_i8(&w[at.clone()], &x[at]), facts, (2 * u + half, r), 1 + half);
                    }
                } else {
                    self.add(sum, dot_i8(w, x), facts, (2 * u, r), 0);
                }
            }
        }
        sums
    }

    fn add(&self, sum: &mut f32, dot: i32, facts: &UnitFacts, (half, r): (usize, usize), which: usize) {
        let (scale, addend) = self.scales[half * GROUP_ROWS + r];
        *sum = (dot as f32).mul_add(scale * facts.scale, *sum);
        if self.addends {
            *sum = addend.mul_add(facts.sum[which], *sum);
        }
    }
}

fn dot_i8(w: &[i8], x: &[i8]) -> i32 {
    w.iter().zip(x).map(|(&w, &x)| i32::from(w) * i32::from(x)).sum()
}
