//! AdamW, as PyTorch computes it. Source: Loshchilov and Hutter 2017.
//!
//! Its state is three slices as long as what is trained; a step goes through all of them once, on several threads, each
//! number for itself.

/// What an optimiser is set to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// How fast the mean of gradients forgets.
    pub beta1: f32,
    /// How fast the mean of their squares forgets.
    pub beta2: f32,
    /// Added to the root of the mean square.
    pub eps: f32,
    /// What a number loses at each step beside its gradient, times the rate.
    pub weight_decay: f32,
}

impl Default for AdamW {
    fn default() -> AdamW {
        AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// Means of gradients and of their squares.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// Steps done.
    pub steps: u64,
    /// Mean gradients.
    pub mean: Vec<f32>,
    /// Mean squares.
    pub square: Vec<f32>,
}

/// Numbers that one thread takes at once.
const PIECE: usize = 1 << 16;

impl Moments {
    /// Of so many numbers, before the first step.
    pub fn new(len: usize) -> Moments {
        Moments { steps: 0, mean: vec![0.0; len], square: vec![0.0; len] }
    }

    /// One step of `values` against `grads` at this rate; `factors` says where the rate is another: from which number on, and
    /// times what. It begins at 0.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn step(&mut self, settings: AdamW, rate: f32, factors: &[(usize, f32)], values: &mut [f32], grads: &[f32]) {
        let same = values.len() == grads.len() && self.mean.len() == values.len() && self.square.len() == values.len();
        assert!(same, "a step of {} numbers by {} gradients", values.len(), grads.len());
        self.steps += 1;
        let factor_at = |at: usize| factors[factors.partition_point(|(from, _)| *from <= at) - 1].1;
        let corrections = (
            1.0 - f64::from(settings.beta1).powf(self.steps as f64),
            1.0 - f64::from(settings.beta2).powf(self.steps as f64),
        );
        let mut pieces = Vec::new();
        let (mut values, mut grads) = (values, grads);
        let (mut mean, mut square) = (&mut self.mean[..], &mut self.square[..]);
        let mut at = 0;
        while !values.is_empty() {
            // A piece has one rate.
            let next = factors.iter().map(|(from, _)| *from).find(|from| *from > at).unwrap_or(usize::MAX);
            let len = PIECE.min(next - at).min(values.len());
            let (v, rest) = values.split_at_mut(len);
            values = rest;
            let (m, rest) = mean.split_at_mut(len);
            mean = rest;
            let (s, rest) = square.split_at_mut(len);
            square = rest;
            let (g, rest) = grads.split_at(len);
            grads = rest;
            pieces.push((rate * factor_at(at), v, m, s, g));
            at += len;
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(pieces.len().max(1));
        let each = pieces.len().div_ceil(threads);
        std::thread::scope(|scope| {
            while !pieces.is_empty() {
                let own = pieces.split_off(pieces.len().saturating_sub(each));
                scope.spawn(move || {
                    for (rate, values, mean, square, grads) in own {
                        step(settings, rate, corrections, values, mean, square, grads);
                    }
                });
            }
        });
    }
}

fn step(
    settings: AdamW,
    rate: f32,
    (of_mean, of_square): (f64, f64),
    values: &mut [f32],
    mean: &mut [f32],
    square: &mut [f32],
    grads: &[f32],
) {
    let AdamW { beta1, beta2, eps, weight_decay } = settings;
    let keep = 1.0 - rate * weight_decay;
    let size = (f64::from(rate) / of_mean) as f32;
    let root = 1.0 / of_square.sqrt() as f32;
    for (((value, mean), square), grad) in values.iter_mut().zip(mean).zip(square).zip(grads) {
        *mean = beta1 * *mean + (1.0 - beta1) * grad;
        *square = beta2 * *square + (1.0 - beta2) * grad * grad;
        *value = *value * keep - size * *mean / (square.sqrt() * root + eps);
    }
}

/// The length of a gradient over all its numbers, summed in f64.
pub fn norm(grads: &[f32]) -> f64 {
    grads.chunks(4096).map(|x| x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>()).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_those_of_the_formula() {
        let settings = AdamW { weight_decay: 0.01, ..AdamW::default() };
        // Longer than a piece, with another rate in its midst.
        let len = PIECE + 77;
        let mut values: Vec<f32> = (0..len).map(|i| (i as f32 * 0.1).sin()).collect();
        let start = values.clone();
        let mut moments = Moments::new(len);
        let (mut exact, mut m, mut s) = (Vec::new(), 0.0f64, 0.0f64);
        let at = PIECE - 5;
        exact.push(f64::from(start[at]));
        for t in 1..=3 {
            let grads: Vec<f32> = (0..len).map(|i| ((i + t) as f32 * 0.7).cos()).collect();
            moments.step(settings, 0.01, &[(0, 1.0), (at, 3.0)], &mut values, &grads);
            let (g, rate) = (f64::from(grads[at]), 0.03);
            m = 0.9 * m + 0.1 * g;
            s = 0.999 * s + 0.001 * g * g;
            let (mean, square) = (m / (1.0 - 0.9f64.powi(t as i32)), s / (1.0 - 0.999f64.powi(t as i32)));
            exact.push(exact[t - 1] * (1.0 - rate * 0.01) - rate * mean / (square.sqrt() + 1e-8));
        }
        assert!((f64::from(values[at]) - exact[3]).abs() < 1e-6, "{} and {}", values[at], exact[3]);
        assert!((values[0] - start[0]).abs() < 0.04 && values[0] != start[0]);
        assert_eq!(moments.steps, 3);
    }

    #[test]
    fn the_norm_is_that_of_all_numbers() {
        assert_eq!(norm(&[3.0, 4.0]), 5.0);
        assert_eq!(norm(&[]), 0.0);
        assert!(norm(&[f32::NAN, 1.0]).is_nan());
    }
}
