//! Every weight type end to end: a model whose weights are stored in the type, held against the same values as F32.
//!
//! The reference is exact in its weights, so what is left is the rounding of activations: 8 bits beside quantised
//! weights, bf16 beside BF16, none beside F16 - and keys and values cached in half precision.

use half::{bf16, f16};
use qwenkit_kernels::{Best, Compute, Isa, dequantize_row, is_weight_type};
use qwenkit_models::Outputs;
use qwenkit_tensor::{DType, TokenId};

use crate::{
    run::{self, Run, assert_same_bits, largest},
    tiny::{Noise, Shape, Tiny, bytes_of},
};

/// Rows are whole blocks of 256; vocabulary and heads are no multiples of the sixteen rows that kernels group.
const SHAPE: Shape = Shape {
    architecture: "qwen2",
    hidden_size: 256,
    intermediate_size: 512,
    layers: 2,
    heads: 4,
    kv_heads: 2,
    head_dim: 64,
    vocab_size: 323,
};

/// Relative difference of the logits, as a norm over all of them, that the type's activations explain: nothing
/// for F16, measured 0.005 for BF16 and 0.003 to 0.019 for the quantised types, alike on every instruction set.
fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F32 | DType::F16 => 0.0,
        DType::BF16 => 0.01,
        _ => 0.025,
    }
}

fn weight_types() -> impl Iterator<Item = DType> {
    DType::ALL.into_iter().filter(|dtype| is_weight_type(*dtype))
}

/// Bytes of `count` values in `dtype`, spread over about -0.1 to 0.1. Quantised ones are random bits with factors of
/// that size in the right places.
fn random_bytes(dtype: DType, count: usize, noise: &mut Noise) -> Vec<u8> {
    match dtype {
        DType::F32 => return (0..count).flat_map(|_| (0.1 * noise.next_f32()).to_le_bytes()).collect(),
        DType::F16 => return (0..count).flat_map(|_| f16::from_f32(0.1 * noise.next_f32()).to_le_bytes()).collect(),
        DType::BF16 => return (0..count).flat_map(|_| bf16::from_f32(0.1 * noise.next_f32()).to_le_bytes()).collect(),
        _ => {}
    }
    let mut bytes: Vec<u8> = (0..dtype.row_bytes(count).unwrap()).map(|_| noise.next_u64() as u8).collect();
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        for &(at, factor) in factors(dtype) {
            let factor = f16::from_f32(factor * (1.0 + 0.3 * noise.next_f32()));
            block[at..at + 2].copy_from_slice(&factor.to_le_bytes());
        }
    }
    bytes
}

/// Where a block's half-precision factors stand, and values that bring its quants to about -0.1 to 0.1.
fn factors(dtype: DType) -> &'static [(usize, f32)] {
    match dtype {
        DType::Q4_0 => &[(0, 0.012)],
        DType::Q4_1 => &[(0, 0.012), (2, -0.09)],
        DType::Q5_0 => &[(0, 0.006)],
        DType::Q5_1 => &[(0, 0.006), (2, -0.09)],
        DType::Q8_0 | DType::IQ4_NL => &[(0, 0.0008)],
        DType::Q2_K => &[(80, 0.002), (82, 0.003)],
        DType::Q3_K => &[(108, 0.0008)],
        DType::Q4_K => &[(0, 0.0001), (2, 0.00075)],
        DType::Q5_K => &[(0, 0.00005), (2, 0.00075)],
        DType::Q6_K => &[(208, 0.000025)],
        DType::IQ4_XS => &[(0, 0.000025)],
        other => panic!("{other} is a weight type that this test has no blocks for"),
    }
}

/// A model whose matrices are stored in `dtype`, and the same values as F32.
fn pair(dtype: DType) -> (Tiny, Tiny) {
    let mut stored = Tiny::new(&SHAPE);
    let mut noise = Noise::new(dtype as u64 + 1);
    for tensor in stored.tensors.iter_mut().filter(|t| t.shape.len() == 2) {
        tensor.dtype = dtype;
        tensor.bytes = random_bytes(dtype, tensor.shape.iter().product(), &mut noise);
    }
    let plain = as_f32(&stored);
    (stored, plain)
}

/// The same model with every tensor's values as F32.
fn as_f32(stored: &Tiny) -> Tiny {
    let mut plain = stored.clone();
    for tensor in &mut plain.tensors {
        let mut values = vec![0.0; tensor.shape.iter().product()];
        dequantize_row(tensor.dtype, &tensor.bytes, &mut values);
        (tensor.dtype, tensor.bytes) = (DType::F32, bytes_of(&values));
    }
    plain
}

