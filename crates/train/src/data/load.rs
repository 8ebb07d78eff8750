//! Files of data as samples, ready to learn from.
//!
//! Contract: all files have one objective; the numbers of labels depend on the set of labels alone; the division into training
//! and validation depends on what the samples say, never on their order, and equal records stand on one side.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use thiserror::Error;

use super::form::{LabelKeys, Objective};
use super::read::{Source, read_file};
use super::sample::{Encoder, Encoding, EncodingRemarks, Labelled, Pair, Sample, TextSide, record_of};
use super::{Faults, Problem, Record};

/// What to load, and how.
#[derive(Clone, Debug)]
pub struct Loading {
    /// The files, in order.
    pub files: Vec<PathBuf>,
    /// Keys of texts and labels.
    pub labels: LabelKeys,
    /// How records become tokens.
    pub encoding: Encoding,
    /// The labels of the model, where it has them already; then others are faults, and none needs a second sample.
    pub known_labels: Option<Vec<String>>,
}

/// Samples of one objective.
#[derive(Clone, Debug, PartialEq)]
pub enum Samples {
    /// To go on as they do.
    Sft(Vec<Sample>),
    /// To prefer one to the other.
    Preference(Vec<Pair>),
    /// To name their labels.
    Label(Vec<Labelled>),
}

/// Everything that was read.
#[derive(Clone, Debug)]
pub struct Data {
    /// The samples, in the order of the files.
    pub samples: Samples,
    /// The labels, by number; empty for other objectives.
    pub labels: Vec<String>,
    /// The files.
    pub sources: Vec<Source>,
    /// What is worth saying about the way to tokens.
    pub remarks: EncodingRemarks,
}

/// Why data cannot be used.
#[derive(Debug, Error)]
pub enum DataError {
    /// What is wrong with the files, one after the other.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Faults(Vec<Faults>),
    /// Files that ask for different things.
    #[error("{first} holds {first_form}, and {second} {second_form}\nhint: tune with one kind of data at a time")]
    Objectives {
        /// A file.
        first: String,
        /// Its form.
        first_form: &'static str,
        /// Another.
        second: String,
        /// Its form.
        second_form: &'static str,
    },
    /// Nothing is left.
    #[error("no sample is left to learn from: all {left_out} are longer than the context of {limit_tokens} tokens")]
    NothingLeft {
        /// Records that were left out.
        left_out: usize,
        /// The context.
        limit_tokens: usize,
    },
}

