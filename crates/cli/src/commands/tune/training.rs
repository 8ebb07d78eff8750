//! `tune --data`: from data to a folder with an adapter, by way of a run that can be cut off at any moment.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::ensure;
use qwenkit_engine::text_of;
use qwenkit_formats::{Adapter as AdapterFile, AdapterSettings};
use qwenkit_kernels::Compute;
use qwenkit_models::{Adapter, Model, arch};
use qwenkit_train::{
    AdamW, AdapterShape, ClassifierRecord, Error, Example, Goal, Learner, Lessons, Pair, Place, RECORD, RunSettings,
    Schedule, StepSettings, calibrate, model_hash, references, report as page, usual_targets,
};
use serde_json::json;

use super::data::{self, Material};
use super::identity::{Basis, identity, was_sparing};
use super::memory::{MemoryPlan, memory_plan};
use super::report::{Measuring, Report, duration};
use super::{Task, TuneArgs};
use crate::failure::{Interrupted, usage};
use crate::{locate, opening, terminal};

const CHECKPOINT: &str = "checkpoint.safetensors";
const ADAPTER: &str = "adapter_config.json";
/// How far the better answers lead before the first step, of preferences.
const REFERENCES: &str = "references.safetensors";

/// Set by Ctrl-C: the run ends behind the step that it is in.
static STOP: AtomicBool = AtomicBool::new(false);

