//! The block that guesses the token after the next: found in both forms of file, computed as the formula has it, left on disk where
//! nobody wants it.

use qwenkit_formats::ModelFiles;
use qwenkit_models::{Error, GuessSeq, Guesses, Twins, arch};

use super::*;

/// D, V, and the sizes of the fixture's attention: query heads, kv heads, values of a head and those that are rotated.
const WIDTH: usize = 64;
const VOCAB: usize = 384;
const HEADS: (usize, usize, usize, usize) = (4, 2, 64, 16);

/// Values around 0, other ones for each seed.
fn wave(len: usize, seed: f32, size: f32) -> Vec<f32> {
    (0..len).map(|i| size * ((i as f32 * 0.7391 + seed).sin() + (i as f32 * 0.0317 * seed).cos())).collect()
}

fn tensor(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Tensor { name: name.to_owned(), dtype: DType::F32, shape: shape.to_vec(), bytes }
}

/// What the block has beside a layer: Hugging Face's name, GGUF's, shape, values as Hugging Face has them.
fn outer() -> [(&'static str, &'static str, Vec<usize>, Vec<f32>); 4] {
    [
        ("fc.weight", "eh_proj.weight", vec![WIDTH, 2 * WIDTH], wave(2 * WIDTH * WIDTH, 1.0, 0.1)),
        ("pre_fc_norm_embedding.weight", "enorm.weight", vec![WIDTH], wave(WIDTH, 2.0, 0.2)),
        ("pre_fc_norm_hidden.weight", "hnorm.weight", vec![WIDTH], wave(WIDTH, 3.0, 0.2)),
        ("norm.weight", "shared_head_norm.weight", vec![WIDTH], wave(WIDTH, 4.0, 0.2)),
    ]
}

/// The fixture with a block behind it, whose layer has the weights of the last one: a checkpoint, or a GGUF file.
fn with_block(
    name: &str,
    as_gguf: bool,
    change: impl FnOnce(&mut Vec<Tensor>),
) -> (tempfile::TempDir, std::path::PathBuf) {
    let path = if as_gguf { fixture(name).join("model.gguf") } else { fixture(name) };
    let mut all = tensors(&path);
    let (from, to) = if as_gguf { ("blk.3.", "blk.4.") } else { ("model.layers.3.", "mtp.layers.0.") };
    let layer: Vec<Tensor> = all.iter().filter(|t| t.name.starts_with(from)).cloned().collect();
    all.extend(layer.into_iter().map(|t| Tensor { name: t.name.replacen(from, to, 1), ..t }));
    for (hugging_face, of_gguf, shape, values) in outer() {
        let is_norm = shape.len() == 1;
        let plus = if as_gguf && is_norm { 1.0 } else { 0.0 };
        let values: Vec<f32> = values.iter().map(|x| x + plus).collect();
        let name = if as_gguf { format!("blk.4.nextn.{of_gguf}") } else { format!("mtp.{hugging_face}") };
        all.push(tensor(&name, &shape, &values));
    }
    change(&mut all);
    if as_gguf {
        let architecture = match name {
            "qwen3-next" => "qwen3next",
            "qwen3.5" => "qwen35",
            _ => "qwen35moe",
        };
        return gguf(
            name,
            |meta| {
                meta.set(&format!("{architecture}.block_count"), Value::U32(5));
                meta.set(&format!("{architecture}.nextn_predict_layers"), Value::U32(1));
            },
            &all,
        );
    }
    let folder = checkpoint(name, |_| {}, &all);
    let path = folder.path().to_owned();
    (folder, path)
}

fn load_guessing(path: &std::path::Path) -> Result<Model, Error> {
    Model::load_guessing(&ModelFiles::open(path)?, &compute(), &mut |_| {})
}

