//! Embeddings of runs of the last tokens (PLE): rows of large tables found by hashing, gated by each residual stream, with a
//! short convolution behind. Source: transformers' Qwen4-exp.

use qwenkit_kernels::{Product, RecurrentSeq, Weight};
use qwenkit_tensor::TokenId;

use super::{BlockBuffers, Context, sized};
use crate::{plan::NgramPlan, state::NgramState};

/// The weights of embeddings of runs. E: values of all tables' rows together; S: residual streams.
pub(crate) struct Ngrams {
    pub(crate) plan: NgramPlan,
    /// (rows of all tables, row), only looked up
    pub(crate) table: Weight,
    /// (S D, E)
    pub(crate) key_proj: Weight,
    /// (D, E)
    pub(crate) value_proj: Weight,
    /// (S, D) each
    pub(crate) norm_key: Vec<f32>,
    pub(crate) norm_query: Vec<f32>,
    pub(crate) norm_conv: Vec<f32>,
    /// (conv width, S D), oldest token first
    pub(crate) conv: Vec<f32>,
}

impl Ngrams {
    pub(crate) fn weight_bytes(&self) -> usize {
        self.table.size_bytes() + self.read_bytes()
    }

    /// Bytes that no single token reads: the table less a few rows.
    pub(crate) fn idle_bytes(&self) -> usize {
        self.table.size_bytes()
    }

    fn read_bytes(&self) -> usize {
        self.key_proj.size_bytes() + self.value_proj.size_bytes() + self.conv.len() * size_of::<f32>()
    }

    /// Adds to the residual x: (T, S D); the tokens join the state.
    pub(crate) fn forward(
        &self,
        cx: &Context<'_, '_, '_>,
        state: &mut NgramState,
        buffers: &mut BlockBuffers,
        x: &mut [f32],
    ) {
        let (compute, all, width) = (cx.compute, self.key_proj.rows(), self.value_proj.rows());
        let tokens = x.len() / all;
        let rows = self.rows(cx.tokens, cx.recurrent, state);
        let found = sized(&mut buffers.a, tokens * self.key_proj.cols());
        compute.look_up(&self.table, &rows, found);
        let raw = sized(&mut buffers.b, x.len());
        let value = sized(&mut buffers.c, tokens * width);
        let mut products = [
            Product { weight: &self.key_proj, out: &mut *raw },
            Product { weight: &self.value_proj, out: &mut *value },
        ];
        compute.matmul(&mut buffers.matmul, found, &mut products);
        let key = sized(&mut buffers.a, x.len());
        compute.rms_norm_streams(raw, &self.norm_key, width, cx.eps, key);
        let query = raw;
        compute.rms_norm_streams(x, &self.norm_query, width, cx.eps, query);
        let gated = sized(&mut buffers.d, x.len());
        compute.gate_streams(key, query, value, width, gated);
        let normed = key;
        compute.rms_norm_streams(gated, &self.norm_conv, width, cx.eps, normed);
        let near = query;
        compute.causal_conv_silu(&mut state.conv, cx.recurrent, &self.conv, normed, near);
        compute.add(gated, near, all);
        compute.add(x, gated, all);
    }

    /// Rows of the tables, (T, tables), for the tokens and those before them, which are kept for the next batch.
    fn rows(&self, tokens: &[TokenId], seqs: &[RecurrentSeq], state: &mut NgramState) -> Vec<usize> {
        let kept = self.plan.longest - 1;
        let held = NgramState::held(kept);
        let mut rows = Vec::with_capacity(tokens.len() * self.plan.sizes.len());
        let mut history = Vec::new();
        for seq in seqs {
            let slot = &mut state.tokens[seq.slot * held..(seq.slot + 1) * held];
            let of = |position: usize| slot[position % held];
            let before = (0..kept).map(|i| (seq.first + i).checked_sub(kept).map_or(TokenId(self.plan.end), of));
            history.clear();
            history.extend(before);
            history.extend_from_slice(&tokens[seq.rows.clone()]);
            (kept..history.len()).for_each(|at| self.plan.rows(&history[at - kept..=at], &mut rows));
            for (token, position) in tokens[seq.rows.clone()].iter().zip(seq.first..) {
                slot[position % held] = *token;
            }
        }
        rows
    }
}

impl NgramPlan {
    /// Appends the rows of the runs that end with the last of `history`: (longest). What stands before an end token counts
    /// as end tokens.
    fn rows(&self, history: &[TokenId], rows: &mut Vec<usize>) {
        let mut mixed = 0i64;
        let mut ended = false;
        let mut start = 0;
        for (back, multiplier) in self.multipliers.iter().enumerate() {
            let token = history[history.len() - 1 - back];
            let token = if ended { self.end } else { token.0 };
            // The last token itself may be one: its run goes on before it.
            ended |= back > 0 && token == self.end;
            mixed ^= i64::from(token).wrapping_mul(*multiplier);
            if back == 0 {
                continue;
            }
            let tables = (back - 1) * self.tables_each..back * self.tables_each;
            for size in &self.sizes[tables] {
                // Sizes are rows of a table in memory, far below 2^63.
                rows.push(start + mixed.rem_euclid(*size as i64) as usize);
                start += size;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use qwenkit_kernels::ConvShape;

    use super::*;

    fn plan() -> NgramPlan {
        NgramPlan {
            longest: 3,
            tables_each: 2,
            row_dim: 4,
            multipliers: vec![0x7fff_ffff_ffff_fff1, 11, 13], // 10 of the first are below 0
            sizes: vec![101, 103, 107, 109],
            rows: 420,
            end: 2,
            conv: ConvShape { width: 4, step: 3, channels: 8 },
        }
    }

    #[test]
    fn rows_are_those_of_wrapped_products_and_remainders_from_zero() {
        let plan = plan();
        let mut rows = Vec::new();
        plan.rows(&[5, 7, 10].map(TokenId), &mut rows);
        let product = |token: i128, m: i64| (token * i128::from(m)) as i64;
        let two = product(10, plan.multipliers[0]) ^ (7 * 11);
        let three = two ^ (5 * 13);
        assert!(two < 0, "a negative number is among them");
        let of = |x: i64, n: i64| (((i128::from(x) % i128::from(n)) + i128::from(n)) % i128::from(n)) as usize;
        assert_eq!(rows, [of(two, 101), 101 + of(two, 103), 204 + of(three, 107), 311 + of(three, 109)]);
    }

    #[test]
    fn a_run_does_not_reach_over_an_end_token_but_may_end_with_one() {
        let plan = plan();
        let of = |history: [u32; 3]| {
            let mut rows = Vec::new();
            plan.rows(&history.map(TokenId), &mut rows);
            rows
        };
        assert_eq!(of([5, 2, 9]), of([2, 2, 9]), "what stands before the end token does not count");
        assert_ne!(of([5, 7, 2]), of([2, 7, 2]), "the last token may be one itself");
        assert_ne!(of([5, 7, 9]), of([5, 2, 9]));
    }
}
