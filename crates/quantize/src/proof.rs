//! The proof of a step: the model before it and the file behind it read the same held-out texts, and their answers are
//! compared at every position; and every tensor is read back and compared with what it should be.
//!
//! The first half asks whether the model is still itself, whatever was done to it; the second names the tensor that moved most.
//! What a step may cost is a number for each type; beyond it the step has failed and leaves no file.

use qwenkit_engine::{score, text_of};
use qwenkit_formats::{Adapter as AdapterFile, ModelFiles, gguf::Metadata};
use qwenkit_kernels::Compute;
use qwenkit_models::{Adapter, Model};
use qwenkit_tensor::{DType, TokenId};
use serde_json::{Value, json};

use crate::{Error, tensors::Tensors};

/// Texts of several kinds and languages, held out from everything.
const PROMPTS: &str = include_str!("prompts.txt");
/// What separates them.
const SEPARATOR: &str = "\n=====\n";
/// Tokens of one passage of somebody's own text.
const PASSAGE_TOKENS: usize = 256;
/// Values of a tensor that are compared at once.
const PIECE_VALUES: usize = 1 << 20;

/// How a step is proved.
pub struct Prover<'a> {
    /// What computes.
    pub compute: &'a Compute,
    /// Own texts in place of the built-in ones.
    pub text: Option<&'a str>,
    /// The largest mean divergence, in place of the step's own.
    pub limit: Option<f64>,
    /// Positions to compare. The logits of all are kept while the step writes.
    pub positions: usize,
}

/// What the model answered before the step.
pub struct Before {
    passages: Vec<Vec<TokenId>>,
    /// The text behind each token, for messages.
    words: Vec<Vec<String>>,
    /// (positions, V)
    logits: Vec<f32>,
    vocab: usize,
    /// D
    pub(crate) width: usize,
    /// Whether it was computed with rounded activations, as weights of fewer bits than F16 are.
    pub(crate) rounded: bool,
    /// How far an adapter moves the model's answers: the mean divergence. `logits` are then those under it.
    adapter_kl: Option<f64>,
}

/// How far the answers have moved.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Proof {
    /// Positions compared.
    pub tokens: usize,
    /// Mean of the Kullback-Leibler divergence of the answers behind from those before, in nats.
    pub kl_mean: f64,
    /// The largest one.
    pub kl_worst: f64,
    /// Where that is.
    pub worst: Place,
    /// Share of positions at which the most probable token is the same.
    pub top1: f64,
    /// What the mean may be; infinite of a step that is meant to change answers.
    pub limit: f64,
    /// Of a merged adapter how far it moves the answers of the model without it, as `kl_mean`: that is what it is for. All other
    /// figures are then against the model under it.
    pub adapter_kl: Option<f64>,
    /// The tensors that moved most, in the order of how far they are beyond what their type explains.
    pub moved: Vec<Moved>,
}

/// A position in a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Which text, from 0.
    pub passage: usize,
    /// Which token, from 0.
    pub position: usize,
    /// What stands there.
    pub text: String,
}

/// How far a tensor's values are from what they should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Moved {
    /// The tensor.
    pub name: String,
    /// Its type in the file.
    pub dtype: DType,
    /// Sum of squared differences over sum of squares.
    pub relative: f64,
    /// What its type explains.
    pub expected: f64,
}

impl Before {
    /// Whether the answers are those under an adapter.
    pub(crate) fn is_under_adapter(&self) -> bool {
        self.adapter_kl.is_some()
    }

    /// A proof that says as many things as the one to come.
    pub(crate) fn place(&self) -> Proof {
        Proof { adapter_kl: self.adapter_kl, ..Proof::default() }
    }
}

