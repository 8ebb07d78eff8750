//! The scheduler with guesses of what comes next: answers are those without guesses, whatever is guessed, and what was computed
//! for wrong guesses is nowhere afterwards.

use super::*;
use crate::worth::RowCost;

/// A model that goes round in circles, each of them for a while.
fn circling(tokens: &[TokenId]) -> Vec<f32> {
    let salt = TokenId(1000 + tokens.len() as u32 / 61);
    planned(&[&[salt], &tokens[tokens.len().saturating_sub(2)..]].concat())
}

/// Rows cost next to nothing, so that all guesses are computed.
fn bench(pages: usize, slots: Option<usize>, speculate: Speculate) -> Bench {
    let mut bench = Bench::with_slots(pages, slots);
    bench.scheduler.speculate = speculate;
    bench.scheduler.row_cost = RowCost::fixed(0.001);
    bench.scheduler.runner.plan = circling;
    bench
}

fn without_stop(prompt: &[TokenId], max_tokens: usize) -> Request {
    Request { stop_tokens: Vec::new(), ..request(prompt, max_tokens) }
}

/// Tokens guessed, and those that were right.
fn guessed(bench: &Bench) -> (u64, u64) {
    let load = bench.scheduler.gauges.lock();
    (load.drafted_tokens, load.accepted_tokens)
}

#[test]
fn answers_are_those_without_guesses_and_need_fewer_steps() {
    for slots in [None, Some(4)] {
        for at_once in [1, 3] {
            let mut bench = bench(40, slots, Speculate::Auto);
            let prompts: Vec<_> = (0..at_once).map(|i| tokens(i, 50 + 7 * i as usize)).collect();
            let ids: Vec<_> = prompts.iter().map(|prompt| bench.submit(without_stop(prompt, 300)).unwrap()).collect();
            bench.run();
            for (id, prompt) in ids.into_iter().zip(&prompts) {
                assert_eq!(
                    bench.answer(id).0,
                    expected_by(circling, prompt, 300, &[]).0,
                    "{slots:?}, {at_once} at once"
                );
            }
            let (drafted, accepted) = guessed(&bench);
            assert!(drafted > accepted && accepted > 100, "right and wrong guesses: {accepted} of {drafted}");
            let steps = bench.scheduler.runner.batches.len();
            assert!(steps < 200, "{steps} steps for 300 tokens");
            // Each token but the first of each sequence was a step's own or a guess's.
            let rows: usize = bench.scheduler.runner.batches.iter().sum();
            let own: usize = prompts.iter().map(|prompt| prompt.len() + 299).sum();
            assert_eq!(rows as u64, own as u64 + drafted - accepted);
        }
    }
}

#[test]
fn off_is_off() {
    let mut bench = bench(10, None, Speculate::Off);
    let id = bench.submit(without_stop(&tokens(1, 50), 200)).unwrap();
    bench.run();
    assert_eq!(bench.answer(id).0, expected_by(circling, &tokens(1, 50), 200, &[]).0);
    assert_eq!(guessed(&bench), (0, 0));
    assert_eq!(bench.scheduler.runner.batches.len(), 200);
}

#[test]
fn a_draft_ends_where_the_answer_does() {
    let prompt = tokens(2, 40);
    let whole = expected_by(circling, &prompt, 150, &[]).0;
    for max_tokens in 1..150 {
        let mut bench = bench(4, None, Speculate::Auto);
        let id = bench.submit(without_stop(&prompt, max_tokens)).unwrap();
        bench.run();
        assert_eq!(bench.answer(id), (whole[..max_tokens].to_vec(), Some(Finish::Length)), "{max_tokens} tokens");
    }
    // A stop token that comes up somewhere, in the midst of a draft or not.
    for stop in &whole {
        let mut bench = bench(4, None, Speculate::Auto);
        let id = bench.submit(Request { stop_tokens: vec![*stop], ..request(&prompt, 150) }).unwrap();
        bench.run();
        let (ids, finish) = expected_by(circling, &prompt, 150, &[*stop]);
        assert_eq!(bench.answer(id), (ids, Some(finish)), "stop at {stop:?}");
    }
    // As long as the pages hold.
    let mut bench = bench(2, None, Speculate::Auto);
    let id = bench.submit(without_stop(&prompt, 1000)).unwrap();
    bench.run();
    assert_eq!(bench.answer(id).0, expected_by(circling, &prompt, 2 * PAGE_TOKENS - 40 + 1, &[]).0);
}

#[test]
fn sampled_answers_are_those_without_guesses() {
    let ask = |bench: &mut Bench, seed: u64| {
        let sampling = Sampling {
            seed: Some(seed),
            temperature: 0.3,
            top_p: 0.9,
            repetition_penalty: 1.02,
            frequency_penalty: 0.01,
            logit_bias: vec![(TokenId(5), 0.5)],
            ..Sampling::default()
        };
        let mut wanted = without_stop(&tokens(seed as u32, 60), 200);
        (wanted.sampling, wanted.logprobs) = (sampling, Some(2));
        bench.submit(wanted).unwrap()
    };
    for slots in [None, Some(2)] {
        let told = |speculate| {
            let mut bench = bench(30, slots, speculate);
            for seed in 0..4 {
                ask(&mut bench, seed);
            }
            bench.run();
            let events: Vec<Vec<Event>> = bench.events.iter().map(|events| events.lock().unwrap().clone()).collect();
            (events, guessed(&bench))
        };
        let (with, (drafted, accepted)) = told(Speculate::Auto);
        assert!(drafted > accepted && accepted > 20, "right and wrong guesses: {accepted} of {drafted}");
        assert_eq!(with, told(Speculate::Off).0, "every event, log-probabilities too");
    }
}

