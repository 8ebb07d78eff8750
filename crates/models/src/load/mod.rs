//! Turns a plan and a file into weights: every tensor of the plan found, checked and packed; every tensor of the file used.

mod experts;
mod mixers;
mod ngrams;
mod tensors;
mod tower;

use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{Compute, KvType, Weight};
use qwenkit_tensor::DType;

use crate::{
    arch,
    blocks::{DenseFfn, FfnBlock, Join, Layer, MixerBlock, Mtp, Streams},
    error::Error,
    names::{self, Naming, Pair},
    plan::{Ffn, LayerPlan, Mixer, Plan, StreamsPlan},
    rope::Rope,
};
use tensors::Loader;
pub(crate) use tower::{SCOPES, load_tower, tower_names};

/// A model in memory, ready to compute. Only training changes it; sequences' state lives in a `ModelState`.
pub struct Model {
    plan: Plan,
    pub(crate) rope: Rope,
    /// (V, D)
    pub(crate) embedding: Weight,
    pub(crate) layers: Vec<Layer>,
    /// What leads from the residual to the output head.
    pub(crate) norm: Join,
    /// (V, D); the embedding where absent
    pub(crate) head: Option<Weight>,
    /// (2, D)
    judge: Option<Vec<f32>>,
    pub(crate) mtp: Option<Mtp>,
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
    /// Loads the model in `files`, packing its weights for `compute`'s kernels; not the block that guesses the token after the
    /// next.
    ///
    /// # Errors
    /// When the file is not a whole model of a known architecture, cannot be read, or does not fit in memory.
    pub fn load(files: &ModelFiles, compute: &Compute, progress: &mut dyn FnMut(LoadEvent)) -> Result<Model, Error> {
        let plan = Plan { mtp: None, ..arch::plan(files)? };
        Model::load_as(plan, files, compute, progress, None)
    }

    /// As `load`, with quantised matrices as BF16: for training them.
    ///
    /// # Errors
    /// As `load`.
    pub fn load_plain(
        files: &ModelFiles,
        compute: &Compute,
        progress: &mut dyn FnMut(LoadEvent),
    ) -> Result<Model, Error> {
        let plan = Plan { mtp: None, ..arch::plan(files)? };
        Model::load_as(plan, files, compute, progress, Some(DType::BF16))
    }

    /// As `load`, with the block that guesses the token after the next where the file holds it whole; `arch::mtp_gap` says why it is
    /// left out where the file has parts of one.
    ///
    /// # Errors
    /// As `load`, and when a tensor of that block has another shape or type.
    pub fn load_guessing(
        files: &ModelFiles,
        compute: &Compute,
        progress: &mut dyn FnMut(LoadEvent),
    ) -> Result<Model, Error> {
        Model::load_as(arch::plan(files)?, files, compute, progress, None)
    }

    fn load_as(
        plan: Plan,
        files: &ModelFiles,
        compute: &Compute,
        progress: &mut dyn FnMut(LoadEvent),
        instead: Option<DType>,
    ) -> Result<Model, Error> {
        let mut loader = Loader::new(files, compute, &plan, progress)?;
        loader.instead = instead;
        let embedding = match plan.tied && !plan.headless {
            true => loader.head(names::EMBEDDING, plan.vocab, plan.width)?,
            false => loader.outer(names::EMBEDDING, plan.vocab, plan.width)?,
        };
        let is_hybrid = plan.has_recurrent_state();
        let layer = |(i, layer)| loader.layer(i, layer, plan.streams, is_hybrid);
        let layers = (0..).zip(&plan.layers).map(layer).collect::<Result<_, _>>()?;
        let norm = match plan.streams {
            None => Join::Norm(loader.norm(loader.naming.outer(names::NORM), plan.width)?),
            Some(streams) => loader.streams(streams, |naming, pair| naming.outer(pair), names::STREAMS_OUT)?,
        };
        let head = match plan.tied {
            _ if plan.headless => None,
            false => Some(loader.head(names::HEAD, plan.vocab, plan.width)?),
            true => {
                // Some exports of tied models hold a copy of the embedding as head.
                loader.copy_of(names::HEAD, names::EMBEDDING)?;
                None
            }
        };
        let judge = match plan.judges {
            true => {
                let info = loader.find(names::JUDGE.to_owned(), &[&[2, plan.width]])?;
                Some(loader.values(info, plan.width)?)
            }
            false => None,
        };
        let mtp = plan.mtp.as_ref().map(|layer| loader.mtp(plan.layers.len(), layer)).transpose()?;
        loader.finish(&plan)?;
        let rope = Rope::new(&plan.rope);
        Ok(Model { plan, rope, embedding, layers, norm, head, judge, mtp })
    }

    /// The model's shape.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The rows of the output head that say yes and no, of a reranker that has no others: (2, D).
    pub fn judge(&self) -> Option<&[f32]> {
        self.judge.as_deref()
    }

    /// Bytes of the packed weights.
    pub fn weight_bytes(&self) -> usize {
        let layers: usize = self.layers.iter().map(Layer::weight_bytes).sum();
        let layers = layers + self.mtp.as_ref().map_or(0, Mtp::weight_bytes);
        let outer = self.embedding.size_bytes() + self.head.as_ref().map_or(0, Weight::size_bytes);
        layers + self.norm.weight_bytes() + outer
    }

