//! What a run tells while it goes: lines for people, and its figures as JSON lines that a second run adds to.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use qwenkit_train::Happening;
use serde_json::{Value, json};

use crate::terminal;

/// Time between two lines about steps.
const QUIET: Duration = Duration::from_secs(5);

/// Tells of one run.
pub(super) struct Report {
    path: PathBuf,
    file: Option<File>,
    steps: usize,
    started: Instant,
    first_step: Option<usize>,
    told: Option<Instant>,
    /// Since the last line: tokens, time, sum of losses, steps.
    since: (usize, Duration, f64, usize),
    /// Of the whole run.
    tokens: usize,
    busy: Duration,
}

impl Report {
    /// For a run of so many steps, whose figures go to `path`.
    pub(super) fn new(path: &Path, steps: usize) -> Report {
        Report {
            path: path.to_owned(),
            file: None,
            steps,
            started: Instant::now(),
            first_step: None,
            told: None,
            since: Default::default(),
            tokens: 0,
            busy: Duration::ZERO,
        }
    }

    /// Tokens a second over all steps, those of resting validations not counted.
    pub(super) fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.busy.as_secs_f64().max(1e-9)
    }

    /// Since it began.
    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Hears what happens.
    ///
    /// # Errors
    /// When the figures cannot be written.
    pub(super) fn hear(&mut self, happening: &Happening) -> std::io::Result<()> {
        match *happening {
            Happening::Resumed { step } => {
                // What was written behind the checkpoint comes again.
                keep_until(&self.path, step)?;
                terminal::note(&format!("going on after step {step} of {}", self.steps));
                Ok(())
            }
            Happening::Step { step, report, rate, took } => {
                self.first_step.get_or_insert(step - 1);
                self.tokens += report.tokens;
                self.busy += took;
                let (tokens, time, sum, count) = self.since;
                self.since = (tokens + report.tokens, time + took, sum + report.loss, count + 1);
                let is_due = self.told.is_none_or(|told| told.elapsed() >= QUIET) || step == self.steps;
                if is_due {
                    self.tell(step);
                }
                let ms = (took.as_secs_f64() * 1e3).round();
                self.write(&json!({
                    "step": step, "loss": report.loss, "grad_norm": report.grad_norm, "lr": rate,
                    "tokens": report.tokens, "wanted": report.wanted, "ms": ms,
                }))
            }
            Happening::Validation { step, outcome, is_best } => {
                let right = outcome.right.map_or_else(String::new, |right| format!(", {:.2}% right", 100.0 * right));
                let best = if is_best { "  (best so far)" } else { "" };
                terminal::note(&format!("step {step}: validation loss {:.4}{right}{best}", outcome.loss));
                self.write(&json!({
                    "step": step, "validation_loss": outcome.loss, "validation_right": outcome.right, "best": is_best,
                }))
            }
            Happening::EarlyStop { step } => {
                terminal::note(&format!("step {step}: validation gets no better; the run ends here"));
                Ok(())
            }
        }
    }

    fn tell(&mut self, step: usize) {
        let (tokens, time, sum, count) = std::mem::take(&mut self.since);
        self.told = Some(Instant::now());
        let done = step - self.first_step.unwrap_or(0);
        let left = self.elapsed().as_secs_f64() / done as f64 * (self.steps - step) as f64;
        terminal::note(&format!(
            "step {step} of {}: loss {:.4}, {:.0} tokens/s, {} left",
            self.steps,
            sum / count as f64,
            tokens as f64 / time.as_secs_f64().max(1e-9),
            duration(Duration::from_secs_f64(left))
        ));
    }

    fn write(&mut self, value: &Value) -> std::io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(OpenOptions::new().create(true).append(true).open(&self.path)?),
        };
        writeln!(file, "{value}")
    }
}

/// Tells how far the measuring before a run has come.
pub(super) struct Measuring {
    pairs: usize,
    started: Instant,
    /// Pairs that an earlier call measured.
    first: Option<usize>,
    told: Option<Instant>,
}

impl Measuring {
    /// Of so many pairs.
    pub(super) fn new(pairs: usize) -> Measuring {
        Measuring { pairs, started: Instant::now(), first: None, told: None }
    }

    /// Tells how many pairs are done, now and then.
    pub(super) fn tell(&mut self, done: usize) {
        let first = *self.first.get_or_insert(done);
        if self.told.is_some_and(|told| told.elapsed() < QUIET) && done < self.pairs {
            return;
        }
        self.told = Some(Instant::now());
        let share = (self.pairs - done) as f64 / (done - first).max(1) as f64;
        let left = match done > first {
            true => format!(", {} left", duration(self.started.elapsed().mul_f64(share))),
            false => String::new(),
        };
        terminal::note(&format!("measured the model's own preference in {done} of {} pairs{left}", self.pairs));
    }
}

/// Leaves in a file of figures only those up to a step.
fn keep_until(path: &Path, step: usize) -> std::io::Result<()> {
    let Ok(file) = File::open(path) else { return Ok(()) };
    let mut kept = String::new();
    for line in BufReader::new(file).lines() {
        let line = line?;
        // A line that was cut off in the middle is no JSON.
        let value: Option<Value> = serde_json::from_str(&line).ok();
        if value.and_then(|value| value["step"].as_u64()).is_some_and(|found| found <= step as u64) {
            kept.push_str(&line);
            kept.push('\n');
        }
    }
    fs::write(path, kept)
}

/// A time for people.
pub(super) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}
