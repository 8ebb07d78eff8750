//! Adapters: what is added to a model's matrices for some sequences of a batch, `W x + scale B (A x)`. Source: Hu et al. 2021.
//! With magnitudes each output is then brought to a length of its own (`magnitude`).
//!
//! An adapter's numbers lie in one slice, so that whoever trains it goes through all of them alike. A row's result has the
//! same bits whatever other adapters ride in its batch. Files of adapters are read and written by `qwenkit-formats`; here
//! their modules find their places in a plan, every one or none.

mod file;
mod magnitude;
mod module;

use std::{
    ops::Range,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use qwenkit_kernels::{AttentionSeq, Compute, Join, Mat};

pub use module::Module;

use crate::{error::Error, plan::Plan};

/// An adapter of one model.
pub struct Adapter {
    /// Different for every adapter of the process.
    id: u32,
    /// In order of layers, and of modules in a layer.
    loras: Vec<Lora>,
    /// (layers, modules): places in `loras`
    places: Vec<[Option<usize>; Module::COUNT]>,
    /// A classifier's head, where it has one.
    score: Option<Score>,
    /// All numbers, part after part.
    pub(crate) values: Vec<f32>,
    /// What magnitudes multiply outputs with, made of the values and the model when it is first asked for.
    factors: OnceLock<Vec<f32>>,
}

/// What an adapter adds to one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// The layer.
    pub layer: usize,
    /// The matrix.
    pub module: Module,
    /// R
    pub rank: usize,
    /// What B A is multiplied with.
    pub scale: f32,
    /// Inputs of the matrix.
    pub inputs: usize,
    /// Its outputs.
    pub outputs: usize,
    /// Where its numbers begin.
    at: usize,
    /// With magnitudes, where its factors begin.
    factors_at: Option<usize>,
}

/// A head that gives each label a score from a text's last hidden state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Score {
    /// How many labels.
    pub labels: usize,
    /// D
    pub width: usize,
    at: usize,
}

/// What one module of a new adapter is.
#[derive(Clone, Copy, Debug)]
pub struct LoraShape {
    /// The layer.
    pub layer: usize,
    /// The matrix.
    pub module: Module,
    /// R
    pub rank: usize,
    /// What B A is multiplied with.
    pub scale: f32,
    /// Whether each row of the adapted matrix has a length of its own (DoRA).
    pub magnitudes: bool,
}

impl Lora {
    /// Where A lies in the adapter's values: (inputs, R), the transpose of what files have.
    pub fn a(&self) -> Range<usize> {
        self.at..self.at + self.inputs * self.rank
    }

    /// Where B lies: (R, outputs), the transpose of what files have. Of a matrix that files store interleaved, the outputs
    /// are in the order in which the model computes: queries, then gates.
    pub fn b(&self) -> Range<usize> {
        let at = self.at + self.inputs * self.rank;
        at..at + self.rank * self.outputs
    }

    /// With magnitudes, where these lie: (outputs), in the order of B's.
    pub fn magnitudes(&self) -> Option<Range<usize>> {
        let at = self.b().end;
        self.factors_at.map(|_| at..at + self.outputs)
    }

    /// All its numbers.
    pub fn values(&self) -> Range<usize> {
        self.at..self.magnitudes().map_or(self.b().end, |range| range.end)
    }

    /// Where its factors lie among the adapter's.
    fn factors(&self) -> Option<Range<usize>> {
        self.factors_at.map(|at| at..at + self.outputs)
    }
}

impl Score {
    /// Where the weights lie: (labels, D).
    pub fn weights(&self) -> Range<usize> {
        self.at..self.at + self.labels * self.width
    }
}

impl Adapter {
    /// An adapter of these modules, and of a head for so many labels if any; all numbers are zero, magnitudes too, of which
    /// `Model::set_magnitudes` makes the rows' own lengths.
    ///
    /// # Errors
    /// When the plan has no such module, or one comes twice.
    pub fn zeroed(plan: &Plan, shapes: &[LoraShape], labels: Option<usize>) -> Result<Adapter, Error> {
        let mut shapes = shapes.to_vec();
        shapes.sort_by_key(|s| (s.layer, s.module as usize));
        let mut places = vec![[None; Module::COUNT]; plan.layers.len()];
        let (mut loras, mut at, mut factors) = (Vec::with_capacity(shapes.len()), 0, 0);
        for LoraShape { layer, module, rank, scale, magnitudes } in shapes {
            let wrong = |found: &str, expected: &str| Error::Adapter {
                part: format!("{} of layer {layer}", module.name()),
                found: found.to_owned(),
                expected: expected.to_owned(),
            };
            let Some((inputs, outputs)) = module.shape(plan, layer) else {
                return Err(wrong("no such matrix in the model", "one that the model has"));
            };
            if rank == 0 {
                return Err(wrong("rank 0", "a rank of 1 or more"));
            }
            if places[layer][module as usize].replace(loras.len()).is_some() {
                return Err(wrong("it twice", "each matrix once"));
            }
            let factors_at = magnitudes.then_some(factors);
            factors += if magnitudes { outputs } else { 0 };
            let lora = Lora { layer, module, rank, scale, inputs, outputs, at, factors_at };
            at = lora.values().end;
            loras.push(lora);
        }
        let score = labels.map(|labels| Score { labels, width: plan.width, at });
        at += score.as_ref().map_or(0, |s| s.weights().len());
        static IDS: AtomicU32 = AtomicU32::new(1);
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        Ok(Adapter { id, loras, places, score, values: vec![0.0; at], factors: OnceLock::new() })
    }

