//! Runs models without an engine, and writes checkpoints and GGUF files again with something changed.
//!
//! Recorded logits are what transformers computes for the checkpoints in `fixtures/parity`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use half::f16;
use qwenkit_formats::{
    Gguf, ModelFiles, TensorInfo,
    gguf::{Metadata, TensorSpec, Writer},
    read_safetensors_file, write_safetensors,
};
use qwenkit_kernels::{Compute, Isa, PAGE_TOKENS};
use qwenkit_models::{Batch, BatchSeq, Buffers, Error, Model, ModelState, Outputs};
use qwenkit_tensor::{DType, TokenId};

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity").join(name)
}

pub(crate) fn compute() -> Compute {
    Compute::new(2, Isa::detect().unwrap())
}

pub(crate) fn try_load(path: &Path, compute: &Compute) -> Result<Model, Error> {
    Model::load(&ModelFiles::open(path)?, compute, &mut |_| {})
}

/// Part of a sequence: its tokens, the position of the first, the sequence's pages, its slot.
pub(crate) type Part<'a> = (&'a [TokenId], usize, &'a [u32], usize);

/// A model with state.
pub(crate) struct Run<'a> {
    model: &'a Model,
    compute: &'a Compute,
    state: ModelState,
    buffers: Buffers,
}

