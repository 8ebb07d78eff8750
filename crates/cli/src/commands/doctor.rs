//! `qwenkit doctor`: what this machine is and can run; or, with `--conformance` or `--reference`, whether
//! this build computes rightly.
//!
//! Not here: the checks themselves (`conformance`, `reference`), how the facts are found (`machine`).

use std::path::PathBuf;

use clap::Args;
use qwenkit_engine::available_memory_bytes;
use qwenkit_hub::{CatalogueEntry, Store, bytes_in_words, catalogue};
use qwenkit_kernels::{Compute, Isa};
use serde_json::{Value, json};

use super::{conformance, reference};
use crate::args::ComputeArgs;
use crate::{air_gap, locate, machine, opening, terminal};

/// Arguments of `doctor`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit doctor
  qwenkit doctor --conformance DIR          checkpoints below DIR with an expected.safetensors; exit code 1 if any fails
                                            (logits, greedy tokens, and the same bits cut and forked at every position)
  qwenkit doctor --reference FILE.json      a real model against log-probabilities on record; exit code 1 if it is too far")]
pub(crate) struct DoctorArgs {
    /// Hold this build against every checkpoint below DIR whose logits are on record
    #[arg(long, value_name = "DIR")]
    conformance: Option<PathBuf>,
    /// Hold a real model against the log-probabilities and greedy answers in FILE
    #[arg(long, value_name = "FILE", conflicts_with = "conformance")]
    reference: Option<PathBuf>,
    /// The model that --reference is about [default: as for run]
    #[arg(long, value_name = "MODEL", requires = "reference")]
    model: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// What the machine is.
struct Report {
    processor: Option<String>,
    isa: Isa,
    available_isas: Vec<Isa>,
    threads: usize,
    memory_bytes: Option<u64>,
    limit_bytes: Option<u64>,
    available_bytes: Option<u64>,
    bandwidth: Option<f64>,
    store: Store,
}

/// Memory beside the weights: context, buffers, the program.
const BESIDE_WEIGHTS_BYTES: f64 = 600e6;

/// Runs the command.
pub(crate) fn run(args: &DoctorArgs, offline: bool) -> anyhow::Result<()> {
    let (threads, isa) = (args.compute.threads(), opening::isa()?);
    if let Some(dir) = &args.conformance {
        return conformance::run(dir, &Compute::new(threads, isa), args.json);
    }
    if let Some(path) = &args.reference {
        let located = locate::locate(args.model.as_deref(), offline)?;
        return reference::run(path, &located, &Compute::new(threads, isa), args.json);
    }
    let report = Report {
        processor: machine::processor(),
        isa,
        available_isas: Isa::available(),
        threads,
        memory_bytes: machine::memory_bytes(),
        limit_bytes: machine::memory_limit_bytes(),
        available_bytes: available_memory_bytes(),
        bandwidth: machine::read_bandwidth(threads, machine::BUFFER_BYTES),
        store: Store::open(None)?,
    };
    if args.json { terminal::print_json(&report.to_json()) } else { terminal::print(&report.to_text()) }
}

/// Bytes of a model's weights: as the catalogue states them, else from parameters and type. None if neither is known.
fn weight_bytes(entry: &CatalogueEntry) -> Option<f64> {
    if let Some(bytes) = entry.size_bytes {
        return Some(bytes as f64);
    }
    let billions: f64 = entry.parameters.strip_suffix('B')?.parse().ok()?;
    // Bits a weight, with the larger types that such files use for some tensors.
    let bits = match entry.quantisation {
        "Q4_K_M" => 5.0,
        "Q8_0" => 8.6,
        _ => return None,
    };
    Some(billions * 1e9 * bits / 8.0)
}

impl Report {
    fn fits(&self, entry: &CatalogueEntry) -> Option<bool> {
        Some(weight_bytes(entry)? + BESIDE_WEIGHTS_BYTES <= self.available_bytes? as f64)
    }

    /// Names of the catalogue that fit, and those that do not or of which it is unknown.
    fn fitting(&self) -> (Vec<&'static str>, Vec<&'static str>) {
        let (fit, rest): (Vec<_>, Vec<_>) = catalogue().iter().partition(|entry| self.fits(entry) == Some(true));
        let names = |entries: Vec<&'static CatalogueEntry>| entries.into_iter().map(|entry| entry.name).collect();
        (names(fit), names(rest))
    }

    fn to_text(&self) -> String {
        let bytes = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), bytes_in_words);
        let limit = self.limit_bytes.map(|limit| format!(", limited to {}", bytes_in_words(limit)));
        let isas: Vec<_> = self.available_isas.iter().map(|isa| isa.name()).collect();
        let bandwidth = self.bandwidth.map_or("not measured, too little memory".to_owned(), |bandwidth| {
            format!("{:.1} GB/s read by {} threads", bandwidth / 1e9, self.threads)
        });
        let (fit, rest) = self.fitting();
        let list = |names: Vec<&str>| if names.is_empty() { "none".to_owned() } else { names.join(" ") };
        let here = self.store.list().len();
        let rows = [
            ("processor", self.processor.clone().unwrap_or_else(|| "unknown".to_owned())),
            ("kernels", format!("{} (this machine can run: {})", self.isa, isas.join(", "))),
            ("threads", self.threads.to_string()),
            (
                "memory",
                format!(
                    "{}{}, {} available",
                    bytes(self.memory_bytes),
                    limit.unwrap_or_default(),
                    bytes(self.available_bytes)
                ),
            ),
            ("bandwidth", bandwidth),
            ("network", air_gap::probe()),
            ("store", format!("{} ({here} models)", self.store.root().display())),
            ("fits now", list(fit)),
            ("too large", list(rest)),
        ];
        terminal::table(&rows.map(|(key, value)| vec![key.to_owned(), value]))
    }

    fn to_json(&self) -> Value {
        let (fit, _) = self.fitting();
        json!({
            "processor": self.processor,
            "isa": self.isa.name(),
            "available_isas": self.available_isas.iter().map(|isa| isa.name()).collect::<Vec<_>>(),
            "threads": self.threads,
            "memory_bytes": self.memory_bytes,
            "memory_limit_bytes": self.limit_bytes,
            "memory_available_bytes": self.available_bytes,
            "bandwidth_bytes_per_s": self.bandwidth,
            "network": air_gap::probe(),
            "store": self.store.root(),
            "models_that_fit": fit,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_of_the_catalogue_has_a_plausible_size() {
        for entry in catalogue() {
            let billions: f64 = entry.parameters.trim_end_matches('B').parse().expect("a number of billions");
            let bytes = weight_bytes(entry).expect("a known type");
            // Small models carry a large vocabulary, so their files are larger than their names say.
            assert!((0.5..1.3).contains(&(bytes / (billions * 1e9))), "{}: {bytes}", entry.name);
        }
    }
}
