//! A tile of a product of f32 matrices in plain Rust.

use crate::product::{Sums, TILE_COLS, Tile};

/// The tile's sums for its first `count` rows.
#[inline(always)]
pub(crate) fn sum(tile: &Tile<'_>, count: usize, sums: &mut Sums) {
    for (i, sums) in sums[..count].iter_mut().enumerate() {
        let mut own = [0.0f32; TILE_COLS];
        for k in 0..tile.steps {
            let a = tile.a[i * tile.a_row + k * tile.a_k];
            let b = &tile.b[k * tile.b_k..][..TILE_COLS];
            own.iter_mut().zip(b).for_each(|(sum, b)| *sum = a.mul_add(*b, *sum));
        }
        *sums = own;
    }
}
