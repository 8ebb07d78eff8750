//! What people see: progress bars, notes and errors on stderr, results on stdout.
//!
//! Contract: stdout carries data and nothing else; nothing that came out of a file or a model reaches a terminal as a
//! control sequence. A closed stdout (`| head`) is [`StdoutClosed`], not a failure. Not here: what is said.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{DecimalBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

/// The reader of stdout has gone: nobody is left to work for.
#[derive(Debug)]
pub(crate) struct StdoutClosed;

impl fmt::Display for StdoutClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the reader of the output has closed it")
    }
}

impl std::error::Error for StdoutClosed {}

/// Writes to stdout and hands it on at once, so that a pipe sees text as it comes.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(stdout_error)
}

/// One line of data.
pub(crate) fn print_line(text: &str) -> anyhow::Result<()> {
    print(&format!("{text}\n"))
}

/// A JSON value as one line of data.
pub(crate) fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    print_line(&value.to_string())
}

/// Text of a model or a file: as it is for a program, without control characters for a terminal.
pub(crate) fn print_foreign(text: &str) -> anyhow::Result<()> {
    if io::stdout().is_terminal() { print(&printable(text)) } else { print(text) }
}

/// What a failed write to stdout means.
pub(crate) fn stdout_error(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => StdoutClosed.into(),
        _ => anyhow::anyhow!("cannot write the output: {error}\nhint: check the disk or pipe that stdout leads to"),
    }
}

/// Set in a process whose work another one tells of.
static IS_SILENT: AtomicBool = AtomicBool::new(false);

/// From now on stderr stays empty, errors included: another process says the same.
pub(crate) fn be_silent() {
    IS_SILENT.store(true, Ordering::Relaxed);
}

/// Whether another process speaks for this one.
pub(crate) fn is_silent() -> bool {
    IS_SILENT.load(Ordering::Relaxed)
}

/// Takes `be_silent` back.
pub(crate) fn speak_again() {
    IS_SILENT.store(false, Ordering::Relaxed);
}

/// A remark for the person at the terminal. A stderr that cannot be written to is nobody's loss.
pub(crate) fn note(text: &str) {
    if is_silent() {
        return;
    }
    let _ = writeln!(io::stderr(), "{}", printable(text));
}

/// An error: what happened after `error:`, what to do indented below.
pub(crate) fn print_error(message: &str) {
    if is_silent() {
        return;
    }
    let _ = write!(io::stderr(), "{}", error_lines(message));
}

fn error_lines(message: &str) -> String {
    let message = printable(message);
    let mut lines = message.trim_end().lines();
    let mut text = format!("error: {}\n", lines.next().unwrap_or("unknown"));
    for line in lines {
        text.push_str("  ");
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// The text without the characters that steer a terminal; line ends and tabs stay, carriage returns go.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let steers = |c: char| c.is_control() && c != '\n' && c != '\t';
    if text.contains(steers) {
        let shown = |c| if steers(c) { char::REPLACEMENT_CHARACTER } else { c };
        Cow::Owned(text.chars().filter(|&c| c != '\r').map(shown).collect())
    } else {
        Cow::Borrowed(text)
    }
}

/// Whether a person sees what goes to stderr.
pub(crate) fn stderr_is_seen() -> bool {
    !is_silent() && io::stderr().is_terminal()
}

/// What a bar counts.
#[derive(Clone, Copy)]
pub(crate) enum Unit {
    /// With rate and time left.
    Bytes,
    /// Tokens of a prompt.
    Tokens,
    /// Numbers of a model's tensors.
    Values,
}

/// A progress bar on stderr that appears only when the work takes longer than its delay; nothing without a terminal.
pub(crate) struct Bar {
    label: &'static str,
    unit: Unit,
    delay: Duration,
    started: Instant,
    bar: Option<ProgressBar>,
}

impl Bar {
    /// A bar that shows itself after `delay`.
    pub(crate) fn new(label: &'static str, unit: Unit, delay: Duration) -> Bar {
        Bar { label, unit, delay, started: Instant::now(), bar: None }
    }

    /// How far the work is.
    pub(crate) fn update(&mut self, done: u64, total: u64) {
        if self.bar.is_none() && (!stderr_is_seen() || self.started.elapsed() < self.delay) {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
            bar.set_style(style(self.unit, done));
            bar.set_prefix(self.label);
            bar.with_position(done)
        });
        bar.set_length(total);
        bar.set_position(done);
    }

    /// Prints a line above the bar.
    pub(crate) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| note(text)),
            None => note(text),
        }
    }

    /// Takes the bar off the screen.
    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Rate and time left are those since the bar began: what an earlier pull had fetched is not progress of this one.
fn style(unit: Unit, first: u64) -> ProgressStyle {
    let template = match unit {
        Unit::Bytes => "{prefix} {wide_bar:.cyan} {decimal_bytes}/{decimal_total_bytes}  {rate}  {left}",
        Unit::Tokens => "{prefix} {wide_bar:.cyan} {pos}/{len} tokens  {left}",
        Unit::Values => "{prefix} {wide_bar:.cyan} {percent}%  {left}",
    };
    let rate = move |state: &ProgressState| per_second(state.pos().saturating_sub(first), state.elapsed());
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .with_key("rate", move |state: &ProgressState, out: &mut dyn fmt::Write| {
            let _ = write!(out, "{}/s", DecimalBytes(rate(state) as u64));
        })
        .with_key("left", move |state: &ProgressState, out: &mut dyn fmt::Write| {
            let rest = state.len().unwrap_or(0).saturating_sub(state.pos());
            if let Some(left) = time_left(rest, rate(state)) {
                let _ = write!(out, "{:#}", HumanDuration(left));
            }
        })
}

fn per_second(count: u64, elapsed: Duration) -> f64 {
    if elapsed.is_zero() { 0.0 } else { count as f64 / elapsed.as_secs_f64() }
}

/// `None` while nothing has moved.
fn time_left(rest: u64, per_second: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(rest as f64 / per_second).ok()
}

/// Columns as wide as their widest cell, two spaces apart; the last one runs free.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|row| row.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{:width$}", printable(cell)));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_and_its_hints_stand_indented_below() {
        assert_eq!(error_lines("a: b\nhint: c"), "error: a: b\n  hint: c\n");
        assert_eq!(error_lines("a\u{1b}[2J"), "error: a\u{fffd}[2J\n");
    }

    #[test]
    fn foreign_text_cannot_steer_the_terminal() {
        assert_eq!(printable("a\tb\nc"), "a\tb\nc");
        assert_eq!(printable("\u{1b}]0;x\u{7}\u{9b}1m\r"), "\u{fffd}]0;x\u{fffd}\u{fffd}1m");
    }

    #[test]
    fn time_left_follows_the_rate_and_is_unknown_without_one() {
        assert_eq!(per_second(100, Duration::from_secs(4)), 25.0);
        assert_eq!(per_second(100, Duration::ZERO), 0.0);
        assert_eq!(time_left(50, 25.0), Some(Duration::from_secs(2)));
        assert_eq!(time_left(50, 0.0), None);
        assert_eq!(time_left(0, 0.0), None);
    }

    #[test]
    fn columns_line_up_whatever_the_length_of_a_row() {
        let rows = [vec!["a".to_owned(), "bb".into()], vec!["ccc".into()], vec!["d".into(), "e".into()]];
        assert_eq!(table(&rows), "a    bb\nccc\nd    e\n");
    }
}