#[test]
fn forced_tokens_are_computed_together() {
    /// Forces a sentence after the fifth token, and allows even tokens only.
    struct Sentence(usize);
    const SENTENCE: [u32; 12] = [1, 9, 3, 7, 5, 1, 1, 3, 9, 9, 7, 11];

    impl Guide for Sentence {
        fn mask(&mut self, logits: &mut [f32]) {
            logits.iter_mut().skip(1).step_by(2).for_each(|logit| *logit = f32::NEG_INFINITY);
        }

        fn accept(&mut self, _: TokenId) -> Verdict {
            self.0 += 1;
            match self.0 {
                5 => Verdict::Force(SENTENCE.map(TokenId).to_vec()),
                40 => Verdict::Stop,
                _ => Verdict::Continue,
            }
        }
    }

    let told = |speculate| {
        let mut bench = bench(4, None, speculate);
        let guide: Option<Box<dyn Guide>> = Some(Box::new(Sentence(0)));
        let id = bench.submit(Request { guide, ..without_stop(&tokens(1, 20), 100) }).unwrap();
        bench.run();
        (bench.answer(id), bench.scheduler.runner.batches.clone())
    };
    let (answer, batches) = told(Speculate::Auto);
    assert_eq!((&answer, 40), (&told(Speculate::Off).0, told(Speculate::Off).1.len()));
    assert!(answer.0[5..17].iter().map(|id| id.0).eq(SENTENCE));
    assert!(batches.contains(&13), "the last free token and the sentence: {batches:?}");
}

#[test]
fn wrong_guesses_never_reach_the_tree() {
    for slots in [None, Some(3)] {
        let mut bench = bench(60, slots, Speculate::Auto);
        // Prompts that end at all places of a chunk and around the end of a page.
        for i in 0..16 {
            let mut all = tokens(i, 50 + i as usize);
            let first = bench.submit(without_stop(&all, 100)).unwrap();
            bench.run();
            assert_eq!(bench.answer(first).0, expected_by(circling, &all, 100, &[]).0);
            // Who goes on from the answer finds the tokens that were said, and goes on as if there had been no others.
            all.extend(bench.answer(first).0);
            all.extend(tokens(77, 5));
            let next = bench.submit(without_stop(&all, 20)).unwrap();
            bench.run();
            assert_eq!(bench.answer(next).0, expected_by(circling, &all, 20, &[]).0);
            assert!(bench.cached(next) >= 128, "{} cached of {}", bench.cached(next), all.len());
        }
        let (drafted, accepted) = guessed(&bench);
        assert!(drafted > accepted && accepted > 100, "right and wrong guesses: {accepted} of {drafted}");
        assert_eq!(bench.scheduler.pages.available(), bench.scheduler.pages.total());
    }
}

#[test]
fn guesses_take_no_page_from_others() {
    // Four answers that fill all pages between them: they give way as they would without guesses, and come to their end.
    let gave_way = |slots, speculate| {
        let mut bench = bench(9, slots, speculate);
        let asked: Vec<_> = (0..4)
            .map(|i| {
                let prompt = tokens(i, 70 + i as usize);
                (bench.submit(without_stop(&prompt, 300)).unwrap(), prompt)
            })
            .collect();
        bench.run();
        for (id, prompt) in asked {
            assert_eq!(bench.answer(id), (expected_by(circling, &prompt, 300, &[]).0, Some(Finish::Length)));
        }
        bench.scheduler.gauges.lock().preempted
    };
    for slots in [None, Some(4)] {
        let without = gave_way(slots, Speculate::Off);
        assert!(without > 0, "the pages are too many");
        assert!(gave_way(slots, Speculate::Auto) <= without);
    }
}

#[test]
fn whatever_comes_each_answers_as_alone_with_guesses() {
    let mut random = Random::new(5);
    let mut below = move |n: usize| (random.next_f64() * n as f64) as usize;
    for round in 0..8 {
        let slots = [None, Some(3)][round % 2];
        let mut bench = bench(10 + below(20), slots, Speculate::Auto);
        let mut asked: Vec<(usize, Vec<TokenId>, usize, bool)> = Vec::new();
        for i in 0..24 {
            let mut prompt = match below(3) {
                0 => tokens(i, 1 + below(200)),
                _ => asked.get(below(asked.len() + 1)).map_or(tokens(i, 70), |(id, prompt, ..)| {
                    let all: Vec<_> = prompt.iter().copied().chain(bench.answer(*id).0).collect();
                    all[..1 + below(all.len())].to_vec()
                }),
            };
            prompt.extend(tokens(i + 50, below(20)));
            prompt.truncate(400);
            let max_tokens = 1 + below(150);
            let id = bench.submit(request(&prompt, max_tokens)).unwrap();
            asked.push((id, prompt, max_tokens, false));
            (0..below(12)).for_each(|_| bench.step());
            if below(6) == 0 {
                let at = below(asked.len());
                asked[at].3 = true;
                bench.scheduler.cancel(SeqId(asked[at].0 as u64));
            }
        }
        bench.run();
        for (id, prompt, max_tokens, cancelled) in asked {
            let ((ids, finish), found) = (expected_by(circling, &prompt, max_tokens, &[TokenId(3)]), bench.answer(id));
            match found.1 {
                Some(Finish::Cancelled) => assert!(cancelled && ids.starts_with(&found.0), "request {id}"),
                _ => assert_eq!(found, (ids, Some(finish)), "request {id} of round {round}"),
            }
        }
        assert!(guessed(&bench).1 > 0);
        assert_eq!(bench.scheduler.pages.available(), bench.scheduler.pages.total());
    }
}
