//! Kernels in plain Rust: on any machine, written to be read, and the oracle of the fast ones.

pub(crate) mod attention;
pub(crate) mod matmul;
pub(crate) mod matmul_back;
pub(crate) mod product;
pub(crate) mod quantize;
pub(crate) mod screen;
