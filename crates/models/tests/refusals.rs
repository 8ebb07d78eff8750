//! Files that are not whole, of every generation and in both forms: each tensor in turn missing or of another shape, and one
//! too many. Each is refused in words that name the tensor and what was expected.

#[allow(dead_code)] // shared with tests that ask for more
#[path = "moe_run/mod.rs"]
mod moe_run;
#[allow(dead_code)] // as above
#[path = "vision_run/mod.rs"]
mod vision_run;

use std::path::PathBuf;

use moe_run::{Tensor, checkpoint, compute, fixture, gguf, tensors};
use qwenkit_formats::ModelFiles;
use qwenkit_kernels::Compute;
use qwenkit_models::{Model, Tower, arch};
use qwenkit_tensor::DType;
use tempfile::TempDir;

/// Checkpoints of the generations that have something beside dense layers of attention.
const CHECKPOINTS: [&str; 5] = ["qwen2-moe-mixed", "qwen3-moe", "qwen3-next", "qwen3.5-moe", "qwen4-exp"];
const GGUFS: [&str; 4] = ["qwen", "qwen3-moe", "qwen3-next", "qwen3.5-moe"];
const SIGHTED: [&str; 3] = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"];

/// How a record's model lies on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Checkpoint,
    Gguf,
    /// The tower in a checkpoint.
    Tower,
    Mmproj,
}

/// A model whose file is to be spoiled.
struct Whole {
    name: &'static str,
    form: Form,
    tensors: Vec<Tensor>,
}

impl Whole {
    fn all() -> Vec<Whole> {
        let of = |form: Form, file: &'static str| {
            move |name: &'static str| Whole { name, form, tensors: tensors(&fixture(name).join(file)) }
        };
        let text = CHECKPOINTS.map(of(Form::Checkpoint, "")).into_iter().chain(GGUFS.map(of(Form::Gguf, "model.gguf")));
        let towers = SIGHTED.map(of(Form::Tower, "")).into_iter().chain(SIGHTED.map(of(Form::Mmproj, "mmproj.gguf")));
        text.chain(towers).collect()
    }

    fn write(&self, tensors: &[Tensor]) -> (TempDir, PathBuf) {
        match self.form {
            Form::Checkpoint | Form::Tower => {
                let folder = checkpoint(self.name, |_| {}, tensors);
                let path = folder.path().to_owned();
                (folder, path)
            }
            Form::Gguf => gguf(self.name, |_| {}, tensors),
            Form::Mmproj => vision_run::mmproj(self.name, |_| {}, |all| *all = tensors.to_vec()),
        }
    }

    /// Why the model, or its tower, is refused with these tensors.
    fn outcome(&self, compute: &Compute, tensors: &[Tensor]) -> Result<(), String> {
        let (_folder, path) = self.write(tensors);
        let files = ModelFiles::open(&path).map_err(|e| e.to_string())?;
        let tower = |model: &ModelFiles, mmproj: Option<&ModelFiles>| {
            let plan = arch::plan(model)?;
            Tower::load(model, mmproj, &plan, compute, &mut |_| {}).map(drop)
        };
        let outcome = match self.form {
            Form::Checkpoint | Form::Gguf => Model::load(&files, compute, &mut |_| {}).map(drop),
            Form::Tower => tower(&files, None),
            Form::Mmproj => {
                let text = ModelFiles::open(&fixture(self.name).join("model.gguf")).unwrap();
                tower(&text, Some(&files))
            }
        };
        outcome.map_err(|e| e.to_string())
    }

    /// What is wrong with how the model is refused with these tensors: that it is not, or without one of the `parts`.
    fn problem(&self, compute: &Compute, tensors: &[Tensor], parts: &[&str]) -> Option<String> {
        let what = format!("{} as {:?}, {parts:?}", self.name, self.form);
        match self.outcome(compute, tensors) {
            Ok(()) => Some(format!("{what}: accepted")),
            Err(message) => {
                parts.iter().any(|part| !message.contains(part)).then(|| format!("{what} are not all in: {message}"))
            }
        }
    }

    /// The tensors to spoil: those outside layers, of the first two layers and the last, of the first expert and another.
    /// The others are of the same kinds.
    fn chosen(&self) -> Vec<usize> {
        let number = |name: &str, behind: &str| -> Option<usize> {
            let at = name.find(behind)? + behind.len();
            name[at..].split('.').next()?.parse().ok()
        };
        let layer = |name: &str| ["layers.", "blocks.", "blk."].iter().find_map(|behind| number(name, behind));
        let last = self.tensors.iter().filter_map(|t| layer(&t.name)).max();
        let is_own = |name: &str| self.form != Form::Tower || name.contains("visual.");
        let is_chosen = |name: &str| {
            is_own(name)
                && layer(name).is_none_or(|i| i < 2 || Some(i) == last)
                && number(name, "experts.").is_none_or(|e| e == 0 || e == 3)
        };
        (0..self.tensors.len()).filter(|&i| is_chosen(&self.tensors[i].name)).collect()
    }
}

