//! `qwenkit doctor --reference`: a real model held against log-probabilities on record.
//!
//! The record is JSON: `passages`, each with `ids` (T) and for every position the best tokens of the reference, `top_ids`
//! (T, n), with their natural `top_logprobs`; `chats`, each with a prompt's `ids`, the reference's `greedy_ids` and `gaps`,
//! how far the best logit was above the second. Contract: fails past the limits below, on NaN, and on a record without
//! positions. Quantised products round activations, so equality is not asked for; the limits are what llama.cpp's
//! kernels reach on the default model's own record.

use std::{fs, path::Path};

use anyhow::{Context, ensure};
use qwenkit_engine::score;
use qwenkit_kernels::Compute;
use qwenkit_models::Model;
use qwenkit_tensor::TokenId;
use serde::Deserialize;
use serde_json::json;

use crate::{failure::Told, locate::Located, terminal};

/// Mean KL divergence over the listed tokens, in nats.
const MEAN_KL_MAX: f64 = 1.55e-3;
/// Share of positions whose best token is the reference's.
const BEST_EQUAL_MIN: f64 = 0.965;
/// Greedy answers are compared up to the first token that the reference chose by less than this.
const CLEAR_GAP: f64 = 0.2;

#[derive(Deserialize)]
struct Record {
    passages: Vec<Passage>,
    chats: Vec<Chat>,
}

#[derive(Deserialize)]
struct Passage {
    ids: Vec<u32>,
    top_ids: Vec<Vec<u32>>,
    top_logprobs: Vec<Vec<f64>>,
}

#[derive(Deserialize)]
struct Chat {
    ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    gaps: Vec<f64>,
}

/// What the passages showed.
#[derive(Default)]
struct Agreement {
    positions: usize,
    kl: f64,
    best_equal: usize,
}

/// Holds the model against the record at `path`.
///
/// # Errors
/// When record or model cannot be read; and `Told` when the model is past a limit.
pub(crate) fn run(path: &Path, located: &Located, compute: &Compute, as_json: bool) -> anyhow::Result<()> {
    let shown = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("cannot read the record `{shown}`"))?;
    let record: Record = serde_json::from_str(&text).with_context(|| format!("`{shown}` is not such a record"))?;
    let model = Model::load(&located.files, compute, &mut |_| {})?;
    let mut agreement = Agreement::default();
    for passage in &record.passages {
        agreement.take(&model, compute, passage)?;
    }
    ensure!(agreement.positions > 0, "`{shown}` holds no positions; expected passages with top_ids for every token");
    let mut differing = 0;
    for chat in &record.chats {
        differing += usize::from(!same_answer(&model, compute, chat)?);
    }
    let mean_kl = agreement.kl / agreement.positions as f64;
    let best_equal = agreement.best_equal as f64 / agreement.positions as f64;
    // Written so that NaN fails.
    let passed = mean_kl <= MEAN_KL_MAX && best_equal >= BEST_EQUAL_MIN && differing == 0;
    if as_json {
        terminal::print_json(&json!({
            "model": located.stored.name, "result": if passed { "pass" } else { "fail" },
            "positions": agreement.positions, "mean_kl": mean_kl, "best_equal": best_equal,
            "chats": record.chats.len(), "chats_differing": differing,
        }))?;
    } else {
        terminal::print_line(&format!(
            "{}  {}: mean KL {mean_kl:.2e} (at most {MEAN_KL_MAX:.2e}), best token equal at {:.2}% of {} positions (at \
             least {:.1}%), {} of {} greedy answers differ",
            if passed { "pass" } else { "fail" },
            located.stored.name,
            100.0 * best_equal,
            agreement.positions,
            100.0 * BEST_EQUAL_MIN,
            differing,
            record.chats.len()
        ))?;
    }
    if passed { Ok(()) } else { Err(Told.into()) }
}

fn token_ids(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

impl Agreement {
    fn take(&mut self, model: &Model, compute: &Compute, passage: &Passage) -> anyhow::Result<()> {
        let rows = passage.ids.len();
        let whole = passage.top_ids.len() == rows
            && passage.top_logprobs.len() == rows
            && passage.top_ids.iter().zip(&passage.top_logprobs).all(|(ids, logprobs)| ids.len() == logprobs.len());
        ensure!(
            whole,
            "a passage of {rows} tokens has {} rows of top_ids and {} of top_logprobs, or rows of unequal length",
            passage.top_ids.len(),
            passage.top_logprobs.len()
        );
        score::logits(model, compute, &token_ids(&passage.ids), &mut |row, logits| {
            let theirs = passage.top_ids[row].iter().copied().zip(passage.top_logprobs[row].iter().copied());
            self.kl += divergence(logits, theirs);
            self.best_equal += usize::from(passage.top_ids[row].first().copied() == Some(best(logits)));
            self.positions += 1;
        })?;
        Ok(())
    }
}

/// Sum of p ln(p / q) over the listed tokens, p theirs and q ours; NaN for a token that the model does not have.
fn divergence(logits: &[f32], theirs: impl Iterator<Item = (u32, f64)>) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total = logits.iter().map(|l| (f64::from(*l) - largest).exp()).sum::<f64>().ln() + largest;
    theirs
        .map(|(id, logprob)| match logits.get(id as usize) {
            Some(logit) => logprob.exp() * (logprob - (f64::from(*logit) - total)),
            None => f64::NAN,
        })
        .sum()
}

fn best(logits: &[f32]) -> u32 {
    (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0) as u32
}

/// Whether our greedy answer is the reference's, as far as that was clear.
fn same_answer(model: &Model, compute: &Compute, chat: &Chat) -> anyhow::Result<bool> {
    let clear = chat.gaps.iter().position(|gap| *gap < CLEAR_GAP).unwrap_or(chat.greedy_ids.len());
    let wanted = token_ids(&chat.greedy_ids[..clear.min(chat.greedy_ids.len())]);
    Ok(score::greedy(model, compute, &token_ids(&chat.ids), wanted.len())? == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_distributions_do_not_diverge_and_others_do() {
        let logits = [1.0, 2.0, 0.5];
        let total: f64 = logits.iter().map(|l: &f32| f64::from(*l).exp()).sum();
        let equal = (0..3).map(|i| (i as u32, f64::from(logits[i]) - total.ln()));
        assert!(divergence(&logits, equal).abs() < 1e-12);
        assert!(divergence(&logits, [(0, 0.9f64.ln()), (1, 0.1f64.ln())].into_iter()) > 0.1);
        assert!(divergence(&logits, [(7, -1.0)].into_iter()).is_nan());
    }

    #[test]
    fn the_best_is_the_first_of_equals() {
        assert_eq!(best(&[0.0, 3.0, 3.0]), 1);
    }
}
