//! What the tests share: the folders, writing one as a file, its logits.

use std::path::{Path, PathBuf};

use qwenkit_engine::score;
use qwenkit_formats::{ModelFiles, read_safetensors_file};
use qwenkit_kernels::{Compute, Isa};
use qwenkit_models::Model;
use qwenkit_quantize::{Importance, Step};
use qwenkit_tensor::TokenId;

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
