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

/// A matrix and its bias, if it has one.
type Biased = (Weight, Option<Vec<f32>>);

/// What attention makes of a token.
struct QueriesKeysValues {
    q: Biased,
    /// The output gate.
    gate: Option<Weight>,
    k: Biased,
    v: Biased,
}

impl Loader<'_> {
    pub(super) fn attention(&mut self, i: usize, plan: &AttentionPlan) -> Result<Attention, Error> {
        let width = self.width;
        let norm = |loader: &mut Self, pair| match plan.qk_norm {
            true => loader.norm(loader.naming.inner(i, pair), plan.head_dim).map(Some),
            false => Ok(None),
        };
        let QueriesKeysValues { q: (q_proj, q_bias), gate: gate_proj, k: (k_proj, k_bias), v: (v_proj, v_bias) } =
            match plan.fused_qkv {
                true => self.fused_qkv(i, plan)?,
                false => self.separate_qkv(i, plan)?,
            };
        Ok(Attention {
            plan: plan.clone(),
            q_proj,
            gate_proj,
            k_proj,
            v_proj,
            o_proj: self.inner(i, names::O_PROJ, width, plan.heads * plan.head_dim)?,
            q_bias,
            k_bias,
            v_bias,
            q_norm: norm(self, names::Q_NORM)?,
            k_norm: norm(self, names::K_NORM)?,
            indexer: plan.indexer.map(|indexer| self.indexer(i, indexer)).transpose()?,
        })
    }

    /// A tensor each; queries have their output gates among them, if there are any.
    fn separate_qkv(&mut self, i: usize, plan: &AttentionPlan) -> Result<QueriesKeysValues, Error> {
        let width = self.width;
        let (q, kv) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
        let (q_proj, gate) = match plan.output_gate {
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
        Ok(QueriesKeysValues {
            q: (q_proj, bias(self, names::Q_BIAS, q)?),
            gate,
            k: (self.inner(i, names::K_PROJ, kv, width)?, bias(self, names::K_BIAS, kv)?),
            v: (self.inner(i, names::V_PROJ, kv, width)?, bias(self, names::V_BIAS, kv)?),
        })
    }

    /// One tensor, the rows of queries, keys and values one after the other.
    fn fused_qkv(&mut self, i: usize, plan: &AttentionPlan) -> Result<QueriesKeysValues, Error> {
        let width = self.width;
        let (q, kv) = (plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim);
        let parts = [0..q, q..q + kv, q + kv..q + 2 * kv];
        let info = self.find(self.naming.inner(i, names::QKV_PROJ), &[&[q + 2 * kv, width]])?;
        let bias = match plan.qkv_bias {
            true => Some(self.inner_vector(i, names::QKV_BIAS, q + 2 * kv)?),
            false => None,
        };
        let [q, k, v] = parts.map(|rows| -> Result<_, Error> {
            let weight = self.matrix_of(info, width, std::slice::from_ref(&rows))?;
            Ok((weight, bias.as_ref().map(|bias| bias[rows].to_vec())))
        });
        Ok(QueriesKeysValues { q: q?, gate: None, k: k?, v: v? })
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
