//! Learning from preferences: of two answers to one prompt the better one is to become more probable than the worse, measured
//! against the model as the run found it. Source: Rafailov et al. 2023 (DPO).

use qwenkit_models::Error as ModelError;

use crate::{
    error::Error,
    example::{Example, Packed},
    learner::{Learner, Shown, StepReport, StepSettings, pieces},
};

/// A better and a worse answer to one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The better one.
    pub chosen: Example,
    /// The worse one.
    pub rejected: Example,
    /// How much more probable the better one was before: a difference of log-probabilities.
    pub reference: f64,
}

/// What a pair shows: its loss, and by how much more the better answer leads than before, times beta.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preferred {
    /// -log sigmoid(margin)
    pub loss: f64,
    /// Above 0 where the better answer has gained on the worse.
    pub margin: f64,
}

impl Preferred {
    fn of(lead: f64, reference: f64, beta: f64) -> Preferred {
        let margin = beta * (lead - reference);
        // ln(1 + e^-margin), whichever side of zero.
        Preferred { loss: (-margin).max(0.0) + (-margin.abs()).exp().ln_1p(), margin }
    }
}

impl Learner<'_> {
    /// How much more probable the better of each two answers is under the adapter as it is; `answers` are pairs side by side.
    ///
    /// # Errors
    /// When the model cannot be computed.
    pub fn leads(&mut self, answers: &[&Example], piece_tokens: usize) -> Result<Vec<f64>, ModelError> {
        let mut losses = Vec::with_capacity(answers.len());
        self.evaluate(answers, piece_tokens, &mut |_, of, _| {
            losses.push(of.iter().map(|loss| f64::from(*loss)).sum::<f64>());
        })?;
        Ok(losses.as_chunks().0.iter().map(|[chosen, rejected]| rejected - chosen).collect())
    }

    /// What pairs show under the adapter as it is; `beta` says how dear it is to go far from what was before.
    ///
    /// # Errors
    /// As `leads`.
    pub fn preferred(&mut self, pairs: &[&Pair], beta: f64, piece_tokens: usize) -> Result<Vec<Preferred>, ModelError> {
        let answers: Vec<&Example> = pairs.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]).collect();
        let leads = self.leads(&answers, piece_tokens)?;
        Ok(pairs.iter().zip(leads).map(|(pair, lead)| Preferred::of(lead, pair.reference, beta)).collect())
    }

    /// Gradients of the mean loss of a batch of pairs into `grads`; no number is changed. Of a loss that is no number there are none,
    /// and the report says so. Every rank is given the whole batch.
    ///
    /// # Errors
    /// As `gradients`.
    pub fn preference_gradients(
        &mut self,
        batch: &[&Pair],
        beta: f64,
        piece_tokens: usize,
    ) -> Result<StepReport, Error> {
        let count = batch.len().max(1) as f64;
        let shown = self.in_shares(
            batch,
            |pair| pair.chosen.ids.len() + pair.rejected.ids.len(),
            |learner, share| {
                let found = learner.preferred(share, beta, piece_tokens)?;
                let loss = found.iter().map(|pair| pair.loss).sum::<f64>();
                // Each pair is computed once for its margin.
                let answers = share.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]);
                let mut tokens = answers.map(|example| example.ids.len()).sum();
                if !loss.is_finite() {
                    // There is no slope of what is no number.
                    return Ok(Shown { loss, tokens });
                }
                // The slope of the loss towards the better answer's log-probability, and its opposite towards the other's.
                let weighted = share.iter().zip(&found).flat_map(|(pair, Preferred { margin, .. })| {
                    let scale = (beta / (1.0 + margin.exp()) / count) as f32;
                    [(&pair.chosen, scale), (&pair.rejected, -scale)]
                });
                let weighted: Vec<(&Example, f32)> = weighted.collect();
                for piece in pieces(&weighted, piece_tokens, |(example, _)| example.ids.len()) {
                    let packed = Packed::weighted(piece.iter().copied());
                    learner.add_gradients(&packed)?;
                    tokens += packed.tokens();
                }
                Ok(Shown { loss, tokens })
            },
        )?;
        let wanted = batch.iter().map(|pair| pair.chosen.wanted() + pair.rejected.wanted()).sum();
        let loss = shown.loss / count;
        let grad_norm = if loss.is_finite() { self.grad_norm() } else { f64::NAN };
        Ok(StepReport { loss, grad_norm, tokens: shown.tokens, wanted })
    }

    /// One step over a batch of pairs at this rate, as `step`.
    ///
    /// # Errors
    /// As `gradients`.
    pub fn preference_step(
        &mut self,
        batch: &[&Pair],
        beta: f64,
        rate: f64,
        settings: &StepSettings,
    ) -> Result<StepReport, Error> {
        let report = self.preference_gradients(batch, beta, settings.piece_tokens)?;
        self.take_step(&report, rate, settings);
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_those_of_the_formula_and_finite_far_away() {
        for margin in [-30.0, -1.0, 0.0, 0.5, 40.0f64] {
            let found = Preferred::of(margin / 0.1 + 3.0, 3.0, 0.1);
            assert!((found.margin - margin).abs() < 1e-9);
            assert!((found.loss - (1.0 + (-margin).exp()).ln()).abs() < 1e-9, "{margin}: {}", found.loss);
        }
        assert_eq!(Preferred::of(-1e6, 0.0, 1.0).loss, 1e6);
    }
}