/// Logits and states of guesses behind pieces of the given lengths; each piece goes on from what is before it.
fn guessed(model: &Model, (tokens, states): (&[TokenId], &[f32]), pieces: &[usize]) -> Vec<(Vec<f32>, Vec<f32>)> {
    let compute = compute();
    let mut state = ModelState::new(model.plan(), model.kv_type(), 2, 1).unwrap();
    let (mut buffers, mut logits, mut first) = (Buffers::default(), Vec::new(), 0);
    let mut found = Vec::new();
    for &piece in pieces {
        let seqs = [GuessSeq { rows: 0..piece, first, pages: &[1, 0], wanted: true }];
        let (tokens, states) = (&tokens[first..first + piece], &states[first * WIDTH..(first + piece) * WIDTH]);
        model.guess(&compute, &mut state, &Guesses { tokens, states, seqs: &seqs }, &mut buffers, &mut logits);
        found.push((logits.clone(), buffers.hidden().to_vec()));
        first += piece;
    }
    found
}

/// The formula in f64 over a checkpoint's tensors.
struct Exact(Vec<Tensor>);

impl Exact {
    fn values(&self, name: &str) -> Vec<f64> {
        let tensor = self.0.iter().find(|t| t.name == name).unwrap();
        tensor.bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
    }

    fn times(&self, name: &str, x: &[f64]) -> Vec<f64> {
        self.values(name).chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.values(name);
        let scale = |x: &[f64]| 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-6).sqrt();
        let norm = |x: &[f64]| x.iter().zip(&weight).map(|(v, w)| v * scale(x) * (1.0 + w)).collect::<Vec<_>>();
        x.chunks_exact(weight.len()).flat_map(norm).collect()
    }

    /// (logits, state) of each position.
    fn guesses(&self, tokens: &[TokenId], states: &[f32]) -> Vec<(Vec<f64>, Vec<f64>)> {
        let (heads, kv_heads, dim, rotated) = HEADS;
        let layer = |name: &str| format!("mtp.layers.0.{name}.weight");
        let (mut keys, mut values, mut all): (Vec<Vec<f64>>, Vec<Vec<f64>>, Vec<_>) = Default::default();
        for (position, (token, state)) in tokens.iter().zip(states.chunks_exact(WIDTH)).enumerate() {
            let embedding = &self.values("model.embed_tokens.weight")[token.index() * WIDTH..][..WIDTH];
            let state: Vec<f64> = state.iter().map(|x| f64::from(*x)).collect();
            let embedding = self.norm("mtp.pre_fc_norm_embedding.weight", embedding);
            let both = [embedding, self.norm("mtp.pre_fc_norm_hidden.weight", &state)].concat();
            let mut x = self.times("mtp.fc.weight", &both);
            let normed = self.norm(&layer("input_layernorm"), &x);
            let rotate = |x: Vec<f64>| {
                let turn = |head: &[f64]| {
                    let half = rotated / 2;
                    let mut out = head.to_vec();
                    for i in 0..half {
                        let angle = position as f64 * 1e7f64.powf(-(2.0 * i as f64) / rotated as f64);
                        out[i] = head[i] * angle.cos() - head[i + half] * angle.sin();
                        out[i + half] = head[i + half] * angle.cos() + head[i] * angle.sin();
                    }
                    out
                };
                x.chunks_exact(dim).flat_map(turn).collect::<Vec<f64>>()
            };
            let both = self.times(&layer("self_attn.q_proj"), &normed);
            let query: Vec<f64> = both.chunks_exact(2 * dim).flat_map(|head| &head[..dim]).copied().collect();
            let gate: Vec<f64> = both.chunks_exact(2 * dim).flat_map(|head| &head[dim..]).copied().collect();
            let query = rotate(self.norm(&layer("self_attn.q_norm"), &query));
            let key = self.times(&layer("self_attn.k_proj"), &normed);
            keys.push(rotate(self.norm(&layer("self_attn.k_norm"), &key)));
            values.push(self.times(&layer("self_attn.v_proj"), &normed));
            let mut of_heads = Vec::new();
            for head in 0..heads {
                let kv = head / (heads / kv_heads) * dim..(head / (heads / kv_heads) + 1) * dim;
                let query = &query[head * dim..][..dim];
                let score = |key: &Vec<f64>| key[kv.clone()].iter().zip(query).map(|(k, q)| k * q).sum::<f64>() / 8.0;
                let weights: Vec<f64> = keys.iter().map(|key| score(key).exp()).collect();
                let total: f64 = weights.iter().sum();
                let seen =
                    |d: usize| weights.iter().zip(&values).map(|(w, v)| w * v[kv.start + d]).sum::<f64>() / total;
                of_heads.extend((0..dim).map(seen));
            }
            let gated: Vec<f64> = of_heads.iter().zip(&gate).map(|(x, g)| x / (1.0 + (-g).exp())).collect();
            let mixed = self.times(&layer("self_attn.o_proj"), &gated);
            x.iter_mut().zip(mixed).for_each(|(x, y)| *x += y);
            let normed = self.norm(&layer("post_attention_layernorm"), &x);
            let (gate, up) = (self.times(&layer("mlp.gate_proj"), &normed), self.times(&layer("mlp.up_proj"), &normed));
            let inner: Vec<f64> = gate.iter().zip(up).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect();
            let mixed = self.times(&layer("mlp.down_proj"), &inner);
            x.iter_mut().zip(mixed).for_each(|(x, y)| *x += y);
            let state = self.norm("mtp.norm.weight", &x);
            all.push((self.times("lm_head.weight", &state), state));
        }
        all
    }
}

