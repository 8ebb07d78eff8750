//! What is said of the part of a prompt that the cache did not have, and of answers that may not end yet.

use super::*;
use crate::request::{Miss, Missed};

fn missed(bench: &Bench, id: usize) -> Option<Missed> {
    let events = bench.events[id].lock().unwrap();
    let told = |event: &Event| if let Event::Prefill { missed, .. } = event { Some(*missed) } else { None };
    events.iter().find_map(told).unwrap()
}

fn ask(bench: &mut Bench, prompt: &[TokenId]) -> usize {
    let id = bench.submit(request(prompt, 2)).unwrap();
    bench.run();
    id
}

fn because(why: Miss, common_tokens: usize) -> Option<Missed> {
    Some(Missed { why, common_tokens })
}

#[test]
fn a_miss_is_told_with_its_reason() {
    let mut bench = Bench::new(8);
    let (first, other) = (tokens(1, 300), tokens(2, 450));
    let id = ask(&mut bench, &first);
    assert_eq!(missed(&bench, id), because(Miss::New, 0));
    // All of it is there but for its last token.
    let id = ask(&mut bench, &first);
    assert_eq!(missed(&bench, id), None);
    // One that parts from it in the middle of a page.
    let fork: Vec<TokenId> = first[..150].iter().copied().chain([TokenId(39); 100]).collect();
    assert_eq!(first[150..152].iter().filter(|id| id.0 == 39).count(), 0);
    let id = ask(&mut bench, &fork);
    assert_eq!(missed(&bench, id), because(Miss::New, 150));
    // One that takes all pages, and the first again.
    ask(&mut bench, &other);
    let id = ask(&mut bench, &first);
    let Some(Missed { why: Miss::Evicted, common_tokens }) = missed(&bench, id) else {
        panic!("{:?}", missed(&bench, id))
    };
    assert!(common_tokens < 300 - PAGE_TOKENS);
    // Whose own probabilities are wanted is computed whatever is there.
    let id = bench.submit(Request { prompt_logprobs: Some(0), ..request(&first, 2) }).unwrap();
    bench.run();
    assert_eq!(missed(&bench, id).map(|missed| missed.why), Some(Miss::Scored));
}

#[test]
fn pages_without_a_state_are_told_apart_from_no_pages() {
    let mut bench = Bench::with_slots(60, Some(2));
    let begin = tokens(33, 64 * 3);
    let with = |seed| begin.iter().copied().chain(tokens(seed, 100)).collect::<Vec<_>>();
    for (seed, expected) in [(1, because(Miss::New, 0)), (2, because(Miss::NoState, 64 * 3))] {
        let id = ask(&mut bench, &with(seed));
        assert_eq!(missed(&bench, id), expected, "seed {seed}");
    }
    let id = ask(&mut bench, &with(4));
    assert_eq!(missed(&bench, id).map(|missed| missed.why), Some(Miss::New));
}

#[test]
fn an_answer_has_at_least_so_many_tokens() {
    for speculate in [Speculate::Off, Speculate::Auto] {
        let mut bench = Bench::new(12);
        bench.scheduler.speculate = speculate;
        let stops: Vec<TokenId> = (0..VOCAB as u32).step_by(2).map(TokenId).collect();
        for min_tokens in [0, 1, 5, 90] {
            let wanted = Request { stop_tokens: stops.clone(), min_tokens, ..request(&tokens(8, 30), 120) };
            let id = bench.submit(wanted).unwrap();
            bench.run();
            let (ids, finish) = bench.answer(id);
            assert_eq!(finish, Some(Finish::Stop));
            assert!(ids.len() > min_tokens || min_tokens == 0, "{} of {min_tokens}", ids.len());
            assert!(ids[..min_tokens].iter().all(|id| !stops.contains(id)), "no stop token before");
        }
    }
}
