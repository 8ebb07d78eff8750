//! Frozen quantised weights turned: W^T in 8 bits, 32 columns of W at a time, for the backward of matrix products.
//!
//! The gradient towards a product's input sums over W's rows, which the packed form keeps in separate groups. So each thread
//! takes 32 columns of all rows, spreads them to f32 and rounds them to 8 bits again, in blocks of 128 rows with one scale
//! each. Products whose gradients are added stand one after the other, as if their rows were one matrix's. What a tile holds
//! depends on the weight alone.

// Rows side by side are indexed in step with each other; iterators would hide which row is meant.
#![allow(clippy::needless_range_loop)]

use crate::{
    Isa,
    blocks::{Encoding, IQ4_VALUES},
    lanes::for_each_isa,
    layout::{GROUP_ROWS, Layout, UNIT},
    weight::Weight,
};

/// Rows of W that share a scale. Blocks of 32 would be off by a quarter less and take one multiply-add more for each 32 rows.
pub(crate) const BLOCK: usize = 128;
/// Values of a gradient that share one: shorter, as gradients have outliers.
pub(crate) const SUB: usize = 32;
/// Such parts of a block.
pub(crate) const SUBS: usize = BLOCK / SUB;
/// Steps of four rows in a block.
pub(crate) const STEPS: usize = BLOCK / 4;
/// Groups of a block.
const GROUPS: usize = BLOCK / GROUP_ROWS;
/// Columns of W in one vector of W^T.
pub(crate) const HALF: usize = GROUP_ROWS;
/// What is added to a quant so that it is stored unsigned.
pub(crate) const OFFSET_LOG2: u32 = 7;

/// One step of sixteen columns: byte `4 c + j` is row `4 s + j` of column c, plus 128.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Step(pub(crate) [u8; 4 * HALF]);

/// 32 columns of W, all rows. Buffers are kept for the next ones.
#[derive(Default)]
pub(crate) struct Turned {
    pub(crate) blocks: usize,
    /// (2, blocks, `STEPS`)
    pub(crate) quants: Vec<Step>,
    /// (2, blocks, 16)
    pub(crate) scales: Vec<[f32; HALF]>,
    spread: Spread,
}

/// A block of W in f32: for each group and column its sixteen rows.
pub(crate) struct Spread {
    pub(crate) values: Box<[[Row; UNIT]; GROUPS]>,
    /// The largest bits of |values| of each column, row by row of a group.
    pub(crate) largest: Box<[Bits; UNIT]>,
}

/// Some columns of single groups, row by row.
#[derive(Default)]
pub(crate) struct Columns(Spread);

impl Columns {
    /// Columns `32 unit..` of the rows of group `g` of a quantised weight, as many as `out` takes.
    pub(crate) fn rows(&mut self, isa: Isa, weight: &Weight, g: usize, unit: usize, out: &mut [[f32; UNIT]]) {
        let Spread { values, largest } = &mut self.0;
        let values = &mut values[0];
        spread(isa, weight, g, unit, values, largest);
        #[cfg(target_arch = "x86_64")]
        if let (Isa::Avx512 | Isa::Amx, Some(out)) = (isa, out.as_mut_array()) {
            // SAFETY: `Compute::new` has checked that the machine has this instruction set.
            return unsafe { crate::avx512::turned::rows(values, out) };
        }
        for (r, out) in out.iter_mut().enumerate() {
            out.iter_mut().zip(values.iter()).for_each(|(x, column)| *x = column.0[r]);
        }
    }
}

/// Sixteen rows of one column.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Row(pub(crate) [f32; GROUP_ROWS]);

/// The same, as unsigned integers.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Bits(pub(crate) [u32; GROUP_ROWS]);

impl Default for Spread {
    fn default() -> Spread {
        Spread {
            values: Box::new([[Row([0.0; GROUP_ROWS]); UNIT]; GROUPS]),
            largest: Box::new([Bits([0; GROUP_ROWS]); UNIT]),
        }
    }
}

/// Blocks that so many rows take.
pub(crate) fn blocks_of(rows: usize) -> usize {
    rows.div_ceil(BLOCK)
}

/// A block's scale and what its values are multiplied by, from the bits of the largest |x|. What is no number stays none; what
/// is next to nothing is nothing.
#[inline(always)]
pub(crate) fn scale_of_bits(largest: u32) -> (f32, f32) {
    let largest = f32::from_bits(largest);
    if largest < 1e-30 { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) }
}

