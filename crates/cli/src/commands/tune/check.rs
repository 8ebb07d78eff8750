//! `tune --check`: what is in data and what a model would learn from it, before any step.
//!
//! Contract: no weight is read and nothing is written; data with faults ends in the same error as `tune` itself. Foreign text reaches a
//! terminal without control characters.

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::anyhow;
use qwenkit_engine::{ModelText, text_of};
use qwenkit_models::arch;
use qwenkit_text::Tokenizer;
use qwenkit_train::check::{Check, Place, Repeated, Shown, Survey, shown};
use qwenkit_train::data::{Data, DataError, Samples, load};
use serde_json::{Value, json};

use super::data_args::DataArgs;
use crate::failure::Told;
use crate::{locate, terminal};

/// Characters of a piece of a sample that are shown.
const PIECE_CHARS_MAX: usize = 700;
/// Width of the bars.
const BAR_CHARS: usize = 30;

/// What to check, and how it is shown.
pub(super) struct CheckRequest<'a> {
    pub(super) model: Option<&'a str>,
    pub(super) files: &'a [PathBuf],
    pub(super) data: &'a DataArgs,
    pub(super) is_json: bool,
    /// Samples to show.
    pub(super) show: usize,
}

/// Reads the data as the model would and says what is in it.
///
/// # Errors
/// When the model is not there, or the data cannot be learnt from.
pub(super) fn run(request: &CheckRequest<'_>, offline: bool) -> anyhow::Result<()> {
    let located = locate::locate(request.model, offline)?;
    let text = text_of(&located.files)?;
    let context_tokens = arch::plan(&located.files)?.context_tokens;
    let loading = request.data.loading(request.files.to_vec(), context_tokens);
    let side = super::data_args::text_side(&text);
    let mut survey = Survey::default();
    let data = match load(&loading, side, |file, line, record| survey.note(file, line, record)) {
        Ok(data) => data,
        Err(error) if request.is_json => {
            terminal::print_json(&faults_json(&error))?;
            return Err(Told.into());
        }
        Err(error) => return Err(anyhow!("{error}")),
    };
    let check = Check::new(survey, &data);
    let samples: Vec<Sampled> = chosen(data.samples.len(), request.show).map(|at| sampled(&text, &data, at)).collect();
    if request.is_json {
        return terminal::print_json(&check_json(&check, &data, &samples));
    }
    terminal::print_foreign(&report(&check, &data, loading.encoding.context_tokens))?;
    for sample in &samples {
        terminal::print(&sample.to_text(std::io::stdout().is_terminal(), has_colour()))?;
    }
    Ok(())
}

/// Whether stdout shows colours.
fn has_colour() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::stdout().is_terminal() && !refused
}

/// Positions of some samples: the first, the last and others at even distances.
fn chosen(count: usize, wanted: usize) -> impl Iterator<Item = usize> {
    let wanted = wanted.min(count);
    (0..wanted).map(move |at| if wanted == 1 { 0 } else { at * (count - 1) / (wanted - 1) })
}

/// A sample to look at.
struct Sampled {
    line: usize,
    /// What it is, in a word or two.
    kind: String,
    tokens: usize,
    trained: usize,
    pieces: Vec<Shown>,
}

fn sampled(text: &ModelText, data: &Data, at: usize) -> Sampled {
    let tokenizer: &Tokenizer = &text.tokenizer;
    let of = |sample: &qwenkit_train::data::Sample, kind: &str| Sampled {
        line: sample.line,
        kind: kind.to_owned(),
        tokens: sample.tokens.len(),
        trained: sample.trained.iter().filter(|trained| **trained).count(),
        pieces: shown(tokenizer, &sample.tokens, &sample.trained),
    };
    let nothing = || Sampled { line: 0, kind: String::new(), tokens: 0, trained: 0, pieces: Vec::new() };
    match &data.samples {
        Samples::Sft(samples) => samples.get(at).map_or_else(nothing, |sample| of(sample, "")),
        Samples::Preference(pairs) => pairs.get(at).map_or_else(nothing, |pair| {
            let mut both = of(&pair.chosen, "preferred, then rejected");
            let rejected = of(&pair.rejected, "");
            both.tokens += rejected.tokens;
            both.trained += rejected.trained;
            both.pieces.extend(rejected.pieces.into_iter().filter(|piece| piece.trained));
            both
        }),
        Samples::Label(samples) => samples.get(at).map_or_else(nothing, |sample| Sampled {
            line: sample.line,
            kind: data.labels.get(sample.label).map_or_else(String::new, |label| format!("label `{label}`")),
            tokens: sample.tokens.len(),
            trained: 0,
            pieces: shown(tokenizer, &sample.tokens, &vec![false; sample.tokens.len()]),
        }),
    }
}