fn prompt() -> Vec<TokenId> {
    let mut noise = Noise::new(3);
    (0..62).map(|_| TokenId((noise.next_u64() % SHAPE.vocab_size as u64) as u32)).collect()
}

/// |a - b| / |b|, as norms over all elements.
fn relative_difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = sum(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / sum(&mut b.iter().map(|b| f64::from(*b)))
}

/// Loads `stored` as it was written at `path` and holds it against `plain`; returns the relative difference.
fn difference(stored: &std::path::Path, plain: &std::path::Path, compute: &Compute) -> f64 {
    let ids = prompt();
    let logits = |path| run::logits(&run::load(path, compute), compute, &ids, &[]);
    relative_difference(&logits(stored), &logits(plain))
}

#[test]
fn every_weight_type_agrees_with_its_values_as_f32() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (folder.path().join("stored.gguf"), folder.path().join("plain.gguf"));
    let mut types = 0;
    for dtype in weight_types() {
        let (stored, plain) = pair(dtype);
        stored.write_gguf(&one);
        plain.write_gguf(&other);
        for isa in Isa::available() {
            let found = difference(&one, &other, &Compute::new(2, isa));
            assert!(found <= bound(dtype), "{dtype} on {isa}: {found} of the logits' norm, at most {}", bound(dtype));
        }
        types += 1;
    }
    assert!(types >= 14, "{types} weight types");
}

/// The bounds are sharp enough: one swapped block row, a wrong factor or a lost minimum is far outside them.
#[test]
fn a_wrong_block_is_far_outside_the_bound() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (folder.path().join("stored.gguf"), folder.path().join("plain.gguf"));
    let compute = Compute::new(1, Isa::Portable);
    for dtype in weight_types().filter(|dtype| dtype.is_quantized()) {
        let (stored, mut plain) = pair(dtype);
        // The neighbour's values in the first block of every row of one matrix in fourteen.
        let tensor = plain.tensors.iter_mut().find(|t| t.gguf == "blk.1.ffn_down.weight").unwrap();
        for row in tensor.bytes.chunks_exact_mut(4 * SHAPE.intermediate_size) {
            let (first, rest) = row.split_at_mut(4 * dtype.block_len());
            first.swap_with_slice(&mut rest[..4 * dtype.block_len()]);
        }
        stored.write_gguf(&one);
        plain.write_gguf(&other);
        let found = difference(&one, &other, &compute);
        assert!(found > 1.5 * bound(dtype), "{dtype}: {found} is not seen");
    }
}

#[test]
fn greedy_through_the_cache_is_greedy_from_scratch() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    for dtype in weight_types() {
        pair(dtype).0.write_gguf(&path);
        for isa in Isa::available() {
            let compute = Compute::new(1, isa);
            let model = run::load(&path, &compute);
            let mut ids = prompt();
            // Sixty-two tokens and four more: the answer crosses into the second page.
            for (step, (id, logits)) in run::greedy(&model, &compute, &ids, 4).into_iter().enumerate() {
                let all = run::logits(&model, &compute, &ids, &[]);
                let last = &all[all.len() - SHAPE.vocab_size..];
                assert_same_bits(&logits, last, &format!("{dtype} on {isa}, step {step}"));
                assert_eq!(id, largest(last));
                ids.push(id);
            }
        }
    }
}

/// Of a head in Q8_0 less is read where only the best logits are wanted, and these have the same bits.
#[test]
fn the_best_logits_are_those_of_the_whole_head() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    pair(DType::Q8_0).0.write_gguf(&path);
    let (compute, ids, vocab) = (Compute::new(2, Isa::detect().unwrap()), prompt(), SHAPE.vocab_size);
    let model = run::load(&path, &compute);
    let parts: [run::Part<'_>; 2] = [(&ids[..40], 0, &[0]), (&ids[40..], 0, &[1])];
    let best = Best { count: 1, among: vocab - 2, lowered: &[5, 6] };
    for (outputs, rows) in [(Outputs::Last, 2), (Outputs::All, ids.len())] {
        let mut run = Run::new(&model, &compute, 2);
        let full = run.feed(&parts, outputs);
        assert_eq!((full.len(), run.head_bytes()), (rows * vocab, model.head_bytes()));
        for some in [[Some(best), Some(best)], [Some(best), None]] {
            let found = run.feed_for_best(&parts, outputs, &some);
            for (full, found) in full.chunks_exact(vocab).zip(found.chunks_exact(vocab)) {
                let measure = |i: &usize| *i < best.among && !best.lowered.contains(&(*i as u32));
                let bar = (0..vocab).filter(measure).map(|i| full[i]).fold(f32::NEG_INFINITY, f32::max);
                for i in (0..best.among).filter(|&i| full[i] >= bar || found[i] > f32::NEG_INFINITY) {
                    assert_eq!(found[i].to_bits(), full[i].to_bits(), "{outputs:?}, logit {i}");
                }
            }
            let screens = rows == 2 && some[1].is_some();
            assert_eq!(found.contains(&f32::NEG_INFINITY), screens, "{outputs:?}");
            assert_eq!(run.head_bytes() < model.head_bytes(), screens, "{outputs:?}");
        }
        let none = run.feed_for_best(&parts, Outputs::None, &[Some(best), None]);
        assert_eq!((none.len(), run.head_bytes()), (0, 0));
    }
}

