//! The tower itself: its weights, and what it computes of an image, block by block.
//!
//! An image is computed alone, its patches in an order and in segments that its grid decides, so its vectors have the same bits
//! whatever else is asked. Sources: Wang et al. 2024 (Qwen2-VL), Bai et al. 2025 (Qwen2.5-VL), transformers' Qwen3-VL.

use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{AttentionSeq, Compute, Gelu, KvCache, KvType, MatmulScratch, PAGE_TOKENS, Product, Weight};
use qwenkit_tensor::{AllocError, DType};

use super::{
    layout::{Layout, between},
    pixels::{Grid, Pixels},
    plan::VisionPlan,
};
use crate::{
    error::Error,
    load::{LoadEvent, load_tower},
    plan::Plan,
};

/// A vision tower in memory, ready to compute. It is never changed.
pub struct Tower {
    pub(crate) plan: VisionPlan,
    /// (D, values of a patch)
    pub(crate) patch: Weight,
    /// (D)
    pub(crate) patch_bias: Option<Vec<f32>>,
    /// Learned positions, (side * side, D)
    pub(crate) table: Option<Vec<f32>>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) merger: Merger,
    /// One for each of the plan's `deepstack`.
    pub(crate) stacked: Vec<Merger>,
}

/// One block: attention, then the feed-forward block.
pub(crate) struct Block {
    pub(crate) norm1: BlockNorm,
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) proj: Linear,
    pub(crate) norm2: BlockNorm,
    pub(crate) ffn: BlockFfn,
}

pub(crate) enum BlockFfn {
    Plain { fc1: Linear, gelu: Gelu, fc2: Linear },
    Gated { gate: Linear, up: Linear, down: Linear },
}

/// A norm's weights.
pub(crate) struct BlockNorm {
    pub(crate) weight: Vec<f32>,
    /// Of layer norms.
    pub(crate) bias: Option<Vec<f32>>,
}

/// A matrix with its bias.
pub(crate) struct Linear {
    pub(crate) weight: Weight,
    pub(crate) bias: Vec<f32>,
}

/// Four patches become a vector of the text model: `fc2(gelu(fc1(patches side by side)))`.
pub(crate) struct Merger {
    /// Over a patch, or over all patches side by side; its length says which.
    pub(crate) norm: BlockNorm,
    pub(crate) fc1: Linear,
    pub(crate) fc2: Linear,
}

/// Memory of one image's inner values, kept for the next image of the same tower.
#[derive(Default)]
pub struct TowerBuffers {
    matmul: MatmulScratch,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    d: Vec<f32>,
    /// Keys and values of one block.
    cache: Option<KvCache>,
}

/// An image on its way through a tower.
pub struct Encoding {
    grid: Grid,
    layout: Layout,
    /// (patches, D)
    x: Vec<f32>,
    /// Angles, (patches, K / 2)
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The block that comes next.
    next: usize,
    /// (tokens, 1 + S, D of the text model), filled from behind.
    out: Vec<f32>,
}

impl Tower {
    /// Loads the tower that lets the text model of `files` see: from `mmproj` where it is given, else from `files` itself.
    /// `text` is the text model's plan.
    ///
    /// # Errors
    /// When there is none, it is another model's, or it is not whole.
    pub fn load(
        files: &ModelFiles,
        mmproj: Option<&ModelFiles>,
        text: &Plan,
        compute: &Compute,
        progress: &mut dyn FnMut(LoadEvent),
    ) -> Result<Tower, Error> {
        let plan = super::vision_plan(files, mmproj, text)?;
        load_tower(plan, mmproj.unwrap_or(files), compute, progress)
    }

    /// The tower's shape.
    pub fn plan(&self) -> &VisionPlan {
        &self.plan
    }

    /// Bytes of the packed weights.
    pub fn weight_bytes(&self) -> usize {
        let linears = self.blocks.iter().flat_map(Block::linears);
        let mergers = [&self.merger].into_iter().chain(&self.stacked).flat_map(|m| [&m.fc1, &m.fc2]);
        self.patch.size_bytes() + linears.chain(mergers).map(|l| l.weight.size_bytes()).sum::<usize>()
    }

