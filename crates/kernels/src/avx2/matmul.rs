//! Matrix products on AVX2: a tile of 16 output rows, in two registers, by up to 4 tokens.
//!
//! Where the machine has AVX-VNNI, unsigned quants multiply with signed activations (`vpdpbusd`). Elsewhere quants below 128 do
//! (`vpmaddubsw`, whose 16-bit sums they cannot overflow), and 8-bit types move the sign of the weight to the activation first.
//! Order of operations as in `portable::matmul`.
//!
//! # Safety
//! Every `unsafe fn` here asks that the machine has what `Isa::Avx2` stands for, and that the unit, group, tile or
//! rows it is given exist in the weight, the cache and the activations it is given.

use std::{arch::x86_64::*, ops::Range};

use qwenkit_tensor::DType;

use super::panel;
use crate::{
    activations::tile_of,
    blocks::{Encoding, IQ4_VALUES},
    layout::{GROUP_ROWS, Layout, Scales, UNIT, offset_log2},
    matmul::Task,
    prefetch,
};

/// Tokens of a tile: with two halves of 16 rows, eight accumulators and eight sums, no more fits 16 registers.
const TILE_TOKENS: usize = 4;
/// Bytes of activations gone through before the next group of rows: half of a laptop core's second-level cache.
const PANEL_BYTES: usize = 256 << 10;
/// Rows in one register.
pub(super) const HALF_ROWS: usize = 8;

/// Computes the task's groups for all its rows.
///
/// # Safety
/// The machine has what `Isa::Avx2` stands for.
pub(crate) unsafe fn run(task: &Task<'_>) {
    macro_rules! by_type {
        ($($dtype:ident)*) => {
            match task.weight.dtype() {
                // SAFETY: the caller's promise.
                $(DType::$dtype => task.panels(PANEL_BYTES, TILE_TOKENS, |g, t| unsafe { quantized::<{ DType::$dtype as usize }>(task, g, t) }),)*
                // SAFETY: the caller's promise.
                _ => task.panels(PANEL_BYTES / 4, TILE_TOKENS, |g, t| unsafe { plain(task, g, t) }),
            }
        };
    }
    by_type!(Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS);
}

