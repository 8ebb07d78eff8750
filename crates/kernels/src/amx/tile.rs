//! The eight tile registers: up to 16 rows of 64 bytes each.
//!
//! The intrinsics are not stable, so every instruction is assembly. The compiler knows nothing of tiles and never uses them.
//!
//! # Safety
//! Every `unsafe fn` here asks that `Tiles` are set, that shapes fit each other, and that the memory behind a pointer has the
//! tile's rows, so many bytes apart.

use std::{arch::asm, marker::PhantomData};

/// A tile in memory.
pub(super) use crate::avx512::transpose::Square as Room;

/// Rows of a whole tile, and 32-bit lanes of a row.
pub(super) const ROWS: usize = 16;
/// Bytes of a row.
pub(super) const ROW_BYTES: usize = 64;

/// What the instruction that sets shapes reads.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles with shapes, on this thread, until dropped: then the processor may sleep again, and saving registers is short.
pub(super) struct Tiles(PhantomData<*const ()>);

impl Tiles {
    /// Tiles of so many rows and bytes of a row each.
    ///
    /// # Safety
    /// The machine has what `Isa::Amx` stands for.
    pub(super) unsafe fn new(shapes: [(usize, usize); 8]) -> Tiles {
        let mut all = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, (rows, bytes)) in shapes.into_iter().enumerate() {
            (all.rows[i], all.row_bytes[i]) = (rows as u8, bytes as u16);
        }
        // SAFETY: the caller's promise; the assembly only reads the shapes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const all, options(nostack, preserves_flags)) }
        Tiles(PhantomData)
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: `new` was called where this instruction is.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) }
    }
}

/// Tile `T` becomes zero.
#[inline(always)]
pub(super) unsafe fn zero<const T: usize>() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, preserves_flags)) }
}

/// Tile `T` becomes rows that are `step` bytes apart.
#[inline(always)]
pub(super) unsafe fn load<const T: usize>(from: *const u8, step: usize) {
    // SAFETY: the caller's promise; the assembly only reads.
    unsafe {
        asm!("tileloadd tmm{t}, [{from} + {step}*1]", t = const T, from = in(reg) from, step = in(reg) step,
            options(readonly, nostack, preserves_flags));
    }
}

/// Writes tile `T` as rows that are `step` bytes apart.
#[inline(always)]
pub(super) unsafe fn store<const T: usize>(to: *mut u8, step: usize) {
    // SAFETY: the caller's promise, and that it may write there.
    unsafe {
        asm!("tilestored [{to} + {step}*1], tmm{t}", t = const T, to = in(reg) to, step = in(reg) step,
            options(nostack, preserves_flags));
    }
}

/// Adds A B to tile `C`, signed bytes: A is (M, K), B is (K / 4, N, 4), C is (M, N) of i32.
#[inline(always)]
pub(super) unsafe fn add_bytes<const C: usize, const A: usize, const B: usize>() {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("tdpbssd tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
            options(nostack, preserves_flags));
    }
}

/// Adds A B to tile `C`, bf16: A is (M, K), B is (K / 2, N, 2), C is (M, N) of f32. Values next to nothing count as nothing.
#[inline(always)]
pub(super) unsafe fn add_bf16<const C: usize, const A: usize, const B: usize>() {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
            options(nostack, preserves_flags));
    }
}