    /// Bytes of the output head.
    pub fn head_bytes(&self) -> usize {
        self.head.as_ref().unwrap_or(&self.embedding).size_bytes()
    }

    /// Bytes of weights that one generated token reads when all its logits are wanted: the layers, of experts those it visits, and the output head.
    pub fn bytes_per_token(&self) -> usize {
        let idle: usize = self.layers.iter().map(Layer::idle_bytes).sum();
        let idle = idle + self.mtp.as_ref().map_or(0, Mtp::weight_bytes);
        self.weight_bytes() - idle - if self.head.is_some() { self.embedding.size_bytes() } else { 0 }
    }

    /// The form that keys and values are cached in: f32 for models of f32 and f16 weights; for all others 16 bits, integers under
    /// a scale for each key and each value.
    pub fn kv_type(&self) -> KvType {
        match self.embedding.dtype() {
            DType::F32 | DType::F16 => KvType::F32,
            _ => KvType::F16,
        }
    }
}

impl Loader<'_> {
    /// The block that guesses the token after the next, behind `layers` others.
    fn mtp(&mut self, layers: usize, plan: &LayerPlan) -> Result<Mtp, Error> {
        let (naming, width) = (self.naming, self.width);
        let name = |pair| naming.mtp(layers, pair);
        let fc = self.matrix(name(names::MTP_FC), width, 2 * width)?;
        let [embedding_norm, hidden_norm, norm] = [names::MTP_EMBEDDING_NORM, names::MTP_HIDDEN_NORM, names::MTP_NORM]
            .map(|pair| self.norm(name(pair), width));
        let (own, number) = naming.of_mtp(layers);
        self.naming = own;
        let layer = self.layer(number, plan, None, true);
        self.naming = naming;
        Ok(Mtp { embedding_norm: embedding_norm?, hidden_norm: hidden_norm?, fc, layer: layer?, norm: norm? })
    }

    fn layer(
        &mut self,
        i: usize,
        plan: &LayerPlan,
        streams: Option<StreamsPlan>,
        is_hybrid: bool,
    ) -> Result<Layer, Error> {
        let width = self.width;
        let mixer = match &plan.mixer {
            Mixer::Attention(a) => MixerBlock::Attention(self.attention(i, a)?),
            Mixer::DeltaNet(d) => MixerBlock::DeltaNet(self.delta_net(i, d)?),
        };
        let ffn = match &plan.ffn {
            Ffn::Dense { width } => {
                FfnBlock::Dense(self.dense(i, [names::GATE_PROJ, names::UP_PROJ, names::DOWN_PROJ], *width)?)
            }
            Ffn::Moe(moe) => FfnBlock::Moe(self.moe(i, moe)?),
        };
        let (before_mixer, before_ffn) = match streams {
            Some(streams) => {
                let name = |naming: Naming, pair| naming.inner(i, pair);
                (self.streams(streams, name, names::STREAMS_MIXER)?, self.streams(streams, name, names::STREAMS_FFN)?)
            }
            None => {
                // The two spellings of one norm in GGUF; in checkpoints they are one name.
                let [of_hybrid, plain] =
                    [names::POST_NORM_HYBRID, names::POST_NORM].map(|pair| self.naming.inner(i, pair));
                let is_of_hybrid = self.has(&of_hybrid) || is_hybrid && !self.has(&plain);
                let post_norm = if is_of_hybrid { of_hybrid } else { plain };
                let input_norm = self.norm(self.naming.inner(i, names::INPUT_NORM), width)?;
                (Join::Norm(input_norm), Join::Norm(self.norm(post_norm, width)?))
            }
        };
        let ngrams = match &plan.ngrams {
            None => None,
            Some(ngrams) => Some(self.ngrams(i, ngrams, streams.map_or(1, |s| s.count))?),
        };
        Ok(Layer { ngrams, before_mixer, mixer, before_ffn, ffn })
    }

    /// What mixes the residual streams; `pairs` are the names of norm, down, up and, where there is one, inject.
    fn streams(
        &mut self,
        StreamsPlan { count, rank }: StreamsPlan,
        name: impl Fn(Naming, Pair) -> String,
        pairs: (Pair, Pair, Pair, Option<Pair>),
    ) -> Result<Join, Error> {
        let (all, naming) = (count * self.width, self.naming);
        let (norm, down, up, inject) = pairs;
        Ok(Join::Streams(Box::new(Streams {
            norm: self.norm(name(naming, norm), all)?,
            down: self.matrix(name(naming, down), rank, all)?,
            up: self.matrix(name(naming, up), all, rank)?,
            inject: inject.map(|pair| self.matrix(name(naming, pair), count, all)).transpose()?,
            count,
        })))
    }

    /// A gated unit whose matrices have the names `[gate, up, down]`.
    fn dense(&mut self, i: usize, [gate, up, down]: [Pair; 3], f: usize) -> Result<DenseFfn, Error> {
        let width = self.width;
        Ok(DenseFfn {
            gate: self.inner(i, gate, f, width)?,
            up: self.inner(i, up, f, width)?,
            down: self.inner(i, down, width, f)?,
        })
    }
}
