//! Choices from a few logits: the mock leaves out all that it may, in these tests and in all others, and answers stay the same.

use qwenkit_kernels::Best;

use super::*;
use crate::worth::RowCost;

/// Leaves of a row's logits what has to be there, and nothing else.
pub(super) fn leave_best(best: Best<'_>, row: &mut [f32]) {
    let lowered = |i: usize| best.lowered.contains(&(i as u32));
    let mut measures: Vec<f32> = (0..best.among).filter(|i| !lowered(*i)).map(|i| row[i]).collect();
    measures.sort_by(|a, b| b.total_cmp(a));
    let bar = measures.get(best.count - 1).copied().unwrap_or(f32::NEG_INFINITY);
    let wanted = |i: usize, logit: f32| i < best.among && logit >= bar;
    row.iter_mut()
        .enumerate()
        .filter(|(i, logit)| !wanted(*i, **logit))
        .for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
}

/// What a mock answers to this sampling, and in how many parts it has left logits out.
fn told(plan: Plan, sampling: &Sampling, logprobs: Option<usize>, leaves_out: bool) -> (Vec<Vec<Event>>, usize) {
    let mut bench = Bench::new(30);
    bench.scheduler.runner.plan = plan;
    bench.scheduler.runner.leaves_out = leaves_out;
    bench.scheduler.row_cost = RowCost::fixed(0.001);
    for seed in 0..3 {
        let sampling = Sampling { seed: Some(seed), ..sampling.clone() };
        let prompt = tokens(seed as u32, 50);
        bench.submit(Request { sampling, logprobs, stop_tokens: Vec::new(), ..request(&prompt, 100) }).unwrap();
    }
    bench.run();
    let events = bench.events.iter().map(|events| events.lock().unwrap().clone()).collect();
    (events, bench.scheduler.runner.left_out)
}

/// Logits that come again and again, so that tokens are guessed, with equals among the largest.
fn coarse(tokens: &[TokenId]) -> Vec<f32> {
    let mut logits = planned(&[TokenId(tokens.len() as u32 % 9)]);
    logits[..VOCAB].iter_mut().for_each(|logit| *logit = (*logit / 4.0).round() - 1.0);
    logits
}

#[test]
fn answers_are_those_from_all_logits() {
    let greedy = Sampling::greedy();
    let sampled = Sampling { top_k: 5, temperature: 2.0, top_p: 0.95, ..Sampling::default() };
    for plan in [planned as Plan, coarse] {
        for sampling in [
            greedy.clone(),
            Sampling { repetition_penalty: 1.1, ..greedy.clone() },
            Sampling { presence_penalty: 0.5, frequency_penalty: 0.25, ..greedy.clone() },
            sampled.clone(),
            Sampling { repetition_penalty: 1.3, ..sampled.clone() },
            Sampling { frequency_penalty: 1.0, min_p: 0.01, ..sampled.clone() },
            Sampling { top_k: 39, presence_penalty: 2.0, ..sampled.clone() },
        ] {
            let (events, left_out) = told(plan, &sampling, None, true);
            // Where most is guessed, a part is many tokens.
            assert!(left_out >= 15, "{sampling:?}: {left_out}");
            assert_eq!(events, told(plan, &sampling, None, false).0, "{sampling:?}");
        }
    }
}

#[test]
fn all_logits_are_asked_for_where_a_few_are_not_enough() {
    let sampled = Sampling { top_k: 5, ..Sampling::default() };
    for (sampling, logprobs) in [
        (Sampling::greedy(), Some(1)),
        (Sampling::default(), None),
        (Sampling { top_k: 1000, ..sampled.clone() }, None),
        (Sampling { repetition_penalty: 0.9, ..sampled.clone() }, None),
        (Sampling { presence_penalty: -0.5, ..sampled.clone() }, None),
        (Sampling { frequency_penalty: -0.5, ..sampled.clone() }, None),
        (Sampling { logit_bias: vec![(TokenId(1), 0.5)], ..sampled.clone() }, None),
    ] {
        assert_eq!(told(planned, &sampling, logprobs, true).1, 0, "{sampling:?}, {logprobs:?}");
    }
}
