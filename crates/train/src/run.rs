//! A run: steps over shuffled examples along a schedule, validation between them, checkpoints, the best adapter at the end.
//!
//! Contract: what a step does is a function of the settings, the examples and the number of the step; a run that was cut off
//! goes on from its checkpoint with the same numbers, bit for bit. Not here: files of people's data, printing, and what is
//! written beside the checkpoint.

use std::{
    borrow::Cow,
    path::PathBuf,
    time::{Duration, Instant},
};

use crate::{
    checkpoint::{Best, Checkpoint, Trend},
    error::Error,
    example::{Example, Goal},
    learner::{Learner, StepReport, StepSettings},
    order,
    preference::Pair,
    ranks::Team,
    schedule::Schedule,
};

/// What a run does.
#[derive(Clone, Debug, PartialEq)]
pub struct RunSettings {
    /// Rates, and the number of steps.
    pub schedule: Schedule,
    /// Examples of a step.
    pub batch: usize,
    /// Of the order of examples.
    pub seed: u64,
    /// How steps are made.
    pub step: StepSettings,
    /// Steps between two validations.
    pub validate_every: usize,
    /// Validations without a better one after which the run ends; it goes on to its last step where absent.
    pub patience: Option<usize>,
    /// Steps between two checkpoints; one is written at validations too.
    pub checkpoint_every: usize,
}

/// Where a run's state is kept, and of which run it is.
#[derive(Clone, Debug)]
pub struct Place {
    /// The checkpoint's file.
    pub checkpoint: PathBuf,
    /// Everything that the run's numbers depend on, as text, a line for each thing.
    pub identity: String,
}

/// What happens in a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Happening {
    /// It goes on from a checkpoint.
    Resumed {
        /// Steps done before.
        step: usize,
    },
    /// A step was done.
    Step {
        /// Steps done.
        step: usize,
        /// What it showed.
        report: StepReport,
        /// The rate of this step.
        rate: f64,
        /// How long it took.
        took: Duration,
    },
    /// A validation.
    Validation {
        /// Steps done.
        step: usize,
        /// What it showed.
        outcome: Outcome,
        /// Whether it is the best so far.
        is_best: bool,
    },
    /// The run ends before its last step, as validation has not become better.
    EarlyStop {
        /// Steps done.
        step: usize,
    },
}

/// What a validation showed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Mean loss.
    pub loss: f64,
    /// Share of labels that the model gives the highest score, or of pairs whose better answer has gained on the worse; of
    /// tokens nothing.
    pub right: Option<f64>,
}

impl Outcome {
    /// By what validations are compared, less being better: the loss; with labels the share that is wrong, and the loss where that is
    /// the same, as a few labels that are wrong with certainty spoil a loss that temperature mends.
    fn merit(&self) -> f64 {
        if self.loss.is_nan() {
            return f64::INFINITY;
        }
        // Of losses from 0 to infinity a share from 0 to 1 that rises with them.
        let share = 1.0 - 1.0 / (1.0 + self.loss);
        self.right.map_or(self.loss, |right| 1.0 - right + 1e-4 * share)
    }
}

/// What a run learns from, or is validated with.
#[derive(Clone, Copy, Debug)]
pub enum Lessons<'a> {
    /// Tokens or labels.
    Examples(&'a [Example]),
    /// Better and worse answers.
    Pairs {
        /// The pairs.
        pairs: &'a [Pair],
        /// How dear it is to go far from what was before.
        beta: f64,
    },
}

impl<'a> From<&'a [Example]> for Lessons<'a> {
    fn from(examples: &'a [Example]) -> Lessons<'a> {
        Lessons::Examples(examples)
    }
}

