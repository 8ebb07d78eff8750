//! What a model's block that guesses has not seen yet of a sequence.
//!
//! The block goes over each position once, with the state that the model had at the position before. States are kept here until it
//! does: for a guess, or when there are many of them. Where the state before a position was never computed here, because
//! others had computed the beginning, the block gets zeros; it then guesses a little worse.

use std::ops::Range;

/// Positions that wait for the block, so that it need not be asked for each.
pub(crate) const LONGEST: usize = 32;

/// States on their way to the block.
#[derive(Debug, Default)]
pub(crate) struct Trail {
    /// The first position that the block has not seen.
    first: usize,
    /// Of the position before it, and those that follow: (positions, D)
    states: Vec<f32>,
    width: usize,
}

impl Trail {
    /// The states of positions from `first` on, (positions, D), are computed.
    pub(crate) fn add(&mut self, first: usize, states: &[f32], width: usize) {
        if first != self.end() || self.width != width {
            *self = Trail { first, states: vec![0.0; width], width };
        }
        self.states.extend_from_slice(states);
    }

    /// Positions that the block can go over now, up to the one behind the last state.
    pub(crate) fn positions(&self) -> Range<usize> {
        self.first..self.first + self.states.len().checked_div(self.width).unwrap_or(0)
    }

    /// The states for the next `count` positions, (count, D), which the block then has seen.
    pub(crate) fn take(&mut self, count: usize) -> Vec<f32> {
        self.first += count;
        let rest = self.states.split_off(count * self.width);
        std::mem::replace(&mut self.states, rest)
    }

    /// The position whose state comes next.
    fn end(&self) -> usize {
        (self.first + self.states.len().checked_div(self.width).unwrap_or(0)).saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_position_gets_the_state_before_it() {
        let mut trail = Trail::default();
        assert_eq!(trail.positions(), 0..0);
        trail.add(0, &[1.0, 1.5, 2.0, 2.5], 2);
        assert_eq!(trail.positions(), 0..3);
        assert_eq!(trail.take(2), [0.0, 0.0, 1.0, 1.5]);
        assert_eq!(trail.positions(), 2..3);
        trail.add(2, &[3.0, 3.5], 2);
        assert_eq!(trail.take(2), [2.0, 2.5, 3.0, 3.5]);
        assert_eq!(trail.positions(), 4..4);
        trail.add(3, &[4.0, 4.5], 2);
        assert_eq!((trail.positions(), trail.take(1)), (4..5, vec![4.0, 4.5]));
        // A beginning that others have computed, and a sequence that starts again.
        for first in [64, 0] {
            trail.add(first, &[9.0, 9.5], 2);
            assert_eq!((trail.positions(), trail.take(1)), (first..first + 2, vec![0.0, 0.0]));
        }
    }
}
