//! Super-blocks of 256: sub-blocks with whole-number scales over one or two common factors.
//!
//! First every sub-block alone, then the common factor that the largest scale asks for, then for each sub-block the whole
//! numbers around its own scale with which its levels come nearest, then the common factors anew by least squares over all
//! 256. What is kept is what makes the error smaller, measured with the numbers as they are stored.

use half::f16;
use qwenkit_tensor::DType;

use super::Row;
use super::fit::{Affine, Levels, fit_affine, fit_scale, round};
use super::join::join;
use super::tile::{LANES, Lanes, Tile};
use crate::blocks::Split;

/// Turns of choosing whole numbers and refitting factors.
const TURNS: usize = 1;

/// A tile's sub-blocks as they are stored: values are `d * scale * level - dmin * min`.
#[derive(Clone, Copy)]
struct Stored {
    /// Common factors, the same in all lanes of a super-block.
    d: Lanes,
    dmin: Lanes,
    /// Whole numbers of each sub-block.
    scale: Lanes,
    min: Lanes,
}

impl Stored {
    #[inline(always)]
    fn factors(&self) -> (Lanes, Lanes) {
        let (mut d, mut min) = ([0.0; LANES], [0.0; LANES]);
        for l in 0..LANES {
            d[l] = self.d[l] * self.scale[l];
            min[l] = -(self.dmin[l] * self.min[l]);
        }
        (d, min)
    }
}

/// Types with scales and minimums (Q2_K, Q4_K, Q5_K): levels 0 to `top`, whole numbers 0 to `limit`.
#[inline(always)]
pub(super) fn affine<const N: usize>(dtype: DType, row: &Row<'_>, top: f32, limit: f32, out: &mut [u8]) {
    let levels = Levels { low: 0.0, high: top };
    let mut tile = Tile::<N>::new();
    let group = 256 / N;
    for (i, out) in out.chunks_mut(LANES / group * dtype.block_bytes()).enumerate() {
        tile.load(row, i);
        let Affine { d, min } = fit_affine(&tile, top, true);
        let mut low = [0.0; LANES];
        (0..LANES).for_each(|l| low[l] = -min[l]);
        let mut stored = Stored {
            d: common(&d, group, limit),
            dmin: common(&low, group, limit),
            scale: [0.0; LANES],
            min: [0.0; LANES],
        };
        for l in 0..LANES {
            stored.scale[l] = whole(d[l], stored.d[l], 0.0, limit);
            stored.min[l] = whole(low[l], stored.dmin[l], 0.0, limit);
        }
        for _ in 0..TURNS {
            choose::<N, false>(&tile, levels, &mut stored, (0.0, limit), true);
            refit::<N, false>(&tile, levels, &mut stored, group);
        }
        choose::<N, false>(&tile, levels, &mut stored, (0.0, limit), true);
        write::<N, false>(dtype, &tile, levels, &stored, out);
    }
}

/// Types with scales alone (Q3_K, Q6_K, IQ4_XS): whole numbers from `-limit` to `limit - 1`.
#[inline(always)]
pub(super) fn scaled<const N: usize, const CODEBOOK: bool>(
    dtype: DType,
    row: &Row<'_>,
    levels: Levels,
    limit: f32,
    out: &mut [u8],
) {
    let mut tile = Tile::<N>::new();
    let group = 256 / N;
    for (i, out) in out.chunks_mut(LANES / group * dtype.block_bytes()).enumerate() {
        tile.load(row, i);
        let d = fit_scale::<N, CODEBOOK>(&tile, levels);
        let mut stored = Stored { d: [0.0; LANES], dmin: [0.0; LANES], scale: [0.0; LANES], min: [0.0; LANES] };
        for (lanes, stored) in d.chunks_exact(group).zip(stored.d.chunks_exact_mut(group)) {
            // The largest scale becomes -limit, the largest whole number there is.
            let peak = lanes.iter().copied().fold(0.0_f32, |a, b| if b.abs() > a.abs() { b } else { a });
            stored.fill(to_f16(-peak / limit));
        }
        for (l, &d) in d.iter().enumerate() {
            stored.scale[l] = whole(d, stored.d[l], -limit, limit - 1.0);
        }
        for _ in 0..TURNS {
            choose::<N, CODEBOOK>(&tile, levels, &mut stored, (-limit, limit - 1.0), false);
            refit::<N, CODEBOOK>(&tile, levels, &mut stored, group);
        }
        choose::<N, CODEBOOK>(&tile, levels, &mut stored, (-limit, limit - 1.0), false);
        write::<N, CODEBOOK>(dtype, &tile, levels, &stored, out);
    }
}

