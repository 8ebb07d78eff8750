//! Kernels for x86-64 with AMX: matrix products of many tokens on tiles, both ways, all else as with AVX-512.

// Fixed-size register arrays are indexed in step with each other; iterators would hide which register is meant.
#![allow(clippy::needless_range_loop)]

pub(crate) mod attention_back;
pub(crate) mod both_ways;
mod lay;
pub(crate) mod matmul;
mod tile;

use std::{arch::x86_64::__cpuid_count, sync::OnceLock};

/// Whether the machine has tiles of 8-bit and bf16 products, and the operating system lets this process use them.
pub(crate) fn is_usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| {
        // Leaf 7: bf16 products, tiles, 8-bit products (Intel SDM, CPUID).
        const WANTED: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        __cpuid_count(7, 0).edx & WANTED == WANTED && is_permitted()
    })
}

/// Asks Linux for the use of tiles. Their state makes a thread's saved registers 8 KiB larger, so a process has to ask once, for
/// all its threads; a kernel that cannot save it, or does not know the question, says no.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call changes nothing but this permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}
