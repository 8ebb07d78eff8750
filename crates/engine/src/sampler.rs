//! Chooses the next token from logits.
//!
//! Order of the steps, as in transformers: penalties and bias on logits, temperature, top-k, top-p, min-p, then one draw.
//! Temperature 0 is greedy: the largest logit, of equals the smallest id. Sources: Keskar et al. 2019 (repetition
//! penalty), Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p); presence and frequency as in OpenAI's interface.

use std::collections::HashMap;

use qwenkit_tensor::TokenId;

use crate::{error::Error, random::Random, request::TokenLogprobs};

/// Logits up to which it pays to look for the largest alone.
const FEW_MAX: usize = 64;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 for greedy.
    pub temperature: f32,
    /// Only so many best tokens; 0 for all.
    pub top_k: usize,
    /// Only the best tokens that together have this probability.
    pub top_p: f32,
    /// Only tokens at least this share as probable as the best.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt and answer; 1 for none.
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens in the answer.
    pub presence_penalty: f32,
    /// Subtracted for each time a token is in the answer.
    pub frequency_penalty: f32,
    /// Added to logits.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Start of the random numbers; a fresh one where absent.
    pub seed: Option<u64>,
}

impl Default for Sampling {
    /// The model's own distribution: temperature 1 and nothing else.
    fn default() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

impl Sampling {
    /// Plain greedy decoding.
    pub fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    /// Whether tokens that were said have other logits than the model's.
    pub(crate) fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Refuses settings outside their range.
    ///
    /// # Errors
    /// The first setting that is wrong.
    pub fn check(&self, vocab: usize) -> Result<(), Error> {
        let finite = |x: f32| x.is_finite();
        let checks: [(&'static str, f32, bool, &'static str); 6] = [
            ("temperature", self.temperature, finite(self.temperature) && self.temperature >= 0.0, "0 or more"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0, up to 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                finite(self.repetition_penalty) && self.repetition_penalty > 0.0,
                "above 0",
            ),
            ("presence_penalty", self.presence_penalty, finite(self.presence_penalty), "a number"),
            ("frequency_penalty", self.frequency_penalty, finite(self.frequency_penalty), "a number"),
        ];
        if let Some((setting, found, _, expected)) = checks.into_iter().find(|(_, _, ok, _)| !ok) {
            return Err(Error::Sampling { setting, found, expected });
        }
        match self.logit_bias.iter().find(|(id, bias)| id.index() >= vocab || bias.is_nan()) {
            Some((id, _)) if id.index() >= vocab => Err(Error::TokenUnknown { found: *id, vocab }),
            Some((_, bias)) => Err(Error::Sampling { setting: "logit_bias", found: *bias, expected: "a number" }),
            None => Ok(()),
        }
    }
}

/// One sequence's sampler: its settings, its random numbers, and what it has seen.
pub(crate) struct Sampler {
    sampling: Sampling,
    random: Random,
    /// Times in the answer, for every token of prompt or answer.
    seen: HashMap<TokenId, usize>,
    candidates: Vec<(TokenId, f32)>,
}

impl Sampler {
    pub(crate) fn new(sampling: Sampling, prompt: &[TokenId]) -> Sampler {
        let random = Random::new(sampling.seed.unwrap_or_else(Random::fresh_seed));
        let seen = prompt.iter().map(|id| (*id, 0)).collect();
        Sampler { sampling, random, seen, candidates: Vec::new() }
    }

    /// How many of the largest logits decide what `choose` says, where a few do: one for greedy, else top-k's. What penalties
    /// lower is not among them, and nothing else may be changed.
    pub(crate) fn few(&self) -> Option<usize> {
        let s = &self.sampling;
        // What is divided, multiplied or subtracted like this becomes smaller, or stays.
        let lowers = s.repetition_penalty >= 1.0 && s.presence_penalty >= 0.0 && s.frequency_penalty >= 0.0;
        let count = if s.temperature == 0.0 { 1 } else { s.top_k };
        (lowers && s.logit_bias.is_empty() && (1..=FEW_MAX).contains(&count)).then_some(count)
    }

    /// The tokens whose logits penalties change.
    pub(crate) fn lowered(&self) -> impl Iterator<Item = TokenId> {
        self.seen.keys().copied().filter(|_| self.sampling.penalises())
    }

