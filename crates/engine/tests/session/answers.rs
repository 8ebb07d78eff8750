//! Answers: streaming, stops, lengths, seeds, log-probabilities, cancellation.

use std::time::{Duration, Instant};

use qwenkit_engine::{Ask, Finish, Piece, Prompt, Sampling, score};
use qwenkit_formats::{ModelFiles, read_safetensors_file};
use qwenkit_kernels::{Compute, Isa};
use qwenkit_models::Model;
use qwenkit_tensor::TokenId;

use crate::fixture::{byte_tokens, chat, checkpoint, copy, edit, greedy, open, qwen2, read, script, tell};

fn text(text: &str) -> Prompt {
    Prompt::Text(text.to_owned())
}

/// An ask whose answer begins with `ids`.
fn scripted(ids: &[TokenId], max_tokens: usize) -> Ask {
    Ask { sampling: script(ids), ..greedy(text("Once upon a time"), max_tokens) }
}

#[test]
fn greedy_answers_are_those_on_record_in_both_formats() {
    for name in ["qwen2", "qwen3"] {
        let folder = checkpoint(name);
        let recorded = read_safetensors_file(&folder.join("expected.safetensors")).unwrap();
        let ids = |tensor: &str| -> Vec<TokenId> {
            let info = recorded.tensor(tensor).unwrap();
            let mut bytes = vec![0; info.len_bytes];
            recorded.read(info, 0, &mut bytes).unwrap();
            bytes.chunks_exact(8).map(|b| TokenId(i64::from_le_bytes(b.try_into().unwrap()) as u32)).collect()
        };
        let expected = ids("greedy_ids");
        for path in [folder.clone(), folder.join("model.gguf")] {
            let session = open(&path, None);
            let told = tell(&session, greedy(Prompt::Ids(ids("input_ids")), expected.len()));
            assert_eq!(told.summary.ids, expected, "{}", path.display());
            assert_eq!(told.summary.finish, Finish::Length);
            assert_eq!(told.summary.prompt_tokens, ids("input_ids").len());
        }
    }
}

#[test]
fn a_character_is_never_split_between_pieces() {
    let session = qwen2();
    // One to four bytes each, one token for each byte.
    let said = "a\u{e9}\u{20ac}\u{1f980}z";
    let ids = byte_tokens(session.tokenizer(), said);
    assert_eq!(ids.len(), 11);
    let told = tell(&session, scripted(&ids, ids.len()));
    assert_eq!(told.summary.ids, ids);
    assert_eq!(told.summary.text, said);
    let pieces: Vec<&str> = told.pieces.iter().map(|p| p.text.as_str()).collect();
    assert_eq!(pieces, ["a", "", "\u{e9}", "", "", "\u{20ac}", "", "", "", "\u{1f980}", "z"]);
    // An answer that ends within a character says so with one replacement character, at the end.
    let told = tell(&session, scripted(&ids, ids.len() - 3));
    assert_eq!(told.summary.text, "a\u{e9}\u{20ac}\u{fffd}");
    assert_eq!(told.pieces.last().map(|p| (p.text.as_str(), p.ids.len())), Some(("\u{fffd}", 0)));
}

#[test]
fn random_answers_stream_as_they_decode() {
    let session = qwen2();
    for seed in 0..8 {
        let sampling = Sampling { temperature: 2.0, seed: Some(seed), ..Sampling::default() };
        let told = tell(&session, Ask { sampling, ..greedy(text("Hello"), 60) });
        assert_eq!(told.summary.text, session.tokenizer().decode(&told.summary.ids, false), "seed {seed}");
        assert_eq!(told.summary.seed, seed);
    }
}

#[test]
fn stop_texts_end_the_answer_before_them() {
    let session = qwen2();
    let ids = byte_tokens(session.tokenizer(), "abcXYZdef");
    let stopped = |stops: &[&str]| {
        let stop = stops.iter().map(|s| (*s).to_owned()).collect();
        tell(&session, Ask { stop, ..scripted(&ids, ids.len()) })
    };
    // Within one token, over three tokens, the earliest of two, one that only begins.
    for (stops, expected) in
        [(&["X"][..], "abc"), (&["XYZ"], "abc"), (&["def", "cXY"], "ab"), (&["YZd", "XYQ"], "abcX")]
    {
        let told = stopped(stops);
        assert_eq!((told.summary.text.as_str(), told.summary.finish), (expected, Finish::Stop), "{stops:?}");
        assert!(told.summary.ids.len() < ids.len(), "{stops:?}: tokens after the stop are not part of the answer");
        assert_eq!(told.summary.ids, ids[..told.summary.ids.len()]);
    }
    let told = stopped(&["XYQ", "defg", ""]);
    assert_eq!((told.summary.text.as_str(), told.summary.finish), ("abcXYZdef", Finish::Length));
}

