//! Models held against what transformers computes for the same weights, and against themselves: a token's logits have the
//! same bits for any number of threads, cut of the prompt, batch and place of its pages.

use std::path::{Path, PathBuf};

use qwenkit_formats::read_safetensors_file;
use qwenkit_kernels::{Compute, Isa, PAGE_TOKENS};
use qwenkit_models::{Model, Outputs};
use qwenkit_tensor::{DType, TokenId};

use crate::run::{self, Run, assert_same_bits};

/// Float32 sums in another order differ by this much at most.
const LOGIT_DIFFERENCE_MAX: f32 = 5e-4;
/// Greedy tokens are compared while the best two logits are further apart than this.
const CLEAR_GAP: f32 = 1e-3;

/// Every model with recorded answers: (folder of the record, model).
fn recorded_models() -> Vec<(PathBuf, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity");
    let mut models = Vec::new();
    for name in ["qwen2", "qwen2-tied", "qwen2-sliding", "qwen2-yarn", "qwen3"] {
        models.push((root.join(name), root.join(name)));
    }
    // The record of the first Qwen is llama.cpp's, in float32.
    for name in ["qwen", "qwen2", "qwen3"] {
        models.push((root.join(name), root.join(name).join("model.gguf")));
    }
    models
}

struct Expected {
    input_ids: Vec<TokenId>,
    /// (T, V)
    logits: Vec<f32>,
    greedy_ids: Vec<TokenId>,
}

impl Expected {
    fn read(folder: &Path) -> Expected {
        let file = read_safetensors_file(&folder.join("expected.safetensors")).unwrap();
        let bytes = |name: &str, dtype: DType| {
            let info = file.tensor(name).unwrap();
            assert_eq!(info.dtype, dtype, "{name}");
            let mut bytes = vec![0; info.len_bytes];
            file.read(info, 0, &mut bytes).unwrap();
            bytes
        };
        let ids = |name: &str| {
            let bytes = bytes(name, DType::I64);
            bytes.chunks_exact(8).map(|b| TokenId(i64::from_le_bytes(b.try_into().unwrap()) as u32)).collect()
        };
        let logits = bytes("logits", DType::F32);
        let logits = logits.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        Expected { input_ids: ids("input_ids"), logits, greedy_ids: ids("greedy_ids") }
    }
}

/// The largest difference of two lists of logits, or where and by how much they disagree.
fn compare(found: &[f32], expected: &[f32]) -> Result<f32, String> {
    if found.len() != expected.len() {
        return Err(format!("{} logits, expected {}", found.len(), expected.len()));
    }
    let mut largest = 0.0f32;
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let difference = (found - expected).abs();
        if difference.is_nan() || difference > LOGIT_DIFFERENCE_MAX {
            return Err(format!("logit {i} is {found}, expected {expected}: {difference:e} apart"));
        }
        largest = largest.max(difference);
    }
    Ok(largest)
}

/// `count` ids, made of a record's.
fn ids_of(expected: &Expected, vocab: usize, count: usize) -> Vec<TokenId> {
    let ids = &expected.input_ids;
    let id = |i: usize| (ids[i % ids.len()].index() + 3 * (i / ids.len())) % vocab;
    (0..count).map(|i| TokenId(id(i) as u32)).collect()
}

/// Runs `check` for every recorded model on every instruction set, one thread.
fn for_each_model(check: impl Fn(&Model, &Compute, &Path, &Expected, &str)) {
    for isa in Isa::available() {
        let compute = Compute::new(1, isa);
        for (folder, path) in recorded_models() {
            let model = run::load(&path, &compute);
            let what = format!("{} on {isa}", path.display());
            check(&model, &compute, &path, &Expected::read(&folder), &what);
        }
    }
}

#[test]
fn logits_and_greedy_tokens_agree_with_transformers() {
    for_each_model(|model, compute, _, expected, what| {
        let found = run::logits(model, compute, &expected.input_ids, &[]);
        if let Err(problem) = compare(&found, &expected.logits) {
            panic!("{what}: {problem}");
        }
        let mut compared = 0;
        let answer = run::greedy(model, compute, &expected.input_ids, expected.greedy_ids.len());
        for ((id, logits), recorded) in answer.iter().zip(&expected.greedy_ids) {
            let mut sorted = logits.clone();
            sorted.sort_by(f32::total_cmp);
            if sorted[sorted.len() - 1] - sorted[sorted.len() - 2] < CLEAR_GAP {
                break;
            }
            assert_eq!(id, recorded, "{what}: greedy token {compared}");
            compared += 1;
        }
        assert!(compared >= 4, "{what}: only {compared} greedy tokens are clear enough to be compared");
    });
}

/// The comparison itself: a thousandth on one logit, a NaN and a missing row are found.
#[test]
fn the_comparison_fails_when_it_should() {
    let (folder, path) = recorded_models().remove(0);
    let compute = Compute::new(1, Isa::Portable);
    let expected = Expected::read(&folder);
    let found = run::logits(&run::load(&path, &compute), &compute, &expected.input_ids, &[]);
    assert!(compare(&found, &expected.logits).is_ok());
    for i in [0, expected.logits.len() / 2, expected.logits.len() - 1] {
        for wrong in [expected.logits[i] + 1e-3, expected.logits[i] - 1e-3, f32::NAN, f32::INFINITY] {
            let mut altered = expected.logits.clone();
            altered[i] = wrong;
            assert!(compare(&found, &altered).is_err(), "{wrong} at {i} passed");
        }
    }
    assert!(compare(&found, &expected.logits[1..]).is_err());
    assert!(compare(&[f32::NAN], &[f32::NAN]).is_err());
}

