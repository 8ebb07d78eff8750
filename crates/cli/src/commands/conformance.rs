//! `qwenkit doctor --conformance`: this build held against checkpoints whose right answers are on record.
//!
//! Below a folder, every checkpoint with an `expected.safetensors` (`input_ids` (T), `logits` (T, V), `greedy_ids` (N); of
//! models with vision the images' patches too) is computed, and so is its `model.gguf` where there is one, with the tower in
//! the `mmproj.gguf` beside it. The text is then made longer than a page, cut in two at every position and forked there from the
//! cached prefix, and has to give the same bits. Contract: a difference above the limit, a NaN, a bit that hangs on a cut, an error
//! while loading and a folder without any checkpoint all fail; only an architecture that this version does not run is
//! skipped, and counted.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use qwenkit_engine::{View, score, split};
use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{Compute, PAGE_TOKENS};
use qwenkit_models::{Error as ModelError, Model, Plan, arch, mmproj_beside};
use qwenkit_tensor::TokenId;
use serde_json::{Value, json};

use crate::failure::Told;
use crate::seeing;
use crate::tensors::Recorded;
use crate::terminal;

const EXPECTED: &str = "expected.safetensors";
/// The largest logit difference that the order of f32 sums explains; more where a recurrent state carries it on, and more
/// again where several residual streams do.
const LOGIT_DIFFERENCE_MAX: f32 = 5e-4;
const LOGIT_DIFFERENCE_MAX_RECURRENT: f32 = 2e-3;
const LOGIT_DIFFERENCE_MAX_STREAMS: f32 = 5e-3;
/// Greedy decoding is compared while the best two logits are further apart than this.
const CLEAR_GAP: f32 = 1e-3;
/// A text to be split has so many tokens behind its first page, if the record's own is shorter.
const BEHIND_PAGE_TOKENS: usize = 24;
/// Folders this deep hold no checkpoints.
const DEPTH_MAX: usize = 16;

/// What holding one model against its record showed.
enum Outcome {
    Passed { difference: f32, compared: usize, recorded: usize, splits: usize },
    Failed { reason: String },
    Skipped { reason: String },
}

struct Finding {
    name: String,
    outcome: Outcome,
}

/// The right answers.
struct Expected {
    input_ids: Vec<TokenId>,
    /// (T, V)
    logits: Vec<f32>,
    vocab: usize,
    greedy_ids: Vec<TokenId>,
}

/// Checks every checkpoint below `dir`, printing a line for each as it is done.
///
/// # Errors
/// When `dir` holds no checkpoint with a record; and `Told` when any fails.
pub(crate) fn run(dir: &Path, compute: &Compute, as_json: bool) -> anyhow::Result<()> {
    let mut folders = Vec::new();
    find(dir, 0, &mut folders).with_context(|| format!("cannot search `{}`", dir.display())).map_err(with_cause)?;
    folders.sort();
    ensure!(
        !folders.is_empty(),
        "found no `{EXPECTED}` in `{}` or below it\nhint: name a folder of checkpoints with recorded logits",
        dir.display()
    );
    let mut findings = Vec::new();
    for folder in &folders {
        let shown = folder.strip_prefix(dir).ok().filter(|rest| !rest.as_os_str().is_empty()).unwrap_or(folder);
        let gguf = Some(folder.join("model.gguf")).filter(|path| path.exists());
        let gguf = gguf.map(|path| (format!("{}/model.gguf", shown.display()), path));
        // Some models exist as GGUF alone.
        let is_checkpoint = gguf.is_none() || folder.join("config.json").exists();
        let checkpoint = is_checkpoint.then(|| (shown.display().to_string(), folder.clone()));
        for (name, path) in checkpoint.into_iter().chain(gguf) {
            let outcome = check(&path, folder, compute).unwrap_or_else(|e| Outcome::Failed { reason: e.to_string() });
            let finding = Finding { name, outcome };
            if !as_json {
                terminal::print_line(&finding.line())?;
            }
            findings.push(finding);
        }
    }
    conclude(&findings, as_json)
}

fn conclude(findings: &[Finding], as_json: bool) -> anyhow::Result<()> {
    let count = |wanted: &str| findings.iter().filter(|finding| finding.outcome.word() == wanted).count();
    let (passed, failed, skipped) = (count("pass"), count("fail"), count("skip"));
    if as_json {
        let models: Vec<Value> = findings.iter().map(Finding::to_json).collect();
        terminal::print_json(&json!({ "models": models, "passed": passed, "failed": failed, "skipped": skipped }))?;
    } else {
        terminal::print_line(&format!("{passed} passed, {failed} failed, {skipped} skipped"))?;
    }
    // Where nothing was compared, nothing has passed.
    if failed > 0 || passed == 0 { Err(Told.into()) } else { Ok(()) }
}

