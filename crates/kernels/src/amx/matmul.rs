//! Matrix products on AMX: tiles of 16 tokens by 16 output rows.
//!
//! Quantised weights: a group's units lie as a tile wants its right side once their quants are spread to signed bytes, which is
//! done once for all tokens of a panel. Integer sums leave the tiles for each unit, and go on as with AVX-512 in the same
//! order, so that a token has the bits that the kernels there give it; what is less than a whole tile of tokens, they compute.
//! A unit's sums are read two units later, when the tiles have written them.
//!
//! BF16: sums stay in the tiles. Each 32 k-values are summed by themselves, even and odd ones apart, and then added; so any
//! number of tokens goes this way.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Amx` stands for, and that the group and the rows it is given
//! exist in the weight and the activations it is given.

use std::{arch::x86_64::*, mem::MaybeUninit, ops::Range};

use half::bf16;
use qwenkit_tensor::DType;

use super::tile::{self, ROW_BYTES, ROWS, Room, Tiles};
use crate::{
    activations::UnitFacts,
    avx512::{self, unit},
    layout::{GROUP_ROWS, Layout, UNIT, offset_log2},
    matmul::Task,
    prefetch,
};

/// Bytes of activations that are gone through before the next group of rows: a quarter of the 2 MiB second-level cache that
/// machines with AMX have.
const PANEL_BYTES: usize = 512 << 10;
/// Units whose quants are spread at once: with their factors 24 KiB, half of the first-level cache.
const BLOCK_UNITS: usize = 32;
/// Bytes of a unit's spread quants.
const UNIT_BYTES: usize = UNIT * GROUP_ROWS;
/// Sums that tiles are ahead of the registers.
const AHEAD: usize = 2;
/// Units of activations that are asked into the first-level cache ahead: tiles wait for what they load.
const NEAR_UNITS: usize = 6;
/// Tiles of sums, used in turn.
const SLOTS: usize = 4;
/// k-values of a bf16 tile's row.
const BF16_K: usize = ROW_BYTES / 2;
/// Such steps over which sums stay in tiles before the next tokens come: two groups' are 16 KiB, and 32 tokens' as much, in a
/// first-level cache of 48.
const BF16_RUN: usize = 8;

/// Computes the task's groups for all its rows.
///
/// # Safety
/// The machine has what `Isa::Amx` stands for.
pub(crate) unsafe fn run(task: &Task<'_>) {
    macro_rules! kernels {
        ($($dtype:ident)*) => {
            match task.weight.dtype() {
                // SAFETY: the caller's promise.
                $(DType::$dtype if task.x.rows >= ROWS => unsafe { quantized_all::<{ DType::$dtype as usize }>(task) },)*
                // SAFETY: the caller's promise.
                DType::BF16 => unsafe { bf16_all(task) },
                // SAFETY: the caller's promise, and AMX is more than AVX-512.
                _ => unsafe { avx512::matmul::run(task) },
            }
        };
    }
    kernels!(Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS);
}

/// Some units of a group, for many tokens. A *part* is a unit, or half of one where halves have scales of their own.
#[repr(C, align(64))]
struct Block {
    quants: [[u8; UNIT_BYTES]; BLOCK_UNITS],
    scales: [[f32; GROUP_ROWS]; 2 * BLOCK_UNITS],
    addends: [[f32; GROUP_ROWS]; 2 * BLOCK_UNITS],
}

/// Parts of a unit.
const fn parts_of(layout: &Layout) -> usize {
    if layout.has_half_scales() { 2 } else { 1 }
}

unsafe fn quantized_all<const D: usize>(task: &Task<'_>) {
    let part_bytes = UNIT / const { parts_of(&Layout::at::<D>()) };
    let (sums, left, right) = ((ROWS, ROW_BYTES), (ROWS, part_bytes), (part_bytes / 4, ROW_BYTES));
    // SAFETY: the caller's promise.
    unsafe {
        let _tiles = Tiles::new([sums, sums, sums, sums, left, left, right, right]);
        let mut block = MaybeUninit::<Block>::uninit();
        task.panels(PANEL_BYTES, ROWS, |g, tokens| quantized::<D>(task, g, tokens, block.as_mut_ptr()));
    }
}

