//! The numbers by which a model's images become patches: from the files of a checkpoint folder, or from a mmproj file.

use qwenkit_formats::{Checkpoint, Config, Gguf, ModelFiles};
use qwenkit_media::Processor;
use qwenkit_models::{Error as ModelError, arch, vision_plan};

use crate::error::Error;

/// Frames of a patch of every published Qwen; mmproj files do not state it.
const FRAMES: usize = 2;

/// The processor of the model in `files`, whose tower is in `mmproj` or in itself. Weights are not touched.
///
/// # Errors
/// When the model takes no images, its tower is missing or another model's, or the file with the numbers is missing or wrong.
pub fn image_processor(files: &ModelFiles, mmproj: Option<&ModelFiles>) -> Result<Processor, Error> {
    let plan = arch::plan(files)?;
    vision_plan(files, mmproj, &plan)?;
    match (mmproj, files) {
        (Some(ModelFiles::Gguf(gguf)), _) => of_mmproj(gguf),
        (Some(ModelFiles::Checkpoint(checkpoint)), _) | (None, ModelFiles::Checkpoint(checkpoint)) => {
            of_folder(checkpoint)
        }
        (None, ModelFiles::Gguf(gguf)) => {
            Err(ModelError::NoTower { path: gguf.path().to_owned(), architecture: plan.architecture }.into())
        }
    }
}

fn of_folder(checkpoint: &Checkpoint) -> Result<Processor, Error> {
    let open = |name: &str| {
        let path = checkpoint.path().join(name);
        path.is_file().then(|| Config::open(&path)).transpose()
    };
    let named = |config: &Config| {
        let path = config.path().to_owned();
        move |source| Error::Processor { path, source }
    };
    let config = match open("preprocessor_config.json")? {
        Some(config) => config,
        None => match open("processor_config.json")? {
            Some(config) => config,
            None => return Err(Error::NoProcessor { path: checkpoint.path().to_owned() }),
        },
    };
    let processor = Processor::from_json(config.value()).map_err(named(&config))?;
    match open("video_preprocessor_config.json")? {
        Some(films) => processor.with_films(films.value()).map_err(named(&films)),
        None => Ok(processor),
    }
}

fn of_mmproj(gguf: &Gguf) -> Result<Processor, Error> {
    let meta = gguf.metadata();
    let key = |name: &str| format!("clip.vision.{name}");
    let merge = meta.usize(&key("spatial_merge_size"))?.unwrap_or(2);
    let mut processor = Processor::of_patches(meta.require_usize(&key("patch_size"))?, merge, FRAMES);
    for (name, colours) in [("image_mean", &mut processor.image_mean), ("image_std", &mut processor.image_std)] {
        if let Some(found) = meta.f32s(&key(name))? {
            let wrong = |found: Vec<f32>| qwenkit_formats::Error::KeyType {
                path: gguf.path().to_owned(),
                key: key(name),
                found: format!("{} numbers", found.len()),
                expected: "three numbers",
            };
            *colours = found.try_into().map_err(wrong)?;
        }
    }
    for (name, pixels) in
        [("image_min_pixels", &mut processor.min_pixels), ("image_max_pixels", &mut processor.max_pixels)]
    {
        if let Some(found) = meta.usize(&key(name))? {
            *pixels = found;
        }
    }
    processor.check().map_err(|source| Error::Processor { path: gguf.path().to_owned(), source })?;
    Ok(processor)
}
