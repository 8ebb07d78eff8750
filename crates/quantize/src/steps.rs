//! Merging and exporting, over the steps' common end.
//!
//! Adapters spell names as checkpoints or as GGUF files do; the model's tensors take their names for the merge, and the
//! output's afterwards.

use std::path::Path;

use qwenkit_formats::{Adapter, AdapterNames, ModelFiles};
use qwenkit_models::{Plan, Twins, arch};

use crate::{
    Error,
    blend::{Blended, Method},
    merge::Merged,
    metadata::{tower_plan, unsayable},
    step::{Converted, Start, Step},
    tensors::{Renamed, Stored, Tensors},
    write::Progress,
};

/// How names of a tower's tensors begin in checkpoints.
const TOWERS: [&str; 2] = ["model.visual.", "visual."];

/// What changes a model's weights.
pub enum Change<'a> {
    /// An adapter, and where it lies.
    Adapter(&'a Adapter, &'a Path),
    /// Other models, each with its weight.
    Blend(Vec<(&'a ModelFiles, f32)>, Method),
}

/// Whose names tensors have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum World {
    Checkpoint,
    Gguf,
}

fn world_of(files: &ModelFiles) -> World {
    match files {
        ModelFiles::Checkpoint(_) => World::Checkpoint,
        ModelFiles::Gguf(_) => World::Gguf,
    }
}

impl Step<'_> {
    /// Whether the step writes a GGUF file; a folder otherwise.
    fn writes_gguf(&self) -> bool {
        self.out.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"))
    }

    /// Writes the model in `files` in the other format, or the same one in another type.
    ///
    /// # Errors
    /// As `quantize`.
    pub fn export(&self, files: &ModelFiles, progress: &mut Progress<'_>) -> Result<Converted, Error> {
        self.check(files, self.writes_gguf())?;
        let before = self.prover.map(|prover| prover.before(files)).transpose()?;
        let start = Start { name: "export", files, limit: self.limit(before.as_ref()), before };
        self.finish(start, Box::new(Stored::new(files)), world_of(files), progress)
    }

    /// Writes the model in `base` with the changes in it, one after the other.
    ///
    /// # Errors
    /// As `quantize`; and when a change does not fit the model.
    pub fn merge(
        &self,
        base: &ModelFiles,
        changes: &[Change<'_>],
        progress: &mut Progress<'_>,
    ) -> Result<Converted, Error> {
        self.check(base, self.writes_gguf())?;
        let plan = arch::plan(base)?;
        self.check_tower(base, changes, &plan)?;
        let mut world = world_of(base);
        let mut tensors: Box<dyn Tensors + '_> = Box::new(Stored::new(base));
        for change in changes {
            match change {
                Change::Adapter(adapter, origin) => {
                    let to = match adapter.names {
                        AdapterNames::HuggingFace => World::Checkpoint,
                        AdapterNames::Gguf => World::Gguf,
                    };
                    tensors = renamed(base, tensors, world, to)?;
                    world = to;
                    tensors = Box::new(Merged::new(tensors, adapter, origin, plan.tied)?);
                }
                Change::Blend(others, method) => {
                    let mut list: Vec<(Box<dyn Tensors + '_>, f32)> = Vec::new();
                    for (files, weight) in others {
                        let stored = Box::new(Stored::new(files));
                        list.push((renamed(files, stored, world_of(files), world)?, *weight));
                    }
                    tensors = Box::new(Blended::new(tensors, list, *method)?);
                }
            }
        }
        // A merged adapter answers as the model under it did. Other merges are there to change answers: how far they moved is told,
        // and that every tensor is the one meant is the proof.
        let alone = match changes {
            [Change::Adapter(adapter, _)] => Some(*adapter),
            _ => None,
        };
        let before = self.prover.map(|prover| prover.before_under(base, alone)).transpose()?;
        let limit = match &before {
            Some(before) if before.is_under_adapter() => self.limit(Some(before)),
            _ => f64::INFINITY,
        };
        self.finish(Start { name: "merge", files: base, before, limit }, tensors, world, progress)
    }

    /// A tower has other names in another file than the text: a merge under names that know only the text would leave it as it
    /// was, or out.
    fn check_tower(&self, base: &ModelFiles, changes: &[Change<'_>], plan: &Plan) -> Result<(), Error> {
        let names = |adapter: &'_ Adapter| {
            let all = adapter.modules.iter().map(|m| &m.name).chain(adapter.whole.iter().map(|t| &t.name));
            all.into_iter().any(|name| TOWERS.iter().any(|start| name.starts_with(start)))
        };
        let loses = |change: &Change<'_>| match change {
            Change::Blend(..) => self.writes_gguf(),
            Change::Adapter(adapter, _) if adapter.names == AdapterNames::Gguf => !self.writes_gguf(),
            Change::Adapter(adapter, _) => self.writes_gguf() && names(adapter),
        };
        if tower_plan(base, plan)?.is_some() && changes.iter().any(loses) {
            let expected = "a merge into a folder by the names of checkpoints; that folder can be exported afterwards";
            return Err(unsayable(base.path(), "the vision tower", "lost by this merge", expected));
        }
        Ok(())
    }

    fn finish<'t>(
        &self,
        start: Start<'_>,
        tensors: Box<dyn Tensors + 't>,
        world: World,
        progress: &mut Progress<'_>,
    ) -> Result<Converted, Error> {
        let to = if self.writes_gguf() { World::Gguf } else { World::Checkpoint };
        let tensors = renamed(start.files, tensors, world, to)?;
        match to {
            World::Gguf => self.to_gguf(start, &*tensors, progress),
            World::Checkpoint => self.to_folder(start, &*tensors, progress),
        }
    }
}

/// The tensors of the model in `files` under the other world's names.
fn renamed<'t>(
    files: &ModelFiles,
    tensors: Box<dyn Tensors + 't>,
    from: World,
    to: World,
) -> Result<Box<dyn Tensors + 't>, Error> {
    if from == to {
        return Ok(tensors);
    }
    let plan = arch::plan(files)?;
    let twins = match files {
        ModelFiles::Checkpoint(checkpoint) => Twins::of_checkpoint(checkpoint, &plan)?,
        ModelFiles::Gguf(_) => Twins::of_transformers(&plan)?,
    };
    let twins = if to == World::Gguf { twins } else { twins.inverted() };
    Ok(Box::new(Renamed::new(tensors, twins)?))
}