/// Collects the folders that hold a record. Links to folders are not followed, so there are no circles.
fn find(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if dir.join(EXPECTED).is_file() {
        found.push(dir.to_path_buf());
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if depth < DEPTH_MAX && entry.file_type()?.is_dir() {
            find(&entry.path(), depth + 1, found)?;
        }
    }
    Ok(())
}

fn with_cause(error: anyhow::Error) -> anyhow::Error {
    anyhow::anyhow!("{error}: {}", error.root_cause())
}

/// Holds the model at `path` against the record in `folder`.
fn check(path: &Path, folder: &Path, compute: &Compute) -> anyhow::Result<Outcome> {
    let recorded = Recorded::open(&folder.join(EXPECTED))?;
    let files = ModelFiles::open(path)?;
    match arch::plan(&files) {
        Err(error @ ModelError::Architecture { .. }) => return Ok(Outcome::Skipped { reason: error.to_string() }),
        other => other?,
    };
    let expected = Expected::read(&recorded)?;
    let model = Model::load(&files, compute, &mut |_| {})?;
    ensure!(
        model.plan().vocab == expected.vocab,
        "the model's vocabulary is {}, the record's {}",
        model.plan().vocab,
        expected.vocab
    );
    let view = match recorded.has("pixel_values") || recorded.has("pixel_values_videos") {
        false => None,
        true => {
            let mmproj = mmproj_of(&files)?;
            let eyes = seeing::Eyes::open(&model, &files, mmproj.as_ref(), compute, &mut |_| {})?;
            Some(eyes.look(compute, &recorded, &expected.input_ids)?)
        }
    };
    compare(&model, compute, &expected, view.as_ref())
}

/// The tower's file of a GGUF model.
fn mmproj_of(files: &ModelFiles) -> anyhow::Result<Option<ModelFiles>> {
    let ModelFiles::Gguf(gguf) = files else { return Ok(None) };
    Ok(mmproj_beside(gguf.path()).map(|path| ModelFiles::open(&path)).transpose()?)
}

impl Expected {
    fn read(recorded: &Recorded) -> anyhow::Result<Expected> {
        let ids = |name: &str| anyhow::Ok(recorded.ids(name)?.into_iter().map(TokenId).collect::<Vec<_>>());
        let (input_ids, greedy_ids) = (ids("input_ids")?, ids("greedy_ids")?);
        let (shape, logits) = recorded.f32s("logits", 2)?;
        let (rows, vocab) = (shape.first().copied().unwrap_or(0), shape.get(1).copied().unwrap_or(0));
        ensure!(
            !input_ids.is_empty() && !greedy_ids.is_empty() && rows == input_ids.len() && vocab > 0,
            "`{EXPECTED}` contradicts itself: {} input ids, {rows} rows of {vocab} logits, {} greedy ids",
            input_ids.len(),
            greedy_ids.len()
        );
        Ok(Expected { input_ids, logits, vocab, greedy_ids })
    }
}

fn compare(model: &Model, compute: &Compute, expected: &Expected, view: Option<&View>) -> anyhow::Result<Outcome> {
    let mut worst = Worst { difference: 0.0, row: 0, column: 0 };
    score::logits_seeing(model, compute, &expected.input_ids, view, &mut |row, ours| {
        let theirs = expected.logits.get(row * expected.vocab..(row + 1) * expected.vocab).unwrap_or_default();
        worst.take(row, ours, theirs);
    })?;
    let plan = model.plan();
    let limit = match (plan.has_recurrent_state(), plan.stream_count()) {
        (_, 2..) => LOGIT_DIFFERENCE_MAX_STREAMS,
        (true, _) => LOGIT_DIFFERENCE_MAX_RECURRENT,
        (false, _) => LOGIT_DIFFERENCE_MAX,
    };
    if worst.difference.is_nan() || worst.difference > limit {
        let Worst { difference, row, column } = worst;
        let reason = format!(
            "largest logit difference {difference:.1e} at token {row}, id {column}; at most {limit:.0e} is allowed"
        );
        return Ok(Outcome::Failed { reason });
    }
    let recorded = expected.greedy_ids.len();
    let ours = score::greedy_seeing(model, compute, &expected.input_ids, view, recorded)?;
    let clear = clear_steps(model, compute, (&expected.input_ids, view), &ours)?;
    let differs = ours.iter().zip(&expected.greedy_ids).take(clear).position(|(ours, theirs)| ours != theirs);
    if let Some(step) = differs {
        let (found, wanted) = (ours.get(step), expected.greedy_ids.get(step));
        let id = |id: Option<&TokenId>| id.map_or("none".to_owned(), ToString::to_string);
        let reason = format!("greedy token {step} is {}, expected {}", id(found), id(wanted));
        return Ok(Outcome::Failed { reason });
    }
    let text = longer_than_a_page(&expected.input_ids, plan);
    let split::Splits { positions, fault } = split::splits(model, compute, &text, view)?;
    if let Some((at, way, row)) = fault {
        let how = match way {
            split::Way::Cut => "cut",
            split::Way::Fork => "forked from the cached prefix",
        };
        let reason = format!("{how} behind token {at}, the logits of token {row} have other bits than in one piece");
        return Ok(Outcome::Failed { reason });
    }
    Ok(Outcome::Passed { difference: worst.difference, compared: clear, recorded, splits: positions })
}