impl Lessons<'_> {
    /// Their number.
    pub fn len(&self) -> usize {
        match self {
            Lessons::Examples(examples) => examples.len(),
            Lessons::Pairs { pairs, .. } => pairs.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn step(
        &self,
        learner: &mut Learner<'_>,
        numbers: &[usize],
        rate: f64,
        settings: &StepSettings,
    ) -> Result<StepReport, Error> {
        Ok(match self {
            Lessons::Examples(examples) => {
                let batch: Vec<&Example> = numbers.iter().map(|&i| &examples[i]).collect();
                learner.step(&batch, rate, settings)?
            }
            Lessons::Pairs { pairs, beta } => {
                let batch: Vec<&Pair> = numbers.iter().map(|&i| &pairs[i]).collect();
                learner.preference_step(&batch, *beta, rate, settings)?
            }
        })
    }

    fn validate(&self, learner: &mut Learner<'_>, piece_tokens: usize) -> Result<Outcome, Error> {
        let (pairs, beta) = match self {
            Lessons::Examples(examples) => return validate(learner, examples, piece_tokens),
            Lessons::Pairs { pairs, beta } => (pairs, *beta),
        };
        let own: Vec<&Pair> = learner.team.part(pairs).iter().collect();
        let found = learner.preferred(&own, beta, piece_tokens)?;
        let own: Vec<f64> = found.iter().flat_map(|pair| [pair.loss, f64::from(u8::from(pair.margin > 0.0))]).collect();
        let all = learner.team.join(&own)?;
        let sum = |of: usize| all.chunks_exact(2).map(|pair| pair[of]).sum::<f64>();
        let count = pairs.len().max(1) as f64;
        Ok(Outcome { loss: sum(0) / count, right: Some(sum(1) / count) })
    }
}

/// How fast the mean of losses forgets.
const TREND: f64 = 0.9;
/// How far the mean of losses may rise above its lowest, times and beside, before a run counts as astray.
const ASTRAY: (f64, f64) = (1.3, 1.0);

/// Runs, or goes on with, a run over `train`; `tell` hears what happens and says whether to go on. Afterwards the learner holds
/// the best adapter by validation, or the last one where there is nothing to validate with. Every rank of the learner's team calls
/// this with the same; the first one writes checkpoints, and all end behind the step behind which one of them is told to.
///
/// # Errors
/// When a step fails, a file cannot be written, the run diverges, or `tell` stops it; a checkpoint is there then. When another rank
/// cannot go on.
pub fn run(
    learner: &mut Learner<'_>,
    (train, valid): (Lessons<'_>, Lessons<'_>),
    settings: &RunSettings,
    place: Option<&Place>,
    resume: bool,
    tell: &mut dyn FnMut(Happening) -> bool,
) -> Result<Outcome, Error> {
    let team = learner.team;
    let mut state = State { best: None, worse: 0, trend: Trend::default() };
    let mut done = 0;
    if let Some(place) = place {
        team.agree(&place.identity)?;
    }
    if let Some(place) = place.filter(|_| resume)
        && let Some(found) = read_checkpoint(place, team)?
    {
        if found.values.len() != learner.values().len() {
            return Err(Error::Checkpoint { path: place.checkpoint.clone(), what: "number of values".to_owned() });
        }
        learner.change(|values| values.copy_from_slice(&found.values));
        learner.moments = found.moments.into_owned();
        let best = found.best.map(Cow::into_owned);
        (done, state) = (found.step, State { best, worse: found.worse, trend: found.trend });
        tell(Happening::Resumed { step: done });
    }
    let steps = settings.schedule.steps;
    let mut of_best = None;
    let mut is_over = settings.patience.is_some_and(|patience| state.worse >= patience);
    while done < steps && !is_over {
        let start = Instant::now();
        let numbers = order::of_step(settings.seed, done, settings.batch, train.len());
        let rate = settings.schedule.at(done);
        let report = train.step(learner, &numbers, rate, &settings.step)?;
        state.follow(done, &report, settings.schedule.rate)?;
        done += 1;
        let goes_on = team.all(tell(Happening::Step { step: done, report, rate, took: start.elapsed() }))?;
        let is_last = done == steps;
        let validates = !valid.is_empty() && (done.is_multiple_of(settings.validate_every.max(1)) || is_last);
        if validates {
            let outcome = valid.validate(learner, settings.step.piece_tokens)?;
            let merit = outcome.merit();
            let is_best = state.best.as_ref().is_none_or(|best| merit < best.merit);
            if is_best {
                let values = learner.values().to_vec();
                state = State { best: Some(Best { step: done, merit, values }), worse: 0, ..state };
                of_best = Some(outcome);
            } else {
                state.worse += 1;
            }
            tell(Happening::Validation { step: done, outcome, is_best });
            is_over = settings.patience.is_some_and(|patience| state.worse >= patience);
        }
        if let Some(place) = place
            && (validates || is_last || !goes_on || done.is_multiple_of(settings.checkpoint_every.max(1)))
        {
            team.hold_equal(learner.values(), done)?;
            if team.is_first() {
                state.checkpoint(done, learner).write(&place.checkpoint, &place.identity)?;
            }
        }
        if !goes_on {
            return Err(Error::Stopped { step: done });
        }
    }
    if is_over && done < steps {
        tell(Happening::EarlyStop { step: done });
    }
    if let Some(best) = state.best {
        learner.change(|values| values.copy_from_slice(&best.values));
    }
    match of_best {
        Some(outcome) => Ok(outcome),
        // Nothing to validate with, or the best is from before the run went on.
        None => valid.validate(learner, settings.step.piece_tokens),
    }
}

/// The checkpoint that a run goes on from, if there is one; every rank reads it, and all have found the same.
fn read_checkpoint(place: &Place, team: Team<'_>) -> Result<Option<Checkpoint<'static>>, Error> {
    let found = Checkpoint::read(&place.checkpoint, &place.identity)?;
    let step = found.as_ref().map_or("none is there".to_owned(), |found| format!("behind step {}", found.step));
    team.agree(&format!("checkpoint `{}`: {step}", place.checkpoint.display()))?;
    if let Some(found) = &found {
        team.hold_equal(&found.values, found.step)?;
    }
    Ok(found)
}

/// Mean loss over examples, and how many labels are right. Ranks share the work and find the same.
///
/// # Errors
/// When the model cannot be computed, or another rank cannot go on.
pub fn validate(learner: &mut Learner<'_>, valid: &[Example], piece_tokens: usize) -> Result<Outcome, Error> {
    let team = learner.team;
    let batch: Vec<&Example> = team.part(valid).iter().collect();
    // Of each example the sum of its losses, and whether its label is right.
    let mut own = Vec::with_capacity(2 * batch.len());
    learner.evaluate(&batch, piece_tokens, &mut |example, losses, scores| {
        let is_right = matches!(example.goal, Goal::Label(label) if best_of(scores) == label as usize);
        own.extend([losses.iter().map(|loss| f64::from(*loss)).sum::<f64>(), f64::from(u8::from(is_right))]);
    })?;
    let all = team.join(&own)?;
    let sum = |of: usize| all.chunks_exact(2).map(|example| example[of]).sum::<f64>();
    let count: usize = valid.iter().map(Example::wanted).sum();
    let labels = valid.iter().filter(|example| matches!(example.goal, Goal::Label(_))).count();
    Ok(Outcome { loss: sum(0) / count.max(1) as f64, right: (labels > 0).then(|| sum(1) / labels as f64) })
}

/// The place of the highest score, of equals the first.
pub fn best_of(scores: &[f32]) -> usize {
    (0..scores.len()).rev().max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap_or(0)
}

/// What a run remembers beside the learner.
struct State {
    best: Option<Best>,
    worse: usize,
    trend: Trend,
}

impl State {
    /// Notes a step's loss, and refuses to go on when the run is astray; `rate` is the highest of its schedule.
    fn follow(&mut self, step: usize, report: &StepReport, rate: f64) -> Result<(), Error> {
        let Trend { now, lowest } = self.trend;
        let kept = match self.best {
            Some(_) => "its folder holds the best adapter so far in a checkpoint alone: begin again in another folder",
            None => "nothing of it is worth keeping: begin again in another folder",
        };
        let diverged =
            |lowest| Err(Error::Diverged { step: step + 1, loss: report.loss, lowest, hint: rate / 5.0, kept });
        if !report.loss.is_finite() || !report.grad_norm.is_finite() {
            return diverged(lowest);
        }
        let now = if step == 0 { report.loss } else { TREND * now + (1.0 - TREND) * report.loss };
        let lowest = if step == 0 { now } else { lowest.min(now) };
        self.trend = Trend { now, lowest };
        if now > lowest * ASTRAY.0 + ASTRAY.1 { diverged(lowest) } else { Ok(()) }
    }

    fn checkpoint<'a>(&'a self, step: usize, learner: &'a Learner<'_>) -> Checkpoint<'a> {
        Checkpoint {
            step,
            values: Cow::Borrowed(learner.values()),
            moments: Cow::Borrowed(&learner.moments),
            best: self.best.as_ref().map(Cow::Borrowed),
            worse: self.worse,
            trend: self.trend,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_validations_the_one_with_more_right_or_less_loss_is_better() {
        let merit = |loss, right| Outcome { loss, right }.merit();
        assert!(merit(0.5, None) < merit(0.6, None));
        assert!(merit(9.0, Some(0.9)) < merit(0.1, Some(0.89)));
        assert!(merit(2.0, Some(0.9)) < merit(3.0, Some(0.9)));
        assert!(merit(3.0, Some(0.9)) < merit(f64::INFINITY, Some(0.9)));
        for right in [None, Some(1.0)] {
            assert_eq!(merit(f64::NAN, right), f64::INFINITY);
        }
    }

    #[test]
    fn a_rising_mean_is_astray_and_a_bad_step_is_not() {
        let follow = |losses: &[f64]| {
            let mut state = State { best: None, worse: 0, trend: Trend::default() };
            losses.iter().enumerate().find_map(|(step, &loss)| {
                let report = StepReport { loss, grad_norm: 1.0, tokens: 1, wanted: 1 };
                state.follow(step, &report, 1e-3).err()
            })
        };
        let mut falling: Vec<f64> = (0..50).map(|i| 3.0 / f64::from(i + 1)).collect();
        falling[30] = 9.0;
        assert!(follow(&falling).is_none());
        let rising: Vec<f64> = (0..50).map(|i| 2.0 + f64::from(i) * 0.3).collect();
        let message = follow(&rising).expect("astray").to_string();
        assert!(message.contains("--lr 2.0e-4"), "{message}");
        assert!(follow(&[2.0, f64::NAN]).is_some());
    }
}