#[test]
fn a_stop_text_of_several_bytes_may_come_byte_by_byte() {
    let session = qwen2();
    let ids = byte_tokens(session.tokenizer(), "ab\u{20ac}cd");
    let told = tell(&session, Ask { stop: vec!["\u{20ac}c".to_owned()], ..scripted(&ids, ids.len()) });
    assert_eq!((told.summary.text.as_str(), told.summary.finish), ("ab", Finish::Stop));
}

#[test]
fn a_stop_token_is_the_last_and_no_text() {
    let session = qwen2();
    let end = session.tokenizer().token_id("<|im_end|>").unwrap();
    let mut ids = byte_tokens(session.tokenizer(), "yes");
    ids.push(end);
    let ask = || Ask { ignore_stop_tokens: false, max_tokens: None, ..scripted(&ids, 0) };
    let told = tell(&session, ask());
    assert_eq!((told.summary.text.as_str(), told.summary.finish), ("yes", Finish::Stop));
    assert_eq!(told.summary.ids, ids, "the token that ended it is the last");
    let told = tell(&session, Ask { ignore_stop_tokens: true, max_tokens: Some(6), ..ask() });
    assert_eq!((told.summary.ids.len(), told.summary.finish), (6, Finish::Length));
    assert_eq!(told.summary.ids[..4], ids);
    // A file may declare a token that would have been text.
    let ids = byte_tokens(session.tokenizer(), "yes!");
    let folder = copy("qwen2");
    edit(&folder, "generation_config.json", |config| config["eos_token_id"] = ids[3].0.into());
    let session = open(folder.path(), None);
    let ask = Ask { ignore_stop_tokens: false, max_tokens: None, ..scripted(&ids, 0) };
    let told = tell(&session, ask);
    assert_eq!((told.summary.text.as_str(), told.summary.ids, told.summary.finish), ("yes", ids, Finish::Stop));
}

#[test]
fn max_tokens_is_exact() {
    let session = qwen2();
    for max_tokens in [0, 1, 2, 63, 64, 65] {
        let told = tell(&session, greedy(text("Hello"), max_tokens));
        assert_eq!((told.summary.ids.len(), told.summary.finish), (max_tokens, Finish::Length));
    }
    // Without a number the context is the limit: prompt and answer fill it.
    let told = tell(&session, Ask { max_tokens: None, ..greedy(text("Hello"), 0) });
    assert_eq!(told.summary.prompt_tokens + told.summary.ids.len(), session.info().context_tokens);
    assert_eq!(told.summary.finish, Finish::Length);
}

#[test]
fn a_seed_is_an_answer() {
    let session = qwen2();
    let ask = |seed| {
        let sampling = Sampling { seed, ..Sampling::default() };
        tell(&session, Ask { sampling, ..greedy(text("Hello"), 24) }).summary
    };
    let first = ask(Some(11));
    assert_eq!(first.ids, ask(Some(11)).ids);
    assert_eq!(first.ids, {
        let other = qwen2();
        let sampling = Sampling { seed: Some(11), ..Sampling::default() };
        tell(&other, Ask { sampling, ..greedy(text("Hello"), 24) }).summary.ids
    });
    assert_ne!(first.ids, ask(Some(12)).ids);
    // A seed that the session chose is told, and gives the same answer again.
    let fresh = ask(None);
    assert_eq!(ask(Some(fresh.seed)).ids, fresh.ids);
    assert_ne!(ask(None).ids, fresh.ids);
}

#[test]
fn settings_out_of_range_are_refused() {
    let session = qwen2();
    let with =
        |sampling| session.ask(Ask { sampling, ..greedy(text("Hello"), 2) }).map(|_| ()).unwrap_err().to_string();
    let message = with(Sampling { temperature: f32::NAN, ..Sampling::default() });
    assert!(message.contains("temperature is NaN, expected 0 or more"), "{message}");
    let message = with(Sampling { logit_bias: vec![(TokenId(384), 1.0)], ..Sampling::default() });
    assert!(message.contains("384"), "{message}");
}

