//! Backward of `matmul`: dx = dy W for frozen weights of every type.
//!
//! The gradient of y = W x towards x is the sum over W's rows of dy times the row. Quantised weights are turned, 32 columns at
//! a time, into 8 bits in blocks of 128 rows (`turned`), dy is rounded to 8 bits in blocks of 32, and integers are
//! multiplied: what that rounds, tests/gradients.rs holds. AMX multiplies both as bf16, and BF16 weights too. Other plain weights
//! are multiplied as f32 by `product`'s tiles. Frozen weights have no gradient of their own here.

use std::{ops::Range, sync::PoisonError};

use half::{bf16, f16};
use qwenkit_tensor::DType;

#[cfg(target_arch = "x86_64")]
use crate::attention_back_half::AttentionRoom;
use crate::{
    Isa,
    activations::{TILE_ROWS, tile_of},
    layout::{GROUP_ROWS, UNIT},
    matmul::Compute,
    pool::{Deal, Pool},
    portable,
    product::{Join, LowRank, Mat, Out, Right, TILE_COLS},
    shared_out::SharedOut,
    turned::{BLOCK, OFFSET_LOG2, SUBS, Turned, blocks_of},
    weight::{Operand, Weight},
};

/// One product of several whose gradients towards the same x are added.
pub struct BackProduct<'a> {
    /// (N, K)
    pub weight: &'a Weight,
    /// (T, N)
    pub dy: &'a [f32],
}

impl Compute {
    /// Backward of `matmul` towards its `x`: `dx`: (T, K) = the sum of dy W over all products; with `into` it is multiplied and
    /// added to what is there.
    ///
    /// # Panics
    /// If a product's shapes do not fit `dx`.
    pub fn matmul_backward(&self, products: &[BackProduct<'_>], into: Join, dx: &mut [f32]) {
        self.matmul_backward_added(products, &[], into, dx);
    }

    /// As `matmul_backward`, and adds all of `added`: (T, R) by (R, K) while results are in cache: the same bits as `product` gives
    /// afterwards.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn matmul_backward_added(
        &self,
        products: &[BackProduct<'_>],
        added: &[LowRank<'_>],
        into: Join,
        dx: &mut [f32],
    ) {
        for BackProduct { weight, dy } in products {
            let tokens = dx.len() / weight.cols();
            assert!(
                dx.len() == tokens * weight.cols() && dy.len() == tokens * weight.rows(),
                "backward of ({tokens}, {}) by ({}, {})",
                weight.cols(),
                weight.rows(),
                weight.cols()
            );
        }
        if let Some(p) = products.first() {
            added.iter().for_each(|added| added.check(dx.len() / p.weight.cols(), p.weight.cols()));
        }
        let is_rounded = |p: &&BackProduct<'_>| self.rounds_back(p.weight);
        let mut into = into;
        let rounded: Vec<_> = products.iter().filter(is_rounded).collect();
        let all_rounded = rounded.len() == products.len();
        if !rounded.is_empty() {
            self.rounded_backward(&rounded, if all_rounded { added } else { &[] }, into, dx);
            into.add = true;
        }
        if all_rounded {
            return;
        }
        for BackProduct { weight, dy } in products.iter().filter(|p| !is_rounded(p)) {
            self.product_with(Mat::new(dy, dx.len() / weight.cols(), weight.rows()), *weight, into, dx);
            into.add = true;
        }
        for LowRank { left, right, alpha } in added {
            self.product_with(*left, right, Join { alpha: *alpha, add: true }, dx);
        }
    }

    /// Whether gradients are rounded for products with the weight.
    fn rounds_back(&self, weight: &Weight) -> bool {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => crate::amx::both_ways::takes_back(weight),
            _ => weight.operand() == Operand::Quantized,
        }
    }

    fn rounded_backward(&self, products: &[&BackProduct<'_>], added: &[LowRank<'_>], into: Join, dx: &mut [f32]) {
        let width = products[0].weight.cols();
        let mut room = self.back.lock().unwrap_or_else(PoisonError::into_inner);
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Amx {
            // SAFETY: `Compute::new` has checked that the machine has this instruction set.
            return unsafe { self.tiles_backward(&mut room.tiles, products, added, into, dx) };
        }
        let BackRoom { grads, turned, .. } = &mut *room;
        grads.quantize(self.isa, &self.pool, products, dx.len() / width);
        turned.resize_with(self.pool.threads(), Turned::default);
        let (grads, turned, out) = (&*grads, SharedOut::new(turned), SharedOut::new(dx));
        let deal = Deal::new(width / UNIT, self.pool.threads());
        self.pool.run(|i| {
            // SAFETY: each thread has one of its own.
            let turned = unsafe { &mut turned.slice(i, 1)[0] };
            deal.each(i, |mine| {
                for unit in mine {
                    turned.take(self.isa, products.iter().map(|p| p.weight), unit);
                    let first = unit * UNIT;
                    BackTask { turned, grads, width, first, into, out: &out }.run(self.isa);
                    for added in added {
                        added.add(self.isa, first..first + UNIT, &Out { to: &out, at: 0, step: width });
                    }
                }
            });
        });
    }
}

/// Buffers of backward ops.
#[derive(Default)]
pub(crate) struct BackRoom {
    grads: Grads,
    /// One for each thread
    turned: Vec<Turned>,
    #[cfg(target_arch = "x86_64")]
    pub(crate) tiles: crate::amx::both_ways::TileRoom,
    #[cfg(target_arch = "x86_64")]
    pub(crate) attention: AttentionRoom,
}

/// What a kernel gets: gradients, 32 columns of W, and where these columns of dx go.
pub(crate) struct BackTask<'a> {
    pub(crate) turned: &'a Turned,
    pub(crate) grads: &'a Grads,
    /// K
    pub(crate) width: usize,
    /// The first of the columns
    pub(crate) first: usize,
    pub(crate) into: Join,
    /// (T, K)
    pub(crate) out: &'a SharedOut<'a, f32>,
}

