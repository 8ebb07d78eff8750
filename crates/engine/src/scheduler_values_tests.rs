//! Numbers that come beside answers, or instead of them.

use super::*;

#[test]
fn logprobs_are_the_models_own() {
    let mut bench = Bench::new(2);
    let mut wanted = request(&tokens(1, 3), 1);
    wanted.logprobs = Some(2);
    // A bias decides the choice and leaves the log-probabilities alone.
    wanted.sampling.logit_bias = vec![(TokenId(7), 1e6)];
    let id = bench.submit(wanted).unwrap();
    bench.run();
    let events = bench.events[id].lock().unwrap();
    let Some(Event::Token { id, logprobs: Some(found) }) = events.iter().find(|e| matches!(e, Event::Token { .. }))
    else {
        panic!("no token: {events:?}");
    };
    let logits = &planned(&tokens(1, 3))[..VOCAB];
    let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
    assert_eq!(*id, TokenId(7));
    assert!((f64::from(found.logprob) - (f64::from(logits[7]) - total.ln())).abs() < 1e-4);
    assert_eq!(found.top[0].0, expected(&tokens(1, 3), 1, &[]).0[0]);
}

#[test]
fn values_come_beside_answers() {
    let mut bench = Bench::new(40);
    let goals = [Goal::Hidden, Goal::Answer, Goal::Logits(vec![TokenId(7), TokenId(2), TokenId(7)])];
    let mut asked = Vec::new();
    for i in 0..21 {
        let prompt = tokens(i, [1, 64, 65, 700][i as usize % 4]);
        let goal = goals[i as usize % 3].clone();
        let mut wanted = request(&prompt, 6);
        wanted.goal = goal.clone();
        asked.push((bench.submit(wanted).unwrap(), prompt, goal));
        if i % 5 == 4 {
            bench.step();
        }
    }
    bench.run();
    for (id, prompt, goal) in asked {
        let logits = planned(&prompt);
        let wanted = match goal {
            Goal::Hidden => logits[..WIDTH].to_vec(),
            Goal::Logits(ids) => ids.iter().map(|id| logits[id.index()]).collect(),
            Goal::Answer => {
                assert_eq!(bench.answer(id).0, expected(&prompt, 6, &[TokenId(3)]).0, "request {id}");
                continue;
            }
        };
        assert_eq!(bench.answer(id), (Vec::new(), Some(Finish::Stop)), "request {id}");
        let events = bench.events[id].lock().unwrap();
        let values = events.iter().filter_map(|e| if let Event::Values(values) = e { Some(values) } else { None });
        assert!(values.eq([&wanted]), "request {id}: {events:?}");
    }
}

#[test]
fn values_need_a_known_token_and_no_room_for_an_answer() {
    let mut bench = Bench::new(2);
    let mut unknown = request(&tokens(1, 3), 5);
    unknown.goal = Goal::Logits(vec![TokenId(48)]);
    assert!(matches!(bench.submit(unknown), Err(Error::TokenUnknown { found: TokenId(48), vocab: 48 })));
    // As long as all pages, and asked for no tokens at all.
    let mut full = request(&tokens(1, 2 * PAGE_TOKENS), 0);
    full.goal = Goal::Hidden;
    let id = bench.submit(full).unwrap();
    bench.run();
    assert_eq!(bench.answer(id).1, Some(Finish::Stop));
    assert!(bench.events[id].lock().unwrap().contains(&Event::Values(planned(&tokens(1, 128))[..WIDTH].to_vec())));
}
