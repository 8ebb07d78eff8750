//! What a run trains: an adapter beside a model that stays as it is, or all of a model's own numbers. Either way it is one slice of
//! f32, for optimiser and checkpoints alike.

use qwenkit_kernels::Compute;
use qwenkit_models::{Adapter, Error as ModelError, Lesson, Model, Tape, Whole};

/// What is trained.
pub(crate) enum Trained<'a> {
    Adapter(&'a Model, Adapter),
    Whole(Box<WholeModel>),
}

/// A model that is trained whole.
pub(crate) struct WholeModel {
    /// It computes with the values, rounded to its type.
    model: Model,
    whole: Whole,
    values: Vec<f32>,
}

impl<'a> Trained<'a> {
    pub(crate) fn whole(mut model: Model, whole: Whole) -> Trained<'a> {
        let values = whole.values(&mut model);
        Trained::Whole(Box::new(WholeModel { model, whole, values }))
    }

    pub(crate) fn model(&self) -> &Model {
        match self {
            Trained::Adapter(model, _) => model,
            Trained::Whole(own) => &own.model,
        }
    }

    pub(crate) fn adapter(&self) -> &Adapter {
        match self {
            Trained::Adapter(_, adapter) => adapter,
            Trained::Whole(own) => own.whole.adapter(),
        }
    }

    pub(crate) fn layout(&self) -> Option<&Whole> {
        match self {
            Trained::Adapter(..) => None,
            Trained::Whole(own) => Some(&own.whole),
        }
    }

    pub(crate) fn values(&self) -> &[f32] {
        match self {
            Trained::Adapter(_, adapter) => adapter.values(),
            Trained::Whole(own) => &own.values,
        }
    }

    /// Lets `change` change the numbers; what computes with them knows afterwards.
    pub(crate) fn change<R>(&mut self, compute: &Compute, change: impl FnOnce(&mut [f32]) -> R) -> R {
        match self {
            Trained::Adapter(_, adapter) => change(adapter.values_mut()),
            Trained::Whole(own) => {
                let WholeModel { model, whole, values } = &mut **own;
                let result = change(values);
                whole.store(compute, values, model);
                result
            }
        }
    }

    /// As `Model::learn`.
    pub(crate) fn learn(
        &self,
        compute: &Compute,
        lesson: &Lesson<'_>,
        tape: &mut Tape,
        losses: &mut Vec<f32>,
        grads: Option<&mut [f32]>,
    ) -> Result<(), ModelError> {
        match self {
            Trained::Adapter(model, adapter) => model.learn(compute, adapter, lesson, tape, losses, grads),
            Trained::Whole(own) => own.model.learn_whole(compute, &own.whole, lesson, tape, losses, grads),
        }
    }
}
