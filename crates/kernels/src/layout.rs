//! How quantised weights lie in memory for the kernels: sixteen rows side by side.
//!
//! A *group* is 16 output rows. It holds *runs* in ascending k: a line of scales, and the quants of the *units* of 32 k-values
//! whose scales fill that line. So a product reads a group straight ahead, as hardware fetches memory fastest: with all scales
//! behind all quants it reached four fifths of that (docs/LOG.md).
//! - Scales: as the type has them (`Scales`), 16 rows side by side. What 256 k-values share stands in a line before their runs.
//! - Quants: for each unit eight *steps* of 4 k-values; step `s` of row `r` is 4 bytes at `4 r` of a 64-byte vector, so that
//!   one 512-bit load feeds 16 rows. The low bits of steps share vectors: with 4 low bits vector `v` holds step `v` in its
//!   low and step `v + 4` in its high nibbles; with 2 low bits vector `v` holds step `4 v + i` at bits `2 i`. High bits
//!   follow in vectors of their own: one bit per step, or two in the order of the 2-bit form.
//!
//! The sizes equal the file's within 4%. Rows past the matrix's end are zero. Values and encodings: `blocks`.

use half::f16;
use qwenkit_tensor::DType;

use crate::blocks::{self, Encoding, Split};

/// Rows side by side in a group: the 32-bit lanes of a 512-bit register.
pub(crate) const GROUP_ROWS: usize = 16;
/// k-values that share a dot product's integer accumulator.
pub(crate) const UNIT: usize = 32;

/// Units of the 256 k-values that share factors in types with super-blocks.
pub(crate) const SUPER_UNITS: usize = 8;
/// What a run begins with, and a super-block: a line of memory.
const LINE: usize = 64;

/// What a type's scales are; f16 and bytes are each 16 rows side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scales {
    /// Per unit: f16 `d`.
    Unit,
    /// Per unit: f16 `d`, f16 `m`; value `d q + m`.
    UnitMin,
    /// Per 256: f16 `d`, f16 `dmin`; then per unit: u8 scale, u8 minimum.
    SuperMin,
    /// Per 256: f16 `d`; then per unit: i8 scale.
    Super,
    /// Per 256: f16 `d`; then per unit: i8 scale of its first 16 k-values, i8 scale of its last.
    SuperHalf,
    /// Per 256: f16 `d`, f16 `dmin`; then per unit: `scale | min << 4` of its first 16 k-values, then of its last.
    SuperHalfMin,
}

/// The layout of one quantised type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) low_bits: usize,
    pub(crate) high_bits: usize,
    pub(crate) scales: Scales,
    pub(crate) encoding: Encoding,
}

/// log2 of what is subtracted from a stored quant, `None` for types that store the value itself.
#[cfg(target_arch = "x86_64")]
pub(crate) const fn offset_log2(encoding: Encoding) -> Option<u32> {
    match encoding {
        Encoding::Offset { log2 } => Some(log2),
        Encoding::Plain => None,
        // The codebook is stored with 128 added, so that its entries are unsigned as the dot product wants them.
        Encoding::Codebook => Some(7),
    }
}

impl Layout {
    /// The layout of `dtype`; `None` for plain types.
    pub(crate) const fn of(dtype: DType) -> Option<Layout> {
        use DType::*;
        let (low_bits, high_bits, scales) = match dtype {
            Q4_0 | IQ4_NL => (4, 0, Scales::Unit),
            Q4_1 => (4, 0, Scales::UnitMin),
            Q5_0 => (4, 1, Scales::Unit),
            Q5_1 => (4, 1, Scales::UnitMin),
            Q8_0 => (8, 0, Scales::Unit),
            Q2_K => (2, 0, Scales::SuperHalfMin),
            Q3_K => (2, 1, Scales::SuperHalf),
            Q4_K => (4, 0, Scales::SuperMin),
            Q5_K => (4, 1, Scales::SuperMin),
            Q6_K => (4, 2, Scales::SuperHalf),
            IQ4_XS => (4, 0, Scales::Super),
            _ => return None,
        };
        match blocks::encoding(dtype) {
            Some(encoding) => Some(Layout { low_bits, high_bits, scales, encoding }),
            None => None,
        }
    }

