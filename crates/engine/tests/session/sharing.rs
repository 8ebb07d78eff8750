//! One engine for many: what was computed before or is computed beside an answer changes its speed and nothing else.

use std::path::Path;

use qwenkit_engine::{Ask, Prompt, Sampling, Session};
use qwenkit_formats::Adapter;
use qwenkit_tensor::TokenId;

use crate::fixture::{chat, checkpoint, greedy, open, read, tell};

const LONG: &str = "Tell me about the river that runs past the old mill, and about the people who lived there.";

#[test]
fn the_second_turn_finds_the_first_in_the_cache() {
    let names =
        ["qwen2", "qwen2-tied", "qwen2-yarn", "qwen2-sliding", "qwen2-moe", "qwen2-moe-mixed", "qwen3", "qwen3-moe"];
    for name in names {
        let session = open(&checkpoint(name), None);
        let first = tell(&session, greedy(chat(&[("user", LONG)]), 20)).summary;
        assert_eq!(first.cached_tokens, 0);
        assert!(first.prompt_tokens > 64, "more than a page, or nothing is remembered");
        let turns = [("user", LONG), ("assistant", first.text.as_str()), ("user", "And then?")];
        let second = tell(&session, greedy(chat(&turns), 20)).summary;
        assert!(second.cached_tokens >= first.prompt_tokens - 1, "{name}: {} cached", second.cached_tokens);
        assert!(second.cached_tokens < second.prompt_tokens);
        let fresh = tell(&open(&checkpoint(name), None), greedy(chat(&turns), 20)).summary;
        assert_eq!(fresh.cached_tokens, 0);
        assert_eq!(second.ids, fresh.ids, "{name}: the cache changed the answer");
        // The same prompt again is all there but its last token, whose logits are wanted.
        let again = tell(&session, greedy(chat(&turns), 20)).summary;
        assert_eq!((again.cached_tokens, again.ids), (second.prompt_tokens - 1, second.ids));
    }
}

/// The first Qwen is a GGUF file without a chat template.
#[test]
fn a_fork_of_the_first_qwen_goes_on_from_shared_pages() {
    let path = checkpoint("qwen").join("model.gguf");
    let prompt =
        |end: u32| Prompt::Ids((0..100).chain(200..200 + end).map(|i| TokenId((3 + i * 7) % 250 + 3)).collect());
    let session = open(&path, None);
    for (end, cached) in [(20, 0), (30, 100), (30, 129)] {
        let told = tell(&session, greedy(prompt(end), 12)).summary;
        assert!(told.cached_tokens >= cached, "{} cached, expected at least {cached}", told.cached_tokens);
        let fresh = tell(&open(&path, None), greedy(prompt(end), 12)).summary;
        assert_eq!(told.ids, fresh.ids, "the cache changed the answer");
    }
}

/// Asks of different lengths, beginnings and samplings.
fn asks() -> Vec<Ask> {
    let ids = |count: u32, step: u32| Prompt::Ids((0..count).map(|i| TokenId((3 + i * step) % 250 + 3)).collect());
    let sampled = |seed| Sampling { seed: Some(seed), ..Sampling::default() };
    vec![
        greedy(chat(&[("user", LONG)]), 30),
        greedy(Prompt::Text("Hello".into()), 60),
        Ask { sampling: sampled(1), ..greedy(ids(150, 7), 25) },
        Ask { sampling: sampled(2), ..greedy(ids(150, 7), 25) },
        greedy(ids(64, 3), 10),
        greedy(ids(65, 3), 10),
        Ask { sampling: sampled(3), ..greedy(ids(1, 1), 40) },
        greedy(ids(300, 11), 5),
    ]
}

fn together(session: &Session, asks: Vec<Ask>) -> Vec<Vec<TokenId>> {
    std::thread::scope(|scope| {
        let tell = |ask: Ask| scope.spawn(move || read(session.ask(ask).unwrap()).summary.ids);
        let threads: Vec<_> = asks.into_iter().map(tell).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn answers_together_are_answers_alone() {
    for name in ["qwen2", "qwen3-next", "qwen3.5", "qwen4-exp"] {
        let alone: Vec<_> =
            asks().into_iter().map(|ask| tell(&open(&checkpoint(name), None), ask).summary.ids).collect();
        // Room for all at once, and room for one or two while the others wait or give way.
        for context_tokens in [4096, 384] {
            let session = open(&checkpoint(name), Some(context_tokens));
            for round in 0..3 {
                assert_eq!(together(&session, asks()), alone, "{name}: context {context_tokens}, round {round}");
            }
        }
    }
}

#[test]
fn a_fork_of_a_recurrent_conversation_goes_on_from_a_kept_state() {
    let ids = |range: std::ops::Range<u32>, step: u32| range.map(move |i| TokenId((3 + i * step) % 250 + 3));
    let prompt = |end: u32| Prompt::Ids(ids(0..200, 7).chain(ids(0..end, 5 + end)).collect());
    for name in ["qwen3-next", "qwen3.5", "qwen3.5-moe", "qwen4-exp"] {
        let session = open(&checkpoint(name), None);
        let mut cached = Vec::new();
        for end in [100, 110, 120, 120] {
            let told = tell(&session, greedy(prompt(end), 12)).summary;
            cached.push(told.cached_tokens);
            let fresh = tell(&open(&checkpoint(name), None), greedy(prompt(end), 12)).summary;
            assert_eq!(told.ids, fresh.ids, "{name}: the kept state changed the answer");
        }
        // The first computes all; the second finds pages and leaves a state where their ways part.
        assert_eq!(cached, [0, 0, 192, 256], "{name}");
    }
}

#[test]
fn dropping_the_session_ends_its_answers() {
    let session = open(&checkpoint("qwen2"), Some(1 << 16));
    let answer = session.ask(Ask { max_tokens: None, ..greedy(Prompt::Text("Hello".into()), 0) }).unwrap();
    drop(session);
    let last = answer.last().unwrap();
    let error = last.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("the engine has stopped"), "{error}");
}

#[test]
fn adapters_share_nothing_with_each_other_or_the_base() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity-train/qwen2/adapter_init");
    let mut file = Adapter::open(&folder).unwrap();
    let files = [file.clone(), {
        file.modules.iter_mut().for_each(|module| module.scale *= -2.0);
        file
    }];
    let ids = Prompt::Ids((0..150).map(|i| TokenId((3 + i * 7) % 250 + 3)).collect());
    let told = |session: &Session, adapter| {
        let told = tell(session, Ask { adapter, logprobs: Some(5), ..greedy(ids.clone(), 12) });
        let logprobs: Vec<_> = told.pieces.into_iter().flat_map(|piece| piece.logprobs).collect();
        (logprobs, told.summary.cached_tokens)
    };
    let alone: Vec<_> = [None, Some(&files[0]), Some(&files[1])]
        .into_iter()
        .map(|file| {
            let session = open(&checkpoint("qwen2"), None);
            let adapter = file.map(|file| session.adapter(file).unwrap());
            told(&session, adapter).0
        })
        .collect();
    assert!(alone[0] != alone[1] && alone[1] != alone[2] && alone[0] != alone[2]);
    // Room to remember all of them.
    let session = open(&checkpoint("qwen2"), Some(4096));
    let [first, second] = files.each_ref().map(|file| Some(session.adapter(file).unwrap()));
    for (which, adapter, cached) in
        [(0, None, 0), (1, first.clone(), 0), (2, second, 0), (1, first, 149), (0, None, 149)]
    {
        assert_eq!(told(&session, adapter), (alone[which].clone(), cached), "under {which}");
    }
}
