//! Values that the forward pass keeps for the way back, in f32 or rounded to bf16.
//!
//! bf16 halves what training takes beside the weights; models whose activations stay in f32 keep f32.

use crate::{lanes::for_each_isa, matmul::Compute, shared_out::SharedOut};

/// How values are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeptType {
    /// As they are.
    #[default]
    F32,
    /// Rounded to the nearest bf16.
    Bf16,
}

/// Kept values; the memory stays for the next ones.
#[derive(Default)]
pub struct Kept {
    len: usize,
    f32: Vec<f32>,
    bf16: Vec<u16>,
}

impl Kept {
    /// Bytes that are held, for what is kept now or was before.
    pub fn held_bytes(&self) -> usize {
        4 * self.f32.capacity() + 2 * self.bf16.capacity()
    }
}

impl KeptType {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            KeptType::F32 => 4,
            KeptType::Bf16 => 2,
        }
    }
}

impl Compute {
    /// Keeps x in place of what was kept.
    pub fn keep(&self, kept: &mut Kept, form: KeptType, x: &[f32]) {
        kept.len = x.len();
        match form {
            KeptType::F32 => {
                kept.f32.clear();
                kept.f32.reserve_exact(x.len());
                kept.f32.extend_from_slice(x);
            }
            KeptType::Bf16 => {
                kept.f32.clear();
                if kept.bf16.len() < x.len() {
                    kept.bf16.reserve_exact(x.len() - kept.bf16.len());
                    kept.bf16.resize(x.len(), 0);
                }
                let to = SharedOut::new(&mut kept.bf16[..x.len()]);
                self.pool.run_split(x.len(), 64, |range| {
                    // SAFETY: the parts of a split do not overlap.
                    let to = unsafe { to.slice(range.start, range.len()) };
                    round_row(self.isa, &x[range], to);
                });
            }
        }
    }

    /// Writes what was kept to `out`.
    ///
    /// # Panics
    /// If it is not of the same length.
    pub fn recall(&self, kept: &Kept, out: &mut [f32]) {
        assert_eq!(kept.len, out.len(), "kept values");
        if kept.f32.len() == kept.len {
            return out.copy_from_slice(&kept.f32);
        }
        let len = out.len();
        let out = SharedOut::new(out);
        self.pool.run_split(len, 64, |range| {
            // SAFETY: as above.
            let out = unsafe { out.slice(range.start, range.len()) };
            widen_row(self.isa, &kept.bf16[range], out);
        });
    }
}

for_each_isa! {
    /// To the nearest, of two the even one; what is no number stays none.
    pub(crate) fn round_row(x: &[f32], to: &mut [u16]) {
        for (to, x) in to.iter_mut().zip(x) {
            let bits = x.to_bits();
            let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
            *to = if x.is_nan() { 0x7fc0 } else { rounded };
        }
    }
}

for_each_isa! {
    pub(crate) fn widen_row(x: &[u16], to: &mut [f32]) {
        for (to, x) in to.iter_mut().zip(x) {
            *to = f32::from_bits(u32::from(*x) << 16);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::Isa;

    #[test]
    fn bf16_is_rounded_as_the_library_rounds_and_f32_is_kept() {
        let mut x: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 10f32.powi(i % 60 - 30)).collect();
        x.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, 1e-40]);
        for isa in Isa::available() {
            let compute = Compute::new(3, isa);
            for len in [0, 1, 65, x.len()] {
                let (mut kept, mut out) = (Kept::default(), vec![0.0; len]);
                compute.keep(&mut kept, KeptType::Bf16, &x[..len]);
                compute.recall(&kept, &mut out);
                for (x, out) in x.iter().zip(&out) {
                    let expected = bf16::from_f32(*x).to_f32();
                    assert!(expected.to_bits() == out.to_bits() || x.is_nan() && out.is_nan(), "{isa}: {x} as {out}");
                }
                compute.keep(&mut kept, KeptType::F32, &x[..len]);
                compute.recall(&kept, &mut out);
                assert!(x.iter().zip(&out).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa}");
            }
        }
    }
}