pub(super) fn run(args: &TuneArgs, out: &Path, offline: bool) -> anyhow::Result<()> {
    check_folder(args, out)?;
    let located = locate::locate(args.model.as_deref(), offline)?;
    let (text, plan) = (text_of(&located.files)?, arch::plan(&located.files)?);
    let init = args.adapter_init.as_deref().map(AdapterFile::open).transpose()?;
    let material = data::read(args, &text, plan.context_tokens)?;
    if material.valid.is_empty() && (args.course.patience.is_some() || args.course.validate_every.is_some()) {
        return Err(usage("no samples are kept apart to validate with\nhint: --validation N"));
    }
    let labels = Some(material.labels.len()).filter(|labels| *labels > 0);
    let half = if material.task == Task::Classify { plan.layers.len() / 2 } else { 0 };
    let from_layer = args.shape.from_layer.map_or(half, usize::from);
    let shape = match &init {
        None => AdapterShape {
            rank: args.shape.rank.into(),
            alpha: args.shape.alpha.unwrap_or(2.0 * f64::from(args.shape.rank)),
            rslora: args.shape.rslora,
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
            targets: file.modules.iter().map(|module| format!("{} {:e}", module.name, module.scale)).collect(),
            from_layer: 0,
            labels,
        },
    };
    let start = match &init {
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
    let settings = settings(args, &material);
    let smoothing = match (args.course.smoothing, material.task) {
        (given, Task::Classify) => given.unwrap_or(USUAL_SMOOTHING),
        (None, _) => 0.0,
        (Some(_), _) => return Err(usage("--smoothing is for labels, and the data have none")),
    };
    let beta = match (args.course.beta, material.task) {
        (given, Task::Dpo) => given.unwrap_or(USUAL_BETA),
        (None, _) => 0.0,
        (Some(_), _) => return Err(usage("--beta is for preferences, and the data are none")),
    };
    terminal::note(&format!(
        "{} samples to learn from, {} to validate with; {} steps of {}; {} numbers to train",
        material.train.len() / material.each(),
        material.valid.len() / material.each(),
        settings.schedule.steps,
        settings.batch,
        start.values().len()
    ));
    let model_hash = model_hash(&located.files)?;
    ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed))?;
    let compute = Compute::new(args.compute.threads(), opening::isa()?);
    let mut bar = opening::loading_bar();
    let model = Model::load(&located.files, &compute, &mut |e| bar.update(e.done_bytes, e.total_bytes))?;
    bar.clear();
    model.check_learning()?;
    let was_sparing = if args.resume { was_sparing(&out.join(CHECKPOINT)) } else { None };
    let piece = settings.step.piece_tokens;
    let MemoryPlan { sparing, remembered } =
        memory_plan(args, &model, &material, &start, (piece, settings.batch), was_sparing)?;
    let isa = compute.isa().to_string();
    let basis = Basis {
        model: &model_hash,
        start: start.values(),
        smoothing,
        beta,
        optimiser: args.course.optimiser,
        sparing,
        isa,
    };
    let place = Place { checkpoint: out.join(CHECKPOINT), identity: identity(&settings, &shape, &material, &basis) };
    fs::create_dir_all(out).map_err(|source| Error::Write { path: out.to_owned(), source })?;
    let mut learner = Learner::new(&model, &compute, start, sparing);
    learner.keep_moments_in(args.course.optimiser.precision());
    learner.remember(remembered);
    learner.smoothing = smoothing;
    if !args.resume {
        // Figures of a run that left no checkpoint.
        let _ = fs::remove_file(out.join(page::METRICS));
    }
    let mut report = Report::new(&out.join(page::METRICS), settings.schedule.steps);
    let mut failure = None;
    // Measured before a checkpoint is read: against the adapter that the run begins with.
    let pairs = match material.task {
        Task::Dpo => Some(pairs(&mut learner, &material, piece, (out, &place.identity))?),
        _ => None,
    };
    let both = match &pairs {
        Some((train, valid)) => (Lessons::Pairs { pairs: train, beta }, Lessons::Pairs { pairs: valid, beta }),
        None => (Lessons::from(&material.train[..]), Lessons::from(&material.valid[..])),
    };
    let outcome = qwenkit_train::run(&mut learner, both, &settings, Some(&place), args.resume, &mut |happening| {
        if let Err(source) = report.hear(&happening) {
            failure.get_or_insert(Error::Write { path: out.join(page::METRICS), source });
        }
        failure.is_none() && !STOP.load(Ordering::Relaxed)
    });
    if let Some(failure) = failure {
        return Err(failure.into());
    }
    let outcome = match outcome {
        Err(stopped @ Error::Stopped { .. }) => {
            terminal::note(&stopped.to_string());
            return Err(Interrupted.into());
        }
        other => other?,
    };
    let mut record = json!({
        "qwenkit": env!("CARGO_PKG_VERSION"),
        "task": match material.task { Task::Sft => "sft", Task::Classify => "classify", Task::Dpo => "dpo" },
        "base": { "name": located.stored.name, "sha256_of_tensors": model_hash, "architecture": plan.architecture },
        "data": {
            "files": material.files.iter().map(|(name, sha256)| json!({ "name": name, "sha256": sha256 })).collect::<Vec<_>>(),
            "train": material.train.len() / material.each(), "validation": material.valid.len() / material.each(),
        },
        "settings": place.identity.lines().collect::<Vec<_>>(),
        "validation": (!material.valid.is_empty()).then(|| json!({ "loss": outcome.loss, "right": outcome.right })),
    });
    if material.task == Task::Classify {
        record["classifier"] = calibrated(&mut learner, &material, settings.step.piece_tokens)?.to_json();
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
    fs::write(out.join(RECORD), format!("{record:#}\n"))
        .map_err(|source| Error::Write { path: out.join(RECORD), source })?;
    if let Err(problem) = page::write(out) {
        terminal::note(&format!("note: there is no page of the run: {problem}"));
    }
    // The adapter is whole; nothing is left to go on from.
    let _ = fs::remove_file(out.join(CHECKPOINT));
    let _ = fs::remove_file(out.join(REFERENCES));
    terminal::note(&format!(
        "done in {}, {:.0} tokens/s; the adapter is in {}",
        duration(report.elapsed()),
        report.tokens_per_s(),
        out.display()
    ));
    Ok(())
}

