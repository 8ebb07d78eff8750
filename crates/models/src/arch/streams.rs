//! The numbers of residual streams and of the indexer, read from config.json and from GGUF metadata and checked.

use qwenkit_formats::{Config, Gguf};

use super::hyper::{CONTEXT_MAX, HEADS_MAX, Hyper, SIZE_MAX};
use crate::{
    error::Error,
    plan::{IndexerPlan, StreamsPlan},
};

/// Qwen4-exp has 4; each is a residual of its own.
const STREAMS_MAX: usize = 64;
/// Qwen4-exp's are 128.
const INDEX_DIM_MAX: usize = 1 << 12;

/// What a file says of its streams; names are those of config.json. All of it may be absent.
#[derive(Debug, Default)]
pub(super) struct StreamNumbers {
    hc_count: Option<usize>,
    hc_lowrank: Option<usize>,
}

/// What a file says of its indexer. All of it may be absent.
#[derive(Debug, Default)]
pub(super) struct IndexerNumbers {
    indexer_n_heads: Option<usize>,
    indexer_kv_heads: Option<usize>,
    indexer_head_dim: Option<usize>,
    indexer_budget: Option<usize>,
    indexer_compress_ratio: Option<usize>,
}

impl StreamNumbers {
    pub(super) fn of_gguf(gguf: &Gguf, key: &impl Fn(&str) -> String) -> Result<StreamNumbers, Error> {
        let number = |name: &str| gguf.metadata().usize(&key(name));
        Ok(StreamNumbers {
            hc_count: number("hyper_connection.count")?,
            hc_lowrank: number("hyper_connection.low_rank")?,
        })
    }

    pub(super) fn of_config(config: &Config) -> Result<StreamNumbers, Error> {
        Ok(StreamNumbers { hc_count: config.usize("hc_count")?, hc_lowrank: config.usize("hc_lowrank")? })
    }
}

impl IndexerNumbers {
    pub(super) fn of_gguf(gguf: &Gguf, key: &impl Fn(&str) -> String) -> Result<IndexerNumbers, Error> {
        let number = |name: &str| gguf.metadata().usize(&key(name));
        // One entry for each layer, 0 for those without an index; all others are equal in every file.
        let ratios = gguf.metadata().u32s(&key("attention.compress_ratios"))?;
        Ok(IndexerNumbers {
            indexer_n_heads: number("attention.indexer.head_count")?,
            indexer_kv_heads: Some(1),
            indexer_head_dim: number("attention.indexer.key_length")?,
            indexer_budget: number("attention.indexer.top_k")?,
            indexer_compress_ratio: ratios.and_then(|r| r.into_iter().max()).map(|ratio| ratio as usize),
        })
    }

    pub(super) fn of_config(config: &Config) -> Result<IndexerNumbers, Error> {
        Ok(IndexerNumbers {
            indexer_n_heads: config.usize("indexer_n_heads")?,
            indexer_kv_heads: config.usize("indexer_kv_heads")?,
            indexer_head_dim: config.usize("indexer_head_dim")?,
            indexer_budget: config.usize("indexer_budget")?,
            indexer_compress_ratio: config.usize("indexer_compress_ratio")?,
        })
    }
}

impl Hyper {
    /// The residual streams of an architecture that has several.
    pub(super) fn streams(&self) -> Result<StreamsPlan, Error> {
        let count = self.required("hc_count", self.streams.hc_count, STREAMS_MAX)?;
        if count == 1 {
            return Err(self.wrong("hc_count", count, &format!("2 to {STREAMS_MAX}")));
        }
        Ok(StreamsPlan { count, rank: self.required("hc_lowrank", self.streams.hc_lowrank, SIZE_MAX)? })
    }

    /// The indexer of an architecture whose attention layers have one.
    pub(super) fn indexer(&self) -> Result<IndexerPlan, Error> {
        let numbers = &self.indexer;
        let heads = self.required("indexer_n_heads", numbers.indexer_n_heads, HEADS_MAX)?;
        self.required("indexer_kv_heads", numbers.indexer_kv_heads, 1)?;
        let head_dim = self.required("indexer_head_dim", numbers.indexer_head_dim, INDEX_DIM_MAX)?;
        let budget = self.required("indexer_budget", numbers.indexer_budget, CONTEXT_MAX)?;
        let block_tokens = self.required("indexer_compress_ratio", numbers.indexer_compress_ratio, budget)?;
        if !budget.is_multiple_of(block_tokens) {
            let expected = format!("a multiple of the {block_tokens} positions of a block");
            return Err(self.wrong("indexer_budget", budget, &expected));
        }
        let rotated = self.rotated_dims();
        if rotated > head_dim {
            let expected = format!("{rotated} or more, the values that are rotated");
            return Err(self.wrong("indexer_head_dim", head_dim, &expected));
        }
        Ok(IndexerPlan { heads, head_dim, blocks: budget / block_tokens, block_tokens })
    }
}