#[test]
fn bits_do_not_depend_on_threads() {
    for isa in Isa::available() {
        let (one, three) = (Compute::new(1, isa), Compute::new(3, isa));
        for (folder, path) in recorded_models() {
            let (a, b) = (run::load(&path, &one), run::load(&path, &three));
            let ids = ids_of(&Expected::read(&folder), a.plan().vocab, 2 * PAGE_TOKENS + 9);
            let (a, b) = (run::logits(&a, &one, &ids, &[5]), run::logits(&b, &three, &ids, &[5]));
            assert_same_bits(&b, &a, &format!("{} on {isa} with 3 threads", path.display()));
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_cut_of_the_prompt() {
    for_each_model(|model, compute, _, expected, what| {
        let ids = ids_of(expected, model.plan().vocab, PAGE_TOKENS + 5);
        let whole = run::logits(model, compute, &ids, &[]);
        for cut in 1..ids.len() {
            let pieces = run::logits(model, compute, &ids, &[cut]);
            assert_same_bits(&pieces, &whole, &format!("{what} cut at {cut}"));
        }
        let every: Vec<usize> = (1..ids.len()).collect();
        assert_same_bits(&run::logits(model, compute, &ids, &every), &whole, &format!("{what}, token by token"));
    });
}

#[test]
fn bits_do_not_depend_on_the_batch_or_on_where_pages_lie() {
    for_each_model(|model, compute, _, expected, what| {
        let vocab = model.plan().vocab;
        let a = ids_of(expected, vocab, 2 * PAGE_TOKENS + 9);
        let b: Vec<TokenId> = a.iter().rev().take(PAGE_TOKENS + 6).copied().collect();
        let alone_a = run::logits(model, compute, &a, &[]);
        let alone_b = run::logits(model, compute, &b, &[]);
        // The pages of both in no order, and between pages of nobody.
        let (pages_a, pages_b) = ([6, 1, 4], [5, 0]);
        let mut both = Run::new(model, compute, 8);
        let mut found = [Vec::new(), Vec::new()];
        let mut starts = [0, 0];
        // A long piece beside one token, each beside nothing, uneven pieces, both orders.
        for (turn, ends) in [[70, 1], [71, 40], [72, 41], [100, 70]].into_iter().chain([[a.len(), 70]]).enumerate() {
            let parts =
                [(&a[starts[0]..ends[0]], starts[0], &pages_a[..]), (&b[starts[1]..ends[1]], starts[1], &pages_b[..])];
            let mut order = [0, 1];
            if turn % 2 == 1 {
                order.reverse();
            }
            let present: Vec<usize> = order.into_iter().filter(|&i| !parts[i].0.is_empty()).collect();
            let batch: Vec<_> = present.iter().map(|&i| parts[i]).collect();
            let mut logits = &both.feed(&batch, Outputs::All)[..];
            for &i in &present {
                let (own, rest) = logits.split_at(parts[i].0.len() * vocab);
                found[i].extend_from_slice(own);
                logits = rest;
            }
            starts = ends;
        }
        assert_same_bits(&found[0], &alone_a, &format!("{what}, first of a batch of two"));
        assert_same_bits(&found[1], &alone_b, &format!("{what}, second of a batch of two"));
    });
}

/// Only the last row's logits wanted, whole and in pieces of which the first wants none: the last layer leaves rows out.
#[test]
fn bits_do_not_depend_on_what_else_is_wanted() {
    for_each_model(|model, compute, _, expected, what| {
        let vocab = model.plan().vocab;
        let ids = ids_of(expected, vocab, PAGE_TOKENS + 5);
        let all = run::logits(model, compute, &ids, &[]);
        let last = &all[all.len() - vocab..];
        let pages = [1, 0];
        for cut in [0, 1, 7, PAGE_TOKENS, ids.len() - 1] {
            let mut run = Run::new(model, compute, pages.len());
            if cut > 0 {
                assert!(run.feed(&[(&ids[..cut], 0, &pages)], Outputs::None).is_empty(), "{what}: nothing was wanted");
            }
            let found = run.feed(&[(&ids[cut..], cut, &pages)], Outputs::Last);
            assert_same_bits(&found, last, &format!("{what}, the last row behind {cut}"));
        }
        let other: Vec<TokenId> = ids.iter().rev().take(9).copied().collect();
        let mut run = Run::new(model, compute, 3);
        let found = run.feed(&[(&ids, 0, &pages), (&other, 0, &[2])], Outputs::Last);
        assert_same_bits(&found[..vocab], last, &format!("{what}, the last rows of two"));
        let alone = run::logits(model, compute, &other, &[]);
        assert_same_bits(
            &found[vocab..],
            &alone[alone.len() - vocab..],
            &format!("{what}, the last row of the second"),
        );
    });
}
