//! Asking memory for weights before they are needed: what a product of few tokens waits for.
//!
//! A core can have some two dozen lines on their way to its first-level cache, which at DRAM's latency is half of what one
//! core can read; on their way to the second level it can have more. So lines are asked for into the second level, and
//! far ahead. Zen 5 fetches much by itself, and more when lines are asked for into the first level and less far ahead; as data
//! that is not used again they leave the second level to the activations. Measured on one and two threads: docs/LOG.md.

use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_NTA, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};

use crate::{isa::IS_ZEN5, weight::Weight};

/// How far ahead; weights follow each other in memory in the order of their use, so that looking past the end of one
/// matrix is looking into the next.
const DISTANCE_BYTES: usize = 32 << 10;
/// The same on Zen 5.
const ZEN5_DISTANCE_BYTES: usize = 8 << 10;
/// Of a product that does not follow the one before it in memory, what is asked for beforehand.
const START_BYTES: usize = 16 << 10;
/// Tokens up to which a product waits for memory rather than for arithmetic.
pub(crate) const TOKENS_MAX: usize = 8;

/// Asks for the `bytes` that lie the distance after `start`.
#[inline(always)]
pub(crate) fn ahead(start: *const u8, bytes: usize) {
    match *IS_ZEN5 {
        true => hint::<_MM_HINT_NTA>(start.wrapping_add(ZEN5_DISTANCE_BYTES), bytes),
        false => hint::<_MM_HINT_T1>(start.wrapping_add(DISTANCE_BYTES), bytes),
    }
}

/// Asks for `bytes` from `start` on into the first-level cache.
#[inline(always)]
pub(crate) fn near(start: *const u8, bytes: usize) {
    hint::<_MM_HINT_T0>(start, bytes);
}

#[inline(always)]
fn hint<const HINT: i32>(start: *const u8, bytes: usize) {
    for at in (0..bytes).step_by(64) {
        // SAFETY: a prefetch reads nothing that the program could see, and faults on no address.
        unsafe { _mm_prefetch::<HINT>(start.wrapping_add(at).cast()) }
    }
}

/// Asks for the line at `start` in order to write it.
#[inline(always)]
pub(crate) fn to_write(start: *const f32) {
    // SAFETY: as in `hint`.
    unsafe { _mm_prefetch::<_MM_HINT_ET0>(start.cast()) }
}

/// Asks for all of `bytes`.
#[inline(always)]
pub(crate) fn all(bytes: &[u8]) {
    hint::<_MM_HINT_T1>(bytes.as_ptr(), bytes.len());
}

/// Asks for the first of the memory of `weight` from group `group` on, before what is computed now has ended: its prefetches
/// do not know where the next product's weights lie. `rows` are that product's.
pub(crate) fn start_of(weight: &Weight, group: usize, rows: usize) {
    if rows > TOKENS_MAX || weight.in_planes() {
        return;
    }
    let of_group = weight.group(group);
    all(&of_group[..START_BYTES.min(of_group.len())]);
}
