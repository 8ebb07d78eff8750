//! How tokens are chosen, as arguments: what is not given follows the model's own recommendation.
//!
//! Contract: `--temperature 0` is plain greedy decoding; the recommendation's penalties do not bend it, only penalties
//! that are given do. Not here: the choosing (`qwenkit-engine`).

use clap::Args;
use qwenkit_engine::Sampling;
use qwenkit_tensor::TokenId;

/// Sampling arguments.
#[derive(Args, Default)]
#[command(next_help_heading = "How tokens are chosen (the model's own recommendation where not given)")]
pub(crate) struct SamplingArgs {
    /// 0 for the most probable token each time; higher is more varied
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = at_least_zero)]
    temperature: Option<f32>,
    /// Only the K most probable tokens; 0 for all
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Only the most probable tokens that together have probability P
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = share_above_zero)]
    top_p: Option<f32>,
    /// Only tokens at least P times as probable as the best
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = share)]
    min_p: Option<f32>,
    /// Makes tokens of prompt and answer less probable; 1 for off
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = above_zero)]
    repetition_penalty: Option<f32>,
    /// Taken from the logit of tokens that are in the answer
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = finite)]
    presence_penalty: Option<f32>,
    /// Taken from a token's logit for each time it is in the answer
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = finite)]
    frequency_penalty: Option<f32>,
    /// Added to the logit of a token; repeatable
    #[arg(long, value_name = "ID:VALUE", value_parser = bias)]
    logit_bias: Vec<(TokenId, f32)>,
    /// Start of the random numbers: the same seed gives the same answer
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// The settings in force for a model with these recommendations.
    pub(crate) fn over(&self, recommended: &Sampling) -> Sampling {
        let base = if self.temperature == Some(0.0) { Sampling::greedy() } else { recommended.clone() };
        let logit_bias = if self.logit_bias.is_empty() { base.logit_bias } else { self.logit_bias.clone() };
        Sampling {
            temperature: self.temperature.unwrap_or(base.temperature),
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            logit_bias,
            seed: self.seed.or(base.seed),
        }
    }
}

fn finite(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value.is_finite() => Ok(value),
        _ => Err("expected a number".to_owned()),
    }
}

fn within(text: &str, fits: impl Fn(f32) -> bool, expected: &str) -> Result<f32, String> {
    finite(text).ok().filter(|value| fits(*value)).ok_or_else(|| format!("expected {expected}"))
}

fn at_least_zero(text: &str) -> Result<f32, String> {
    within(text, |x| x >= 0.0, "0 or more")
}

fn above_zero(text: &str) -> Result<f32, String> {
    within(text, |x| x > 0.0, "a number above 0")
}

fn share(text: &str) -> Result<f32, String> {
    within(text, |x| (0.0..=1.0).contains(&x), "0 to 1")
}

fn share_above_zero(text: &str) -> Result<f32, String> {
    within(text, |x| x > 0.0 && x <= 1.0, "above 0, up to 1")
}

fn bias(text: &str) -> Result<(TokenId, f32), String> {
    let parse = || {
        let (id, value) = text.split_once(':')?;
        Some((TokenId(id.trim().parse().ok()?), finite(value.trim()).ok()?))
    };
    parse().ok_or_else(|| "expected a token id and a number, as in 1234:-5".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recommended() -> Sampling {
        Sampling { temperature: 0.7, top_k: 20, top_p: 0.8, repetition_penalty: 1.05, ..Sampling::default() }
    }

    #[test]
    fn nothing_given_is_the_recommendation() {
        assert_eq!(SamplingArgs::default().over(&recommended()), recommended());
    }

    #[test]
    fn temperature_zero_is_plain_greedy_unless_a_penalty_is_given_too() {
        let greedy = SamplingArgs { temperature: Some(0.0), ..SamplingArgs::default() };
        assert_eq!(greedy.over(&recommended()), Sampling::greedy());
        let penalised = SamplingArgs { repetition_penalty: Some(1.3), ..greedy };
        assert_eq!(penalised.over(&recommended()).repetition_penalty, 1.3);
    }

    #[test]
    fn values_outside_their_range_are_refused() {
        for bad in [at_least_zero("-1"), at_least_zero("NaN"), above_zero("0"), share("1.1"), share_above_zero("0")] {
            assert!(bad.is_err(), "{bad:?}");
        }
        assert!(finite("inf").is_err() && finite("-2").is_ok());
        assert_eq!(bias("12:-5.5"), Ok((TokenId(12), -5.5)));
        assert!(bias("12").is_err() && bias("x:1").is_err() && bias("1:nan").is_err());
    }
}
