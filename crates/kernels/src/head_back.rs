//! Backward of the output head, whose gradient is nearly zero nearly everywhere: of each row only the numbers that count are
//! multiplied with their rows of the matrix.
//!
//! What is left out of a row adds up to a given share of its loss's scale at most; a row for which that leaves too many numbers
//! goes through the whole product. Source of the idea: Wijmans et al. 2024 (Cut Cross-Entropy), who drop what bf16 loses.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{gates::add_scaled_row, matmul::Compute, matmul_back::BackProduct, product::Join, weight::Weight};

/// Numbers below this share of the scale are left out at first.
const FIRST_SHARE: f32 = 1.0 / 4096.0;
/// What that is lowered by, while too much is left out.
const LOWER: f32 = 1.0 / 8.0;
/// With more numbers than this in a row the whole product is faster.
const NUMBERS_MAX: usize = 4096;

impl Compute {
    /// Backward of `matmul` by one `weight`: (N, K), from `dy`: (T, N), the gradient of losses that count `scale` each, as
    /// `cross_entropy` leaves it. `dx`: (T, K) is overwritten. Of each row of `dy` numbers are left out that add up to `share` of
    /// `scale` at most.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn head_backward(&self, weight: &Weight, dy: &[f32], (scale, share): (f32, f32), dx: &mut [f32]) {
        let (n, k) = (weight.rows(), weight.cols());
        let rows = dy.len() / n;
        assert!(dy.len() == rows * n && dx.len() == rows * k, "head_backward of ({rows}, {k}) by ({n}, {k})");
        let whole: Vec<AtomicBool> = (0..rows).map(|_| AtomicBool::new(false)).collect();
        self.each_row(dx, k, |isa, row, dx| {
            let dy = &dy[row * n..][..n];
            let Some(least) = threshold(dy, scale, share) else {
                whole[row].store(true, Ordering::Relaxed);
                return;
            };
            dx.fill(0.0);
            let mut of_weight = vec![0.0; k];
            for (i, d) in dy.iter().enumerate().filter(|(_, d)| d.abs() >= least) {
                weight.row(i, &mut of_weight);
                add_scaled_row(isa, *d, &of_weight, dx);
            }
        });
        let whole: Vec<usize> = (0..rows).filter(|row| whole[*row].load(Ordering::Relaxed)).collect();
        if whole.is_empty() {
            return;
        }
        let own: Vec<f32> = whole.iter().flat_map(|row| &dy[row * n..][..n]).copied().collect();
        let mut results = vec![0.0; whole.len() * k];
        self.matmul_backward(&[BackProduct { weight, dy: &own }], Join::OVER, &mut results);
        for (row, result) in whole.iter().zip(results.chunks_exact(k)) {
            dx[row * k..][..k].copy_from_slice(result);
        }
    }
}

/// The least size of a number that is taken; `None` where too many would be.
fn threshold(dy: &[f32], scale: f32, share: f32) -> Option<f32> {
    let mut least = scale.abs() * FIRST_SHARE;
    loop {
        let (mut left_out, mut taken) = (0.0f64, 0);
        for piece in dy.chunks(4096) {
            let (mut sum, mut count) = (0.0f32, 0usize);
            for d in piece {
                let is_small = d.abs() < least;
                sum += if is_small { d.abs() } else { 0.0 };
                count += usize::from(!is_small);
            }
            left_out += f64::from(sum);
            taken += count;
        }
        if taken > NUMBERS_MAX || !left_out.is_finite() {
            return None;
        }
        if left_out <= f64::from(scale.abs()) * f64::from(share) {
            return Some(least);
        }
        least *= LOWER;
    }
}

#[cfg(test)]
mod tests {
    use qwenkit_tensor::DType;

    use super::*;
    use crate::Isa;

    #[test]
    fn what_is_left_out_is_within_its_share() {
        let (n, k, rows, scale) = (9000, 24, 6, 0.125f32);
        for isa in Isa::available() {
            let compute = Compute::new(2, isa);
            let bytes: Vec<u8> = (0..n * k).flat_map(|i| (i as f32 * 0.37).sin().to_le_bytes()).collect();
            let weight = Weight::from_bytes(compute.pool(), DType::F32, n, k, &bytes).unwrap();
            let sharpness = [0.0, 1.0, 3.0, 6.0, 12.0, 40.0];
            let mut dy: Vec<f32> = (0..rows * n).map(|i| (i as f32 * 0.71).sin() * sharpness[i / n]).collect();
            let targets: Vec<u32> = (0..rows as u32).map(|row| row * 1000 + 5).collect();
            compute.cross_entropy(&mut dy, &targets, scale, &mut vec![0.0; rows]);
            let (mut found, mut exact) = (vec![f32::NAN; rows * k], vec![0.0; rows * k]);
            compute.matmul_backward(&[BackProduct { weight: &weight, dy: &dy }], Join::OVER, &mut exact);
            for share in [1.0 / 64.0, 1.0 / 4096.0] {
                compute.head_backward(&weight, &dy, (scale, share), &mut found);
                for (i, (found, exact)) in found.iter().zip(&exact).enumerate() {
                    // No number of the matrix is larger than 1.
                    let most = scale * share + 1e-5;
                    assert!((found - exact).abs() <= most, "{isa}, row {}: {found} and {exact}", i / k);
                }
            }
            // A flat row has no number that counts more than others; a sharp one has few that do.
            assert_eq!(threshold(&dy[..n], scale, 1.0 / 64.0), None);
            assert!(threshold(&dy[5 * n..], scale, 1.0 / 64.0).is_some());
        }
    }
}
