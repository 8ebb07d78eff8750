//! Turns a plan and a file into weights: every tensor of the plan found, checked and packed; every tensor of the file used.

use std::collections::HashSet;

use qwenkit_formats::{ModelFiles, TensorInfo};
use qwenkit_kernels::{Compute, KvType, LoadError, Weight, dequantize_row};
use qwenkit_tensor::DType;

use crate::{
    arch,
    blocks::{Attention, DenseFfn, FfnBlock, Layer, MixerBlock},
    error::Error,
    names::{self, Naming, Pair},
    plan::{AttentionPlan, Ffn, LayerPlan, Mixer, Plan},
    rope::Rope,
};

/// A model in memory, ready to compute. It is never changed; sequences' state lives in a `ModelState`.
pub struct Model {
    plan: Plan,
    pub(crate) rope: Rope,
    /// (V, D)
    pub(crate) embedding: Weight,
    pub(crate) layers: Vec<Layer>,
    /// (D)
    pub(crate) norm: Vec<f32>,
    /// (V, D); the embedding where absent
    pub(crate) head: Option<Weight>,
}

/// Progress of a load.
#[derive(Clone, Copy, Debug)]
pub struct LoadEvent {
    /// Bytes of tensors done.
    pub done_bytes: u64,
    /// Bytes of all tensors.
    pub total_bytes: u64,
}

impl Model {
    /// Loads the model in `files`, packing its weights for `compute`'s kernels.
    ///
    /// # Errors
    /// When the file is not a whole model of a known architecture, cannot be read, or does not fit in memory.
    pub fn load(files: &ModelFiles, compute: &Compute, progress: &mut dyn FnMut(LoadEvent)) -> Result<Model, Error> {
        let plan = arch::plan(files)?;
        let mut loader = Loader::new(files, compute, &plan, progress);
        let embedding = loader.outer(names::EMBEDDING, plan.vocab, plan.width)?;
        let layers = (0..).zip(&plan.layers).map(|(i, layer)| loader.layer(i, layer)).collect::<Result<_, _>>()?;
        let norm = loader.vector(loader.naming.outer(names::NORM), plan.width)?;
        let head = match plan.tied {
            false => Some(loader.outer(names::HEAD, plan.vocab, plan.width)?),
            true => {
                // Some exports of tied models hold a copy of the embedding as head; `tie_word_embeddings` decides.
                loader.used.insert(loader.naming.outer(names::HEAD));
                None
            }
        };
        loader.finish()?;
        let rope = Rope::new(&plan.rope);
        Ok(Model { plan, rope, embedding, layers, norm, head })
    }

    /// The model's shape.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Bytes of the packed weights.
    pub fn weight_bytes(&self) -> usize {
        let layers: usize = self.layers.iter().map(Layer::weight_bytes).sum();
        layers + self.embedding.size_bytes() + self.head.as_ref().map_or(0, Weight::size_bytes)
    }

    /// Bytes of weights that one generated token reads: the layers and the output head.
    pub fn bytes_per_token(&self) -> usize {
        self.weight_bytes() - if self.head.is_some() { self.embedding.size_bytes() } else { 0 }
    }

    /// The element type that keys and values are cached in: f32 for models of f32 weights, which are held to f32's
    /// accuracy, f16 for all others.
    pub fn kv_type(&self) -> KvType {
        match self.embedding.dtype() {
            DType::F32 => KvType::F32,
            _ => KvType::F16,
        }
    }
}

struct Loader<'a> {
    files: &'a ModelFiles,
    compute: &'a Compute,
    naming: Naming,
    architecture: &'static str,
    /// D
    width: usize,
    used: HashSet<String>,
    event: LoadEvent,
    progress: &'a mut dyn FnMut(LoadEvent),
}