    /// The layout of the type with index `D` in `DType::ALL`; for kernels that are compiled for each type.
    #[inline(always)]
    pub(crate) const fn at<const D: usize>() -> Layout {
        match Layout::of(DType::ALL[D]) {
            Some(layout) => layout,
            None => panic!("no quantised type"),
        }
    }

    /// Bytes of a unit's quants, a multiple of 64.
    #[inline(always)]
    pub(crate) const fn unit_bytes(&self) -> usize {
        (self.low_bits + self.high_bits) * UNIT * GROUP_ROWS / 8
    }

    /// Units whose own scales fill a line.
    #[inline(always)]
    const fn run_units(&self) -> usize {
        match self.scales {
            Scales::UnitMin => 1,
            Scales::Super => 4,
            _ => 2,
        }
    }

    /// Bytes of what the units of a super-block share.
    #[inline(always)]
    const fn head_bytes(&self) -> usize {
        match self.scales {
            Scales::Unit | Scales::UnitMin => 0,
            _ => LINE,
        }
    }

    /// Where the super-block of unit `u` begins in its group, and its run.
    #[inline(always)]
    const fn starts(&self, u: usize) -> (usize, usize) {
        let run_bytes = LINE + self.run_units() * self.unit_bytes();
        let block = u / SUPER_UNITS * (self.head_bytes() + SUPER_UNITS / self.run_units() * run_bytes);
        (block, block + self.head_bytes() + u % SUPER_UNITS / self.run_units() * run_bytes)
    }

    /// Where the quants of unit `u` begin in its group.
    #[inline(always)]
    pub(crate) const fn quants_at(&self, u: usize) -> usize {
        self.starts(u).1 + LINE + u % self.run_units() * self.unit_bytes()
    }

    /// Where the fields of unit `u` begin in its group: the super-block's factors, and the unit's own bytes.
    #[inline(always)]
    pub(crate) const fn scales_at(&self, u: usize) -> (usize, usize) {
        let (block, run) = self.starts(u);
        let own = run + u % self.run_units() * (LINE / self.run_units());
        (if self.head_bytes() > 0 { block } else { own }, own)
    }