/// One group of a quantised weight by `tokens`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,avx2")]
unsafe fn quantized<const D: usize>(task: &Task<'_>, g: usize, tokens: Range<usize>, block: *mut Block) {
    let units = task.x.cols / UNIT;
    let whole = tokens.start..tokens.end - tokens.len() % ROWS;
    // SAFETY: each tile stays inside `tokens`; a block holds the units that its sums are over.
    unsafe {
        if !whole.is_empty() {
            for first in (0..units).step_by(BLOCK_UNITS) {
                let of_block = first..(first + BLOCK_UNITS).min(units);
                spread::<D>(task.group(g), of_block.clone(), block);
                for t in whole.clone().step_by(ROWS) {
                    add_block::<D>(task, g, t, of_block.clone(), block);
                }
            }
        }
        avx512::matmul::quantized::<D>(task, g, whole.end..tokens.end);
    }
}

/// Spreads `units` of a group: quants as the signed integers that they stand for.
#[inline(always)]
unsafe fn spread<const D: usize>(group: &[u8], units: Range<usize>, block: *mut Block) {
    let layout = const { Layout::at::<D>() };
    let offset = const { offset_log2(Layout::at::<D>().encoding) }.map_or(0, |log2| (1u8 << log2) as i8);
    // SAFETY: the group has these units, and the block has room for them.
    unsafe {
        let group = group.as_ptr();
        let offset = _mm512_set1_epi8(offset);
        for (i, u) in units.enumerate() {
            let quants = unit::quants::<D>(group.add(layout.quants_at(u)));
            let to = (&raw mut (*block).quants[i]).cast::<__m512i>();
            for s in 0..8 {
                _mm512_store_si512(to.add(s), _mm512_sub_epi8(quants[s], offset));
            }
            let factors = unit::factors::<D>(&unit::head::<D>(group, u), group, u);
            let parts = parts_of(&layout);
            for part in 0..parts {
                _mm512_store_ps((&raw mut (*block).scales[parts * i + part]).cast(), factors.scale[part]);
                if layout.has_addend() {
                    _mm512_store_ps((&raw mut (*block).addends[parts * i + part]).cast(), factors.addend[part]);
                }
            }
        }
    }
}

/// Adds the block's `units` to the results of group `g` for tokens `t..t + 16`, or begins them.
#[inline(always)]
unsafe fn add_block<const D: usize>(task: &Task<'_>, g: usize, t: usize, units: Range<usize>, block: *const Block) {
    let layout = const { Layout::at::<D>() };
    let parts = const { parts_of(&Layout::at::<D>()) };
    let (cols, rows) = (task.x.cols, task.weight.group_rows(g));
    let mask = (u32::MAX >> (32 - rows)) as u16;
    let total = units.len() * parts;
    debug_assert!(t + ROWS <= task.x.rows && task.x.quants.len() >= (t + ROWS) * cols);
    // SAFETY: tokens `t..t + 16` are a tile of the activations, which has these units; parts of a block follow each other in
    // memory. This thread alone computes group `g`, and the mask keeps to its rows.
    unsafe {
        let x = task.x.quants.as_ptr().add(t * cols + units.start * ROWS * UNIT);
        let facts = task.x.facts.as_ptr().add(t * (cols / UNIT) + units.start * ROWS);
        let (quants, scales, addends) =
            ((*block).quants.as_ptr().cast::<u8>(), (*block).scales.as_ptr(), (*block).addends.as_ptr());
        let mut room = MaybeUninit::<[Room<i32>; SLOTS]>::uninit();
        let room = room.as_mut_ptr().cast::<Room<i32>>();
        let results: [*mut f32; ROWS] = std::array::from_fn(|c| task.results(g, t + c).as_mut_ptr());
        // What tiles write can be read when all that was written before it is in cache, so results should not wait for memory.
        for c in t + ROWS..(t + 2 * ROWS).min(task.x.rows) {
            prefetch::to_write(task.results(g, c).as_ptr());
        }
        let mut acc = [_mm512_setzero_ps(); ROWS];
        if units.start > 0 {
            for c in 0..ROWS {
                acc[c] = _mm512_maskz_loadu_ps(mask, results[c]);
            }
        }
        // Part `p` into the tile and the room of its slot.
        macro_rules! start {
            ($p:expr, $slot:literal) => {
                let p = $p;
                tile::load::<{ 6 + $slot % 2 }>(quants.add(p * (UNIT_BYTES / parts)), ROW_BYTES);
                if p % parts == 0 {
                    let at = p / parts + NEAR_UNITS;
                    prefetch::near(x.wrapping_add(at * ROWS * UNIT).cast(), ROWS * UNIT);
                    prefetch::near(facts.wrapping_add(at * ROWS).cast(), ROWS * size_of::<UnitFacts>());
                }
                let of_unit = x.add(p / parts * ROWS * UNIT + p % parts * (UNIT / 2));
                tile::load::<{ 4 + $slot % 2 }>(of_unit.cast(), UNIT);
                tile::zero::<$slot>();
                tile::add_bytes::<$slot, { 4 + $slot % 2 }, { 6 + $slot % 2 }>();
                tile::store::<$slot>(room.add($slot).cast(), ROW_BYTES);
            };
        }
        let mut p = 0;
        macro_rules! step {
            ($slot:literal, $ahead:literal) => {
                if p < total {
                    if p + AHEAD < total {
                        start!(p + AHEAD, $ahead);
                    }
                    let scale = _mm512_load_ps(scales.add(p).cast());
                    let which = if parts == 1 { 0 } else { 1 + $slot % 2 };
                    let facts = facts.add(p / parts * ROWS);
                    let sums = room.add($slot).cast::<__m512i>();
                    for c in 0..ROWS {
                        let facts = facts.add(c);
                        let scale = _mm512_mul_ps(scale, _mm512_set1_ps((*facts).scale));
                        let sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums.add(c)));
                        acc[c] = _mm512_fmadd_ps(sum, scale, acc[c]);
                        if layout.has_addend() {
                            let addend = _mm512_load_ps(addends.add(p).cast());
                            acc[c] = _mm512_fmadd_ps(addend, _mm512_set1_ps((*facts).sum[which]), acc[c]);
                        }
                    }
                    p += 1;
                }
            };
        }
        start!(0, 0);
        if total > 1 {
            start!(1, 1);
        }
        while p < total {
            step!(0, 2);
            step!(1, 3);
            step!(2, 0);
            step!(3, 1);
        }
        for c in 0..ROWS {
            _mm512_mask_storeu_ps(results[c], mask, acc[c]);
        }
    }
}

