//! All numbers of a dense model as one slice, for whoever trains them: which tensor lies where, out of the model and back into it.
//!
//! Contract: tensors are the text model's of Qwen2, Qwen2.5 and Qwen3 without experts, each as checkpoints have it. The model computes
//! with the numbers as its matrices store them, so what it answers is what a file of that type will answer. Not here: gradients
//! (`grad`), files (`qwenkit-train`).

use std::ops::Range;

use qwenkit_kernels::{Compute, Weight, dequantize_row, quantize_row};
use qwenkit_tensor::DType;

use crate::{
    adapter::{Adapter, Module},
    blocks::{FfnBlock, Join, MixerBlock},
    error::Error,
    load::Model,
    names::{self, BODIES, Pair},
    plan::{Ffn, Mixer, Plan},
};

/// Where each tensor of a model lies in a slice of all its numbers.
pub struct Whole {
    tensors: Vec<WholeTensor>,
    /// Of the tensors of layers, by layer and place.
    inner: Vec<[Option<Inner>; Own::COUNT]>,
    embedding: Range<usize>,
    head: Range<usize>,
    norm: Range<usize>,
    dtype: DType,
    /// There is none beside.
    pub(crate) adapter: Adapter,
}

/// A tensor of a model that is trained whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WholeTensor {
    /// As Hugging Face names it.
    pub name: String,
    /// The outermost axis first.
    pub shape: Vec<usize>,
    /// Where its numbers are.
    pub range: Range<usize>,
}

/// Where a layer's tensor lies, and its last axis.
pub(crate) struct Inner {
    pub(crate) range: Range<usize>,
    pub(crate) cols: usize,
}

/// A tensor of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Own {
    InputNorm,
    PostNorm,
    Q,
    K,
    V,
    O,
    QBias,
    KBias,
    VBias,
    QNorm,
    KNorm,
    Gate,
    Up,
    Down,
}

impl Own {
    const COUNT: usize = 14;

    fn pair(self) -> Pair {
        match self {
            Own::InputNorm => names::INPUT_NORM,
            Own::PostNorm => names::POST_NORM,
            Own::Q => names::Q_PROJ,
            Own::K => names::K_PROJ,
            Own::V => names::V_PROJ,
            Own::O => names::O_PROJ,
            Own::QBias => names::Q_BIAS,
            Own::KBias => names::K_BIAS,
            Own::VBias => names::V_BIAS,
            Own::QNorm => names::Q_NORM,
            Own::KNorm => names::K_NORM,
            Own::Gate => names::GATE_PROJ,
            Own::Up => names::UP_PROJ,
            Own::Down => names::DOWN_PROJ,
        }
    }

    /// The matrix that adapters call so.
    pub(crate) fn of_module(module: Module) -> Option<Own> {
        Some(match module {
            Module::QProj => Own::Q,
            Module::KProj => Own::K,
            Module::VProj => Own::V,
            Module::OProj => Own::O,
            Module::GateProj => Own::Gate,
            Module::UpProj => Own::Up,
            Module::DownProj => Own::Down,
            _ => return None,
        })
    }
}

/// Which tensor of a model.
#[derive(Clone, Copy)]
enum Place {
    Embedding,
    Head,
    Norm,
    Inner(usize, Own),
}

