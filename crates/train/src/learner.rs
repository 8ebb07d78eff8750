//! One step of learning: gradients over a batch, taken in pieces that fit in memory, then the optimiser.
//!
//! A step is a function of what is trained, the moments, the batch and the number of its shares alone, bit for bit, on any number of
//! threads, whether one process takes all shares or as many ranks one each.

use qwenkit_kernels::Compute;
use qwenkit_models::{Adapter, Error as ModelError, Model, Tape, Whole};

use crate::{
    error::Error,
    example::{Example, Packed},
    optimiser::{AdamW, Moments, Precision, norm},
    ranks::{Team, deal},
    trained::Trained,
};

/// What is being trained - an adapter of a model, or a model itself - and what that takes.
pub struct Learner<'a> {
    trained: Trained<'a>,
    compute: &'a Compute,
    /// The optimiser's memory.
    pub moments: Moments,
    /// What of a label's share is learnt as all labels', equally.
    pub smoothing: f32,
    /// Gradients of the last step, before they were clipped.
    pub grads: Vec<f32>,
    /// Who computes a step.
    pub team: Team<'a>,
    /// Gradients of the shares before the one under way, where one process takes several.
    before: Vec<f32>,
    tape: Tape,
    losses: Vec<f32>,
}

/// How steps are made.
#[derive(Clone, Debug, PartialEq)]
pub struct StepSettings {
    /// The optimiser.
    pub optimiser: AdamW,
    /// The longest that a gradient may be, if it has a limit; a longer one is shortened.
    pub clip: Option<f64>,
    /// Tokens that are computed at once.
    pub piece_tokens: usize,
}

/// What the samples of a share show: the sum of their losses, and the tokens that were computed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Shown {
    pub(crate) loss: f64,
    pub(crate) tokens: usize,
}

/// Hears an example, its losses, and its scores where labels are learnt.
pub type Sink<'a> = dyn FnMut(&Example, &[f32], &[f32]) + 'a;

/// What a step showed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Before the step: the mean over the batch's tokens, labels - without what smoothing adds - or pairs.
    pub loss: f64,
    /// Length of the gradient.
    pub grad_norm: f64,
    /// Tokens computed.
    pub tokens: usize,
    /// Losses they gave.
    pub wanted: usize,
}