    /// All vectors of an image: (tokens, 1 + S, D of the text model).
    ///
    /// # Errors
    /// When the patches are no image of this tower's, or memory is short.
    pub fn encode(&self, compute: &Compute, buffers: &mut TowerBuffers, pixels: &Pixels) -> Result<Vec<f32>, Error> {
        let mut encoding = self.begin(compute, buffers, pixels)?;
        while !self.advance(compute, buffers, &mut encoding)? {}
        Ok(encoding.into_vectors())
    }

    /// Embeds an image's patches.
    ///
    /// # Errors
    /// When they are no image of this tower's.
    pub fn begin(&self, compute: &Compute, buffers: &mut TowerBuffers, pixels: &Pixels) -> Result<Encoding, Error> {
        pixels.check(&self.plan)?;
        let plan = &self.plan;
        let layout = Layout::new(plan, pixels.grid);
        let patches = layout.places.len();
        let values = plan.patch.values();
        let mut x = vec![0.0; patches * plan.width];
        let ordered;
        let pixel_rows = match &layout.order {
            None => &pixels.values,
            Some(order) => {
                let square = plan.patch.merged() * values;
                ordered = order.iter().flat_map(|&i| &pixels.values[i * square..][..square]).copied().collect();
                &ordered
            }
        };
        compute.matmul(&mut buffers.matmul, pixel_rows, &mut [Product { weight: &self.patch, out: &mut x }]);
        if let Some(bias) = &self.patch_bias {
            compute.add_bias(&mut x, bias);
        }
        if let (Some(table), Some(side)) = (&self.table, plan.table_side) {
            add_positions(&mut x, table, side, pixels.grid, &layout.places, plan.width);
        }
        let (cos, sin) = angles(plan, &layout.places);
        let out = vec![0.0; pixels.tokens(&plan.patch) * plan.row_values()];
        Ok(Encoding { grid: pixels.grid, layout, x, cos, sin, next: 0, out })
    }

    /// Computes the next block, and behind the last the merger. Returns whether the image is through.
    ///
    /// # Errors
    /// When memory is short.
    pub fn advance(
        &self,
        compute: &Compute,
        buffers: &mut TowerBuffers,
        encoding: &mut Encoding,
    ) -> Result<bool, Error> {
        let i = encoding.next;
        let Some(block) = self.blocks.get(i) else { return Ok(true) };
        self.attend(compute, buffers, encoding, block, i)?;
        let eps = self.plan.norm_eps;
        let x = &mut encoding.x;
        let normed = sized(&mut buffers.a, x.len());
        block.norm2.apply(compute, x, eps, normed);
        let out = sized(&mut buffers.d, x.len());
        match &block.ffn {
            BlockFfn::Plain { fc1, gelu, fc2 } => {
                let hidden = sized(&mut buffers.b, x.len() / self.plan.width * fc1.bias.len());
                compute.matmul(&mut buffers.matmul, normed, &mut [Product { weight: &fc1.weight, out: hidden }]);
                compute.add_bias(hidden, &fc1.bias);
                compute.gelu(*gelu, hidden, fc1.bias.len());
                compute.matmul(&mut buffers.matmul, hidden, &mut [Product { weight: &fc2.weight, out: &mut *out }]);
                compute.add_bias(out, &fc2.bias);
            }
            BlockFfn::Gated { gate, up, down } => {
                let hidden = x.len() / self.plan.width * gate.bias.len();
                let (b, c) = (sized(&mut buffers.b, hidden), sized(&mut buffers.c, hidden));
                let mut products =
                    [Product { weight: &gate.weight, out: &mut *b }, Product { weight: &up.weight, out: &mut *c }];
                compute.matmul(&mut buffers.matmul, normed, &mut products);
                compute.add_bias(b, &gate.bias);
                compute.add_bias(c, &up.bias);
                compute.silu_mul(b, c, gate.bias.len());
                compute.matmul(&mut buffers.matmul, b, &mut [Product { weight: &down.weight, out: &mut *out }]);
                compute.add_bias(out, &down.bias);
            }
        }
        compute.add(x, out, self.plan.width);
        encoding.next += 1;
        if let Some(k) = self.plan.deepstack.iter().position(|&layer| layer == i) {
            self.merge(compute, buffers, encoding, &self.stacked[k], 1 + k);
        }
        let through = encoding.next == self.blocks.len();
        if through {
            self.merge(compute, buffers, encoding, &self.merger, 0);
        }
        Ok(through)
    }