#[test]
fn half_precision_checkpoints_agree_with_their_values_as_f32() {
    for dtype in [DType::F16, DType::BF16] {
        let (stored, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut tiny = pair(dtype).0;
        // Real checkpoints hold norms and biases in the same type.
        for tensor in tiny.tensors.iter_mut().filter(|t| t.shape.len() == 1) {
            let values = tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            tensor.bytes = values
                .flat_map(|x| match dtype {
                    DType::F16 => f16::from_f32(x).to_le_bytes(),
                    _ => bf16::from_f32(x).to_le_bytes(),
                })
                .collect();
            tensor.dtype = dtype;
        }
        tiny.write_checkpoint(stored.path());
        as_f32(&tiny).write_checkpoint(plain.path());
        for isa in Isa::available() {
            let found = difference(stored.path(), plain.path(), &Compute::new(1, isa));
            assert!(found <= bound(dtype), "{dtype} on {isa}: {found}");
            assert_eq!(
                found > 0.0,
                dtype == DType::BF16,
                "{dtype} on {isa}: the reference was computed as {dtype} too"
            );
        }
    }
}

/// Q8_0 and Q4_0 by hand, without a line of the kernels' reading: quantised here, and what the blocks stand for.
#[test]
fn blocks_quantised_by_hand_are_read_as_meant() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (folder.path().join("stored.gguf"), folder.path().join("plain.gguf"));
    let f32s = |bytes: &[u8]| -> Vec<f32> {
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    type Quantise = fn(&[f32]) -> (Vec<u8>, Vec<f32>);
    for (dtype, quantise) in [(DType::Q8_0, block_q8_0 as Quantise), (DType::Q4_0, block_q4_0)] {
        let (mut stored, mut plain) = (Tiny::new(&SHAPE), Tiny::new(&SHAPE));
        for (stored, plain) in stored.tensors.iter_mut().zip(&mut plain.tensors).filter(|(t, _)| t.shape.len() == 2) {
            let blocks: Vec<_> = f32s(&plain.bytes).chunks_exact(32).map(quantise).collect();
            (stored.dtype, stored.bytes) = (dtype, blocks.iter().flat_map(|(bytes, _)| bytes).copied().collect());
            let meant: Vec<f32> = blocks.into_iter().flat_map(|(_, values)| values).collect();
            let mut read = vec![0.0; meant.len()];
            dequantize_row(dtype, &stored.bytes, &mut read);
            assert_same_bits(&read, &meant, &format!("{} as {dtype}", stored.gguf));
            plain.bytes = bytes_of(&meant);
        }
        stored.write_gguf(&one);
        plain.write_gguf(&other);
        for isa in Isa::available() {
            let found = difference(&one, &other, &Compute::new(1, isa));
            assert!(found <= bound(dtype), "{dtype} on {isa}: {found}");
        }
    }
}

/// A Q8_0 block: half-precision scale, 32 signed bytes.
fn block_q8_0(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let largest = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let d = f16::from_f32(largest / 127.0);
    let q: Vec<i8> = values.iter().map(|x| (x / d.to_f32()).round().clamp(-127.0, 127.0) as i8).collect();
    let bytes = d.to_le_bytes().into_iter().chain(q.iter().map(|q| q.to_le_bytes()[0])).collect();
    (bytes, q.into_iter().map(|q| d.to_f32() * f32::from(q)).collect())
}

/// A Q4_0 block: half-precision scale, 16 bytes with element i low and element i + 16 high, 8 being nought.
fn block_q4_0(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let largest = values.iter().copied().fold(0.0f32, |m, x| if x.abs() > m.abs() { x } else { m });
    let d = f16::from_f32(largest / -8.0);
    let q: Vec<u8> = values.iter().map(|x| (x / d.to_f32() + 8.5).clamp(0.0, 15.0) as u8).collect();
    let bytes = d.to_le_bytes().into_iter().chain((0..16).map(|i| q[i] | q[i + 16] << 4)).collect();
    (bytes, q.into_iter().map(|q| d.to_f32() * (f32::from(q) - 8.0)).collect())
}
