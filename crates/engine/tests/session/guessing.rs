//! Sessions that guess ahead answer as those that do not, to the last log-probability.

#[path = "../../../../fixtures/guessing_block.rs"]
mod guessing_block;

use std::path::Path;

use qwenkit_engine::{Ask, Hold, Options, Prompt, Sampling, Session, Speculate, TokenLogprobs};
use qwenkit_formats::{Adapter, ModelFiles};
use qwenkit_tensor::TokenId;
use qwenkit_text::Form;
use serde_json::json;
use tempfile::TempDir;

use crate::fixture::{checkpoint, greedy, options, read};

fn open(path: &Path, speculate: Speculate) -> Session {
    let files = ModelFiles::open(path).unwrap();
    Session::open(&files, &Options { speculate, ..options(Some(2048)) }, &mut |_| {}).unwrap()
}

/// Prompts that say everything twice or more, so that there is much to guess from, and answers of all kinds.
fn asks(session: &Session) -> Vec<Ask> {
    let ids = |count: u32, step: u32| (0..count).map(move |i| TokenId((3 + i * step) % 250 + 3));
    let twice = |step: u32| Prompt::Ids(ids(70, step).chain(ids(70, step)).chain(ids(10, step)).collect());
    // A few tokens are far more probable than the others, so that sampled text repeats itself as well.
    let few = |seed| Sampling {
        seed: Some(seed),
        temperature: 0.7,
        top_p: 0.95,
        repetition_penalty: 1.01,
        logit_bias: ids(5, 9).map(|id| (id, 6.0)).collect(),
        ..Sampling::default()
    };
    let form = Form::Json(json!({"type": "array", "items": {"enum": ["one and one", "two and two"]}}));
    let hold = Hold { form: Some(session.grammar(&form).unwrap()), ..Hold::default() };
    vec![
        Ask { logprobs: Some(3), ..greedy(twice(7), 150) },
        Ask { sampling: few(1), logprobs: Some(1), ..greedy(twice(11), 150) },
        Ask { sampling: few(2), ..greedy(twice(11), 100) },
        Ask { hold, ..greedy(Prompt::Text("A list: ".into()), 60) },
        Ask { stop: vec!["e".into()], ..greedy(Prompt::Text("and so on and so on and so".into()), 100) },
        greedy(Prompt::Ids(ids(1, 1).collect()), 90),
    ]
}

/// Tokens and their log-probabilities, and the text.
type Said = (Vec<TokenId>, Vec<TokenLogprobs>, String);

fn said(session: &Session, asks: Vec<Ask>) -> Vec<Said> {
    let answers: Vec<_> = asks.into_iter().map(|ask| session.ask(ask).unwrap()).collect();
    let said = answers.into_iter().map(|answer| {
        let told = read(answer);
        (told.summary.ids, told.pieces.into_iter().flat_map(|piece| piece.logprobs).collect(), told.summary.text)
    });
    said.collect()
}

#[test]
fn answers_are_those_without_guesses() {
    for name in ["qwen2", "qwen2-sliding", "qwen3-moe", "qwen3-next", "qwen3.5", "qwen3.5-moe", "qwen4-exp"] {
        let plain = open(&checkpoint(name), Speculate::Off);
        let expected: Vec<Said> = asks(&plain).into_iter().flat_map(|ask| said(&plain, vec![ask])).collect();
        assert_eq!(plain.load().drafted_tokens, 0);
        let session = open(&checkpoint(name), Speculate::Auto);
        for (ask, expected) in asks(&session).into_iter().zip(&expected) {
            assert_eq!(said(&session, vec![ask]), std::slice::from_ref(expected), "{name}, one alone");
        }
        assert_eq!(said(&session, asks(&session)), expected, "{name}, all together");
        let load = session.load();
        assert!(load.accepted_tokens > 0 && load.accepted_tokens <= load.drafted_tokens, "{name}: {load:?}");
    }
}