impl Prover<'_> {
    /// Positions that tell a broken file from a sound one.
    pub const POSITIONS: usize = 480;

    /// Reads the texts with the model in `files`.
    ///
    /// # Errors
    /// When the model or its tokenizer is not whole.
    pub fn before(&self, files: &ModelFiles) -> Result<Before, Error> {
        self.before_under(files, None)
    }

    /// As `before`, with the model under this adapter, unless that is of a kind that only a merge can compute.
    ///
    /// # Errors
    /// As `before`.
    pub fn before_under(&self, files: &ModelFiles, adapter: Option<&AdapterFile>) -> Result<Before, Error> {
        let model = Model::load(files, self.compute, &mut |_| {})?;
        let adapter = adapter.and_then(|adapter| Adapter::of_file(model.plan(), adapter).ok());
        let text = text_of(files)?;
        let plan = model.plan();
        let encode = |passage: &str| -> Result<Vec<TokenId>, Error> {
            let ids = text.tokenizer.encode(passage, qwenkit_text::SpecialTokens::AsText);
            Ok(ids.map_err(qwenkit_engine::Error::from)?)
        };
        let most = plan.context_tokens.min(self.positions).max(1);
        let mut passages: Vec<Vec<TokenId>> = Vec::new();
        match self.text {
            Some(own) => {
                let mut ids = encode(own)?;
                ids.truncate(self.positions.max(1));
                passages.extend(ids.chunks(PASSAGE_TOKENS.min(most)).map(<[TokenId]>::to_vec));
            }
            None => {
                let texts: Vec<&str> = PROMPTS.split(SEPARATOR).collect();
                let each = (self.positions / texts.len()).min(most).max(1);
                for passage in texts {
                    let mut ids = encode(passage)?;
                    ids.truncate(each);
                    passages.push(ids);
                }
            }
        }
        passages.retain(|ids| !ids.is_empty());
        if passages.is_empty() {
            return Err(qwenkit_engine::Error::PromptEmpty.into());
        }
        let word = |id: &TokenId| {
            let bytes = text.tokenizer.token_bytes(*id).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        let words = passages.iter().map(|ids| ids.iter().map(word).collect()).collect();
        let (mut logits, vocab) = (Vec::new(), plan.vocab);
        let mut adapter_kl = adapter.is_some().then_some(0.0);
        for ids in &passages {
            let first = logits.len();
            score::logits(&model, self.compute, ids, &mut |_, row| logits.extend_from_slice(row))?;
            if let (Some(adapter), Some(sum)) = (&adapter, &mut adapter_kl) {
                score::logits_under(&model, self.compute, ids, adapter, &mut |row, under| {
                    let plain = &mut logits[first + row * vocab..][..vocab];
                    *sum += divergence(plain, under);
                    plain.copy_from_slice(under);
                })?;
            }
        }
        let adapter_kl = adapter_kl.map(|sum| sum * vocab as f64 / logits.len() as f64);
        let rounded = files.tensors().iter().any(|tensor| tensor.dtype.is_quantized() || tensor.dtype == DType::BF16);
        Ok(Before { passages, words, logits, vocab, width: plan.width, rounded, adapter_kl })
    }

    /// Compares the file behind the step with the model before it. `usual_limit` counts where the user names none.
    ///
    /// # Errors
    /// When the file is not a whole model.
    pub fn compare(&self, before: &Before, after: &ModelFiles, usual_limit: f64) -> Result<Proof, Error> {
        let model = Model::load(after, self.compute, &mut |_| {})?;
        if model.plan().vocab != before.vocab {
            return Err(Error::Unsayable {
                path: after.path().to_owned(),
                what: "the vocabulary".into(),
                found: format!("{} tokens", model.plan().vocab),
                expected: format!("{}, as before", before.vocab),
            });
        }
        let mut proof = Proof {
            tokens: 0,
            kl_mean: 0.0,
            kl_worst: -1.0,
            worst: Place::default(),
            top1: 0.0,
            limit: self.limit.unwrap_or(usual_limit),
            adapter_kl: before.adapter_kl,
            moved: Vec::new(),
        };
        let (mut kl_sum, mut same) = (0.0, 0);
        for (passage, (ids, words)) in before.passages.iter().zip(&before.words).enumerate() {
            let first = proof.tokens;
            score::logits(&model, self.compute, ids, &mut |row, found| {
                let at = (first + row) * before.vocab;
                let expected = &before.logits[at..at + before.vocab];
                let kl = divergence(expected, found);
                kl_sum += kl;
                same += usize::from(best(expected) == best(found));
                if kl.is_nan() || kl > proof.kl_worst {
                    proof.kl_worst = kl;
                    proof.worst = Place { passage, position: row, text: words[row].clone() };
                }
            })?;
            proof.tokens += ids.len();
        }
        proof.kl_mean = kl_sum / proof.tokens as f64;
        proof.top1 = same as f64 / proof.tokens as f64;
        Ok(proof)
    }
}