/// A folder that holds another run is not written over.
fn check_folder(args: &TuneArgs, out: &Path) -> anyhow::Result<()> {
    let has = |name: &str| out.join(name).exists();
    if args.resume && !has(CHECKPOINT) {
        let (what, hint) = match has(ADAPTER) {
            true => ("a finished run", "--adapter-init begins a new run with its adapter"),
            false => ("no checkpoint", "without --resume the run begins anew"),
        };
        let out = out.display();
        return Err(usage(format!("`{out}` holds {what}; there is nothing to go on with\nhint: {hint}")));
    }
    if !args.resume && (has(CHECKPOINT) || has(ADAPTER)) {
        let (what, hint) = match has(CHECKPOINT) {
            true => ("a run that was cut off", "--resume goes on with it; or name another folder"),
            false => ("an adapter", "name another folder"),
        };
        return Err(usage(format!("`{}` holds {what}, which would be lost\nhint: {hint}", out.display())));
    }
    Ok(())
}

/// DPO's beta unless somebody says otherwise.
const USUAL_BETA: f64 = 0.1;
/// What of a label's share is learnt as all labels', unless somebody says otherwise.
const USUAL_SMOOTHING: f32 = 0.1;

fn settings(args: &TuneArgs, material: &Material) -> RunSettings {
    let course = &args.course;
    let labels = material.task == Task::Classify;
    let samples = material.train.len() / material.each();
    let batch = course.batch.map_or(if labels { 32 } else { 8 }, |n| n as usize).min(samples.max(1));
    let per_epoch = samples.div_ceil(batch);
    // The least and the most times that all samples are gone through, and steps that are enough between these.
    let (least, steps_enough) = if labels { (2.0, 300) } else { (3.0, 40) };
    let usual = (f64::from(steps_enough) / per_epoch as f64).clamp(least, 10.0);
    let of_epochs = (per_epoch as f64 * course.epochs.unwrap_or(usual)).ceil() as usize;
    let steps = course.steps.map_or(of_epochs, |n| n as usize).max(1);
    let warmup = course.warmup.map_or(steps / 20, |n| n as usize);
    RunSettings {
        schedule: Schedule {
            rate: course.lr.unwrap_or(match material.task {
                Task::Sft => 2e-4,
                Task::Classify => 4e-4,
                Task::Dpo => 5e-5,
            }),
            curve: course.schedule,
            warmup_steps: warmup,
            steps,
        },
        batch,
        seed: course.seed,
        step: StepSettings {
            optimiser: AdamW { weight_decay: course.weight_decay as f32, ..AdamW::default() },
            clip: (!course.no_clip).then_some(course.clip),
            piece_tokens: course.piece_tokens as usize,
        },
        validate_every: course.validate_every.map_or(steps.div_ceil(if labels { 4 } else { 8 }), |n| n as usize),
        patience: course.patience.map(|n| n as usize),
        checkpoint_every: course.checkpoint_every as usize,
    }
}

/// Better and worse answers as pairs, with how much more probable the better one is before the first step: those to learn from,
/// and those to validate with.
fn pairs(
    learner: &mut Learner<'_>,
    material: &Material,
    piece_tokens: usize,
    (out, identity): (&Path, &str),
) -> anyhow::Result<(Vec<Pair>, Vec<Pair>)> {
    let answers = [&material.train[..], &material.valid].concat();
    let mut measuring = Measuring::new(answers.len() / 2);
    let kept = (&*out.join(REFERENCES), identity);
    let leads = references(learner, &answers, piece_tokens, kept, &mut |done| {
        measuring.tell(done);
        !STOP.load(Ordering::Relaxed)
    });
    let leads = match leads {
        Err(stopped @ Error::StoppedBefore { .. }) => {
            terminal::note(&stopped.to_string());
            return Err(Interrupted.into());
        }
        other => other?,
    };
    let mut pairs = answers.as_chunks().0.iter().zip(leads).map(|([chosen, rejected], reference)| Pair {
        chosen: chosen.clone(),
        rejected: rejected.clone(),
        reference,
    });
    let train = pairs.by_ref().take(material.train.len() / 2).collect();
    Ok((train, pairs.collect()))
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
    let task = if learner.adapter.score().is_some() { "SEQ_CLS" } else { "CAUSAL_LM" };
    settings.task_type = Some(task.to_owned());
    let file = learner.adapter.to_file(learner.model().plan(), learner.adapter.values(), settings);
    file.write_peft(out, &BTreeMap::from([("made_by".to_owned(), "qwenkit".to_owned())]))?;
    Ok(())
}
