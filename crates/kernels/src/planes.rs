//! A Q8_0 matrix in two parts, for an output head of which only the largest results may be wanted (`screen`).
//!
//! The first part has the five upper bits of every quant, the scales, and of every row how far the lower bits can carry a
//! result; the second has the three lower bits. Together they are the quants that `layout` has in one, so that a product
//! of both has the bits of an ordinary one: each group is joined again in cache, and goes through the same kernel.
//!
//! In memory the first parts of all groups of 16 rows stand before the second parts of all: who reads only the first reads
//! straight ahead. A first part is a group of Q5_0, of which a quant is `n = (q + 128) >> 3`, and then 16 f32 bounds; a second part
//! is the quants of Q3_K, `(q + 128) & 7`, without scales.
//!
//! A row's bound is `r = sqrt(sum over units of d^2 sum of (lo - 3.5)^2)`, by Cauchy and Schwarz what `x` with `|x| = 1` can make of the
//! difference between the row and its first part, `d (8 (n - 16) + 3.5)`, and more than that by what rounding can make of it:
//! see `slack`.

// Vectors of a unit are indexed in step with each other; iterators would hide which byte is meant.
#![allow(clippy::needless_range_loop)]

use half::f16;
use qwenkit_tensor::DType;

#[cfg(target_arch = "x86_64")]
use crate::prefetch;
use crate::{
    Isa,
    lanes::for_each_isa,
    layout::{GROUP_ROWS, Layout, UNIT},
    weight::Weight,
};

/// How first parts lie, but for their bounds.
pub(crate) const COARSE: Layout = layout_of(DType::Q5_0);
/// How second parts lie.
const REST: Layout = layout_of(DType::Q3_K);
/// How a joined group lies.
const WHOLE: Layout = layout_of(DType::Q8_0);
/// What is taken from 16 times a first part's quant so that twice its value is left: `16 n - 249 = 2 (8 (n - 16) + 3.5)`.
pub(crate) const OFFSET_TIMES_16: i32 = 249;
/// Bytes of the scales of a unit.
const SCALE_BYTES: usize = 2 * GROUP_ROWS;
/// Bytes of a group's bounds.
const BOUND_BYTES: usize = 4 * GROUP_ROWS;
/// Bytes of a joined group of one unit.
pub(crate) const UNIT_GROUP_BYTES: usize = WHOLE.group_bytes(UNIT);

const fn layout_of(dtype: DType) -> Layout {
    match Layout::of(dtype) {
        Some(layout) => layout,
        None => panic!("no quantised type"),
    }
}

/// Bytes of a group's first part for rows of `cols`.
pub(crate) const fn coarse_bytes(cols: usize) -> usize {
    COARSE.group_bytes(cols) + BOUND_BYTES
}

/// Bytes of a group's second part.
pub(crate) const fn rest_bytes(cols: usize) -> usize {
    cols / UNIT * REST.unit_bytes()
}

/// Bytes of both parts.
pub(crate) const fn group_bytes(cols: usize) -> usize {
    coarse_bytes(cols) + rest_bytes(cols)
}

/// How much more than `r |x|` an upper bound has to allow, as a part of it, so that it holds for sums in f32.
///
/// With `e = 2^-24` and `n` units, each of the two sums - `n` multiply-adds, whose scales were rounded once - is off by at most
/// `(n + 1) e / (1 - (n + 1) e)` times the sum of its terms' sizes. Quants are 128 at most and `lo - 3.5` is a half at
/// least, so these sizes are at most `256 r |x|` together. Adding the bound to the coarse sum rounds `256 r |x|` once more, and
/// the roundings of `r`, `|x|` and their product are a few `e` of `r |x|`. All that is less than `512 (n + 4) e`. What underflows
/// is less than what this leaves, as `screen` takes no `x` that is next to nothing.
fn slack(units: usize) -> f64 {
    512.0 * (units + 4) as f64 * 2f64.powi(-24)
}

