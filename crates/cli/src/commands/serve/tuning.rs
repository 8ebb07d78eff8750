//! The server's job `tune`: this same program as a child process, `tune --beside`, followed by what it writes.
//!
//! Contract: a run that fails, or that the system ends for want of memory, is the job's failure and never the server's; a run that
//! was cut off goes on from its checkpoint. Not here: what a run does (`commands::tune`).

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use qwenkit_server::{Course, Done, Job, JobError, Order, Progress, Wish};
use qwenkit_train::{RECORD, report::METRICS};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::commands::tune::{CHECKPOINT, COURSE, Task, is_claimed, usual_rate};
use crate::failure::INTERRUPTED;

/// The run's folder in the job's.
const OUT: &str = "adapter";
/// What the run says, in the job's folder.
const LOG: &str = "tune.log";
/// Steps between checkpoints: what a machine that goes down costs.
const CHECKPOINT_EVERY: &str = "20";
/// Between two looks at a run.
const LOOK: Duration = Duration::from_millis(200);
/// A run that is to stop may take so long for its step; then it ends by itself, with nobody waiting.
const STEP: Duration = Duration::from_secs(5);

/// The job.
#[derive(Debug)]
pub(super) struct Tuning {
    /// This program.
    pub(super) program: PathBuf,
    /// Names of models, and where they are.
    pub(super) models: BTreeMap<String, PathBuf>,
    /// Threads that compute.
    pub(super) threads: usize,
}

/// What a job is told.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    method: Method,
    training_file: String,
    validation_file: Option<String>,
    adapter: Option<String>,
    seed: Option<u64>,
    n_epochs: Option<u32>,
    batch_size: Option<u32>,
    learning_rate_multiplier: Option<f64>,
    beta: Option<f64>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Method {
    Supervised,
    Dpo,
}

impl Method {
    fn task(self) -> Task {
        match self {
            Method::Supervised => Task::Sft,
            Method::Dpo => Task::Dpo,
        }
    }
}

impl Settings {
    /// `tune` with these settings.
    fn args(&self, model: &Path, threads: usize, resume: bool) -> Vec<String> {
        let task = if matches!(self.method, Method::Dpo) { "dpo" } else { "sft" };
        let mut args = vec!["--offline".to_owned(), "tune".to_owned(), "--beside".to_owned()];
        let mut add = |name: &str, value: Option<String>| {
            args.extend(value.map(|value| format!("--{name}={value}")));
        };
        add("model", Some(model.display().to_string()));
        add("data", Some(self.training_file.clone()));
        add("out", Some(OUT.to_owned()));
        add("task", Some(task.to_owned()));
        add("threads", Some(threads.to_string()));
        add("checkpoint-every", Some(CHECKPOINT_EVERY.to_owned()));
        add("validation-data", self.validation_file.clone());
        add("adapter-init", self.adapter.clone());
        add("seed", self.seed.map(|seed| seed.to_string()));
        add("epochs", self.n_epochs.map(|epochs| epochs.to_string()));
        add("batch", self.batch_size.map(|batch| batch.to_string()));
        let rate = self.learning_rate_multiplier.map(|times| times * usual_rate(self.method.task()));
        add("lr", rate.map(|rate| rate.to_string()));
        add("beta", self.beta.map(|beta| beta.to_string()));
        if resume {
            args.push("--resume".to_owned());
        }
        args
    }
}

