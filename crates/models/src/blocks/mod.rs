//! The blocks that layers are made of, and what each computes for a batch of tokens.
//!
//! A file each; here what they share. A block has its weights and numbers, and asks nothing else about the model.

mod attention;
mod delta_net;
mod dense;
mod join;
mod moe;
mod mtp;
mod ngrams;

use qwenkit_kernels::{AttentionSeq, Compute, MatmulScratch, RecurrentSeq, Routing, SelectedKv, Selection};
use qwenkit_tensor::TokenId;

pub(crate) use attention::{Attention, Indexer};
pub(crate) use delta_net::DeltaNet;
pub(crate) use dense::DenseFfn;
pub(crate) use join::{Join, Streams};
pub(crate) use moe::{Moe, SHARED, SharedExpert};
pub(crate) use mtp::Mtp;
pub(crate) use ngrams::Ngrams;

use crate::{
    adapter::{Adapted, Module},
    rope::Rope,
    tap::Tap,
    wanted::Wanted,
};

/// One decoder layer.
pub(crate) struct Layer {
    pub(crate) ngrams: Option<Ngrams>,
    pub(crate) before_mixer: Join,
    pub(crate) mixer: MixerBlock,
    pub(crate) before_ffn: Join,
    pub(crate) ffn: FfnBlock,
}

#[allow(clippy::large_enum_variant)] // one per layer; its size does not matter
pub(crate) enum MixerBlock {
    Attention(Attention),
    DeltaNet(DeltaNet),
}

#[allow(clippy::large_enum_variant)] // as above
pub(crate) enum FfnBlock {
    Dense(DenseFfn),
    Moe(Moe),
}

/// What every block of a batch needs.
pub(crate) struct Context<'a, 'b, 'c> {
    pub(crate) compute: &'a Compute,
    pub(crate) layer: usize,
    pub(crate) eps: f32,
    /// (T)
    pub(crate) tokens: &'a [TokenId],
    pub(crate) seqs: &'a [AttentionSeq<'a>],
    /// The same sequences, as recurrent layers see them.
    pub(crate) recurrent: &'a [RecurrentSeq],
    /// Angles of the batch's positions, (T, R)
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    /// R
    pub(crate) pairs: usize,
    /// For angles of positions before the batch.
    pub(crate) rope: &'a Rope,
    /// In the last layer, the rows whose results somebody wants, if not all.
    pub(crate) wanted: Option<&'a Wanted<'a>>,
    pub(crate) adapted: Adapted<'a>,
    pub(crate) tap: &'a mut Option<&'b mut Tap<'c>>,
}

impl Context<'_, '_, '_> {
    /// Adds to `outs`, which side by side are (rows, outputs of `module`), what adapters add for x: (rows, inputs): of the
    /// batch's rows, or in the last layer of the wanted ones.
    fn adapt(&self, module: Module, low: &mut Vec<f32>, x: &[f32], outs: &mut [&mut [f32]]) {
        let seqs = self.wanted.map_or(self.seqs, |wanted| &wanted.seqs);
        self.adapted.add(self.compute, (self.layer, module), seqs, low, (x, outs));
    }

    /// The same for all rows of the batch, in every layer.
    fn adapt_all(&self, module: Module, low: &mut Vec<f32>, x: &[f32], outs: &mut [&mut [f32]]) {
        self.adapted.add(self.compute, (self.layer, module), self.seqs, low, (x, outs));
    }
}

/// Buffers of one block's inner values; kept from batch to batch. What a buffer holds is said where it is used.
#[derive(Default)]
pub(crate) struct BlockBuffers {
    pub(crate) matmul: MatmulScratch,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    d: Vec<f32>,
    e: Vec<f32>,
    /// A x of an adapter: (T, R)
    low: Vec<f32>,
    /// What the streams get of the block that is being computed: (T, S)
    inject: Vec<f32>,
    /// Of the expert that all tokens visit: (T)
    shared_gate: Vec<f32>,
    routing: Routing,
    selection: Selection,
}

/// Where keys and values that queries choose are laid side by side, in models that choose.
pub(crate) type Room<'a> = Option<&'a mut SelectedKv>;

/// `buffer` with exactly `len` elements, whose values are whatever they are.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    // Never shorter than before: growing again would fill it with zeros, on one thread, at every op.
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl Layer {
    pub(crate) fn weight_bytes(&self) -> usize {
        let mixer = match &self.mixer {
            MixerBlock::Attention(a) => a.weight_bytes(),
            MixerBlock::DeltaNet(d) => d.weight_bytes(),
        };
        let ffn = match &self.ffn {
            FfnBlock::Dense(f) => f.weight_bytes(),
            FfnBlock::Moe(m) => m.weight_bytes(),
        };
        let ngrams = self.ngrams.as_ref().map_or(0, Ngrams::weight_bytes);
        ngrams + self.before_mixer.weight_bytes() + mixer + self.before_ffn.weight_bytes() + ffn
    }

    /// Bytes of weights that no single token reads: those of experts it does not go to, and tables.
    pub(crate) fn idle_bytes(&self) -> usize {
        let ffn = match &self.ffn {
            FfnBlock::Dense(_) => 0,
            FfnBlock::Moe(m) => m.idle_bytes(),
        };
        ffn + self.ngrams.as_ref().map_or(0, Ngrams::idle_bytes)
    }
}
