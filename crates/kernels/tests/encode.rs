//! Rows into blocks and back: how near each type comes, that it finds what is exactly there, and that nothing breaks it.

use qwenkit_kernels::{dequantize_row, quantize_row};
use qwenkit_tensor::DType;

const QUANTIZED: [DType; 12] = {
    use DType::*;
    [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS]
};

/// About normal: the sum of twelve uniform numbers.
fn normal(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u32 << 24) as f32
    };
    (0..len).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

fn encode(dtype: DType, values: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let mut bytes = vec![0; dtype.row_bytes(values.len()).unwrap()];
    quantize_row(dtype, values, importance, &mut bytes);
    bytes
}

fn round_trip(dtype: DType, values: &[f32], importance: Option<&[f32]>) -> Vec<f32> {
    let mut back = vec![0.0; values.len()];
    dequantize_row(dtype, &encode(dtype, values, importance), &mut back);
    back
}

/// Weighted sum of squared errors over that of the values.
fn relative_error(values: &[f32], back: &[f32], importance: &[f32]) -> f64 {
    let sum = |f: &dyn Fn(usize) -> f64| (0..values.len()).map(|i| f64::from(importance[i]) * f(i)).sum::<f64>();
    sum(&|i| f64::from(values[i] - back[i]).powi(2)) / sum(&|i| f64::from(values[i]).powi(2))
}

#[test]
fn normal_values_come_back_as_near_as_the_type_allows() {
    // Measured relative squared errors of this encoder, rounded up by a few percent.
    let limits = [
        (DType::Q4_0, 6.4e-3),
        (DType::Q4_1, 4.9e-3),
        (DType::Q5_0, 1.6e-3),
        (DType::Q5_1, 1.15e-3),
        (DType::Q8_0, 2.9e-5),
        (DType::Q2_K, 7.1e-2),
        (DType::Q3_K, 2.1e-2),
        (DType::Q4_K, 4.9e-3),
        (DType::Q5_K, 1.2e-3),
        (DType::Q6_K, 2.9e-4),
        (DType::IQ4_NL, 6.0e-3),
        (DType::IQ4_XS, 6.2e-3),
    ];
    let values = normal(256 * 64, 1);
    let mut wrong = Vec::new();
    for (dtype, limit) in limits {
        let error = relative_error(&values, &round_trip(dtype, &values, None), &vec![1.0; values.len()]);
        if !(error < limit && error > 0.85 * limit) {
            wrong.push(format!("{dtype}: {error:.3e}, expected a little below {limit:.3e}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_lies_on_a_grid_is_found_again() {
    // Two times through the type: the values of the first are all representable, so the second must be as near.
    let values = normal(256 * 16, 2);
    for dtype in QUANTIZED {
        let once = round_trip(dtype, &values, None);
        let twice = round_trip(dtype, &once, None);
        let moved = relative_error(&once, &twice, &vec![1.0; values.len()]);
        let limit = if dtype.block_len() == 32 { 2e-6 } else { 2e-3 };
        assert!(moved < limit, "{dtype}: {moved:.3e}");
    }
}

#[test]
fn important_columns_come_nearer() {
    let values = normal(256 * 32, 3);
    let importance: Vec<f32> = (0..values.len()).map(|i| if i % 7 == 0 { 50.0 } else { 1.0 }).collect();
    for dtype in QUANTIZED.into_iter().filter(|&t| t != DType::Q8_0) {
        let with = relative_error(&values, &round_trip(dtype, &values, Some(&importance)), &importance);
        let without = relative_error(&values, &round_trip(dtype, &values, None), &importance);
        assert!(with < without, "{dtype}: {with:.4e} with importance, {without:.4e} without");
    }
}

#[test]
fn odd_blocks_are_encoded_too() {
    let mut rows: Vec<Vec<f32>> = vec![vec![0.0; 256], vec![0.5; 256], vec![-0.5; 256], vec![1e-30; 256]];
    rows.push((0..256).map(|i| if i == 77 { 1000.0 } else { 0.0 }).collect());
    rows.push((0..256).map(|i| if i == 77 { -1e-3 } else { 1e-3 }).collect());
    rows.push((0..256).map(|i| i as f32).collect());
    for dtype in QUANTIZED {
        for (i, row) in rows.iter().enumerate() {
            let back = round_trip(dtype, row, None);
            // Factors are f16: what lies below their range becomes zero.
            let peak = row.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
            let limit = if matches!(dtype, DType::Q2_K | DType::Q3_K) { 0.4 } else { 0.16 };
            for (x, y) in row.iter().zip(&back) {
                assert!(y.is_finite() && (x - y).abs() <= limit * peak + 1e-6, "{dtype}, row {i}: {x} became {y}");
            }
            // No importance at all is no reason for nonsense.
            let back = round_trip(dtype, row, Some(&vec![0.0; 256]));
            assert!(back.iter().zip(row).all(|(y, x)| (x - y).abs() <= limit * peak + 1e-6), "{dtype}, row {i}");
        }
    }
}

#[test]
fn a_row_is_its_blocks() {
    // The same bytes whatever stands beside a block: only the row's mean square is shared, so it is kept equal here.
    let values = normal(256, 5);
    for dtype in QUANTIZED {
        let one = encode(dtype, &values, None);
        for repeats in [2, 3, 17] {
            let many = encode(dtype, &values.repeat(repeats), None);
            assert!(many.chunks_exact(one.len()).all(|bytes| bytes == one), "{dtype} {repeats} times");
        }
    }
}

#[test]
fn plain_types_are_rounded() {
    let values = [1.0_f32, -2.5, 1e-8, 65504.0, 1.0 / 3.0];
    for (dtype, limit) in [(DType::F32, 0.0), (DType::F16, 5e-4), (DType::BF16, 4e-3)] {
        for (x, y) in values.iter().zip(round_trip(dtype, &values, None)) {
            assert!((x - y).abs() <= limit * x.abs() + 1e-8, "{dtype}: {x} became {y}");
        }
    }
}