impl Samples {
    /// Their number.
    pub fn len(&self) -> usize {
        match self {
            Samples::Sft(samples) => samples.len(),
            Samples::Preference(pairs) => pairs.len(),
            Samples::Label(samples) => samples.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What they teach.
    pub fn objective(&self) -> Objective {
        match self {
            Samples::Sft(_) => Objective::Sft,
            Samples::Preference(_) => Objective::Preference,
            Samples::Label(_) => Objective::Label,
        }
    }

    /// The tokens of each, in order; both answers of a pair together.
    pub fn lengths(&self) -> Vec<usize> {
        match self {
            Samples::Sft(samples) => samples.iter().map(|sample| sample.tokens.len()).collect(),
            Samples::Preference(pairs) => {
                pairs.iter().map(|pair| pair.chosen.tokens.len() + pair.rejected.tokens.len()).collect()
            }
            Samples::Label(samples) => samples.iter().map(|sample| sample.tokens.len()).collect(),
        }
    }

    /// The number of each one's record.
    pub fn records(&self) -> Vec<u64> {
        match self {
            Samples::Sft(samples) => samples.iter().map(|sample| sample.record).collect(),
            Samples::Preference(pairs) => pairs.iter().map(|pair| pair.chosen.record).collect(),
            Samples::Label(samples) => samples.iter().map(|sample| sample.record).collect(),
        }
    }
}

/// Reads files and turns them into samples of the model's tokens. `observe` sees every record, with its file's position and its line.
///
/// # Errors
/// [`DataError`], with all faults of all files up to a bound.
pub fn load(
    loading: &Loading,
    text: TextSide<'_>,
    mut observe: impl FnMut(usize, usize, &Record),
) -> Result<Data, DataError> {
    let mut encoder = Encoder::new(text, loading.encoding);
    let (mut sft, mut pairs, mut labelled) = (Vec::new(), Vec::new(), Vec::new());
    let mut names: Vec<(String, usize)> = Vec::new();
    let (mut sources, mut faults): (Vec<Source>, Vec<Faults>) = (Vec::new(), Vec::new());
    for (file, path) in loading.files.iter().enumerate() {
        let visit = |line: usize, record: Record| {
            observe(file, line, &record);
            match &record {
                Record::Label { text, label } => {
                    if let Some((tokens, cut_tokens)) = encoder.labelled(text)? {
                        let record = record_of(&tokens);
                        labelled.push(Labelled { line, tokens, label: 0, cut_tokens, record });
                        names.push((label.clone(), file));
                    }
                }
                Record::Preference { chosen, rejected } => pairs.extend(encoder.pair(line, chosen, rejected)?),
                Record::Chat(_) | Record::Completion { .. } | Record::Text(_) => {
                    sft.extend(encoder.samples(line, &record)?);
                }
            }
            Ok(())
        };
        match read_file(path, &loading.labels, visit) {
            Ok(source) => sources.push(source),
            Err(fault) => faults.push(fault),
        }
    }
    if !faults.is_empty() {
        return Err(DataError::Faults(faults));
    }
    let objective = one_objective(&sources)?;
    let remarks = encoder.remarks();
    let (samples, labels) = match objective {
        Objective::Sft => (Samples::Sft(sft), Vec::new()),
        Objective::Preference => (Samples::Preference(pairs), Vec::new()),
        Objective::Label => {
            let labels = number_labels(&mut labelled, &names, loading.known_labels.as_deref(), &sources)?;
            (Samples::Label(labelled), labels)
        }
    };
    if samples.is_empty() {
        let limit_tokens = loading.encoding.context_tokens;
        return Err(DataError::NothingLeft { left_out: remarks.left_out, limit_tokens });
    }
    Ok(Data { samples, labels, sources, remarks })
}

fn one_objective(sources: &[Source]) -> Result<Objective, DataError> {
    let Some(first) = sources.first() else { return Ok(Objective::Sft) };
    match sources.iter().find(|source| source.form.objective() != first.form.objective()) {
        None => Ok(first.form.objective()),
        Some(second) => Err(DataError::Objectives {
            first: first.file.clone(),
            first_form: first.form.name(),
            second: second.file.clone(),
            second_form: second.form.name(),
        }),
    }
}

/// Gives samples the numbers of their labels: alphabetical, whole numbers by size.
fn number_labels(
    samples: &mut [Labelled],
    names: &[(String, usize)],
    known: Option<&[String]>,
    sources: &[Source],
) -> Result<Vec<String>, DataError> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    names.iter().for_each(|(name, _)| *counts.entry(name.as_str()).or_default() += 1);
    let labels: Vec<String> = match known {
        Some(known) => known.to_vec(),
        None => {
            let mut labels: Vec<String> = counts.keys().map(|&name| name.to_owned()).collect();
            if labels.iter().all(|label| label.parse::<i64>().is_ok()) {
                labels.sort_by_key(|label| label.parse::<i64>().unwrap_or_default());
            }
            labels
        }
    };
    let numbers: HashMap<&str, usize> = labels.iter().enumerate().map(|(at, label)| (label.as_str(), at)).collect();
    let mut faults: Vec<Faults> = sources.iter().map(|source| Faults::new(source.file.clone())).collect();
    for (sample, (name, file)) in samples.iter_mut().zip(names) {
        let line = sample.line;
        let mut add = |problem| {
            if let Some(faults) = faults.get_mut(*file) {
                faults.add(line, problem);
            }
        };
        match numbers.get(name.as_str()) {
            Some(&number) => sample.label = number,
            None => add(Problem::UnknownLabel { label: name.clone(), near: nearest(name, labels.iter()) }),
        }
        if known.is_none() && counts.get(name.as_str()) == Some(&1) {
            let others = labels.iter().filter(|label| *label != name);
            add(Problem::LabelOnce { label: name.clone(), near: nearest(name, others) });
        }
    }
    if let (None, [label], Some(faults)) = (known, labels.as_slice(), faults.first_mut())
        && faults.is_empty()
    {
        faults.add(0, Problem::OneLabel { label: label.clone() });
    }
    faults.retain(|faults| !faults.is_empty());
    if faults.is_empty() { Ok(labels) } else { Err(DataError::Faults(faults)) }
}

/// The label most like this one, if it is much like it.
fn nearest<'a>(name: &str, labels: impl Iterator<Item = &'a String>) -> Option<String> {
    let likeness = |label: &&String| (strsim::normalized_damerau_levenshtein(name, label) * 1000.0) as u32;
    labels.max_by_key(likeness).filter(|label| likeness(label) >= 800).cloned()
}

/// Which samples are for training and which for validation, as positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Division {
    /// Those to learn from.
    pub train: Vec<usize>,
    /// Those to measure with.
    pub validation: Vec<usize>,
}

/// Sets the `fraction` of the records aside whose numbers, mixed with the seed, are least. Every label keeps a sample to learn from.
pub fn divide(samples: &Samples, fraction: f64, seed: u64) -> Division {
    let keys: Vec<u64> =
        samples.records().iter().map(|record| super::hash::mixed(record ^ super::hash::mixed(seed))).collect();
    let mut distinct = keys.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let wanted = ((distinct.len() as f64 * fraction).round() as usize).min(distinct.len().saturating_sub(1));
    // The keys below the first one that stays.
    let limit = if wanted == 0 { 0 } else { distinct.get(wanted).copied().unwrap_or(0) };
    let mut kept: HashMap<usize, (bool, u64)> = HashMap::new();
    if let Samples::Label(samples) = samples {
        for (sample, &key) in samples.iter().zip(&keys) {
            let (has_training, largest) = kept.entry(sample.label).or_default();
            *has_training |= key >= limit;
            *largest = key.max(*largest);
        }
    }
    let is_last_of_label = |at: usize, key: u64| match samples {
        Samples::Label(samples) => {
            let label = samples.get(at).map(|sample| sample.label).unwrap_or_default();
            kept.get(&label).is_some_and(|&(has_training, largest)| !has_training && key == largest)
        }
        _ => false,
    };
    let (validation, train) =
        (0..keys.len()).partition(|&at| keys.get(at).is_some_and(|&key| key < limit && !is_last_of_label(at, key)));
    Division { train, validation }
}
