//! Sixteen f32 that stay in registers: for inner loops over so many sums that the compiler would keep `Lanes` in memory.
//!
//! One implementation for each instruction set; a body that is generic over it has the same operations in the same order on
//! all of them, each rounded once.
//!
//! # Safety
//! Every function here asks that the machine has the implementation's instruction set.

use crate::lanes::{LANES, Lanes};

/// Sixteen values.
pub(crate) trait Vector: Copy {
    /// Sixteen times `x`.
    unsafe fn splat(x: f32) -> Self;
    /// The values at `x`.
    unsafe fn load(x: &Lanes) -> Self;
    /// Writes the values.
    unsafe fn store(self, to: &mut Lanes);
    /// `self * x`
    unsafe fn times(self, x: Self) -> Self;
    /// `self + x * y`, rounded once.
    unsafe fn plus(self, x: Self, y: Self) -> Self;
    /// `self - x`
    unsafe fn minus(self, x: Self) -> Self;
}

impl Vector for Lanes {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Lanes {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(x: &Lanes) -> Lanes {
        *x
    }

    #[inline(always)]
    unsafe fn store(self, to: &mut Lanes) {
        *to = self;
    }

    #[inline(always)]
    unsafe fn times(self, x: Lanes) -> Lanes {
        std::array::from_fn(|i| self[i] * x[i])
    }

    #[inline(always)]
    unsafe fn plus(self, x: Lanes, y: Lanes) -> Lanes {
        std::array::from_fn(|i| x[i].mul_add(y[i], self[i]))
    }

    #[inline(always)]
    unsafe fn minus(self, x: Lanes) -> Lanes {
        std::array::from_fn(|i| self[i] - x[i])
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    //! Two registers of AVX2, and one of AVX-512.

    use std::arch::x86_64::*;

    use super::Vector;
    use crate::lanes::Lanes;

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    impl Vector for Avx2 {
        #[inline(always)]
        unsafe fn splat(x: f32) -> Avx2 {
            // SAFETY: the caller's promise.
            unsafe { Avx2(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }

        #[inline(always)]
        unsafe fn load(x: &Lanes) -> Avx2 {
            // SAFETY: the caller's promise; sixteen values are there.
            unsafe { Avx2(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
        }

        #[inline(always)]
        unsafe fn store(self, to: &mut Lanes) {
            // SAFETY: the caller's promise; there is room for sixteen values.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), self.0);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn times(self, x: Avx2) -> Avx2 {
            // SAFETY: the caller's promise.
            unsafe { Avx2(_mm256_mul_ps(self.0, x.0), _mm256_mul_ps(self.1, x.1)) }
        }

        #[inline(always)]
        unsafe fn plus(self, x: Avx2, y: Avx2) -> Avx2 {
            // SAFETY: the caller's promise.
            unsafe { Avx2(_mm256_fmadd_ps(x.0, y.0, self.0), _mm256_fmadd_ps(x.1, y.1, self.1)) }
        }

        #[inline(always)]
        unsafe fn minus(self, x: Avx2) -> Avx2 {
            // SAFETY: the caller's promise.
            unsafe { Avx2(_mm256_sub_ps(self.0, x.0), _mm256_sub_ps(self.1, x.1)) }
        }
    }

    impl Vector for Avx512 {
        #[inline(always)]
        unsafe fn splat(x: f32) -> Avx512 {
            // SAFETY: the caller's promise.
            unsafe { Avx512(_mm512_set1_ps(x)) }
        }

        #[inline(always)]
        unsafe fn load(x: &Lanes) -> Avx512 {
            // SAFETY: the caller's promise; sixteen values are there.
            unsafe { Avx512(_mm512_loadu_ps(x.as_ptr())) }
        }

        #[inline(always)]
        unsafe fn store(self, to: &mut Lanes) {
            // SAFETY: the caller's promise; there is room for sixteen values.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }

        #[inline(always)]
        unsafe fn times(self, x: Avx512) -> Avx512 {
            // SAFETY: the caller's promise.
            unsafe { Avx512(_mm512_mul_ps(self.0, x.0)) }
        }

        #[inline(always)]
        unsafe fn plus(self, x: Avx512, y: Avx512) -> Avx512 {
            // SAFETY: the caller's promise.
            unsafe { Avx512(_mm512_fmadd_ps(x.0, y.0, self.0)) }
        }

        #[inline(always)]
        unsafe fn minus(self, x: Avx512) -> Avx512 {
            // SAFETY: the caller's promise.
            unsafe { Avx512(_mm512_sub_ps(self.0, x.0)) }
        }
    }
}
