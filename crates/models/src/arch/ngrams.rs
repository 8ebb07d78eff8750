//! The numbers of embeddings of runs of tokens, read from config.json and from GGUF metadata and checked; and the constants
//! of their hashes, which follow from them. Source: transformers' Qwen4-exp.

use qwenkit_formats::{Config, Gguf};
use qwenkit_kernels::{CONV_WIDTH_MAX, ConvShape};

use super::hyper::{Hyper, SIZE_MAX};
use crate::{
    error::Error,
    plan::{NgramPlan, StreamsPlan},
};

/// Bounds beyond which a file is broken or hostile: Qwen4-exp has runs of 3 tokens, 16 tables of 20 million rows in one
/// layer.
const LONGEST_MAX: usize = 16;
const TABLES_MAX: usize = 256;
const TABLE_ROWS_MAX: usize = 1 << 30;
const LAYERS_MAX: usize = 16;
/// Between the seeds of neighbouring layers.
const SEED_STEP: u64 = 10_007;
/// Between the inputs of a stream of mixed numbers: 2^64 divided by the golden ratio. Source: Steele et al. 2014.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// What a file says of its tables; names are those of config.json. All of it may be absent.
#[derive(Debug, Default)]
pub(super) struct NgramNumbers {
    /// Layers with tables, counted from 1.
    ple_layer_ids: Vec<usize>,
    ple_embed_dim: Option<usize>,
    ple_conv_kernel_size: Option<usize>,
    ngram_size: Option<usize>,
    heads_per_ngram: Option<usize>,
    ngram_vocab_size_base: Option<usize>,
    make_ngram_vocab_size_divisible_by: Option<usize>,
    seed: Option<usize>,
    /// The first of several.
    eos_token_id: Option<usize>,
}

impl NgramNumbers {
    /// Keys `ngram.*`. Published files have no such keys yet; these are QwenKit's own.
    pub(super) fn of_gguf(gguf: &Gguf, key: &impl Fn(&str) -> String) -> Result<NgramNumbers, Error> {
        let number = |name: &str| gguf.metadata().usize(&key(name));
        let layers = gguf.metadata().u32s(&key("ngram.layers"))?.unwrap_or_default();
        Ok(NgramNumbers {
            // Counted from 0 there.
            ple_layer_ids: layers.into_iter().map(|i| i as usize + 1).collect(),
            ple_embed_dim: number("ngram.embedding_length")?,
            ple_conv_kernel_size: number("ngram.conv_kernel")?,
            ngram_size: number("ngram.longest")?,
            heads_per_ngram: number("ngram.tables")?,
            ngram_vocab_size_base: number("ngram.table_rows")?,
            make_ngram_vocab_size_divisible_by: number("ngram.rows_divisor")?,
            seed: number("ngram.seed")?,
            eos_token_id: number("ngram.end_token_id")?,
        })
    }

    /// `whole` is the whole file's, where `config` is of the text model in it.
    pub(super) fn of_config(config: &Config, whole: &Config) -> Result<NgramNumbers, Error> {
        let first = |config: &Config| match config.get("eos_token_id") {
            Some(ids) if ids.is_array() => {
                config.usizes("eos_token_id").map(|ids| ids.and_then(|ids| ids.first().copied()))
            }
            _ => config.usize("eos_token_id"),
        };
        let mut layers = config.usizes("ple_layer_ids")?.unwrap_or_default();
        layers.sort_unstable();
        layers.dedup();
        let eos_token_id = match layers.is_empty() {
            // Other architectures' end tokens are not looked at here.
            true => None,
            false => match first(config)? {
                Some(id) => Some(id),
                None => first(whole)?,
            },
        };
        Ok(NgramNumbers {
            ple_layer_ids: layers,
            ple_embed_dim: config.usize("ple_embed_dim")?,
            ple_conv_kernel_size: config.usize("ple_conv_kernel_size")?,
            ngram_size: config.usize("ngram_size")?,
            heads_per_ngram: config.usize("heads_per_ngram")?,
            ngram_vocab_size_base: config.usize("ngram_vocab_size_base")?,
            make_ngram_vocab_size_divisible_by: config.usize("make_ngram_vocab_size_divisible_by")?,
            seed: config.usize("seed")?,
            eos_token_id,
        })
    }
}