/// Takes a packed Q8_0 group of rows of `cols` apart. Returns whether all its bounds are numbers.
pub(crate) fn split(group: &[u8], cols: usize, coarse: &mut [u8], rest: &mut [u8]) -> bool {
    let (coarse, bounds) = coarse.split_at_mut(COARSE.group_bytes(cols));
    let mut squares = [0.0f64; GROUP_ROWS];
    for (u, rest) in rest.as_chunks_mut().0.iter_mut().enumerate() {
        let scales = scales(&WHOLE, group, u);
        coarse[COARSE.scales_at(u).1..][..SCALE_BYTES].copy_from_slice(scales);
        let Some(to) = coarse[COARSE.quants_at(u)..].first_chunk_mut() else { unreachable!("the group has unit {u}") };
        let of_unit = split_unit(quants(&WHOLE, group, u), to, rest);
        for (r, (sum, own)) in squares.iter_mut().zip(of_unit).enumerate() {
            let d = f16::from_le_bytes([scales[2 * r], scales[2 * r + 1]]).to_f64();
            *sum += d * d * f64::from(own) / 4.0;
        }
    }
    let mut finite = true;
    for (sum, to) in squares.into_iter().zip(bounds.as_chunks_mut::<4>().0) {
        let bound = (sum.sqrt() * (1.0 + slack(cols / UNIT))) as f32;
        finite &= bound.is_finite();
        *to = bound.to_ne_bytes();
    }
    finite
}

/// The scales of unit `u` of a group.
#[inline(always)]
fn scales<'a>(layout: &Layout, group: &'a [u8], u: usize) -> &'a [u8] {
    &group[layout.scales_at(u).1..][..SCALE_BYTES]
}

/// The quants of unit `u` of a group whose units have N bytes.
#[inline(always)]
fn quants<'a, const N: usize>(layout: &Layout, group: &'a [u8], u: usize) -> &'a [u8; N] {
    match layout.unit(group, u).as_array() {
        Some(quants) => quants,
        None => unreachable!("units have {N} bytes"),
    }
}

/// Returns of each row the sum of `(2 lo - 7)^2`.
fn split_unit(quants: &[u8; 512], coarse: &mut [u8; 320], rest: &mut [u8; 192]) -> [u16; GROUP_ROWS] {
    let q = quants.as_chunks::<64>().0;
    let (coarse, rest) = (coarse.as_chunks_mut::<64>().0, rest.as_chunks_mut::<64>().0);
    let mut squares = [0u16; 64];
    for l in 0..64 {
        for v in 0..4 {
            coarse[v][l] = q[v][l] >> 3 & 15 | (q[v + 4][l] >> 3 & 15) << 4;
        }
        coarse[4][l] = (0..8).map(|s| q[s][l] >> 7 << s).fold(0, |byte, bit| byte | bit);
        for v in 0..2 {
            rest[v][l] = (0..4).map(|i| (q[4 * v + i][l] & 3) << (2 * i)).fold(0, |byte, bits| byte | bits);
        }
        rest[2][l] = (0..8).map(|s| (q[s][l] >> 2 & 1) << s).fold(0, |byte, bit| byte | bit);
        for q in q {
            let twice = 2 * i16::from(q[l] & 7) - 7;
            squares[l] += (twice * twice) as u16;
        }
    }
    std::array::from_fn(|r| squares[4 * r..4 * r + 4].iter().sum())
}

#[inline(always)]
fn join_unit(coarse: &[u8; 320], rest: &[u8; 192], out: &mut [u8; 512]) {
    let (coarse, rest) = (coarse.as_chunks::<64>().0, rest.as_chunks::<64>().0);
    let out = out.as_chunks_mut::<64>().0;
    // Steps inside, so that they are unrolled and their shifts are constants: no machine shifts bytes by variables.
    for l in 0..64 {
        for s in 0..8 {
            let n = coarse[s % 4][l] >> (s / 4 * 4) & 15 | (coarse[4][l] >> s & 1) << 4;
            let lo = rest[s / 4][l] >> (s % 4 * 2) & 3 | (rest[2][l] >> s & 1) << 2;
            out[s][l] = n << 3 | lo;
        }
    }
}

for_each_isa! {
    /// One unit alone.
    pub(crate) fn join_one(coarse: &[u8; 320], rest: &[u8; 192], out: &mut [u8; 512]) {
        join_unit(coarse, rest, out);
    }
}

