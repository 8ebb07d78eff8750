//! Twins: how every tensor of a GGUF file is made of a checkpoint's, and the way back.
//!
//! Both worlds hold the same numbers. Between them tensors are renamed, cut in parts and put together, rows and columns
//! change places, and a few vectors go through a function. All of it is said here as data: runs of units of neighbouring
//! values, and a change of single values. Reading, converting and writing belong to others.

mod text;
mod tower;

use std::collections::HashMap;

use qwenkit_formats::{Checkpoint, TensorInfo};

use crate::{error::Error, missing::Place, names::Naming, plan::Plan, vision::VisionPlan};

/// All tensors of a model under both their names.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Twins {
    /// Tensors that are read.
    pub sources: Vec<Source>,
    /// Tensors that are made of them.
    pub made: Vec<Twin>,
    /// Tensors that hold nothing that is made, and may be there.
    spare: Vec<String>,
}

/// A tensor that is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name.
    pub name: String,
    /// Outermost axis first. Axes of 1 may be missing in a file.
    pub shape: Vec<usize>,
}

/// A tensor that is made.
#[derive(Clone, Debug, PartialEq)]
pub struct Twin {
    /// Its name.
    pub name: String,
    /// Outermost axis first.
    pub shape: Vec<usize>,
    /// Neighbouring values that stay together, on both sides.
    pub unit: usize,
    /// Where its values stand, one run after the other.
    pub runs: Vec<Run>,
    /// What happens to each value on the way.
    pub change: Change,
}

/// Units of a source: `first`, `first + step` and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index into the sources.
    pub source: usize,
    /// The first unit.
    pub first: usize,
    /// How many units.
    pub count: usize,
    /// Between one unit and the next.
    pub step: usize,
}

/// A function of single values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// None.
    Keep,
    /// `x + 1`: a zero-centred norm's weights become factors.
    AddOne,
    /// `x - 1`
    SubtractOne,
    /// `-exp(x)`: the logarithm of minus a rate becomes the rate.
    MinusExp,
    /// `ln(-x)`
    LogMinus,
}

impl Change {
    /// The function's value.
    pub fn of(self, x: f32) -> f32 {
        match self {
            Change::Keep => x,
            Change::AddOne => x + 1.0,
            Change::SubtractOne => x - 1.0,
            Change::MinusExp => -x.exp(),
            Change::LogMinus => (-x).ln(),
        }
    }

    /// What takes it back.
    pub fn inverse(self) -> Change {
        match self {
            Change::Keep => Change::Keep,
            Change::AddOne => Change::SubtractOne,
            Change::SubtractOne => Change::AddOne,
            Change::MinusExp => Change::LogMinus,
            Change::LogMinus => Change::MinusExp,
        }
    }
}

impl Twins {
    /// GGUF tensors of the text model of `plan` out of `checkpoint`'s.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape, or belongs to nothing.
    pub fn of_checkpoint(checkpoint: &Checkpoint, plan: &Plan) -> Result<Twins, Error> {
        let naming = Naming::of_checkpoint(|name| checkpoint.tensor(name).is_some());
        let shape = |name: &str| checkpoint.tensor(name).map(|t| t.shape.clone());
        let twins = text::twins(plan, naming, &shape)?;
        let is_spare = |name: &str| naming.is_spare(name, plan.spare_blocks(), plan.has_parts_beside);
        let place = place(checkpoint, plan.architecture, Some((plan, naming)));
        twins.check(checkpoint, place, is_spare)?;
        Ok(twins)
    }

    /// GGUF tensors of the text model of `plan` out of those that transformers would write.
    ///
    /// # Errors
    /// When the model cannot be said in GGUF names.
    pub fn of_transformers(plan: &Plan) -> Result<Twins, Error> {
        text::twins(plan, Naming::HuggingFace { body: "model.", head: "" }, &|_| None)
    }

    /// Tensors of a mmproj file out of those of the tower in `checkpoint`.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape, or belongs to nothing.
    pub fn of_tower(checkpoint: &Checkpoint, plan: &VisionPlan) -> Result<Twins, Error> {
        let (twins, scope) = tower::twins(plan, |start| checkpoint.tensors().iter().any(|t| t.name.starts_with(start)));
        let is_spare = |name: &str| !name.starts_with(scope) || name.ends_with("rotary_pos_emb.inv_freq");
        twins.check(checkpoint, place(checkpoint, plan.architecture, None), is_spare)?;
        Ok(twins)
    }