fn assert_near(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((f64::from(*found) - expected).abs() < 1e-4, "{what}: value {i} is {found}, expected {expected}");
    }
}

#[test]
fn guesses_are_the_formulas_in_both_forms_of_file() {
    let mut tokens: Vec<TokenId> = (0..70).map(|i| TokenId(i * 37 % VOCAB as u32)).collect();
    let mut states = wave(70 * WIDTH, 5.0, 0.7);
    let (_folder, path) = with_block("qwen3.5", false, |_| {});
    let exact = Exact(self::tensors(&path));
    let expected = exact.guesses(&tokens, &states);
    for as_gguf in [false, true] {
        let (_folder, path) = with_block("qwen3.5", as_gguf, |_| {});
        let model = load_guessing(&path).unwrap();
        assert!(model.plan().mtp.is_some());
        let one_by_one = guessed(&model, (&tokens, &states), &[1; 70]);
        for (i, ((logits, state), exact)) in one_by_one.iter().zip(&expected).enumerate() {
            assert_near(logits, &exact.0, &format!("logits at {i}, as GGUF: {as_gguf}"));
            assert_near(state, &exact.1, &format!("state at {i}, as GGUF: {as_gguf}"));
        }
        let in_pieces = guessed(&model, (&tokens, &states), &[50, 19, 1]);
        for (piece, last) in in_pieces.iter().zip([49, 68, 69]) {
            assert_same_bits(&piece.0, &one_by_one[last].0, &format!("in pieces, up to {last}"));
        }
    }
    // A guess behind a guess goes on from the block's own state.
    let model = load_guessing(&path).unwrap();
    let last = guessed(&model, (&tokens, &states), &[70]).pop().unwrap();
    tokens.push(TokenId(7));
    states.extend(last.1);
    let deeper = guessed(&model, (&tokens, &states), &[70, 1]).pop().unwrap();
    assert_near(&deeper.0, &exact.guesses(&tokens, &states).pop().unwrap().0, "the second guess");
}

