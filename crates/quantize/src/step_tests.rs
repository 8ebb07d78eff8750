//! A step that breaks something on the way is refused by its own proof, and leaves nothing under the name.

use std::ops::Range;
use std::path::{Path, PathBuf};

use qwenkit_formats::{ModelFiles, TensorInfo};
use qwenkit_kernels::{Compute, Isa};
use qwenkit_models::{Twins, arch};

use crate::{
    Error, Importance, Prover, Step,
    step::Start,
    tensors::{Renamed, Spec, Stored, Tensors},
};

/// Tensors of which some are not what they should be.
struct Broken<'a> {
    inner: Box<dyn Tensors + 'a>,
    specs: Vec<Spec>,
    how: How,
}

#[derive(Clone, Copy)]
enum How {
    /// Two change places.
    Swapped(&'static str, &'static str),
    /// One is larger than it should be.
    Scaled(&'static str, f32),
    /// One is not there.
    Missing(&'static str),
}

impl<'a> Broken<'a> {
    fn new(inner: Box<dyn Tensors + 'a>, how: How) -> Broken<'a> {
        let mut specs = inner.specs().to_vec();
        if let How::Missing(name) = how {
            let before = specs.len();
            specs.retain(|spec| spec.name != name);
            assert_eq!(specs.len() + 1, before, "{name}");
        }
        Broken { inner, specs, how }
    }

    fn index(&self, name: &str) -> usize {
        self.inner.specs().iter().position(|spec| spec.name == name).unwrap()
    }
}

impl Tensors for Broken<'_> {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    fn values(&self, index: usize, range: Range<usize>, out: &mut Vec<f32>) -> Result<(), Error> {
        let name = self.specs[index].name.clone();
        let from = match self.how {
            How::Swapped(a, b) if name == a => b,
            How::Swapped(a, b) if name == b => a,
            _ => &name,
        };
        let start = out.len();
        self.inner.values(self.index(from), range, out)?;
        if let How::Scaled(at, factor) = self.how
            && at == name
        {
            out[start..].iter_mut().for_each(|x| *x *= factor);
        }
        Ok(())
    }

    fn stored(&self, _: usize) -> Option<(&ModelFiles, &TensorInfo)> {
        None
    }
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity").join(name)
}

/// What a step says whose tensors are broken so; `None` where it goes through.
fn outcome(model: &str, kind: &str, to_gguf: bool, how: Option<How>) -> Option<Error> {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join(if to_gguf { "out.gguf" } else { "out" });
    let (files, compute) = (ModelFiles::open(&folder(model)).unwrap(), Compute::new(1, Isa::detect().unwrap()));
    let prover = Prover { compute: &compute, text: None, limit: None, positions: Prover::POSITIONS };
    let importance = Importance::new();
    let step =
        Step { kind: kind.parse().unwrap(), out: &out, importance: &importance, threads: 1, prover: Some(&prover) };
    let before = Some(prover.before(&files).unwrap());
    let mut tensors: Box<dyn Tensors> = Box::new(Stored::new(&files));
    let ModelFiles::Checkpoint(checkpoint) = &files else { panic!("a folder") };
    if to_gguf {
        let twins = Twins::of_checkpoint(checkpoint, &arch::plan(&files).unwrap()).unwrap();
        tensors = Box::new(Renamed::new(tensors, twins).unwrap());
    }
    if let Some(how) = how {
        tensors = Box::new(Broken::new(tensors, how));
    }
    let start = Start { name: "quantize", files: &files, limit: step.limit(before.as_ref()), before };
    let done = match to_gguf {
        true => step.to_gguf(start, &*tensors, &mut |_, _| {}),
        false => step.to_folder(start, &*tensors, &mut |_, _| {}),
    };
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    match done {
        Ok(converted) => {
            assert!(converted.proof.is_some_and(|proof| proof.holds()) && out.exists());
            None
        }
        Err(error) => {
            assert!(left.is_empty(), "{left:?} was left after: {error}");
            Some(error)
        }
    }
}

#[test]
fn sound_steps_go_through() {
    for (model, kind) in [("qwen2", "F32"), ("qwen3-moe", "Q8_0"), ("qwen2-tied", "Q4_K_M"), ("qwen3.5", "F16")] {
        if let Some(error) = outcome(model, kind, true, None) {
            panic!("{model}: {error}");
        }
    }
    for kind in ["F32", "BF16"] {
        if let Some(error) = outcome("qwen3", kind, false, None) {
            panic!("{kind}: {error}");
        }
    }
}

#[test]
fn every_tiny_model_passes_its_own_proof() {
    let mut models = 0;
    for entry in std::fs::read_dir(folder("")).unwrap() {
        let model = entry.unwrap().file_name().into_string().unwrap();
        if !folder(&model).join("model.safetensors").is_file() {
            continue;
        }
        models += 1;
        for kind in ["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"] {
            if let Some(error) = outcome(&model, kind, true, None) {
                panic!("{model}: {error}");
            }
        }
    }
    assert!(models >= 17, "{models}");
}

#[test]
fn swapped_and_scaled_tensors_are_refused_and_named() {
    let swapped = How::Swapped("blk.1.attn_k.weight", "blk.1.attn_v.weight");
    for (model, kind, how) in [
        ("qwen2", "F32", swapped),
        ("qwen2", "Q8_0", swapped),
        ("qwen2", "Q4_K_M", swapped),
        ("qwen3", "Q8_0", How::Swapped("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")),
        ("qwen2-tied", "Q8_0", How::Scaled("token_embd.weight", 0.5)),
        ("qwen3", "Q6_K", How::Scaled("output_norm.weight", 1.5)),
    ] {
        let error = outcome(model, kind, true, Some(how)).unwrap_or_else(|| panic!("{model} {kind} went through"));
        assert!(matches!(error, Error::NotProved { .. }), "{error}");
        assert!(error.to_string().contains("tensors that moved most"), "{error}");
    }
    let how = How::Swapped("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight");
    assert!(matches!(outcome("qwen3", "BF16", false, Some(how)), Some(Error::NotProved { .. })));
}

#[test]
fn a_missing_tensor_or_head_is_refused() {
    for how in [How::Missing("blk.2.ffn_up.weight"), How::Missing("token_embd.weight"), How::Missing("output.weight")] {
        assert!(outcome("qwen2", "Q8_0", true, Some(how)).is_some());
    }
    // Of a folder's untied model the config says that there is a head.
    assert!(outcome("qwen2", "F32", false, Some(How::Missing("lm_head.weight"))).is_some());
}
