//! What ranks train in tests: a tiny model, on samples of uneven lengths, in each of the ways that there are.

use std::path::Path;

use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{Compute, Isa};
use qwenkit_models::{Model, Whole};
use qwenkit_tensor::TokenId;
use qwenkit_train::{
    AdamW, AdapterShape, Alone, Curve, Error, Example, Goal, Happening, Learner, Lessons, Outcome, Pair, Place,
    RunSettings, Schedule, StepSettings, Team, USUAL_TARGETS, references, run,
};

fn files() -> ModelFiles {
    ModelFiles::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity/qwen2")).unwrap()
}

fn settings(steps: usize) -> RunSettings {
    RunSettings {
        schedule: Schedule { rate: 1e-2, curve: Curve::Cosine, warmup_steps: 2, steps },
        batch: 6,
        seed: 5,
        step: StepSettings { optimiser: AdamW::default(), clip: Some(1.0), piece_tokens: 40 },
        validate_every: 4,
        patience: Some(3),
        checkpoint_every: 3,
    }
}

/// Sequences of very different lengths, of which very different shares are learnt: a mean of means would be another loss.
fn uneven(count: usize) -> Vec<Example> {
    let example = |i: usize| {
        let len = 6 + (i * 11) % 23;
        Example {
            ids: (0..len).map(|t| TokenId(((20 + 7 * i + t * (1 + i % 3)) % 300) as u32)).collect(),
            goal: Goal::Tokens((0..len).map(|t| t > (i * 5) % len.min(9)).collect()),
        }
    };
    (0..count).map(example).collect()
}

fn labelled(count: usize) -> Vec<Example> {
    let example = |i: usize| Example {
        ids: (0..5 + i % 7)
            .map(|t| TokenId(if t == 2 { 40 + (i % 3) as u32 } else { (i * 13 + t * 5) as u32 % 300 }))
            .collect(),
        goal: Goal::Label((i % 3) as u32),
    };
    (0..count).map(example).collect()
}

/// What is trained, and on what.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Kind {
    Tokens,
    Labels,
    Preferences,
    Whole,
}

/// What a run left: its happenings without times, and all numbers.
#[derive(Debug, PartialEq)]
pub(crate) struct Left {
    pub(crate) losses: Vec<f64>,
    pub(crate) norms: Vec<f64>,
    pub(crate) tokens: Vec<usize>,
    pub(crate) validations: Vec<Outcome>,
    pub(crate) outcome: Outcome,
    pub(crate) values: Vec<u32>,
}

/// A run of one rank, in a folder that all share.
#[allow(clippy::result_large_err)] // one a run
pub(crate) fn trained(kind: Kind, team: Team<'_>, folder: &Path, resume: bool, stop: usize) -> Result<Left, Error> {
    let compute = Compute::new(1, Isa::detect().unwrap());
    let mut model = match kind {
        Kind::Whole => Model::load_plain(&files(), &compute, &mut |_| {}).unwrap(),
        _ => Model::load(&files(), &compute, &mut |_| {}).unwrap(),
    };
    let labels = (kind == Kind::Labels).then_some(3);
    let targets = USUAL_TARGETS.map(str::to_owned).to_vec();
    let shape = AdapterShape { rank: 4, alpha: 8.0, rslora: false, dora: false, targets, from_layer: 0, labels };
    let kept;
    let mut learner = if kind == Kind::Whole {
        let whole = Whole::of(&mut model).unwrap();
        Learner::whole(model, whole, &compute, false)
    } else {
        kept = model;
        let start = shape.start(kept.plan(), 1).unwrap();
        Learner::new(&kept, &compute, start, false)
    };
    learner.team = team;
    let examples = if kind == Kind::Labels { labelled(34) } else { uneven(34) };
    let place = Place { checkpoint: folder.join("checkpoint.safetensors"), identity: format!("{kind:?}") };
    let pairs: Vec<Pair> = if kind == Kind::Preferences {
        let file = folder.join("references.safetensors");
        let leads = references(&mut learner, &examples, 60, (&file, &place.identity), &mut |_| true)?;
        let pair = |([chosen, rejected], reference): (&[Example; 2], f64)| Pair {
            chosen: chosen.clone(),
            rejected: rejected.clone(),
            reference,
        };
        examples.as_chunks().0.iter().zip(leads).map(pair).collect()
    } else {
        Vec::new()
    };
    let lessons = match kind {
        Kind::Preferences => {
            let lessons = |pairs| Lessons::Pairs { pairs, beta: 0.1 };
            (lessons(&pairs[..13]), lessons(&pairs[13..]))
        }
        _ => (examples[..27].into(), examples[27..].into()),
    };
    let (mut losses, mut norms, mut tokens, mut validations) = (vec![], vec![], vec![], vec![]);
    let outcome = run(&mut learner, lessons, &settings(11), Some(&place), resume, &mut |happening| {
        match happening {
            Happening::Step { step, report, .. } => {
                losses.push(report.loss);
                norms.push(report.grad_norm);
                tokens.push(report.tokens);
                return step != stop;
            }
            Happening::Validation { outcome, .. } => validations.push(outcome),
            _ => {}
        }
        true
    })?;
    let values = learner.values().iter().map(|value| value.to_bits()).collect();
    Ok(Left { losses, norms, tokens, validations, outcome, values })
}

pub(crate) fn alone(kind: Kind, shares: usize) -> Left {
    let folder = tempfile::tempdir().unwrap();
    trained(kind, Team::new(&Alone, Some(shares)).unwrap(), folder.path(), false, 0).unwrap()
}
