//! A vision tower's own file (mmproj) out of a checkpoint: metadata and types of its tensors.
//!
//! Own keys beside those of llama.cpp's converter: `clip.vision.window_size` and `clip.vision.tokens_per_second`
//! (Qwen2.5-VL), and `clip.vision.image_min_pixels` and `image_max_pixels` as the checkpoint's processor has them.

use std::path::Path;

use qwenkit_formats::gguf::{Array, Metadata};
use qwenkit_formats::{Checkpoint, Config};
use qwenkit_models::{VisionFfn, VisionPlan};
use qwenkit_tensor::DType;

use crate::{
    Error,
    choice::Kind,
    metadata::{general, unsayable},
    tensors::Spec,
};

/// The side of images in pixels that files of towers without a table of positions state; nothing is computed from it.
const IMAGE_SIDE: usize = 560;

/// Everything that the file says beside its tensors.
pub(crate) fn metadata(
    checkpoint: &Checkpoint,
    plan: &VisionPlan,
    specs: &[Spec],
    dtype: DType,
    out: &Path,
) -> Result<Metadata, Error> {
    let mut meta = Metadata::new(out);
    general(&mut meta, checkpoint.path(), "clip", "mmproj", specs);
    let kind: Kind = dtype.name().parse()?;
    meta.set("general.file_type", kind.file_type());
    meta.set("clip.has_vision_encoder", true);
    let patch = plan.patch;
    let (VisionFfn::Plain { width: ffn, .. } | VisionFfn::Gated { width: ffn }) = plan.ffn;
    for (name, value) in [
        ("projection_dim", plan.out_width),
        ("image_size", plan.table_side.map_or(IMAGE_SIDE, |side| side * patch.side)),
        ("patch_size", patch.side),
        ("embedding_length", plan.width),
        ("feed_forward_length", ffn),
        ("block_count", plan.layers),
        ("attention.head_count", plan.heads),
        ("spatial_merge_size", patch.merge),
    ] {
        meta.set(&format!("clip.vision.{name}"), value as u32);
    }
    let processor = ["preprocessor_config.json", "processor_config.json"]
        .into_iter()
        .map(|name| checkpoint.path().join(name))
        .find(|path| path.is_file());
    if let Some(path) = processor {
        colours(&mut meta, &Config::open(&path)?)?;
    }
    let (projector, activation) = match plan.architecture {
        "qwen2_vl" => ("qwen2vl_merger", None),
        "qwen2_5_vl" => ("qwen2.5vl_merger", Some("clip.use_silu")),
        _ => ("qwen3vl_merger", Some("clip.use_gelu")),
    };
    meta.set("clip.projector_type", projector);
    if let Some(key) = activation {
        meta.set(key, true);
    }
    if patch.frames != 2 {
        return Err(unsayable(
            checkpoint.path(),
            "temporal_patch_size",
            patch.frames,
            "2, as mmproj files do not state it",
        ));
    }
    windows(&mut meta, checkpoint.path(), plan)?;
    if let Some(rate) = plan.positions_per_second {
        meta.set("clip.vision.tokens_per_second", rate);
    }
    meta.set("clip.vision.attention.layer_norm_epsilon", plan.norm_eps);
    if plan.architecture == "qwen3_vl" {
        let stacked = (0..plan.layers).map(|i| plan.deepstack.contains(&i)).collect();
        meta.set("clip.vision.is_deepstack_layers", Array::Bool(stacked));
    }
    meta.set("general.quantization_version", 2_u32);
    Ok(meta)
}

/// Which blocks see everything: every so many.
fn windows(meta: &mut Metadata, path: &Path, plan: &VisionPlan) -> Result<(), Error> {
    let Some(windows) = &plan.windows else { return Ok(()) };
    let interval = windows.whole.iter().position(|whole| *whole).map_or(plan.layers + 1, |first| first + 1);
    if windows.whole.iter().enumerate().any(|(i, whole)| *whole != (i + 1).is_multiple_of(interval)) {
        let expected = "every so many blocks: mmproj files state an interval";
        return Err(unsayable(path, "fullatt_block_indexes", format!("{:?}", windows.whole), expected));
    }
    meta.set("clip.vision.n_wa_pattern", interval as u32);
    meta.set("clip.vision.window_size", (windows.side * plan.patch.side * plan.patch.merge) as u32);
    Ok(())
}

fn colours(meta: &mut Metadata, config: &Config) -> Result<(), Error> {
    let inner = config.object("image_processor")?;
    let config = inner.as_ref().unwrap_or(config);
    for key in ["image_mean", "image_std"] {
        if let Some(values) = config.f64s(key)? {
            let values = values.into_iter().map(|x| x as f32).collect();
            meta.set(&format!("clip.vision.{key}"), Array::F32(values));
        }
    }
    let size = config.object("size")?;
    let pixels = |key: &str, edge: &str| match size.as_ref().map(|size| size.usize(edge)).transpose()?.flatten() {
        Some(pixels) => Ok::<_, Error>(Some(pixels)),
        None => Ok(config.usize(key)?),
    };
    for (key, edge) in [("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")] {
        if let Some(pixels) = pixels(key, edge)?.and_then(|pixels| u32::try_from(pixels).ok()) {
            meta.set(&format!("clip.vision.image_{key}"), pixels);
        }
    }
    Ok(())
}

/// The type of each tensor: `dtype` for matrices; norms, biases, positions and patches stay precise.
pub(crate) fn types(specs: &[Spec], dtype: DType) -> Vec<DType> {
    let is_matrix =
        |spec: &Spec| spec.shape.len() == 2 && spec.name.ends_with(".weight") && !spec.name.contains("position_embd");
    specs.iter().map(|spec| if is_matrix(spec) { dtype } else { DType::F32 }).collect()
}
