//! The loss of a language model and its gradient towards the logits, row by row, in place.

use crate::{
    lanes::{self, for_each_isa},
    matmul::Compute,
    shared_out::SharedOut,
};

impl Compute {
    /// For each row of `logits`: (T, V) its loss `-log softmax(logits)[target]` into `losses`: (T); the row becomes
    /// `scale * (softmax(logits) - one(target))`, the gradient of `scale` times the loss.
    ///
    /// # Panics
    /// If the shapes do not fit or a target is not below V.
    pub fn cross_entropy(&self, logits: &mut [f32], targets: &[u32], scale: f32, losses: &mut [f32]) {
        let vocab = logits.len().checked_div(targets.len()).unwrap_or(0);
        assert!(logits.len() == vocab * targets.len() && losses.len() == targets.len(), "cross_entropy");
        let losses = SharedOut::new(losses);
        self.each_row(logits, vocab, |isa, row, logits| {
            let loss = cross_entropy_row(isa, logits, targets[row] as usize, scale);
            // SAFETY: each row is handed out once.
            unsafe { losses.slice(row, 1)[0] = loss };
        });
    }
}

for_each_isa! {
    pub(crate) fn cross_entropy_row(logits: &mut [f32], target: usize, scale: f32) -> f32 {
        let mut largest = [f32::NEG_INFINITY; lanes::LANES];
        let (whole, rest) = logits.as_chunks::<{ lanes::LANES }>();
        for x in whole {
            largest.iter_mut().zip(x).for_each(|(m, &x)| *m = f32::max(*m, x));
        }
        let largest = rest.iter().copied().fold(lanes::max(largest), f32::max);
        let at_target = logits[target] - largest;
        logits.iter_mut().for_each(|x| *x = lanes::exp(*x - largest));
        // A vocabulary is long: sums of its pieces are added in f64.
        let total: f64 = logits.chunks(1024).map(|x| f64::from(lanes::sum_by(x, |x| x))).sum();
        let factor = (f64::from(scale) / total) as f32;
        logits.iter_mut().for_each(|x| *x *= factor);
        logits[target] -= scale;
        (total.ln() - f64::from(at_target)) as f32
    }
}
