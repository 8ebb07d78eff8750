//! Random damage: whatever bytes of a header, of metadata or of a config.json are changed, opening and loading ends in a
//! model or in an error, and takes memory in proportion to the file.
//!
//! One test alone in its process: the counting allocator sees every thread.

use std::path::Path;

use peak_alloc::PeakAlloc;
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{Compute, Isa};
use qwenkit_models::Model;

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
            true
        }
        Err(message) => {
            assert!(!message.is_empty());
            false
        }
    }
}

/// Runs `check` on so many damages, the same on every machine.
fn for_each_damage(cases: u32, check: impl Fn(&[Damage]) -> bool) -> (u32, u32) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let (accepted, refused) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    let result = runner.run(&vec(damage(), 1..4), |damages| {
        let counter = if check(&damages) { &accepted } else { &refused };
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
    let (accepted, refused) = for_each_damage(1500, |damages| {
        let mut bytes = bytes.clone();
        damages.iter().for_each(|d| apply(&mut bytes, header_bytes, d));
        std::fs::write(&gguf, &bytes).unwrap();
        load_within_bounds(&gguf, bytes.len(), &compute)
    });
    // Both outcomes are common, so that neither a reader that refuses all nor one that believes all would pass.
    assert!(accepted >= 20 && refused >= 600, "GGUF: {accepted} accepted, {refused} refused");

    let dir = folder.path().join("checkpoint");
    std::fs::create_dir(&dir).unwrap();
    whole.write_checkpoint(&dir);
    let (config, weights) = (dir.join("config.json"), dir.join("model.safetensors"));
    for (path, cases) in [(&config, 1500), (&weights, 500)] {
        let (right, total) = (std::fs::read(path).unwrap(), std::fs::metadata(&weights).unwrap().len() as usize);
        let damaged_bytes = if path == &config { right.len() } else { right.len() - total_data_bytes(&whole) };
        assert!(load_within_bounds(&dir, total, &compute));
        let (accepted, refused) = for_each_damage(cases, |damages| {
            let mut bytes = right.clone();
            damages.iter().for_each(|d| apply(&mut bytes, damaged_bytes, d));
            std::fs::write(path, &bytes).unwrap();
            load_within_bounds(&dir, total, &compute)
        });
        std::fs::write(path, &right).unwrap();
        assert!(accepted >= 5 && refused >= 200, "{}: {accepted} accepted, {refused} refused", path.display());
    }
}

fn total_data_bytes(tiny: &Tiny) -> usize {
    tiny.tensors.iter().map(|t| t.bytes.len()).sum()
}