/// One group of a quantised weight by `tokens`.
unsafe fn quantized<const D: usize>(task: &Task<'_>, g: usize, tokens: Range<usize>) {
    // SAFETY: the caller's promise, and the machine has AVX-VNNI where it is asked for.
    unsafe {
        match is_x86_feature_detected!("avxvnni") {
            true => with_vnni::<D>(task, g, tokens),
            false => without::<D>(task, g, tokens),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn with_vnni<const D: usize>(task: &Task<'_>, g: usize, tokens: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe { tiles::<D, true>(task, g, tokens) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn without<const D: usize>(task: &Task<'_>, g: usize, tokens: Range<usize>) {
    // SAFETY: the caller's promise.
    unsafe { tiles::<D, false>(task, g, tokens) }
}

#[inline(always)]
unsafe fn tiles<const D: usize, const VNNI: bool>(task: &Task<'_>, g: usize, tokens: Range<usize>) {
    // Without VNNI, adding up in 16 bits is what the panels' way pays with, and signed values cannot (measured: 52 against 58
    // GMAC/s).
    if tokens.len() >= panel::TOKENS_MIN && const { !is_signed::<D>(VNNI) } {
        // SAFETY: the caller's promise.
        return unsafe { panel::quantized::<D, VNNI>(task, g, tokens) };
    }
    let mut t = tokens.start;
    // SAFETY: each tile stays inside `tokens`.
    unsafe {
        while t < tokens.end {
            t += match tokens.end - t {
                TILE_TOKENS.. => quantized_tile::<D, VNNI, 4>(task, g, t),
                2.. => quantized_tile::<D, VNNI, 2>(task, g, t),
                _ => quantized_tile::<D, VNNI, 1>(task, g, t),
            };
        }
    }
}

/// Group `g` by tokens `t..t + C`; returns C.
#[inline(always)]
unsafe fn quantized_tile<const D: usize, const VNNI: bool, const C: usize>(
    task: &Task<'_>,
    g: usize,
    t: usize,
) -> usize {
    let layout = const { Layout::at::<D>() };
    let cols = task.x.cols;
    let units = cols / UNIT;
    let group = task.group(g).as_ptr();
    // SAFETY: the group holds quants and scales of `units` units, and rows t..t + C of the activations exist.
    unsafe {
        // The tile of activations is as wide as this one or twice as wide.
        let (first, width) = tile_of(task.x.widest, t, task.x.rows);
        let at = first * units + (t - first);
        let (x, facts) = (task.x.quants.as_ptr().add(at * UNIT), task.x.facts.as_ptr().add(at));
        for half in 0..2 {
            // The second half reads the same lines again.
            let ahead = half == 0 && task.asks_ahead();
            let mut acc = [_mm256_setzero_ps(); C];
            for u in 0..units {
                let unit = group.add(layout.quants_at(u));
                if ahead {
                    let before = layout.bytes_before(u);
                    prefetch::ahead(unit.wrapping_sub(before), before + layout.unit_bytes());
                }
                let (parts, steps) = if layout.has_half_scales() { (2, 4) } else { (1, 8) };
                for part in 0..parts {
                    let which = if parts == 1 { 0 } else { 1 + part };
                    let mut sum = [_mm256_setzero_si256(); C];
                    if let Some(log2) = const { offset::<D>(VNNI) } {
                        for c in 0..C {
                            sum[c] = shifted((*facts.add(u * width + c)).minus_sum[which], log2);
                        }
                    }
                    for s in part * steps..(part + 1) * steps {
                        let q = step::<D, VNNI>(unit, s, half);
                        for c in 0..C {
                            let four =
                                _mm256_set1_epi32(x.add((u * width + c) * UNIT + 4 * s).cast::<i32>().read_unaligned());
                            sum[c] = add_products::<D, VNNI>(sum[c], q, four);
                        }
                    }
                    let (scale, addend) = factors::<D>(group, u, part, half);
                    for c in 0..C {
                        let facts = &*facts.add(u * width + c);
                        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(facts.scale));
                        acc[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[c]), scale, acc[c]);
                        if layout.has_addend() {
                            acc[c] = _mm256_fmadd_ps(addend, _mm256_set1_ps(facts.sum[which]), acc[c]);
                        }
                    }
                }
            }
            for (c, acc) in acc.into_iter().enumerate() {
                store(task, g, half, t + c, acc);
            }
        }
    }
    C
}

/// Whether `step` gives a type's quants as signed values: those that reach 128, where they have to stay below it.
pub(super) const fn is_signed<const D: usize>(vnni: bool) -> bool {
    !vnni && matches!(Layout::at::<D>().encoding, Encoding::Codebook | Encoding::Offset { log2: 7 })
}

/// log2 of what is to be taken from the quants that `step` gives.
pub(super) const fn offset<const D: usize>(vnni: bool) -> Option<u32> {
    if is_signed::<D>(vnni) { None } else { offset_log2(Layout::at::<D>().encoding) }
}

/// `value << log2` in every lane.
#[inline(always)]
pub(super) unsafe fn shifted(value: i32, log2: u32) -> __m256i {
    // SAFETY: the caller has AVX2.
    unsafe { _mm256_sll_epi32(_mm256_set1_epi32(value), _mm_cvtsi32_si128(log2 as i32)) }
}

/// Adds sums of four products for each of 8 rows, of quants as `step` gives them.
#[inline(always)]
pub(super) unsafe fn add_products<const D: usize, const VNNI: bool>(sum: __m256i, q: __m256i, x: __m256i) -> __m256i {
    // SAFETY: the caller has AVX2, and AVX-VNNI if VNNI.
    unsafe {
        if VNNI {
            return _mm256_dpbusd_avx_epi32(sum, q, x);
        }
        let pairs = match const { is_signed::<D>(false) } {
            true => _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q)),
            false => _mm256_maddubs_epi16(q, x),
        };
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

/// Step `s` of rows `8 half..8 half + 8`: unsigned quants, or signed values (`is_signed`).
#[inline(always)]
pub(super) unsafe fn step<const D: usize, const VNNI: bool>(unit: *const u8, s: usize, half: usize) -> __m256i {
    let layout = const { Layout::at::<D>() };
    // SAFETY: the loads stay within the unit: `low_bits` vectors and then `high_bits` vectors of 64 bytes.
    unsafe {
        let load = |i: usize| _mm256_loadu_si256(unit.add(64 * i + 32 * half).cast());
        let right = |v, bits: usize| _mm256_srl_epi16(v, _mm_cvtsi32_si128(bits as i32));
        let left = |v, bits: usize| _mm256_sll_epi16(v, _mm_cvtsi32_si128(bits as i32));
        let mut q = match layout.low_bits {
            8 if const { is_signed::<D>(VNNI) } => _mm256_xor_si256(load(s), _mm256_set1_epi8(-128)),
            8 => load(s),
            4 => _mm256_and_si256(right(load(s % 4), s / 4 * 4), _mm256_set1_epi8(15)),
            _ => _mm256_and_si256(right(load(s / 4), s % 4 * 2), _mm256_set1_epi8(3)),
        };
        let to = layout.low_bits;
        if layout.high_bits == 1 {
            let bit = right(left(load(to), to.saturating_sub(s)), s.saturating_sub(to));
            q = _mm256_or_si256(q, _mm256_and_si256(bit, _mm256_set1_epi8(1 << to)));
        } else if layout.high_bits == 2 {
            let at = s % 4 * 2;
            let bits = right(left(load(to + s / 4), to.saturating_sub(at)), at.saturating_sub(to));
            q = _mm256_or_si256(q, _mm256_and_si256(bits, _mm256_set1_epi8(0x30)));
        }
        if matches!(layout.encoding, Encoding::Codebook) {
            let values = _mm256_broadcastsi128_si256(_mm_loadu_si128(IQ4_VALUES.as_ptr().cast()));
            q = _mm256_shuffle_epi8(values, q);
            if const { !is_signed::<D>(VNNI) } {
                q = _mm256_xor_si256(q, _mm256_set1_epi8(-128));
            }
        }
        q
    }
}

/// Scale and addend of rows `8 half..8 half + 8` for part `part` of unit `u`.
#[inline(always)]
pub(super) unsafe fn factors<const D: usize>(group: *const u8, u: usize, part: usize, half: usize) -> (__m256, __m256) {
    let layout = const { Layout::at::<D>() };
    // SAFETY: offsets are those of the layout; every load is 16 or 8 bytes of a field's half.
    unsafe {
        let f16s = |at: usize| _mm256_cvtph_ps(_mm_loadu_si128(group.add(at + 16 * half).cast()));
        let bytes = |at: usize| _mm_loadl_epi64(group.add(at + HALF_ROWS * half).cast());
        let unsigned = |b| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b));
        let signed = |b| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
        let negate = |x| _mm256_xor_ps(x, _mm256_set1_ps(-0.0));
        let none = _mm256_setzero_ps();
        let (start, own) = layout.scales_at(u);
        match layout.scales {
            Scales::Unit => (f16s(start), none),
            Scales::UnitMin => (f16s(start), f16s(start + 32)),
            Scales::SuperMin => {
                let min = _mm256_mul_ps(f16s(start + 32), unsigned(bytes(own + 16)));
                (_mm256_mul_ps(f16s(start), unsigned(bytes(own))), negate(min))
            }
            Scales::Super => (_mm256_mul_ps(f16s(start), signed(bytes(own))), none),
            Scales::SuperHalf => (_mm256_mul_ps(f16s(start), signed(bytes(own + 16 * part))), none),
            Scales::SuperHalfMin => {
                let (packed, low) = (bytes(own + 16 * part), _mm_set1_epi8(15));
                let min = unsigned(_mm_and_si128(_mm_srli_epi16::<4>(packed), low));
                let scale = _mm256_mul_ps(f16s(start), unsigned(_mm_and_si128(packed, low)));
                (scale, negate(_mm256_mul_ps(f16s(start + 32), min)))
            }
        }
    }
}