/// What a file may lack: the constants of hashes, which are computed then, and in GGUF the head, which is the embedding then.
fn may_be_missing(name: &str) -> bool {
    name == "output.weight" || ["layer_multipliers", "ngram_heads_"].iter().any(|part| name.contains(part))
}

/// Where a part may be spelt in two ways and neither is there, the one that is asked for.
fn newer_spelling(name: &str) -> String {
    let spellings = [
        ("in_proj_qkvz", "in_proj_qkv"),
        ("in_proj_ba", "in_proj_b"),
        ("ssm_ba", "ssm_beta"),
        ("ssm_in", "attn_qkv"),
        ("ngram_embedding.shard_0", "ngram_embedding"),
    ];
    spellings.iter().fold(name.to_owned(), |name, (older, newer)| name.replace(older, newer))
}

#[test]
fn a_tensor_that_is_missing_is_named() {
    let (compute, mut tried, mut problems) = (compute(), 0, Vec::new());
    for whole in Whole::all() {
        assert_eq!(whole.outcome(&compute, &whole.tensors), Ok(()), "{} as {:?}", whole.name, whole.form);
        for i in whole.chosen() {
            let mut tensors = whole.tensors.clone();
            let mut name = newer_spelling(&tensors.remove(i).name);
            if may_be_missing(&name) {
                continue;
            }
            if whole.form == Form::Mmproj {
                // Queries, keys and values may be one.
                name = name.replace("attn_q.weight", "attn_qkv.weight");
            }
            let named = format!("`{name}`");
            // Nothing else of a whole text model is missing, and nothing else is there.
            if matches!(whole.form, Form::Checkpoint | Form::Gguf) && !name.contains(".shard_") {
                let alone = match name.as_str() {
                    "lm_head.weight" => "is missing; the nearest is the embedding",
                    // One tensor in place of two.
                    _ if name != whole.tensors[i].name && !name.contains("ngram") => "is missing, and so is 1 other",
                    // Where the text model is in a checkpoint, and how wide a vocabulary is, is told by it.
                    _ if name.ends_with("embed_tokens.weight") || name.starts_with("token_embd") => "is missing",
                    _ => "is missing; what is there belongs to the model",
                };
                problems.extend(whole.problem(&compute, &tensors, &[alone]));
            }
            // Parts of a table are counted until one is missing; what is there has too few rows then.
            let parts = if name.contains(".shard_") {
                ["ngram_embedding.weight", "expected"]
            } else {
                [named.as_str(), "is missing"]
            };
            problems.extend(whole.problem(&compute, &tensors, &parts));
            tried += 1;
        }
    }
    assert!(problems.is_empty(), "{} of {tried}:\n{}", problems.len(), problems.join("\n"));
    assert!(tried > 300, "{tried}");
}

#[test]
fn a_tensor_of_another_shape_is_refused_with_what_was_expected() {
    let (compute, mut tried, mut problems) = (compute(), 0, Vec::new());
    for whole in Whole::all() {
        for i in whole.chosen() {
            let name = whole.tensors[i].name.as_str();
            // GGUF does not state the vocabulary elsewhere, so that it is the head which differs.
            if may_be_missing(name) || name == "token_embd.weight" {
                continue;
            }
            for axis in 0..whole.tensors[i].shape.len() {
                let mut tensors = whole.tensors.clone();
                let tensor = &mut tensors[i];
                tensor.shape[axis] += 1;
                tensor.bytes = vec![0; tensor.dtype.tensor_bytes(&tensor.shape).unwrap()];
                problems.extend(whole.problem(&compute, &tensors, &["expected"]));
                tried += 1;
            }
        }
    }
    assert!(problems.is_empty(), "{} of {tried}:\n{}", problems.len(), problems.join("\n"));
    assert!(tried > 500, "{tried}");
}

#[test]
fn a_tensor_of_no_part_is_named() {
    let (compute, mut problems) = (compute(), Vec::new());
    for whole in Whole::all() {
        for i in whole.chosen() {
            let mut tensors = whole.tensors.clone();
            let (stem, end) = tensors[i].name.rsplit_once('.').unwrap();
            let name = format!("{stem}_more.{end}");
            tensors.push(Tensor { name: name.clone(), dtype: DType::F32, shape: vec![1], bytes: vec![0; 4] });
            problems.extend(whole.problem(&compute, &tensors, &["belong to no part of a ", &format!("`{name}`")]));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