impl Sampled {
    /// With what is learnt in green, or between marks where there are no colours.
    fn to_text(&self, is_terminal: bool, has_colour: bool) -> String {
        let (open, close) = if has_colour { ("\u{1b}[32m", "\u{1b}[0m") } else { ("\u{27e6}", "\u{27e7}") };
        let kind = if self.kind.is_empty() { String::new() } else { format!(", {}", self.kind) };
        let learnt = if self.trained > 0 { format!(", {} learnt", self.trained) } else { String::new() };
        let head = format!("line {}{kind}: {} tokens{learnt}", self.line, self.tokens);
        let mut out = format!("\n{}\n", for_people(&head, is_terminal));
        for piece in &self.pieces {
            let text = for_people(&shortened(&piece.text), is_terminal);
            match piece.trained {
                true => out.push_str(&format!("{open}{text}{close}")),
                false => out.push_str(&text),
            }
        }
        out.push('\n');
        out
    }
}

fn for_people(text: &str, is_terminal: bool) -> String {
    if is_terminal { terminal::printable(text).into_owned() } else { text.to_owned() }
}

/// A text without its middle where it is long.
fn shortened(text: &str) -> String {
    let count = text.chars().count();
    if count <= PIECE_CHARS_MAX {
        return text.to_owned();
    }
    let start: String = text.chars().take(PIECE_CHARS_MAX / 2).collect();
    let end: String = text.chars().skip(count - PIECE_CHARS_MAX / 2).collect();
    format!("{start} [... {} characters ...] {end}", count - PIECE_CHARS_MAX / 2 * 2)
}

/// The check for people.
fn report(check: &Check, data: &Data, context_tokens: usize) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    for source in &data.sources {
        let hash = source.sha256.get(..16).unwrap_or_default();
        let _ = writeln!(
            out,
            "{}: each line {}; {} bytes, SHA-256 {hash}...",
            source.file,
            source.form.name(),
            source.bytes
        );
    }
    let lengths = &check.lengths;
    let _ = writeln!(out, "records: {}, samples: {}, tokens: {}", check.records, check.samples, lengths.total_tokens);
    if check.objective != "label" {
        let share = 100.0 * lengths.trained_tokens as f64 / lengths.total_tokens.max(1) as f64;
        let _ = writeln!(out, "tokens that are learnt: {}, {share:.1}%", lengths.trained_tokens);
    }
    let _ = writeln!(
        out,
        "lengths in tokens: {} to {}, half up to {}, nine tenths up to {}; the context is {context_tokens}",
        lengths.min_tokens, lengths.max_tokens, lengths.median_tokens, lengths.p90_tokens
    );
    let rows: Vec<(String, usize)> =
        lengths.histogram.iter().map(|bin| (format!("up to {}", bin.up_to_tokens), bin.samples)).collect();
    out.push_str(&bars(&rows));
    if !check.labels.is_empty() {
        labels(&mut out, check);
    }
    repeated(&mut out, check.duplicates, "records that repeat an earlier one", &check.repeated, data);
    repeated(&mut out, check.near_duplicates, "records that are nearly like an earlier one", &check.near, data);
    repeated(&mut out, check.contradictions, "texts that have another label elsewhere", &check.contradicting, data);
    personal(&mut out, check, data);
    for remark in &check.remarks {
        let _ = writeln!(out, "note: {remark}");
    }
    out
}

/// A row of bars, the longest of full width.
fn bars(rows: &[(String, usize)]) -> String {
    let most = rows.iter().map(|(_, count)| *count).max().unwrap_or(1).max(1);
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|(name, count)| {
            let bar = "\u{2588}".repeat((count * BAR_CHARS).div_ceil(most));
            vec![format!("  {name}"), format!("{bar:BAR_CHARS$}"), count.to_string()]
        })
        .collect();
    terminal::table(&rows)
}

fn labels(out: &mut String, check: &Check) {
    let counts = || check.labels.iter().map(|label| label.samples);
    let (least, most) = (counts().min().unwrap_or_default(), counts().max().unwrap_or_default());
    let _ = writeln!(out, "{} labels with {least} to {most} samples each", check.labels.len());
    if most >= 20 * least.max(1) {
        let _ = writeln!(out, "note: the largest label has {} times the samples of the smallest", most / least.max(1));
    }
    // All of a few, and the ends of many.
    let all: Vec<(String, usize)> = check.labels.iter().map(|label| (label.label.clone(), label.samples)).collect();
    if all.len() <= 24 {
        out.push_str(&bars(&all));
        return;
    }
    let ends: Vec<(String, usize)> = all.iter().take(5).chain(all.iter().skip(all.len() - 5)).cloned().collect();
    let shown = bars(&ends);
    for (at, line) in shown.lines().enumerate() {
        if at == 5 {
            let _ = writeln!(out, "  ... {} more ...", all.len() - 10);
        }
        let _ = writeln!(out, "{line}");
    }
}