impl<'a> Learner<'a> {
    /// A learner of this adapter. `sparing` keeps less of the forward pass and computes it twice.
    pub fn new(model: &'a Model, compute: &'a Compute, adapter: Adapter, sparing: bool) -> Learner<'a> {
        let tape = Tape::new(model, sparing);
        Learner::of(Trained::Adapter(model, adapter), compute, tape)
    }

    /// A learner of all of a model's own numbers, which lie as `whole` says. `sparing` as above.
    pub fn whole(model: Model, whole: Whole, compute: &'a Compute, sparing: bool) -> Learner<'a> {
        let tape = Tape::new(&model, sparing);
        Learner::of(Trained::whole(model, whole), compute, tape)
    }

    fn of(trained: Trained<'a>, compute: &'a Compute, tape: Tape) -> Learner<'a> {
        let len = trained.values().len();
        let (moments, grads) = (Moments::new(len, Precision::F32), vec![0.0; len]);
        let (team, before, losses) = (Team::ALONE, Vec::new(), Vec::new());
        Learner { trained, compute, moments, smoothing: 0.0, grads, team, before, tape, losses }
    }

    /// All numbers that are trained.
    pub fn values(&self) -> &[f32] {
        self.trained.values()
    }

    /// Lets `change` change the numbers that are trained.
    pub fn change(&mut self, change: impl FnOnce(&mut [f32])) {
        self.trained.change(self.compute, change);
    }

    /// The adapter; one of no modules where the model itself is trained.
    pub fn adapter(&self) -> &Adapter {
        self.trained.adapter()
    }

    /// Where the numbers of a model lie that is trained itself.
    pub fn layout(&self) -> Option<&Whole> {
        self.trained.layout()
    }

    /// Keeps the optimiser's memory in this precision; what it had learnt is gone.
    pub fn keep_moments_in(&mut self, precision: Precision) {
        self.moments = Moments::new(self.trained.values().len(), precision);
    }

    /// Lets examples that come again keep up to so many bytes of what layers below the first adapted one make of them.
    pub fn remember(&mut self, limit_bytes: usize) {
        self.tape.remember(limit_bytes);
    }

    /// The model.
    pub fn model(&self) -> &Model {
        self.trained.model()
    }

    /// Gradients of the mean loss of a batch into `grads`; no number is changed. Every rank is given the whole batch.
    ///
    /// # Errors
    /// When the model cannot be trained, memory is short, or another rank cannot go on.
    pub fn gradients(&mut self, batch: &[&Example], piece_tokens: usize) -> Result<StepReport, Error> {
        let wanted: usize = batch.iter().map(|example| example.wanted()).sum();
        let scale = 1.0 / wanted.max(1) as f32;
        let shown = self.in_shares(
            batch,
            |example| example.ids.len(),
            |learner, share| {
                let mut shown = Shown::default();
                for piece in pieces(share, piece_tokens, |example| example.ids.len()) {
                    let mut packed = Packed::new(piece.iter().copied(), scale);
                    packed.smoothing = learner.smoothing;
                    learner.add_gradients(&packed)?;
                    shown.loss += learner.losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
                    shown.tokens += packed.tokens();
                }
                Ok(shown)
            },
        )?;
        let loss = shown.loss / wanted.max(1) as f64;
        Ok(StepReport { loss, grad_norm: self.grad_norm(), tokens: shown.tokens, wanted })
    }

    /// Gradients of a batch into `grads`: `add` adds those of a share, which come from zero and are then summed in order of shares. A
    /// rank adds its own share alone, and all ranks end with the same sums.
    pub(crate) fn in_shares<T: Copy>(
        &mut self,
        batch: &[T],
        len: impl Fn(&T) -> usize,
        mut add: impl FnMut(&mut Self, &[T]) -> Result<Shown, ModelError>,
    ) -> Result<Shown, Error> {
        let team = self.team;
        let dealt = deal(batch, team.shares(), len);
        self.grads.fill(0.0);
        let mut all = Vec::with_capacity(dealt.len());
        if team.count() > 1 {
            let own = add(self, &dealt[team.rank()])?;
            let found = team.join(&[own.loss, own.tokens as f64])?;
            team.sum(&mut self.grads)?;
            all.extend(found.as_chunks().0.iter().map(|&[loss, tokens]| Shown { loss, tokens: tokens as usize }));
        } else {
            for (i, share) in dealt.iter().enumerate() {
                if i > 0 {
                    std::mem::swap(&mut self.grads, &mut self.before);
                    self.grads.clear();
                    self.grads.resize(self.before.len(), 0.0);
                }
                all.push(add(self, share)?);
                if i > 0 {
                    self.grads.iter_mut().zip(&self.before).for_each(|(own, before)| *own += before);
                }
            }
        }
        let tokens = all.iter().map(|shown| shown.tokens).sum();
        Ok(Shown { loss: all.iter().map(|shown| shown.loss).sum(), tokens })
    }

    /// Adds a lesson's gradients to `grads`.
    pub(crate) fn add_gradients(&mut self, packed: &Packed) -> Result<(), ModelError> {
        let Learner { trained, compute, tape, losses, grads, .. } = self;
        trained.learn(compute, &packed.lesson(), tape, losses, Some(grads))
    }

    pub(crate) fn grad_norm(&self) -> f64 {
        norm(&self.grads, self.compute.pool().threads())
    }

    /// One step over a batch at this rate. A loss or gradient that is no number changes nothing and is for the caller to see.
    ///
    /// # Errors
    /// As `gradients`.
    pub fn step(&mut self, batch: &[&Example], rate: f64, settings: &StepSettings) -> Result<StepReport, Error> {
        let report = self.gradients(batch, settings.piece_tokens)?;
        self.take_step(&report, rate, settings);
        Ok(report)
    }

    /// The optimiser's part of a step that showed `report`.
    pub(crate) fn take_step(&mut self, report: &StepReport, rate: f64, settings: &StepSettings) {
        if report.loss.is_finite() && report.grad_norm.is_finite() {
            // As PyTorch's clip_grad_norm_.
            let too_long = settings.clip.filter(|most| report.grad_norm > *most);
            let share = too_long.map_or(1.0, |most| (most / (report.grad_norm + 1e-6)) as f32);
            let Learner { compute, moments, trained, grads, .. } = self;
            let threads = compute.pool().threads();
            trained.change(compute, |values| {
                moments.step(settings.optimiser, rate as f32, values, (grads, share), threads);
            });
        }
    }

    /// Losses of a batch without learning, computed here and by no other rank; `sink` hears each example, in order.
    ///
    /// # Errors
    /// When the model cannot be computed.
    pub fn evaluate(&mut self, batch: &[&Example], piece_tokens: usize, sink: &mut Sink<'_>) -> Result<(), ModelError> {
        for piece in pieces(batch, piece_tokens, |example| example.ids.len()) {
            let packed = Packed::new(piece.iter().copied(), 1.0);
            let Learner { trained, compute, tape, losses, .. } = self;
            trained.learn(compute, &packed.lesson(), tape, losses, None)?;
            let (mut first, labels) = (0, tape.scores().len() / piece.len());
            for (i, example) in piece.iter().enumerate() {
                let own = first..first + example.wanted();
                first = own.end;
                sink(example, &losses[own], &tape.scores()[i * labels..(i + 1) * labels]);
            }
        }
        Ok(())
    }
}

/// A batch in runs of at most so many tokens, or of one example that has more.
pub(crate) fn pieces<T>(batch: &[T], most: usize, len: impl Fn(&T) -> usize) -> impl Iterator<Item = &[T]> {
    let mut rest = batch;
    std::iter::from_fn(move || {
        let mut tokens = 0;
        let fits = |example: &&T| {
            tokens += len(example);
            tokens <= most
        };
        let count = rest.iter().take_while(fits).count().max(1).min(rest.len());
        let (piece, others) = rest.split_at(count);
        rest = others;
        (!piece.is_empty()).then_some(piece)
    })
}
