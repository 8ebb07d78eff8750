//! A run that trains an adapter: which one, and its folder as PEFT writes it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::ensure;
use qwenkit_formats::{Adapter as AdapterFile, AdapterSettings};
use qwenkit_models::{Adapter, Model, Tape, arch};
use qwenkit_train::{
    AdapterShape, ClassifierRecord, Example, Goal, Learner, Place, Team, calibrate, usual_targets, values_hash,
};

use super::data::Material;
use super::identity::{Basis, identity, was_sparing};
use super::memory::{MemoryPlan, Needs, memory_plan};
use super::training::{CHECKPOINT, Course, end};
use super::{Task, TuneArgs};
use crate::locate::Located;
use crate::{opening, terminal};

/// Runs it, as one of a team of ranks; the first one writes what comes of it.
///
/// # Errors
/// When the data or the adapter do not fit the model, the run fails, or memory is short.
pub(super) fn run(args: &TuneArgs, out: &Path, team: Team<'_>, located: &Located) -> anyhow::Result<()> {
    let plan = arch::plan(&located.files)?;
    let init = args.adapter_init.as_deref().map(AdapterFile::open).transpose()?;
    let course = Course::new(args, located, &plan, team)?;
    let material = &course.material;
    let labels = Some(material.labels.len()).filter(|labels| *labels > 0);
    let half = if material.task == Task::Classify { plan.layers.len() / 2 } else { 0 };
    let from_layer = args.shape.from_layer.map_or(half, usize::from);
    let shape = match &init {
        None => AdapterShape {
            rank: args.shape.rank().into(),
            alpha: args.shape.alpha.unwrap_or(2.0 * f64::from(args.shape.rank())),
            rslora: args.shape.rslora,
            dora: args.shape.dora,
            targets: match &args.shape.targets[..] {
                [] => usual_targets(&plan, from_layer),
                targets => targets.to_vec(),
            },
            from_layer,
            labels,
        },
        Some(file) => AdapterShape {
            rank: file.modules.iter().map(|module| module.rank).max().unwrap_or(0),
            alpha: file.settings.alpha,
            rslora: file.settings.use_rslora,
            dora: file.settings.use_dora,
            targets: file.modules.iter().map(|module| format!("{} {:e}", module.name, module.scale)).collect(),
            from_layer: 0,
            labels,
        },
    };
    let mut start = match &init {
        None => shape.start(&plan, args.course.seed)?,
        Some(file) => Adapter::of_file(&plan, file)?,
    };
    let found = start.score().map(|score| score.labels);
    ensure!(
        found == labels,
        "the adapter scores {} labels and the data have {}\nhint: begin without --adapter-init, or from an adapter of this task",
        found.unwrap_or(0),
        labels.unwrap_or(0)
    );
    let (basis, compute) = course.begin(args, located, start.values().len())?;
    let mut bar = opening::loading_bar();
    let model = Model::load(&located.files, &compute, &mut |e| bar.update(e.done_bytes, e.total_bytes))?;
    bar.clear();
    model.check_learning()?;
    if init.is_none() {
        model.set_magnitudes(&compute, &mut start);
    }
    let was_sparing = if args.resume { was_sparing(&out.join(CHECKPOINT)) } else { None };
    let all_tokens = material.train.iter().chain(&material.valid).map(|example| example.ids.len()).sum();
    let needs = Needs {
        weights: model.weight_bytes(),
        numbers: start.values().len(),
        what: "adapter and optimiser",
        tape: &|sparing, size| Tape::bytes(&model, &start, sparing, size),
        remembered: Tape::remembered_bytes(&model, &start, all_tokens),
    };
    let MemoryPlan { sparing, remembered } = memory_plan(args, &course, &needs, was_sparing)?;
    let basis = Basis { sparing, ..basis };
    let of_adapter = [
        format!("start: {}", values_hash(start.values())),
        format!("rank: {}", shape.rank),
        format!("alpha: {}", shape.alpha),
        format!("rslora: {}", shape.rslora),
        format!("dora: {}", shape.dora),
        format!("targets: {}", shape.targets.join(",")),
        format!("from layer: {}", shape.from_layer),
    ];
    let place = Place { checkpoint: out.join(CHECKPOINT), identity: identity(&course, &of_adapter, &basis) };
    let mut learner = Learner::new(&model, &compute, start, sparing);
    learner.remember(remembered);
    let (outcome, report) = course.run(args, out, &mut learner, &place)?;
    if !team.is_first() {
        return Ok(());
    }
    let mut record = course.record(located, &plan, &place, &basis, outcome);
    if material.task == Task::Classify {
        let piece_tokens = course.settings.step.piece_tokens;
        record["classifier"] = calibrated(&mut learner, material, piece_tokens)?.to_json();
    }
    let base = Some(located.stored.name.clone());
    let made = match init {
        Some(file) => AdapterSettings { base_model: base, ..file.settings },
        None => AdapterSettings {
            rank: Some(shape.rank),
            alpha: shape.alpha,
            use_rslora: shape.rslora,
            base_model: base,
            ..AdapterSettings::default()
        },
    };
    write_adapter(&learner, made, out)?;
    end(out, &record, &report, "the adapter")
}

/// The temperature that the samples kept apart show, and how right the classifier is on them.
fn calibrated(learner: &mut Learner<'_>, material: &Material, piece_tokens: usize) -> anyhow::Result<ClassifierRecord> {
    let (mut scores, mut labels) = (Vec::new(), Vec::new());
    let valid: Vec<&Example> = material.valid.iter().collect();
    learner.evaluate(&valid, piece_tokens, &mut |example, _, of| {
        if let Goal::Label(label) = example.goal {
            scores.extend_from_slice(of);
            labels.push(label);
        }
    })?;
    let temperature = calibrate::temperature(&scores, &labels);
    let end_token = material.train.first().and_then(|example| example.ids.last()).map_or(0, |id| id.0);
    if !labels.is_empty() {
        let error = |temperature| 100.0 * calibrate::calibration_error(&scores, &labels, temperature);
        terminal::note(&format!(
            "probabilities: temperature {temperature:.3}; on {} samples kept apart they are off by {:.1}% ({:.1}% before)",
            labels.len(),
            error(temperature),
            error(1.0)
        ));
    }
    let (labels, reading) = (material.labels.clone(), material.reading);
    Ok(ClassifierRecord { base: None, labels, end_token, temperature, reading })
}

fn write_adapter(learner: &Learner<'_>, mut settings: AdapterSettings, out: &Path) -> anyhow::Result<()> {
    let task = if learner.adapter().score().is_some() { "SEQ_CLS" } else { "CAUSAL_LM" };
    settings.task_type = Some(task.to_owned());
    let file = learner.adapter().to_file(learner.model().plan(), learner.values(), settings);
    file.write_peft(out, &BTreeMap::from([("made_by".to_owned(), "qwenkit".to_owned())]))?;
    Ok(())
}