#[test]
fn blocks_with_experts_guess_alike_in_both_forms_of_file() {
    let tokens: Vec<TokenId> = (0..20).map(|i| TokenId(i * 41 % VOCAB as u32)).collect();
    let states = wave(20 * WIDTH, 6.0, 0.7);
    for name in ["qwen3.5-moe", "qwen3-next"] {
        let found = [false, true].map(|as_gguf| {
            let (_folder, path) = with_block(name, as_gguf, |_| {});
            guessed(&load_guessing(&path).unwrap(), (&tokens, &states), &[13, 7])
        });
        for (checkpoint, of_gguf) in found[0].iter().zip(&found[1]) {
            let expected: Vec<f64> = checkpoint.0.iter().map(|x| f64::from(*x)).collect();
            assert_near(&of_gguf.0, &expected, name);
        }
    }
}

#[test]
fn the_states_of_all_rows_are_kept_for_guesses_and_change_nothing() {
    let (_folder, path) = with_block("qwen3.5", false, |_| {});
    let (compute, ids) = (compute(), expected("qwen3.5").input_ids);
    let (with, without) = (load_guessing(&path).unwrap(), try_load(&path, &compute).unwrap());
    assert!(with.plan().mtp.is_some() && without.plan().mtp.is_none());
    assert!(with.weight_bytes() > without.weight_bytes());
    assert_eq!(with.bytes_per_token(), without.bytes_per_token(), "the answer's own tokens read what they did");
    let page_bytes = |model: &Model| ModelState::page_bytes(model.plan(), model.kv_type());
    assert_eq!(page_bytes(&with), 2 * page_bytes(&without), "a second layer of keys and values");
    let plain = logits(&without, &compute, &ids, &[]);
    for outputs in [Outputs::Last, Outputs::All] {
        let mut state = ModelState::new(with.plan(), with.kv_type(), 2, 1).unwrap();
        let (mut buffers, mut logits) = (Buffers::keeping_states(), Vec::new());
        let seq = BatchSeq {
            rows: 0..ids.len(),
            first: 0,
            pages: &[0, 1],
            slot: 0,
            outputs,
            seen: None,
            adapter: None,
            best: None,
        };
        let batch = Batch { tokens: &ids, seqs: &[seq] };
        with.forward(&compute, &mut state, &batch, &mut buffers, None, &mut logits);
        assert_same_bits(&logits, &plain[plain.len() - logits.len()..], "with states kept");
        assert_eq!(buffers.states().len(), ids.len() * WIDTH);
        // The head makes the logits of them.
        let head = Exact(tensors(&fixture("qwen3.5")));
        let last: Vec<f64> = buffers.states()[(ids.len() - 1) * WIDTH..].iter().map(|x| f64::from(*x)).collect();
        assert_near(&logits[logits.len() - VOCAB..], &head.times("lm_head.weight", &last), "logits of the last state");
    }
}

#[test]
fn a_block_that_is_not_whole_is_left_and_what_it_lacks_is_told() {
    let gap = |path: &std::path::Path| {
        let files = ModelFiles::open(path).unwrap();
        arch::mtp_gap(&files, &arch::plan(&files).unwrap())
    };
    for (as_gguf, block) in [(false, "mtp."), (true, "blk.4.")] {
        let (_folder, path) = with_block("qwen3.5", as_gguf, |_| {});
        let parts: Vec<String> =
            tensors(&path).into_iter().map(|t| t.name).filter(|name| name.starts_with(block)).collect();
        assert_eq!((gap(&path), parts.len()), (None, 15), "as GGUF: {as_gguf}");
        for missing in &parts {
            let (_folder, path) = with_block("qwen3.5", as_gguf, |all| all.retain(|t| t.name != *missing));
            assert_eq!(gap(&path), Some(format!("one that lacks `{missing}`")));
            assert!(load_guessing(&path).unwrap().plan().mtp.is_none(), "{missing}");
            assert_same_model_or_near(&path, as_gguf);
        }
    }
    let only_fc = |all: &mut Vec<Tensor>| all.retain(|t| !t.name.starts_with("mtp.") || t.name == "mtp.fc.weight");
    let (_folder, path) = with_block("qwen3.5", false, only_fc);
    let found = gap(&path).unwrap();
    assert!(found.starts_with("one that lacks `mtp.") && found.ends_with(" and 11 others"), "{found}");
    let (_folder, path) = with_block("qwen3.5", false, |all| all.push(named("mtp.embed_tokens.weight", &[4])));
    assert_eq!(gap(&path).unwrap(), "one that this version does not compute, with `mtp.embed_tokens.weight`,");
    assert_eq!(gap(&fixture("qwen3.5")), None, "no part of one");
    let (_folder, path) = with_block("qwen3.5", false, |all| all.push(named("mtp.layers.0.mlp.extra", &[4])));
    assert!(load_guessing(&path).is_ok(), "parts of blocks that later generations may have");
}

