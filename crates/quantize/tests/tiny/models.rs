//! What the tests share: the folders, writing one as a file, its logits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use qwenkit_engine::{View, VisionInfo, Visual, score};
use qwenkit_formats::{ModelFiles, read_safetensors_file, write_safetensors};
use qwenkit_kernels::{Compute, Isa};
use qwenkit_models::{Grid, Model, Pixels, Tower};
use qwenkit_quantize::{Importance, Step};
use qwenkit_tensor::{DType, TokenId};

/// All folders with a tiny model: those of the fixtures, or of `QWENKIT_PARITY`, which may hold more twins.
pub(crate) fn folders() -> Vec<PathBuf> {
    let fixtures = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity");
    let root = std::env::var_os("QWENKIT_PARITY").map_or_else(fixtures, PathBuf::from);
    let mut found: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.join("model.safetensors").is_file());
    found.sort();
    assert_eq!(found.len(), 17);
    found
}

pub(crate) fn name(folder: &Path) -> String {
    folder.file_name().unwrap().to_string_lossy().into_owned()
}

/// Writes the model of `source` as a file of `kind`.
pub(crate) fn write(source: &Path, kind: &str, out: &Path) {
    let files = ModelFiles::open(source).unwrap();
    let importance = Importance::new();
    let step = Step { kind: kind.parse().unwrap(), out, importance: &importance, threads: 2, prover: None };
    step.quantize(&files, &mut |_, _| {}).unwrap_or_else(|error| panic!("{}: {error}", source.display()));
}

pub(crate) fn compute() -> Compute {
    Compute::new(1, Isa::detect().unwrap())
}

/// The tokens of a folder's record.
pub(crate) fn ids(folder: &Path) -> Vec<TokenId> {
    let file = read_safetensors_file(&folder.join("expected.safetensors")).unwrap();
    let info = file.tensor("input_ids").unwrap();
    let mut bytes = vec![0; info.len_bytes];
    file.read(info, 0, &mut bytes).unwrap();
    let ids = bytes.as_chunks().0.iter().map(|b| TokenId(i64::from_le_bytes(*b) as u32));
    ids.take(*info.shape.last().unwrap()).collect()
}

/// Logits of every position of a folder's record, (tokens, V), with the images that the record has, from the folder itself or a file made
/// of it.
pub(crate) fn recorded_logits(model: &Path, folder: &Path) -> Vec<f32> {
    let (files, compute, ids) = (ModelFiles::open(model).unwrap(), compute(), ids(folder));
    let record = read_safetensors_file(&folder.join("expected.safetensors")).unwrap();
    if record.tensor("pixel_values").is_none() {
        return logits(model, &ids);
    }
    let read = |name: &str| {
        let info = record.tensor(name).unwrap();
        let mut bytes = vec![0; info.len_bytes];
        record.read(info, 0, &mut bytes).unwrap();
        bytes
    };
    let values: Vec<f32> = read("pixel_values").as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let grids: Vec<usize> =
        read("image_grid_thw").as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as usize).collect();
    // As `quantize` calls it; of several kinds in one folder each has its own.
    let mmproj = matches!(files, ModelFiles::Gguf(_)).then(|| {
        let name = model.file_name().unwrap().to_string_lossy();
        ModelFiles::open(&model.with_file_name(format!("mmproj-{name}"))).unwrap()
    });
    let text = Model::load(&files, &compute, &mut |_| {}).unwrap();
    let tower = Tower::load(&files, mmproj.as_ref(), text.plan(), &compute, &mut |_| {}).unwrap();
    let info = VisionInfo::of(text.plan(), &tower).unwrap();
    let (mut rest, each) = (values.as_slice(), info.plan.patch.values());
    let mut visuals = Vec::new();
    for grid in grids.chunks_exact(3) {
        let grid = Grid { steps: grid[0], rows: grid[1], cols: grid[2] };
        let own;
        (own, rest) = rest.split_at(grid.patches().unwrap() * each);
        visuals.push(Visual::image(Pixels { values: own.to_vec(), grid }));
    }
    let placed = info.place(&ids, visuals).unwrap();
    let view = View::computed(&info, &tower, &compute, &ids, placed).unwrap();
    let mut all = Vec::new();
    score::logits_seeing(&text, &compute, &ids, Some(&view), &mut |_, row| all.extend_from_slice(row)).unwrap();
    all
}

