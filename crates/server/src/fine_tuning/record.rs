//! A job's object and its events: how they change, and what others see of them.
//!
//! Contract: an object changes together with the events that tell of it, in one transaction, and one change at a time. What is
//! told twice, by a job that was interrupted, counts once.

use std::{
    path::PathBuf,
    sync::PoisonError,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value, json};

use super::request::Asked;
use crate::{
    app::{App, unix_s},
    error::ApiError,
    jobs::{Course, Progress},
    keys::Caller,
    listing::none,
    store::JOBS,
};

/// What the server knows of a job and nobody else sees, a key of its object.
const KEPT: &str = "kept";

/// How grave an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Info,
    Error,
}

/// Events of a change.
#[derive(Default)]
pub(super) struct Edit(Vec<Value>);

impl Edit {
    /// Tells of something.
    pub(super) fn tell(&mut self, level: Level, message: &str) {
        self.add(level, message, "message", json!({}));
    }

    fn add(&mut self, level: Level, message: &str, kind: &str, data: Value) {
        let level = if level == Level::Info { "info" } else { "error" };
        self.0.push(json!({
            "object": "fine_tuning.job.event",
            "created_at": unix_s(),
            "level": level,
            "message": message,
            "type": kind,
            "data": data,
        }));
    }
}

/// A new job, which waits for its turn.
pub(super) fn new(app: &App, caller: &Caller, asked: Asked, base: &str, start: Option<PathBuf>) -> Value {
    let method = asked.method.name();
    // Several may come within a second.
    let order = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    json!({
        "object": "fine_tuning.job",
        "id": app.new_id("ftjob-"),
        "model": asked.model,
        "created_at": unix_s(),
        "finished_at": null,
        "fine_tuned_model": null,
        "organization_id": "",
        "result_files": [],
        "status": "queued",
        "training_file": asked.training_file,
        "validation_file": asked.validation_file,
        "hyperparameters": asked.hyperparameters,
        "method": { "type": method, method: { "hyperparameters": asked.hyperparameters } },
        "user_provided_suffix": asked.suffix,
        "seed": asked.seed,
        "trained_tokens": null,
        "estimated_finish": null,
        "error": null,
        "integrations": [],
        "metadata": asked.metadata,
        "owner": caller.id,
        KEPT: { "order": order, "base": base, "start": start, "events": 0, "step": 0, "validated": 0, "tokens": 0, "best": null },
    })
}

/// What others see of a job.
pub(super) fn shown(mut job: Value) -> Value {
    if let Value::Object(map) = &mut job {
        map.retain(|key, _| key != "owner" && key != KEPT);
    }
    job
}

/// Whether nothing more happens to a job.
pub(super) fn is_over(job: &Value) -> bool {
    ["succeeded", "failed", "cancelled"].contains(&text(job, "status").as_str())
}

/// By what jobs stand in the order in which they came.
pub(super) fn order(job: &Value) -> u64 {
    number(&job[KEPT], "order")
}

/// The name of the model that is trained.
pub(super) fn base(job: &Value) -> String {
    text(&job[KEPT], "base")
}

/// Steps done and steps in all.
pub(super) fn steps(job: &Value) -> (u64, u64) {
    (number(&job[KEPT], "step"), number(&job[KEPT], "steps"))
}

/// The adapter that a job has made, from the job's folder.
pub(super) fn adapter(job: &Value) -> Option<&str> {
    job[KEPT]["adapter"].as_str()
}

pub(super) fn forget_adapter(job: &mut Value) {
    job[KEPT]["adapter"] = Value::Null;
}

pub(super) fn text(object: &Value, name: &str) -> String {
    object[name].as_str().unwrap_or_default().to_owned()
}

fn number(object: &Value, name: &str) -> u64 {
    object[name].as_u64().unwrap_or(0)
}

/// What a job is to do, as the job's schema has it; files are in its folder by these names.
pub(super) fn settings(job: &Value) -> Value {
    let mut settings = Map::new();
    settings.insert("method".to_owned(), job["method"]["type"].clone());
    settings.insert("training_file".to_owned(), json!(TRAINING));
    settings.insert("seed".to_owned(), job["seed"].clone());
    if !job["validation_file"].is_null() {
        settings.insert("validation_file".to_owned(), json!(VALIDATION));
    }
    if !job[KEPT]["start"].is_null() {
        settings.insert("adapter".to_owned(), job[KEPT]["start"].clone());
    }
    // What was asked for, not what became of it: a job that goes on has the same settings.
    let asked = if job[KEPT]["asked"].is_null() { &job["hyperparameters"] } else { &job[KEPT]["asked"] };
    let given = asked.as_object().into_iter().flatten().filter(|(_, value)| *value != "auto");
    settings.extend(given.map(|(name, value)| (name.clone(), value.clone())));
    Value::Object(settings)
}

