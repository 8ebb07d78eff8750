//! `tune --data`: from data to a folder with an adapter or a model, by way of a run that can be cut off at any moment. Here what is
//! the same for both; `adapting` and `full` say what is trained and written.

use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use qwenkit_engine::text_of;
use qwenkit_kernels::Compute;
use qwenkit_models::Plan;
use qwenkit_train::{
    AdamW, Error, Learner, Lessons, Outcome, Pair, Place, RECORD, RunSettings, Schedule, StepSettings, Team,
    model_hash, references, report as page,
};
use serde_json::{Value, json};

use super::data::{self, Material};
use super::identity::Basis;
use super::ranks::Sharing;
use super::report::{Measuring, Report, duration};
use super::{Method, Task, TuneArgs, adapting, beside, full};
use crate::failure::{Interrupted, usage};
use crate::locate::{self, Located};
use crate::{opening, terminal};

/// What a run goes on from.
pub(crate) const CHECKPOINT: &str = "checkpoint.safetensors";
/// What lies ahead of a run, written before its first step.
pub(crate) const COURSE: &str = "course.json";
/// How far the better answers lead before the first step, of preferences.
const REFERENCES: &str = "references.safetensors";

/// Set by Ctrl-C, and by who started a run that gives way: the run ends behind the step that it is in.
pub(super) static STOP: AtomicBool = AtomicBool::new(false);

/// Runs it, as one of a team of ranks, of which the first one keeps the folder.
///
/// # Errors
/// When the arguments or data cannot be learnt from, or the run fails here or on another rank.
pub(super) fn run(args: &TuneArgs, out: &Path, team: Team<'_>, offline: bool) -> anyhow::Result<()> {
    if args.beside {
        beside::give_way();
    }
    if team.is_first() {
        check_folder(args, out)?;
    }
    let located = locate::locate(args.model.as_deref(), offline)?;
    match args.method {
        Method::Lora => adapting::run(args, out, team, &located),
        Method::Full => full::run(args, out, team, &located),
    }
}

/// How a run goes, whatever it trains.
pub(super) struct Course<'a> {
    pub(super) material: Material,
    pub(super) settings: RunSettings,
    /// Who computes it, and what they share.
    pub(super) team: Team<'a>,
    pub(super) sharing: Sharing,
    /// What of a label's share is learnt as all labels'.
    smoothing: f32,
    /// Of preferences.
    beta: f64,
}