    /// Bytes of scales that stand right before the quants of unit `u`.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(crate) const fn bytes_before(&self, u: usize) -> usize {
        let head = if u.is_multiple_of(SUPER_UNITS) { self.head_bytes() } else { 0 };
        head + if u.is_multiple_of(self.run_units()) { LINE } else { 0 }
    }

    /// Bytes of a group for rows of `cols`.
    pub(crate) const fn group_bytes(&self, cols: usize) -> usize {
        let units = cols / UNIT;
        let lines = units.div_ceil(self.run_units()) * LINE + units.div_ceil(SUPER_UNITS) * self.head_bytes();
        lines + units * self.unit_bytes()
    }

    /// The quants of unit `u` of a group.
    #[inline(always)]
    pub(crate) fn unit<'a>(&self, group: &'a [u8], u: usize) -> &'a [u8] {
        &group[self.quants_at(u)..][..self.unit_bytes()]
    }

    /// Lays one row of the file (`bytes`, whole blocks of `dtype`) as row `r` of a zeroed group.
    pub(crate) fn pack_row(&self, dtype: DType, bytes: &[u8], r: usize, group: &mut [u8]) {
        let units_per_block = dtype.block_len() / UNIT;
        let mut block = Split::new();
        for (b, bytes) in bytes.chunks_exact(dtype.block_bytes()).enumerate() {
            blocks::split(dtype, bytes, &mut block);
            for (i, q) in block.q.as_chunks::<UNIT>().0.iter().take(units_per_block).enumerate() {
                let u = b * units_per_block + i;
                self.pack_unit(q, r, &mut group[self.quants_at(u)..][..self.unit_bytes()]);
                self.pack_scales(&block, i, u, r, group);
            }
        }
    }

    /// Lays the 32 quants of row `r` into its unit, four k-values - a step of the row - as one 32-bit word.
    fn pack_unit(&self, q: &[u8; UNIT], r: usize, unit: &mut [u8]) {
        let words = q.as_chunks::<4>().0;
        let step = |s: usize| u32::from_le_bytes(words[s]);
        let (low, high) = unit.split_at_mut(self.low_bits * UNIT * GROUP_ROWS / 8);
        let put = |plane: &mut [u8], vector: usize, word: u32| {
            plane[64 * vector + 4 * r..][..4].copy_from_slice(&word.to_le_bytes());
        };
        // Four steps of two bits each, taken from bit `from` of every quant.
        let pairs = |v: usize, from: usize| {
            (0..4).map(|i| (step(4 * v + i) >> from & 0x0303_0303) << (2 * i)).fold(0, |word, bits| word | bits)
        };
        match self.low_bits {
            8 => (0..8).for_each(|s| put(low, s, step(s))),
            4 => (0..4).for_each(|v| put(low, v, step(v) & 0x0f0f_0f0f | (step(v + 4) & 0x0f0f_0f0f) << 4)),
            _ => (0..2).for_each(|v| put(low, v, pairs(v, 0))),
        }
        match self.high_bits {
            0 => {}
            1 => {
                let bits = (0..8).map(|s| (step(s) >> self.low_bits & 0x0101_0101) << s);
                put(high, 0, bits.fold(0, |word, bit| word | bit));
            }
            _ => (0..2).for_each(|v| put(high, v, pairs(v, self.low_bits))),
        }
    }

    fn pack_scales(&self, block: &Split, i: usize, u: usize, r: usize, group: &mut [u8]) {
        let (factors, own) = self.scales_at(u);
        let mut put = |at: usize, value: f16| group[at + 2 * r..][..2].copy_from_slice(&value.to_le_bytes());
        put(factors, block.d);
        if matches!(self.scales, Scales::UnitMin | Scales::SuperMin | Scales::SuperHalfMin) {
            put(factors + 32, block.dmin);
        }
        let (first, last) = (2 * i, 2 * i + 1);
        match self.scales {
            Scales::Unit | Scales::UnitMin => {}
            Scales::SuperMin => {
                group[own + r] = block.scale[first] as u8;
                group[own + 16 + r] = block.min[first];
            }
            Scales::Super => group[own + r] = block.scale[first] as u8,
            Scales::SuperHalf => {
                group[own + r] = block.scale[first] as u8;
                group[own + 16 + r] = block.scale[last] as u8;
            }
            Scales::SuperHalfMin => {
                group[own + r] = block.scale[first] as u8 | block.min[first] << 4;
                group[own + 16 + r] = block.scale[last] as u8 | block.min[last] << 4;
            }
        }
    }

    /// The stored quant of row `r` at k-value `k` of its group, unsigned.
    pub(crate) fn quant(&self, group: &[u8], k: usize, r: usize) -> u8 {
        let unit = self.unit(group, k / UNIT);
        let (low, high) = unit.split_at(self.low_bits * UNIT * GROUP_ROWS / 8);
        let (step, lane) = (k % UNIT / 4, 4 * r + k % 4);
        let low = match self.low_bits {
            8 => low[64 * step + lane],
            4 => low[64 * (step % 4) + lane] >> (step / 4 * 4) & 15,
            _ => low[64 * (step / 4) + lane] >> (step % 4 * 2) & 3,
        };
        match self.high_bits {
            0 => low,
            1 => low | (high[lane] >> step & 1) << self.low_bits,
            _ => low | (high[64 * (step / 4) + lane] >> (step % 4 * 2) & 3) << self.low_bits,
        }
    }

    /// The integer that the stored quant stands for.
    pub(crate) fn quant_value(&self, q: u8) -> i32 {
        match self.encoding {
            Encoding::Offset { log2 } => i32::from(q) - (1 << log2),
            Encoding::Plain => i32::from(q),
            Encoding::Codebook => i32::from(blocks::IQ4_VALUES[usize::from(q & 15)]),
        }
    }

    /// Scale and addend of row `r` for the 16 k-values from `16 half` of unit `u`: value = `scale * q + addend`.
    pub(crate) fn scale(&self, group: &[u8], u: usize, half: usize, r: usize) -> (f32, f32) {
        let (factors, own) = self.scales_at(u);
        let f16_at = |at: usize| f16::from_le_bytes([group[at + 2 * r], group[at + 2 * r + 1]]).to_f32();
        let d = f16_at(factors);
        match self.scales {
            Scales::Unit => (d, 0.0),
            Scales::UnitMin => (d, f16_at(factors + 32)),
            Scales::SuperMin => {
                let (scale, min) = (group[own + r], group[own + 16 + r]);
                (d * f32::from(scale), -(f16_at(factors + 32) * f32::from(min)))
            }
            Scales::Super => (d * f32::from(group[own + r] as i8), 0.0),
            Scales::SuperHalf => (d * f32::from(group[own + 16 * half + r] as i8), 0.0),
            Scales::SuperHalfMin => {
                let packed = group[own + 16 * half + r];
                (d * f32::from(packed & 15), -(f16_at(factors + 32) * f32::from(packed >> 4)))
            }
        }
    }

    /// Whether the two halves of a unit have scales of their own.
    #[inline(always)]
    pub(crate) const fn has_half_scales(&self) -> bool {
        matches!(self.scales, Scales::SuperHalf | Scales::SuperHalfMin)
    }

    /// Whether values have an addend.
    #[inline(always)]
    pub(crate) const fn has_addend(&self) -> bool {
        matches!(self.scales, Scales::UnitMin | Scales::SuperMin | Scales::SuperHalfMin)
    }

    /// Values of row `r` of a group of rows of `out.len()`: (K).
    pub(crate) fn unpack_row(&self, group: &[u8], r: usize, out: &mut [f32]) {
        for (u, out) in out.as_chunks_mut::<UNIT>().0.iter_mut().enumerate() {
            let quants = self.unit_row(self.unit(group, u), r);
            for (half, (quants, out)) in
                quants.as_chunks::<{ UNIT / 2 }>().0.iter().zip(out.as_chunks_mut::<{ UNIT / 2 }>().0).enumerate()
            {
                let (scale, addend) = self.scale(group, u, half, r);
                for (x, q) in out.iter_mut().zip(quants) {
                    *x = scale * self.quant_value(*q) as f32;
                }
                if self.has_addend() {
                    out.iter_mut().for_each(|x| *x += addend);
                }
            }
        }
    }

    /// The stored quants of row `r` in a unit, a word of four after the other.
    pub(crate) fn unit_row(&self, unit: &[u8], r: usize) -> [u8; UNIT] {
        let (low, high) = unit.split_at(self.low_bits * UNIT * GROUP_ROWS / 8);
        let word = |plane: &[u8], vector: usize| {
            let at = 64 * vector + 4 * r;
            u32::from_le_bytes([plane[at], plane[at + 1], plane[at + 2], plane[at + 3]])
        };
        let mut words: [u32; UNIT / 4] = match self.low_bits {
            8 => std::array::from_fn(|s| word(low, s)),
            4 => std::array::from_fn(|s| word(low, s % 4) >> (s / 4 * 4) & 0x0f0f_0f0f),
            _ => std::array::from_fn(|s| word(low, s / 4) >> (s % 4 * 2) & 0x0303_0303),
        };
        match self.high_bits {
            0 => {}
            1 => words
                .iter_mut()
                .enumerate()
                .for_each(|(s, to)| *to |= (word(high, 0) >> s & 0x0101_0101) << self.low_bits),
            _ => words.iter_mut().enumerate().for_each(|(s, to)| {
                *to |= (word(high, s / 4) >> (s % 4 * 2) & 0x0303_0303) << self.low_bits;
            }),
        }
        let mut quants = [0; UNIT];
        quants.as_chunks_mut::<4>().0.iter_mut().zip(words).for_each(|(q, word)| *q = word.to_le_bytes());
        quants
    }
}
