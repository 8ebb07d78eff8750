//! AdamW, as PyTorch computes it. Source: Loshchilov and Hutter 2017. Its moments are kept in f32, or in 8 bits (`dynamic`), a quarter
//! of the memory.
//!
//! Its state is as long as what is trained; a step goes through all of it once, on several threads, each number or block of numbers
//! for itself.

use crate::dynamic::{BLOCK, Blocks, SIGNED, UNSIGNED};

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

/// How moments are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As f32.
    #[default]
    F32,
    /// In 8 bits, block by block.
    Bits8,
}

/// Means of gradients and of their squares.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// Steps done.
    pub steps: u64,
    pub(crate) kept: KeptMoments,
}

/// Mean gradients, mean squares.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum KeptMoments {
    F32 { mean: Vec<f32>, square: Vec<f32> },
    Bits8 { mean: Blocks, square: Blocks },
}

/// Numbers that one thread takes at once: whole blocks.
const PIECE: usize = 256 * BLOCK;

/// What a step is made with.
struct Step {
    settings: AdamW,
    /// What a number is multiplied with.
    keep: f32,
    /// What the mean is multiplied with, and the root of the mean square.
    size: f32,
    root: f32,
    /// What gradients are multiplied with.
    share: f32,
}

impl Moments {
    /// Of so many numbers, before the first step.
    pub fn new(len: usize, precision: Precision) -> Moments {
        let kept = match precision {
            Precision::F32 => KeptMoments::F32 { mean: vec![0.0; len], square: vec![0.0; len] },
            Precision::Bits8 => {
                KeptMoments::Bits8 { mean: Blocks::zeros(len, &SIGNED), square: Blocks::zeros(len, &UNSIGNED) }
            }
        };
        Moments { steps: 0, kept }
    }

    /// Bytes of so many numbers' moments.
    pub fn bytes(len: usize, precision: Precision) -> usize {
        match precision {
            Precision::F32 => 8 * len,
            Precision::Bits8 => 2 * (len + 4 * len.div_ceil(BLOCK)),
        }
    }

    /// Of how many numbers they are; `None` if their parts do not fit each other.
    pub(crate) fn len(&self) -> Option<usize> {
        let lens = match &self.kept {
            KeptMoments::F32 { mean, square } => [mean.len(), square.len()],
            KeptMoments::Bits8 { mean, square } => {
                let fits = |blocks: &Blocks| blocks.scales.len() == blocks.codes.len().div_ceil(BLOCK);
                if !fits(mean) || !fits(square) {
                    return None;
                }
                [mean.codes.len(), square.codes.len()]
            }
        };
        (lens[0] == lens[1]).then_some(lens[0])
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
        let same = values.len() == grads.len() && self.len() == Some(values.len());
        assert!(same, "a step of {} numbers by {} gradients", values.len(), grads.len());
        self.steps += 1;
        let [of_mean, of_square] =
            [settings.beta1, settings.beta2].map(|beta| 1.0 - f64::from(beta).powf(self.steps as f64));
        let step = Step {
            settings,
            keep: 1.0 - rate * settings.weight_decay,
            size: (f64::from(rate) / of_mean) as f32,
            root: 1.0 / of_square.sqrt() as f32,
            share,
        };
        let both = values.chunks_mut(PIECE).zip(grads.chunks(PIECE));
        match &mut self.kept {
            KeptMoments::F32 { mean, square } => {
                let moments = mean.chunks_mut(PIECE).zip(square.chunks_mut(PIECE));
                on_threads(both.zip(moments).collect(), threads, |((values, grads), (mean, square))| {
                    step.plain(values, grads, mean, square);
                });
            }
            KeptMoments::Bits8 { mean, square } => {
                let moments = mean.pieces(PIECE).zip(square.pieces(PIECE));
                on_threads(both.zip(moments).collect(), threads, |((values, grads), (mean, square))| {
                    step.in_blocks((values, grads), mean, square);
                });
            }
        }
    }
}

impl Step {
    fn plain(&self, values: &mut [f32], grads: &[f32], mean: &mut [f32], square: &mut [f32]) {
        let &Step { settings: AdamW { beta1, beta2, eps, .. }, keep, size, root, share } = self;
        for (((value, mean), square), grad) in values.iter_mut().zip(mean).zip(square).zip(grads) {
            let grad = share * grad;
            *mean = beta1 * *mean + (1.0 - beta1) * grad;
            *square = beta2 * *square + (1.0 - beta2) * grad * grad;
            *value = *value * keep - size * *mean / (square.sqrt() * root + eps);
        }
    }

    /// As `plain`; moments are rounded behind the step, which uses them as they are.
    fn in_blocks(
        &self,
        (values, grads): (&mut [f32], &[f32]),
        (mean, mean_scales): (&mut [u8], &mut [f32]),
        (square, square_scales): (&mut [u8], &mut [f32]),
    ) {
        let (mut m, mut s) = ([0.0; BLOCK], [0.0; BLOCK]);
        let moments = mean.chunks_mut(BLOCK).zip(mean_scales).zip(square.chunks_mut(BLOCK).zip(square_scales));
        for ((values, grads), ((mean, of_mean), (square, of_square))) in
            values.chunks_mut(BLOCK).zip(grads.chunks(BLOCK)).zip(moments)
        {
            let (m, s) = (&mut m[..values.len()], &mut s[..values.len()]);
            SIGNED.expand(mean, *of_mean, m);
            UNSIGNED.expand(square, *of_square, s);
            self.plain(values, grads, m, s);
            *of_mean = SIGNED.round(m, mean);
            *of_square = UNSIGNED.round(s, square);
        }
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
        let mut moments = Moments::new(len, Precision::F32);
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
    fn steps_in_8_bits_are_near_and_the_same_on_any_number_of_threads() {
        let len = PIECE + 77;
        let grads = |t: usize| -> Vec<f32> {
            // Of very different sizes within a block.
            (0..len).map(|i| ((i * 7 + t) as f32 * 0.7).cos() * 10f32.powi(-(i as i32 % 4))).collect()
        };
        let trained = |precision: Precision, threads: usize| {
            let (mut values, mut moments) = (vec![0.0; len], Moments::new(len, precision));
            for t in 0..20 {
                moments.step(AdamW::default(), 1e-2, &mut values, (&grads(t / 5), 1.0), threads);
            }
            (values, moments)
        };
        let (exact, _) = trained(Precision::F32, 1);
        let (found, moments) = trained(Precision::Bits8, 1);
        assert!(trained(Precision::Bits8, 3) == (found.clone(), moments.clone()));
        let square = |x: f32| f64::from(x) * f64::from(x);
        let off: f64 = found.iter().zip(&exact).map(|(a, b)| square(a - b)).sum();
        let apart = (off / exact.iter().map(|x| square(*x)).sum::<f64>()).sqrt();
        assert!(apart < 0.1, "{apart}");
        assert!(found.iter().all(|x| x.abs() < 0.3), "no number runs away");
        let KeptMoments::Bits8 { mean, square } = &moments.kept else { panic!("they stay in 8 bits") };
        let held = mean.codes.len() + square.codes.len() + 4 * (mean.scales.len() + square.scales.len());
        assert_eq!(held, Moments::bytes(len, Precision::Bits8));
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
