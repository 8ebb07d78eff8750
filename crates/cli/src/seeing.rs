//! The vision tower of a model on the command line: where its file is, and patches from a file of tensors.
//!
//! Not here: how image files become patches.

use std::path::Path;

use anyhow::{anyhow, bail, ensure};
use qwenkit_engine::{View, VisionInfo, Visual, VisualKind, image_processor};
use qwenkit_formats::ModelFiles;
use qwenkit_kernels::Compute;
use qwenkit_models::{Grid, LoadEvent, Model, Pixels, Tower, VisionPlan, arch, mmproj_beside};
use qwenkit_tensor::TokenId;

use crate::tensors::Recorded;
use crate::terminal;

/// Grids that a refusal names.
const GRIDS_SHOWN: usize = 8;

/// The file of the model's tower: the one named, else the one that lies beside a GGUF model. `None` where the model has its
/// tower in itself, or there is none.
///
/// # Errors
/// When the file cannot be opened.
pub(crate) fn mmproj(files: &ModelFiles, named: Option<&Path>) -> anyhow::Result<Option<ModelFiles>> {
    if let Some(path) = named {
        return Ok(Some(ModelFiles::open(path)?));
    }
    let ModelFiles::Gguf(gguf) = files else { return Ok(None) };
    let Some(path) = mmproj_beside(gguf.path()) else { return Ok(None) };
    terminal::note(&format!("vision: {}", path.display()));
    Ok(Some(ModelFiles::open(&path)?))
}

/// What a session is opened for.
pub(crate) enum Sight {
    /// Text only.
    Text,
    /// Images too, by the tower in this file, or in the model's own where it is absent.
    Images(Option<Box<ModelFiles>>),
}

impl Sight {
    /// To see, as somebody asks for it.
    ///
    /// # Errors
    /// When the tower's file cannot be opened.
    pub(crate) fn wanted(files: &ModelFiles, named: Option<&Path>) -> anyhow::Result<Sight> {
        Ok(Sight::Images(mmproj(files, named)?.map(Box::new)))
    }

    /// To see if the model can: nobody has asked for it, so what is missing is noted at most.
    pub(crate) fn where_possible(files: &ModelFiles) -> Sight {
        // A model that cannot be opened at all says so when it is.
        if !arch::plan(files).is_ok_and(|plan| plan.sight.is_some()) {
            return Sight::Text;
        }
        let found = mmproj(files, None).and_then(|mmproj| {
            image_processor(files, mmproj.as_ref())?;
            Ok(Sight::Images(mmproj.map(Box::new)))
        });
        found.unwrap_or_else(|error| {
            terminal::note(&format!("note: images cannot be shown to this model: {error}"));
            Sight::Text
        })
    }
}

/// Says what no file states of a tower and had to be guessed.
pub(crate) fn note_guess(plan: &VisionPlan) {
    if let Some(guess) = plan.guess() {
        terminal::note(&format!(
            "note: the mmproj file does not state {guess}; if the model was made with others, its images are seen wrongly: put its \
             config.json beside the mmproj file, or write that again with `qwenkit quantize`"
        ));
    }
}

/// A text model's tower, loaded to look at patches.
pub(crate) struct Eyes {
    tower: Tower,
    pub(crate) info: VisionInfo,
}

impl Eyes {
    /// Loads the tower that goes with `model`, which is that of `files`.
    ///
    /// # Errors
    /// When there is none, or it is another model's.
    pub(crate) fn open(
        model: &Model,
        files: &ModelFiles,
        mmproj: Option<&ModelFiles>,
        compute: &Compute,
        progress: &mut dyn FnMut(LoadEvent),
    ) -> anyhow::Result<Eyes> {
        let tower = Tower::load(files, mmproj, model.plan(), compute, progress)?;
        note_guess(tower.plan());
        match VisionInfo::of(model.plan(), &tower) {
            Some(info) => Ok(Eyes { tower, info }),
            None => bail!("{} reads text only", model.plan().architecture),
        }
    }

