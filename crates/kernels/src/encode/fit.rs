//! The best scale, or scale and minimum, of single blocks: a grid of starts, then least squares in turns with rounding.

use super::tile::{LANES, Lanes, Tile, inverse};
use crate::blocks::IQ4_VALUES;

/// Turns of rounding and least squares after the grid; later ones change nothing any more.
const TURNS: usize = 2;

/// Distance of the grid's starts, in levels.
const GRID_STEP: f32 = 0.25;
/// Starts on either side of the plain one, so that peaks are cut by up to a level where that serves the rest.
const GRID_SIDE: i32 = 4;

/// The levels that an element can have.
#[derive(Clone, Copy)]
pub(super) struct Levels {
    pub(super) low: f32,
    pub(super) high: f32,
}

/// Halfway between neighbours of the codebook, and how far apart they are.
const CODEBOOK_STEPS: [(f32, f32); 15] = {
    let mut steps = [(0.0, 0.0); 15];
    let mut i = 0;
    while i < 15 {
        let (a, b) = (IQ4_VALUES[i] as f32, IQ4_VALUES[i + 1] as f32);
        steps[i] = ((a + b) / 2.0, b - a);
        i += 1;
    }
    steps
};

impl Levels {
    /// Those of the IQ4 types.
    pub(super) const CODEBOOK: Levels = Levels { low: -127.0, high: 113.0 };

    /// The level nearest to `x`.
    #[inline(always)]
    pub(super) fn nearest<const CODEBOOK: bool>(self, x: f32) -> f32 {
        if CODEBOOK {
            let mut level = IQ4_VALUES[0] as f32;
            for (middle, step) in CODEBOOK_STEPS {
                level += if x > middle { step } else { 0.0 };
            }
            return level;
        }
        let x = if x > self.low { x } else { self.low };
        let x = if x < self.high { x } else { self.high };
        round(x)
    }

    /// A level as it stands in a block.
    #[inline(always)]
    pub(super) fn stored<const CODEBOOK: bool>(self, level: f32) -> u8 {
        if CODEBOOK {
            return CODEBOOK_STEPS.iter().filter(|(middle, _)| level > *middle).count() as u8;
        }
        // Signed levels are stored with the type's offset, a power of two: -8 of 4 bits, -128 of 8.
        let offset = if self.low == 0.0 { 0.0 } else { self.high + 1.0 };
        (level + offset) as u8
    }
}

