//! Backward of quantised matrix products on AVX-512: a tile of 16 columns of W by up to 8 tokens in registers.
//!
//! Order of operations as in `portable::matmul_back`.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx512` stands for.

use std::arch::{asm, x86_64::*};

use crate::{
    matmul_back::{BackTask, GradFacts},
    turned::{BLOCK, HALF, STEPS, SUBS, scale_of_bits},
};

/// Tokens of a tile: eight accumulators hide the latency of the multiply-add.
const TILE_TOKENS: usize = 8;

/// Computes the task's 32 columns for all rows.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,avx2")]
pub(crate) unsafe fn run(task: &BackTask<'_>) {
    let rows = task.grads.rows;
    let mut t = 0;
    // SAFETY: each tile stays inside the rows.
    unsafe {
        while t < rows {
            t += match rows - t {
                TILE_TOKENS.. => tile::<8>(task, t),
                4.. => tile::<4>(task, t),
                2.. => tile::<2>(task, t),
                _ => tile::<1>(task, t),
            };
        }
    }
}

/// Both vectors of columns by tokens `t..t + C`; returns C.
#[inline(always)]
unsafe fn tile<const C: usize>(task: &BackTask<'_>, t: usize) -> usize {
    let (turned, grads) = (task.turned, task.grads);
    let blocks = turned.blocks;
    assert!(
        (t + C) * blocks <= grads.facts.len()
            && grads.facts.len() * BLOCK <= grads.quants.len()
            && 2 * blocks <= turned.scales.len()
            && 2 * blocks * STEPS <= turned.quants.len()
    );
    // SAFETY: tokens `t..t + C` are a tile of the gradients, and both halves have all blocks, by the assertion.
    unsafe {
        for half in 0..2 {
            let (x, facts) = (grads.quants.as_ptr().add(t * blocks * BLOCK), grads.facts.as_ptr().add(t * blocks));
            let steps = turned.quants.as_ptr().add(half * blocks * STEPS);
            let scales = turned.scales.as_ptr().add(half * blocks);
            let mut acc = [_mm512_setzero_ps(); C];
            for b in 0..blocks {
                let facts: [&GradFacts; C] = std::array::from_fn(|c| &*facts.add(b * C + c));
                let (steps, x) = (steps.add(b * STEPS), x.add(b * C * BLOCK));
                let mut part = [_mm512_setzero_ps(); C];
                for sub in 0..SUBS {
                    let mut sum: [__m512i; C] = std::array::from_fn(|c| _mm512_set1_epi32(facts[c].start[sub]));
                    for s in sub * STEPS / SUBS..(sub + 1) * STEPS / SUBS {
                        dot_step(&mut sum, _mm512_load_si512(steps.add(s).cast()), x.add(4 * s));
                    }
                    for c in 0..C {
                        let scale = _mm512_set1_ps(facts[c].scale[sub]);
                        part[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[c]), scale, part[c]);
                    }
                }
                let scale = _mm512_loadu_ps(scales.add(b).cast());
                for c in 0..C {
                    acc[c] = _mm512_fmadd_ps(part[c], scale, acc[c]);
                }
            }
            for (c, acc) in acc.into_iter().enumerate() {
                let out = task.out.slice((t + c) * task.width + task.first + half * HALF, HALF);
                let mut x = _mm512_mul_ps(acc, _mm512_set1_ps(task.into.alpha));
                if task.into.add {
                    x = _mm512_add_ps(_mm512_loadu_ps(out.as_ptr()), x);
                }
                _mm512_storeu_ps(out.as_mut_ptr(), x);
            }
        }
    }
    C
}

/// One step of a block: adds the products of `q` with the four values that each token has at `x`, tokens a block apart.
/// Eight tokens are written out for the reason given in `avx512::matmul`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot_step<const C: usize>(sum: &mut [__m512i; C], q: __m512i, x: *const i8) {
    // SAFETY: the caller's promise that C tokens have four values at `x`; the assembly only reads them.
    unsafe {
        if C == TILE_TOKENS {
            asm!(
                "vpdpbusd {s0}, {q}, dword ptr [{x}]{{1to16}}",
                "vpdpbusd {s1}, {q}, dword ptr [{x} + {block}]{{1to16}}",
                "vpdpbusd {s2}, {q}, dword ptr [{x} + 2*{block}]{{1to16}}",
                "vpdpbusd {s3}, {q}, dword ptr [{x} + 3*{block}]{{1to16}}",
                "vpdpbusd {s4}, {q}, dword ptr [{x} + 4*{block}]{{1to16}}",
                "vpdpbusd {s5}, {q}, dword ptr [{x} + 5*{block}]{{1to16}}",
                "vpdpbusd {s6}, {q}, dword ptr [{x} + 6*{block}]{{1to16}}",
                "vpdpbusd {s7}, {q}, dword ptr [{x} + 7*{block}]{{1to16}}",
                s0 = inout(zmm_reg) sum[0],
                s1 = inout(zmm_reg) sum[1],
                s2 = inout(zmm_reg) sum[2],
                s3 = inout(zmm_reg) sum[3],
                s4 = inout(zmm_reg) sum[4],
                s5 = inout(zmm_reg) sum[5],
                s6 = inout(zmm_reg) sum[6],
                s7 = inout(zmm_reg) sum[7],
                q = in(zmm_reg) q,
                x = in(reg) x,
                block = const BLOCK,
                options(readonly, nostack, preserves_flags),
            );
        } else {
            for (c, sum) in sum.iter_mut().enumerate() {
                let four = _mm512_set1_epi32(x.add(c * BLOCK).cast::<i32>().read_unaligned());
                *sum = _mm512_dpbusd_epi32(*sum, q, four);
            }
        }
    }
}

/// Quantises a block.
///
/// # Safety
/// The machine has what `Isa::Avx512` stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) unsafe fn quantize(x: &[f32; BLOCK], quants: &mut [i8; BLOCK]) -> GradFacts {
    // SAFETY: loads and stores are of the block's values and quants.
    unsafe {
        let positive = _mm512_set1_epi32(i32::MAX);
        // What packing into lanes has mixed is put in order: dword i of lane l is vector i's.
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        let mut facts = GradFacts::default();
        for i in 0..BLOCK / 64 {
            let x: [__m512; 4] = std::array::from_fn(|j| _mm512_loadu_ps(x.as_ptr().add(64 * i + 16 * j)));
            let bits = x.map(|x| _mm512_and_si512(_mm512_castps_si512(x), positive));
            let scales = [0, 1].map(|half| {
                scale_of_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(bits[2 * half], bits[2 * half + 1])))
            });
            let q: [__m512i; 4] =
                std::array::from_fn(|j| _mm512_cvtps_epi32(_mm512_mul_ps(x[j], _mm512_set1_ps(scales[j / 2].1))));
            let bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
            let bytes = _mm512_permutexvar_epi32(order, bytes);
            _mm512_storeu_si512(quants.as_mut_ptr().add(64 * i).cast(), bytes);
            let sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes);
            for (half, (scale, _)) in scales.into_iter().enumerate() {
                let own = _mm512_mask_reduce_add_epi32(0xff << (8 * half), sums);
                facts.set(2 * i + half, scale, own);
            }
        }
        facts
    }
}