impl Job for Tuning {
    fn name(&self) -> &'static str {
        "tune"
    }

    fn schema(&self) -> Value {
        let whole = json!({ "type": "integer", "minimum": 1 });
        let number = json!({ "type": "number", "exclusiveMinimum": 0 });
        json!({
            "type": "object",
            "additionalProperties": false,
            "required": ["method", "training_file"],
            "properties": {
                "method": { "enum": ["supervised", "dpo"] },
                "training_file": { "type": "string" },
                "validation_file": { "type": "string" },
                "adapter": { "type": "string", "description": "The adapter to begin with" },
                "seed": { "type": "integer", "minimum": 0 },
                "n_epochs": whole,
                "batch_size": whole,
                "learning_rate_multiplier": number,
                "beta": number,
            },
        })
    }

    fn run(&self, order: &Order, hear: &mut dyn FnMut(&[Progress]) -> Wish) -> Result<Done, JobError> {
        let settings = Settings::deserialize(&order.settings).map_err(|error| failed(error.to_string()))?;
        let Some(model) = self.models.get(&order.model) else {
            return Err(failed(format!("{} is not served here", order.model)));
        };
        let out = order.folder.join(OUT);
        // A run whose server has ended may still be doing its last step.
        while is_claimed(&out) {
            if hear(&[]) != Wish::GoOn {
                return Err(JobError::Stopped);
            }
            thread::sleep(LOOK);
        }
        let mut figures = Figures { out: out.clone(), method: settings.method, has_begun: false, lines: 0 };
        let has = |name: &str| out.join(name).exists();
        // The record is the last thing that a run writes, and then its checkpoint goes.
        if !has(RECORD) || has(CHECKPOINT) {
            let resume = has(CHECKPOINT);
            if !resume && out.exists() {
                fs::remove_dir_all(&out).map_err(|error| failed(format!("{}: {error}", out.display())))?;
            }
            let args = settings.args(model, self.threads, resume);
            let child = start(&self.program, &args, &order.folder)
                .map_err(|error| failed(format!("tune cannot be started: {error}")))?;
            let status = follow(child, &mut figures, hear)?;
            judge(status, &order.folder)?;
        }
        hear(&figures.fresh());
        let _ = fs::remove_file(order.folder.join(LOG));
        Ok(Done { adapter: out })
    }
}

fn failed(message: String) -> JobError {
    JobError::Failed { message }
}

fn start(program: &Path, args: &[String], folder: &Path) -> io::Result<Child> {
    let log = File::create(folder.join(LOG))?;
    Command::new(program)
        .args(args)
        .current_dir(folder)
        .env_remove("QWENKIT_API_KEY")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
}

/// Follows a run to its end.
fn follow(
    mut child: Child,
    figures: &mut Figures,
    hear: &mut dyn FnMut(&[Progress]) -> Wish,
) -> Result<ExitStatus, JobError> {
    loop {
        let status = child.try_wait().map_err(|error| failed(format!("tune is out of sight: {error}")))?;
        // Behind the question whether it has ended: so nothing is missed.
        let wish = hear(&figures.fresh());
        if let Some(status) = status {
            return Ok(status);
        }
        match wish {
            Wish::GoOn => thread::sleep(LOOK),
            Wish::Rest => {
                rest(child);
                return Err(JobError::Stopped);
            }
            Wish::Cancel => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(JobError::Stopped);
            }
        }
    }
}

/// Has a run write a checkpoint and end.
fn rest(mut child: Child) {
    drop(child.stdin.take());
    let begun = Instant::now();
    while begun.elapsed() < STEP {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        thread::sleep(LOOK);
    }
    // The system wants somebody to take notice of its end.
    thread::spawn(move || child.wait());
}

/// What the end of a run means.
fn judge(status: ExitStatus, folder: &Path) -> Result<(), JobError> {
    if status.success() {
        return Ok(());
    }
    if status.code() == Some(i32::from(INTERRUPTED)) {
        return Err(JobError::Stopped);
    }
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        // HUP, INT and TERM: the machine goes down, or somebody meant the whole group.
        return Err(match signal {
            1 | 2 | 15 => JobError::Stopped,
            9 => failed("the training was ended by the system, most likely as memory ran short".to_owned()),
            other => failed(format!("the training was ended by signal {other}")),
        });
    }
    let log = fs::read(folder.join(LOG)).unwrap_or_default();
    Err(failed(reason(&String::from_utf8_lossy(&log)).unwrap_or_else(|| format!("the training ended with {status}"))))
}

/// The error that a run ended with. Hints at flags are left out: who asked has none.
fn reason(log: &str) -> Option<String> {
    let lines: Vec<&str> = log.lines().collect();
    let first = lines.iter().rposition(|line| line.starts_with("error: "))?;
    let is_of_use = |line: &&str| !(line.starts_with("hint:") && line.contains("--"));
    let unwrapped = lines[first..].iter().map(|line| line.strip_prefix("error: ").unwrap_or(line));
    let unwrapped = unwrapped.map(|line| line.strip_prefix("  ").unwrap_or(line)).filter(is_of_use);
    Some(unwrapped.collect::<Vec<_>>().join("\n"))
}

/// A run's figures, as far as they have been told.
struct Figures {
    out: PathBuf,
    method: Method,
    has_begun: bool,
    /// Lines told. A run that goes on writes those behind its checkpoint again, and they are the same.
    lines: usize,
}