/// The files of a job's folder. Faults of data name them, and so the parameter.
pub(super) const TRAINING: &str = "training_file.jsonl";
pub(super) const VALIDATION: &str = "validation_file.jsonl";

/// Keeps a job with events that it has not had.
pub(super) fn put(app: &App, mut job: Value, edit: Edit) -> Result<Value, ApiError> {
    let (id, first) = (text(&job, "id"), number(&job[KEPT], "events"));
    let mut events = edit.0;
    for (i, event) in events.iter_mut().enumerate() {
        event["id"] = json!(format!("{}-{}", id.replace("ftjob-", "ftevent-"), first + i as u64));
    }
    job[KEPT]["events"] = json!(first + events.len() as u64);
    app.store.put_job(&id, &job, first, &events)?;
    Ok(job)
}

/// Changes a job; changes come one after the other, and one that `edit` refuses does not happen.
///
/// # Errors
/// When there is no such job, `edit` refuses, or the store fails.
pub(super) fn change(
    app: &App,
    id: &str,
    edit: impl FnOnce(&mut Value, &mut Edit) -> Result<(), ApiError>,
) -> Result<Value, ApiError> {
    let _order = app.job_order.lock().unwrap_or_else(PoisonError::into_inner);
    let mut job = app.store.get(JOBS, id)?.ok_or_else(|| none("fine-tuning job", id))?;
    let mut events = Edit::default();
    edit(&mut job, &mut events)?;
    put(app, job, events)
}

/// How fast a job has gone since it was begun or gone on with.
#[derive(Default)]
pub(super) struct Pace {
    /// When the first step was told, and its number.
    first: Option<(Instant, u64)>,
    /// Tokens of later steps.
    later_tokens: u64,
    /// Steps and tokens that nobody has counted yet.
    uncounted: (u64, u64),
}

impl Pace {
    /// A step was done: says when the last one is going to be.
    fn step(&mut self, step: u64, steps: u64, tokens: u64) -> Option<u64> {
        self.uncounted = (self.uncounted.0 + 1, self.uncounted.1 + tokens);
        let Some((since, from)) = self.first else {
            self.first = Some((Instant::now(), step));
            return None;
        };
        self.later_tokens += tokens;
        let done = step.checked_sub(from).filter(|done| *done > 0)?;
        let left = since.elapsed().as_secs_f64() / done as f64 * steps.saturating_sub(step) as f64;
        Some(unix_s() + left as u64)
    }

    /// Tokens a second, once two steps were done.
    pub(super) fn tokens_per_s(&self) -> Option<f64> {
        let seconds = self.first?.0.elapsed().as_secs_f64();
        (self.later_tokens > 0 && seconds > 0.0).then(|| self.later_tokens as f64 / seconds)
    }

    /// Steps and tokens since the last call.
    pub(super) fn take(&mut self) -> (u64, u64) {
        std::mem::take(&mut self.uncounted)
    }
}

/// Notes what a job tells.
pub(super) fn note(job: &mut Value, edit: &mut Edit, progress: &Progress, pace: &mut Pace) {
    let (last, steps) = steps(job);
    match progress {
        Progress::Begun(course) => begun(job, edit, course),
        Progress::Step { step, loss, tokens } if *step > last => {
            job[KEPT]["step"] = json!(step);
            job[KEPT]["tokens"] = json!(number(&job[KEPT], "tokens") + tokens);
            job[KEPT]["loss"] = json!(loss);
            job["estimated_finish"] = json!(pace.step(*step, steps, *tokens));
            let data = json!({ "step": step, "total_steps": steps, "train_loss": loss });
            edit.add(Level::Info, &format!("Step {step}/{steps}: training loss={loss:.4}"), "metrics", data);
        }
        Progress::Validation { step, loss, right, is_best } if *step > number(&job[KEPT], "validated") => {
            job[KEPT]["validated"] = json!(step);
            if *is_best {
                job[KEPT]["best"] = json!({ "step": step, "loss": loss });
            }
            let mut data = json!({ "step": step, "total_steps": steps, "full_valid_loss": loss });
            if let Some(right) = right {
                data["full_valid_accuracy"] = json!(right);
            }
            edit.add(Level::Info, &format!("Step {step}/{steps}: validation loss={loss:.4}"), "metrics", data);
        }
        Progress::Step { .. } | Progress::Validation { .. } => {}
    }
}

