//! How many guessed tokens a step should compute: as many as make it give more tokens for its time.
//!
//! A step's time grows with its rows, above a part that it takes anyway, mostly for reading the weights. The cost of a row is
//! measured while steps differ in their rows. Not here: which tokens are guessed (`drafter`).

use std::time::Duration;

use crate::drafter::Chances;

/// The cost of a row before any is measured.
const BELIEVED: f64 = 0.1;
/// How much of what was seen is left after each step; and of what was seen of the block, which is asked seldom while it counts as dear.
const KEPT: f64 = 0.98;
const KEPT_OF_BLOCK: f64 = 0.998;
/// Steps that must have been seen, and how far their rows must lie apart (variance).
const LEAST_STEPS: f64 = 8.0;
const LEAST_SPREAD: f64 = 0.5;
/// Costs beyond which rows count as free, or as no better than steps.
const CHEAPEST: f64 = 0.005;
const DEAREST: f64 = 1.0;
/// By how much more a step may take for drafts of some where others have none.
const OTHERS_WAIT: f64 = 0.5;

/// The cost of a guess of the model's block before any is measured.
const BELIEVED_OF_BLOCK: f64 = 0.25;

/// What a row costs, and a guess of the model's block, as shares of the time that a step takes without any.
#[derive(Debug)]
pub(crate) struct RowCost {
    share: f64,
    block: f64,
    /// Sums over steps, the older ones faded: of 1, rows, seconds, rows rows, rows seconds.
    sums: [f64; 5],
}

impl Default for RowCost {
    fn default() -> RowCost {
        RowCost { share: BELIEVED, block: BELIEVED_OF_BLOCK, sums: [0.0; 5] }
    }
}

impl RowCost {
    /// Takes in how long a step of so many rows took, none of them a prompt's.
    pub(crate) fn observe(&mut self, rows: usize, time: Duration) {
        let (rows, mut seconds) = (rows as f64, time.as_secs_f64());
        let [steps, sum_rows, sum_seconds, ..] = self.sums;
        if steps > LEAST_STEPS {
            // A machine busy with something else says nothing about rows.
            let mean = sum_seconds / (steps + self.share * sum_rows) * (1.0 + self.share * rows);
            seconds = seconds.min(2.0 * mean);
        }
        self.block = BELIEVED_OF_BLOCK + KEPT_OF_BLOCK * (self.block - BELIEVED_OF_BLOCK);
        for (sum, x) in self.sums.iter_mut().zip([1.0, rows, seconds, rows * rows, rows * seconds]) {
            *sum = KEPT * *sum + x;
        }
        let [steps, sum_rows, sum_seconds, squares, products] = self.sums;
        let (rows, seconds) = (sum_rows / steps, sum_seconds / steps);
        let spread = squares / steps - rows * rows;
        if steps < LEAST_STEPS || spread < LEAST_SPREAD {
            return;
        }
        let of_row = (products / steps - rows * seconds) / spread;
        let of_step = seconds - of_row * rows;
        let found = if of_step > 0.0 { of_row / of_step } else { DEAREST };
        self.share += 0.1 * (found.clamp(CHEAPEST, DEAREST) - self.share);
    }

    /// A cost that nothing changes, for tests.
    #[cfg(test)]
    pub(crate) fn fixed(share: f64) -> RowCost {
        RowCost { share, block: share, sums: [f64::NEG_INFINITY; 5] }
    }

    /// Takes in how long the block took for a guess of each of so many sequences, in one pass.
    pub(crate) fn observe_block(&mut self, sequences: usize, time: Duration) {
        let [steps, rows, seconds, ..] = self.sums;
        if steps > LEAST_STEPS && seconds > 0.0 {
            let of_each = time.as_secs_f64() / sequences.max(1) as f64;
            let found = of_each / (seconds / (steps + self.share * rows));
            self.block += 0.1 * (found.clamp(CHEAPEST, DEAREST) - self.block);
        }
    }

    /// What a guess of the block costs with its row, in times of a row.
    pub(crate) fn of_block(&self) -> f64 {
        (self.share + self.block) / self.share
    }

