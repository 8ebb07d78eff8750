//! Backward of quantised matrix products on AMX: tiles of 16 tokens by 16 columns of W.
//!
//! A block's 128 rows are four tiles, as the gradient's values share a scale for each 32. Order of operations as in
//! `portable::matmul_back`; what is less than a whole tile of tokens, AVX-512 computes.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Amx` stands for.

use std::{arch::x86_64::*, mem::MaybeUninit};

use super::tile::{self, ROW_BYTES, ROWS, Room, Tiles};
use crate::{
    avx512,
    matmul_back::BackTask,
    turned::{BLOCK, STEPS, SUB, SUBS},
};

/// Computes the task's 32 columns for all rows. Quants of W are signed (`Turned::sign`).
///
/// # Safety
/// The machine has what `Isa::Amx` stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,avx2")]
pub(crate) unsafe fn run(task: &BackTask<'_>) {
    let (turned, grads) = (task.turned, task.grads);
    let blocks = turned.blocks;
    assert!(
        grads.rows * blocks <= grads.facts.len()
            && grads.facts.len() * BLOCK <= grads.quants.len()
            && 2 * blocks <= turned.scales.len()
            && 2 * blocks * STEPS <= turned.quants.len()
    );
    let (sums, left, right) = ((ROWS, ROW_BYTES), (ROWS, SUB), (SUB / 4, ROW_BYTES));
    // SAFETY: each tile stays inside the rows; both halves have all blocks, by the assertion.
    unsafe {
        let _tiles = Tiles::new([sums, sums, sums, sums, left, left, right, right]);
        for t in task.tokens.clone().step_by(ROWS) {
            for half in 0..2 {
                tile(task, half, t);
            }
        }
    }
}

/// One vector of columns by tokens `t..t + 16`. While a block's sums are read, tiles make the next one's.
#[inline(always)]
unsafe fn tile(task: &BackTask<'_>, half: usize, t: usize) {
    let (turned, grads) = (task.turned, task.grads);
    let blocks = turned.blocks;
    // SAFETY: tokens `t..t + 16` are a tile of the gradients, and the half has all blocks, as `run` has asserted.
    unsafe {
        let (x, facts) = (grads.quants.as_ptr().add(t * blocks * BLOCK), grads.facts.as_ptr().add(t * blocks));
        let steps = turned.quants.as_ptr().add(half * blocks * STEPS).cast::<u8>();
        let scales = turned.scales.as_ptr().add(half * blocks);
        let mut room = MaybeUninit::<[[Room<i32>; SUBS]; 2]>::uninit();
        let room = room.as_mut_ptr().cast::<Room<i32>>();
        macro_rules! start {
            ($b:expr, $($sub:literal)*) => {
                let (x, steps, room) = (x.add($b * ROWS * BLOCK), steps.add($b * STEPS * ROW_BYTES), room.add($b % 2 * SUBS));
                $(
                    tile::load::<{ 6 + $sub % 2 }>(steps.add($sub * STEPS / SUBS * ROW_BYTES), ROW_BYTES);
                    tile::load::<{ 4 + $sub % 2 }>(x.add($sub * SUB).cast(), BLOCK);
                    tile::zero::<$sub>();
                    tile::add_bytes::<$sub, { 4 + $sub % 2 }, { 6 + $sub % 2 }>();
                    tile::store::<$sub>(room.add($sub).cast(), ROW_BYTES);
                )*
            };
        }
        let mut acc = [_mm512_setzero_ps(); ROWS];
        if blocks > 0 {
            start!(0, 0 1 2 3);
        }
        for b in 0..blocks {
            if b + 1 < blocks {
                start!((b + 1), 0 1 2 3);
            }
            let sums = room.add(b % 2 * SUBS).cast::<__m512i>();
            let scale = _mm512_loadu_ps(scales.add(b).cast());
            for c in 0..ROWS {
                let facts = &*facts.add(b * ROWS + c);
                let mut part = _mm512_setzero_ps();
                for sub in 0..SUBS {
                    let sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums.add(sub * ROWS + c)));
                    part = _mm512_fmadd_ps(sum, _mm512_set1_ps(facts.scale[sub]), part);
                }
                acc[c] = _mm512_fmadd_ps(part, scale, acc[c]);
            }
        }
        for (c, acc) in acc.into_iter().enumerate() {
            avx512::matmul_back::join(task, t + c, half, acc);
        }
    }
}
