//! The block-quantised encodings of GGUF files: how one block's bytes become quants, scales and values.
//!
//! `split` takes a block apart into unsigned quants and factors; every value is `scale * q - min`, where the quant's
//! offset (the -8 of Q4_0) is already part of `q`'s meaning (see `Encoding`). `dequantize_row` writes plain values and is
//! the oracle of everything faster. Formats as in ggml's quantisation reference; nothing here is laid out for speed.

use half::f16;
use qwenkit_tensor::DType;

/// The sixteen values of the IQ4 types (ggml's `kvalues_iq4nl`).
pub(crate) const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Elements that one `Split` holds at most: a super-block.
pub(crate) const BLOCK_MAX: usize = 256;

/// One block taken apart: `value[e] = scale[e / 16] * (q[e] - offset) - min[e / 16]`.
pub(crate) struct Split {
    /// Unsigned quants as stored; for the IQ4 types the codebook's index.
    pub(crate) q: [u8; BLOCK_MAX],
    /// The block's own factors: `d` and, where the type has one, the factor of the minimums.
    pub(crate) d: f16,
    pub(crate) dmin: f16,
    /// Integer scale and minimum of each 16 elements; 1 and 0 or 1 for types without sub-blocks.
    pub(crate) scale: [i8; 16],
    pub(crate) min: [u8; 16],
}

impl Split {
    pub(crate) fn new() -> Split {
        Split { q: [0; BLOCK_MAX], d: f16::ZERO, dmin: f16::ZERO, scale: [1; 16], min: [0; 16] }
    }
}

/// What the unsigned quants of a type stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// `q - 2^log2`.
    Offset { log2: u32 },
    /// `q` itself; such types carry minimums.
    Plain,
    /// `IQ4_VALUES[q]`.
    Codebook,
}

/// The encoding of a quantised type; `None` for plain types.
pub(crate) const fn encoding(dtype: DType) -> Option<Encoding> {
    use DType::*;
    Some(match dtype {
        Q3_K => Encoding::Offset { log2: 2 },
        Q4_0 => Encoding::Offset { log2: 3 },
        Q5_0 => Encoding::Offset { log2: 4 },
        Q6_K => Encoding::Offset { log2: 5 },
        Q8_0 => Encoding::Offset { log2: 7 },
        Q4_1 | Q5_1 | Q2_K | Q4_K | Q5_K => Encoding::Plain,
        IQ4_NL | IQ4_XS => Encoding::Codebook,
        _ => return None,
    })
}

fn f16_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Low nibbles are elements `0..n`, high nibbles elements `n..2n`, for `n` bytes.
fn nibbles(bytes: &[u8], q: &mut [u8]) {
    let (low, high) = q.split_at_mut(bytes.len());
    for ((&byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = byte & 0x0f;
        *high = byte >> 4;
    }
}

/// Adds bit `e` of the little-endian `bits` as bit 4 of element `e`.
fn fifth_bits(bits: &[u8], q: &mut [u8]) {
    for (e, q) in q.iter_mut().enumerate() {
        *q |= (bits[e / 8] >> (e % 8) & 1) << 4;
    }
}

/// The 6-bit scale and minimum of sub-block `j` in the 12 packed bytes of Q4_K and Q5_K.
fn scale_min_k4(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    }
}

/// Takes one block of `dtype` apart. `block` has exactly `dtype.block_bytes()` bytes; `out` is overwritten up to the
/// block's length.
pub(crate) fn split(dtype: DType, block: &[u8], out: &mut Split) {
    debug_assert_eq!(block.len(), dtype.block_bytes());
    let q = &mut out.q;
    out.d = f16_at(block, 0);
    out.dmin = f16::ZERO;
    match dtype {
        DType::Q4_0 | DType::IQ4_NL => nibbles(&block[2..18], &mut q[..32]),
        DType::Q4_1 => {
            out.dmin = f16_at(block, 2);
            nibbles(&block[4..20], &mut q[..32]);
        }
        DType::Q5_0 => {
            nibbles(&block[6..22], &mut q[..32]);
            fifth_bits(&block[2..6], &mut q[..32]);
        }
        DType::Q5_1 => {
            out.dmin = f16_at(block, 2);
            nibbles(&block[8..24], &mut q[..32]);
            fifth_bits(&block[4..8], &mut q[..32]);
        }
        DType::Q8_0 => q.iter_mut().zip(&block[2..34]).for_each(|(q, &byte)| *q = byte ^ 0x80),
        DType::Q2_K => split_q2_k(block, out),
        DType::Q3_K => split_q3_k(block, out),
        DType::Q4_K | DType::Q5_K => split_q45_k(block, out),
        DType::Q6_K => split_q6_k(block, out),
        DType::IQ4_XS => split_iq4_xs(block, out),
        _ => unreachable!("{dtype} is not a block-quantised type"),
    }
}