impl<'a> Run<'a> {
    pub(crate) fn new(model: &'a Model, compute: &'a Compute, pages: usize, slots: usize) -> Run<'a> {
        let state = ModelState::new(model.plan(), model.kv_type(), pages, slots).unwrap();
        Run { model, compute, state, buffers: Buffers::default() }
    }

    /// Copies a page of every layer over another.
    #[allow(dead_code)] // not every test binary copies
    pub(crate) fn copy_page(&mut self, from: u32, to: u32) {
        self.state.copy_page(from, to);
    }

    /// Copies a slot of every layer over another.
    #[allow(dead_code)] // as above
    pub(crate) fn copy_slot(&mut self, from: usize, to: usize) {
        self.state.copy_slot(from, to);
    }

    /// What it keeps of its sequences.
    #[allow(dead_code)] // as above
    pub(crate) fn state(&mut self) -> &mut ModelState {
        &mut self.state
    }

    /// Logits (T, V) of one batch.
    pub(crate) fn feed(&mut self, parts: &[Part<'_>]) -> Vec<f32> {
        let (mut tokens, mut seqs, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        for &(ids, first, pages, slot) in parts {
            let rows = tokens.len()..tokens.len() + ids.len();
            tokens.extend_from_slice(ids);
            seqs.push(BatchSeq {
                rows,
                first,
                pages,
                slot,
                outputs: Outputs::All,
                seen: None,
                adapter: None,
                best: None,
            });
        }
        let batch = Batch { tokens: &tokens, seqs: &seqs };
        self.model.forward(self.compute, &mut self.state, &batch, &mut self.buffers, None, &mut logits);
        logits
    }
}

/// Logits (T, V) of `ids`, fed in pieces of the given lengths and the rest.
pub(crate) fn logits(model: &Model, compute: &Compute, ids: &[TokenId], pieces: &[usize]) -> Vec<f32> {
    let pages: Vec<u32> = (0..ids.len().div_ceil(PAGE_TOKENS) as u32).collect();
    let mut run = Run::new(model, compute, pages.len(), 1);
    let (mut all, mut first) = (Vec::new(), 0);
    let rest = ids.len() - pieces.iter().sum::<usize>();
    for &piece in pieces.iter().chain([&rest]).filter(|piece| **piece > 0) {
        all.extend(run.feed(&[(&ids[first..first + piece], first, &pages, 0)]));
        first += piece;
    }
    all
}

/// The right answers of a fixture.
pub(crate) struct Expected {
    pub(crate) input_ids: Vec<TokenId>,
    /// (T, V)
    pub(crate) logits: Vec<f32>,
    pub(crate) greedy_ids: Vec<TokenId>,
}

pub(crate) fn expected(name: &str) -> Expected {
    let file = read_safetensors_file(&fixture(name).join("expected.safetensors")).unwrap();
    let bytes = |name: &str| {
        let info = file.tensor(name).unwrap();
        let mut bytes = vec![0; info.len_bytes];
        file.read(info, 0, &mut bytes).unwrap();
        bytes
    };
    let ids = |name: &str| {
        bytes(name).as_chunks::<8>().0.iter().map(|b| TokenId(i64::from_le_bytes(*b) as u32)).collect::<Vec<_>>()
    };
    let logits = bytes("logits").as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    Expected { input_ids: ids("input_ids"), logits, greedy_ids: ids("greedy_ids") }
}

/// Holds the model at `path` against the fixture's record: all logits within `limit`, all greedy tokens through the
/// cache. Says the largest difference.
pub(crate) fn assert_parity(path: &Path, name: &str, limit: f32) {
    let (compute, expected) = (compute(), expected(name));
    let model = try_load(path, &compute).unwrap();
    let found = logits(&model, &compute, &expected.input_ids, &[]);
    assert_eq!(found.len(), expected.logits.len());
    let differences = found.iter().zip(&expected.logits).map(|(a, b)| (a - b).abs());
    let worst = differences.fold(0.0, |worst: f32, d| if d.is_nan() { f32::INFINITY } else { worst.max(d) });
    println!("{}: largest difference {worst:.2e}", path.display());
    assert!(worst <= limit, "{}: largest difference {worst:.2e}, at most {limit:.0e} allowed", path.display());
    assert_eq!(greedy(&model, &compute, &expected), expected.greedy_ids, "{}: greedy tokens", path.display());
}

/// As many most probable tokens after the input as are on record, each through the cache.
fn greedy(model: &Model, compute: &Compute, expected: &Expected) -> Vec<TokenId> {
    let vocab = model.plan().vocab;
    let (mut input, mut position) = (expected.input_ids.clone(), 0);
    let pages: Vec<u32> = (0..(input.len() + expected.greedy_ids.len()).div_ceil(PAGE_TOKENS) as u32).collect();
    let mut run = Run::new(model, compute, pages.len(), 1);
    let mut found = Vec::new();
    while found.len() < expected.greedy_ids.len() {
        let logits = run.feed(&[(&input, position, &pages, 0)]);
        position += input.len();
        let last = &logits[logits.len() - vocab..];
        let best = (0..vocab).rev().max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        input = vec![TokenId(best as u32)];
        found.extend(&input);
    }
    found
}

/// Refuses two lists that differ in a bit, naming the first place.
pub(crate) fn assert_same_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    if let Some(i) = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits()) {
        panic!("{what}: value {i} is {:e}, expected {:e}", found[i], expected[i]);
    }
}

/// The same input cut in two at every position, and token by token, gives the same bits.
pub(crate) fn assert_any_cut(path: &Path, name: &str) {
    let (compute, ids) = (compute(), expected(name).input_ids);
    let model = try_load(path, &compute).unwrap();
    let whole = logits(&model, &compute, &ids, &[]);
    for cut in 1..ids.len() {
        assert_same_bits(&logits(&model, &compute, &ids, &[cut]), &whole, &format!("{name} cut at {cut}"));
    }
    assert_same_bits(&logits(&model, &compute, &ids, &vec![1; ids.len()]), &whole, &format!("{name} token by token"));
}

