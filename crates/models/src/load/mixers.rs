//! Loads what looks at other tokens. Matrices that files store interleaved are taken apart here, row by row, so that the
//! blocks see every file alike.

use std::ops::Range;

use qwenkit_kernels::Weight;

use super::tensors::Loader;
use crate::{
    blocks::{Attention, DeltaNet, Indexer},
    error::Error,
    names::{self, Naming, Pair},
    plan::{AttentionPlan, DeltaNetPlan, IndexerPlan},
};

impl Loader<'_> {
    pub(super) fn attention(&mut self, i: usize, plan: &AttentionPlan) -> Result<Attention, Error> {
        let width = self.width;
        let (q, kv) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
        let (q_proj, gate_proj) = match plan.output_gate {
            false => (self.inner(i, names::Q_PROJ, q, width)?, None),
            true => {
                // Rows in turns: a head's queries, its gate, the next head's queries.
                let info = self.find(self.naming.inner(i, names::Q_PROJ), &[&[2 * q, width]])?;
                let of = |part| runs(plan.heads, 2 * plan.head_dim, part * plan.head_dim, plan.head_dim);
                (self.matrix_of(info, width, &of(0))?, Some(self.matrix_of(info, width, &of(1))?))
            }
        };
        let bias = |loader: &mut Self, pair, len| match plan.qkv_bias {
            true => loader.vector(loader.naming.inner(i, pair), len).map(Some),
            false => Ok(None),
        };
        let norm = |loader: &mut Self, pair| match plan.qk_norm {
            true => loader.norm(loader.naming.inner(i, pair), plan.head_dim).map(Some),
            false => Ok(None),
        };
        Ok(Attention {
            plan: plan.clone(),
            q_proj,
            gate_proj,
            k_proj: self.inner(i, names::K_PROJ, kv, width)?,
            v_proj: self.inner(i, names::V_PROJ, kv, width)?,
            o_proj: self.inner(i, names::O_PROJ, width, q)?,
            q_bias: bias(self, names::Q_BIAS, q)?,
            k_bias: bias(self, names::K_BIAS, kv)?,
            v_bias: bias(self, names::V_BIAS, kv)?,
            q_norm: norm(self, names::Q_NORM)?,
            k_norm: norm(self, names::K_NORM)?,
            indexer: plan.indexer.map(|indexer| self.indexer(i, indexer)).transpose()?,
        })
    }

    fn indexer(&mut self, i: usize, plan: IndexerPlan) -> Result<Indexer, Error> {
        let (width, k) = (self.width, plan.head_dim);
        let q = plan.heads * k;
        let (q_proj, k_proj) = match self.naming {
            Naming::Gguf => (self.inner(i, names::INDEX_Q, q, width)?, self.inner(i, names::INDEX_K, k, width)?),
            Naming::HuggingFace { .. } => {
                // The heads' queries, then the key.
                let info = self.find(self.naming.inner(i, names::INDEX_Q), &[&[q + k, width]])?;
                let [q, k] = [0..q, q..q + k].map(|rows| self.matrix_of(info, width, std::slice::from_ref(&rows)));
                (q?, k?)
            }
        };
        Ok(Indexer {
            plan,
            q_proj,
            k_proj,
            q_norm: self.norm(self.naming.inner(i, names::INDEX_Q_NORM), k)?,
            k_norm: self.norm(self.naming.inner(i, names::INDEX_K_NORM), k)?,
        })
    }

    pub(super) fn delta_net(&mut self, i: usize, plan: &DeltaNetPlan) -> Result<DeltaNet, Error> {
        let (width, shape) = (self.width, plan.shape);
        let (channels, values, heads) = (shape.channels(), shape.value_width(), shape.value_heads);
        let group = heads / shape.key_heads;
        let has = |loader: &Self, pair| loader.has(&loader.naming.inner(i, pair));
        let (in_qkv, in_z) = if has(self, names::IN_QKV) || !has(self, names::IN_QKVZ) {
            (self.inner(i, names::IN_QKV, channels, width)?, self.inner(i, names::IN_Z, values, width)?)
        } else {
            // For each key head in turn: its q, its k, the v of its value heads, their z.
            let info = self.find(self.naming.inner(i, names::IN_QKVZ), &[&[channels + values, width]])?;
            let (k, v) = (shape.key_dim, group * shape.value_dim);
            let of = |start, len| runs(shape.key_heads, 2 * (k + v), start, len);
            let qkv = [of(0, k), of(k, k), of(2 * k, v)].concat();
            (self.matrix_of(info, width, &qkv)?, self.matrix_of(info, width, &of(2 * k + v, v))?)
        };
        let (in_b, in_a) = if has(self, names::IN_B) || !has(self, names::IN_BA) {
            (self.inner(i, names::IN_B, heads, width)?, self.inner(i, names::IN_A, heads, width)?)
        } else {
            let info = self.find(self.naming.inner(i, names::IN_BA), &[&[2 * heads, width]])?;
            let of = |part| runs(shape.key_heads, 2 * group, part * group, group);
            (self.matrix_of(info, width, &of(0))?, self.matrix_of(info, width, &of(1))?)
        };
        let mut rate = self.inner_vector(i, names::RATE, heads)?;
        if self.naming != Naming::Gguf {
            rate.iter_mut().for_each(|a| *a = -a.exp());
        }
        Ok(DeltaNet {
            plan: *plan,
            in_qkv,
            in_z,
            in_b,
            in_a,
            conv: self.conv(i, names::CONV, channels, plan.conv_width)?,
            fade_bias: self.inner_vector(i, names::FADE_BIAS, heads)?,
            rate,
            norm: self.inner_vector(i, names::DELTA_NORM, shape.value_dim)?,
            out_proj: self.inner_out(i, values)?,
        })
    }

    fn inner_vector(&mut self, i: usize, pair: Pair, len: usize) -> Result<Vec<f32>, Error> {
        self.vector(self.naming.inner(i, pair), len)
    }

    fn inner_out(&mut self, i: usize, values: usize) -> Result<Weight, Error> {
        self.inner(i, names::DELTA_OUT, self.width, values)
    }

    /// A convolution's weights as (conv width, C), from (C, 1, conv width) or (C, conv width).
    pub(super) fn conv(&mut self, i: usize, pair: Pair, channels: usize, conv_width: usize) -> Result<Vec<f32>, Error> {
        let shapes: &[&[usize]] = match self.naming {
            Naming::Gguf => &[&[channels, conv_width], &[channels, 1, conv_width]],
            Naming::HuggingFace { .. } => &[&[channels, 1, conv_width], &[channels, conv_width]],
        };
        let stored = self.plain(self.naming.inner(i, pair), shapes)?;
        Ok((0..conv_width).flat_map(|j| stored.iter().skip(j).step_by(conv_width).copied()).collect())
    }
}

/// Of `count` neighbouring blocks of `block` rows, rows `start..start + len` of each.
fn runs(count: usize, block: usize, start: usize, len: usize) -> Vec<Range<usize>> {
    (0..count).map(|i| i * block + start..i * block + start + len).collect()
}
