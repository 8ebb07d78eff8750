//! A tile of a product of f32 matrices on AVX2: the portable form, whose registers the compiler fills.

use crate::{
    portable,
    product::{Sums, Tile},
};

/// The tile's sums for its first `count` rows.
///
/// # Safety
/// The machine has what `Isa::Avx2` stands for.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn sum(tile: &Tile<'_>, count: usize, sums: &mut Sums) {
    portable::product::sum(tile, count, sums);
}
