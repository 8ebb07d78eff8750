//! A run that trains a model itself, all of its numbers: they are trained in f32, the model computes with them as its file has them,
//! and a checkpoint folder comes of it.

use std::path::Path;

use qwenkit_models::{Model, Tape, Whole, arch};
use qwenkit_quantize::companions;
use qwenkit_tensor::DType;
use qwenkit_train::{Learner, Place, Team, write_model};

use super::identity::{Basis, identity, was_sparing};
use super::memory::{MemoryPlan, Needs, memory_plan};
use super::training::{CHECKPOINT, Course, end};
use super::{Task, TuneArgs};
use crate::failure::usage;
use crate::locate::Located;
use crate::{opening, terminal};

/// Runs it, as one of a team of ranks; the first one writes what comes of it.
///
/// # Errors
/// When the model cannot be trained whole, the data do not fit it, the run fails, or memory is short.
pub(super) fn run(args: &TuneArgs, out: &Path, team: Team<'_>, located: &Located) -> anyhow::Result<()> {
    let plan = arch::plan(&located.files)?;
    Whole::check(&plan)?;
    let course = Course::new(args, located, &plan, team)?;
    if course.material.task == Task::Classify {
        return Err(usage("labels are learnt by an adapter and a head of its own\nhint: leave --method away"));
    }
    if located.files.tensors().iter().any(|info| info.dtype.block_len() > 1) {
        terminal::note(
            "note: the weights are quantised; the training begins with their values in BF16, and writes BF16",
        );
    }
    let numbers = located.files.tensors().iter().map(|info| info.shape.iter().product::<usize>()).sum();
    let (basis, compute) = course.begin(args, located, numbers)?;
    let mut bar = opening::loading_bar();
    let loading = &mut |e: qwenkit_models::LoadEvent| bar.update(e.done_bytes, e.total_bytes);
    let mut model = Model::load_plain(&located.files, &compute, loading)?;
    bar.clear();
    let whole = Whole::of(&mut model)?;
    let was_sparing = if args.resume { was_sparing(&out.join(CHECKPOINT)) } else { None };
    let needs = Needs {
        weights: model.weight_bytes(),
        numbers: whole.len(),
        what: "numbers in f32, gradients and optimiser",
        tape: &|sparing, size| Tape::whole_bytes(&model, &whole, sparing, size),
        remembered: 0,
    };
    let MemoryPlan { sparing, .. } = memory_plan(args, &course, &needs, was_sparing)?;
    let basis = Basis { sparing, ..basis };
    let identity = identity(&course, &["method: full".to_owned()], &basis);
    let place = Place { checkpoint: out.join(CHECKPOINT), identity };
    let mut learner = Learner::whole(model, whole, &compute, sparing);
    let (outcome, report) = course.run(args, out, &mut learner, &place)?;
    if !team.is_first() {
        return Ok(());
    }
    let record = course.record(located, &plan, &place, &basis, outcome);
    let dtype = learner.layout().map_or(DType::BF16, Whole::dtype);
    companions(&located.files, dtype, out)?;
    if let Some(whole) = learner.layout() {
        write_model(whole, learner.values(), out)?;
    }
    end(out, &record, &report, "the model")
}
