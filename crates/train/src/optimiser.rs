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

    /// One step of `values` against `grads` times `share`, at this rate, on so many threads.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn step(
        &mut self,
        settings: AdamW,
        rate: f32,
        values: &mut [f32],
        (grads, share): (&[f32], f32),
        threads: usize,
    ) {
        let same = values.len() == grads.len() && self.mean.len() == values.len() && self.square.len() == values.len();
        assert!(same, "a step of {} numbers by {} gradients", values.len(), grads.len());
        self.steps += 1;
        let corrections = (
            1.0 - f64::from(settings.beta1).powf(self.steps as f64),
            1.0 - f64::from(settings.beta2).powf(self.steps as f64),
        );
        let mut pieces = Vec::new();
        let (mut values, mut grads) = (values, grads);
        let (mut mean, mut square) = (&mut self.mean[..], &mut self.square[..]);
        while !values.is_empty() {
            let len = PIECE.min(values.len());
            let (v, rest) = values.split_at_mut(len);
            values = rest;
            let (m, rest) = mean.split_at_mut(len);
            mean = rest;
            let (s, rest) = square.split_at_mut(len);
            square = rest;
            let (g, rest) = grads.split_at(len);
            grads = rest;
            pieces.push((v, m, s, g));
        }
        on_threads(pieces, threads, |(values, mean, square, grads)| {
            step(settings, rate, corrections, (values, mean, square), (grads, share));
        });
    }
}

fn step(
    settings: AdamW,
    rate: f32,
    (of_mean, of_square): (f64, f64),
    (values, mean, square): (&mut [f32], &mut [f32], &mut [f32]),
    (grads, share): (&[f32], f32),
) {
    let AdamW { beta1, beta2, eps, weight_decay } = settings;
    let keep = 1.0 - rate * weight_decay;
    let size = (f64::from(rate) / of_mean) as f32;
    let root = 1.0 / of_square.sqrt() as f32;
    for (((value, mean), square), grad) in values.iter_mut().zip(mean).zip(square).zip(grads) {
        let grad = share * grad;
        *mean = beta1 * *mean + (1.0 - beta1) * grad;
        *square = beta2 * *square + (1.0 - beta2) * grad * grad;
        *value = *value * keep - size * *mean / (square.sqrt() * root + eps);
    }
}

/// The length of a gradient over all its numbers, summed in f64, on so many threads with the same bits.
pub fn norm(grads: &[f32], threads: usize) -> f64 {
    let mut squares = vec![0.0; grads.len().div_ceil(PIECE)];
    on_threads(grads.chunks(PIECE).zip(&mut squares).collect(), threads, |(grads, to)| {
        let mut lanes = [0.0f64; 8];
        for eight in grads.chunks(lanes.len()) {
            lanes.iter_mut().zip(eight).for_each(|(sum, x)| *sum += f64::from(*x) * f64::from(*x));
        }
        *to = lanes.iter().sum::<f64>();
    });
    squares.iter().sum::<f64>().sqrt()
}

/// Calls `f` for each of some jobs, on so many threads.
fn on_threads<T: Send>(mut jobs: Vec<T>, threads: usize, f: impl Fn(T) + Sync) {
    let each = jobs.len().div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        while jobs.len() > each {
            let own = jobs.split_off(jobs.len() - each);
            scope.spawn(|| own.into_iter().for_each(&f));
        }
        jobs.into_iter().for_each(&f);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_those_of_the_formula() {
        let settings = AdamW { weight_decay: 0.01, ..AdamW::default() };
        // Longer than a piece, on two threads.
        let len = PIECE + 77;
        let mut values: Vec<f32> = (0..len).map(|i| (i as f32 * 0.1).sin()).collect();
        let start = values.clone();
        let mut moments = Moments::new(len);
        let (mut exact, mut m, mut s) = (Vec::new(), 0.0f64, 0.0f64);
        let at = PIECE - 5;
        exact.push(f64::from(start[at]));
        for t in 1..=3 {
            let grads: Vec<f32> = (0..len).map(|i| ((i + t) as f32 * 0.7).cos()).collect();
            moments.step(settings, 0.01, &mut values, (&grads, 0.5), 2);
            let (g, rate) = (0.5 * f64::from(grads[at]), 0.01);
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
        assert_eq!(norm(&[3.0, 4.0], 1), 5.0);
        assert_eq!(norm(&[], 3), 0.0);
        assert!(norm(&[f32::NAN, 1.0], 1).is_nan());
        let many: Vec<f32> = (0..3 * PIECE + 5).map(|i| (i as f32).sin()).collect();
        assert_eq!(norm(&many, 1).to_bits(), norm(&many, 3).to_bits());
        assert!((norm(&many, 2) - (many.len() as f64 / 2.0).sqrt()).abs() < 1e-2);
    }
}