impl BackTask<'_> {
    fn run(&self, isa: Isa) {
        match isa {
            // SAFETY: `Compute::new` has checked that the machine has this instruction set.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => unsafe { crate::avx512::matmul_back::run(self) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { crate::avx2::matmul_back::run(self) },
            _ => portable::matmul_back::run(self),
        }
    }
}

/// Gradients of all products side by side, each padded to whole blocks with zeros: 8 bits, a scale for each 32 values.
/// Rows lie in tiles as those of `Activations` do, of 8 everywhere, and the last ones of 4, 2 and 1; a tile holds block after block, and
/// in each block row after row.
#[derive(Default)]
pub(crate) struct Grads {
    /// T
    pub(crate) rows: usize,
    pub(crate) blocks: usize,
    /// Tiles of (blocks, rows of the tile, `BLOCK`)
    pub(crate) quants: Vec<i8>,
    /// Tiles of (blocks, rows of the tile)
    pub(crate) facts: Vec<GradFacts>,
}

/// What a kernel needs beside the quants of one block of one row, for each 32 of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GradFacts {
    pub(crate) scale: [f32; SUBS],
    /// What sums start from, so that weights stored with 128 added count as what they are.
    pub(crate) start: [i32; SUBS],
}

impl GradFacts {
    #[inline(always)]
    pub(crate) fn set(&mut self, sub: usize, scale: f32, sum: i32) {
        self.scale[sub] = scale;
        self.start[sub] = -(sum << OFFSET_LOG2);
    }
}

impl Grads {
    fn quantize(&mut self, isa: Isa, pool: &Pool, products: &[&BackProduct<'_>], rows: usize) {
        self.rows = rows;
        self.blocks = products.iter().map(|p| blocks_of(p.weight.rows())).sum();
        let blocks = self.blocks;
        if self.facts.len() < rows * blocks {
            self.quants.resize(rows * blocks * BLOCK, 0);
            self.facts.resize(rows * blocks, GradFacts::default());
        }
        let (quants, facts) = (SharedOut::new(&mut self.quants), SharedOut::new(&mut self.facts));
        pool.run_split(rows, TILE_ROWS, |range| {
            for row in range {
                let (first, width) = tile_of(TILE_ROWS, row, rows);
                let mut at = first * blocks + (row - first);
                for BackProduct { weight, dy } in products {
                    let n = weight.rows();
                    for x in dy[row * n..][..n].chunks(BLOCK) {
                        // SAFETY: a block of a row is in one place, and each row is in one range.
                        let (quants, facts) = unsafe { (quants.slice(at * BLOCK, BLOCK), facts.slice(at, 1)) };
                        let Some(quants) = quants.as_mut_array() else { unreachable!("a block's quants") };
                        facts[0] = match x.as_array() {
                            Some(x) => quantize_block(isa, x, quants),
                            None => {
                                let mut whole = [0.0; BLOCK];
                                whole[..x.len()].copy_from_slice(x);
                                quantize_block(isa, &whole, quants)
                            }
                        };
                        at += width;
                    }
                }
            }
        });
    }

    /// Quants and facts of block `b` of row `t`.
    pub(crate) fn block(&self, t: usize, b: usize) -> (&[i8; BLOCK], &GradFacts) {
        let (first, width) = tile_of(TILE_ROWS, t, self.rows);
        let at = first * self.blocks + b * width + (t - first);
        (&self.quants.as_chunks().0[at], &self.facts[at])
    }
}

fn quantize_block(isa: Isa, x: &[f32; BLOCK], quants: &mut [i8; BLOCK]) -> GradFacts {
    match isa {
        // SAFETY: `Compute::new` has checked that the machine has this instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { crate::avx512::matmul_back::quantize(x, quants) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { crate::avx2::matmul_back::quantize(x, quants) },
        _ => portable::matmul_back::quantize(x, quants),
    }
}

impl Right for Weight {
    fn cols(&self) -> usize {
        Weight::cols(self)
    }

    fn lies(&self, _: usize, _: usize) -> Option<(&[f32], usize)> {
        None
    }

    fn copy(&self, rows: Range<usize>, col: usize, out: &mut [f32]) {
        for (row, out) in rows.zip(out.as_chunks_mut::<TILE_COLS>().0) {
            self.columns(row, col, out);
        }
    }
}

impl Weight {
    /// Values `col..col + 32` of row `row` of a plain weight, zero beyond the last column.
    fn columns(&self, row: usize, col: usize, out: &mut [f32; TILE_COLS]) {
        let (group, r) = (self.group(row / GROUP_ROWS), row % GROUP_ROWS);
        let count = TILE_COLS.min(self.cols() - col);
        out[count..].fill(0.0);
        for (i, x) in out[..count].iter_mut().enumerate() {
            let k = col + i;
            *x = match self.dtype() {
                DType::F32 => bytemuck::cast_slice::<u8, f32>(group)[k * GROUP_ROWS + r],
                DType::F16 => bytemuck::cast_slice::<u8, f16>(group)[k * GROUP_ROWS + r].to_f32(),
                _ => bytemuck::cast_slice::<u8, bf16>(group)[(k / 2 * GROUP_ROWS + r) * 2 + k % 2].to_f32(),
            };
        }
    }
}