    /// Chooses from `logits`: (V) and remembers the choice. Penalties and bias change `logits` in place.
    pub(crate) fn choose(&mut self, logits: &mut [f32]) -> TokenId {
        self.penalise(logits);
        let id = match self.sampling.temperature {
            0.0 => argmax(logits),
            temperature => self.draw(logits, temperature),
        };
        *self.seen.entry(id).or_default() += 1;
        id
    }

    fn penalise(&self, logits: &mut [f32]) {
        let s = &self.sampling;
        if s.penalises() {
            for (id, &times) in &self.seen {
                let Some(logit) = logits.get_mut(id.index()) else { continue };
                *logit = if *logit > 0.0 { *logit / s.repetition_penalty } else { *logit * s.repetition_penalty };
                if times > 0 {
                    *logit -= s.presence_penalty + s.frequency_penalty * times as f32;
                }
            }
        }
        for (id, bias) in &s.logit_bias {
            if let Some(logit) = logits.get_mut(id.index()) {
                *logit += bias;
            }
        }
    }

    fn draw(&mut self, logits: &[f32], temperature: f32) -> TokenId {
        let s = &self.sampling;
        let candidates = &mut self.candidates;
        best(logits, s.top_k, candidates);
        let Some(&(_, largest)) = candidates.first() else { return argmax(logits) };
        let weight = |logit: f32| f64::from((logit - largest) / temperature).exp();
        if s.top_p < 1.0 {
            let total: f64 = candidates.iter().map(|c| weight(c.1)).sum();
            let mut sum = 0.0;
            let within = candidates.iter().position(|c| {
                sum += weight(c.1);
                sum >= f64::from(s.top_p) * total
            });
            candidates.truncate(within.map_or(candidates.len(), |i| i + 1));
        }
        if s.min_p > 0.0 {
            candidates.retain(|c| weight(c.1) >= f64::from(s.min_p));
        }
        let total: f64 = candidates.iter().map(|c| weight(c.1)).sum();
        let mut left = self.random.next_f64() * total;
        for &(id, logit) in candidates.iter() {
            left -= weight(logit);
            if left < 0.0 {
                return id;
            }
        }
        // Rounding may leave a crumb beyond the last candidate.
        candidates.last().map_or_else(|| argmax(logits), |c| c.0)
    }
}

/// The index of the largest logit, of equals the first; NaN counts as the smallest.
pub(crate) fn argmax(logits: &[f32]) -> TokenId {
    let mut best = (0, f32::NEG_INFINITY);
    for (i, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (i, logit);
        }
    }
    TokenId(best.0 as u32)
}