/// The text with its words once more behind it until it fills a page and goes on: what fills a page is shared by a fork, what does not is
/// copied. Images are not repeated.
fn longer_than_a_page(ids: &[TokenId], plan: &Plan) -> Vec<TokenId> {
    let is_word =
        |id: &&TokenId| plan.sight.as_ref().is_none_or(|sight| **id != sight.image_token && **id != sight.video_token);
    let words: Vec<TokenId> = ids.iter().filter(is_word).copied().collect();
    let missing = (PAGE_TOKENS + BEHIND_PAGE_TOKENS).saturating_sub(ids.len());
    ids.iter().chain(words.iter().cycle().take(missing)).copied().collect()
}

/// The largest difference so far.
struct Worst {
    difference: f32,
    row: usize,
    column: usize,
}

impl Worst {
    fn take(&mut self, row: usize, ours: &[f32], theirs: &[f32]) {
        if ours.len() != theirs.len() {
            *self = Worst { difference: f32::NAN, row, column: 0 };
        }
        for (column, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            let difference = (ours - theirs).abs();
            // A NaN once found stays.
            if !self.difference.is_nan() && (difference.is_nan() || difference > self.difference) {
                *self = Worst { difference, row, column };
            }
        }
    }
}

/// How many of our greedy tokens were chosen by a clear margin, up to the first that was not.
fn clear_steps(
    model: &Model,
    compute: &Compute,
    (prompt, view): (&[TokenId], Option<&View>),
    ours: &[TokenId],
) -> anyhow::Result<usize> {
    let fed = ours.len().saturating_sub(1);
    let all: Vec<TokenId> = prompt.iter().chain(ours.iter().take(fed)).copied().collect();
    let mut gaps = Vec::with_capacity(ours.len());
    score::logits_seeing(model, compute, &all, view, &mut |row, logits| {
        if row + 1 >= prompt.len() {
            gaps.push(gap(logits));
        }
    })?;
    Ok(gaps.iter().position(|gap| *gap < CLEAR_GAP).unwrap_or(ours.len()))
}

/// How far the best logit is above the second.
fn gap(logits: &[f32]) -> f32 {
    let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &logit in logits {
        if logit > best {
            (best, second) = (logit, best);
        } else if logit > second {
            second = logit;
        }
    }
    best - second
}

impl Outcome {
    fn word(&self) -> &'static str {
        match self {
            Outcome::Passed { .. } => "pass",
            Outcome::Failed { .. } => "fail",
            Outcome::Skipped { .. } => "skip",
        }
    }
}

impl Finding {
    fn line(&self) -> String {
        let what = match &self.outcome {
            Outcome::Passed { difference, compared, recorded, splits } => {
                format!(
                    "largest logit difference {difference:.1e}, {compared} of {recorded} greedy tokens compared, all equal; \
                     cut and forked from the cached prefix at each of {splits} positions, the same bits"
                )
            }
            Outcome::Failed { reason } | Outcome::Skipped { reason } => reason.replace('\n', "; "),
        };
        format!("{}  {}: {}", self.outcome.word(), self.name, terminal::printable(&what))
    }

    fn to_json(&self) -> Value {
        let mut object = json!({ "model": self.name, "result": self.outcome.word() });
        match &self.outcome {
            Outcome::Passed { difference, compared, splits, .. } => {
                object["largest_logit_difference"] = json!(difference);
                object["greedy_tokens_compared"] = json!(compared);
                object["positions_cut_and_forked"] = json!(splits);
            }
            Outcome::Failed { reason } | Outcome::Skipped { reason } => object["reason"] = json!(reason),
        }
        object
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_difference_is_found_and_nan_is_the_worst_of_all() {
        let mut worst = Worst { difference: 0.0, row: 0, column: 0 };
        worst.take(0, &[1.0, 2.0], &[1.0, 2.5]);
        worst.take(1, &[1.25], &[1.0]);
        assert_eq!((worst.difference, worst.row, worst.column), (0.5, 0, 1));
        worst.take(2, &[f32::NAN, 9.0], &[1.0, 0.0]);
        assert!(worst.difference.is_nan() && worst.row == 2 && worst.column == 0);
        let mut short = Worst { difference: 0.0, row: 0, column: 0 };
        short.take(0, &[1.0], &[]);
        assert!(short.difference.is_nan());
    }

    #[test]
    fn the_gap_is_between_the_best_two_wherever_they_stand() {
        assert_eq!(gap(&[1.0, 4.0, 3.5]), 0.5);
        assert_eq!(gap(&[4.0, 1.0, 4.0]), 0.0);
        assert_eq!(gap(&[2.0]), f32::INFINITY);
    }
}