#[inline(always)]
fn to_f16(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

/// The factor with which the largest of a super-block's numbers becomes `limit`, in all of its lanes.
#[inline(always)]
fn common(numbers: &Lanes, group: usize, limit: f32) -> Lanes {
    let mut factors = [0.0; LANES];
    for (numbers, factors) in numbers.chunks_exact(group).zip(factors.chunks_exact_mut(group)) {
        factors.fill(to_f16(numbers.iter().copied().fold(0.0, f32::max) / limit));
    }
    factors
}

/// The whole number from `low` to `high` nearest to `x / unit`.
#[inline(always)]
fn whole(x: f32, unit: f32, low: f32, high: f32) -> f32 {
    let x = if unit != 0.0 { x / unit } else { 0.0 };
    let x = if x > low { x } else { low };
    round(if x < high { x } else { high })
}

/// For each sub-block the whole numbers next to its own with the smallest error.
#[inline(always)]
fn choose<const N: usize, const CODEBOOK: bool>(
    tile: &Tile<N>,
    levels: Levels,
    stored: &mut Stored,
    (low, high): (f32, f32),
    with_min: bool,
) {
    let start = *stored;
    let mut best = [f32::INFINITY; LANES];
    let sides: &[f32] = if with_min { &[0.0, -1.0, 1.0] } else { &[0.0] };
    for &min_side in sides {
        for side in [0.0, -1.0, 1.0] {
            let mut tried = start;
            for l in 0..LANES {
                let scale = start.scale[l] + side;
                let min = start.min[l] + min_side;
                tried.scale[l] = if scale < low || scale > high { start.scale[l] } else { scale };
                tried.min[l] = if min < 0.0 || min > high { start.min[l] } else { min };
            }
            let (d, min) = tried.factors();
            let error = tile.error::<CODEBOOK>(levels, &d, &min);
            for l in 0..LANES {
                let better = error[l] < best[l];
                best[l] = if better { error[l] } else { best[l] };
                stored.scale[l] = if better { tried.scale[l] } else { stored.scale[l] };
                stored.min[l] = if better { tried.min[l] } else { stored.min[l] };
            }
        }
    }
}

/// The common factors that fit a super-block's levels best, where they make its error smaller.
#[inline(always)]
fn refit<const N: usize, const CODEBOOK: bool>(tile: &Tile<N>, levels: Levels, stored: &mut Stored, group: usize) {
    let (d, min) = stored.factors();
    let q = tile.levels::<CODEBOOK>(levels, &d, &min);
    let before = tile.error::<CODEBOOK>(levels, &d, &min);
    // x = d * (scale * level) - dmin * min, in the least squares over all elements of a super-block.
    let zero = [0.0_f32; LANES];
    let (mut uu, mut uv, mut vv, mut xu, mut xv) = (zero, zero, zero, zero, zero);
    for ((q, x), w) in q.iter().zip(&tile.x).zip(&tile.w) {
        for l in 0..LANES {
            let (u, v) = (stored.scale[l] * q[l], stored.min[l]);
            uu[l] += w[l] * u * u;
            uv[l] += w[l] * u * v;
            vv[l] += w[l] * v * v;
            xu[l] += w[l] * x[l] * u;
            xv[l] += w[l] * x[l] * v;
        }
    }
    let mut tried = *stored;
    for start in (0..LANES).step_by(group) {
        let sum = |x: &Lanes| x[start..start + group].iter().map(|&x| f64::from(x)).sum::<f64>();
        let (uu, uv, vv, xu, xv) = (sum(&uu), sum(&uv), sum(&vv), sum(&xu), sum(&xv));
        let determinant = uu * vv - uv * uv;
        let (d, dmin) = if determinant > 1e-9 * uu * vv && vv > 0.0 {
            ((xu * vv - xv * uv) / determinant, (xu * uv - xv * uu) / determinant)
        } else if uu > 0.0 {
            (xu / uu, 0.0)
        } else {
            (0.0, 0.0)
        };
        let usable = d.is_finite() && dmin.is_finite() && dmin >= 0.0;
        if usable {
            tried.d[start..start + group].fill(to_f16(d as f32));
            // A minimum that no sub-block uses keeps its factor.
            if vv > 0.0 {
                tried.dmin[start..start + group].fill(to_f16(dmin as f32));
            }
        }
    }
    let (d, min) = tried.factors();
    let after = tile.error::<CODEBOOK>(levels, &d, &min);
    for start in (0..LANES).step_by(group) {
        let lanes = start..start + group;
        let sum = |x: &Lanes| x[lanes.clone()].iter().sum::<f32>();
        if sum(&after) < sum(&before) {
            stored.d[lanes.clone()].copy_from_slice(&tried.d[lanes.clone()]);
            stored.dmin[lanes.clone()].copy_from_slice(&tried.dmin[lanes]);
        }
    }
}

/// The bytes of a tile's super-blocks.
#[inline(always)]
fn write<const N: usize, const CODEBOOK: bool>(
    dtype: DType,
    tile: &Tile<N>,
    levels: Levels,
    stored: &Stored,
    out: &mut [u8],
) {
    let (d, min) = stored.factors();
    let q = super::stored::<N, CODEBOOK>(&tile.levels::<CODEBOOK>(levels, &d, &min), levels);
    let mut block = Split::new();
    for (i, out) in out.chunks_exact_mut(dtype.block_bytes()).enumerate() {
        let first = i * (256 / N);
        block.d = f16::from_f32(stored.d[first]);
        block.dmin = f16::from_f32(stored.dmin[first]);
        for sub in 0..256 / N {
            let lane = first + sub;
            // `Split` has an entry for each 16 elements.
            for entry in sub * N / 16..(sub + 1) * N / 16 {
                block.scale[entry] = stored.scale[lane] as i8;
                block.min[entry] = stored.min[lane] as u8;
            }
            for (e, q) in q.iter().enumerate() {
                block.q[sub * N + e] = q[lane];
            }
        }
        join(dtype, &block, out);
    }
}