impl<'a> Loader<'a> {
    fn new(
        files: &'a ModelFiles,
        compute: &'a Compute,
        plan: &Plan,
        progress: &'a mut dyn FnMut(LoadEvent),
    ) -> Loader<'a> {
        let naming = match files {
            ModelFiles::Gguf(_) => Naming::Gguf,
            ModelFiles::Checkpoint(_) => Naming::HuggingFace,
        };
        let total_bytes = files.tensors().iter().map(|t| t.len_bytes as u64).sum();
        let event = LoadEvent { done_bytes: 0, total_bytes };
        let (architecture, width) = (plan.architecture, plan.width);
        Loader { files, compute, naming, architecture, width, used: HashSet::new(), event, progress }
    }

    fn layer(&mut self, i: usize, plan: &LayerPlan) -> Result<Layer, Error> {
        let width = self.width;
        let mixer = match &plan.mixer {
            Mixer::Attention(a) => MixerBlock::Attention(self.attention(i, a, width)?),
        };
        let ffn = match plan.ffn {
            Ffn::Dense { width: f } => FfnBlock::Dense(DenseFfn {
                gate: self.inner(i, names::GATE_PROJ, f, width)?,
                up: self.inner(i, names::UP_PROJ, f, width)?,
                down: self.inner(i, names::DOWN_PROJ, width, f)?,
            }),
        };
        Ok(Layer {
            input_norm: self.vector(self.naming.inner(i, names::INPUT_NORM), width)?,
            mixer,
            post_norm: self.vector(self.naming.inner(i, names::POST_NORM), width)?,
            ffn,
        })
    }

    fn attention(&mut self, i: usize, plan: &AttentionPlan, width: usize) -> Result<Attention, Error> {
        let (q, kv) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
        let vector = |loader: &mut Self, wanted: bool, pair, len| match wanted {
            true => loader.vector(loader.naming.inner(i, pair), len).map(Some),
            false => Ok(None),
        };
        Ok(Attention {
            plan: plan.clone(),
            q_proj: self.inner(i, names::Q_PROJ, q, width)?,
            k_proj: self.inner(i, names::K_PROJ, kv, width)?,
            v_proj: self.inner(i, names::V_PROJ, kv, width)?,
            o_proj: self.inner(i, names::O_PROJ, width, q)?,
            q_bias: vector(self, plan.qkv_bias, names::Q_BIAS, q)?,
            k_bias: vector(self, plan.qkv_bias, names::K_BIAS, kv)?,
            v_bias: vector(self, plan.qkv_bias, names::V_BIAS, kv)?,
            q_norm: vector(self, plan.qk_norm, names::Q_NORM, plan.head_dim)?,
            k_norm: vector(self, plan.qk_norm, names::K_NORM, plan.head_dim)?,
        })
    }

    fn outer(&mut self, pair: Pair, rows: usize, cols: usize) -> Result<Weight, Error> {
        self.matrix(self.naming.outer(pair), rows, cols)
    }

    fn inner(&mut self, layer: usize, pair: Pair, rows: usize, cols: usize) -> Result<Weight, Error> {
        self.matrix(self.naming.inner(layer, pair), rows, cols)
    }

    fn matrix(&mut self, name: String, rows: usize, cols: usize) -> Result<Weight, Error> {
        let files = self.files;
        let info = self.find(name, &[rows, cols])?;
        let read = |start: usize, out: &mut [u8]| files.read(info, start, out);
        let weight = Weight::load(self.compute.pool(), info.dtype, rows, cols, read).map_err(|e| match e {
            LoadError::Alloc(e) => Error::Alloc(e),
            LoadError::Read(e) => Error::Format(e),
            LoadError::Unsupported { dtype, .. } => {
                let expected = "F32, F16, BF16 or a quantised type whose blocks fill its rows";
                self.wrong_type(info, dtype, expected)
            }
        })?;
        self.done(info.len_bytes);
        Ok(weight)
    }

    fn vector(&mut self, name: String, len: usize) -> Result<Vec<f32>, Error> {
        let info = self.find(name, &[len])?;
        if !matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(self.wrong_type(info, info.dtype, "F32, F16 or BF16"));
        }
        let mut bytes = vec![0; info.len_bytes];
        self.files.read(info, 0, &mut bytes)?;
        let mut values = vec![0.0; len];
        dequantize_row(info.dtype, &bytes, &mut values);
        self.done(info.len_bytes);
        Ok(values)
    }

    fn find(&mut self, name: String, shape: &[usize]) -> Result<&'a TensorInfo, Error> {
        let path = || self.files.path().to_owned();
        let Some(info) = self.files.tensor(&name) else {
            let shape = shape.to_vec();
            return Err(Error::TensorMissing { path: path(), name, shape, architecture: self.architecture });
        };
        if info.shape != shape {
            let (expected, found) = (shape.to_vec(), info.shape.clone());
            return Err(Error::TensorShape { path: path(), name, expected, found });
        }
        self.used.insert(name);
        Ok(info)
    }

    fn wrong_type(&self, info: &TensorInfo, found: DType, expected: &'static str) -> Error {
        Error::TensorType { path: self.files.path().to_owned(), name: info.name.clone(), found, expected }
    }

    fn done(&mut self, bytes: usize) {
        self.event.done_bytes += bytes as u64;
        (self.progress)(self.event);
    }

    /// Refuses a file with tensors that nothing has used.
    fn finish(self) -> Result<(), Error> {
        let is_unused = |t: &&TensorInfo| !self.used.contains(&t.name) && !self.naming.is_spare(&t.name);
        let mut unused = self.files.tensors().iter().filter(is_unused);
        match unused.next() {
            None => Ok(()),
            Some(first) => Err(Error::TensorsUnused {
                path: self.files.path().to_owned(),
                count: 1 + unused.count(),
                first: first.name.clone(),
                architecture: self.architecture,
            }),
        }
    }
}