impl<'a> Course<'a> {
    /// Reads the data, and settles what was not said.
    ///
    /// # Errors
    /// When the data cannot be learnt from, or an argument does not fit them.
    pub(super) fn new(args: &TuneArgs, located: &Located, plan: &Plan, team: Team<'a>) -> anyhow::Result<Course<'a>> {
        let text = text_of(&located.files)?;
        let material = data::read(args, &text, plan.context_tokens)?;
        if material.valid.is_empty() && (args.course.patience.is_some() || args.course.validate_every.is_some()) {
            return Err(usage("no samples are kept apart to validate with\nhint: --validation N"));
        }
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
        let settings = settings(args, &material, team.count());
        Ok(Course { material, settings, team, sharing: Sharing::of(team)?, smoothing, beta })
    }

    /// Threads of this process.
    pub(super) fn threads(&self, args: &TuneArgs) -> usize {
        args.compute.given_threads().unwrap_or_else(|| self.sharing.threads())
    }

    /// Says what is about to be done; returns what the run's identity is made of, and what computes.
    ///
    /// # Errors
    /// When the model cannot be read, or there is no such instruction set.
    pub(super) fn begin(&self, args: &TuneArgs, located: &Located, numbers: usize) -> anyhow::Result<(Basis, Compute)> {
        let Course { material, settings, smoothing, beta, .. } = self;
        if self.team.count() > 1 {
            let (count, threads) = (self.team.count(), self.threads(args));
            terminal::note(&format!(
                "{count} processes train together, each with its share of a step's samples; here {threads} threads"
            ));
        }
        terminal::note(&format!(
            "{} samples to learn from, {} to validate with; {} steps of {}; {numbers} numbers to train",
            material.train.len() / material.each(),
            material.valid.len() / material.each(),
            settings.schedule.steps,
            settings.batch,
        ));
        let model = model_hash(&located.files)?;
        ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed))?;
        let compute = Compute::new(self.threads(args), opening::isa()?);
        let (optimiser, isa) = (args.course.optimiser, compute.isa().to_string());
        Ok((Basis { model, smoothing: *smoothing, beta: *beta, optimiser, sparing: false, isa }, compute))
    }

    /// The run, from its first step or its checkpoint to its last.
    ///
    /// # Errors
    /// When it diverges or is stopped, memory is short, or a file cannot be written.
    pub(super) fn run<'l>(
        &'l self,
        args: &TuneArgs,
        out: &Path,
        learner: &mut Learner<'l>,
        place: &Place,
    ) -> anyhow::Result<(Outcome, Report)> {
        let Course { material, settings, team, smoothing, beta, .. } = self;
        let beta = *beta;
        // Who comes after this run may have begun already.
        if STOP.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        if team.is_first() {
            fs::create_dir_all(out).map_err(|source| Error::Write { path: out.to_owned(), source })?;
            claim(out)?;
            write_course(out, settings, material)?;
        }
        learner.team = *team;
        learner.keep_moments_in(args.course.optimiser.precision());
        learner.smoothing = *smoothing;
        if !args.resume && team.is_first() {
            // Figures of a run that left no checkpoint.
            let _ = fs::remove_file(out.join(page::METRICS));
        }
        let mut report = Report::new(&out.join(page::METRICS), settings.schedule.steps);
        let mut failure = None;
        // Measured before a checkpoint is read: against what the run begins with.
        let pairs = match material.task {
            Task::Dpo => Some(pairs(learner, material, settings.step.piece_tokens, (out, &place.identity))?),
            _ => None,
        };
        let both = match &pairs {
            Some((train, valid)) => (Lessons::Pairs { pairs: train, beta }, Lessons::Pairs { pairs: valid, beta }),
            None => (Lessons::from(&material.train[..]), Lessons::from(&material.valid[..])),
        };
        let outcome = qwenkit_train::run(learner, both, settings, Some(place), args.resume, &mut |happening| {
            if team.is_first()
                && let Err(source) = report.hear(&happening)
            {
                failure.get_or_insert(Error::Write { path: out.join(page::METRICS), source });
            }
            failure.is_none() && !STOP.load(Ordering::Relaxed)
        });
        if let Some(failure) = failure {
            return Err(failure.into());
        }
        match outcome {
            Err(stopped @ Error::Stopped { .. }) => {
                terminal::note(&stopped.to_string());
                Err(Interrupted.into())
            }
            other => Ok((other?, report)),
        }
    }

    /// What the folder says of how it came to be.
    pub(super) fn record(
        &self,
        located: &Located,
        plan: &Plan,
        place: &Place,
        basis: &Basis,
        outcome: Outcome,
    ) -> Value {
        let material = &self.material;
        let files = material.files.iter().map(|(name, sha256)| json!({ "name": name, "sha256": sha256 }));
        json!({
            "qwenkit": env!("CARGO_PKG_VERSION"),
            "task": match material.task { Task::Sft => "sft", Task::Classify => "classify", Task::Dpo => "dpo" },
            "base": { "name": located.stored.name, "sha256_of_tensors": basis.model, "architecture": plan.architecture },
            "data": {
                "files": files.collect::<Vec<_>>(),
                "train": material.train.len() / material.each(), "validation": material.valid.len() / material.each(),
            },
            "settings": place.identity.lines().collect::<Vec<_>>(),
            "validation": (!material.valid.is_empty()).then(|| json!({ "loss": outcome.loss, "right": outcome.right })),
        })
    }
}

/// The last of a run, behind what it trained, `what`, which is in `out`.
///
/// # Errors
/// When a file cannot be written.
pub(super) fn end(out: &Path, record: &Value, report: &Report, what: &str) -> anyhow::Result<()> {
    fs::write(out.join(RECORD), format!("{record:#}\n"))
        .map_err(|source| Error::Write { path: out.join(RECORD), source })?;
    if let Err(problem) = page::write(out) {
        terminal::note(&format!("note: there is no page of the run: {problem}"));
    }
    // What was trained is whole; nothing is left to go on from.
    let _ = fs::remove_file(out.join(CHECKPOINT));
    let _ = fs::remove_file(out.join(REFERENCES));
    terminal::note(&format!(
        "done in {}, {:.0} tokens/s; {what} is in {}",
        duration(report.elapsed()),
        report.tokens_per_s(),
        out.display()
    ));
    Ok(())
}

