//! Random damage: whatever bytes of a header, of metadata or of a config.json are changed, and whatever value a key is
//! given, opening and loading ends in a model that computes or in an error, and takes memory in proportion to the file.
//!
//! One test alone in its process: the counting allocator sees every thread.

use std::path::Path;

use peak_alloc::PeakAlloc;
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use qwenkit_formats::{ModelFiles, gguf::Value};
use qwenkit_kernels::{Compute, Isa};
use qwenkit_models::{Batch, BatchSeq, Buffers, Model, ModelState, Outputs};
use qwenkit_tensor::TokenId;
use serde_json::json;

#[path = "contracts/tiny.rs"]
mod tiny;

use tiny::{SMALL, Tiny};

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

/// Damage to a file: at a place given as a share of its length, so that it can be made before the file is known.
#[derive(Clone, Debug)]
enum Damage {
    /// One byte becomes another.
    Byte(f64, u8),
    /// Eight bytes become a number: counts, lengths, offsets and sizes are all of this width.
    Number(f64, u64),
    /// The file ends here.
    Cut(f64),
    /// Bytes are repeated from here.
    Repeat(f64, usize),
    /// Bytes are taken out from here.
    Remove(f64, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let absurd = prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(u64::MAX >> 1),
        (0u32..64).prop_map(|bit| 1u64 << bit),
        (0u64..200),
        any::<u64>()
    ];
    prop_oneof![
        6 => (0.0..1.0, any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        4 => (0.0..1.0, absurd).prop_map(|(at, number)| Damage::Number(at, number)),
        1 => (0.0..1.0).prop_map(Damage::Cut),
        1 => (0.0..1.0, 1usize..64).prop_map(|(at, count)| Damage::Repeat(at, count)),
        1 => (0.0..1.0, 1usize..64).prop_map(|(at, count)| Damage::Remove(at, count)),
    ]
}

/// Applies damage within the first `len` bytes.
fn apply(bytes: &mut Vec<u8>, len: usize, damage: &Damage) {
    let place = |share: f64| ((len as f64 * share) as usize).min(bytes.len());
    match *damage {
        Damage::Byte(at, byte) => {
            let at = place(at);
            bytes.iter_mut().skip(at).take(1).for_each(|b| *b = byte);
        }
        Damage::Number(at, number) => {
            let at = place(at);
            bytes.iter_mut().skip(at).zip(number.to_le_bytes()).for_each(|(b, new)| *b = new);
        }
        Damage::Cut(at) => bytes.truncate(place(at)),
        Damage::Repeat(at, count) => {
            let at = place(at);
            let again: Vec<u8> = bytes.iter().skip(at).take(count).copied().collect();
            bytes.splice(at..at, again);
        }
        Damage::Remove(at, count) => {
            let at = place(at);
            bytes.drain(at..(at + count).min(bytes.len()));
        }
    }
}

/// Opens and loads; whether it was a model. The heap's peak and the packed weights stay a small multiple of the files.
fn load_within_bounds(path: &Path, file_bytes: usize, compute: &Compute) -> bool {
    let before = ALLOCATED.current_usage();
    ALLOCATED.reset_peak_usage();
    let loaded = ModelFiles::open(path)
        .map_err(|e| e.to_string())
        .and_then(|files| Model::load(&files, compute, &mut |_| {}).map_err(|e| e.to_string()));
    let peak = ALLOCATED.peak_usage().saturating_sub(before);
    // Tables of names and layers, a slab of rows, messages.
    assert!(peak <= 4 * file_bytes + (1 << 20), "{peak} bytes of heap for files of {file_bytes}");
    match loaded {
        // Packing pads a matrix to sixteen rows.
        Ok(model) => {
            assert!(model.weight_bytes() <= 16 * file_bytes, "{} bytes of weights", model.weight_bytes());
            compute_three_tokens(&model, compute);
            true
        }
        Err(message) => {
            assert!(!message.is_empty());
            false
        }
    }
}

/// What was accepted must compute, whatever the values are.
fn compute_three_tokens(model: &Model, compute: &Compute) {
    let mut state = ModelState::new(model.plan(), model.kv_type(), 1, 1).unwrap();
    let tokens = [0, 1, 2].map(|id| TokenId(id % model.plan().vocab as u32));
    let seq = BatchSeq {
        rows: 0..3,
        first: 0,
        pages: &[0],
        slot: 0,
        outputs: Outputs::Last,
        seen: None,
        adapter: None,
        best: None,
    };
    let (batch, mut logits) = (Batch { tokens: &tokens, seqs: &[seq] }, Vec::new());
    model.forward(compute, &mut state, &batch, &mut Buffers::default(), None, &mut logits);
    assert_eq!(logits.len(), model.plan().vocab);
}

/// Numbers at the edges of what anybody would write.
fn numbers() -> impl Strategy<Value = f64> {
    let edges = vec![0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 16.0, 1e-6, 1e-45, 1e9, 1e38, 1e300, -1e300];
    prop_oneof![2 => prop::sample::select(edges), 1 => (0u32..70).prop_map(f64::from)]
}

fn json_values() -> impl Strategy<Value = serde_json::Value> {
    let words = vec!["yarn", "default", "qwen2", "qwen3", "full_attention", "sliding_attention", "silu", ""];
    let word = prop::sample::select(words);
    let rope_keys = vec!["rope_type", "type", "factor", "beta_fast", "beta_slow", "attention_factor", "rope_theta"];
    let leaf = prop_oneof![
        numbers().prop_map(|x| json!(x)),
        (0u64..70).prop_map(|x| json!(x)),
        any::<u64>().prop_map(|x| json!(x)),
        any::<bool>().prop_map(|x| json!(x)),
        word.prop_map(|x| json!(x)),
        Just(serde_json::Value::Null),
    ];
    let pair = (prop::sample::select(rope_keys), leaf.clone());
    prop_oneof![
        4 => leaf.clone(),
        1 => vec(leaf, 0..4).prop_map(|x| json!(x)),
        2 => vec(pair, 0..6).prop_map(|pairs| {
            json!(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<serde_json::Map<_, _>>())
        }),
    ]
}

fn metadata_values() -> impl Strategy<Value = Value> {
    let word = prop::sample::select(vec!["yarn", "none", "qwen2", "qwen3", "model", ""]);
    prop_oneof![
        4 => (0u32..70).prop_map(Value::U32),
        1 => any::<u64>().prop_map(Value::U64),
        1 => any::<i32>().prop_map(Value::I32),
        4 => numbers().prop_map(|x| Value::F32(x as f32)),
        1 => prop::num::f32::ANY.prop_map(Value::F32),
        1 => numbers().prop_map(Value::F64),
        1 => any::<bool>().prop_map(Value::Bool),
        2 => word.prop_map(Value::from),
    ]
}

/// Keys that a configuration may hold, those a whole one lacks included.
const CONFIG_KEYS: [&str; 19] = [
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "rope_parameters",
    "rope_theta",
    "partial_rotary_factor",
    "tie_word_embeddings",
    "attention_bias",
    "use_sliding_window",
    "sliding_window",
    "layer_types",
];

const METADATA_KEYS: [&str; 15] = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
];

