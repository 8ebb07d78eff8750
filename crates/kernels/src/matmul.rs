//! The matrix product y = W x for one or many tokens, on all threads, for every weight type.
//!
//! Contract: an output element is a function of its weight row and its activation row alone, computed in one fixed
//! order, so it has the same bits for any batch size and any number of threads. The kernels of an instruction set are
//! in the folder of its name; this file only prepares activations and divides the work.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use half::bf16;

use crate::{
    Isa,
    activations::{Activations, UnitFacts, tile_of},
    gated::GatedRoom,
    layout::{GROUP_ROWS, UNIT},
    matmul_back::BackRoom,
    planes::Joined,
    pool::{Deal, Pool},
    product::{LowRank, Out},
    screen::ScreenRoom,
    shared_out::SharedOut,
    weight::{Operand, Weight},
};

/// Groups of rows after which what is added to a product is: for 512 tokens 256 KiB of results, which the second-level cache
/// still holds.
const ADDED_GROUPS: usize = 8;

/// Tokens up to which the memory of groups that are put together is asked for ahead of them, as `prefetch` has it.
const JOINED_AHEAD_ROWS: usize = 8;

/// The machine as the ops use it: threads and instruction set.
pub struct Compute {
    pub(crate) pool: Pool,
    pub(crate) isa: Isa,
    /// Buffers of the backward of products, which are large and asked for many times in a step.
    pub(crate) back: Mutex<BackRoom>,
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
pub struct MatmulScratch {
    pub(crate) activations: Activations,
    pub(crate) screen: ScreenRoom,
    pub(crate) gated: GatedRoom,
}

impl MatmulScratch {
    /// Bytes of the buffers.
    pub fn held_bytes(&self) -> usize {
        self.activations.held_bytes() + self.screen.held_bytes() + self.gated.held_bytes()
    }
}

/// What a kernel gets: activation rows, a weight's groups, and where results go.
pub(crate) struct Task<'a> {
    pub(crate) weight: &'a Weight,
    pub(crate) groups: Range<usize>,
    /// The bytes of the one group, where it had to be put together.
    pub(crate) joined: Option<&'a [u8]>,
    pub(crate) x: Rows<'a>,
    /// Rows of `out_step` values, which begin with group `out_group`: (T, N) when they are whole.
    pub(crate) out: &'a SharedOut<'a, f32>,
    pub(crate) out_step: usize,
    pub(crate) out_group: usize,
}

