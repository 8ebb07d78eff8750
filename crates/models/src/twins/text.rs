//! The text model's tensors. The order of values in GGUF files is llama.cpp's converter's.

use super::{Builder, Change, Run, Twins};
use crate::{
    arch,
    error::Error,
    names::{self, Naming, Pair},
    plan::{AttentionPlan, DeltaNetPlan, Ffn, IndexerPlan, LayerPlan, Mixer, MoePlan, NgramPlan, Plan, StreamsPlan},
};

/// The shape of a checkpoint's tensor; `None` where it has none of this name, or there is no checkpoint.
type Found<'a> = &'a dyn Fn(&str) -> Option<Vec<usize>>;

pub(super) fn twins(plan: &Plan, naming: Naming, found: Found<'_>) -> Result<Twins, Error> {
    let is_hybrid = arch::is_hybrid(plan.architecture);
    let norm = if is_hybrid { Change::AddOne } else { Change::Keep };
    let mut b = Text { b: Builder::default(), naming, found, plan, is_hybrid, norm, behind: 0 };
    let matrix = [plan.vocab, plan.width];
    b.outer(names::EMBEDDING, &matrix, Change::Keep);
    let tables = plan.layers.iter().filter(|layer| layer.ngrams.is_some()).count();
    if tables > 1 {
        return Err(Error::Value {
            path: std::path::PathBuf::from("GGUF"),
            key: "ple_layer_ids".into(),
            found: format!("{tables} layers"),
            expected: "one at most: GGUF files have one name for such tables".into(),
        });
    }
    for (i, layer) in plan.layers.iter().enumerate() {
        if let Some(streams) = plan.streams {
            b.streams(streams, names::STREAMS_MIXER, &|naming, pair| naming.inner(i, pair));
            b.streams(streams, names::STREAMS_FFN, &|naming, pair| naming.inner(i, pair));
        }
        b.layer(i, layer);
        if let Some(ngrams) = &layer.ngrams {
            b.ngrams(i, ngrams);
        }
    }
    match plan.streams {
        Some(streams) => b.streams(streams, names::STREAMS_OUT, &|naming, pair| naming.outer(pair)),
        None => b.outer(names::NORM, &[plan.width], norm),
    }
    if let Some(layer) = plan.mtp_in_gguf() {
        b.mtp(layer);
    }
    match plan.tied {
        false => b.outer(names::HEAD, &matrix, Change::Keep),
        // Some exports of tied models hold a copy of the embedding as head.
        true => b.b.twins.spare.push(naming.outer(names::HEAD)),
    }
    Ok(b.b.twins)
}

struct Text<'a> {
    b: Builder,
    naming: Naming,
    found: Found<'a>,
    plan: &'a Plan,
    is_hybrid: bool,
    /// What happens to the weights of norms.
    norm: Change,
    /// Blocks of the GGUF file before the first that the checkpoint counts.
    behind: usize,
}

