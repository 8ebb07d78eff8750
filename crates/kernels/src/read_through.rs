//! Reading memory as products of one token read weights: what a machine's memory is measured by.

/// Reads all of `values`, asking ahead where the products do, and returns their sum.
pub fn read_through(values: &[u64]) -> u64 {
    // Eight sums side by side: one alone would wait for its own last addition and not for memory.
    let mut sums = [0_u64; 8];
    let (lines, rest) = values.as_chunks::<8>();
    for line in lines {
        #[cfg(target_arch = "x86_64")]
        crate::prefetch::ahead(line.as_ptr().cast(), size_of_val(line));
        sums.iter_mut().zip(line).for_each(|(sum, value)| *sum = sum.wrapping_add(*value));
    }
    sums.iter().chain(rest).fold(0, |total, sum| total.wrapping_add(*sum))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_summed() {
        assert_eq!(read_through(&[1; 16]), 16);
        assert_eq!(read_through(&(0..19).collect::<Vec<_>>()), 171);
    }
}
