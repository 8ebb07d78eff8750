//! The log: a line of JSON for each request, when its answer has ended, and for what goes wrong.
//!
//! Contract: no text of prompts or answers is in it unless whoever runs the server asks for prompts. A log that is read slowly
//! holds up nobody: lines beyond what waits are left out, and counted in the next one.

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use axum::body::{Body, Bytes};
use hyper::body::{Body as _, Frame, SizeHint};
use serde_json::{Value, json};

use crate::{app::unix_s, clock::rfc3339, tally::Tally};

/// Lines that wait to be written.
const WAITING_MAX: usize = 4096;
/// Bytes of a request that are shown; images in it may be large.
const PROMPT_BYTES_MAX: usize = 64 << 10;
/// At the end, lines that still wait may take so long.
const FLUSHING: Duration = Duration::from_secs(2);
/// The status of a request whose client went away before there was an answer.
const CLIENT_GONE: u16 = 499;

/// Where lines go.
#[derive(Clone)]
pub struct Log {
    lines: SyncSender<Message>,
    lost: Arc<AtomicU64>,
    /// Whether requests are shown too.
    pub(crate) prompts: bool,
}

enum Message {
    Line(String),
    /// Says when everything before is written.
    Flush(SyncSender<()>),
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("prompts", &self.prompts).finish_non_exhaustive()
    }
}

impl Log {
    /// A log that is written to `out`, by a thread of its own; with the text of requests if `prompts` says so.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn to(out: impl io::Write + Send + 'static, prompts: bool) -> io::Result<Log> {
        let (lines, received) = sync_channel(WAITING_MAX);
        std::thread::Builder::new().name("qwenkit-log".into()).spawn(move || write(out, &received))?;
        Ok(Log { lines, lost: Arc::default(), prompts })
    }

    /// Adds a line.
    fn add(&self, mut line: Value) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            line["lines_lost"] = json!(lost);
        }
        if self.lines.try_send(Message::Line(format!("{line}\n"))).is_err() {
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
        }
    }

    /// Something that whoever runs the server should know.
    pub(crate) fn warn(&self, message: &str) {
        self.add(json!({ "time": rfc3339(unix_s()), "warning": message }));
    }

    /// Waits until what was added is written, for a while.
    pub(crate) fn flush(&self) {
        let ((written, told), end) = (sync_channel(1), Instant::now() + FLUSHING);
        let mut message = Message::Flush(written);
        // Who reads the log may have stopped reading: a full queue must not hold up the end of the server.
        while let Err(TrySendError::Full(back)) = self.lines.try_send(message) {
            if Instant::now() >= end {
                return;
            }
            message = back;
            std::thread::sleep(FLUSHING / 100);
        }
        let _ = told.recv_timeout(end.saturating_duration_since(Instant::now()));
    }
}

fn write(mut out: impl io::Write, lines: &Receiver<Message>) {
    for message in lines {
        // A server without a terminal has nobody to tell.
        let _ = match message {
            Message::Line(line) => out.write_all(line.as_bytes()),
            Message::Flush(written) => {
                let flushed = out.flush();
                // Who asked may have waited long enough.
                let _ = written.send(());
                flushed
            }
        };
    }
}

/// The line of a request, which is added when it is dropped.
pub(crate) struct Line {
    log: Log,
    begun: Instant,
    tally: Tally,
    /// What is known of it at the beginning.
    pub(crate) request: Value,
    status: u16,
    /// The parameter at fault and the fault's code.
    fault: Option<(Option<String>, Option<&'static str>)>,
    /// Whether the answer did not come to its end.
    is_cut: bool,
}

impl Line {
    /// Of a request that has just come. `request` is an object.
    pub(crate) fn begin(log: &Log, tally: &Tally, request: Value) -> Line {
        let (log, tally) = (log.clone(), tally.clone());
        Line { log, begun: Instant::now(), tally, request, status: CLIENT_GONE, fault: None, is_cut: false }
    }

    /// Whose key it came with.
    pub(crate) fn set_caller(&mut self, name: &str, tally: &Tally) {
        self.request["key"] = json!(name);
        self.tally = tally.clone();
    }

    /// What was asked, if that is to be shown.
    pub(crate) fn show(&mut self, body: &[u8]) {
        if self.log.prompts && !body.is_empty() {
            let shown = &body[..body.len().min(PROMPT_BYTES_MAX)];
            self.request["prompt"] = json!(String::from_utf8_lossy(shown));
            if shown.len() < body.len() {
                self.request["prompt_bytes"] = json!(body.len());
            }
        }
    }

    /// What it came to.
    pub(crate) fn answer(&mut self, status: u16, fault: Option<(Option<String>, Option<&'static str>)>) {
        (self.status, self.fault) = (status, fault);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut line = std::mem::take(&mut self.request);
        line["status"] = json!(self.status);
        line["ms"] = json!((self.begun.elapsed().as_secs_f64() * 1e4).round() / 10.0);
        if let Some((param, code)) = &self.fault {
            (line["param"], line["code"]) = (json!(param), json!(code));
        }
        if self.is_cut {
            line["cut"] = json!(true);
        }
        let used = self.tally.used();
        if let Some(model) = used.model {
            line["model"] = json!(model);
            line["prompt_tokens"] = json!(used.prompt_tokens);
            line["cached_tokens"] = json!(used.cached_tokens);
            line["generated_tokens"] = json!(used.generated_tokens);
        }
        if let Some(missed) = used.missed {
            line["missed"] = json!({ "why": missed.why.name(), "common_tokens": missed.common_tokens });
        }
        self.log.add(line);
    }
}

/// A response's body, with the line that is added when it has ended.
pub(crate) struct Logged {
    // Dropped first: an answer that was left is counted then.
    body: Body,
    line: Line,
    has_ended: bool,
}

impl Logged {
    pub(crate) fn new(body: Body, line: Line) -> Logged {
        Logged { body, line, has_ended: false }
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        self.line.is_cut = !self.has_ended && !self.body.is_end_stream();
    }
}

impl hyper::body::Body for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        self.has_ended |= frame.is_none();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