/// A folder that holds another run is not written over.
fn check_folder(args: &TuneArgs, out: &Path) -> anyhow::Result<()> {
    let has = |name: &str| out.join(name).exists();
    if is_claimed(out) {
        return Err(under_way(out));
    }
    // What a finished run leaves, of either method.
    let left = [("adapter_config.json", "an adapter"), ("config.json", "a model")];
    let left = left.into_iter().find(|(name, _)| has(name)).map(|(_, what)| what);
    let out = out.display();
    if args.resume && !has(CHECKPOINT) {
        let (what, hint) = match left {
            Some("a model") => ("a finished run", "--model begins a new run with its model"),
            Some(_) => ("a finished run", "--adapter-init begins a new run with its adapter"),
            None => ("no checkpoint", "without --resume the run begins anew"),
        };
        return Err(usage(format!("`{out}` holds {what}; there is nothing to go on with\nhint: {hint}")));
    }
    let found = if has(CHECKPOINT) { Some("a run that was cut off") } else { left };
    if let Some(what) = found.filter(|_| !args.resume) {
        let hint =
            if has(CHECKPOINT) { "--resume goes on with it; or name another folder" } else { "name another folder" };
        return Err(usage(format!("`{out}` holds {what}, which would be lost\nhint: {hint}")));
    }
    Ok(())
}

/// DPO's beta unless somebody says otherwise.
const USUAL_BETA: f64 = 0.1;
/// What of a label's share is learnt as all labels', unless somebody says otherwise.
const USUAL_SMOOTHING: f32 = 0.1;

/// The highest learning rate of an adapter unless somebody says otherwise.
pub(crate) fn usual_rate(task: Task) -> f64 {
    match task {
        Task::Sft => 2e-4,
        Task::Classify => 4e-4,
        Task::Dpo => 5e-5,
    }
}

/// Makes a folder this run's own until the process ends, however it does: to the last file that is written.
fn claim(out: &Path) -> anyhow::Result<()> {
    static CLAIM: OnceLock<File> = OnceLock::new();
    // Some systems do not open folders; nothing watches over them there.
    let Ok(folder) = File::open(out) else { return Ok(()) };
    if let Err(TryLockError::WouldBlock) = folder.try_lock() {
        return Err(under_way(out));
    }
    CLAIM.get_or_init(|| folder);
    Ok(())
}

fn under_way(out: &Path) -> anyhow::Error {
    usage(format!("in `{}` a run is under way\nhint: wait for its end, or name another folder", out.display()))
}

/// Whether a run is under way in a folder.
pub(crate) fn is_claimed(out: &Path) -> bool {
    File::open(out).is_ok_and(|folder| matches!(folder.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// What lies ahead, for who follows the run by its figures.
fn write_course(out: &Path, settings: &RunSettings, material: &Material) -> anyhow::Result<()> {
    let (samples, validation) = (material.train.len() / material.each(), material.valid.len() / material.each());
    let (steps, batch) = (settings.schedule.steps, settings.batch);
    let epochs = steps as f64 / samples.div_ceil(batch).max(1) as f64;
    let course = json!({
        "samples": samples, "validation": validation, "steps": steps, "batch": batch, "epochs": epochs, "lr": settings.schedule.rate,
    });
    let (path, half) = (out.join(COURSE), out.join(format!("{COURSE}.part")));
    let written = fs::write(&half, format!("{course}\n")).and_then(|()| fs::rename(&half, &path));
    Ok(written.map_err(|source| Error::Write { path, source })?)
}

/// How the run goes on so many processes.
fn settings(args: &TuneArgs, material: &Material, processes: usize) -> RunSettings {
    let course = &args.course;
    let labels = material.task == Task::Classify;
    let samples = material.train.len() / material.each();
    let of_each = course.batch.map_or(if labels { 32 } else { 8 }, |n| n as usize);
    let batch = of_each.saturating_mul(processes).min(samples.max(1));
    let per_epoch = samples.div_ceil(batch);
    // The least and the most times that all samples are gone through, and steps that are enough between these.
    let (least, steps_enough) = if labels { (2.0, 300) } else { (3.0, 40) };
    let usual = (f64::from(steps_enough) / per_epoch as f64).clamp(least, 10.0);
    let of_epochs = (per_epoch as f64 * course.epochs.unwrap_or(usual)).ceil() as usize;
    let steps = course.steps.map_or(of_epochs, |n| n as usize).max(1);
    let warmup = course.warmup.map_or(steps / 20, |n| n as usize);
    RunSettings {
        schedule: Schedule {
            rate: course.lr.unwrap_or(match (args.method, material.task) {
                (Method::Lora, task) => usual_rate(task),
                (Method::Full, Task::Dpo) => 5e-7,
                (Method::Full, _) => 1e-5,
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
