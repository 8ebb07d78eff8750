//! Measuring a session: one sequence alone, or several together, behind a context of any length.
//!
//! Contract: only what a session's answers say is used - their tokens and the moments at which they come - so that what is
//! measured is what users get. Not here: what the figures mean, and how they are printed (`commands::bench`).

use std::sync::mpsc::channel;

use qwenkit_engine::{Ask, Finish, Listener, Piece, Prompt, Sampling, Session, Summary};
use qwenkit_kernels::PAGE_TOKENS;
use qwenkit_tensor::TokenId;

use crate::answer::{self, Show};
use crate::failure::Interrupted;

/// What is measured.
pub(crate) struct Load {
    /// Tokens that all runs share and that are computed beforehand.
    pub(crate) depth: usize,
    /// Tokens of a run's own prompt.
    pub(crate) prompt: usize,
    /// Tokens that each sequence generates.
    pub(crate) generate: usize,
    /// Sequences that generate together.
    pub(crate) batch: usize,
}

/// One sequence's speed.
pub(crate) struct Alone {
    /// Of the prompt behind the shared tokens.
    pub(crate) prompt_tokens_per_s: Option<f64>,
    /// After the first token.
    pub(crate) generate_tokens_per_s: Option<f64>,
    /// How often the output head was read for it, and how many bytes of it.
    pub(crate) head: (u64, u64),
}

impl Load {
    /// Tokens of one sequence.
    pub(crate) fn tokens(&self) -> usize {
        self.depth + self.prompt + self.generate
    }

    /// Tokens of context that all sequences take together.
    pub(crate) fn context_tokens(&self) -> usize {
        let own = self.tokens().next_multiple_of(PAGE_TOKENS);
        // What finished runs leave behind must not push out the shared beginning.
        if self.batch > 1 || self.depth > 0 { own * self.batch + own } else { self.tokens() }
    }

    /// The prompt of sequence `n` of `run`.
    fn ids(&self, run: usize, n: usize, vocab: usize) -> Vec<TokenId> {
        let mut ids = prompt_ids(0, self.depth, vocab);
        ids.extend(prompt_ids(1 + run * (self.batch + 1) + n, self.prompt, vocab));
        ids
    }

    fn ask(&self, session: &Session, run: usize, n: usize) -> Ask {
        Ask {
            prompt: Prompt::Ids(self.ids(run, n, session.info().vocab)),
            sampling: Sampling::greedy(),
            max_tokens: Some(self.generate),
            ignore_stop_tokens: true,
            ..Ask::default()
        }
    }

    /// The answer is as long as was asked for.
    fn check(&self, session: &Session, summary: &Summary) -> anyhow::Result<()> {
        if summary.finish == Finish::Cancelled {
            return Err(Interrupted.into());
        }
        if summary.ids.len() != self.generate {
            anyhow::bail!(
                "the run gave {} tokens where {} were asked for: the context of {} is too short\n\
                 hint: fewer --prompt or --generate tokens, or a larger --ctx",
                summary.ids.len(),
                self.generate,
                session.info().context_tokens
            );
        }
        Ok(())
    }
}

/// Ids spread over the vocabulary; each number's are the continuation of the last one's.
fn prompt_ids(number: usize, tokens: usize, vocab: usize) -> Vec<TokenId> {
    // Tokenizers of Qwen end shortly after 150 000; rows beyond are padding.
    let below = vocab.clamp(1, 150_000);
    (number * tokens..(number + 1) * tokens).map(|i| TokenId(((i * 7919 + 13) % below) as u32)).collect()
}

/// Run `run` of one sequence.
///
/// # Errors
/// When the session fails, or the context does not hold the run.
pub(crate) fn alone(session: &Session, load: &Load, run: usize) -> anyhow::Result<Alone> {
    let before = session.load();
    let summary = answer::answer(session, load.ask(session, run, load.batch), Show::Nothing)?.summary;
    load.check(session, &summary)?;
    let after = session.load();
    Ok(Alone {
        prompt_tokens_per_s: answer::prompt_tokens_per_s(&summary),
        generate_tokens_per_s: answer::generate_tokens_per_s(&summary),
        head: (after.head_reads - before.head_reads, after.head_bytes - before.head_bytes),
    })
}

/// Run `run` of the batch: tokens a second of all sequences while all of them generate.
///
/// # Errors
/// As `alone`, and when the sequences never generate at the same time.
pub(crate) fn together(session: &Session, load: &Load, run: usize) -> anyhow::Result<f64> {
    let (sender, events) = channel();
    let mut heard: Vec<(Ask, Listener)> = Vec::new();
    for n in 0..load.batch {
        let sender = sender.clone();
        let listener = Box::new(move |time, event| sender.send((n, time, event)).is_ok());
        heard.push((load.ask(session, run, n), listener));
    }
    drop(sender);
    let mut transcripts = session.start(heard)?;
    // Of each sequence, when the engine told of its tokens: how late they are heard here changes nothing.
    let mut moments = vec![Vec::with_capacity(load.generate); load.batch];
    for (n, time, event) in events {
        for piece in transcripts[n].push(time, event)? {
            match piece {
                Piece::Prefill { .. } | Piece::Prompt(_) => {}
                Piece::Text(piece) => moments[n].extend(piece.ids.iter().map(|_| time)),
                Piece::Done(summary) => load.check(session, &summary)?,
            }
        }
    }
    if moments.iter().any(|m| m.len() < load.generate) {
        return Err(qwenkit_engine::Error::Stopped.into());
    }
    let begin = moments.iter().filter_map(|m| m.first()).max();
    let end = moments.iter().filter_map(|m| m.last()).min();
    let (Some(&begin), Some(&end)) = (begin, end) else { anyhow::bail!("no sequence generated anything") };
    if end <= begin {
        anyhow::bail!(
            "the first sequences had ended before the last one began\nhint: more --generate tokens, fewer --prompt tokens"
        );
    }
    let tokens = moments.iter().flatten().filter(|&&m| m > begin && m <= end).count();
    Ok(tokens as f64 / (end - begin).as_secs_f64())
}

/// The middle of `values`, which become sorted; not a number where there are none.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), values.len() % 2) {
        (Some(&value), 1) => value,
        (Some(&upper), _) => (values.get(middle.saturating_sub(1)).copied().unwrap_or(upper) + upper) / 2.0,
        (None, _) => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0]), 2.5);
        assert!(median(&mut []).is_nan());
    }

    #[test]
    fn runs_share_the_depth_and_nothing_else() {
        let load = Load { depth: 128, prompt: 64, generate: 2, batch: 3 };
        let prompts: Vec<_> = (0..3).flat_map(|run| (0..4).map(move |n| (run, n))).collect();
        let tails: std::collections::HashSet<_> =
            prompts.iter().map(|&(run, n)| load.ids(run, n, 151_936)[128..].to_vec()).collect();
        assert_eq!(tails.len(), prompts.len());
        assert!(prompts.iter().all(|&(run, n)| load.ids(run, n, 151_936)[..128] == load.ids(0, 0, 151_936)[..128]));
        assert!(load.ids(3, 1, 384).iter().all(|id| id.0 < 384));
    }
}