/// The activation rows of one product, (T, K), in the forms that were prepared.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Rows of whole tiles of the 8-bit form.
    pub(crate) widest: usize,
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
        Compute { pool: Pool::new(threads), isa, back: Mutex::default() }
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
        self.matmul_added(scratch, x, products, &[]);
    }

    /// The forward half of `matmul_backward`: as `matmul`, and adds to the i-th product the i-th of `added`, if there is one, while the
    /// product's results are in cache: the same bits as `product` gives afterwards. On tiles quantised weights are multiplied as
    /// bf16, which for many tokens is faster than `matmul`'s 8 bits, and nearer to the exact product; a token's results depend on
    /// no other token here either.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn matmul_forward(
        &self,
        scratch: &mut MatmulScratch,
        x: &[f32],
        products: &mut [Product<'_>],
        added: &[Option<LowRank<'_>>],
    ) {
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Amx
            && !products.is_empty()
            && products.iter().all(|p| p.weight.operand() == Operand::Quantized)
        {
            check(x, products, added);
            let mut room = self.back.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: `new` has checked that the machine has this instruction set.
            return unsafe { self.tiles_forward(&mut room.tiles, x, products, added) };
        }
        self.matmul_added(scratch, x, products, added);
    }

    fn matmul_added(
        &self,
        scratch: &mut MatmulScratch,
        x: &[f32],
        products: &mut [Product<'_>],
        added: &[Option<LowRank<'_>>],
    ) {
        let Some(cols) = products.first().map(|p| p.weight.cols()) else { return };
        check(x, products, added);
        let needed: Vec<Operand> = products.iter().map(|p| p.weight.operand()).collect();
        scratch.activations.prepare(self.isa, &self.pool, x, cols, &needed);
        self.multiply_prepared(Rows::of(&scratch.activations, x), products, added);
    }

    /// As `matmul_added`, of activations in the forms that the products need.
    pub(crate) fn multiply_prepared(&self, x: Rows<'_>, products: &mut [Product<'_>], added: &[Option<LowRank<'_>>]) {
        let jobs: Vec<_> = products.iter_mut().map(|p| (p.weight, SharedOut::new(&mut *p.out))).collect();
        let groups: usize = jobs.iter().map(|(weight, _)| weight.groups()).sum();
        let deal = Deal::new(groups, self.pool.threads());
        self.pool.run(|i| {
            // Groups are counted through all weights in turn.
            deal.each(i, |mine| {
                let mut start = 0;
                for (job, (weight, out)) in jobs.iter().enumerate() {
                    let end = start + weight.groups();
                    let own = mine.start.clamp(start, end) - start..mine.end.clamp(start, end) - start;
                    let added = added.get(job).copied().flatten();
                    let step = if added.is_some() { ADDED_GROUPS } else { own.len().max(1) };
                    for first in own.clone().step_by(step) {
                        let groups = first..(first + step).min(own.end);
                        let cols = groups.start * GROUP_ROWS..(groups.end * GROUP_ROWS).min(weight.rows());
                        let joined = None;
                        self.kernel(&Task { weight, groups, joined, x, out, out_step: weight.rows(), out_group: 0 });
                        if let Some(added) = added {
                            added.add(self.isa, cols, &Out { to: out, at: 0, step: weight.rows() });
                        }
                    }
                    start = end;
                }
            });
        });
    }

    pub(crate) fn kernel(&self, task: &Task<'_>) {
        if task.weight.in_planes() {
            let (mut room, ahead) = (Joined::default(), task.x.rows <= JOINED_AHEAD_ROWS);
            for g in task.groups.clone() {
                self.joined_kernel(task, g, ahead, &mut room);
            }
            return;
        }
        self.own_kernel(task);
    }

    /// Group `g` of a weight in two parts; with `ahead` the memory of the groups behind it is asked for.
    pub(crate) fn joined_kernel(&self, task: &Task<'_>, g: usize, ahead: bool, room: &mut Joined) {
        let Task { weight, x, out, out_step, out_group, .. } = *task;
        let joined = Some(weight.join(self.isa, g, ahead, room));
        self.own_kernel(&Task { weight, groups: g..g + 1, joined, x, out, out_step, out_group });
    }

    fn own_kernel(&self, task: &Task<'_>) {
        match self.isa {
            Isa::Portable => crate::portable::matmul::run(task),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `new` has checked that the machine has this instruction set.
            Isa::Avx2 => unsafe { crate::avx2::matmul::run(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512 => unsafe { crate::avx512::matmul::run(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Amx => unsafe { crate::amx::matmul::run(task) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 | Isa::Amx => unreachable!("`new` has refused an instruction set of x86-64"),
        }
    }
}

/// # Panics
/// If shapes do not fit.
fn check(x: &[f32], products: &[Product<'_>], added: &[Option<LowRank<'_>>]) {
    let Some(cols) = products.first().map(|p| p.weight.cols()) else { return };
    let rows = x.len() / cols;
    for p in products {
        let (n, k) = (p.weight.rows(), p.weight.cols());
        assert!(
            k == cols && x.len() == rows * k && p.out.len() == rows * n,
            "matmul of ({rows}, {cols}) by ({n}, {k})"
        );
    }
    for (p, added) in products.iter().zip(added) {
        added.iter().for_each(|added| added.check(rows, p.weight.rows()));
    }
}

impl<'a> Task<'a> {
    /// The packed bytes of group `g`.
    #[inline(always)]
    pub(crate) fn group(&self, g: usize) -> &'a [u8] {
        match self.joined {
            Some(group) => group,
            None => self.weight.group(g),
        }
    }

    /// Whether its groups follow each other in memory, and their product is for so few tokens that it waits for memory.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(crate) fn asks_ahead(&self) -> bool {
        self.joined.is_none() && self.x.rows <= crate::prefetch::TOKENS_MAX
    }

    /// Where results of group `g` for token `t` go: as many as the group has rows.
    ///
    /// # Safety
    /// While they live, nobody takes them again: one thread computes a group.
    #[inline(always)]
    pub(crate) unsafe fn results(&self, g: usize, t: usize) -> &'a mut [f32] {
        let at = t * self.out_step + (g - self.out_group) * GROUP_ROWS;
        // SAFETY: the caller's promise.
        unsafe { self.out.slice(at, self.weight.group_rows(g)) }
    }

    /// Calls `f(group, tokens)` for all groups and tokens: tokens in panels of so many values, whole tiles of them, so that a
    /// panel stays in cache while the groups go by.
    pub(crate) fn panels(&self, panel_values: usize, tile_tokens: usize, mut f: impl FnMut(usize, Range<usize>)) {
        self.panels_of(1, panel_values, tile_tokens, |groups, tokens| f(groups.start, tokens));
    }

    /// As `panels`, `tile_groups` groups at a time.
    pub(crate) fn panels_of(
        &self,
        tile_groups: usize,
        panel_values: usize,
        tile_tokens: usize,
        mut f: impl FnMut(Range<usize>, Range<usize>),
    ) {
        let panel = (panel_values / self.x.cols.max(1) / tile_tokens * tile_tokens).max(tile_tokens);
        for first in (0..self.x.rows).step_by(panel) {
            for g in self.groups.clone().step_by(tile_groups) {
                f(g..(g + tile_groups).min(self.groups.end), first..(first + panel).min(self.x.rows));
            }
        }
    }
}

impl<'a> Rows<'a> {
    /// All that was prepared from `values`.
    pub(crate) fn of(prepared: &'a Activations, values: &'a [f32]) -> Rows<'a> {
        let Activations { rows, cols, widest, ref quants, ref facts, ref bf16 } = *prepared;
        Rows { rows, cols, widest, values, quants, facts, bf16 }
    }

    /// Some of the rows: from a multiple of every tile's rows, up to another or to the last row.
    pub(crate) fn part(&self, rows: Range<usize>) -> Rows<'a> {
        let (cols, padded) = (self.cols, self.cols.next_multiple_of(2));
        Rows {
            rows: rows.len(),
            values: &self.values[rows.start * cols..rows.end * cols],
            quants: self.quants.get(rows.start * cols..).unwrap_or_default(),
            facts: self.facts.get(rows.start * (cols / UNIT)..).unwrap_or_default(),
            bf16: self.bf16.get(rows.start * padded..).unwrap_or_default(),
            ..*self
        }
    }

    /// Quants (32) and facts of unit `u` of row `t`.
    pub(crate) fn unit(&self, t: usize, u: usize) -> (&[i8], &UnitFacts) {
        let (first, width) = tile_of(self.widest, t, self.rows);
        let at = first * (self.cols / UNIT) + u * width + (t - first);
        (&self.quants[at * UNIT..][..UNIT], &self.facts[at])
    }

    /// Values (K) of row `t`.
    pub(crate) fn f32(&self, t: usize) -> &[f32] {
        &self.values[t * self.cols..][..self.cols]
    }
}