    /// A number that no other adapter of the process has.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The first layer of which a matrix is adapted.
    pub fn lowest_layer(&self) -> Option<usize> {
        self.loras.first().map(|lora| lora.layer)
    }

    /// The adapted matrices, in order of layers.
    pub fn loras(&self) -> &[Lora] {
        &self.loras
    }

    /// The classifier's head.
    pub fn score(&self) -> Option<&Score> {
        self.score.as_ref()
    }

    /// All numbers.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All numbers, to be changed.
    pub fn values_mut(&mut self) -> &mut [f32] {
        self.factors = OnceLock::new();
        &mut self.values
    }

    pub(crate) fn lora(&self, layer: usize, module: Module) -> Option<&Lora> {
        self.places[layer][module as usize].map(|place| &self.loras[place])
    }

    /// Adds to `outs`, which side by side are (T, outputs), what `lora` adds for x: (T, inputs), and brings them to their
    /// magnitudes if it has such. `low` becomes A x: (T, R).
    pub(crate) fn add(&self, compute: &Compute, lora: &Lora, x: &[f32], low: &mut [f32], outs: &mut [&mut [f32]]) {
        let (rows, b) = (x.len() / lora.inputs, &self.values[lora.b()]);
        let a = Mat::new(&self.values[lora.a()], lora.inputs, lora.rank);
        compute.product(Mat::new(x, rows, lora.inputs), a, Join::OVER, low);
        let low = Mat::new(low, rows, lora.rank);
        let mut first = 0;
        for out in outs.iter_mut().filter(|out| !out.is_empty()) {
            let width = out.len() / rows;
            let own = Mat::strided(&b[first..], lora.rank, width, lora.outputs);
            compute.product(low, own, Join { alpha: lora.scale, add: true }, out);
            if let Some(factors) = self.factors(lora) {
                compute.scale_columns(out, &factors[first..first + width]);
            }
            first += width;
        }
    }
}

/// The adapters of a batch: each sequence's own, or none.
#[derive(Clone, Copy)]
pub(crate) struct Adapted<'a> {
    /// In the order of the sequences; empty where no sequence has one.
    pub(crate) of_seqs: &'a [Option<&'a Adapter>],
}

impl Adapted<'_> {
    /// Adds to `outs`, which side by side are (rows, outputs of `module`), what the adapters of `seqs`' rows add for x:
    /// (rows, inputs).
    pub(crate) fn add(
        &self,
        compute: &Compute,
        (layer, module): (usize, Module),
        seqs: &[AttentionSeq<'_>],
        low: &mut Vec<f32>,
        (x, outs): (&[f32], &mut [&mut [f32]]),
    ) {
        let mut parts =
            seqs.iter().zip(self.of_seqs).filter_map(|(seq, of)| of.map(|of| (seq.rows.clone(), of))).peekable();
        while let Some((mut rows, adapter)) = parts.next() {
            // Neighbours with the same adapter go together.
            while let Some((next, _)) = parts.next_if(|(next, of)| next.start == rows.end && of.id == adapter.id) {
                rows.end = next.end;
            }
            let Some(lora) = adapter.lora(layer, module).filter(|_| !rows.is_empty()) else { continue };
            let all = x.len() / lora.inputs;
            low.resize(rows.len() * lora.rank, 0.0);
            let x = &x[rows.start * lora.inputs..rows.end * lora.inputs];
            let own = |out: &mut &mut [f32]| {
                let width = out.len() / all;
                rows.start * width..rows.end * width
            };
            match outs {
                [out] => {
                    let own = own(out);
                    adapter.add(compute, lora, x, low, &mut [&mut out[own]]);
                }
                [first, second] => {
                    let (a, b) = (own(first), own(second));
                    adapter.add(compute, lora, x, low, &mut [&mut first[a], &mut second[b]]);
                }
                _ => unreachable!("a module is computed as one or two matrices"),
            }
        }
    }
}