    /// Looks at the visuals of `recorded` in the text `ids`, which has a placeholder for each vector.
    ///
    /// # Errors
    /// When patches are missing, wrong, or do not fit the placeholders.
    pub(crate) fn look(&self, compute: &Compute, recorded: &Recorded, ids: &[TokenId]) -> anyhow::Result<View> {
        let placed = self.info.place(ids, visuals(&self.info, recorded)?)?;
        Ok(View::computed(&self.info, &self.tower, compute, ids, placed)?)
    }
}

/// Images (`pixel_values`, `image_grid_thw`) and films (`pixel_values_videos`, `video_grid_thw`, and `second_per_grid_ts` where
/// a step does not take a second) of a file of tensors.
fn visuals(info: &VisionInfo, recorded: &Recorded) -> anyhow::Result<Vec<Visual>> {
    let mut found = Vec::new();
    if recorded.has("pixel_values") {
        for pixels in apart(info, recorded, "pixel_values", "image_grid_thw")? {
            found.push(Visual::image(pixels));
        }
    }
    if recorded.has("pixel_values_videos") {
        let films = apart(info, recorded, "pixel_values_videos", "video_grid_thw")?;
        let seconds = match recorded.has("second_per_grid_ts") {
            true => recorded.f32s("second_per_grid_ts", 1)?.1,
            false => vec![1.0; films.len()],
        };
        ensure!(
            seconds.len() == films.len(),
            "`second_per_grid_ts` in `{}`: found {} times of a step, expected {}, one for each film",
            recorded.path().display(),
            seconds.len(),
            films.len()
        );
        for (pixels, seconds_per_step) in films.into_iter().zip(seconds) {
            found.extend(info.visuals(pixels, VisualKind::Film { seconds_per_step })?);
        }
    }
    ensure!(
        !found.is_empty(),
        "found neither `pixel_values` nor `pixel_values_videos` in {}",
        recorded.path().display()
    );
    Ok(found)
}

/// Patches of several images one after the other, taken apart by their grids.
fn apart(info: &VisionInfo, recorded: &Recorded, values: &str, grids: &str) -> anyhow::Result<Vec<Pixels>> {
    const HINT: &str = "hint: a grid is (time steps, rows, columns), counted in patches; take both tensors from one call of the \
                        model's own processor";
    let (path, each) = (recorded.path().display(), info.plan.patch.values());
    let (shape, pixels) = recorded.f32s(values, 2)?;
    ensure!(
        shape[1] == each,
        "`{values}` in `{path}`: found patches of {} values, expected {each}, as this model's tower takes\n{HINT}",
        shape[1]
    );
    let (of_grids, numbers) = recorded.numbers(grids, 2)?;
    ensure!(of_grids[1] == 3, "`{grids}` in `{path}`: found the shape {of_grids:?}, expected (images, 3)\n{HINT}");
    let wanted: Vec<Grid> =
        numbers.chunks_exact(3).map(|grid| Grid { steps: grid[0], rows: grid[1], cols: grid[2] }).collect();
    let sum = wanted.iter().try_fold(0usize, |sum, grid| sum.checked_add(grid.patches()?));
    if sum != Some(shape[0]) {
        let grid = |grid: &Grid| match grid.patches() {
            Some(patches) => format!("{patches} of ({}, {}, {})", grid.steps, grid.rows, grid.cols),
            None => format!("too many of ({}, {}, {})", grid.steps, grid.rows, grid.cols),
        };
        let shown = wanted.iter().take(GRIDS_SHOWN).map(grid).collect::<Vec<_>>().join(", ");
        let dots = if wanted.len() > GRIDS_SHOWN { ", ..." } else { "" };
        let expected = sum.map_or("no image's number".to_owned(), |sum| sum.to_string());
        bail!(
            "`{values}` in `{path}`: found {} patches, expected {expected} by `{grids}`: {shown}{dots}\n{HINT}",
            shape[0]
        );
    }
    let (mut found, mut rest) = (Vec::new(), pixels.as_slice());
    for grid in wanted {
        let own;
        (own, rest) = rest.split_at(grid.patches().unwrap_or(0) * each);
        let pixels = Pixels { values: own.to_vec(), grid };
        pixels.check(&info.plan).map_err(|error| anyhow!("`{path}`: {error}\n{HINT}"))?;
        found.push(pixels);
    }
    Ok(found)
}