/// Writes sums of rows `8 half..` of group `g` for token `t`.
#[inline(always)]
pub(super) unsafe fn store(task: &Task<'_>, g: usize, half: usize, t: usize, acc: __m256) {
    let mut values = [0.0; HALF_ROWS];
    // SAFETY: `values` holds eight; this thread alone computes group `g`, so its elements are written once.
    unsafe {
        _mm256_storeu_ps(values.as_mut_ptr(), acc);
        if let Some(out) = task.results(g, t).chunks_mut(HALF_ROWS).nth(half) {
            out.copy_from_slice(&values[..out.len()]);
        }
    }
}

/// One group of a plain weight by `tokens`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn plain(task: &Task<'_>, g: usize, tokens: Range<usize>) {
    let mut t = tokens.start;
    // SAFETY: each tile stays inside `tokens`.
    unsafe {
        while t < tokens.end {
            t += match tokens.end - t {
                TILE_TOKENS.. => plain_tile::<4>(task, g, t),
                2.. => plain_tile::<2>(task, g, t),
                _ => plain_tile::<1>(task, g, t),
            };
        }
    }
}

/// Group `g` by tokens `t..t + C`; returns C.
#[inline(always)]
unsafe fn plain_tile<const C: usize>(task: &Task<'_>, g: usize, t: usize) -> usize {
    let group = task.group(g).as_ptr();
    let cols = task.x.cols;
    // SAFETY: the group holds every k of K (BF16: pairs, zero-padded), and rows t..t + C of the activations exist.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); 2]; C];
        let mut add = |w: [__m256; 2], x: &dyn Fn(usize) -> f32| {
            for (c, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_set1_ps(x(c));
                acc[0] = _mm256_fmadd_ps(w[0], x, acc[0]);
                acc[1] = _mm256_fmadd_ps(w[1], x, acc[1]);
            }
        };
        let value = |k: usize| move |c: usize| *task.x.values.as_ptr().add((t + c) * cols + k);
        match task.weight.dtype() {
            DType::F32 => {
                for k in 0..cols {
                    let at = group.cast::<f32>().add(GROUP_ROWS * k);
                    add([_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(HALF_ROWS))], &value(k));
                }
            }
            DType::F16 => {
                for k in 0..cols {
                    let at = group.add(2 * GROUP_ROWS * k).cast::<__m128i>();
                    let w = [_mm_loadu_si128(at), _mm_loadu_si128(at.add(1))];
                    add(w.map(|w| _mm256_cvtph_ps(w)), &value(k));
                }
            }
            _ => {
                for k in (0..cols).step_by(2) {
                    let at = group.add(2 * GROUP_ROWS * k).cast::<__m256i>();
                    let w = [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))];
                    // A bf16 is the upper half of the f32 of the same value.
                    add(w.map(|w| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w))), &value(k));
                    let upper = _mm256_set1_epi32(-65536);
                    if k + 1 < cols {
                        add(w.map(|w| _mm256_castsi256_ps(_mm256_and_si256(w, upper))), &value(k + 1));
                    }
                }
            }
        }
        for (c, acc) in acc.into_iter().enumerate() {
            store(task, g, 0, t + c, acc[0]);
            store(task, g, 1, t + c, acc[1]);
        }
    }
    C
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Isa,
        activations::Activations,
        matmul::{Compute, Rows},
        shared_out::SharedOut,
        weight::{Operand, Weight},
    };

    /// The products of (tokens, 96 or 256) with 33 rows, by `f` for each group.
    fn product(compute: &Compute, weight: &Weight, x: &[f32], f: impl Fn(&Task<'_>, usize, Range<usize>)) -> Vec<f32> {
        let tokens = x.len() / weight.cols();
        let mut prepared = Activations::default();
        prepared.prepare(Isa::Avx2, compute.pool(), x, weight.cols(), &[Operand::Quantized]);
        let mut out = vec![f32::NAN; tokens * weight.rows()];
        let shared = SharedOut::new(&mut out);
        let (groups, x) = (0..weight.groups(), Rows::of(&prepared, x));
        let task = Task { weight, groups, joined: None, x, out: &shared, out_step: weight.rows(), out_group: 0 };
        task.groups.clone().for_each(|g| f(&task, g, 0..tokens));
        out
    }

    /// A machine with AVX-VNNI would otherwise never run what machines without it do.
    #[test]
    fn with_and_without_vnni_products_have_the_same_bits() {
        if !Isa::available().contains(&Isa::Avx2) {
            return;
        }
        let compute = Compute::new(1, Isa::Avx2);
        macro_rules! each {
            ($($dtype:ident)*) => {$({
                let dtype = DType::$dtype;
                let cols = 256;
                let values: Vec<f32> = (0..33 * cols).map(|i| (i as f32 * 0.37).sin() * (1.0 + (i % 7) as f32)).collect();
                let mut bytes = vec![0; dtype.tensor_bytes(&[33, cols]).unwrap()];
                let row_bytes = dtype.row_bytes(cols).unwrap();
                for (x, to) in values.chunks_exact(cols).zip(bytes.chunks_exact_mut(row_bytes)) {
                    crate::quantize_row(dtype, x, None, to);
                }
                let weight = Weight::from_bytes(compute.pool(), dtype, 33, cols, &bytes).unwrap();
                for tokens in [1, 3, 8, 130] {
                    let x: Vec<f32> = (0..tokens * cols).map(|i| (i as f32 * 0.73).cos() * 3.0).collect();
                    // SAFETY: the machine has what is asked for.
                    let plain = product(&compute, &weight, &x, |task, g, t| unsafe { without::<{ DType::$dtype as usize }>(task, g, t) });
                    assert!(plain.iter().all(|x| x.is_finite()), "{dtype}, {tokens} tokens");
                    if is_x86_feature_detected!("avxvnni") {
                        // SAFETY: as above.
                        let vnni = product(&compute, &weight, &x, |task, g, t| unsafe { with_vnni::<{ DType::$dtype as usize }>(task, g, t) });
                        assert_eq!(vnni, plain, "{dtype}, {tokens} tokens");
                    }
                    let portable = Compute::new(1, Isa::Portable);
                    let (mut expected, mut scratch) = (vec![0.0; tokens * 33], crate::MatmulScratch::default());
                    portable.matmul(&mut scratch, &x, &mut [crate::Product { weight: &weight, out: &mut expected }]);
                    assert_eq!(plain, expected, "{dtype}, {tokens} tokens, portable");
                }
            })*};
        }
        each!(Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS);
    }
}