#[test]
fn logprobs_are_those_of_scoring() {
    let session = qwen2();
    let sampling = Sampling { temperature: 0.7, top_k: 40, seed: Some(5), ..Sampling::default() };
    let told = tell(&session, Ask { sampling, logprobs: Some(5), ..greedy(text("Hello"), 12) });
    let prompt = session.tokenizer().encode("Hello", qwenkit_text::SpecialTokens::Parse).unwrap();
    let files = ModelFiles::open(&checkpoint("qwen2")).unwrap();
    let compute = Compute::new(1, Isa::detect().unwrap());
    let model = Model::load(&files, &compute, &mut |_| {}).unwrap();
    let ids: Vec<TokenId> = prompt.iter().chain(&told.summary.ids).copied().collect();
    let mut expected: Vec<Vec<f64>> = Vec::new();
    score::logits(&model, &compute, &ids, &mut |_, logits| {
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        expected.push(logits.iter().map(|l| f64::from(*l) - total.ln()).collect());
    })
    .unwrap();
    let found: Vec<_> = told.pieces.iter().flat_map(|p| &p.logprobs).collect();
    assert_eq!(found.len(), 12);
    for (i, found) in found.iter().enumerate() {
        let row = &expected[prompt.len() - 1 + i];
        assert_eq!(found.id, told.summary.ids[i]);
        assert!((f64::from(found.logprob) - row[found.id.index()]).abs() < 1e-5, "token {i}");
        assert_eq!(found.top.len(), 5);
        assert!(found.top.is_sorted_by(|a, b| a.1 >= b.1));
        let best = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        assert!((f64::from(found.top[0].1) - best).abs() < 1e-5, "token {i}");
        for (id, logprob) in &found.top {
            assert!((f64::from(*logprob) - row[id.index()]).abs() < 1e-5, "token {i}, {id}");
        }
        assert!(found.top.iter().map(|t| f64::from(t.1).exp()).sum::<f64>() <= 1.0 + 1e-6);
    }
    // All of them together are the whole distribution, once.
    let told = tell(&session, Ask { logprobs: Some(384), ..greedy(text("Hello"), 2) });
    for logprobs in told.pieces.iter().flat_map(|p| &p.logprobs) {
        assert_eq!(logprobs.top.len(), 384);
        assert!((logprobs.top.iter().map(|t| f64::from(t.1).exp()).sum::<f64>() - 1.0).abs() < 1e-5);
    }
}

/// Long enough that an answer nobody ends would go on for minutes: 65,536 tokens of a growing context.
const ENDLESS_CONTEXT: usize = 1 << 16;

#[test]
fn cancelling_from_another_thread_ends_the_answer() {
    let session = open(&checkpoint("qwen2"), Some(ENDLESS_CONTEXT));
    let mut answer = session.ask(Ask { max_tokens: None, ..greedy(text("Hello"), 0) }).unwrap();
    let canceller = answer.canceller();
    while !matches!(answer.next(), Some(Ok(Piece::Text(_)))) {}
    std::thread::spawn(move || canceller.cancel()).join().unwrap();
    let Some(Ok(Piece::Done(summary))) = answer.last() else { panic!("no summary") };
    assert_eq!(summary.finish, Finish::Cancelled);
    assert!(!summary.ids.is_empty() && summary.ids.len() < ENDLESS_CONTEXT / 2);
    // Before anything was computed, too.
    let answer = session.ask(Ask { max_tokens: None, ..greedy(text("Hello"), 0) }).unwrap();
    answer.canceller().cancel();
    assert_eq!(read(answer).summary.finish, Finish::Cancelled);
}

#[test]
fn dropping_an_answer_frees_the_engine() {
    let session = open(&checkpoint("qwen2"), Some(ENDLESS_CONTEXT));
    let started = Instant::now();
    for _ in 0..3 {
        // Each takes every page, so that the next waits until it is gone.
        let mut answer = session.ask(Ask { max_tokens: None, ..greedy(chat(&[("user", "Hello")]), 0) }).unwrap();
        while !matches!(answer.next(), Some(Ok(Piece::Text(_)))) {}
        drop(answer);
    }
    let told = tell(&session, greedy(text("Hello"), 3));
    assert_eq!(told.summary.ids, tell(&qwen2(), greedy(text("Hello"), 3)).summary.ids);
    assert!(started.elapsed() < Duration::from_secs(60), "the dropped answers were computed to their end");
}