/// All groups of a BF16 weight by all tokens.
unsafe fn bf16_all(task: &Task<'_>) {
    let (rows, right) = (task.x.rows, (ROWS, ROW_BYTES));
    let whole = rows - rows % ROWS;
    let pairs = |f: &dyn Fn(usize, usize)| {
        for g in task.groups.clone().step_by(2) {
            f(g, (task.groups.end - g).min(2));
        }
    };
    let steps = task.x.cols.next_multiple_of(2) / BF16_K;
    // SAFETY: the caller's promise; tiles are as high as there are tokens for them.
    unsafe {
        if whole > 0 {
            let _tiles = Tiles::new([right; 8]);
            let panel = (PANEL_BYTES / 2 / task.x.cols.max(1) / (2 * ROWS) * 2 * ROWS).max(2 * ROWS);
            for first in (0..whole).step_by(panel) {
                pairs(&|g, groups| {
                    // Sums wait where the results go, if they have room there.
                    let is_whole = task.weight.group_rows(g + groups - 1) == GROUP_ROWS;
                    let run = if is_whole { steps.div_ceil(steps.div_ceil(BF16_RUN).max(1)) } else { steps };
                    for from in (0..steps.max(1)).step_by(run.max(1)) {
                        let run = from..(from + run).min(steps);
                        for t in (first..(first + panel).min(whole)).step_by(2 * ROWS) {
                            match ((whole - t).min(2 * ROWS) / ROWS, groups) {
                                (2, 2) => bf16_tile::<2, 2>(task, g, t, ROWS, run.clone()),
                                (2, _) => bf16_tile::<2, 1>(task, g, t, ROWS, run.clone()),
                                (_, 2) => bf16_tile::<1, 2>(task, g, t, ROWS, run.clone()),
                                _ => bf16_tile::<1, 1>(task, g, t, ROWS, run.clone()),
                            }
                        }
                    }
                });
            }
        }
        let rest = rows - whole;
        if rest > 0 {
            let low = (rest, ROW_BYTES);
            let _tiles = Tiles::new([low, low, low, low, low, low, right, right]);
            pairs(&|g, groups| match groups {
                2 => bf16_tile::<1, 2>(task, g, whole, rest, 0..steps),
                _ => bf16_tile::<1, 1>(task, g, whole, rest, 0..steps),
            });
        }
    }
}