/// The `k` largest logits (all where 0) into `out`, largest first, equals by id. Infinitely small ones are left out.
fn best(logits: &[f32], k: usize, out: &mut Vec<(TokenId, f32)>) {
    let order = |a: &(TokenId, f32), b: &(TokenId, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    out.clear();
    let all = (0..).map(TokenId).zip(logits.iter().copied()).filter(|(_, logit)| *logit > f32::NEG_INFINITY);
    if k == 0 || k >= logits.len() {
        out.extend(all);
    } else {
        // Twice k candidates at most: whenever they are full, the worse half goes and the bar rises.
        let mut bar = f32::NEG_INFINITY;
        for candidate in all {
            if candidate.1 > bar || (out.len() < k && candidate.1 >= bar) {
                out.push(candidate);
                if out.len() == 2 * k {
                    out.select_nth_unstable_by(k - 1, order);
                    out.truncate(k);
                    bar = out.iter().map(|c| c.1).fold(f32::INFINITY, f32::min);
                }
            }
        }
        if out.len() > k {
            out.select_nth_unstable_by(k - 1, order);
            out.truncate(k);
        }
    }
    out.sort_unstable_by(order);
}

/// Log-probabilities of `id` and of the `count` best tokens under `logits`: (V).
pub(crate) fn logprobs(logits: &[f32], id: TokenId, count: usize) -> TokenLogprobs {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|l| f64::from(l - largest).exp()).sum();
    let logprob = |logit: f32| (f64::from(logit - largest) - total.ln()) as f32;
    let mut top = Vec::new();
    if count > 0 {
        best(logits, count, &mut top);
        top.iter_mut().for_each(|(_, logit)| *logit = logprob(*logit));
    }
    let chosen = logits.get(id.index()).copied().unwrap_or(f32::NEG_INFINITY);
    TokenLogprobs { id, logprob: logprob(chosen), top }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(sampling: Sampling, logits: &[f32]) -> Vec<f64> {
        let mut counts = vec![0u32; logits.len()];
        let draws = 20_000;
        let mut sampler = Sampler::new(Sampling { seed: Some(5), ..sampling }, &[]);
        for _ in 0..draws {
            counts[sampler.choose(&mut logits.to_vec()).index()] += 1;
        }
        counts.into_iter().map(|n| f64::from(n) / f64::from(draws)).collect()
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [2.0f32.ln(), 5.0f32.ln(), 3.0f32.ln()];
        let found = shares(Sampling::default(), &logits);
        for (found, expected) in found.iter().zip([0.2, 0.5, 0.3]) {
            assert!((found - expected).abs() < 0.015, "{found} instead of {expected}");
        }
        let squared = shares(Sampling { temperature: 0.5, ..Sampling::default() }, &logits);
        assert!((squared[1] - 25.0 / 38.0).abs() < 0.015);
    }

    #[test]
    fn cuts_keep_what_they_say() {
        let logits = [2.0f32.ln(), 5.0f32.ln(), 3.0f32.ln()];
        assert_eq!(shares(Sampling { top_k: 1, ..Sampling::default() }, &logits)[1], 1.0);
        assert_eq!(shares(Sampling { top_k: 2, ..Sampling::default() }, &logits)[0], 0.0);
        assert_eq!(shares(Sampling { top_p: 0.75, ..Sampling::default() }, &logits)[0], 0.0);
        let all = shares(Sampling { top_p: 0.85, ..Sampling::default() }, &logits);
        assert!(all[0] > 0.1, "the token that crosses top_p stays in");
        assert_eq!(shares(Sampling { min_p: 0.5, ..Sampling::default() }, &logits)[0], 0.0);
    }

    #[test]
    fn top_k_is_the_sorted_beginning() {
        let logits: Vec<f32> = (0..1_000).map(|i| ((i * 7919) % 97) as f32).collect();
        let (mut all, mut some) = (Vec::new(), Vec::new());
        best(&logits, 0, &mut all);
        for k in [1, 2, 3, 10, 50, 999] {
            best(&logits, k, &mut some);
            assert_eq!(some, all[..k], "top {k}");
        }
    }

    #[test]
    fn greedy_penalties_and_bias() {
        let logits = [1.0, 2.0, 2.0, -1.0];
        assert_eq!(Sampler::new(Sampling::greedy(), &[]).choose(&mut logits.to_vec()), TokenId(1));
        let repeated = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        assert_eq!(Sampler::new(repeated, &[TokenId(1)]).choose(&mut logits.to_vec()), TokenId(2));
        let mut frequency = Sampler::new(Sampling { frequency_penalty: 0.75, ..Sampling::greedy() }, &[TokenId(2)]);
        let ids: Vec<_> = (0..4).map(|_| frequency.choose(&mut logits.to_vec()).0).collect();
        assert_eq!(ids, [1, 2, 1, 2], "the prompt does not count, answers do, one step each");
        let bias = Sampling { logit_bias: vec![(TokenId(3), 100.0)], ..Sampling::greedy() };
        assert_eq!(Sampler::new(bias, &[]).choose(&mut logits.to_vec()), TokenId(3));
    }

    #[test]
    fn the_seed_decides() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 / 3.0).collect();
        let run = |seed| {
            let mut sampler = Sampler::new(Sampling { seed: Some(seed), ..Sampling::default() }, &[]);
            (0..20).map(|_| sampler.choose(&mut logits.clone())).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn logprobs_are_normalised() {
        let found = logprobs(&[0.0, 0.0, f32::NEG_INFINITY, 0.0, 0.0], TokenId(3), 2);
        assert!((found.logprob - 0.25f32.ln()).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|t| t.0.0).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn settings_are_checked() {
        let wrong = [
            Sampling { temperature: -1.0, ..Sampling::default() },
            Sampling { temperature: f32::NAN, ..Sampling::default() },
            Sampling { top_p: 0.0, ..Sampling::default() },
            Sampling { min_p: 1.5, ..Sampling::default() },
            Sampling { repetition_penalty: 0.0, ..Sampling::default() },
            Sampling { logit_bias: vec![(TokenId(9), 1.0)], ..Sampling::default() },
        ];
        assert!(Sampling::default().check(5).is_ok());
        for sampling in wrong {
            assert!(sampling.check(5).is_err(), "{sampling:?}");
        }
    }
}
