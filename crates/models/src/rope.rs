//! Rotary frequencies and the angles of a batch's positions.
//!
//! Frequencies are computed in f64 and rounded once to f32, angles as f32 products, cos and sin last: tables in half
//! precision drift at long context. Sources: Su et al. 2021; YaRN as in Peng et al. 2023 and transformers 5.

use crate::plan::{RopePlan, RopeSections, Yarn};

/// The frequencies of one model.
pub(crate) struct Rope {
    /// (R), radians per position
    inv_freq: Vec<f32>,
    /// Multiplied into cos and sin.
    scale: f32,
    /// (R): which of a position's three numbers each frequency turns by
    axes: Vec<u8>,
}

impl Rope {
    pub(crate) fn new(plan: &RopePlan) -> Rope {
        let pairs = plan.dims / 2;
        let base = |i: usize| plan.theta.powf(-2.0 * i as f64 / plan.dims as f64);
        let axes = (0..pairs).map(|i| plan.sections.map_or(0, |sections| axis(sections, i))).collect();
        match &plan.yarn {
            None => Rope { inv_freq: (0..pairs).map(|i| base(i) as f32).collect(), scale: 1.0, axes },
            Some(yarn) => Rope {
                inv_freq: (0..pairs)
                    .map(|i| {
                        let kept = 1.0 - ramp(plan, yarn, i);
                        (base(i) / yarn.factor * (1.0 - kept) + base(i) * kept) as f32
                    })
                    .collect(),
                scale: yarn.attention_factor.unwrap_or_else(|| mscale(yarn.factor)) as f32,
                axes,
            },
        }
    }

    /// Pairs that are rotated, R.
    pub(crate) fn pairs(&self) -> usize {
        self.inv_freq.len()
    }

    /// Appends cos and sin, (R) each, of one position in time, height and width; of text all three are the same.
    pub(crate) fn angles(&self, position: [u32; 3], cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        for (inv_freq, axis) in self.inv_freq.iter().zip(&self.axes) {
            let (s, c) = f64::from(position[usize::from(*axis)] as f32 * inv_freq).sin_cos();
            cos.push(c as f32 * self.scale);
            sin.push(s as f32 * self.scale);
        }
    }
}

/// Which of time (0), height (1) and width (2) pair `i` belongs to.
fn axis(sections: RopeSections, i: usize) -> u8 {
    let [time, height, width] = sections.pairs;
    match sections.interleaved {
        false if i < time => 0,
        false if i < time + height => 1,
        false => 2,
        true if i % 3 == 1 && i < 3 * height => 1,
        true if i % 3 == 2 && i < 3 * width => 2,
        true => 0,
    }
}

fn mscale(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}

/// How far pair `i` is on the way from kept (0) to divided by the factor (1).
fn ramp(plan: &RopePlan, yarn: &Yarn, i: usize) -> f64 {
    let dims = plan.dims as f64;
    // The pair that turns `rotations` times over the original context.
    let pair_of = |rotations: f64| {
        let span = yarn.original_tokens as f64 / (rotations * 2.0 * std::f64::consts::PI);
        dims * span.ln() / (2.0 * plan.theta.ln())
    };
    let low = pair_of(yarn.beta_fast).floor().max(0.0);
    let mut high = pair_of(yarn.beta_slow).ceil().min(dims - 1.0);
    if low == high {
        high += 0.001;
    }
    ((i as f64 - low) / (high - low)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_frequencies_fall_from_one() {
        let rope = Rope::new(&RopePlan { dims: 4, theta: 100.0, yarn: None, sections: None });
        assert_eq!(rope.inv_freq, [1.0, 0.1]);
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        rope.angles([3; 3], &mut cos, &mut sin);
        assert_eq!((cos[0], sin[1]), (3f32.cos(), (3.0 * 0.1f32).sin()));
    }

    #[test]
    fn yarn_keeps_the_fast_and_slows_the_slow() {
        let yarn = Yarn { factor: 4.0, original_tokens: 32, beta_fast: 32.0, beta_slow: 1.0, attention_factor: None };
        let rope = Rope::new(&RopePlan { dims: 64, theta: 1e6, yarn: Some(yarn), sections: None });
        let plain = Rope::new(&RopePlan { dims: 64, theta: 1e6, yarn: None, sections: None });
        assert_eq!(rope.inv_freq[0], plain.inv_freq[0]);
        assert!((rope.inv_freq[31] * 4.0 - plain.inv_freq[31]).abs() < 1e-12);
        assert!((rope.scale - 1.138_629_4).abs() < 1e-6);
    }

    #[test]
    fn sections_share_the_pairs_out() {
        let axes = |pairs: [usize; 3], interleaved, count| -> Vec<u8> {
            (0..count).map(|i| axis(RopeSections { pairs, interleaved }, i)).collect()
        };
        assert_eq!(axes([2, 3, 3], false, 8), [0, 0, 1, 1, 1, 2, 2, 2]);
        assert_eq!(axes([4, 2, 2], true, 8), [0, 1, 2, 0, 1, 2, 0, 0]);
        let of = |axis: u8, axes: &[u8]| axes.iter().filter(|a| **a == axis).count();
        let published = axes([11, 11, 10], true, 32);
        assert_eq!([0, 1, 2].map(|axis| of(axis, &published)), [11, 11, 10]);
        let published = axes([24, 20, 20], true, 64);
        assert_eq!([0, 1, 2].map(|axis| of(axis, &published)), [24, 20, 20]);
    }

    #[test]
    fn each_pair_turns_by_its_own_axis() {
        let sections = Some(RopeSections { pairs: [1, 1, 0], interleaved: false });
        let rope = Rope::new(&RopePlan { dims: 4, theta: 100.0, yarn: None, sections });
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        rope.angles([3, 5, 7], &mut cos, &mut sin);
        assert_eq!((cos[0], sin[1]), (3f32.cos(), (5.0 * 0.1f32).sin()));
    }
}
