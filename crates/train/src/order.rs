//! In which order examples are learnt from: a function of the seed and the epoch alone, so that a run that was cut off goes on
//! with the very examples that would have come.

use crate::data::hash::{STEP, mixed};

/// A stream of numbers from a seed (SplitMix64, Steele et al. 2014).
#[derive(Clone, Debug)]
pub struct Numbers(u64);

impl Numbers {
    /// A stream of its own for each seed and purpose.
    pub fn new(seed: u64, purpose: u64) -> Numbers {
        let mut numbers = Numbers(seed ^ purpose.wrapping_mul(0xd1b5_4a32_d192_ed03));
        numbers.next();
        numbers
    }

    /// The next 64 bits.
    #[allow(clippy::should_implement_trait)] // it has no end, and nothing to gain from an iterator
    pub fn next(&mut self) -> u64 {
        let number = mixed(self.0);
        self.0 = self.0.wrapping_add(STEP);
        number
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    /// A number from -1 to 1.
    pub fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// Brings a list into an order of chance.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }
}

/// The numbers of the examples of one step: `batch` of them, or what an epoch has left at its end.
pub fn of_step(seed: u64, step: usize, batch: usize, examples: usize) -> Vec<usize> {
    let per_epoch = examples.div_ceil(batch);
    let (epoch, place) = (step / per_epoch, step % per_epoch);
    let mut order: Vec<usize> = (0..examples).collect();
    Numbers::new(seed, 1 + epoch as u64).shuffle(&mut order);
    order[place * batch..((place + 1) * batch).min(examples)].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_every_example_once_and_the_next_another_order() {
        let epoch = |epoch: usize| -> Vec<usize> { (0..4).flat_map(|i| of_step(7, epoch * 4 + i, 3, 10)).collect() };
        for i in 0..3 {
            let mut sorted = epoch(i);
            assert_ne!(sorted, epoch(i + 1));
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert_eq!(epoch(1), epoch(1));
        assert_ne!(of_step(7, 0, 10, 10), of_step(8, 0, 10, 10));
    }

    #[test]
    fn numbers_are_spread_evenly() {
        let mut numbers = Numbers::new(1, 2);
        let mut counts = [0; 10];
        let mut sum = 0.0;
        for _ in 0..10_000 {
            counts[numbers.below(10)] += 1;
            sum += numbers.signed();
        }
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
        assert!(sum.abs() < 300.0, "{sum}");
    }
}