/// Runs `check` on so many cases of `strategy`, the same on every machine; how many were (accepted, refused).
fn for_each<S: Strategy>(strategy: S, cases: u32, check: impl Fn(S::Value) -> bool) -> (u32, u32) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let (accepted, refused) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    let result = runner.run(&strategy, |case| {
        let counter = if check(case) { &accepted } else { &refused };
        counter.set(counter.get() + 1);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    (accepted.get(), refused.get())
}

#[test]
fn damaged_models_are_refused_or_loaded_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let compute = Compute::new(1, Isa::Portable);
    let whole = Tiny::new(&SMALL);

    let gguf = folder.path().join("m.gguf");
    whole.write_gguf(&gguf);
    let bytes = std::fs::read(&gguf).unwrap();
    let data_bytes: usize = whole.tensors.iter().map(|t| t.bytes.len().next_multiple_of(32)).sum();
    let header_bytes = bytes.len() - data_bytes;
    assert!(load_within_bounds(&gguf, bytes.len(), &compute));
    let (accepted, refused) = for_each(vec(damage(), 1..4), 1500, |damages| {
        let mut bytes = bytes.clone();
        damages.iter().for_each(|d| apply(&mut bytes, header_bytes, d));
        std::fs::write(&gguf, &bytes).unwrap();
        load_within_bounds(&gguf, bytes.len(), &compute)
    });
    // Some of the damage does no harm; most does. A reader that refuses all, or believes all, would not pass.
    assert!(accepted >= 3 && refused >= 600, "GGUF: {accepted} accepted, {refused} refused");
    let pairs = vec((prop::sample::select(METADATA_KEYS.to_vec()), metadata_values()), 1..4);
    let (accepted, refused) = for_each(pairs, 400, |pairs| {
        let mut tiny = whole.clone();
        for (key, value) in pairs {
            let key = format!("qwen3.{key}");
            tiny.metadata.retain(|(k, _)| *k != key);
            tiny.metadata.push((key, value));
        }
        tiny.write_gguf(&gguf);
        load_within_bounds(&gguf, bytes.len(), &compute)
    });
    assert!(accepted >= 20 && refused >= 150, "GGUF keys: {accepted} accepted, {refused} refused");

    let dir = folder.path().join("checkpoint");
    std::fs::create_dir(&dir).unwrap();
    whole.write_checkpoint(&dir);
    let (config, weights) = (dir.join("config.json"), dir.join("model.safetensors"));
    // Nothing in the header of the weights can be changed without harm but spaces.
    for (path, cases, least) in [(&config, 1500, 3), (&weights, 500, 0)] {
        let (right, total) = (std::fs::read(path).unwrap(), std::fs::metadata(&weights).unwrap().len() as usize);
        let damaged_bytes = if path == &config { right.len() } else { right.len() - total_data_bytes(&whole) };
        assert!(load_within_bounds(&dir, total, &compute));
        let (accepted, refused) = for_each(vec(damage(), 1..4), cases, |damages| {
            let mut bytes = right.clone();
            damages.iter().for_each(|d| apply(&mut bytes, damaged_bytes, d));
            std::fs::write(path, &bytes).unwrap();
            load_within_bounds(&dir, total, &compute)
        });
        std::fs::write(path, &right).unwrap();
        assert!(accepted >= least && refused >= 200, "{}: {accepted} accepted, {refused} refused", path.display());
    }
    let pairs = vec((prop::sample::select(CONFIG_KEYS.to_vec()), json_values()), 1..4);
    let (accepted, refused) = for_each(pairs, 1500, |pairs| {
        let mut changed = whole.config.clone();
        changed.extend(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)));
        std::fs::write(&config, serde_json::to_string(&changed).unwrap()).unwrap();
        load_within_bounds(&dir, total_data_bytes(&whole), &compute)
    });
    assert!(accepted >= 20 && refused >= 600, "config keys: {accepted} accepted, {refused} refused");
}

fn total_data_bytes(tiny: &Tiny) -> usize {
    tiny.tensors.iter().map(|t| t.bytes.len()).sum()
}
