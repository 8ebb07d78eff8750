//! Attention on AVX2: the portable tile, compiled for 256-bit registers.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx2` stands for, and that the unit, group, tile or
//! rows it is given exist in the weight, the cache and the activations it is given.

use std::ops::Range;

use crate::{
    attention::{Partial, Tile},
    kv::KvForm,
};

/// The tile's results over `chunks`.
///
/// # Safety
/// The machine has what `Isa::Avx2` stands for.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn span<F: KvForm>(tile: &Tile<'_, F>, chunks: Range<usize>, out: &mut Partial<'_>) {
    crate::portable::attention::span(tile, chunks, out);
}