impl Text<'_> {
    /// The name in the GGUF file of a tensor of layer `i`.
    fn made(&self, i: usize, pair: Pair) -> String {
        Naming::Gguf.inner(self.behind + i, pair)
    }

    /// The block that guesses, behind all others.
    fn mtp(&mut self, layer: &LayerPlan) {
        let (plan, naming) = (self.plan, self.naming);
        let (layers, width) = (plan.layers.len(), plan.width);
        for pair in names::MTP_OUTER {
            let is_fc = pair == names::MTP_FC;
            let shape = [width, 2 * width];
            let (shape, change) = if is_fc { (&shape[..], Change::Keep) } else { (&shape[..1], self.norm) };
            self.b.same((naming.mtp(layers, pair), shape), (Naming::Gguf.mtp(layers, pair), shape), change);
        }
        let number;
        (self.naming, number) = naming.of_mtp(layers);
        self.behind = layers - number;
        self.layer(number, layer);
        (self.naming, self.behind) = (naming, 0);
    }

    /// The norms of a layer with one residual stream, its mixer and its feed-forward block.
    fn layer(&mut self, i: usize, layer: &LayerPlan) {
        if self.plan.streams.is_none() {
            self.inner(i, names::INPUT_NORM, &[self.plan.width], self.norm);
            let post = if self.is_hybrid { names::POST_NORM_HYBRID } else { names::POST_NORM };
            self.inner(i, post, &[self.plan.width], self.norm);
        }
        match &layer.mixer {
            Mixer::Attention(attention) => self.attention(i, attention),
            Mixer::DeltaNet(delta) => self.delta_net(i, delta),
        }
        match &layer.ffn {
            Ffn::Dense { width } => self.dense(i, [names::GATE_PROJ, names::UP_PROJ, names::DOWN_PROJ], *width),
            Ffn::Moe(moe) => self.moe(i, moe),
        }
    }

    fn has(&self, name: &str) -> bool {
        (self.found)(name).is_some()
    }

    fn outer(&mut self, pair: Pair, shape: &[usize], change: Change) {
        self.b.same((self.naming.outer(pair), shape), (Naming::Gguf.outer(pair), shape), change);
    }

    fn inner(&mut self, i: usize, pair: Pair, shape: &[usize], change: Change) {
        self.b.same((self.naming.inner(i, pair), shape), (self.made(i, pair), shape), change);
    }

    fn keep(&mut self, i: usize, pair: Pair, shape: &[usize]) {
        self.inner(i, pair, shape, Change::Keep);
    }

    /// A tensor made of runs of one source.
    fn runs(
        &mut self,
        i: usize,
        pair: Pair,
        (from, to): (&[usize], &[usize]),
        unit: usize,
        runs: &[(usize, usize, usize)],
        change: Change,
    ) {
        let source = self.b.source(self.naming.inner(i, pair), from);
        let runs = runs.iter().map(|&(first, count, step)| Run { source, first, count, step }).collect();
        self.b.make(self.made(i, pair), to, unit, runs, change);
    }

    fn dense(&mut self, i: usize, [gate, up, down]: [Pair; 3], f: usize) {
        let width = self.plan.width;
        self.keep(i, gate, &[f, width]);
        self.keep(i, up, &[f, width]);
        self.keep(i, down, &[width, f]);
    }

    fn attention(&mut self, i: usize, plan: &AttentionPlan) {
        let width = self.plan.width;
        let (q, kv) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
        // Gates stand between the queries of heads in both worlds.
        let q_rows = if plan.output_gate { 2 * q } else { q };
        self.keep(i, names::Q_PROJ, &[q_rows, width]);
        self.keep(i, names::K_PROJ, &[kv, width]);
        self.keep(i, names::V_PROJ, &[kv, width]);
        self.keep(i, names::O_PROJ, &[width, q]);
        if plan.qkv_bias {
            self.keep(i, names::Q_BIAS, &[q]);
            self.keep(i, names::K_BIAS, &[kv]);
            self.keep(i, names::V_BIAS, &[kv]);
        }
        if plan.qk_norm {
            self.inner(i, names::Q_NORM, &[plan.head_dim], self.norm);
            self.inner(i, names::K_NORM, &[plan.head_dim], self.norm);
        }
        if let Some(IndexerPlan { heads, head_dim, .. }) = plan.indexer {
            let (queries, both) = (heads * head_dim, [(heads + 1) * head_dim, width]);
            let keep = Change::Keep;
            self.runs(i, names::INDEX_Q, (&both, &[queries, width]), width, &[(0, queries, 1)], keep);
            self.runs(i, names::INDEX_K, (&both, &[head_dim, width]), width, &[(queries, head_dim, 1)], keep);
            self.inner(i, names::INDEX_Q_NORM, &[head_dim], self.norm);
            self.inner(i, names::INDEX_K_NORM, &[head_dim], self.norm);
        }
    }

    fn delta_net(&mut self, i: usize, plan: &DeltaNetPlan) {
        let (width, shape) = (self.plan.width, plan.shape);
        let (channels, values, heads) = (shape.channels(), shape.value_width(), shape.value_heads);
        let (key_heads, dim) = (shape.key_heads, shape.value_dim);
        let keys = channels - values;
        let group = heads / key_heads;
        // Value heads stand by key head in checkpoints. GGUF files of all but the first hybrid have them in turns: the first
        // of every key head, the second of every key head.
        let tiled = self.plan.architecture != "qwen3_next";
        let in_turns = |start: usize, rows: usize| -> Vec<(usize, usize, usize)> {
            let head = |j: usize| if tiled { j % key_heads * group + j / key_heads } else { j };
            let before = (start > 0).then_some((0, start, 1));
            before.into_iter().chain((0..heads).map(|j| (start + head(j) * rows, rows, 1))).collect()
        };
        let joined = match self.has(&self.naming.inner(i, names::IN_QKVZ)) {
            true => true,
            false => !tiled && !self.has(&self.naming.inner(i, names::IN_QKV)),
        };
        let keep = Change::Keep;
        if joined && !tiled {
            // For each key head in turn: its q, its k, the v of its value heads, their z.
            let source = self.b.source(self.naming.inner(i, names::IN_QKVZ), &[channels + values, width]);
            let (k, v) = (shape.key_dim, group * dim);
            let of = |start: usize, len: usize| {
                (0..key_heads).map(move |h| Run { source, first: h * 2 * (k + v) + start, count: len, step: 1 })
            };
            let qkv = of(0, k).chain(of(k, k)).chain(of(2 * k, v)).collect();
            let z = of(2 * k + v, v).collect();
            self.b.make(self.made(i, names::IN_QKV), &[channels, width], width, qkv, keep);
            self.b.make(self.made(i, names::IN_Z), &[values, width], width, z, keep);
        } else {
            let (qkv, z) = ([channels, width], [values, width]);
            self.runs(i, names::IN_QKV, (&qkv, &qkv), width, &in_turns(keys, dim), keep);
            self.runs(i, names::IN_Z, (&z, &z), width, &in_turns(0, dim), keep);
        }
        let one = [heads, width];
        if !tiled && (joined || self.has(&self.naming.inner(i, names::IN_BA))) {
            self.keep(i, names::IN_BA, &[2 * heads, width]);
        } else {
            self.runs(i, names::IN_B, (&one, &one), width, &in_turns(0, 1), keep);
            self.runs(i, names::IN_A, (&one, &one), width, &in_turns(0, 1), keep);
        }
        let conv = plan.conv_width;
        self.runs(i, names::CONV, (&[channels, 1, conv], &[channels, conv]), conv, &in_turns(keys, dim), keep);
        self.runs(i, names::FADE_BIAS, (&[heads], &[heads]), 1, &in_turns(0, 1), keep);
        self.runs(i, names::RATE, (&[heads], &[heads]), 1, &in_turns(0, 1), Change::MinusExp);
        self.keep(i, names::DELTA_NORM, &[dim]);
        let out = [width, values];
        let columns: Vec<_> = match tiled {
            false => vec![(0, width * heads, 1)],
            true => (0..width).flat_map(|row| (0..group).map(move |r| (row * heads + r, key_heads, group))).collect(),
        };
        self.runs(i, names::DELTA_OUT, (&out, &out), dim, &columns, keep);
    }

    fn moe(&mut self, i: usize, plan: &MoePlan) {
        let (width, experts) = (self.plan.width, plan.router.experts);
        self.keep(i, names::ROUTER, &[experts, width]);
        let first = self.naming.expert(i, 0, "gate_proj").unwrap_or_default();
        let packed = self.naming.inner(i, names::EXPERTS_GATE);
        // What transformers writes for one of them.
        let usually_packed = self.plan.architecture == "qwen3_vl_moe";
        match self.has(&packed) || usually_packed && !self.has(&first) {
            false => self.experts_apart(i, plan),
            true => self.experts_packed(i, plan, &packed),
        }
        if let Some(shared) = plan.shared_width {
            self.keep(i, names::SHARED_ROUTER, &[1, width]);
            self.dense(i, [names::SHARED_GATE, names::SHARED_UP, names::SHARED_DOWN], shared);
        }
    }

    fn experts_apart(&mut self, i: usize, plan: &MoePlan) {
        let (width, f, experts) = (self.plan.width, plan.width, plan.router.experts);
        for (pair, matrix, rows, cols) in [
            (names::EXPERTS_GATE, "gate_proj", f, width),
            (names::EXPERTS_UP, "up_proj", f, width),
            (names::EXPERTS_DOWN, "down_proj", width, f),
        ] {
            let run = |e| {
                let name = self.naming.expert(i, e, matrix).unwrap_or_default();
                Run { source: self.b.source(name, &[rows, cols]), first: 0, count: rows, step: 1 }
            };
            let runs = (0..experts).map(run).collect();
            self.b.make(self.made(i, pair), &[experts, rows, cols], cols, runs, Change::Keep);
        }
    }

    /// Gate above up in one tensor, and down; or both transposed.
    fn experts_packed(&mut self, i: usize, plan: &MoePlan, gate_up: &str) {
        let (width, f, experts) = (self.plan.width, plan.width, plan.router.experts);
        let down = self.naming.inner(i, names::EXPERTS_DOWN);
        let (packed, turned) = ([experts, 2 * f, width], [experts, width, 2 * f]);
        // Where one tensor is square the other tells; both cannot be, as that would ask for D = F and D = 2 F.
        let plain_down = (self.found)(&down).is_none_or(|shape| shape == [experts, width, f]);
        let plain = match (self.found)(gate_up) {
            Some(_) if packed == turned => plain_down,
            Some(shape) => shape != turned,
            None => true,
        };
        let keep = Change::Keep;
        let [to_gate, to_up, to_down] =
            [names::EXPERTS_GATE, names::EXPERTS_UP, names::EXPERTS_DOWN].map(|pair| self.made(i, pair));
        if plain {
            let source = self.b.source(gate_up.to_owned(), &packed);
            let half = |start| {
                (0..experts).map(move |e| Run { source, first: e * 2 * f + start, count: f, step: 1 }).collect()
            };
            self.b.make(to_gate, &[experts, f, width], width, half(0), keep);
            self.b.make(to_up, &[experts, f, width], width, half(f), keep);
            let shape = [experts, width, f];
            self.b.same((down, &shape), (to_down, &shape), keep);
            return;
        }
        // Rows are columns there.
        let columns = |source, rows: usize, cols: usize, wanted: std::ops::Range<usize>| {
            let of = |e: usize| {
                let first = e * rows * cols;
                wanted.clone().map(move |col| Run { source, first: first + col, count: rows, step: cols })
            };
            (0..experts).flat_map(of).collect::<Vec<Run>>()
        };
        let source = self.b.source(gate_up.to_owned(), &turned);
        self.b.make(to_gate, &[experts, f, width], 1, columns(source, width, 2 * f, 0..f), keep);
        self.b.make(to_up, &[experts, f, width], 1, columns(source, width, 2 * f, f..2 * f), keep);
        let source = self.b.source(down, &[experts, f, width]);
        self.b.make(to_down, &[experts, width, f], 1, columns(source, f, width, 0..width), keep);
    }

    fn streams(
        &mut self,
        StreamsPlan { count, rank }: StreamsPlan,
        (norm, down, up, inject): (Pair, Pair, Pair, Option<Pair>),
        name: &dyn Fn(Naming, Pair) -> String,
    ) {
        let all = count * self.plan.width;
        let mut same = |pair, shape: &[usize], change| {
            self.b.same((name(self.naming, pair), shape), (name(Naming::Gguf, pair), shape), change);
        };
        same(norm, &[all], self.norm);
        same(down, &[rank, all], Change::Keep);
        same(up, &[all, rank], Change::Keep);
        if let Some(inject) = inject {
            same(inject, &[count, all], Change::Keep);
        }
        debug_assert!(self.is_hybrid, "several streams come with zero-centred norms");
    }

    fn ngrams(&mut self, i: usize, plan: &NgramPlan) {
        let (width, all) = (self.plan.width, self.plan.stream_count() * self.plan.width);
        let embedded = plan.sizes.len() * plan.row_dim;
        let cols = plan.row_dim;
        // In one tensor or in parts.
        let whole = self.naming.inner(i, names::NGRAM_TABLE);
        let part = |p| self.naming.ngram_part(i, p).and_then(|name| Some(((self.found)(&name)?, name)));
        let parts: Vec<_> = (0..).map_while(part).collect();
        let runs = match self.has(&whole) || parts.is_empty() {
            true => vec![Run { source: self.b.source(whole, &[plan.rows, cols]), first: 0, count: plan.rows, step: 1 }],
            false => parts
                .into_iter()
                .map(|(shape, name)| {
                    let count = shape.first().copied().unwrap_or(0);
                    Run { source: self.b.source(name, &[count, cols]), first: 0, count, step: 1 }
                })
                .collect(),
        };
        // Parts that are not the plan's rows together are a wrong shape of the table.
        let rows = runs.iter().map(|run| run.count).sum::<usize>();
        self.b.make(Naming::Gguf.outer(names::NGRAM_TABLE), &[rows, cols], cols, runs, Change::Keep);
        self.keep(i, names::NGRAM_KEY, &[all, embedded]);
        self.keep(i, names::NGRAM_VALUE, &[width, embedded]);
        for pair in [names::NGRAM_NORM_KEY, names::NGRAM_NORM_QUERY, names::NGRAM_NORM_CONV] {
            self.inner(i, pair, &[all], self.norm);
        }
        let conv = plan.conv.width;
        self.runs(i, names::NGRAM_CONV, (&[all, 1, conv], &[all, conv]), conv, &[(0, all, 1)], Change::Keep);
        // Constants of the hashes follow from the plan.
        for pair in [names::NGRAM_MULTIPLIERS, names::NGRAM_STARTS, names::NGRAM_SIZES] {
            self.b.twins.spare.push(self.naming.inner(i, pair));
        }
    }
}
