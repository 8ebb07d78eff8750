//! `qwenkit logits`: the raw logits of a token sequence, as safetensors.
//!
//! Contract: the file is there whole or not at all. Not here: the computing (`qwenkit_engine::score`).

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use qwenkit_engine::{Error, available_memory_bytes, score};
use qwenkit_formats::{ModelFiles, write_safetensors};
use qwenkit_kernels::Compute;
use qwenkit_models::{LoadEvent, Model, Plan, arch, vision_plan};
use qwenkit_tensor::{DType, TokenId};

use crate::args::{ComputeArgs, ModelArgs};
use crate::failure::usage;
use crate::tensors::Recorded;
use crate::{locate, opening, seeing, terminal};

/// Arguments of `logits`.
#[derive(Args)]
#[command(after_help = "\
Example:
  qwenkit logits --model ./model.gguf --ids 1,2,3 --out logits.safetensors
  qwenkit logits --model ./qwen3-vl --ids ... --pixels image.safetensors --out logits.safetensors

The file holds one tensor `logits` of f32, (tokens, vocabulary): row i is what the model expects after token i.

--pixels names a file with the tensors `pixel_values` (patches, values of a patch) and `image_grid_thw` (images, 3), as Hugging
Face's processors make them; of films `pixel_values_videos` and `video_grid_thw`. The ids then have a placeholder token for each
vector of an image. Without --pixels a placeholder is a token like any other, which is noted, and --mmproj is only held against the
model.")]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The tokens
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    ids: Vec<u32>,
    /// Patches of the images in the text
    #[arg(long, value_name = "FILE")]
    pixels: Option<PathBuf>,
    /// The model's vision tower, where it has a file of its own [default: the mmproj*.gguf beside the model]
    #[arg(long, value_name = "FILE")]
    mmproj: Option<PathBuf>,
    /// The safetensors file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Runs the command.
pub(crate) fn run(args: &LogitsArgs, offline: bool) -> anyhow::Result<()> {
    let name = args.model.name().ok_or_else(|| usage("no model is named\nhint: qwenkit logits --model MODEL ..."))?;
    let files = locate::locate(Some(name), offline)?.files;
    let plan = arch::plan(&files)?;
    let ids: Vec<TokenId> = args.ids.iter().map(|&id| TokenId(id)).collect();
    if let Some(&found) = ids.iter().find(|id| id.index() >= plan.vocab) {
        return Err(Error::TokenUnknown { found, vocab: plan.vocab }.into());
    }
    if ids.len() > plan.context_tokens {
        let (given, made_for) = (ids.len(), plan.context_tokens);
        terminal::note(&format!("note: {given} tokens are more than the {made_for} that the model was made for"));
    }
    let mmproj = args.mmproj.as_deref().map(ModelFiles::open).transpose()?;
    if let Some(mmproj) = &mmproj {
        vision_plan(&files, Some(mmproj), &plan)?;
    }
    if args.pixels.is_none() {
        note_placeholders(&plan, &ids);
    }
    let shape = [ids.len(), plan.vocab];
    let size_bytes = shape.iter().product::<usize>() * size_of::<f32>();
    let needed_bytes = size_bytes as u64 + files.size_bytes();
    if let Some(available_bytes) = available_memory_bytes().filter(|&available| needed_bytes > available) {
        anyhow::bail!(
            "{} rows of {} logits and the model need {needed_bytes} bytes of memory and {available_bytes} are available\n\
             hint: ask for fewer tokens at once, or close other programs",
            shape[0],
            shape[1]
        );
    }
    let compute = Compute::new(args.compute.threads(), opening::isa()?);
    let mut bar = opening::loading_bar();
    let model = Model::load(&files, &compute, &mut |event| bar.update(event.done_bytes, event.total_bytes))?;
    let view = match &args.pixels {
        None => None,
        Some(pixels) => {
            let mmproj = match mmproj {
                Some(named) => Some(named),
                None => seeing::mmproj(&files, None)?,
            };
            let progress = &mut |event: LoadEvent| bar.update(event.done_bytes, event.total_bytes);
            let eyes = seeing::Eyes::open(&model, &files, mmproj.as_ref(), &compute, progress)?;
            Some(eyes.look(&compute, &Recorded::open(pixels)?, &ids)?)
        }
    };
    bar.clear();
    let mut bytes = Vec::with_capacity(size_bytes);
    score::logits_seeing(&model, &compute, &ids, view.as_ref(), &mut |_, row| {
        bytes.extend(row.iter().flat_map(|x| x.to_le_bytes()));
    })?;
    write_safetensors(&args.out, &[("logits", DType::F32, &shape, &bytes)], &BTreeMap::new())?;
    terminal::note(&format!("wrote `logits` ({}, {}) to {}", shape[0], shape[1], args.out.display()));
    Ok(())
}

/// Says of tokens that stand for images that they are computed as what they are, for want of images.
fn note_placeholders(plan: &Plan, ids: &[TokenId]) {
    let Some(sight) = &plan.sight else { return };
    let count = ids.iter().filter(|id| **id == sight.image_token || **id == sight.video_token).count();
    if count > 0 {
        terminal::note(&format!(
            "note: found {count} placeholders of images among the ids and no --pixels; the model sees no image there, the logits are \
             those of the placeholders' own embeddings"
        ));
    }
}
