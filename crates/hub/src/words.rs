//! Sizes and similar names as people read them.
//!
//! Not here: progress bars and terminal colours, which belong to the binary.

/// A byte count in decimal units, as hubs and disks are labelled: `491.4 MB`.
pub fn bytes_in_words(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if bytes < 1000 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut units = UNITS.iter();
    let mut unit = units.next().copied().unwrap_or("kB");
    // 999.95 would print as 1000.0: the next unit is due as soon as one decimal rounds up to it.
    while value >= 999.95 {
        let Some(next) = units.next() else { break };
        value /= 1000.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// Up to three of `candidates` that look like `wanted`, the closest first; none that has little in common with it.
pub(crate) fn nearest<'a>(wanted: &str, candidates: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    // Jaro-Winkler favours a shared beginning, which model names have; below 0.75 the suggestions mislead.
    const LEAST_LIKENESS: f64 = 0.75;
    let wanted = wanted.to_lowercase();
    let mut scored: Vec<(f64, &str)> = candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&wanted, &candidate.to_lowercase()), candidate))
        .filter(|(likeness, _)| *likeness >= LEAST_LIKENESS)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.dedup_by(|a, b| a.1 == b.1);
    scored.into_iter().take(3).map(|(_, candidate)| candidate.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_change_unit_at_the_rounded_thousand() {
        assert_eq!(bytes_in_words(0), "0 bytes");
        assert_eq!(bytes_in_words(999), "999 bytes");
        assert_eq!(bytes_in_words(1000), "1.0 kB");
        assert_eq!(bytes_in_words(999_949), "999.9 kB");
        assert_eq!(bytes_in_words(999_999), "1.0 MB");
        assert_eq!(bytes_in_words(491_400_064), "491.4 MB");
        assert_eq!(bytes_in_words(u64::MAX), "18446.7 PB");
    }

    #[test]
    fn nearest_keeps_what_looks_alike_and_drops_the_rest() {
        let names = ["qwen3:0.6b", "qwen3:4b", "qwen2.5:3b", "qwq:32b"];
        assert_eq!(nearest("QWEN3:4", names).first().map(String::as_str), Some("qwen3:4b"));
        assert!(nearest("zzzzzz", names).is_empty());
        assert!(nearest("qwen", names).len() <= 3);
    }
}
