//! Attention on AVX2: the portable tile, compiled for 256-bit registers.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx2` stands for, and that the unit, group, tile or
//! rows it is given exist in the weight, the cache and the activations it is given.

use crate::{attention::Tile, kv::KvElement};

/// Results of the tile's queries: out (queries, K).
///
/// # Safety
/// The machine has what `Isa::Avx2` stands for.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn tile<E: KvElement>(tile: &Tile<'_, E>, out: &mut [f32]) {
    crate::portable::attention::tile(tile, out);
}
