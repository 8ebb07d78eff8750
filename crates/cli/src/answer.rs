//! One answer, from the question to its end: streamed to stdout, or gathered for JSON.
//!
//! Contract: what went wrong or was cut off is said, never hidden. Not here: the question (`commands::run`, `chat`).

use std::time::Duration;

use qwenkit_engine::{Ask, Finish, Piece, Session, Summary, TokenLogprobs};
use qwenkit_tensor::TokenId;
use qwenkit_text::Tokenizer;
use serde_json::{Value, json};

use crate::terminal::{self, Bar, Unit, note, print_foreign};
use crate::{interrupt, machine};

/// Prompts from here on take long enough to want a bar from the start, even before the first part of them is done.
const LONG_PROMPT_TOKENS: usize = 256;

/// Where the text of an answer goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    /// To stdout as it comes.
    Stream,
    /// Nowhere; the caller prints the result.
    Nothing,
}

/// A whole answer.
pub(crate) struct Reply {
    pub(crate) summary: Summary,
    prompt_ids: Vec<TokenId>,
    logprobs: Vec<TokenLogprobs>,
}

/// Asks and waits for the end.
///
/// # Errors
/// When the question is refused, the engine fails or stdout is closed.
pub(crate) fn answer(session: &Session, ask: Ask, show: Show) -> anyhow::Result<Reply> {
    let mut pieces = session.ask(ask)?;
    let _interruptible = interrupt::guard(pieces.canceller());
    let prompt_ids = pieces.prompt_ids().to_vec();
    let mut bar = Bar::new("reading the prompt", Unit::Tokens, Duration::ZERO);
    if prompt_ids.len() >= LONG_PROMPT_TOKENS {
        bar.update(0, prompt_ids.len() as u64);
    }
    let (mut logprobs, mut ends_line) = (Vec::new(), true);
    for piece in &mut pieces {
        match piece? {
            Piece::Prefill { done_tokens, total_tokens, .. } if total_tokens >= LONG_PROMPT_TOKENS => {
                bar.update(done_tokens as u64, total_tokens as u64);
            }
            Piece::Prefill { .. } | Piece::Prompt(_) => {}
            Piece::Text(piece) => {
                bar.clear();
                logprobs.extend(piece.logprobs);
                if show == Show::Stream && !piece.text.is_empty() {
                    ends_line = piece.text.ends_with('\n');
                    print_foreign(&piece.text)?;
                }
            }
            Piece::Done(summary) => {
                if show == Show::Stream && !ends_line {
                    terminal::print("\n")?;
                }
                return Ok(Reply { summary, prompt_ids, logprobs });
            }
        }
    }
    Err(qwenkit_engine::Error::Stopped.into())
}

/// Says why an answer ended early, if it did, and on a terminal how fast it came.
pub(crate) fn remark(session: &Session, summary: &Summary) {
    let context_tokens = session.info().context_tokens;
    match summary.finish {
        Finish::Length if summary.prompt_tokens + summary.ids.len() >= context_tokens => {
            note(&format!("[cut: the context of {context_tokens} tokens is full; --ctx sets it]"));
        }
        Finish::Length => note(&format!("[cut after {} tokens, as --max-tokens says]", summary.ids.len())),
        Finish::Cancelled => note("[stopped]"),
        Finish::Stop => {}
    }
    if terminal::stderr_is_seen() {
        note(&speed_words(summary));
    }
}

fn speed_words(summary: &Summary) -> String {
    let cached = match summary.cached_tokens {
        0 => String::new(),
        cached => format!(" ({cached} of them remembered)"),
    };
    let generated = summary.ids.len();
    let speed = generate_tokens_per_s(summary).map(|speed| format!(", {speed:.1} tokens/s")).unwrap_or_default();
    format!("[prompt {} tokens{cached}, answer {generated} tokens{speed}]", summary.prompt_tokens)
}

/// Tokens a second after the first one, where there are two or more.
pub(crate) fn generate_tokens_per_s(summary: &Summary) -> Option<f64> {
    let after_first = summary.ids.len().checked_sub(1).filter(|&count| count > 0)?;
    (summary.generate_ms > 0.0).then(|| after_first as f64 / summary.generate_ms * 1e3)
}

/// Tokens a second of the part of the prompt that had to be computed.
pub(crate) fn prompt_tokens_per_s(summary: &Summary) -> Option<f64> {
    let computed = summary.prompt_tokens.saturating_sub(summary.cached_tokens);
    (summary.prompt_ms > 0.0).then(|| computed as f64 / summary.prompt_ms * 1e3)
}

impl Reply {
    /// The answer as the object that `run --json` prints.
    pub(crate) fn to_json(&self, tokenizer: &Tokenizer) -> Value {
        let ids = |ids: &[TokenId]| ids.iter().map(|id| id.0).collect::<Vec<_>>();
        let summary = &self.summary;
        let mut object = json!({
            "prompt_ids": ids(&self.prompt_ids),
            "ids": ids(&summary.ids),
            "text": summary.text,
            "finish_reason": summary.finish.name(),
            "prompt_tokens": summary.prompt_tokens,
            "cached_tokens": summary.cached_tokens,
            "generated_tokens": summary.ids.len(),
            "prompt_ms": summary.prompt_ms,
            "generate_ms": summary.generate_ms,
            "prompt_tokens_per_s": prompt_tokens_per_s(summary),
            "generate_tokens_per_s": generate_tokens_per_s(summary),
            "peak_rss_bytes": machine::peak_rss_bytes(),
            "seed": summary.seed,
        });
        if !self.logprobs.is_empty() {
            object["logprobs"] = self.logprobs.iter().map(|token| logprobs_json(token, tokenizer)).collect();
        }
        object
    }
}

fn logprobs_json(token: &TokenLogprobs, tokenizer: &Tokenizer) -> Value {
    let entry = |id: TokenId, logprob: f32| {
        let text = String::from_utf8_lossy(tokenizer.token_bytes(id).unwrap_or_default()).into_owned();
        json!({ "id": id.0, "token": text, "logprob": logprob })
    };
    let mut object = entry(token.id, token.logprob);
    object["top"] = token.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
    object
}