fn begun(job: &mut Value, edit: &mut Edit, course: &Course) {
    job["status"] = json!("running");
    if !job[KEPT]["asked"].is_null() {
        edit.tell(Level::Info, &format!("The job goes on after step {}", number(&job[KEPT], "step")));
        return;
    }
    let Course { samples, validation, steps, batch, epochs, rate_multiplier } = course;
    job[KEPT]["asked"] = job["hyperparameters"].clone();
    job[KEPT]["steps"] = json!(steps);
    // Clients expect a whole number where it is one.
    let epochs = if epochs.fract() == 0.0 { json!(*epochs as u64) } else { json!(epochs) };
    let found =
        [("n_epochs", epochs), ("batch_size", json!(batch)), ("learning_rate_multiplier", json!(rate_multiplier))];
    for (name, value) in found {
        if job["hyperparameters"][name] == "auto" {
            job["hyperparameters"][name] = value;
        }
    }
    let method = text(&job["method"], "type");
    job["method"][method]["hyperparameters"] = job["hyperparameters"].clone();
    let message = format!(
        "The data are in order: {samples} samples to learn from, {validation} to validate with; {steps} steps of {batch}"
    );
    edit.tell(Level::Info, &message);
}

/// The job has made an adapter.
pub(super) fn succeed(job: &mut Value, edit: &mut Edit, name: &str, adapter: &str) {
    job["status"] = json!("succeeded");
    job["finished_at"] = json!(unix_s());
    job["estimated_finish"] = Value::Null;
    job["fine_tuned_model"] = json!(name);
    job["trained_tokens"] = job[KEPT]["tokens"].clone();
    job[KEPT]["adapter"] = json!(adapter);
    edit.tell(Level::Info, &format!("New fine-tuned model created: {name}"));
    edit.tell(Level::Info, "The job has successfully completed");
}

/// The job has failed.
pub(super) fn fail(job: &mut Value, edit: &mut Edit, message: &str) {
    let of = |file: &str, param: &'static str| message.contains(file).then_some(param);
    let param = of(VALIDATION, "validation_file").or(of(TRAINING, "training_file"));
    let code = param.map_or("training_failed".to_owned(), |param| format!("invalid_{param}"));
    job["status"] = json!("failed");
    job["finished_at"] = json!(unix_s());
    job["estimated_finish"] = Value::Null;
    job["error"] = json!({ "code": code, "message": message, "param": param });
    edit.tell(Level::Error, message);
}

/// What a job has made, as a checkpoint: the best state by validation, or the last where nothing was validated.
pub(super) fn checkpoint(job: &Value) -> Option<Value> {
    adapter(job)?;
    let kept = &job[KEPT];
    let (step, metrics) = match &kept["best"] {
        Value::Null => (&kept["step"], json!({ "step": kept["step"], "train_loss": kept["loss"] })),
        best => (&best["step"], json!({ "step": best["step"], "full_valid_loss": best["loss"] })),
    };
    Some(json!({
        "object": "fine_tuning.job.checkpoint",
        "id": text(job, "id").replace("ftjob-", "ftckpt_"),
        "created_at": job["finished_at"],
        "fine_tuning_job_id": job["id"],
        "fine_tuned_model_checkpoint": job["fine_tuned_model"],
        "step_number": step,
        "metrics": metrics,
    }))
}

/// A job's figures as CSV, of its events.
pub(super) fn figures(events: &[Value]) -> String {
    let mut text = "step,train_loss,valid_loss,valid_accuracy\n".to_owned();
    for data in events.iter().filter(|event| event["type"] == "metrics").map(|event| &event["data"]) {
        let cell = |name: &str| data.get(name).map_or(String::new(), Value::to_string);
        let cells = ["step", "train_loss", "full_valid_loss", "full_valid_accuracy"].map(cell);
        text.push_str(&cells.join(","));
        text.push('\n');
    }
    text
}
