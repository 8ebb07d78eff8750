//! Kernels for x86-64 with AVX-512 and VNNI.

// Fixed-size register arrays are indexed in step with each other; iterators would hide which register is meant.
#![allow(clippy::needless_range_loop)]

pub(crate) mod attention;
pub(crate) mod attention_back;
pub(crate) mod elementwise;
pub(crate) mod matmul;
pub(crate) mod matmul_back;
mod plain;
pub(crate) mod product;
pub(crate) mod quantize;
mod reduce;
pub(crate) mod screen;
pub(crate) mod transpose;
pub(crate) mod turned;
pub(crate) mod unit;