/// `G` groups from `g` by `T` tiles of `height` tokens each, from `t`, over the steps of `run`: tiles 0 to 3 are their sums, which
/// begin with step 0 and otherwise go on, 4 and 5 the tokens, 6 and 7 the groups. The last run takes what is behind the last step.
#[inline(always)]
unsafe fn bf16_tile<const T: usize, const G: usize>(
    task: &Task<'_>,
    g: usize,
    t: usize,
    height: usize,
    run: Range<usize>,
) {
    let cols = task.x.cols.next_multiple_of(2);
    let whole = cols / BF16_K;
    let rest = if run.end == whole { cols % BF16_K } else { 0 };
    // SAFETY: groups and tokens exist; what is behind the last whole step is copied, with zeros behind it.
    unsafe {
        let x: [*const bf16; T] = std::array::from_fn(|i| task.x.bf16.as_ptr().add((t + i * ROWS) * cols));
        let weights: [*const u8; G] = std::array::from_fn(|j| task.group(g + j).as_ptr());
        let ahead = task.asks_ahead();
        if run.start == 0 {
            tile::zero::<0>();
            tile::zero::<1>();
            tile::zero::<2>();
            tile::zero::<3>();
        } else {
            let step = 4 * task.out_step;
            let sums = |g, t| task.results(g, t).as_ptr().cast::<u8>();
            tile::load::<0>(sums(g, t), step);
            if G > 1 {
                tile::load::<1>(sums(g + 1, t), step);
            }
            if T > 1 {
                tile::load::<2>(sums(g, t + ROWS), step);
                if G > 1 {
                    tile::load::<3>(sums(g + 1, t + ROWS), step);
                }
            }
        }
        let add = |x: [*const u8; T], x_step: usize, weights: [*const u8; G]| {
            tile::load::<6>(weights[0], ROW_BYTES);
            tile::load::<4>(x[0], x_step);
            tile::add_bf16::<0, 4, 6>();
            if G > 1 {
                tile::load::<7>(weights[G - 1], ROW_BYTES);
                tile::add_bf16::<1, 4, 7>();
            }
            if T > 1 {
                tile::load::<5>(x[T - 1], x_step);
                tile::add_bf16::<2, 5, 6>();
                if G > 1 {
                    tile::add_bf16::<3, 5, 7>();
                }
            }
        };
        for s in run {
            let weights = weights.map(|w| w.add(s * ROWS * ROW_BYTES));
            if ahead {
                weights.iter().for_each(|w| prefetch::ahead(*w, ROWS * ROW_BYTES));
            }
            add(x.map(|x| x.add(s * BF16_K).cast()), 2 * cols, weights);
        }
        if rest > 0 {
            let mut x_rest = [const { Room([[0u32; ROWS]; ROWS]) }; T];
            let mut w_rest = [const { Room([[0u32; ROWS]; ROWS]) }; G];
            for (room, x) in x_rest.iter_mut().zip(x) {
                for (r, row) in room.0.iter_mut().take(height).enumerate() {
                    let from = x.add(r * cols + whole * BF16_K);
                    std::ptr::copy_nonoverlapping(from.cast::<u8>(), row.as_mut_ptr().cast(), 2 * rest);
                }
            }
            for (room, w) in w_rest.iter_mut().zip(weights) {
                let from = w.add(whole * ROWS * ROW_BYTES);
                std::ptr::copy_nonoverlapping(from, (&raw mut room.0).cast(), rest / 2 * ROW_BYTES);
            }
            let x: [_; T] = std::array::from_fn(|i| (&raw const x_rest[i].0).cast());
            add(x, ROW_BYTES, std::array::from_fn(|j| (&raw const w_rest[j].0).cast()));
        }
        bf16_store::<0>(task, g, t, height);
        if G > 1 {
            bf16_store::<1>(task, g + 1, t, height);
        }
        if T > 1 {
            bf16_store::<2>(task, g, t + ROWS, height);
            if G > 1 {
                bf16_store::<3>(task, g + 1, t + ROWS, height);
            }
        }
    }
}

/// Writes tile `C` as the results of group `g` for tokens `t..t + height`.
#[inline(always)]
unsafe fn bf16_store<const C: usize>(task: &Task<'_>, g: usize, t: usize, height: usize) {
    // SAFETY: this thread alone computes group `g`; where the group has fewer rows, only these are copied.
    unsafe {
        if task.weight.group_rows(g) == GROUP_ROWS {
            return tile::store::<C>(task.results(g, t).as_mut_ptr().cast(), 4 * task.out_step);
        }
        let mut room = Room([[0f32; ROWS]; ROWS]);
        tile::store::<C>((&raw mut room.0).cast(), ROW_BYTES);
        for (c, sums) in room.0.iter().take(height).enumerate() {
            let out = task.results(g, t + c);
            out.copy_from_slice(&sums[..out.len()]);
        }
    }
}
