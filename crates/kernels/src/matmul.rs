//! The matrix product y = W x for one or many tokens, on all threads, for every weight type.
//!
//! Contract: an output element is a function of its weight row and its activation row alone, computed in one fixed
//! order, so it has the same bits for any batch size and any number of threads. The kernels of an instruction set are
//! in the folder of its name; this file only prepares activations and divides the work.

use std::ops::Range;

use half::bf16;

use crate::{
    Isa,
    activations::{Activations, UnitFacts, tile_of},
    layout::UNIT,
    pool::{Deal, Pool},
    shared_out::SharedOut,
    weight::{Operand, Weight},
};

/// The machine as the ops use it: threads and instruction set.
pub struct Compute {
    pub(crate) pool: Pool,
    pub(crate) isa: Isa,
}

/// One product of several over the same activations: `out`: (T, N) = x W^T.
pub struct Product<'a> {
    /// (N, K)
    pub weight: &'a Weight,
    /// (T, N), overwritten
    pub out: &'a mut [f32],
}

/// Buffers that products reuse. One per caller.
#[derive(Default)]
pub struct MatmulScratch(pub(crate) Activations);

/// What a kernel gets: activation rows, a weight's groups, and where results go.
pub(crate) struct Task<'a> {
    pub(crate) weight: &'a Weight,
    pub(crate) groups: Range<usize>,
    pub(crate) x: Rows<'a>,
    /// (T, N)
    pub(crate) out: &'a SharedOut<'a, f32>,
}

/// The activation rows of one product, (T, K), in the forms that were prepared.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) values: &'a [f32],
    pub(crate) quants: &'a [i8],
    pub(crate) facts: &'a [UnitFacts],
    pub(crate) bf16: &'a [bf16],
}

impl Compute {
    /// Threads and instruction set to compute with. `isa` must be one that is available here.
    ///
    /// # Panics
    /// If the instruction set is not available on this machine.
    pub fn new(threads: usize, isa: Isa) -> Compute {
        assert!(Isa::available().contains(&isa), "instruction set {isa} is not available on this machine");
        Compute { pool: Pool::new(threads), isa }
    }

    /// The thread pool.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Computes every product over the same `x`: (T, K). One fork for all of them.
    ///
    /// # Panics
    /// If a product's shapes do not fit `x`.
    pub fn matmul(&self, scratch: &mut MatmulScratch, x: &[f32], products: &mut [Product<'_>]) {
        let Some(cols) = products.first().map(|p| p.weight.cols()) else { return };
        let rows = x.len() / cols;
        for p in products.iter() {
            let (n, k) = (p.weight.rows(), p.weight.cols());
            assert!(
                k == cols && x.len() == rows * k && p.out.len() == rows * n,
                "matmul of ({rows}, {cols}) by ({n}, {k})"
            );
        }
        let needed: Vec<Operand> = products.iter().map(|p| p.weight.operand()).collect();
        scratch.0.prepare(self.isa, &self.pool, x, cols, &needed);
        let x =
            Rows { rows, cols, values: x, quants: &scratch.0.quants, facts: &scratch.0.facts, bf16: &scratch.0.bf16 };
        let jobs: Vec<_> = products.iter_mut().map(|p| (p.weight, SharedOut::new(&mut *p.out))).collect();
        let groups: usize = jobs.iter().map(|(weight, _)| weight.groups()).sum();
        let deal = Deal::new(groups, self.pool.threads());
        self.pool.run(|i| {
            // Groups are counted through all weights in turn.
            deal.each(i, |mine| {
                let mut start = 0;
                for (weight, out) in &jobs {
                    let end = start + weight.groups();
                    let own = mine.start.clamp(start, end) - start..mine.end.clamp(start, end) - start;
                    if !own.is_empty() {
                        self.kernel(&Task { weight, groups: own, x, out });
                    }
                    start = end;
                }
            });
        });
    }

    pub(crate) fn kernel(&self, task: &Task<'_>) {
        match self.isa {
            Isa::Portable => crate::portable::matmul::run(task),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `new` has checked that the machine has this instruction set.
            Isa::Avx2 => unsafe { crate::avx2::matmul::run(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512 => unsafe { crate::avx512::matmul::run(task) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => unreachable!("`new` has refused an instruction set of x86-64"),
        }
    }
}

impl Task<'_> {
    /// Calls `f(group, tokens)` for all groups and tokens: tokens in panels of so many values, whole tiles of them, so that a
    /// panel stays in cache while the groups go by.
    pub(crate) fn panels(&self, panel_values: usize, tile_tokens: usize, f: impl Fn(usize, Range<usize>)) {
        let panel = (panel_values / self.x.cols.max(1) / tile_tokens * tile_tokens).max(tile_tokens);
        for first in (0..self.x.rows).step_by(panel) {
            for g in self.groups.clone() {
                f(g, first..(first + panel).min(self.x.rows));
            }
        }
    }
}

impl Rows<'_> {
    /// Quants (32) and facts of unit `u` of row `t`.
    pub(crate) fn unit(&self, t: usize, u: usize) -> (&[i8], &UnitFacts) {
        let (first, width) = tile_of(t, self.rows);
        let at = first * (self.cols / UNIT) + u * width + (t - first);
        (&self.quants[at * UNIT..][..UNIT], &self.facts[at])
    }

    /// Values (K) of row `t`.
    pub(crate) fn f32(&self, t: usize) -> &[f32] {
        &self.values[t * self.cols..][..self.cols]
    }

    /// Rounded values of row `t`, K rounded up to even.
    pub(crate) fn bf16(&self, t: usize) -> &[bf16] {
        let padded = self.cols.next_multiple_of(2);
        &self.bf16[t * padded..][..padded]
    }
}