impl Hyper {
    /// The tables of each layer, where it has any. Numbers that are absent have transformers' values.
    pub(super) fn ngrams(&self, streams: StreamsPlan) -> Result<Vec<Option<NgramPlan>>, Error> {
        let numbers = &self.ngrams;
        let mut layers = vec![None; self.layers()];
        let layer_count = numbers.ple_layer_ids.len();
        if layer_count > LAYERS_MAX {
            return Err(self.wrong("ple_layer_ids", format!("{layer_count} layers"), &format!("up to {LAYERS_MAX}")));
        }
        if layer_count == 0 {
            return Ok(layers);
        }
        let number =
            |key, found: Option<usize>, default, largest| self.required(key, Some(found.unwrap_or(default)), largest);
        let longest = number("ngram_size", numbers.ngram_size, 3, LONGEST_MAX)?;
        let tables_each = number("heads_per_ngram", numbers.heads_per_ngram, 8, TABLES_MAX)?;
        let tables = (longest - 1) * tables_each;
        if !(1..=TABLES_MAX).contains(&tables) {
            let expected = format!("1 to {TABLES_MAX} tables of runs of 2 and more tokens");
            return Err(self.wrong("ngram_size", longest, &expected));
        }
        let embedded = number("ple_embed_dim", numbers.ple_embed_dim, self.width(), SIZE_MAX)?;
        if !embedded.is_multiple_of(tables) {
            return Err(self.wrong("ple_embed_dim", embedded, &format!("a multiple of the {tables} tables")));
        }
        let width = number("ple_conv_kernel_size", numbers.ple_conv_kernel_size, 4, CONV_WIDTH_MAX)?;
        let base = number("ngram_vocab_size_base", numbers.ngram_vocab_size_base, 20_000_000, TABLE_ROWS_MAX)?;
        let divisor = number(
            "make_ngram_vocab_size_divisible_by",
            numbers.make_ngram_vocab_size_divisible_by,
            128,
            TABLE_ROWS_MAX,
        )?;
        let seed = numbers.seed.unwrap_or(1234) as u64;
        let Some(end) = numbers.eos_token_id.and_then(|id| u32::try_from(id).ok()) else {
            let found = numbers.eos_token_id.map_or("absent".to_owned(), |id| id.to_string());
            return Err(self.wrong("eos_token_id", found, "a token, as runs of tokens end at it"));
        };
        let mut primes = primes_from(base);
        for (n, id) in numbers.ple_layer_ids.iter().enumerate() {
            let found = id.checked_sub(1).and_then(|i| layers.get_mut(i));
            let Some(layer) = found.filter(|_| self.is_linear(id - 1)) else {
                return Err(self.wrong("ple_layer_ids", id, "layers with linear attention, counted from 1"));
            };
            let sizes: Vec<usize> = primes.by_ref().take(tables).collect();
            *layer = Some(NgramPlan {
                longest,
                tables_each,
                row_dim: embedded / tables,
                multipliers: multipliers(self.vocab(), longest, seed.wrapping_add(SEED_STEP * n as u64)),
                rows: sizes.iter().sum::<usize>().next_multiple_of(divisor),
                sizes,
                end,
                conv: ConvShape { width, step: longest, channels: streams.count * self.width() },
            });
        }
        Ok(layers)
    }
}

/// The primes from `start` on.
fn primes_from(start: usize) -> impl Iterator<Item = usize> {
    let is_prime = |n: &usize| *n > 1 && (2..).take_while(|d| d * d <= *n).all(|d| !n.is_multiple_of(d));
    (start..).filter(is_prime)
}

/// `count` odd numbers that no token of `vocab` takes past 2^63 when multiplied.
fn multipliers(vocab: usize, count: usize, seed: u64) -> Vec<i64> {
    let half = (i64::MAX as u64 / vocab.max(1) as u64 / 2).max(1);
    let nth = |i: u64| mixed(seed.wrapping_add(GAMMA.wrapping_mul(i + 1)));
    (0..count as u64).map(|i| (2 * (nth(i) % half) + 1) as i64).collect()
}

/// A number of 64 bits each of which depends on all bits of `x` (splitmix64). Source: Steele et al. 2014.
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(GAMMA);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_are_those_of_the_formulas() {
        assert_eq!(primes_from(211).take(4).collect::<Vec<_>>(), [211, 223, 227, 229]);
        assert_eq!(primes_from(0).take(4).collect::<Vec<_>>(), [2, 3, 5, 7]);
        // The generator's published first outputs for seed 0.
        assert_eq!(mixed(0), 0xE220_A839_7B1D_CDAF);
        assert_eq!(mixed(GAMMA), 0x6E78_9E6A_A1B9_65F4);
        let found = multipliers(384, 3, 1234);
        assert!(found.iter().all(|m| *m > 0 && m % 2 == 1 && m.checked_mul(384).is_some()), "{found:?}");
    }
}
