//! Which instruction set the kernels run on: found once, overridable by `QWENKIT_ISA`.

use std::fmt;
#[cfg(target_arch = "x86_64")]
use std::sync::LazyLock;

/// A family of kernels. Later ones are faster where they are present.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, on any machine; the oracle of the others.
    Portable,
    /// x86-64 with AVX2, FMA and F16C; 8-bit products of AVX-VNNI where the machine has them.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI; products of BF16 pairs where they pay.
    Avx512,
    /// That with AMX: tiles of 8-bit and bf16 products, which the operating system lets this process use.
    Amx,
}

/// `QWENKIT_ISA` names an instruction set that is unknown or that this machine lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IsaError {
    found: String,
    available: Vec<Isa>,
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.available.iter().map(|isa| isa.name()).collect();
        write!(f, "QWENKIT_ISA is `{}`; this machine can run: {}", self.found, names.join(", "))
    }
}

impl std::error::Error for IsaError {}

impl Isa {
    const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx];

    /// The name that `QWENKIT_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }

    /// The instruction sets that this machine has, slowest first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_present()).collect()
    }

    /// The best one present, or the one that `QWENKIT_ISA` names.
    ///
    /// # Errors
    /// When `QWENKIT_ISA` names none that is present.
    pub fn detect() -> Result<Isa, IsaError> {
        let available = Isa::available();
        match std::env::var("QWENKIT_ISA") {
            Ok(found) if !found.is_empty() => {
                let chosen = available.iter().copied().find(|isa| isa.name() == found);
                chosen.ok_or(IsaError { found, available })
            }
            _ => Ok(available.last().copied().unwrap_or(Isa::Portable)),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn is_present(self) -> bool {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        match self {
            Isa::Portable => true,
            Isa::Avx2 => avx2,
            Isa::Avx512 => {
                avx2 && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            Isa::Amx => Isa::Avx512.is_present() && is_x86_feature_detected!("avx512bf16") && crate::amx::is_usable(),
        }
    }

    /// Whether bf16 numbers are multiplied in pairs: on tiles, or by vectors where their instruction is faster than two products
    /// of f32. Elsewhere only weights are bf16, and activations stay in f32.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn pairs_bf16(self) -> bool {
        self == Isa::Amx || self == Isa::Avx512 && is_x86_feature_detected!("avx512bf16") && !*IS_INTEL
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn pairs_bf16(self) -> bool {
        false
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_present(self) -> bool {
        self == Isa::Portable
    }
}

/// Intel's vectors take four times as long for a product of bf16 pairs as for one of f32 (docs/LOG.md, 2026-11-30), AMD's as long.
/// Asked once: in a virtual machine the question is slow.
#[cfg(target_arch = "x86_64")]
static IS_INTEL: LazyLock<bool> = LazyLock::new(|| is_of(b"GenuineIntel"));

/// AMD's from Zen 5 on, by whose measure `prefetch` asks for weights otherwise than elsewhere. Asked once too.
#[cfg(target_arch = "x86_64")]
pub(crate) static IS_ZEN5: LazyLock<bool> = LazyLock::new(|| {
    let signature = std::arch::x86_64::__cpuid(1).eax;
    let family = (signature >> 8 & 15) + (signature >> 20 & 255);
    is_of(b"AuthenticAMD") && family >= 0x1a
});

#[cfg(target_arch = "x86_64")]
fn is_of(vendor: &[u8; 12]) -> bool {
    let own = std::arch::x86_64::__cpuid(0);
    [own.ebx, own.edx, own.ecx].map(u32::to_le_bytes).concat() == vendor
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
