//! Floor 0: what a tensor is made of - element types, shapes, block sizes, big buffers, identifiers.
//!
//! Everything above speaks of tensors in these words. Nothing here computes, reads files or knows a model.

mod buffer;
mod dtype;
mod ids;

pub use buffer::{AllocError, HugeArena, HugeBuf};
pub use dtype::DType;
pub use ids::{SeqId, TokenId};