    /// x += attention of x.
    fn attend(
        &self,
        compute: &Compute,
        buffers: &mut TowerBuffers,
        encoding: &mut Encoding,
        block: &Block,
        i: usize,
    ) -> Result<(), Error> {
        let (plan, head_dim) = (&self.plan, self.plan.head_dim());
        let x = &mut encoding.x;
        let normed = sized(&mut buffers.a, x.len());
        block.norm1.apply(compute, x, plan.norm_eps, normed);
        let (q, k, v) =
            (sized(&mut buffers.b, x.len()), sized(&mut buffers.c, x.len()), sized(&mut buffers.d, x.len()));
        let mut products = [
            Product { weight: &block.q.weight, out: &mut *q },
            Product { weight: &block.k.weight, out: &mut *k },
            Product { weight: &block.v.weight, out: &mut *v },
        ];
        compute.matmul(&mut buffers.matmul, normed, &mut products);
        compute.add_bias(q, &block.q.bias);
        compute.add_bias(k, &block.k.bias);
        compute.add_bias(v, &block.v.bias);
        for x in [&mut *q, &mut *k] {
            compute.rope(x, head_dim, &encoding.cos, &encoding.sin, head_dim / 2);
        }
        let segments = match &plan.windows {
            Some(windows) if !windows.whole[i] => &encoding.layout.windows,
            _ => &encoding.layout.frames,
        };
        let pages: usize = segments.iter().map(|s| s.len().div_ceil(PAGE_TOKENS)).sum();
        let kv_type = kv_type(&self.patch);
        let cache = room(&mut buffers.cache, kv_type, plan.heads, head_dim, pages)?;
        let numbers: Vec<u32> = (0..pages as u32).collect();
        let (mut seqs, mut page) = (Vec::with_capacity(segments.len()), 0);
        for rows in segments {
            let own = &numbers[page..page + rows.len().div_ceil(PAGE_TOKENS)];
            page += own.len();
            let values = rows.start * plan.width..rows.end * plan.width;
            cache.write(compute, own, 0, &k[values.clone()], &v[values]);
            seqs.push(AttentionSeq { rows: rows.clone(), first: 0, pages: own });
        }
        let heads = sized(&mut buffers.a, x.len());
        compute.attention_both_ways(cache, &seqs, 1.0 / (head_dim as f32).sqrt(), (q, heads));
        let out = sized(&mut buffers.b, x.len());
        compute.matmul(&mut buffers.matmul, heads, &mut [Product { weight: &block.proj.weight, out: &mut *out }]);
        compute.add_bias(out, &block.proj.bias);
        compute.add(x, out, plan.width);
        Ok(())
    }

    /// Merges the patches as they are now into part `part` of the image's vectors.
    fn merge(
        &self,
        compute: &Compute,
        buffers: &mut TowerBuffers,
        encoding: &mut Encoding,
        merger: &Merger,
        part: usize,
    ) {
        let (plan, x) = (&self.plan, &encoding.x);
        let normed = sized(&mut buffers.a, x.len());
        merger.norm.apply(compute, x, plan.norm_eps, normed);
        let tokens = encoding.grid.tokens(&plan.patch);
        let hidden = sized(&mut buffers.b, tokens * merger.fc1.bias.len());
        compute.matmul(&mut buffers.matmul, normed, &mut [Product { weight: &merger.fc1.weight, out: hidden }]);
        compute.add_bias(hidden, &merger.fc1.bias);
        compute.gelu(Gelu::Exact, hidden, merger.fc1.bias.len());
        let width = plan.out_width;
        let merged = sized(&mut buffers.c, tokens * width);
        compute.matmul(&mut buffers.matmul, hidden, &mut [Product { weight: &merger.fc2.weight, out: &mut *merged }]);
        compute.add_bias(merged, &merger.fc2.bias);
        // Back from the order of windows to that of the image.
        for (i, vector) in merged.chunks_exact(width).enumerate() {
            let token = encoding.layout.order.as_ref().map_or(i, |order| order[i]);
            encoding.out[token * plan.row_values() + part * width..][..width].copy_from_slice(vector);
        }
    }
}