impl Proof {
    /// Whether the step may stand.
    pub fn holds(&self) -> bool {
        // Written so that NaN fails it.
        self.kl_mean <= self.limit && self.moved.iter().all(|moved| moved.relative <= moved.expected)
    }

    /// The record of a step, as it stands beside the file.
    pub fn to_json(&self) -> Value {
        let moved = |m: &Moved| json!({"tensor": m.name, "type": m.dtype.name(), "relative_squared_error": m.relative});
        json!({
            "tokens": self.tokens,
            "kl_mean": self.kl_mean,
            "kl_worst": self.kl_worst,
            "worst_token": {"text": self.worst.text, "passage": self.worst.passage, "position": self.worst.position},
            "top1_agreement": self.top1,
            "limit": self.limit,
            "adapter_kl_mean": self.adapter_kl,
            "holds": self.holds(),
            "moved_most": self.moved.iter().take(5).map(moved).collect::<Vec<_>>(),
        })
    }

    /// What the file itself says of it. The values' sizes do not depend on what they are.
    pub(crate) fn set(&self, meta: &mut Metadata) {
        meta.set("qwenkit.proof.tokens", self.tokens as u32);
        meta.set("qwenkit.proof.kl_mean", self.kl_mean as f32);
        meta.set("qwenkit.proof.kl_worst", self.kl_worst as f32);
        meta.set("qwenkit.proof.worst_passage", self.worst.passage as u32);
        meta.set("qwenkit.proof.worst_position", self.worst.position as u32);
        meta.set("qwenkit.proof.top1_agreement", self.top1 as f32);
        meta.set("qwenkit.proof.limit", self.limit as f32);
        if let Some(kl) = self.adapter_kl {
            meta.set("qwenkit.proof.adapter_kl_mean", kl as f32);
        }
    }

    /// The same in a line for people.
    pub fn in_words(&self) -> String {
        let limit = match self.limit.is_finite() {
            true => format!("limit {:.2e}", self.limit),
            false => "meant to change".to_owned(),
        };
        let against = match self.adapter_kl {
            Some(kl) => format!(" against the model under its adapter, which moves it by {kl:.2e}"),
            None => String::new(),
        };
        format!(
            "over {} tokens{against}: mean KL {:.2e} ({limit}), same best token {:.1}%, worst {:.2e} at {:?}; every tensor read back",
            self.tokens,
            self.kl_mean,
            100.0 * self.top1,
            self.kl_worst,
            self.worst.text,
        )
    }
}

/// How far every tensor of `after` is from the one that it should be; those farthest beyond what their type explains first.
///
/// # Errors
/// When a tensor is missing, has another shape, or cannot be read.
pub(crate) fn moved(before: &dyn Tensors, after: &dyn Tensors, threads: usize) -> Result<Vec<Moved>, Error> {
    let index: std::collections::HashMap<&str, usize> =
        after.specs().iter().enumerate().map(|(i, spec)| (spec.name.as_str(), i)).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let work = || -> Result<Vec<Moved>, Error> {
        let mut all = Vec::new();
        let (mut a, mut b) = (Vec::new(), Vec::new());
        loop {
            let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some(spec) = before.specs().get(i) else { return Ok(all) };
            if !qwenkit_kernels::is_weight_type(spec.dtype) {
                continue;
            }
            let wrong = |found: String| Error::Unsayable {
                path: after.path().to_owned(),
                what: format!("tensor `{}`", spec.name),
                found,
                expected: format!("{:?}", spec.shape),
            };
            let Some(&j) = index.get(spec.name.as_str()) else { return Err(wrong("missing".into())) };
            let other = &after.specs()[j];
            if other.shape != spec.shape {
                return Err(wrong(format!("{:?}", other.shape)));
            }
            let (mut off, mut all_squares) = (0.0_f64, 0.0_f64);
            for start in (0..spec.values()).step_by(PIECE_VALUES) {
                let range = start..(start + PIECE_VALUES).min(spec.values());
                a.clear();
                b.clear();
                before.values(i, range.clone(), &mut a)?;
                after.values(j, range, &mut b)?;
                let (mut piece_off, mut piece_all) = ([0.0_f32; 16], [0.0_f32; 16]);
                let (wide_a, tail_a) = a.as_chunks::<16>();
                let (wide_b, tail_b) = b.as_chunks::<16>();
                for (n, (a, b)) in wide_a.iter().zip(wide_b).enumerate() {
                    for l in 0..16 {
                        piece_off[l] += (a[l] - b[l]) * (a[l] - b[l]);
                        piece_all[l] += a[l] * a[l];
                    }
                    // Sums stay short, so that f32 holds them.
                    if n % 256 == 255 {
                        off += take(&mut piece_off);
                        all_squares += take(&mut piece_all);
                    }
                }
                off += take(&mut piece_off);
                all_squares += take(&mut piece_all);
                for (a, b) in tail_a.iter().zip(tail_b) {
                    off += f64::from(a - b).powi(2);
                    all_squares += f64::from(*a).powi(2);
                }
            }
            let relative = if off == 0.0 { 0.0 } else { off / all_squares.max(f64::MIN_POSITIVE) };
            all.push(Moved { name: spec.name.clone(), dtype: other.dtype, relative, expected: explained(other.dtype) });
        }
    };
    let parts: Vec<Result<Vec<Moved>, Error>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut all = Vec::new();
    for part in parts {
        all.extend(part?);
    }
    let beyond = |m: &Moved| m.relative / m.expected;
    all.sort_by(|x, y| beyond(y).total_cmp(&beyond(x)).then_with(|| x.name.cmp(&y.name)));
    Ok(all)
}

