//! How a block is joined to the residual: one stream with a norm before the block, or several that are mixed for it and
//! that it writes to.

use qwenkit_kernels::{Product, Weight};

use super::{BlockBuffers, Context, sized};

/// What stands between the residual and one block.
pub(crate) enum Join {
    /// The weights of a norm: (D)
    Norm(Vec<f32>),
    /// Several streams.
    Streams(Box<Streams>),
}

/// What mixes S streams to one and says how much of the block's result each gets.
pub(crate) struct Streams {
    /// (S, D)
    pub(crate) norm: Vec<f32>,
    /// (rank, S D)
    pub(crate) down: Weight,
    /// (S D, rank)
    pub(crate) up: Weight,
    /// (S, S D); absent behind the last layer, where nothing is written
    pub(crate) inject: Option<Weight>,
    /// S
    pub(crate) count: usize,
}

impl Join {
    pub(crate) fn weight_bytes(&self) -> usize {
        match self {
            Join::Norm(_) => 0,
            Join::Streams(s) => [&s.down, &s.up].into_iter().chain(&s.inject).map(Weight::size_bytes).sum(),
        }
    }

    /// out: (T, D) = the block's input from the residual x: (T, S D).
    pub(crate) fn read(&self, cx: &Context<'_, '_, '_>, buffers: &mut BlockBuffers, x: &[f32], out: &mut [f32]) {
        let streams = match self {
            Join::Norm(weight) => return cx.compute.rms_norm(x, weight, cx.eps, out),
            Join::Streams(streams) => streams,
        };
        let (all, rank) = (streams.norm.len(), streams.down.rows());
        let (tokens, width) = (x.len() / all, all / streams.count);
        let normed = sized(&mut buffers.a, x.len());
        cx.compute.rms_norm_streams(x, &streams.norm, width, cx.eps, normed);
        let low = sized(&mut buffers.b, tokens * rank);
        // `write` takes all of it.
        buffers.inject.resize(streams.inject.as_ref().map_or(0, |_| tokens * streams.count), 0.0);
        let inject = &mut buffers.inject;
        let mut products = vec![Product { weight: &streams.down, out: &mut *low }];
        products.extend(streams.inject.as_ref().map(|weight| Product { weight, out: &mut *inject }));
        cx.compute.matmul(&mut buffers.matmul, normed, &mut products);
        cx.compute.silu_divided(low, streams.count as f32, rank);
        let mix = sized(&mut buffers.c, x.len());
        cx.compute.matmul(&mut buffers.matmul, low, &mut [Product { weight: &streams.up, out: &mut *mix }]);
        cx.compute.mix_streams(mix, normed, width, out);
    }

    /// Adds the block's result y: (T, D) to the residual x: (T, S D). The input of the same tokens was read before.
    pub(crate) fn write(&self, cx: &Context<'_, '_, '_>, buffers: &BlockBuffers, x: &mut [f32], y: &[f32]) {
        match self {
            Join::Norm(weight) => cx.compute.add(x, y, weight.len()),
            Join::Streams(streams) => {
                cx.compute.add_to_streams(x, y, &buffers.inject, streams.norm.len() / streams.count);
            }
        }
    }
}