#[test]
fn guesses_under_an_adapter_are_checked_under_it() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity-train/qwen2/adapter_init");
    let mut file = Adapter::open(&folder).unwrap();
    file.modules.iter_mut().for_each(|module| module.scale *= 3.0);
    let [expected, found] = [Speculate::Off, Speculate::Ngram].map(|speculate| {
        let session = open(&checkpoint("qwen2"), speculate);
        let adapter = session.adapter(&file).unwrap();
        // Half of the questions are asked under the adapter, at the same time.
        let under = |(i, ask)| Ask { adapter: (i % 2 == 0).then(|| adapter.clone()), ..ask };
        said(&session, asks(&session).into_iter().enumerate().map(under).collect())
    });
    assert_eq!(found, expected);
}

/// The checkpoint `name` with a block that guesses, without the parts of it that are `left_out`.
fn with_block(name: &str, left_out: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    guessing_block::with_block(&checkpoint(name), folder.path(), left_out);
    folder
}

#[test]
fn guesses_of_the_models_own_block_change_nothing() {
    for name in ["qwen3.5", "qwen3.5-moe", "qwen3-next"] {
        let folder = with_block(name, &[]);
        let plain = open(folder.path(), Speculate::Off);
        let expected: Vec<Said> = asks(&plain).into_iter().flat_map(|ask| said(&plain, vec![ask])).collect();
        for speculate in [Speculate::Mtp, Speculate::Auto] {
            let session = open(folder.path(), speculate);
            assert!(session.info().weight_bytes > plain.info().weight_bytes, "{name}: the block is there");
            assert_eq!(session.block_gap(), None, "{name}");
            assert_eq!(session.info().kv_bytes_per_token, 2 * plain.info().kv_bytes_per_token, "{name}");
            for (ask, expected) in asks(&session).into_iter().zip(&expected) {
                assert_eq!(said(&session, vec![ask]), std::slice::from_ref(expected), "{name}, {speculate:?}");
            }
            assert_eq!(said(&session, asks(&session)), expected, "{name}, {speculate:?}, all together");
            assert!(session.load().drafted_tokens > 0, "{name}, {speculate:?}: {:?}", session.load());
        }
        let without = open(folder.path(), Speculate::Ngram);
        assert_eq!(without.info().weight_bytes, plain.info().weight_bytes, "{name}: nobody asks the block");
    }
    let message = mtp_refusal(&checkpoint("qwen3.5"));
    let told = "expected a block that guesses tokens (mtp.* in checkpoints, blk.N.nextn.* in GGUF), found none in this qwen3_5";
    assert!(message.contains(told), "{message}");
}

/// Why the model at `path` cannot guess with its own block.
fn mtp_refusal(path: &Path) -> String {
    let options = Options { speculate: Speculate::Mtp, ..options(None) };
    Session::open(&ModelFiles::open(path).unwrap(), &options, &mut |_| {}).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_block_that_is_not_whole_is_left_out_and_told() {
    for (left_out, told) in [
        (&["mtp.layers.0.self_attn.k_proj.weight"][..], "one that lacks `mtp.layers.0.self_attn.k_proj.weight`"),
        (
            &["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"],
            "lacks `mtp.fc.weight`, `mtp.layers.0.mlp.up_proj.weight`",
        ),
    ] {
        let folder = with_block("qwen3.5", left_out);
        let [plain, session] = [Speculate::Off, Speculate::Auto].map(|speculate| open(folder.path(), speculate));
        assert_eq!(plain.block_gap(), None, "nobody asks the block");
        assert!(session.block_gap().is_some_and(|gap| gap.contains(told)), "{:?}", session.block_gap());
        assert_eq!(session.info().weight_bytes, plain.info().weight_bytes);
        assert_eq!(said(&session, asks(&session)), said(&plain, asks(&plain)));
        let message = mtp_refusal(folder.path());
        assert!(message.contains(told) && message.contains("made with the whole block"), "{message}");
    }
    assert_eq!(open(&checkpoint("qwen3.5"), Speculate::Auto).block_gap(), None, "a model without any part of one");
}