fn split_q2_k(block: &[u8], out: &mut Split) {
    let (scales, qs) = (&block[..16], &block[16..80]);
    out.d = f16_at(block, 80);
    out.dmin = f16_at(block, 82);
    for (e, q) in out.q.iter_mut().enumerate() {
        *q = qs[e / 128 * 32 + e % 32] >> (e % 128 / 32 * 2) & 3;
    }
    for (i, &packed) in scales.iter().enumerate() {
        out.scale[i] = (packed & 15) as i8;
        out.min[i] = packed >> 4;
    }
}

fn split_q3_k(block: &[u8], out: &mut Split) {
    let (high, qs, scales) = (&block[..32], &block[32..96], &block[96..108]);
    out.d = f16_at(block, 108);
    for (e, q) in out.q.iter_mut().enumerate() {
        let low = qs[e / 128 * 32 + e % 32] >> (e % 128 / 32 * 2) & 3;
        *q = low | (high[e % 32] >> (e / 32) & 1) << 2;
    }
    for (i, scale) in out.scale.iter_mut().enumerate() {
        let low = if i < 8 { scales[i] & 15 } else { scales[i - 8] >> 4 };
        *scale = (low | (scales[8 + i % 4] >> (i / 4 * 2) & 3) << 4) as i8 - 32;
    }
}

fn split_q45_k(block: &[u8], out: &mut Split) {
    out.dmin = f16_at(block, 2);
    let qs = &block[block.len() - 128..];
    for (bytes, q) in qs.chunks_exact(32).zip(out.q.chunks_exact_mut(64)) {
        nibbles(bytes, q);
    }
    if block.len() == DType::Q5_K.block_bytes() {
        for (e, q) in out.q.iter_mut().enumerate() {
            *q |= (block[16 + e % 32] >> (e / 32) & 1) << 4;
        }
    }
    for j in 0..8 {
        let (scale, min) = scale_min_k4(&block[4..16], j);
        out.scale[2 * j..2 * j + 2].fill(scale as i8);
        out.min[2 * j..2 * j + 2].fill(min);
    }
}

fn split_q6_k(block: &[u8], out: &mut Split) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    out.d = f16_at(block, 208);
    for (e, q) in out.q.iter_mut().enumerate() {
        let (half, quarter, b) = (e / 128, e % 128 / 32, e % 32);
        let nibble = low[half * 64 + quarter % 2 * 32 + b] >> (quarter / 2 * 4) & 15;
        *q = nibble | (high[half * 32 + b] >> (quarter * 2) & 3) << 4;
    }
    for (scale, &byte) in out.scale.iter_mut().zip(scales) {
        *scale = byte as i8;
    }
}

fn split_iq4_xs(block: &[u8], out: &mut Split) {
    let (scales_high, scales_low, qs) = (u16::from_le_bytes([block[2], block[3]]), &block[4..8], &block[8..136]);
    for (i, (bytes, q)) in qs.chunks_exact(16).zip(out.q.chunks_exact_mut(32)).enumerate() {
        nibbles(bytes, q);
        let scale = scales_low[i / 2] >> (i % 2 * 4) & 15 | ((scales_high >> (2 * i) & 3) as u8) << 4;
        out.scale[2 * i..2 * i + 2].fill(scale as i8 - 32);
    }
}

/// Writes the values of one row of any weight type. `bytes` holds `out.len()` elements in whole blocks.
pub fn dequantize_row(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(dtype.row_bytes(out.len()), Some(bytes.len()), "{dtype} row of {} elements", out.len());
    match dtype {
        DType::F32 => out.iter_mut().zip(bytes.chunks_exact(4)).for_each(|(x, b)| {
            *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }),
        DType::F16 => out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(x, b)| *x = f16_at(b, 0).to_f32()),
        DType::BF16 => out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(x, b)| {
            *x = half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
        }),
        _ => dequantize_blocks(dtype, bytes, out),
    }
}

fn dequantize_blocks(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let Some(encoding) = encoding(dtype) else { unreachable!("{dtype} is no weight type") };
    let has_minimums = encoding == Encoding::Plain;
    let mut block = Split::new();
    for (bytes, out) in bytes.chunks_exact(dtype.block_bytes()).zip(out.chunks_exact_mut(dtype.block_len())) {
        split(dtype, bytes, &mut block);
        let (d, dmin) = (block.d.to_f32(), block.dmin.to_f32());
        for (e, x) in out.iter_mut().enumerate() {
            let value = match encoding {
                Encoding::Offset { log2 } => f32::from(i16::from(block.q[e]) - (1 << log2)),
                Encoding::Plain => f32::from(block.q[e]),
                Encoding::Codebook => f32::from(IQ4_VALUES[usize::from(block.q[e])]),
            };
            *x = d * f32::from(block.scale[e / 16]) * value;
            if has_minimums {
                // Q4_1 and Q5_1 add their minimum, the K types subtract theirs.
                *x += match dtype {
                    DType::Q4_1 | DType::Q5_1 => dmin,
                    _ => -(dmin * f32::from(block.min[e / 16])),
                };
            }
        }
    }
}

/// Whether a matrix of this type can be multiplied.
pub fn is_weight_type(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16) || encoding(dtype).is_some()
}
