//! `qwenkit preprocess`: image files as the patches that a vision tower reads, as safetensors.
//!
//! Contract: the file is there whole or not at all; its values are those of Hugging Face's processors. Not here: the making of
//! patches (`qwenkit-media`).

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use qwenkit_engine::image_processor;
use qwenkit_formats::write_safetensors;
use qwenkit_tensor::DType;

use crate::failure::usage;
use crate::images::{self, Content, FRAMES_PER_SECOND};
use crate::{locate, seeing, terminal};

/// Arguments of `preprocess`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit preprocess --model ./qwen3-vl photo.jpg --out image.safetensors
  qwenkit preprocess --model ./qwen2.5-vl.gguf a.png b.webp --out images.safetensors
  qwenkit preprocess --processor preprocessor_config.json photo.jpg --out image.safetensors

The file holds `pixel_values` (patches, 3 * frames * side * side) of f32 and `image_grid_thw` (images, 3) of i64, which `qwenkit
logits --pixels` reads. A folder is a film of its files: `pixel_values_videos`, `video_grid_thw` and `second_per_grid_ts`.

A processor's file has patch_size, image_mean, image_std, min_pixels and max_pixels (or size.shortest_edge and
size.longest_edge), and merge_size and temporal_patch_size where they are not 2.")]
pub(crate) struct PreprocessArgs {
    /// The model whose images these are to be: a short name, a hub id, a .gguf file or a checkpoint folder
    #[arg(long, value_name = "MODEL", required_unless_present = "processor")]
    model: Option<String>,
    /// PNG, JPEG, WebP and GIF files, and folders of frames
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,
    /// A file with the processor's numbers, in place of the model's own
    #[arg(long, value_name = "FILE")]
    processor: Option<PathBuf>,
    /// The model's vision tower, where it has a file of its own [default: the mmproj*.gguf beside the model]
    #[arg(long, value_name = "FILE", conflicts_with = "processor", requires = "model")]
    mmproj: Option<PathBuf>,
    /// Frames of a film for each second [default: 2]
    #[arg(long, value_name = "N", value_parser = images::frames_per_second)]
    fps: Option<f32>,
    /// The safetensors file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Patches of several images, one after the other.
#[derive(Default)]
struct Gathered {
    values: Vec<u8>,
    grids: Vec<u8>,
    count: usize,
}

/// Runs the command.
///
/// # Errors
/// When the model takes no images, or one cannot be read.
pub(crate) fn run(args: &PreprocessArgs, offline: bool) -> anyhow::Result<()> {
    let processor = match (&args.processor, &args.model) {
        (Some(path), _) => images::processor(path)?,
        (None, Some(model)) => {
            let files = locate::locate(Some(model), offline)?.files;
            let mmproj = seeing::mmproj(&files, args.mmproj.as_deref())?;
            image_processor(&files, mmproj.as_ref())?
        }
        (None, None) => return Err(usage("no model is named\nhint: qwenkit preprocess --model MODEL ...")),
    };
    if args.fps.is_some() && !args.images.iter().any(|path| path.is_dir()) {
        return Err(usage("--fps is for films, found images only\nhint: name a folder of frames, or leave --fps out"));
    }
    let (mut pictures, mut films) = (Gathered::default(), Gathered::default());
    for path in &args.images {
        let named = images::open(path)?;
        let patches = named.patches(&processor)?;
        let gathered = if matches!(named.content, Content::Image(_)) { &mut pictures } else { &mut films };
        gathered.values.extend(patches.values.iter().flat_map(|x| x.to_le_bytes()));
        let grid = patches.grid;
        gathered.grids.extend([grid.steps, grid.rows, grid.cols].iter().flat_map(|&n| (n as i64).to_le_bytes()));
        gathered.count += 1;
        let tokens = grid.steps * grid.rows * grid.cols / processor.merge_size.pow(2);
        terminal::note(&images::described(path, [grid.steps, grid.rows, grid.cols], tokens));
    }
    let width = 3 * processor.temporal_patch_size * processor.patch_size * processor.patch_size;
    let seconds_per_step = processor.temporal_patch_size as f32 / args.fps.unwrap_or(FRAMES_PER_SECOND);
    let seconds: Vec<u8> = (0..films.count).flat_map(|_| seconds_per_step.to_le_bytes()).collect();
    let shapes = [&pictures, &films].map(|g| ([g.values.len() / (width * size_of::<f32>()), width], [g.count, 3]));
    let film_count = [films.count];
    let mut tensors: Vec<(&str, DType, &[usize], &[u8])> = Vec::new();
    if pictures.count > 0 {
        tensors.push(("pixel_values", DType::F32, &shapes[0].0, &pictures.values));
        tensors.push(("image_grid_thw", DType::I64, &shapes[0].1, &pictures.grids));
    }
    if films.count > 0 {
        tensors.push(("pixel_values_videos", DType::F32, &shapes[1].0, &films.values));
        tensors.push(("video_grid_thw", DType::I64, &shapes[1].1, &films.grids));
        tensors.push(("second_per_grid_ts", DType::F32, &film_count, &seconds));
    }
    write_safetensors(&args.out, &tensors, &BTreeMap::new())?;
    Ok(())
}