impl Turned {
    /// Takes columns `32 unit..` of quantised weights of the same width.
    pub(crate) fn take<'a>(&mut self, isa: Isa, weights: impl Iterator<Item = &'a Weight> + Clone, unit: usize) {
        self.blocks = weights.clone().map(|w| blocks_of(w.rows())).sum();
        let steps = 2 * self.blocks * STEPS;
        if self.quants.len() < steps {
            self.quants.resize(steps, Step([0; 4 * HALF]));
            self.scales.resize(2 * self.blocks, [0.0; HALF]);
        }
        let mut block = 0;
        for weight in weights {
            for first in (0..weight.groups()).step_by(GROUPS) {
                let groups = GROUPS.min(weight.groups() - first);
                self.spread.largest.fill(Bits([0; GROUP_ROWS]));
                for g in 0..groups {
                    spread(isa, weight, first + g, unit, &mut self.spread.values[g], &mut self.spread.largest);
                }
                for values in &mut self.spread.values[groups..] {
                    values.fill(Row([0.0; GROUP_ROWS]));
                }
                for half in 0..2 {
                    let at = half * self.blocks + block;
                    let steps = &mut self.quants[at * STEPS..][..STEPS];
                    round(isa, &self.spread, half, steps, &mut self.scales[at]);
                }
                block += 1;
            }
        }
    }
}

/// Values of 32 columns of one group, and what becomes the largest. Rows past the matrix's end are zeros in the group.
fn spread(isa: Isa, weight: &Weight, g: usize, unit: usize, values: &mut [Row; UNIT], largest: &mut [Bits; UNIT]) {
    if weight.in_planes() {
        return spread_group(isa, weight, &weight.unit_group(isa, g, unit), 0, values, largest);
    }
    spread_group(isa, weight, weight.group(g), unit, values, largest);
}

/// The same of a group as `layout` has it.
fn spread_group(
    isa: Isa,
    weight: &Weight,
    group: &[u8],
    unit: usize,
    values: &mut [Row; UNIT],
    largest: &mut [Bits; UNIT],
) {
    match isa {
        // SAFETY: `Compute::new` has checked that the machine has this instruction set; the group has this unit.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe {
            crate::avx512::turned::spread(weight.dtype(), group, unit, values, largest)
        },
        _ => {
            let Some(layout) = weight.layout else { unreachable!("only quantised weights are turned in 8 bits") };
            spread_lanes(isa, layout, group, unit, values, largest);
        }
    }
}

/// Rounds the columns `16 half..` of a block.
fn round(isa: Isa, spread: &Spread, half: usize, steps: &mut [Step], scales: &mut [f32; HALF]) {
    match isa {
        // SAFETY: `Compute::new` has checked that the machine has this instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { crate::avx512::turned::round(spread, half, steps, scales) },
        _ => round_lanes(isa, spread, half, steps, scales),
    }
}

for_each_isa! {
    pub(crate) fn spread_lanes(
        layout: Layout,
        group: &[u8],
        unit: usize,
        values: &mut [Row; UNIT],
        largest: &mut [Bits; UNIT],
    ) {
        let bytes = layout.unit(group, unit);
        let mut factors = [[[0.0f32; GROUP_ROWS]; 2]; 2];
        for (half, [scales, addends]) in factors.iter_mut().enumerate() {
            for r in 0..GROUP_ROWS {
                (scales[r], addends[r]) = layout.scale(group, unit, half, r);
            }
        }
        for step in 0..UNIT / 4 {
            let quants = stored(layout, bytes, step);
            let [scales, addends] = &factors[step / 4];
            for j in 0..4 {
                let (Row(values), Bits(largest)) = (&mut values[4 * step + j], &mut largest[4 * step + j]);
                for r in 0..GROUP_ROWS {
                    let q = match layout.encoding {
                        Encoding::Offset { log2 } => i32::from(quants[4 * r + j]) - (1 << log2),
                        Encoding::Plain => i32::from(quants[4 * r + j]),
                        Encoding::Codebook => i32::from(IQ4_VALUES[usize::from(quants[4 * r + j] & 15)]),
                    };
                    let x = scales[r] * q as f32 + addends[r];
                    values[r] = x;
                    largest[r] = largest[r].max(x.to_bits() & 0x7fff_ffff);
                }
            }
        }
    }
}