/// To the nearest integer, ties to even, for what is far below 2^22: without it the sum has no room for a fraction.
#[inline(always)]
pub(super) fn round(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

/// Of each block, the scale `d` with which levels come nearest.
#[inline(always)]
pub(super) fn fit_scale<const N: usize, const CODEBOOK: bool>(tile: &Tile<N>, levels: Levels) -> Lanes {
    let mut peak = [0.0_f32; LANES];
    for x in &tile.x {
        for l in 0..LANES {
            peak[l] = if x[l].abs() > peak[l].abs() { x[l] } else { peak[l] };
        }
    }
    let to_peak = inverse(&peak);
    let mut best = BestScale { d: [0.0; LANES], gain: [0.0; LANES] };
    // The peak is put on the lowest or on the highest level, or near it.
    let step = if CODEBOOK { 16.0 * GRID_STEP } else { GRID_STEP };
    for end in [levels.low, levels.high] {
        // Of a fine type whose ends are alike one side and few starts are enough.
        let fine = levels.high > 100.0 && !CODEBOOK;
        let side = if fine { 1 } else { GRID_SIDE };
        for k in -side..=side {
            let target = end + k as f32 * step;
            let mut inverse = [0.0; LANES];
            for l in 0..LANES {
                inverse[l] = target * to_peak[l];
            }
            best.consider::<N, CODEBOOK>(tile, levels, &inverse);
        }
        if fine {
            break;
        }
    }
    for _ in 0..TURNS {
        best.consider::<N, CODEBOOK>(tile, levels, &inverse(&best.d));
    }
    best.d
}

/// The best scale of each block so far. A type of its own rather than a closure: closures are compiled apart, without the
/// wider registers of what calls them.
struct BestScale {
    d: Lanes,
    /// The error is (sum of w x x) - gain.
    gain: Lanes,
}

impl BestScale {
    #[inline(always)]
    fn consider<const N: usize, const CODEBOOK: bool>(&mut self, tile: &Tile<N>, levels: Levels, inverse: &Lanes) {
        let (sxq, sqq) = products::<N, CODEBOOK>(tile, levels, inverse);
        for l in 0..LANES {
            let to_sqq = if sqq[l] > 0.0 { 1.0 / sqq[l] } else { 0.0 };
            let d = sxq[l] * to_sqq;
            let gain = sxq[l] * d;
            let better = gain > self.gain[l];
            self.d[l] = if better { d } else { self.d[l] };
            self.gain[l] = if better { gain } else { self.gain[l] };
        }
    }
}

/// Of each block, the sums of `w x q` and `w q q` with the levels `q` nearest to `x * inverse`.
#[inline(always)]
fn products<const N: usize, const CODEBOOK: bool>(tile: &Tile<N>, levels: Levels, inverse: &Lanes) -> (Lanes, Lanes) {
    let (mut sxq, mut sqq) = ([0.0; LANES], [0.0; LANES]);
    for (x, w) in tile.x.iter().zip(&tile.w) {
        for l in 0..LANES {
            let q = levels.nearest::<CODEBOOK>(x[l] * inverse[l]);
            let wq = w[l] * q;
            sxq[l] += wq * x[l];
            sqq[l] += wq * q;
        }
    }
    (sxq, sqq)
}

/// Blocks whose values are `d * level + min`.
pub(super) struct Affine {
    pub(super) d: Lanes,
    pub(super) min: Lanes,
}

/// Of each block, scale and minimum with which levels from 0 to `top` come nearest; with `below_zero` the minimum is 0 or
/// less, as the K types store it.
#[inline(always)]
pub(super) fn fit_affine<const N: usize>(tile: &Tile<N>, top: f32, below_zero: bool) -> Affine {
    let (mut low, mut high) = (tile.x[0], tile.x[0]);
    let (mut sw, mut sx, mut sxx) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    for (x, w) in tile.x.iter().zip(&tile.w) {
        for l in 0..LANES {
            low[l] = if x[l] < low[l] { x[l] } else { low[l] };
            high[l] = if x[l] > high[l] { x[l] } else { high[l] };
            sw[l] += w[l];
            sx[l] += w[l] * x[l];
            sxx[l] += w[l] * x[l] * x[l];
        }
    }
    let mut range = [0.0; LANES];
    for l in 0..LANES {
        low[l] = if below_zero && low[l] > 0.0 { 0.0 } else { low[l] };
        range[l] = high[l] - low[l];
    }
    let to_range = inverse(&range);
    // Where all values are one: that one as the minimum, or with minimum 0 as the highest level.
    let mut best = BestAffine { d: [0.0; LANES], min: low, error: [f32::INFINITY; LANES] };
    let sums = Sums { sw, sx, sxx };
    for k in -GRID_SIDE..=GRID_SIDE {
        let target = top + k as f32 * GRID_STEP;
        let mut inverse = [0.0; LANES];
        for l in 0..LANES {
            inverse[l] = target * to_range[l];
        }
        best.consider(tile, &sums, top, below_zero, (&inverse, &low));
    }
    for _ in 0..TURNS {
        let start = best.min;
        best.consider(tile, &sums, top, below_zero, (&inverse(&best.d), &start));
    }
    let BestAffine { mut d, mut min, .. } = best;
    for l in 0..LANES {
        // Equal values have no range, and nothing above was tried on them.
        if range[l] == 0.0 {
            let stored_as_min = !below_zero || low[l] <= 0.0;
            d[l] = if stored_as_min { 0.0 } else { high[l] / top };
            min[l] = if stored_as_min { low[l] } else { 0.0 };
        }
    }
    Affine { d, min }
}

/// Of each block, the sums of w, `w x` and `w x x`.
struct Sums {
    sw: Lanes,
    sx: Lanes,
    sxx: Lanes,
}

/// The best scale and minimum of each block so far; see `BestScale`.
struct BestAffine {
    d: Lanes,
    min: Lanes,
    error: Lanes,
}

impl BestAffine {
    /// Levels are those nearest to `(x - start) * inverse`.
    #[inline(always)]
    fn consider<const N: usize>(
        &mut self,
        tile: &Tile<N>,
        Sums { sw, sx, sxx }: &Sums,
        top: f32,
        below_zero: bool,
        (inverse, start): (&Lanes, &Lanes),
    ) {
        let (mut sq, mut sqq, mut sxq) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for (x, w) in tile.x.iter().zip(&tile.w) {
            for l in 0..LANES {
                let q = Levels { low: 0.0, high: top }.nearest::<false>((x[l] - start[l]) * inverse[l]);
                let wq = w[l] * q;
                sq[l] += wq;
                sqq[l] += wq * q;
                sxq[l] += wq * x[l];
            }
        }
        for l in 0..LANES {
            let determinant = sw[l] * sqq[l] - sq[l] * sq[l];
            let solvable = determinant > 1e-7 * sw[l] * sqq[l];
            let to_determinant = if solvable { 1.0 / determinant } else { 0.0 };
            let mut new_d = (sw[l] * sxq[l] - sx[l] * sq[l]) * to_determinant;
            let mut new_min = (sqq[l] * sx[l] - sq[l] * sxq[l]) * to_determinant;
            let above = below_zero && (new_min > 0.0 || !solvable);
            new_d = if above { sxq[l] / sqq[l] } else { new_d };
            new_min = if above { 0.0 } else { new_min };
            let usable = (solvable || above) && sqq[l] > 0.0;
            let new_error = sxx[l]
                + new_d * (new_d * sqq[l] - 2.0 * sxq[l])
                + new_min * (new_min * sw[l] - 2.0 * sx[l] + 2.0 * new_d * sq[l]);
            let better = usable && new_d > 0.0 && new_error < self.error[l];
            self.d[l] = if better { new_d } else { self.d[l] };
            self.min[l] = if better { new_min } else { self.min[l] };
            self.error[l] = if better { new_error } else { self.error[l] };
        }
    }
}
