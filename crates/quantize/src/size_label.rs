//! `general.size_label`: a model's size in a few characters, as GGUF files state it: `0.5B`, `8x225K`.

use crate::tensors::Spec;

/// The label of a model with these tensors.
pub(crate) fn size_label(specs: &[Spec]) -> String {
    let (mut total, mut shared, mut expert, mut counts) = (0_u64, 0_u64, 0_u64, Vec::new());
    for spec in specs {
        let values = spec.values() as u64;
        total += values;
        match spec.shape.first().filter(|_| spec.name.contains("_exps.")) {
            Some(&experts) if experts > 0 => {
                expert += values / experts as u64;
                counts.push(experts);
            }
            _ => shared += values,
        }
    }
    match counts.iter().sum::<usize>().checked_div(counts.len()) {
        Some(experts) => format!("{experts}x{}", rounded(shared + expert)),
        None => rounded(total),
    }
}

/// Two digits at least.
fn rounded(count: u64) -> String {
    let units = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")];
    let (scaled, unit) = match units.iter().find(|(size, _)| count as f64 > *size) {
        Some((size, unit)) => (count as f64 / size, *unit),
        None => (count as f64 / 1e3, "K"),
    };
    let digits = if scaled.round() == 0.0 { 0 } else { format!("{}", scaled.round()).len() };
    format!("{scaled:.*}{unit}", 2_usize.saturating_sub(digits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_digits_and_a_unit() {
        for (count, label) in
            [(494_032_768, "494M"), (7_615_616_512, "7.6B"), (173_440, "173K"), (1_543_714_304, "1.5B")]
        {
            assert_eq!(rounded(count), label);
        }
    }
}