    /// Of each sequence's guesses how many make the step give the most tokens for its time; `most` in all.
    pub(crate) fn worth(&self, sequences: &[Chances], most: usize) -> Vec<usize> {
        let mut counts = vec![0; sequences.len()];
        // The chance that a sequence's next guess and all before it come true.
        let chance = |i: usize, count: usize| sequences[i].of_guesses.get(count).map_or(0.0, |&c| f64::from(c));
        let mut next: Vec<f64> = (0..sequences.len()).map(|i| chance(i, 0)).collect();
        let cost = |i: usize| self.share + if sequences[i].by_block { self.block } else { 0.0 };
        let mut tokens = sequences.len() as f64;
        let mut time = 1.0 + self.share * tokens;
        // Who has no guess that pays by itself.
        let waits = |i: usize| next[i] / cost(i) <= tokens / time;
        let latest = match (0..next.len()).any(waits) {
            // A crumb more, so that rounding decides nothing.
            true => time * (1.0 + OTHERS_WAIT) + 1e-9,
            false => f64::INFINITY,
        };
        for _ in 0..most {
            let gain = |i: usize| next[i] / cost(i);
            let Some(i) = (0..next.len()).max_by(|&a, &b| gain(a).total_cmp(&gain(b))) else { break };
            // Tokens for the time that the guess takes, against those that the step gives for its time so far.
            if gain(i) <= tokens / time || time + cost(i) > latest {
                break;
            }
            counts[i] += 1;
            (time, tokens) = (time + cost(i), tokens + next[i]);
            next[i] *= chance(i, counts[i]);
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cost_of_a_row_is_found_among_steps() {
        let mut cost = RowCost::default();
        let step = |rows: usize, share: f64| Duration::from_secs_f64(0.01 * (1.0 + share * rows as f64));
        // Steps that are all alike say nothing.
        (0..50).for_each(|_| cost.observe(1, step(1, 0.3)));
        assert!((cost.share - BELIEVED).abs() < 1e-9);
        for share in [0.3, 0.03, 1.5] {
            for i in 0..400 {
                let rows = [1, 9, 1, 4][i % 4];
                // Now and then the machine does something else.
                let time = if i % 50 == 7 { 20 } else { 1 } * step(rows, share);
                cost.observe(rows, time);
            }
            let expected = f64::min(share, DEAREST);
            assert!((cost.share / expected - 1.0).abs() < 0.35, "{} for {share}", cost.share);
        }
    }

    #[test]
    fn as_many_guesses_as_pay() {
        let sure = |n: usize| vec![1.0f32; n];
        let chances = |of: &Vec<f32>| Chances { of_guesses: of.clone(), by_block: false };
        let count = |share: f64, sequences: &[Vec<f32>], most| {
            RowCost::fixed(share).worth(&sequences.iter().map(chances).collect::<Vec<_>>(), most)
        };
        assert_eq!(count(0.1, &[sure(30)], 24), [24], "what is sure always pays");
        assert_eq!(count(0.1, &[sure(5)], 24), [5]);
        assert_eq!(count(1.0, &[vec![0.4; 9]], 24), [0], "a row as dear as a step");
        // 0.5 (10 + 1) > 1 and 0.25 (10 + 2) > 1.5, but 0.125 (10 + 3) < 1.75.
        assert_eq!(count(0.1, &[vec![0.5; 9]], 24), [2]);
        assert_eq!(count(0.1, &[vec![0.5; 9], vec![0.9; 30]], 24), [1, 9]);
        // Many sequences use the weights that are read already: only good guesses pay.
        let mut many = vec![vec![0.5; 9]; 20];
        assert_eq!(count(0.1, &many, 24), [0; 20]);
        many[3] = sure(9);
        assert_eq!(count(0.1, &many, 24)[3], 9);
        // Who has no guesses does not wait for long.
        assert_eq!(count(0.1, &[sure(30), Vec::new()], 24), [6, 0]);
        assert_eq!(count(0.1, &[sure(30), vec![0.02]], 24), [6, 0]);
        // Guesses of the block cost twice as much here: 0.5 / 0.2 > 1 / 1.1, 0.25 / 0.2 > 1.5 / 1.3, 0.125 / 0.2 < 1.75 / 1.5.
        let by_block = Chances { of_guesses: vec![0.5; 4], by_block: true };
        assert_eq!(RowCost::fixed(0.1).worth(std::slice::from_ref(&by_block), 24), [2]);
    }

    #[test]
    fn the_cost_of_the_block_is_each_sequences_share_and_is_believed_again() {
        let mut cost = RowCost::default();
        let step = Duration::from_millis(11);
        (0..20).for_each(|_| cost.observe(1, step));
        // As long as a step's own part, for four at once.
        (0..100).for_each(|_| cost.observe_block(4, Duration::from_millis(10)));
        assert!((cost.block - 0.25).abs() < 0.01, "{}", cost.block);
        (0..100).for_each(|_| cost.observe_block(1, Duration::from_millis(40)));
        assert!(cost.block > 0.9, "{}", cost.block);
        // Nobody asks it any more.
        (0..3000).for_each(|_| cost.observe(1, step));
        assert!((cost.block - BELIEVED_OF_BLOCK).abs() < 0.01, "{}", cost.block);
    }
}
