//! Adapters in one engine: each answers as if it were alone, whatever others run beside it, and finds no other's past.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use qwenkit_engine::{Ask, Prompt, Session};
use qwenkit_formats::Adapter as AdapterFile;
use qwenkit_models::Adapter;
use qwenkit_tensor::TokenId;
use serde_json::Value;

use crate::fixture::{checkpoint, greedy, open, read, tell};

fn recorded(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity-train").join(name).join("adapter_init")
}

/// The recorded adapter, so many times as strong.
fn adapter(session: &Session, name: &str, strength: f64) -> Arc<Adapter> {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(recorded(name).join("adapter_model.safetensors"), folder.path().join("adapter_model.safetensors"))
        .unwrap();
    let config = fs::read(recorded(name).join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["lora_alpha"] = (config["lora_alpha"].as_f64().unwrap() * strength).into();
    fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    session.adapter(&AdapterFile::open(folder.path()).unwrap()).unwrap()
}

/// None, and two of one model.
fn adapters(session: &Session, name: &str) -> [Option<Arc<Adapter>>; 3] {
    [None, Some(adapter(session, name, 1.0)), Some(adapter(session, name, 2.0))]
}

fn ask(adapter: &Option<Arc<Adapter>>, prompt_tokens: u32) -> Ask {
    let ids = (0..prompt_tokens).map(|i| TokenId((3 + i * 7) % 250 + 3)).collect();
    Ask { adapter: adapter.clone(), logprobs: Some(10), ..greedy(Prompt::Ids(ids), 12) }
}

/// Tokens with the bits of their log-probabilities, and what was remembered of the prompt.
type Found = (Vec<(TokenId, u32)>, usize);

fn found(told: crate::fixture::Told) -> Found {
    let logprobs = told.pieces.iter().flat_map(|piece| &piece.logprobs).flat_map(|token| &token.top);
    (logprobs.map(|(id, logprob)| (*id, logprob.to_bits())).collect(), told.summary.cached_tokens)
}

#[test]
fn each_adapter_answers_beside_others_as_alone() {
    for name in ["qwen2", "qwen3-moe", "qwen3.5"] {
        let alone: Vec<Found> = (0..3)
            .map(|i| {
                let session = open(&checkpoint(name), None);
                found(tell(&session, ask(&adapters(&session, name)[i], 150)))
            })
            .collect();
        assert!(alone[0].0 != alone[1].0 && alone[1].0 != alone[2].0, "{name}: adapters change answers");
        let session = &open(&checkpoint(name), None);
        let adapters = adapters(session, name);
        for round in 0..3 {
            let together: Vec<Found> = std::thread::scope(|scope| {
                let tell = |adapter| scope.spawn(move || found(read(session.ask(ask(adapter, 150)).unwrap())));
                let threads: Vec<_> = adapters.iter().chain(&adapters).map(tell).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            for (i, together) in together.iter().enumerate() {
                assert_eq!(together.0, alone[i % 3].0, "{name}: adapter {}, round {round}", i % 3);
            }
        }
    }
}

#[test]
fn what_one_adapter_has_read_is_not_anothers() {
    let session = open(&checkpoint("qwen2"), Some(4096));
    let adapters = adapters(&session, "qwen2");
    let alone: Vec<Found> = adapters.iter().map(|adapter| found(tell(&session, ask(adapter, 200)))).collect();
    assert!(alone.iter().all(|(_, cached)| *cached == 0), "each reads the prompt by itself");
    for (adapter, (bits, _)) in adapters.iter().zip(&alone) {
        let (again, cached) = found(tell(&session, ask(adapter, 200)));
        assert_eq!((&again, cached), (bits, 199), "its own past is there");
    }
    // The same file taken in again is another adapter: its file may have changed.
    let reloaded = adapter(&session, "qwen2", 1.0);
    let (bits, cached) = found(tell(&session, ask(&Some(reloaded), 200)));
    assert_eq!((&bits, cached), (&alone[1].0, 0));
}
