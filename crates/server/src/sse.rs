//! Server-sent events: an answer's pieces as the body of a response.

use std::{
    convert::Infallible,
    future::Future as _,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue},
    response::Response,
};
use futures_core::Stream;
use qwenkit_engine::Piece;
use serde_json::Value;
use tokio::time::{Instant, Sleep, sleep};

use crate::{error::ApiError, run::Run};

/// Says an answer in the events of one interface.
pub(crate) trait Narrator: Send + Unpin + 'static {
    /// The media type of the events.
    const KIND: &'static str = "text/event-stream; charset=utf-8";
    /// Whether its readers pass over comments.
    const HAS_COMMENTS: bool = true;
    /// Before the first piece.
    fn begin(&mut self, out: &mut Events);
    /// Pieces of the answer `i`.
    fn pieces(&mut self, i: usize, pieces: Vec<Piece>, out: &mut Events);
    /// After the last piece of all answers.
    fn end(&mut self, out: &mut Events);
    /// Instead of everything that would have come.
    fn fail(&mut self, error: &ApiError, out: &mut Events);
}

/// Events on their way out.
#[derive(Default)]
pub(crate) struct Events(Vec<u8>);

impl Events {
    /// An event with data alone.
    pub(crate) fn data(&mut self, value: &Value) {
        self.0.extend_from_slice(b"data: ");
        self.json(value);
    }

    /// An event with a name.
    pub(crate) fn event(&mut self, name: &str, value: &Value) {
        self.0.extend_from_slice(format!("event: {name}\n").as_bytes());
        self.data(value);
    }

    /// OpenAI's last word.
    pub(crate) fn done(&mut self) {
        self.0.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// A line of its own, where lines of JSON are events.
    pub(crate) fn line(&mut self, value: &Value) {
        self.0.extend_from_slice(value.to_string().as_bytes());
        self.0.push(b'\n');
    }

    /// A line that clients pass over, for those who look: here, progress.
    pub(crate) fn comment(&mut self, text: &str) {
        self.0.extend_from_slice(format!(": {text}\n\n").as_bytes());
    }

    /// How far the prompt is, and in how many seconds it is going to be through, where a piece says so.
    pub(crate) fn progress(&mut self, piece: &Piece) {
        if let Piece::Prefill { done_tokens, total_tokens, left_ms } = piece {
            let left = left_ms.map_or(String::new(), |ms| format!(", {:.1} s left", ms / 1e3));
            self.comment(&format!("prefill {done_tokens}/{total_tokens}{left}"));
        }
    }

    fn json(&mut self, value: &Value) {
        // A value whose keys are strings always has a text.
        self.0.extend_from_slice(value.to_string().as_bytes());
        self.0.extend_from_slice(b"\n\n");
    }
}

/// A response that tells `run` by `narrator`. A client that goes away ends the answers.
pub(crate) fn respond<N: Narrator>(run: Run, narrator: N) -> Response {
    let mut events = Events::default();
    let mut narrator = narrator;
    narrator.begin(&mut events);
    let mut response = Response::new(Body::from_stream(Narrated {
        run,
        narrator,
        events,
        ended: false,
        quiet: Box::pin(sleep(QUIET)),
    }));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(N::KIND));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies of nginx's kind would hold the events back.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

struct Narrated<N> {
    run: Run,
    narrator: N,
    events: Events,
    ended: bool,
    /// Rings when nothing has been said for a while.
    quiet: Pin<Box<Sleep>>,
}

/// Proxies and clients give up on streams that say nothing; after so long, a comment shows that somebody is there.
const QUIET: Duration = Duration::from_secs(15);

impl<N: Narrator> Stream for Narrated<N> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        // Everything that is there goes out in one write.
        while !this.ended {
            match this.run.poll_next(context) {
                Poll::Ready(Some(Ok((i, pieces)))) => this.narrator.pieces(i, pieces, &mut this.events),
                Poll::Ready(Some(Err(error))) => {
                    this.narrator.fail(&error, &mut this.events);
                    this.ended = true;
                }
                Poll::Ready(None) => {
                    this.narrator.end(&mut this.events);
                    this.ended = true;
                }
                Poll::Pending if this.events.0.is_empty() => {
                    if !N::HAS_COMMENTS || this.quiet.as_mut().poll(context).is_pending() {
                        return Poll::Pending;
                    }
                    this.events.comment("waiting");
                    break;
                }
                Poll::Pending => break,
            }
        }
        this.quiet.as_mut().reset(Instant::now() + QUIET);
        match std::mem::take(&mut this.events.0) {
            bytes if bytes.is_empty() => Poll::Ready(None),
            bytes => Poll::Ready(Some(Ok(Bytes::from(bytes)))),
        }
    }
}
