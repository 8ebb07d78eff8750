//! The way into the block-quantised types: rows of f32 become blocks whose values lie as near to them as the type allows.
//!
//! Nearness is a weighted sum of squares; the weights are the caller's importance of each column, if it has one. Every block
//! is searched on its own, sixteen blocks side by side in lanes, so a row has the same bytes on every instruction set and
//! whoever computes it. The way back is `blocks::dequantize_row`, which decides what the bytes mean.

mod fit;
mod join;
mod super_block;
mod tile;

use std::sync::OnceLock;

use half::{bf16, f16};
use qwenkit_tensor::DType;

use crate::{
    blocks::{BLOCK_MAX, Split},
    isa::Isa,
};
use fit::{Affine, Levels, fit_affine, fit_scale};
use tile::{LANES, Tile};

/// Encodes `values` as a row of `dtype`. `importance` says how much an error in each column counts, e.g. the mean square of
/// what the column is multiplied with; without it all columns count alike.
///
/// # Panics
/// If the row is no whole number of blocks, `out` is not its size, or `importance` is not of its length.
pub fn quantize_row(dtype: DType, values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    assert_eq!(dtype.row_bytes(values.len()), Some(out.len()), "{dtype} row of {} elements", values.len());
    assert!(importance.is_none_or(|w| w.len() == values.len()), "one importance for each column");
    match dtype {
        DType::F32 => out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(b, x)| *b = x.to_le_bytes()),
        DType::F16 => {
            out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(b, x)| *b = f16::from_f32(*x).to_le_bytes());
        }
        DType::BF16 => {
            out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(b, x)| *b = bf16::from_f32(*x).to_le_bytes());
        }
        _ => {
            let isa = *CHOSEN.get_or_init(|| Isa::detect().unwrap_or(Isa::Portable));
            quantize_blocks(isa, dtype, values, importance, out);
        }
    }
}

/// The instruction set, found at the first row.
static CHOSEN: OnceLock<Isa> = OnceLock::new();

fn quantize_blocks(isa: Isa, dtype: DType, values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    /// The same code, compiled for wider registers; products and sums stay apart, so its bits are the same.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn with_avx2(dtype: DType, values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        encode(dtype, values, importance, out);
    }
    match isa {
        // Registers of 512 bits gain nothing here (docs/LOG.md).
        // SAFETY: an instruction set is named only where the processor has it, and AVX-512 comes with AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 | Isa::Amx => unsafe { with_avx2(dtype, values, importance, out) },
        _ => encode(dtype, values, importance, out),
    }
}

/// Encodes a row, a tile of sixteen blocks or sub-blocks at a time.
#[inline(always)]
fn encode(dtype: DType, values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    use DType::*;
    // What a single value counts: large ones a little more, as what they are multiplied with tends to be large too.
    let sigma2 = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() / values.len().max(1) as f64;
    let row = Row { values, importance, sigma2: sigma2 as f32 };
    match dtype {
        Q4_0 => simple::<false, false>(dtype, &row, Levels { low: -8.0, high: 7.0 }, out),
        Q5_0 => simple::<false, false>(dtype, &row, Levels { low: -16.0, high: 15.0 }, out),
        Q8_0 => simple::<false, false>(dtype, &row, Levels { low: -127.0, high: 127.0 }, out),
        IQ4_NL => simple::<false, true>(dtype, &row, Levels::CODEBOOK, out),
        Q4_1 => simple::<true, false>(dtype, &row, Levels { low: 0.0, high: 15.0 }, out),
        Q5_1 => simple::<true, false>(dtype, &row, Levels { low: 0.0, high: 31.0 }, out),
        Q2_K => super_block::affine::<16>(dtype, &row, 3.0, 15.0, out),
        Q4_K => super_block::affine::<32>(dtype, &row, 15.0, 63.0, out),
        Q5_K => super_block::affine::<32>(dtype, &row, 31.0, 63.0, out),
        Q3_K => super_block::scaled::<16, false>(dtype, &row, Levels { low: -4.0, high: 3.0 }, 32.0, out),
        Q6_K => super_block::scaled::<16, false>(dtype, &row, Levels { low: -32.0, high: 31.0 }, 128.0, out),
        IQ4_XS => super_block::scaled::<32, true>(dtype, &row, Levels::CODEBOOK, 32.0, out),
        _ => unreachable!("{dtype} is not a block-quantised type"),
    }
}

/// A row with what its elements count.
struct Row<'a> {
    values: &'a [f32],
    importance: Option<&'a [f32]>,
    /// Mean square of the row.
    sigma2: f32,
}

/// Levels as they stand in blocks.
#[inline(always)]
fn stored<const N: usize, const CODEBOOK: bool>(q: &[[f32; LANES]; N], levels: Levels) -> [[u8; LANES]; N] {
    let mut stored = [[0; LANES]; N];
    for (stored, q) in stored.iter_mut().zip(q) {
        for l in 0..LANES {
            stored[l] = levels.stored::<CODEBOOK>(q[l]);
        }
    }
    stored
}

/// Types whose blocks of 32 stand for themselves.
#[inline(always)]
fn simple<const AFFINE: bool, const CODEBOOK: bool>(dtype: DType, row: &Row<'_>, levels: Levels, out: &mut [u8]) {
    let mut tile = Tile::<32>::new();
    let mut block = Split::new();
    for (i, out) in out.chunks_mut(LANES * dtype.block_bytes()).enumerate() {
        tile.load(row, i);
        let Affine { mut d, mut min } = match AFFINE {
            true => fit_affine(&tile, levels.high, false),
            false => Affine { d: fit_scale::<32, CODEBOOK>(&tile, levels), min: [0.0; LANES] },
        };
        // What will be read back decides the levels.
        d.iter_mut().chain(&mut min).for_each(|x| *x = f16::from_f32(*x).to_f32());
        let q = stored::<32, CODEBOOK>(&tile.levels::<CODEBOOK>(levels, &d, &min), levels);
        for (lane, out) in out.chunks_exact_mut(dtype.block_bytes()).enumerate() {
            block.d = f16::from_f32(d[lane]);
            block.dmin = f16::from_f32(min[lane]);
            for (e, q) in q.iter().enumerate() {
                block.q[e] = q[lane];
            }
            join::join(dtype, &block, out);
        }
    }
    debug_assert!(dtype.block_len() <= BLOCK_MAX);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::encoding;

    #[test]
    fn every_instruction_set_gives_the_same_bytes() {
        let mut state = 7_u64;
        let mut number = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 8.0
        };
        let values: Vec<f32> = (0..256 * 37).map(|_| number() * number() * number()).collect();
        let importance: Vec<f32> = (0..values.len()).map(|_| number().abs()).collect();
        for dtype in DType::ALL.into_iter().filter(|&t| encoding(t).is_some()) {
            for importance in [None, Some(&importance[..])] {
                let len = dtype.row_bytes(values.len()).unwrap();
                let mut plain = vec![0; len];
                encode(dtype, &values, importance, &mut plain);
                for isa in Isa::available() {
                    let mut fast = vec![0; len];
                    quantize_blocks(isa, dtype, &values, importance, &mut fast);
                    assert!(fast == plain, "{dtype} on {isa}");
                }
            }
        }
    }
}