/// The stored quants of a step: four columns of each of sixteen rows.
#[inline(always)]
fn stored(layout: Layout, unit: &[u8], step: usize) -> [u8; 4 * GROUP_ROWS] {
    let mut quants = [0; 4 * GROUP_ROWS];
    let (low, high) = unit.split_at(layout.low_bits * UNIT * GROUP_ROWS / 8);
    let (vector, shift, mask) = match layout.low_bits {
        8 => (step, 0, 255),
        4 => (step % 4, step / 4 * 4, 15),
        _ => (step / 4, step % 4 * 2, 3),
    };
    for (q, byte) in quants.iter_mut().zip(&low[64 * vector..][..64]) {
        *q = byte >> shift & mask;
    }
    let (vector, shift, mask) = match layout.high_bits {
        0 => return quants,
        1 => (0, step, 1),
        _ => (step / 4, step % 4 * 2, 3),
    };
    for (q, byte) in quants.iter_mut().zip(&high[64 * vector..][..64]) {
        *q |= (byte >> shift & mask) << layout.low_bits;
    }
    quants
}

for_each_isa! {
    pub(crate) fn round_lanes(spread: &Spread, half: usize, steps: &mut [Step], scales: &mut [f32; HALF]) {
        for c in 0..HALF {
            let column = HALF * half + c;
            let largest = spread.largest[column].0.iter().fold(0, |m, &x| u32::max(m, x));
            let (scale, inverse) = scale_of_bits(largest);
            scales[c] = scale;
            for (steps, values) in steps.as_chunks_mut::<{ GROUP_ROWS / 4 }>().0.iter_mut().zip(spread.values.iter()) {
                let mut quants = [0u8; GROUP_ROWS];
                for (q, x) in quants.iter_mut().zip(&values[column].0) {
                    *q = ((x * inverse).round_ties_even() as i32).clamp(-128, 127) as u8 ^ 128;
                }
                for (Step(step), four) in steps.iter_mut().zip(quants.as_chunks::<4>().0) {
                    step[4 * c..4 * c + 4].copy_from_slice(four);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use qwenkit_tensor::DType;

    use super::*;
    use crate::{Pool, quantize_row};

    /// Every type, rows that are no whole block, two weights after each other.
    #[test]
    fn values_are_within_half_a_step_and_the_same_on_every_isa() {
        let pool = Pool::new(1);
        for dtype in DType::ALL.into_iter().filter(|&dtype| Layout::of(dtype).is_some()) {
            let (rows, cols) = (150, 256);
            let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.37).sin() * 0.1).collect();
            let mut bytes = vec![0; dtype.tensor_bytes(&[rows, cols]).unwrap()];
            let row_bytes = dtype.row_bytes(cols).unwrap();
            for (values, bytes) in values.chunks_exact(cols).zip(bytes.chunks_exact_mut(row_bytes)) {
                quantize_row(dtype, values, None, bytes);
            }
            let weight = Weight::from_bytes(&pool, dtype, rows, cols, &bytes).unwrap();
            let (mut row, mut first) = (vec![0.0; cols], None);
            for isa in Isa::available() {
                let mut turned = Turned::default();
                turned.take(isa, [&weight, &weight].into_iter(), 3);
                assert_eq!(turned.blocks, 4);
                for r in 0..rows {
                    weight.row(r, &mut row);
                    for (c, exact) in row[96..128].iter().enumerate() {
                        let (half, lane) = (c / HALF, c % HALF);
                        let at = |block: usize| {
                            let scale = turned.scales[half * 4 + block][lane];
                            let step = &turned.quants[(half * 4 + block) * STEPS + r % BLOCK / 4].0;
                            (scale, scale * (i32::from(step[4 * lane + r % 4]) - 128) as f32)
                        };
                        let (scale, found) = at(r / BLOCK);
                        assert!((found - exact).abs() <= 0.5001 * scale, "{isa}, {dtype}: ({r}, {c}) {found} {exact}");
                        assert_eq!(at(2 + r / BLOCK), (scale, found), "{isa}, {dtype}: the second weight");
                    }
                }
                let bytes: Vec<u8> = turned.quants.iter().flat_map(|step| step.0).collect();
                let seen = (bytes, turned.scales.clone());
                assert!(*first.get_or_insert_with(|| seen.clone()) == seen, "{isa}, {dtype}");
            }
        }
    }
}
