//! Loads embeddings of runs of tokens: tables in one tensor or in parts, and the constants of their hashes, which must be
//! those that the plan computes.

use qwenkit_formats::TensorInfo;
use qwenkit_kernels::Weight;
use qwenkit_tensor::DType;

use super::tensors::Loader;
use crate::{
    blocks::Ngrams,
    error::Error,
    names::{self, Naming},
    plan::NgramPlan,
};

impl Loader<'_> {
    /// Of a layer with `streams` residual streams.
    pub(super) fn ngrams(&mut self, i: usize, plan: &NgramPlan, streams: usize) -> Result<Ngrams, Error> {
        let (width, all, embedded) = (self.width, streams * self.width, plan.sizes.len() * plan.row_dim);
        let name = |loader: &Self, pair| loader.naming.inner(i, pair);
        if self.naming != Naming::Gguf {
            let starts = plan.sizes.iter().scan(0, |end, size| Some(std::mem::replace(end, *end + *size as i64)));
            let sizes = plan.sizes.iter().map(|size| *size as i64);
            self.constants(name(self, names::NGRAM_MULTIPLIERS), &plan.multipliers)?;
            self.constants(name(self, names::NGRAM_STARTS), &starts.collect::<Vec<_>>())?;
            self.constants(name(self, names::NGRAM_SIZES), &sizes.collect::<Vec<_>>())?;
        }
        Ok(Ngrams {
            plan: plan.clone(),
            table: self.table(i, plan)?,
            key_proj: self.inner(i, names::NGRAM_KEY, all, embedded)?,
            value_proj: self.inner(i, names::NGRAM_VALUE, width, embedded)?,
            norm_key: self.norm(name(self, names::NGRAM_NORM_KEY), all)?,
            norm_query: self.norm(name(self, names::NGRAM_NORM_QUERY), all)?,
            norm_conv: self.norm(name(self, names::NGRAM_NORM_CONV), all)?,
            conv: self.conv(i, names::NGRAM_CONV, all, plan.conv.width)?,
        })
    }

    /// Refuses constants of a file that are not the plan's. A file need not have them.
    fn constants(&mut self, name: String, expected: &[i64]) -> Result<(), Error> {
        if !self.has(&name) {
            return Ok(());
        }
        let info = self.find(name.clone(), &[&[expected.len()]])?;
        if info.dtype != DType::I64 {
            return Err(self.wrong_type(info, "I64"));
        }
        let bytes = self.bytes(info, 0, info.len_bytes)?;
        self.done(info.len_bytes);
        let found: Vec<i64> = bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
        match found == expected {
            true => Ok(()),
            false => Err(Error::Value {
                path: self.files.path().to_owned(),
                key: name,
                found: format!("{found:?}"),
                expected: format!("{expected:?}, as config.json's `seed` and sizes give"),
            }),
        }
    }

    /// The tables, one after the other, from one tensor or from parts `shard_0`, `shard_1` and so on.
    fn table(&mut self, i: usize, plan: &NgramPlan) -> Result<Weight, Error> {
        let whole = match self.naming {
            Naming::Gguf => self.naming.outer(names::NGRAM_TABLE),
            Naming::HuggingFace { .. } => self.naming.inner(i, names::NGRAM_TABLE),
        };
        let part = |p: usize| self.naming.ngram_part(i, p);
        let Some(first) = part(0).filter(|name| self.has(name) && !self.has(&whole)) else {
            return self.matrix(whole, plan.rows, plan.row_dim);
        };
        let names = (1..).map_while(|p| part(p).filter(|name| self.has(name)));
        let names: Vec<String> = [first].into_iter().chain(names).collect();
        let mut parts: Vec<&TensorInfo> = Vec::with_capacity(names.len());
        let mut rows = 0;
        for name in names {
            // Any number of rows will do as long as all parts together have the plan's.
            let found = self.files.tensor(&name).and_then(|t| t.shape.first().copied()).unwrap_or(0);
            parts.push(self.find(name, &[&[found, plan.row_dim]])?);
            rows += found;
        }
        if rows != plan.rows {
            let expected = vec![plan.rows, plan.row_dim];
            let found = vec![rows, plan.row_dim];
            let name = format!("{whole} in {} parts", parts.len());
            return Err(self.place().shape(name, expected, found));
        }
        self.matrix_of_parts(&parts, plan.row_dim)
    }
}