/// A checkpoint folder of random weights whose rows are whole blocks of every type: Qwen3 of width 256, with experts or without.
pub(crate) fn write_wide(to: &Path, has_experts: bool) {
    const D: usize = 256;
    const F: usize = 512;
    const Q: usize = 512;
    const KV: usize = 256;
    const K: usize = 64;
    const V: usize = 384;
    const LAYERS: usize = 2;
    const EXPERTS: usize = 4;
    let like = if has_experts { "qwen3-moe" } else { "qwen3" };
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity").join(like);
    std::fs::create_dir_all(to).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    for (key, number) in [
        ("hidden_size", D),
        ("intermediate_size", F),
        ("num_attention_heads", Q / K),
        ("num_key_value_heads", KV / K),
        ("head_dim", K),
        ("vocab_size", V),
        ("num_hidden_layers", LAYERS),
    ] {
        config[key] = number.into();
    }
    config["tie_word_embeddings"] = false.into();
    config["layer_types"] = vec!["full_attention"; LAYERS].into();
    if has_experts {
        for (key, number) in [("num_experts", EXPERTS), ("num_experts_per_tok", 2), ("moe_intermediate_size", F)] {
            config[key] = number.into();
        }
    }
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![V, D])];
    for i in 0..LAYERS {
        let mut add =
            |name: String, shape: &[usize]| shapes.push((format!("model.layers.{i}.{name}.weight"), shape.to_vec()));
        for (name, shape) in [("q_proj", [Q, D]), ("k_proj", [KV, D]), ("v_proj", [KV, D]), ("o_proj", [D, Q])] {
            add(format!("self_attn.{name}"), &shape);
        }
        for name in ["q_norm", "k_norm"] {
            add(format!("self_attn.{name}"), &[K]);
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(name.to_owned(), &[D]);
        }
        let blocks: Vec<String> = match has_experts {
            true => (0..EXPERTS).map(|e| format!("mlp.experts.{e}.")).collect(),
            false => vec!["mlp.".to_owned()],
        };
        for block in blocks {
            for (name, shape) in [("gate_proj", [F, D]), ("up_proj", [F, D]), ("down_proj", [D, F])] {
                add(format!("{block}{name}"), &shape);
            }
        }
        if has_experts {
            add("mlp.gate".to_owned(), &[EXPERTS, D]);
        }
    }
    shapes.push(("model.norm.weight".to_owned(), vec![D]));
    shapes.push(("lm_head.weight".to_owned(), vec![V, D]));
    // xorshift64*, so that every machine has the same.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut values = |shape: &[usize]| -> Vec<u8> {
        let scale = (3.0 / *shape.last().unwrap() as f32).sqrt();
        let one = || if shape.len() == 1 { 1.0 + 0.2 * random() } else { scale * random() };
        std::iter::repeat_with(one).take(shape.iter().product()).flat_map(f32::to_le_bytes).collect()
    };
    let made: Vec<(String, Vec<usize>, Vec<u8>)> =
        shapes.into_iter().map(|(name, shape)| (name, shape.clone(), values(&shape))).collect();
    let views: Vec<_> = made.iter().map(|(name, shape, bytes)| (&**name, DType::F32, &**shape, &**bytes)).collect();
    write_safetensors(&to.join("model.safetensors"), &views, &BTreeMap::new()).unwrap();
}

/// Logits of every position: (tokens, V).
pub(crate) fn logits(model: &Path, ids: &[TokenId]) -> Vec<f32> {
    let files = ModelFiles::open(model).unwrap();
    let compute = compute();
    let model = Model::load(&files, &compute, &mut |_| {})
        .unwrap_or_else(|error| panic!("{}: {error}", files.path().display()));
    let mut all = Vec::new();
    score::logits(&model, &compute, ids, &mut |_, row| all.extend_from_slice(row)).unwrap();
    all
}
