//! Quants and factors become a block's bytes: the reverse of `blocks::split`, type by type in the same order.

use qwenkit_tensor::DType;

use crate::blocks::Split;

/// Writes the block. `out` has exactly `dtype.block_bytes()` bytes.
pub(super) fn join(dtype: DType, block: &Split, out: &mut [u8]) {
    debug_assert_eq!(out.len(), dtype.block_bytes());
    out.fill(0);
    let q = &block.q;
    out[..2].copy_from_slice(&block.d.to_le_bytes());
    match dtype {
        DType::Q4_0 | DType::IQ4_NL => nibbles(&q[..32], &mut out[2..18]),
        DType::Q4_1 => {
            out[2..4].copy_from_slice(&block.dmin.to_le_bytes());
            nibbles(&q[..32], &mut out[4..20]);
        }
        DType::Q5_0 => {
            fifth_bits(&q[..32], &mut out[2..6]);
            nibbles(&q[..32], &mut out[6..22]);
        }
        DType::Q5_1 => {
            out[2..4].copy_from_slice(&block.dmin.to_le_bytes());
            fifth_bits(&q[..32], &mut out[4..8]);
            nibbles(&q[..32], &mut out[8..24]);
        }
        DType::Q8_0 => out[2..34].iter_mut().zip(q).for_each(|(byte, q)| *byte = q ^ 0x80),
        DType::Q2_K => join_q2_k(block, out),
        DType::Q3_K => join_q3_k(block, out),
        DType::Q4_K | DType::Q5_K => join_q45_k(block, out),
        DType::Q6_K => join_q6_k(block, out),
        DType::IQ4_XS => join_iq4_xs(block, out),
        _ => unreachable!("{dtype} is not a block-quantised type"),
    }
}

/// The first half of `q` into low nibbles, the second into high ones.
fn nibbles(q: &[u8], bytes: &mut [u8]) {
    let (low, high) = q.split_at(bytes.len());
    for ((byte, low), high) in bytes.iter_mut().zip(low).zip(high) {
        *byte = (low & 15) | (high & 15) << 4;
    }
}

/// Bit 4 of element `e` as bit `e` of little-endian `bits`.
fn fifth_bits(q: &[u8], bits: &mut [u8]) {
    for (e, q) in q.iter().enumerate() {
        bits[e / 8] |= (q >> 4 & 1) << (e % 8);
    }
}

fn join_q2_k(block: &Split, out: &mut [u8]) {
    out[..2].fill(0);
    for (e, q) in block.q.iter().enumerate() {
        out[16 + e / 128 * 32 + e % 32] |= q << (e % 128 / 32 * 2);
    }
    for (byte, (&scale, min)) in out.iter_mut().zip(block.scale.iter().zip(block.min)) {
        *byte = scale as u8 | min << 4;
    }
    out[80..82].copy_from_slice(&block.d.to_le_bytes());
    out[82..84].copy_from_slice(&block.dmin.to_le_bytes());
}

fn join_q3_k(block: &Split, out: &mut [u8]) {
    out[..2].fill(0);
    for (e, q) in block.q.iter().enumerate() {
        out[32 + e / 128 * 32 + e % 32] |= (q & 3) << (e % 128 / 32 * 2);
        out[e % 32] |= (q >> 2) << (e / 32);
    }
    for (i, &scale) in block.scale.iter().enumerate() {
        let scale = (i16::from(scale) + 32) as u8;
        out[96 + i % 8] |= (scale & 15) << (i / 8 * 4);
        out[104 + i % 4] |= (scale >> 4) << (i / 4 * 2);
    }
    out[108..110].copy_from_slice(&block.d.to_le_bytes());
}

fn join_q45_k(block: &Split, out: &mut [u8]) {
    out[2..4].copy_from_slice(&block.dmin.to_le_bytes());
    for j in 0..4 {
        let (scale, min) = (block.scale[2 * j] as u8, block.min[2 * j]);
        let (late_scale, late_min) = (block.scale[2 * j + 8] as u8, block.min[2 * j + 8]);
        out[4 + j] = scale | (late_scale >> 4) << 6;
        out[8 + j] = min | (late_min >> 4) << 6;
        out[12 + j] = late_scale & 15 | (late_min & 15) << 4;
    }
    if out.len() == DType::Q5_K.block_bytes() {
        for (e, q) in block.q.iter().enumerate() {
            out[16 + e % 32] |= (q >> 4 & 1) << (e / 32);
        }
    }
    let start = out.len() - 128;
    for (bytes, q) in out[start..].chunks_exact_mut(32).zip(block.q.chunks_exact(64)) {
        nibbles(q, bytes);
    }
}

fn join_q6_k(block: &Split, out: &mut [u8]) {
    out[..2].fill(0);
    for (e, q) in block.q.iter().enumerate() {
        let (half, quarter, b) = (e / 128, e % 128 / 32, e % 32);
        out[half * 64 + quarter % 2 * 32 + b] |= (q & 15) << (quarter / 2 * 4);
        out[128 + half * 32 + b] |= (q >> 4) << (quarter * 2);
    }
    for (byte, scale) in out[192..208].iter_mut().zip(block.scale) {
        *byte = scale as u8;
    }
    out[208..210].copy_from_slice(&block.d.to_le_bytes());
}

fn join_iq4_xs(block: &Split, out: &mut [u8]) {
    let mut high = 0_u16;
    for i in 0..8 {
        let scale = (i16::from(block.scale[2 * i]) + 32) as u8;
        out[4 + i / 2] |= (scale & 15) << (i % 2 * 4);
        high |= u16::from(scale >> 4) << (2 * i);
        nibbles(&block.q[i * 32..][..32], &mut out[8 + i * 16..][..16]);
    }
    out[2..4].copy_from_slice(&high.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::{encoding, split};

    /// Every bit of a block survives being taken apart and put together.
    #[test]
    fn a_block_comes_back_as_it_was() {
        let mut state = 1_u64;
        for dtype in DType::ALL.into_iter().filter(|&t| encoding(t).is_some()) {
            for _ in 0..200 {
                let block: Vec<u8> = (0..dtype.block_bytes())
                    .map(|_| {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        (state >> 56) as u8
                    })
                    .collect();
                let mut parts = Split::new();
                split(dtype, &block, &mut parts);
                let mut again = vec![0; block.len()];
                join(dtype, &parts, &mut again);
                assert_eq!(block, again, "{dtype}");
            }
        }
    }
}
