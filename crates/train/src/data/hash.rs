//! Hashes that are the same on every machine: which samples are set aside to validate with depends on them.

/// A running hash of numbers. Good at spreading, no defence against anybody.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hash(u64);

impl Hash {
    pub(crate) fn new() -> Hash {
        Hash(0x243F_6A88_85A3_08D3)
    }

    pub(crate) fn add(&mut self, value: u64) {
        self.0 = mixed(self.0.rotate_left(5) ^ value);
    }

    pub(crate) fn finish(self) -> u64 {
        mixed(self.0)
    }
}

/// What SplitMix64's state grows by: the golden ratio's share of 2^64.
pub(crate) const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// SplitMix64's step and finaliser (Steele, Lea, Flood 2014): every bit of the result depends on every bit of the value.
pub(crate) fn mixed(value: u64) -> u64 {
    let mut value = value.wrapping_add(STEP);
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_spread_and_depend_on_the_order() {
        let hash = |values: &[u64]| {
            let mut hash = Hash::new();
            values.iter().for_each(|&value| hash.add(value));
            hash.finish()
        };
        let mut seen: Vec<u64> = (0..10_000).map(|value| hash(&[value])).collect();
        seen.extend([hash(&[]), hash(&[1, 2]), hash(&[2, 1]), hash(&[1, 2, 0])]);
        let high = seen.iter().filter(|&&value| value >> 63 == 1).count();
        assert!((4800..5200).contains(&high), "{high}");
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 10_004);
    }
}