fn take(sums: &mut [f32; 16]) -> f64 {
    let sum = sums.iter().map(|x| f64::from(*x)).sum();
    *sums = [0.0; 16];
    sum
}

/// The largest relative squared error that a type explains: three to six times that of normal values, as real weights have
/// longer tails and importance shifts errors.
fn explained(dtype: DType) -> f64 {
    use DType::*;
    match dtype {
        Q2_K => 0.3,
        Q3_K => 0.12,
        Q4_0 | Q4_1 | Q4_K | IQ4_NL | IQ4_XS => 0.04,
        Q5_0 | Q5_1 | Q5_K => 0.01,
        Q6_K => 2.5e-3,
        Q8_0 => 1e-4,
        BF16 => 1e-5,
        F16 => 1e-6,
        _ => 1e-12,
    }
}

/// Nats of `q`'s distribution from `p`'s, both as logits.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let top = |x: &[f32]| f64::from(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let (top_p, top_q) = (top(p), top(q));
    // The sum of p (log p - log q) with both logarithms' constants taken out of it.
    let (mut sum_p, mut sum_q, mut between) = (0.0_f64, 0.0_f64, 0.0_f64);
    for (p, q) in p.iter().zip(q) {
        let weight = (f64::from(*p) - top_p).exp();
        sum_p += weight;
        between += weight * (f64::from(*p) - f64::from(*q));
        sum_q += (f64::from(*q) - top_q).exp();
    }
    between / sum_p - (top_p + sum_p.ln()) + (top_q + sum_q.ln())
}

fn best(x: &[f32]) -> usize {
    (0..x.len()).max_by(|&a, &b| x[a].total_cmp(&x[b]).then(b.cmp(&a))).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_zero_of_itself_and_that_of_the_definition() {
        let p = [1.0_f32, 2.0, 0.5];
        assert!(divergence(&p, &p).abs() < 1e-12);
        assert!(divergence(&p, &p.map(|x| x + 3.0)).abs() < 1e-6);
        // p = (1/2, 1/2), q = (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2.
        let kl = divergence(&[0.0, 0.0], &[0.25_f32.ln(), 0.75_f32.ln()]);
        assert!((kl - 0.5 * (2.0_f64.ln() + (2.0_f64 / 3.0).ln())).abs() < 1e-6, "{kl}");
    }

    #[test]
    fn a_proof_with_nan_does_not_hold() {
        let proof = Proof {
            tokens: 1,
            kl_mean: f64::NAN,
            kl_worst: f64::NAN,
            worst: Place::default(),
            top1: 1.0,
            limit: 1.0,
            adapter_kl: None,
            moved: Vec::new(),
        };
        assert!(!proof.holds());
    }
}