impl Encoding {
    /// The image's vectors: (tokens, 1 + S, D of the text model).
    ///
    /// They are whole once `advance` has said that the image is through.
    pub fn into_vectors(self) -> Vec<f32> {
        self.out
    }
}

impl Block {
    fn linears(&self) -> Vec<&Linear> {
        let mut all = vec![&self.q, &self.k, &self.v, &self.proj];
        match &self.ffn {
            BlockFfn::Plain { fc1, fc2, .. } => all.extend([fc1, fc2]),
            BlockFfn::Gated { gate, up, down } => all.extend([gate, up, down]),
        }
        all
    }
}

impl BlockNorm {
    fn apply(&self, compute: &Compute, x: &[f32], eps: f32, out: &mut [f32]) {
        match &self.bias {
            Some(bias) => compute.layer_norm(x, &self.weight, bias, eps, out),
            None => compute.rms_norm(x, &self.weight, eps, out),
        }
    }
}

/// `buffer` with exactly `len` elements, whose values are whatever they are.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

/// Keys and values in the precision that the text model's cache has for the same weights.
fn kv_type(weight: &Weight) -> KvType {
    match weight.dtype() {
        DType::F32 | DType::F16 => KvType::F32,
        _ => KvType::F16,
    }
}

/// A cache of at least so many pages.
fn room(
    cache: &mut Option<KvCache>,
    kv_type: KvType,
    heads: usize,
    head_dim: usize,
    pages: usize,
) -> Result<&mut KvCache, AllocError> {
    if cache.as_ref().is_none_or(|cache| cache.pages() < pages) {
        *cache = Some(KvCache::new(kv_type, heads, head_dim, pages)?);
    }
    cache.as_mut().ok_or(AllocError { wanted_bytes: 0 })
}

/// Angles of patches: the first half of a head's pairs turns with the row, the second with the column. Source: transformers.
fn angles(plan: &VisionPlan, places: &[(usize, usize)]) -> (Vec<f32>, Vec<f32>) {
    let quarter = plan.head_dim() / 4;
    let frequency = |i: usize| plan.theta.powf(-(i as f64) / quarter as f64) as f32;
    let frequencies: Vec<f32> = (0..quarter).map(frequency).collect();
    let turn = |place: usize, frequency: &f32| f64::from(place as f32 * frequency).sin_cos();
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for &(row, col) in places {
        for place in [row, col] {
            for (s, c) in frequencies.iter().map(|f| turn(place, f)) {
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
    }
    (cos, sin)
}

/// Adds to each patch the learned position at its place: the table stretched over the image, between four of its rows.
fn add_positions(x: &mut [f32], table: &[f32], side: usize, grid: Grid, places: &[(usize, usize)], width: usize) {
    let row_of = |r: usize, c: usize| &table[(r * side + c) * width..][..width];
    for (x, &(row, col)) in x.chunks_exact_mut(width).zip(places) {
        let (top, bottom, down) = between(row, grid.rows, side);
        let (left, right, across) = between(col, grid.cols, side);
        let corners = [
            (row_of(top, left), (1.0 - down) * (1.0 - across)),
            (row_of(top, right), (1.0 - down) * across),
            (row_of(bottom, left), down * (1.0 - across)),
            (row_of(bottom, right), down * across),
        ];
        for (i, x) in x.iter_mut().enumerate() {
            *x += corners.iter().map(|(row, share)| row[i] * share).sum::<f32>();
        }
    }
}
