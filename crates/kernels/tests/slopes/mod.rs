//! What tests of backward ops share: values, slopes by central differences in f64, and the comparison.

use qwenkit_kernels::{Compute, Isa};

/// Values that repeat nowhere: (N).
pub(crate) fn wave(n: usize, f: f64) -> Vec<f64> {
    (0..n).map(|i| (i as f64 * f + 0.3).sin()).collect()
}

/// As f32.
pub(crate) fn f32s(x: &[f64]) -> Vec<f32> {
    x.iter().map(|x| *x as f32).collect()
}

/// The gradient of `f` at `x` by central differences.
pub(crate) fn slopes(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let (old, step) = (x[i], 1e-5);
            x[i] = old + step;
            let above = f(&x);
            x[i] = old - step;
            let below = f(&x);
            x[i] = old;
            (above - below) / (2.0 * step)
        })
        .collect()
}

/// The inner product.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Holds two gradients to each other: they differ by no more than `tolerance` of the largest value.
pub(crate) fn assert_within(tolerance: f64, what: &str, found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-9f64, |m, x| m.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(error <= tolerance * largest, "{what}: at {i} found {found}, expected {expected}; largest {largest}");
    }
}

/// Calls `f` for each instruction set present, on one thread and on three.
pub(crate) fn on_every_isa(f: impl Fn(&Compute, &str)) {
    for isa in Isa::available() {
        for threads in [1, 3] {
            f(&Compute::new(threads, isa), &format!("{isa} on {threads} threads"));
        }
    }
}