impl Figures {
    /// What there is to tell since the last time.
    fn fresh(&mut self) -> Vec<Progress> {
        let mut told = Vec::new();
        if !self.has_begun {
            let Some(course) = self.course() else { return told };
            told.push(Progress::Begun(course));
            self.has_begun = true;
        }
        let text = fs::read_to_string(self.out.join(METRICS)).unwrap_or_default();
        // The last line may be half written.
        let whole: Vec<&str> = text.split_inclusive('\n').filter(|line| line.ends_with('\n')).collect();
        let fresh = whole.get(self.lines..).unwrap_or_default();
        told.extend(fresh.iter().filter_map(|line| progress(line)));
        self.lines = self.lines.max(whole.len());
        told
    }

    fn course(&self) -> Option<Course> {
        let course: Value = serde_json::from_slice(&fs::read(self.out.join(COURSE)).ok()?).ok()?;
        let number = |name: &str| course[name].as_u64().unwrap_or(0);
        Some(Course {
            samples: number("samples"),
            validation: number("validation"),
            steps: number("steps"),
            batch: number("batch"),
            epochs: course["epochs"].as_f64()?,
            rate_multiplier: course["lr"].as_f64()? / usual_rate(self.method.task()),
        })
    }
}

fn progress(line: &str) -> Option<Progress> {
    let value: Value = serde_json::from_str(line).ok()?;
    let step = value["step"].as_u64()?;
    match (value["loss"].as_f64(), value["validation_loss"].as_f64()) {
        (Some(loss), _) => Some(Progress::Step { step, loss, tokens: value["tokens"].as_u64().unwrap_or(0) }),
        (None, Some(loss)) => {
            let (right, is_best) = (value["validation_right"].as_f64(), value["best"] == true);
            Some(Progress::Validation { step, loss, right, is_best })
        }
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_of_the_schema_is_read_and_no_other() {
        let job = Tuning { program: PathBuf::new(), models: BTreeMap::new(), threads: 1 };
        let mut all = json!({
            "method": "dpo", "training_file": "t", "validation_file": "v", "adapter": "a", "seed": 1,
            "n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 2.0, "beta": 0.5,
        });
        let names = |value: &Value| value.as_object().map(|map| map.keys().cloned().collect::<Vec<_>>());
        assert_eq!(names(&all), names(&job.schema()["properties"]));
        let settings = Settings::deserialize(&all).expect("settings");
        let args = settings.args(Path::new("m"), 2, true).join(" ");
        assert_eq!(
            args,
            "--offline tune --beside --model=m --data=t --out=adapter --task=dpo --threads=2 --checkpoint-every=20 \
             --validation-data=v --adapter-init=a --seed=1 --epochs=2 --batch=3 --lr=0.0001 --beta=0.5 --resume"
        );
        all["colour"] = json!(1);
        assert!(Settings::deserialize(&all).is_err());
    }

    #[test]
    fn an_error_is_told_without_hints_at_flags() {
        let log = "memory: 1\nerror: `training_file.jsonl`, line 3: found 5\n  hint: give text\n  hint: --context\n";
        assert_eq!(reason(log).as_deref(), Some("`training_file.jsonl`, line 3: found 5\nhint: give text"));
        assert_eq!(reason("step 1\n"), None);
    }

    #[test]
    fn figures_are_told_once_and_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("writable");
        let out = folder.path().to_owned();
        let mut figures = Figures { out, method: Method::Supervised, has_begun: false, lines: 0 };
        assert_eq!(figures.fresh(), []);
        write(COURSE, r#"{"samples": 30, "validation": 0, "steps": 40, "batch": 8, "epochs": 10, "lr": 4e-4}"#);
        let step = |step: u64| format!("{{\"step\": {step}, \"loss\": 0.5, \"tokens\": 7}}\n");
        write(METRICS, &format!("{}{}{{\"st", step(1), step(2)));
        let told = figures.fresh();
        assert!(matches!(&told[0], Progress::Begun(course) if course.steps == 40 && course.rate_multiplier == 2.0));
        assert_eq!(told[1..], [1, 2].map(|step| Progress::Step { step, loss: 0.5, tokens: 7 }));
        // The run goes on from its first step.
        write(METRICS, &step(1));
        assert_eq!(figures.fresh(), []);
        let validation = "{\"step\": 3, \"validation_loss\": 0.25, \"validation_right\": null, \"best\": true}\n";
        write(METRICS, &format!("{}{}{}{validation}", step(1), step(2), step(3)));
        let expected = [
            Progress::Step { step: 3, loss: 0.5, tokens: 7 },
            Progress::Validation { step: 3, loss: 0.25, right: None, is_best: true },
        ];
        assert_eq!(figures.fresh(), expected);
    }
}