/// A tensor's numbers in the model.
enum Slot<'a> {
    Matrix(&'a mut Weight),
    Vector(&'a mut Vec<f32>),
}

impl Whole {
    /// Refuses models that cannot be trained whole.
    ///
    /// # Errors
    /// When the plan has another architecture than those named above, experts, or a head that is missing.
    pub fn check(plan: &Plan) -> Result<(), Error> {
        let wrong = |found: &str| Err(Error::NotWhole { found: found.to_owned() });
        if !matches!(plan.architecture, "qwen2" | "qwen3") {
            return wrong(&format!("a {} model", plan.architecture));
        }
        if plan.headless || plan.judges {
            return wrong("a model without its output head");
        }
        for layer in &plan.layers {
            let is_plain = matches!(&layer.mixer, Mixer::Attention(a) if !a.output_gate && !a.fused_qkv);
            if !is_plain || !matches!(layer.ffn, Ffn::Dense { .. }) {
                return wrong("layers that are not dense");
            }
        }
        Ok(())
    }

    /// Where the numbers of the model lie.
    ///
    /// # Errors
    /// As `check`; and when matrices are quantised, or of several types.
    pub fn of(model: &mut Model) -> Result<Whole, Error> {
        Whole::check(model.plan())?;
        let (layers, dtype) = (model.plan().layers.len(), model.embedding.dtype());
        let mut whole = Whole {
            tensors: Vec::new(),
            inner: (0..layers).map(|_| Default::default()).collect(),
            embedding: 0..0,
            head: 0..0,
            norm: 0..0,
            dtype,
            adapter: Adapter::zeroed(model.plan(), &[], None)?,
        };
        let (mut at, body) = (0, BODIES[0].0);
        for (place, slot) in slots(model) {
            let shape = match &slot {
                Slot::Vector(vector) => vec![vector.len()],
                Slot::Matrix(weight) if weight.dtype() == dtype && is_plain(dtype) => {
                    vec![weight.rows(), weight.cols()]
                }
                Slot::Matrix(weight) => {
                    return Err(Error::NotWhole { found: format!("matrices in {} beside {dtype}", weight.dtype()) });
                }
            };
            let range = at..at + shape.iter().product::<usize>();
            at = range.end;
            let name = match place {
                Place::Embedding => {
                    // A tied model's head is its embedding.
                    (whole.embedding, whole.head) = (range.clone(), range.clone());
                    format!("{body}{}", names::EMBEDDING.0)
                }
                Place::Head => {
                    whole.head = range.clone();
                    names::HEAD.0.to_owned()
                }
                Place::Norm => {
                    whole.norm = range.clone();
                    format!("{body}{}", names::NORM.0)
                }
                Place::Inner(layer, own) => {
                    let cols = shape.last().copied().unwrap_or(1);
                    whole.inner[layer][own as usize] = Some(Inner { range: range.clone(), cols });
                    format!("{body}layers.{layer}.{}", own.pair().0)
                }
            };
            whole.tensors.push(WholeTensor { name, shape, range });
        }
        Ok(whole)
    }

    /// How many numbers there are.
    #[allow(clippy::len_without_is_empty)] // no model is
    pub fn len(&self) -> usize {
        self.tensors.last().map_or(0, |tensor| tensor.range.end)
    }

    /// The model's numbers.
    ///
    /// # Panics
    /// If this is of another model.
    pub fn values(&self, model: &mut Model) -> Vec<f32> {
        let mut values = vec![0.0; self.len()];
        for ((_, slot), tensor) in slots(model).into_iter().zip(&self.tensors) {
            let own = &mut values[tensor.range.clone()];
            match slot {
                Slot::Vector(vector) => own.copy_from_slice(vector),
                Slot::Matrix(weight) => {
                    own.chunks_exact_mut(weight.cols()).enumerate().for_each(|(row, out)| weight.row(row, out));
                }
            }
        }
        values
    }

    /// What is trained beside the model: nothing.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// The tensors, in the order of their numbers.
    pub fn tensors(&self) -> &[WholeTensor] {
        &self.tensors
    }

    /// The type that the model's matrices are stored in: F32, F16 or BF16. Vectors are rounded to it as well.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The model computes with these numbers from now on, rounded to its type.
    ///
    /// # Panics
    /// If they are not the numbers of this model.
    pub fn store(&self, compute: &Compute, values: &[f32], model: &mut Model) {
        let slots = slots(model);
        assert_eq!(slots.len(), self.tensors.len(), "tensors of a model");
        for ((_, slot), tensor) in slots.into_iter().zip(&self.tensors) {
            let values = &values[tensor.range.clone()];
            match slot {
                Slot::Matrix(weight) => weight.store(compute.pool(), values),
                Slot::Vector(vector) => {
                    dequantize_row(self.dtype, &self.stored(values), vector);
                }
            }
        }
    }

    /// Numbers as files of the model's type have them.
    pub fn stored(&self, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * self.dtype.block_bytes()];
        quantize_row(self.dtype, values, None, &mut bytes);
        bytes
    }

    /// Where a tensor of a layer lies, if the layer has it.
    pub(crate) fn inner(&self, layer: usize, own: Own) -> Option<&Inner> {
        self.inner[layer][own as usize].as_ref()
    }

    /// (V, D)
    pub(crate) fn embedding(&self) -> Range<usize> {
        self.embedding.clone()
    }

    /// (V, D); of tied models the embedding.
    pub(crate) fn head(&self) -> Range<usize> {
        self.head.clone()
    }

    /// (D)
    pub(crate) fn norm(&self) -> Range<usize> {
        self.norm.clone()
    }
}

fn is_plain(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// All tensors of a model that `check` let through, always in the same order.
fn slots(model: &mut Model) -> Vec<(Place, Slot<'_>)> {
    let Model { embedding, layers, norm, head, .. } = model;
    let mut slots = vec![(Place::Embedding, Slot::Matrix(embedding))];
    for (i, layer) in layers.iter_mut().enumerate() {
        let (MixerBlock::Attention(a), FfnBlock::Dense(f)) = (&mut layer.mixer, &mut layer.ffn) else { continue };
        let (Join::Norm(input_norm), Join::Norm(post_norm)) = (&mut layer.before_mixer, &mut layer.before_ffn) else {
            continue;
        };
        let matrices = [
            (Own::Q, &mut a.q_proj),
            (Own::K, &mut a.k_proj),
            (Own::V, &mut a.v_proj),
            (Own::O, &mut a.o_proj),
            (Own::Gate, &mut f.gate),
            (Own::Up, &mut f.up),
            (Own::Down, &mut f.down),
        ];
        let vectors = [
            (Own::InputNorm, Some(input_norm)),
            (Own::PostNorm, Some(post_norm)),
            (Own::QBias, a.q_bias.as_mut()),
            (Own::KBias, a.k_bias.as_mut()),
            (Own::VBias, a.v_bias.as_mut()),
            (Own::QNorm, a.q_norm.as_mut()),
            (Own::KNorm, a.k_norm.as_mut()),
        ];
        slots.extend(matrices.map(|(own, weight)| (Place::Inner(i, own), Slot::Matrix(weight))));
        let there = vectors.into_iter().filter_map(|(own, vector)| Some((own, vector?)));
        slots.extend(there.map(|(own, vector)| (Place::Inner(i, own), Slot::Vector(vector))));
    }
    if let Join::Norm(norm) = norm {
        slots.push((Place::Norm, Slot::Vector(norm)));
    }
    if let Some(head) = head {
        slots.push((Place::Head, Slot::Matrix(head)));
    }
    slots
}