/// The model without the block answers as the fixture does.
fn assert_same_model_or_near(path: &std::path::Path, as_gguf: bool) {
    let (compute, expected) = (compute(), expected("qwen3.5"));
    let model = try_load(path, &compute).unwrap();
    let found = logits(&model, &compute, &expected.input_ids, &[]);
    assert!(found.iter().zip(&expected.logits).all(|(a, b)| (a - b).abs() < LIMIT), "as GGUF: {as_gguf}");
}

#[test]
fn the_block_goes_both_ways_between_the_forms_of_file() {
    for name in ["qwen3.5", "qwen3.5-moe"] {
        let (_checkpoint, path) = with_block(name, false, |_| {});
        let (_gguf, of_gguf) = with_block(name, true, |_| {});
        let files = ModelFiles::open(&path).unwrap();
        let ModelFiles::Checkpoint(checkpoint) = &files else { panic!("a folder") };
        let twins = Twins::of_checkpoint(checkpoint, &arch::plan(&files).unwrap()).unwrap();
        let (from, to) = (Exact(tensors(&path)), Exact(tensors(&of_gguf)));
        let in_block = |name: &str| name.starts_with("blk.4.");
        let made: Vec<_> = twins.made.iter().filter(|twin| in_block(&twin.name)).collect();
        assert_eq!(made.len(), to.0.iter().filter(|t| in_block(&t.name)).count(), "{name}");
        for twin in made {
            let mut values = Vec::new();
            for run in &twin.runs {
                let source = from.values(&twins.sources[run.source].name);
                let units = (0..run.count).map(|i| (run.first + i * run.step) * twin.unit);
                values.extend(units.flat_map(|at| source[at..at + twin.unit].to_vec()));
            }
            let values: Vec<f64> = values.into_iter().map(|x| f64::from(twin.change.of(x as f32))).collect();
            let expected = to.values(&twin.name);
            assert_eq!(values.len(), expected.len(), "{name}: {}", twin.name);
            assert!(values.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6), "{name}: {}", twin.name);
        }
        let back =
            Twins::of_transformers(&arch::plan(&ModelFiles::open(&of_gguf).unwrap()).unwrap()).unwrap().inverted();
        let in_block = |name: &str| name.starts_with("mtp.");
        let mut made: Vec<_> = back.made.iter().map(|twin| twin.name.clone()).filter(|name| in_block(name)).collect();
        let mut expected: Vec<_> = from.0.iter().map(|t| t.name.clone()).filter(|name| in_block(name)).collect();
        made.sort_unstable();
        expected.sort_unstable();
        assert_eq!(made, expected, "{name}");
    }
    // Files of Qwen3-Next have no place for it.
    let (_checkpoint, path) = with_block("qwen3-next", false, |_| {});
    let files = ModelFiles::open(&path).unwrap();
    let ModelFiles::Checkpoint(checkpoint) = &files else { panic!("a folder") };
    let twins = Twins::of_checkpoint(checkpoint, &arch::plan(&files).unwrap()).unwrap();
    assert!(!twins.made.iter().any(|twin| twin.name.starts_with("blk.4.")));
}
