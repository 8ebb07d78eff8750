//! Probabilities that can be believed: one temperature for a classifier's scores, found on examples that it has not learnt from.
//! Source: Guo et al. 2017.

/// Probabilities of labels, from their scores at a temperature.
pub fn probabilities(scores: &[f32], temperature: f64) -> Vec<f64> {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut shares: Vec<f64> = scores.iter().map(|x| (f64::from(x - largest) / temperature).exp()).collect();
    let total: f64 = shares.iter().sum();
    shares.iter_mut().for_each(|x| *x /= total);
    shares
}

/// Mean loss of labels at a temperature; scores: (examples, labels).
pub fn loss_at(scores: &[f32], labels: &[u32], temperature: f64) -> f64 {
    let width = scores.len().checked_div(labels.len()).unwrap_or(1).max(1);
    let loss = |(scores, label): (&[f32], &u32)| -probabilities(scores, temperature)[*label as usize].max(1e-300).ln();
    scores.chunks_exact(width).zip(labels).map(loss).sum::<f64>() / labels.len().max(1) as f64
}

/// The temperature of the least loss, between 1/20 and 20.
pub fn temperature(scores: &[f32], labels: &[u32]) -> f64 {
    if labels.is_empty() {
        return 1.0;
    }
    // The loss has one valley along the logarithm: golden section.
    let ratio = (5f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (-(20f64.ln()), 20f64.ln());
    for _ in 0..60 {
        let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
        if loss_at(scores, labels, a.exp()) < loss_at(scores, labels, b.exp()) {
            high = b;
        } else {
            low = a;
        }
    }
    (0.5 * (low + high)).exp()
}

/// Expected calibration error: how far confidence and share of right answers are apart, over ten bins of confidence.
pub fn calibration_error(scores: &[f32], labels: &[u32], temperature: f64) -> f64 {
    let width = scores.len().checked_div(labels.len()).unwrap_or(1).max(1);
    let mut bins = [(0.0, 0.0); 10];
    for (scores, label) in scores.chunks_exact(width).zip(labels) {
        let shares = probabilities(scores, temperature);
        let best = crate::run::best_of(scores);
        let bin = &mut bins[((shares[best] * 10.0) as usize).min(9)];
        bin.0 += shares[best];
        bin.1 += f64::from(u8::from(best == *label as usize));
    }
    bins.iter().map(|(confidence, right)| (confidence - right).abs()).sum::<f64>() / labels.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_temperature_undoes_what_sharpens_scores() {
        // Labels drawn so that scores are right at temperature 1; then all scores are tripled.
        let (mut scores, mut labels) = (Vec::new(), Vec::new());
        for i in 0..400u32 {
            let of_one = [0.0, (f64::from(i % 9) * 0.3) as f32, 1.0];
            let shares = probabilities(&of_one, 1.0);
            let place = (f64::from(i) * 0.618_033_988_75).fract();
            labels.push(if place < shares[0] { 0 } else { u32::from(place >= shares[0] + shares[1]) + 1 });
            scores.extend(of_one.map(|x| 3.0 * x));
        }
        let found = temperature(&scores, &labels);
        assert!((found - 3.0).abs() < 0.35, "{found}");
        assert!(loss_at(&scores, &labels, found) < loss_at(&scores, &labels, 1.0));
        assert!(calibration_error(&scores, &labels, found) < 0.05);
        assert!(calibration_error(&scores, &labels, 1.0) > 0.1);
    }

    #[test]
    fn shares_add_up_and_far_scores_are_no_panic() {
        for scores in [[0.0, 1.0, 2.0], [1e30, -1e30, 0.0]] {
            let shares = probabilities(&scores, 0.5);
            assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
        assert_eq!(temperature(&[], &[]), 1.0);
    }
}
