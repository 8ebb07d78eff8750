//! Vision towers: patches of an image in, vectors of the text model out.
//!
//! A file's configuration becomes a `VisionPlan`, a `Tower` computes it, from a checkpoint folder or from a mmproj file alike.
//! Images are computed one at a time, so an image's vectors have the same bits whatever comes with it. How image files become
//! patches is not known here, nor where in a prompt an image stands.

mod beside;
mod layout;
mod pixels;
mod plan;
mod positions;
mod read;
mod tower;

use qwenkit_formats::{Gguf, ModelFiles};

pub use beside::mmproj_beside;
pub use pixels::{Grid, Pixels};
pub use plan::{PatchPlan, VisionFfn, VisionNorm, VisionPlan, Windows};
pub use positions::{Positions, Span};
pub(crate) use tower::{Block, BlockFfn, BlockNorm, Linear, Merger};
pub use tower::{Encoding, Tower, TowerBuffers};

use crate::{error::Error, plan::Plan};

/// The plan of the tower that lets the text model `text` of `files` see: from `mmproj` where there is one, else from the
/// checkpoint itself.
///
/// # Errors
/// When the model takes no images, its tower is missing, or is another model's.
pub fn vision_plan(files: &ModelFiles, mmproj: Option<&ModelFiles>, text: &Plan) -> Result<VisionPlan, Error> {
    let (path, architecture) = (files.path().to_owned(), text.architecture);
    let Some(sight) = &text.sight else { return Err(Error::Blind { path, architecture }) };
    let (plan, path) = match (mmproj, files) {
        (Some(mmproj), _) => (read::of_mmproj(mmproj_of(mmproj)?)?, mmproj.path()),
        (None, ModelFiles::Checkpoint(checkpoint)) => (read::of_config(checkpoint.config(), text.width)?, files.path()),
        (None, ModelFiles::Gguf(_)) => return Err(Error::NoTower { path, architecture }),
    };
    let other = |what, found: String, expected: String| Error::OtherTower { path: path.into(), what, found, expected };
    if !sight.towers.contains(&plan.architecture) {
        return Err(other("architecture", plan.architecture.to_owned(), sight.towers.join(" or ")));
    }
    if let (Some(ModelFiles::Gguf(tower)), ModelFiles::Gguf(model)) = (mmproj, files) {
        let [found, own] = [tower, model].map(|gguf| gguf.metadata().string("general.name"));
        if let (Some(found), Some(own)) = (found?, own?)
            && let (Some(a), Some(b)) = (generation(found), generation(own))
            && a != b
        {
            return Err(other("model", format!("`{found}`"), format!("that of `{own}`")));
        }
    }
    if plan.out_width != text.width {
        let expected = format!("{} as in {}", text.width, files.path().display());
        return Err(other("output width", plan.out_width.to_string(), expected));
    }
    let stacked = plan.deepstack.len();
    if let Some(expected) = sight.deepstack.filter(|&expected| expected != stacked) {
        return Err(other("number of DeepStack layers", stacked.to_string(), expected.to_string()));
    }
    if stacked > text.layers.len() {
        let expected = format!("at most the {} layers of the text model", text.layers.len());
        return Err(other("number of DeepStack layers", stacked.to_string(), expected));
    }
    Ok(plan)
}

/// Which Qwen a name means: its number, and whether it says that it is a mixture. `None` of a name without a number.
fn generation(name: &str) -> Option<(String, bool)> {
    let lower = name.to_ascii_lowercase();
    let (_, rest) = lower.split_once("qwen")?;
    let rest = rest.trim_start_matches(['-', '_', ' ']);
    let number: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    let number = number.trim_end_matches('.').to_owned();
    (!number.is_empty()).then(|| (number, lower.contains("moe")))
}

/// The file as a mmproj.
fn mmproj_of(files: &ModelFiles) -> Result<&Gguf, Error> {
    let not = |found: &str| Error::NotATower { path: files.path().to_owned(), found: found.to_owned() };
    let ModelFiles::Gguf(gguf) = files else { return Err(not("a checkpoint folder")) };
    let meta = gguf.metadata();
    match (meta.string("general.type")?, meta.string("general.architecture")?) {
        (Some("mmproj"), _) | (_, Some("clip")) => {}
        (_, Some(architecture)) => return Err(not(&format!("a {architecture} model"))),
        _ => return Err(not("a file of no stated kind")),
    }
    if meta.bool("clip.has_vision_encoder")? == Some(false) {
        return Err(not("a mmproj without vision"));
    }
    Ok(gguf)
}