for_each_isa! {
    /// Puts a group together again. With `ahead` the memory of the groups behind it is asked for.
    pub(crate) fn join(coarse: &[u8], rest: &[u8], ahead: bool, out: &mut [u8]) {
        for (u, rest) in rest.as_chunks().0.iter().enumerate() {
            #[cfg(target_arch = "x86_64")]
            if ahead {
                let before = COARSE.bytes_before(u);
                let from = coarse.as_ptr().wrapping_add(COARSE.quants_at(u) - before);
                prefetch::ahead(from, before + COARSE.unit_bytes());
                prefetch::ahead(rest.as_ptr(), rest.len());
            }
            out[WHOLE.scales_at(u).1..][..SCALE_BYTES].copy_from_slice(scales(&COARSE, coarse, u));
            let Some(to) = out[WHOLE.quants_at(u)..].first_chunk_mut() else { unreachable!("the group has unit {u}") };
            join_unit(quants(&COARSE, coarse, u), rest, to);
        }
        let _ = ahead;
    }
}

/// Room for one joined group, which begins with a cache line.
#[derive(Default)]
pub(crate) struct Joined(Vec<[u64; 8]>);

impl Weight {
    /// The first part of group `g`: a group of Q5_0, and the rows' bounds.
    pub(crate) fn coarse(&self, g: usize) -> (&[u8], &[f32; GROUP_ROWS]) {
        let bytes = coarse_bytes(self.cols());
        let part = &self.bytes()[g * bytes..][..bytes];
        let (group, bounds) = part.split_at(bytes - BOUND_BYTES);
        match bytemuck::cast_slice(bounds).as_array() {
            Some(bounds) => (group, bounds),
            None => unreachable!("sixteen bounds"),
        }
    }

    /// The second part of group `g`.
    pub(crate) fn rest(&self, g: usize) -> &[u8] {
        let bytes = rest_bytes(self.cols());
        &self.bytes()[self.groups() * coarse_bytes(self.cols()) + g * bytes..][..bytes]
    }

    /// Group `g` of a weight in two parts as the kernels of its type want it.
    pub(crate) fn join<'a>(&self, isa: Isa, g: usize, ahead: bool, room: &'a mut Joined) -> &'a [u8] {
        let bytes = WHOLE.group_bytes(self.cols());
        // One line more, as a list of u64 may begin anywhere in a line.
        room.0.resize(bytes / 64 + 1, [0; 8]);
        let room: &mut [u8] = bytemuck::cast_slice_mut(&mut room.0);
        let start = room.as_ptr().align_offset(64).min(64);
        let out = &mut room[start..start + bytes];
        join(isa, self.coarse(g).0, self.rest(g), ahead, out);
        out
    }

    /// Unit `u` of group `g` of a weight in two parts as a group of this one unit.
    pub(crate) fn unit_group(&self, isa: Isa, g: usize, u: usize) -> [u8; UNIT_GROUP_BYTES] {
        let (coarse, rest) = (self.coarse(g).0, self.rest(g));
        let mut group = [0; UNIT_GROUP_BYTES];
        group[WHOLE.scales_at(0).1..][..SCALE_BYTES].copy_from_slice(scales(&COARSE, coarse, u));
        let (of_rest, to) = (rest.as_chunks().0.get(u), group[WHOLE.quants_at(0)..].first_chunk_mut());
        let Some((of_rest, to)) = of_rest.zip(to) else { unreachable!("the group has unit {u}") };
        join_one(isa, quants(&COARSE, coarse, u), of_rest, to);
        group
    }

    /// Values of row `r` of group `g` of a weight in two parts: (K).
    pub(crate) fn joined_row(&self, g: usize, r: usize, out: &mut [f32]) {
        let (coarse, rest) = (self.coarse(g).0, self.rest(g));
        let units = rest.chunks_exact(REST.unit_bytes());
        for (u, (rest, out)) in units.zip(out.as_chunks_mut::<UNIT>().0).enumerate() {
            let scale = COARSE.scale(coarse, u, 0, r).0;
            let quants = COARSE.unit_row(COARSE.unit(coarse, u), r).into_iter().zip(REST.unit_row(rest, r));
            for (x, (n, lo)) in out.iter_mut().zip(quants) {
                *x = scale * WHOLE.quant_value(n << 3 | lo) as f32;
            }
        }
    }
}
