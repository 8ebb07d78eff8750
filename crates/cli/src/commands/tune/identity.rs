//! Everything that the numbers of a run depend on, as text: a run goes on only where all of it is as it was.

use std::path::Path;

use qwenkit_train::{Checkpoint, RunSettings, examples_hash};

use super::Optimiser;
use super::training::Course;

/// How much of the forward pass is kept, as a line.
const LAYERS: [&str; 2] = ["layers: all kept", "layers: computed twice"];

/// What a run is made of beside its settings, its data and what it trains.
pub(super) struct Basis {
    /// The SHA-256 of the model's tensors.
    pub(super) model: String,
    /// Of labels.
    pub(super) smoothing: f32,
    /// Of preferences.
    pub(super) beta: f64,
    /// What makes steps of gradients.
    pub(super) optimiser: Optimiser,
    /// Whether layers are computed twice: what is kept is rounded in most models, so that it counts.
    pub(super) sparing: bool,
    /// The instruction set: the last bits of most ops differ between them.
    pub(super) isa: String,
}

/// A line for each thing; `trained` has those of what is trained.
pub(super) fn identity(course: &Course<'_>, trained: &[String], basis: &Basis) -> String {
    let Basis { model, smoothing, beta, optimiser, sparing, isa } = basis;
    let Course { material, settings, team, .. } = course;
    let RunSettings { schedule, batch, seed, step, validate_every, patience, .. } = settings;
    let of_data = [
        format!("data: {}", material.files.iter().map(|(_, sha256)| sha256.as_str()).collect::<Vec<_>>().join(" ")),
        format!("model: {model}"),
        format!(
            "samples: {} to learn from, {} to validate with",
            material.train.len() / material.each(),
            material.valid.len() / material.each()
        ),
        format!("tokens and goals: {}", examples_hash(material.train.iter().chain(&material.valid))),
    ];
    let of_course = [
        format!("lr: {:e}", schedule.rate),
        format!("schedule: {}", schedule.curve.name()),
        format!("warmup: {}", schedule.warmup_steps),
        format!("steps: {}", schedule.steps),
        format!("batch: {batch}"),
        format!("piece tokens: {}", step.piece_tokens),
        format!("optimiser: {}", optimiser.name()),
        format!("weight decay: {}", step.optimiser.weight_decay),
        format!("clip: {}", step.clip.map_or("none".to_owned(), |clip| clip.to_string())),
        format!("smoothing: {smoothing}"),
        format!("beta: {beta}"),
        format!("seed: {seed}"),
        format!("validate every: {validate_every}"),
        format!("patience: {}", patience.map_or("none".to_owned(), |n| n.to_string())),
        LAYERS[usize::from(*sparing)].to_owned(),
        format!("instructions (QWENKIT_ISA): {isa}"),
    ];
    // One share is what every run had before there were several.
    let of_shares = (team.shares() > 1).then(|| format!("shares: {}", team.shares()));
    [&of_data[..], trained, &of_course, of_shares.as_slice()].concat().join("\n")
}

/// Whether the run whose checkpoint is at `path` computes layers twice; `None` where there is none that says it.
pub(super) fn was_sparing(path: &Path) -> Option<bool> {
    let identity = Checkpoint::identity(path)?;
    LAYERS.iter().position(|line| identity.lines().any(|found| found == *line)).map(|place| place == 1)
}
