//! Sixteen blocks side by side: element e of all of them in one register or two.

use super::Row;
use super::fit::Levels;

/// Blocks of a tile. Sixteen f32 fill one 512-bit register or two of 256 bits, and a super-block has 8 or 16 sub-blocks.
pub(super) const LANES: usize = 16;

/// One number of each block.
pub(super) type Lanes = [f32; LANES];

/// Sixteen blocks of N elements.
#[repr(align(64))]
pub(super) struct Tile<const N: usize> {
    /// Values: (N, 16)
    pub(super) x: [Lanes; N],
    /// What an error in them counts: (N, 16)
    pub(super) w: [Lanes; N],
}

impl<const N: usize> Tile<N> {
    pub(super) fn new() -> Self {
        Tile { x: [[0.0; LANES]; N], w: [[1.0; LANES]; N] }
    }

    /// Tile `i` of a row. Lanes behind the row's end hold zeros.
    #[inline(always)]
    pub(super) fn load(&mut self, row: &Row<'_>, i: usize) {
        let start = i * LANES * N;
        let end = (start + LANES * N).min(row.values.len());
        let lanes = (end - start) / N;
        for lane in 0..LANES {
            if lane >= lanes {
                for (x, w) in self.x.iter_mut().zip(&mut self.w) {
                    (x[lane], w[lane]) = (0.0, 1.0);
                }
                continue;
            }
            let at = start + lane * N;
            let values = &row.values[at..at + N];
            for (x, &value) in self.x.iter_mut().zip(values) {
                x[lane] = value;
            }
            match row.importance {
                Some(importance) => {
                    for (w, &importance) in self.w.iter_mut().zip(&importance[at..at + N]) {
                        w[lane] = importance;
                    }
                }
                None => self.w.iter_mut().for_each(|w| w[lane] = 1.0),
            }
        }
        let mut total = [0.0; LANES];
        for (w, x) in self.w.iter_mut().zip(&self.x) {
            for l in 0..LANES {
                w[l] *= (row.sigma2 + x[l] * x[l]).sqrt();
                total[l] += w[l];
            }
        }
        // Weights that are all nothing would leave a block undecided.
        for (lane, total) in total.iter().enumerate() {
            if !(*total > 0.0 && total.is_finite()) {
                self.w.iter_mut().for_each(|w| w[lane] = 1.0);
            }
        }
    }

    /// The nearest level of every element, where a block's values are `d * level + min`.
    #[inline(always)]
    pub(super) fn levels<const CODEBOOK: bool>(&self, levels: Levels, d: &Lanes, min: &Lanes) -> [Lanes; N] {
        let inverse = inverse(d);
        let mut q = [[0.0; LANES]; N];
        for (q, x) in q.iter_mut().zip(&self.x) {
            for l in 0..LANES {
                q[l] = levels.nearest::<CODEBOOK>((x[l] - min[l]) * inverse[l]);
            }
        }
        q
    }

    /// Of each block, the weighted sum of squared errors with the nearest levels.
    #[inline(always)]
    pub(super) fn error<const CODEBOOK: bool>(&self, levels: Levels, d: &Lanes, min: &Lanes) -> Lanes {
        let inverse = inverse(d);
        let mut error = [0.0; LANES];
        for (x, w) in self.x.iter().zip(&self.w) {
            for l in 0..LANES {
                let q = levels.nearest::<CODEBOOK>((x[l] - min[l]) * inverse[l]);
                let off = x[l] - (d[l] * q + min[l]);
                error[l] += w[l] * off * off;
            }
        }
        error
    }
}

/// 1 / d, and 0 where d is 0.
#[inline(always)]
pub(super) fn inverse(d: &Lanes) -> Lanes {
    let mut inverse = [0.0; LANES];
    for l in 0..LANES {
        inverse[l] = if d[l] != 0.0 { 1.0 / d[l] } else { 0.0 };
    }
    inverse
}