/// A sequence goes on after any position as if tokens that were computed with it and taken back had never been.
#[allow(dead_code)] // not every test binary takes back
pub(crate) fn assert_taken_back(path: &Path, name: &str) {
    let (compute, ids) = (compute(), expected(name).input_ids);
    let model = try_load(path, &compute).unwrap();
    let vocab = model.plan().vocab;
    let pages: Vec<u32> = (0..(ids.len() + 20).div_ceil(PAGE_TOKENS) as u32).collect();
    let whole = logits(&model, &compute, &ids, &[]);
    for position in 0..ids.len() - 1 {
        let mut run = Run::new(&model, &compute, pages.len(), 1);
        if position > 0 {
            run.feed(&[(&ids[..position], 0, &pages, 0)]);
        }
        let back = ModelState::can_take_back(model.plan(), position).min(20);
        let others = (0..back as u32).map(|i| TokenId((ids[position].0 + 7 * i + 1) % vocab as u32));
        let tried: Vec<TokenId> = [ids[position]].into_iter().chain(others).collect();
        let first = run.feed(&[(&tried, position, &pages, 0)]);
        assert_same_bits(&first[..vocab], &whole[position * vocab..][..vocab], &format!("{name}: token {position}"));
        let rest = run.feed(&[(&ids[position + 1..], position + 1, &pages, 0)]);
        let what = format!("{name}: {back} tokens behind {position} taken back");
        assert_same_bits(&rest, &whole[(position + 1) * vocab..], &what);
    }
}

/// Three sequences in one batch, one of them in its middle, answer as each does alone; and on one thread as on three.
pub(crate) fn assert_batch_as_alone(path: &Path, name: &str) {
    let (two, ids) = (compute(), expected(name).input_ids);
    let model = try_load(path, &two).unwrap();
    let vocab = model.plan().vocab;
    let (a, b, c) = (&ids[..], &ids[20..27], &ids[9..10]);
    let alone = [a, b, c].map(|ids| logits(&model, &two, ids, &[]));
    for threads in [1, 3] {
        let compute = Compute::new(threads, two.isa());
        let mut run = Run::new(&model, &compute, 6, 4);
        // Another sequence has had the slots and pages before.
        for slot in 0..4 {
            run.feed(&[(&ids[5..30], 0, &[slot as u32], slot)]);
        }
        let start = run.feed(&[(&a[..11], 0, &[3], 2)]);
        let rest = run.feed(&[(b, 0, &[1], 0), (&a[11..], 11, &[3], 2), (c, 0, &[0], 3)]);
        let (b_rows, c_rows) = (b.len() * vocab, rest.len() - c.len() * vocab);
        assert_same_bits(&start, &alone[0][..start.len()], &format!("{name}: start"));
        assert_same_bits(&rest[..b_rows], &alone[1], &format!("{name}: second sequence"));
        assert_same_bits(&rest[b_rows..c_rows], &alone[0][start.len()..], &format!("{name}: first sequence"));
        assert_same_bits(&rest[c_rows..], &alone[2], &format!("{name}: third sequence"));
    }
}

/// A tensor in memory.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// All tensors of the model at `path`.
pub(crate) fn tensors(path: &Path) -> Vec<Tensor> {
    let files = ModelFiles::open(path).unwrap();
    let read = |info: &TensorInfo| {
        let mut bytes = vec![0; info.len_bytes];
        files.read(info, 0, &mut bytes).unwrap();
        Tensor { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone(), bytes }
    };
    files.tensors().iter().map(read).collect()
}

/// A checkpoint folder of `tensors`, with the fixture's config.json after `change`.
pub(crate) fn checkpoint(
    fixture_name: &str,
    change: impl FnOnce(&mut serde_json::Value),
    tensors: &[Tensor],
) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(fixture(fixture_name).join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    change(&mut config);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let views: Vec<_> = tensors.iter().map(|t| (&*t.name, t.dtype, &*t.shape, &*t.bytes)).collect();
    write_safetensors(&dir.path().join("model.safetensors"), &views, &BTreeMap::new()).unwrap();
    dir
}

