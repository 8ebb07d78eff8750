//! Floor 1: the arithmetic. Packed weights, matrix products, attention over a paged cache, the ops between them.
//!
//! Contract: an op gives a token the same bits for any batch, any cut of the prompt and any number of threads; between
//! instruction sets the last bits may differ. `unsafe` lives here and in `qwenkit-tensor` only. Nothing here knows a
//! model, a file or a vocabulary, and nothing above asks which instruction set runs.

mod activations;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod attention_back;
mod attention_back_half;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod conv;
mod conv_back;
mod cross_entropy;
mod delta;
mod delta_back;
mod elementwise;
mod elementwise_back;
mod encode;
mod gated;
mod gates;
mod gelu;
mod grouped;
mod head_loss;
mod index;
mod isa;
mod kept;
mod kv;
mod kv_form;
mod lanes;
mod layer_norm;
mod layout;
mod matmul;
mod matmul_back;
mod moe;
mod nth;
mod planes;
mod pool;
mod portable;
#[cfg(target_arch = "x86_64")]
mod prefetch;
mod product;
mod read_through;
mod row_lengths;
mod rows;
mod screen;
mod selected;
mod shared_out;
mod streams;
mod turned;
mod vector;
mod weight;
mod weights_back;

pub use attention::{AttentionSeq, HEAD_DIM_MAX};
pub use attention_back::{AttentionInput, AttentionShape};
pub use blocks::{dequantize_row, is_weight_type};
pub use conv::{CONV_WIDTH_MAX, ConvShape, ConvState, RecurrentSeq};
pub use delta::{DeltaGate, DeltaGates, DeltaInput, DeltaLayer, DeltaShape, DeltaState, HeadOrder, TAKEN_BACK};
pub use delta_back::DeltaGrads;
pub use encode::quantize_row;
pub use gated::GatedUnit;
pub use gelu::Gelu;
pub use grouped::GroupedProduct;
pub use head_loss::HeadLoss;
pub use index::{IndexCache, IndexKeys, Selection};
pub use isa::{Isa, IsaError};
pub use kept::{Kept, KeptType};
pub use kv::{KvCache, KvType, PAGE_TOKENS};
pub use matmul::{Compute, MatmulScratch, Product};
pub use matmul_back::BackProduct;
pub use moe::{Route, RouterRule, Routing};
pub use pool::Pool;
pub use product::{Join, LowRank, Mat};
pub use read_through::read_through;
pub use screen::{BEST_ROWS_MAX, Best};
pub use selected::SelectedKv;
pub use weight::{LoadError, Weight, packed_bytes};