fn at(place: &Place, data: &Data) -> String {
    match data.sources.get(place.file).filter(|_| data.sources.len() > 1) {
        Some(source) => format!("{} line {}", source.file, place.line),
        None => format!("line {}", place.line),
    }
}

fn repeated(out: &mut String, count: usize, what: &str, examples: &[Repeated], data: &Data) {
    if count == 0 {
        return;
    }
    let shown = examples.iter().take(5).map(|one| {
        let likeness = if one.likeness < 1.0 { format!(" ({:.0}%)", one.likeness * 100.0) } else { String::new() };
        format!("{} and {}{likeness}", at(&one.earlier, data), at(&one.place, data))
    });
    let shown: Vec<String> = shown.collect();
    let more = if count > shown.len() { ", ..." } else { "" };
    let _ = writeln!(out, "{what}: {count} ({}{more})", shown.join(", "));
}

fn personal(out: &mut String, check: &Check, data: &Data) {
    if check.personal.is_empty() {
        return;
    }
    let kinds: Vec<String> =
        check.personal.iter().map(|(kind, &count)| format!("{count} {}", kind.name(count))).collect();
    let _ = writeln!(out, "records with personal data: {} ({})", check.personal_lines, kinds.join(", "));
    for found in check.personal_shown.iter().take(10) {
        let _ = writeln!(out, "  {}: {} {}", at(&found.place, data), found.kind.name(1), found.shown);
    }
    let shown = check.personal_shown.len().min(10);
    let all: usize = check.personal.values().sum();
    if all > shown {
        let _ = writeln!(out, "  and {} more", all - shown);
    }
    let _ = writeln!(out, "  a tuned model can say what it has learnt: take out what it must not say");
}

fn check_json(check: &Check, data: &Data, samples: &[Sampled]) -> Value {
    let files: Vec<Value> = (data.sources.iter())
        .map(|source| {
            json!({ "file": source.file, "form": source.form.name(), "bytes": source.bytes, "sha256": source.sha256 })
        })
        .collect();
    let shown: Vec<Value> = (samples.iter())
        .map(|sample| {
            json!({ "line": sample.line, "kind": sample.kind, "tokens": sample.tokens, "trained_tokens": sample.trained,
                "pieces": sample.pieces })
        })
        .collect();
    let mut value = serde_json::to_value(check).unwrap_or_default();
    if let Value::Object(object) = &mut value {
        object.insert("files".to_owned(), Value::Array(files));
        object.insert("shown".to_owned(), Value::Array(shown));
    }
    value
}

fn faults_json(error: &DataError) -> Value {
    let DataError::Faults(files) = error else { return json!({ "error": error.to_string() }) };
    let faults: Vec<Value> = (files.iter())
        .flat_map(|faults| {
            let fault = |fault: &qwenkit_train::data::Fault| {
                json!({ "file": faults.file(), "line": fault.line, "problem": fault.problem.to_string() })
            };
            faults.shown().iter().map(fault).collect::<Vec<_>>()
        })
        .collect();
    let total: usize = files.iter().map(|faults| faults.total()).sum();
    json!({ "error": "the data cannot be learnt from", "total": total, "faults": faults })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_chosen_from_end_to_end() {
        let of = |count, wanted| chosen(count, wanted).collect::<Vec<_>>();
        assert_eq!((of(10, 3), of(2, 3), of(5, 1), of(0, 3)), (vec![0, 4, 9], vec![0, 1], vec![0], vec![]));
    }

    #[test]
    fn what_is_learnt_is_marked_and_foreign_text_cannot_steer_a_terminal() {
        let piece = |text: &str, trained| Shown { text: text.to_owned(), trained };
        let sample = Sampled {
            line: 3,
            kind: String::new(),
            tokens: 5,
            trained: 2,
            pieces: vec![piece("a\u{1b}[2J", false), piece("b", true)],
        };
        assert_eq!(sample.to_text(true, true), "\nline 3: 5 tokens, 2 learnt\na\u{fffd}[2J\u{1b}[32mb\u{1b}[0m\n");
        assert_eq!(sample.to_text(false, false), "\nline 3: 5 tokens, 2 learnt\na\u{1b}[2J\u{27e6}b\u{27e7}\n");
        assert!(shortened(&"x".repeat(5000)).contains("[... 4300 characters ...]"));
    }

    #[test]
    fn bars_are_as_long_as_their_share() {
        let rows = [("a".to_owned(), 10), ("b".to_owned(), 1)];
        let text = bars(&rows);
        let lengths: Vec<usize> = text.lines().map(|line| line.matches('\u{2588}').count()).collect();
        assert_eq!(lengths, [30, 3]);
    }
}