/// A GGUF file of `tensors`, with the fixture's metadata after `change`.
pub(crate) fn gguf(
    fixture_name: &str,
    change: impl FnOnce(&mut Metadata),
    tensors: &[Tensor],
) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let original = Gguf::open(&fixture(fixture_name).join("model.gguf")).unwrap();
    let mut metadata = original.metadata().clone();
    change(&mut metadata);
    let spec = |t: &Tensor| TensorSpec { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() };
    let mut writer = Writer::create(&path, &metadata, &tensors.iter().map(spec).collect::<Vec<_>>()).unwrap();
    for tensor in tensors {
        writer.write(&tensor.name, &tensor.bytes).unwrap();
    }
    writer.finish().unwrap();
    (dir, path)
}

/// f32 values as Q8_0 blocks: an f16 scale and 32 integers each.
pub(crate) fn q8_0(bytes: &[u8]) -> Vec<u8> {
    let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let block = |x: &[f32]| {
        let scale = f16::from_f32(x.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0);
        let quants = x.iter().map(|v| (v / scale.to_f32()).round() as i8 as u8).collect::<Vec<_>>();
        scale.to_le_bytes().into_iter().chain(quants).collect::<Vec<u8>>()
    };
    values.chunks_exact(32).flat_map(block).collect()
}

/// The fixture's GGUF file with the tensors that `chosen` names as Q8_0 answers much the same, in any cut.
pub(crate) fn assert_quantised(name: &str, chosen: impl Fn(&str) -> bool) {
    let mut all = tensors(&fixture(name).join("model.gguf"));
    let mut changed = 0;
    for tensor in all.iter_mut().filter(|t| chosen(&t.name)) {
        (tensor.dtype, tensor.bytes) = (DType::Q8_0, q8_0(&tensor.bytes));
        changed += 1;
    }
    assert!(changed > 0, "no tensor was chosen");
    let (_folder, path) = gguf(name, |_| {}, &all);
    assert_any_cut(&path, name);
    let (compute, expected) = (compute(), expected(name));
    let model = try_load(&path, &compute).unwrap();
    let found = logits(&model, &compute, &expected.input_ids, &[]);
    // Eight bits for weights and activations cost some three percent here. The middle error, as a token whose router is
    // nearly undecided may go to other experts.
    let mut errors: Vec<f32> = found.iter().zip(&expected.logits).map(|(a, b)| (a - b).abs()).collect();
    errors.sort_unstable_by(f32::total_cmp);
    let error = errors[errors.len() / 2];
    let size = expected.logits.iter().map(|x| x.abs()).sum::<f32>() / found.len() as f32;
    println!("{name} quantised: middle error {error:.3} of logits around {size:.3}");
    assert!(error > 0.0 && error < 0.05 * size, "{name}: middle error {error} of logits around {size}");
}

/// Loads the checkpoint in `folder` with every number of its config.json replaced by every hostile value: each is
/// refused with a reason or computes three tokens. Gives how many were refused.
pub(crate) fn assert_hostile_numbers(name: &str) -> usize {
    let hostile = [
        serde_json::json!(0),
        serde_json::json!(1),
        serde_json::json!(3),
        serde_json::json!(-1),
        serde_json::json!(1u64 << 31),
        serde_json::json!(u64::MAX),
        serde_json::json!(1e300),
        serde_json::json!("x"),
        serde_json::json!([]),
        serde_json::json!(null),
    ];
    let folder = checkpoint(name, |_| {}, &tensors(&fixture(name)));
    let path = folder.path().join("config.json");
    let original: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let (compute, mut refused) = (compute(), 0);
    let keys = original.as_object().unwrap().iter().filter(|(_, v)| v.is_number() || v.is_array() || v.is_boolean());
    for (key, value) in keys.flat_map(|(key, _)| hostile.iter().map(move |value| (key, value))) {
        let mut config = original.clone();
        config[key] = value.clone();
        fs::write(&path, config.to_string()).unwrap();
        match try_load(folder.path(), &compute) {
            Ok(model) => drop(logits(&model, &compute, &[1, 2, 3].map(TokenId), &[])),
            Err(error) => refused += usize::from(!error.to_string().is_empty()),
        }
    }
    refused
}