    /// The way back: what was made is read, and what was read is made.
    pub fn inverted(&self) -> Twins {
        let sources = self.made.iter().map(|t| Source { name: t.name.clone(), shape: t.shape.clone() }).collect();
        // Of each source its parts: first unit, units, the tensor that they went into, and where in it.
        let mut parts: Vec<Vec<(usize, usize, usize, usize)>> = vec![Vec::new(); self.sources.len()];
        let mut facts = vec![(1, Change::Keep); self.sources.len()];
        for (index, twin) in self.made.iter().enumerate() {
            let mut at = 0;
            for run in &twin.runs {
                facts[run.source] = (twin.unit, twin.change.inverse());
                let (pieces, len) = if run.step == 1 { (1, run.count) } else { (run.count, 1) };
                for i in 0..pieces {
                    parts[run.source].push((run.first + i * run.step, len, index, at));
                    at += len;
                }
            }
        }
        let made = self.sources.iter().zip(parts).zip(facts).map(|((source, mut parts), (unit, change))| {
            parts.sort_unstable();
            let mut runs: Vec<Run> = Vec::new();
            for (_, count, index, at) in parts {
                match runs.last_mut() {
                    Some(run) if run.source == index && run.first + run.count == at => run.count += count,
                    _ => runs.push(Run { source: index, first: at, count, step: 1 }),
                }
            }
            Twin { name: source.name.clone(), shape: source.shape.clone(), unit, runs, change }
        });
        Twins { sources, made: made.filter(|t| !t.runs.is_empty()).collect(), spare: Vec::new() }
    }

    /// Holds the sources against the tensors of a file.
    fn check(&self, checkpoint: &Checkpoint, place: Place<'_>, is_spare: impl Fn(&str) -> bool) -> Result<(), Error> {
        for Source { name, shape } in &self.sources {
            let Some(info) = checkpoint.tensor(name) else {
                return Err(place.missing(name.clone(), shape.clone()));
            };
            if !info.shape.iter().filter(|n| **n != 1).eq(shape.iter().filter(|n| **n != 1)) {
                return Err(place.shape(name.clone(), shape.clone(), info.shape.clone()));
            }
        }
        let used: std::collections::HashSet<&str> =
            self.sources.iter().map(|s| s.name.as_str()).chain(self.spare.iter().map(String::as_str)).collect();
        let is_unused = |t: &&TensorInfo| !used.contains(t.name.as_str()) && !is_spare(&t.name);
        let mut unused = checkpoint.tensors().iter().filter(is_unused);
        match unused.next() {
            None => Ok(()),
            Some(first) => Err(place.unused(1 + unused.count(), first.name.clone(), |name| used.contains(name))),
        }
    }
}

fn place<'a>(checkpoint: &'a Checkpoint, architecture: &'static str, plan: Option<(&'a Plan, Naming)>) -> Place<'a> {
    Place { path: checkpoint.path(), architecture, tensors: checkpoint.tensors(), plan }
}

/// Collects twins; a source has one entry however often it is used.
#[derive(Default)]
struct Builder {
    twins: Twins,
    index: HashMap<String, usize>,
}

impl Builder {
    fn source(&mut self, name: String, shape: &[usize]) -> usize {
        let sources = &mut self.twins.sources;
        *self.index.entry(name).or_insert_with_key(|name| {
            sources.push(Source { name: name.clone(), shape: shape.to_vec() });
            sources.len() - 1
        })
    }

    fn make(&mut self, name: String, shape: &[usize], unit: usize, runs: Vec<Run>, change: Change) {
        debug_assert_eq!(shape.iter().product::<usize>(), unit * runs.iter().map(|r| r.count).sum::<usize>(), "{name}");
        self.twins.made.push(Twin { name, shape: shape.to_vec(), unit, runs, change });
    }

    /// A tensor that stands whole in one source, whose shape may have other axes.
    fn same(&mut self, from: (String, &[usize]), to: (String, &[usize]), change: Change) {
        let source = self.source(from.0, from.1);
        let unit = to.1.last().copied().unwrap_or(1).max(1);
        let count = to.1.iter().product::<usize>() / unit;
        self.make(to.0, to.1, unit, vec![Run { source, first: 0, count, step: 1 }], change);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_back_leads_back() {
        let mut b = Builder::default();
        let source = b.source("hf".into(), &[6, 4]);
        let runs = [(0, 2, 3), (1, 2, 3), (2, 2, 3)];
        let runs = runs.map(|(first, count, step)| Run { source, first, count, step });
        b.make("gguf".into(), &[6, 4], 4, runs.to_vec(), Change::AddOne);
        let back = b.twins.inverted();
        assert_eq!(back.made.len(), 1);
        assert_eq!((back.made[0].name.as_str(), back.made[0].change), ("hf", Change::SubtractOne));
        // Row i of `hf` is where the runs have put it.
        let at: Vec<usize> = back.made[0].runs.iter().flat_map(|r| (0..r.count).map(|i| r.first + i)).collect();
        assert_eq!(at, [0, 2, 4, 1, 3, 5]);
        assert_eq!(back.inverted().made[0].change, Change::AddOne);
    }

    #[test]
    fn changes_are_taken_back() {
        for change in [Change::Keep, Change::AddOne, Change::SubtractOne] {
            assert_eq!(change.inverse().of(change.of(0.25)), 0.25);
        }
        assert!((Change::LogMinus.of(Change::MinusExp.of(0.25)) - 0.25).abs() < 1e-6);
    }
}
