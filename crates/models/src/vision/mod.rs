//! Vision towers: patches of an image in, vectors of the text model out.
//!
//! A file's configuration becomes a `VisionPlan`, a `Tower` computes it, from a checkpoint folder or from a mmproj file alike.
//! Images are computed one at a time, so an image's vectors have the same bits whatever comes with it. How image files become
//! patches is not known here, nor where in a prompt an image stands.

mod beside;
mod fit;
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

use crate::{arch, error::Error, plan::Plan};

/// The plan of the tower that lets the text model `text` of `files` see: from `mmproj` where there is one, else from the
/// checkpoint itself.
///
/// # Errors
/// When the model takes no images, its tower is missing, or is another model's.
pub fn vision_plan(files: &ModelFiles, mmproj: Option<&ModelFiles>, text: &Plan) -> Result<VisionPlan, Error> {
    let (path, architecture) = (files.path().to_owned(), text.architecture);
    let Some(sight) = &text.sight else { return Err(Error::Blind { path, architecture }) };
    match (mmproj, files) {
        (Some(mmproj), _) => {
            let gguf = mmproj_of(mmproj, architecture)?;
            fit::Pair { files, text, sight, path: mmproj.path() }.of_mmproj(gguf)
        }
        (None, ModelFiles::Checkpoint(checkpoint)) => {
            let plan = read::of_config(checkpoint.config(), text.width)?;
            fit::Pair { files, text, sight, path: files.path() }.check(&plan)?;
            Ok(plan)
        }
        (None, ModelFiles::Gguf(_)) => Err(Error::NoTower { path, architecture }),
    }
}

/// The towers that let a text model of this architecture see, in words.
pub(crate) fn fitting_towers(architecture: &str) -> String {
    let names: Vec<_> = arch::towers(architecture).iter().map(|tower| read::in_words(tower)).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(" or ") }
}

/// The file as a mmproj for a text model of this architecture.
fn mmproj_of<'a>(files: &'a ModelFiles, architecture: &'static str) -> Result<&'a Gguf, Error> {
    let not = |found: &str| Error::NotATower { path: files.path().to_owned(), found: found.to_owned(), architecture };
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
