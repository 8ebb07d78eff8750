//! Kernels for x86-64 with AVX2, FMA and F16C.

// Fixed-size register arrays are indexed in step with each other; iterators would hide which register is meant.
#![allow(clippy::needless_range_loop)]

pub(crate) mod attention;
pub(crate) mod matmul;
pub(crate) mod matmul_back;
mod panel;
pub(crate) mod product;
pub(crate) mod quantize;
pub(crate) mod screen;
