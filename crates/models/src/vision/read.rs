//! Reads a tower's plan from config.json and from the metadata of a mmproj file, and checks its numbers before anybody
//! computes with them.

use std::path::Path;

use qwenkit_formats::{Config, Gguf};
use qwenkit_kernels::{Gelu, HEAD_DIM_MAX};

use super::plan::{PatchPlan, VisionFfn, VisionNorm, VisionPlan, Windows};
use crate::{arch::wrong, error::Error, missing::Place};

/// No tower is deeper or wider than a fraction of these; beyond them a file is broken or hostile.
const LAYERS_MAX: usize = 1_000;
const SIZE_MAX: usize = 1 << 20;
const HEADS_MAX: usize = 1 << 10;
const PATCH_SIDE_MAX: usize = 256;
const MERGE_MAX: usize = 16;
/// Side of a window in pixels, where a mmproj file does not say: that of every published Qwen2.5-VL.
const WINDOW_PIXELS: usize = 112;
/// `tokens_per_second` of every published Qwen2.5-VL, which mmproj files do not state.
const POSITIONS_PER_SECOND: f32 = 2.0;

/// `temporal_patch_size` of every published tower, which mmproj files do not state.
const FRAMES: usize = 2;

/// What a generation of towers has by definition.
struct Generation {
    architecture: &'static str,
    /// `model_type` of `vision_config`.
    model_types: &'static [&'static str],
    /// `clip.projector_type` of a mmproj file.
    projector: &'static str,
    norm: VisionNorm,
    /// Of its plain feed-forward block, where the file does not say; none where the block is gated.
    gelu: Option<Gelu>,
    patch_bias: bool,
    /// A table of learned positions, and films step by step.
    has_table: bool,
    has_windows: bool,
}

const GENERATIONS: [Generation; 3] = [
    Generation {
        architecture: "qwen2_vl",
        model_types: &["qwen2_vl", "qwen2_vl_vision"],
        projector: "qwen2vl_merger",
        norm: VisionNorm::Layer,
        gelu: Some(Gelu::Sigmoid),
        patch_bias: false,
        has_table: false,
        has_windows: false,
    },
    Generation {
        architecture: "qwen2_5_vl",
        model_types: &["qwen2_5_vl", "qwen2_5_vl_vision"],
        projector: "qwen2.5vl_merger",
        norm: VisionNorm::RootMeanSquare,
        gelu: None,
        patch_bias: false,
        has_table: false,
        has_windows: true,
    },
    Generation {
        architecture: "qwen3_vl",
        model_types: &[
            "qwen3_vl",
            "qwen3_vl_vision",
            "qwen3_vl_moe",
            "qwen3_vl_moe_vision",
            "qwen3_5",
            "qwen3_5_vision",
            "qwen3_5_moe",
            "qwen3_5_moe_vision",
        ],
        projector: "qwen3vl_merger",
        norm: VisionNorm::Layer,
        gelu: Some(Gelu::Tanh),
        patch_bias: true,
        has_table: true,
        has_windows: false,
    },
];

/// The tower of this name, and how a mmproj file calls it.
pub(super) fn in_words(architecture: &str) -> String {
    match GENERATIONS.iter().find(|generation| generation.architecture == architecture) {
        Some(generation) => format!("a {architecture} tower (`clip.projector_type` {})", generation.projector),
        None => format!("a {architecture} tower"),
    }
}

/// The tower that a checkpoint's config.json describes, for a text model of D = `text_width`.
pub(super) fn of_config(whole: &Config, text_width: usize) -> Result<VisionPlan, Error> {
    let config = whole.require_object("vision_config")?;
    // Checkpoints of before transformers 5 name the whole model only.
    let name = match config.string("model_type")? {
        Some(name) => name,
        None => whole.require_string("model_type")?,
    };
    let Some(generation) = GENERATIONS.iter().find(|g| g.model_types.contains(&name)) else {
        let known = GENERATIONS.iter().map(|g| g.architecture).collect::<Vec<_>>().join(", ");
        return Err(wrong(config.path(), "vision_config.model_type", format!("`{name}`"), &known));
    };
    let is_first = generation.architecture == "qwen2_vl";
    // There, `hidden_size` is the text model's.
    let (width_key, out_key) = if is_first { ("embed_dim", "hidden_size") } else { ("hidden_size", "out_hidden_size") };
    let width = config.require_usize(width_key)?;
    let out_width = config.usize(out_key)?.unwrap_or(text_width);
    let ffn_width = match is_first {
        true => (width as f64 * config.f64("mlp_ratio")?.unwrap_or(4.0)) as usize,
        false => config.require_usize("intermediate_size")?,
    };
    let layers = config.require_usize("depth")?;
    let channels = match config.usize("in_channels")? {
        Some(channels) => channels,
        None => config.usize("in_chans")?.unwrap_or(3),
    };
    let patch = PatchPlan {
        side: config.require_usize("patch_size")?,
        frames: config.usize("temporal_patch_size")?.unwrap_or(FRAMES),
        channels,
        merge: config.usize("spatial_merge_size")?.unwrap_or(2),
        bias: generation.patch_bias,
    };
    let theta = match config.object("rope_parameters")? {
        Some(rope) => rope.f64("rope_theta")?,
        None => None,
    };
    let windows = match generation.has_windows {
        false => None,
        true => {
            let whole = config.usizes("fullatt_block_indexes")?.unwrap_or_default();
            // What a config leaves out has transformers' default, and is no guess.
            let pixels = Some(config.usize("window_size")?.unwrap_or(WINDOW_PIXELS));
            Some((pixels, (0..layers.min(LAYERS_MAX)).map(|i| whole.contains(&i)).collect()))
        }
    };
    let per_second = match generation.has_windows {
        true => Some(config.f32("tokens_per_second")?.unwrap_or(4.0)),
        false => None,
    };
    let table_side = match generation.has_table {
        true => Some(square_side(config.path(), config.require_usize("num_position_embeddings")?)?),
        false => None,
    };
    let numbers = Numbers {
        path: config.path(),
        generation,
        patch,
        width,
        heads: config.require_usize("num_heads")?,
        layers,
        ffn: ffn_of(generation, &config, ffn_width)?,
        norm_eps: 1e-6,
        theta: theta.unwrap_or(10_000.0),
        table_side,
        windows,
        deepstack: config.usizes("deepstack_visual_indexes")?.unwrap_or_default(),
        positions_per_second: per_second,
        out_width,
    };
    numbers.checked()
}

/// The tower of a mmproj file.
pub(super) fn of_mmproj(gguf: &Gguf) -> Result<VisionPlan, Error> {
    let meta = gguf.metadata();
    let path = gguf.path();
    // The key moved when files with two projectors came.
    let key = "clip.projector_type";
    let projector = match meta.string(key)? {
        Some(projector) => projector,
        None => meta.require_string("clip.vision.projector_type")?,
    };
    let Some(generation) = GENERATIONS.iter().find(|g| g.projector == projector) else {
        let known = GENERATIONS.iter().map(|g| g.projector).collect::<Vec<_>>().join(", ");
        return Err(wrong(path, key, format!("`{projector}`"), &format!("one of {known}")));
    };
    let number = |name: &str| meta.require_usize(&format!("clip.vision.{name}"));
    let optional = |name: &str| meta.usize(&format!("clip.vision.{name}"));
    // Some widths are stated wrong or not at all in published files, so they are taken from the tensors.
    let axis = |name: &str, axis: usize| match gguf.tensor(name).and_then(|t| t.shape.get(axis)) {
        Some(size) => Ok(*size),
        None => {
            let place = Place { path, architecture: generation.architecture, tensors: gguf.tensors(), plan: None };
            Err(place.missing(name.to_owned(), Vec::new()))
        }
    };
    let layers = number("block_count")?;
    let ffn_width = axis("v.blk.0.ffn_up.weight", 0)?;
    let ffn = match generation.gelu {
        Some(gelu) => VisionFfn::Plain { width: ffn_width, gelu },
        None => VisionFfn::Gated { width: ffn_width },
    };
    let patch = PatchPlan {
        side: number("patch_size")?,
        // Stored as a tensor each.
        frames: FRAMES,
        channels: axis("v.patch_embd.weight", 1)?,
        merge: optional("spatial_merge_size")?.unwrap_or(2),
        bias: generation.patch_bias,
    };
    let table_side = match generation.has_table {
        true => Some(square_side(path, axis("v.position_embd.weight", 0)?)?),
        false => None,
    };
    let pixels = optional("window_size")?;
    let windows = match generation.has_windows {
        false => None,
        true => {
            // Every so many blocks one sees everything; 0 means that all do.
            let interval = optional("n_wa_pattern")?.unwrap_or(0);
            let whole = |i: usize| interval == 0 || (i + 1).is_multiple_of(interval);
            Some((pixels, (0..layers.min(LAYERS_MAX)).map(whole).collect()))
        }
    };
    let stated_rate = meta.f32("clip.vision.tokens_per_second")?;
    let per_second = generation.has_windows.then(|| stated_rate.unwrap_or(POSITIONS_PER_SECOND));
    let is_stacked = meta.bools("clip.vision.is_deepstack_layers")?.unwrap_or_default();
    let numbers = Numbers {
        path,
        generation,
        patch,
        width: number("embedding_length")?,
        heads: number("attention.head_count")?,
        layers,
        ffn,
        norm_eps: meta.f32("clip.vision.attention.layer_norm_epsilon")?.unwrap_or(1e-6),
        theta: 10_000.0,
        table_side,
        windows,
        deepstack: (0..is_stacked.len()).filter(|&i| is_stacked[i]).collect(),
        positions_per_second: per_second,
        out_width: axis("mm.2.weight", 0)?,
    };
    let mut plan = numbers.checked()?;
    if plan.windows.is_some()
        && (pixels.is_none() || stated_rate.is_none())
        && let Some(own) = described_beside(path, &plan)
    {
        if pixels.is_none() {
            plan.windows = own.windows;
        }
        if stated_rate.is_none() {
            plan.positions_per_second = own.positions_per_second;
        }
    }
    Ok(plan)
}

/// The tower as a config.json in the same folder describes it: mmproj files do not state the size of Qwen2.5-VL's windows, and the
/// repositories that they come from often hold the config that they were made from. `None` where that is not of this tower.
fn described_beside(mmproj: &Path, plan: &VisionPlan) -> Option<VisionPlan> {
    let path = mmproj.with_file_name("config.json");
    let own = of_config(&Config::open(&path).ok()?, plan.out_width).ok()?;
    plan.difference(&own).is_none().then_some(own)
}

fn ffn_of(generation: &Generation, config: &Config, width: usize) -> Result<VisionFfn, Error> {
    let found = config.string("hidden_act")?;
    let gelu = match (found, generation.gelu) {
        (None | Some("silu"), None) => return Ok(VisionFfn::Gated { width }),
        (None, Some(gelu)) => gelu,
        (Some("quick_gelu"), Some(_)) => Gelu::Sigmoid,
        (Some("gelu"), Some(_)) => Gelu::Exact,
        (Some("gelu_pytorch_tanh" | "gelu_new"), Some(_)) => Gelu::Tanh,
        (Some(other), gelu) => {
            let expected = if gelu.is_some() { "`quick_gelu`, `gelu` or `gelu_pytorch_tanh`" } else { "`silu`" };
            return Err(wrong(config.path(), "vision_config.hidden_act", format!("`{other}`"), expected));
        }
    };
    Ok(VisionFfn::Plain { width, gelu })
}

/// The side of a square table of so many rows.
fn square_side(path: &Path, rows: usize) -> Result<usize, Error> {
    let side = rows.isqrt();
    if side == 0 || side * side != rows || rows > SIZE_MAX {
        return Err(wrong(path, "num_position_embeddings", rows, "the rows of a square table"));
    }
    Ok(side)
}

/// A tower's numbers as its file states them.
struct Numbers<'a> {
    path: &'a Path,
    generation: &'static Generation,
    patch: PatchPlan,
    width: usize,
    heads: usize,
    layers: usize,
    ffn: VisionFfn,
    norm_eps: f32,
    theta: f64,
    table_side: Option<usize>,
    /// Pixels of the side, where they are stated, and which blocks see everything.
    windows: Option<(Option<usize>, Vec<bool>)>,
    deepstack: Vec<usize>,
    positions_per_second: Option<f32>,
    out_width: usize,
}

impl Numbers<'_> {
    fn wrong(&self, key: &str, found: impl ToString, expected: &str) -> Error {
        wrong(self.path, &format!("vision {key}"), found, expected)
    }

    fn checked(self) -> Result<VisionPlan, Error> {
        let (VisionFfn::Plain { width: ffn, .. } | VisionFfn::Gated { width: ffn }) = self.ffn;
        let sizes = [
            ("depth", self.layers, LAYERS_MAX),
            ("hidden_size", self.width, SIZE_MAX),
            ("num_heads", self.heads, HEADS_MAX),
            ("intermediate_size", ffn, SIZE_MAX),
            ("out_hidden_size", self.out_width, SIZE_MAX),
            ("patch_size", self.patch.side, PATCH_SIDE_MAX),
            ("temporal_patch_size", self.patch.frames, MERGE_MAX),
            ("in_channels", self.patch.channels, MERGE_MAX),
            ("spatial_merge_size", self.patch.merge, MERGE_MAX),
        ];
        for (key, found, largest) in sizes {
            if found == 0 || found > largest {
                return Err(self.wrong(key, found, &format!("1 to {largest}")));
            }
        }
        // A quarter of a head turns with the row and a quarter with the column.
        let head_dim = self.width / self.heads;
        if !self.width.is_multiple_of(self.heads) || head_dim > HEAD_DIM_MAX || !head_dim.is_multiple_of(4) {
            let expected = format!("heads of a multiple of 4 up to {HEAD_DIM_MAX} values of the width {}", self.width);
            return Err(self.wrong("num_heads", self.heads, &expected));
        }
        // Each comparison is written so that NaN fails it.
        if !(self.theta > 1.0 && self.theta.is_finite()) {
            return Err(self.wrong("rope_theta", self.theta, "a number above 1"));
        }
        if !(self.norm_eps >= 0.0 && self.norm_eps < 1.0) {
            return Err(self.wrong("layer_norm_epsilon", self.norm_eps, "0 or a small positive number"));
        }
        if let Some(rate) = self.positions_per_second
            && !(rate > 0.0 && rate <= 1e6)
        {
            return Err(self.wrong("tokens_per_second", rate, "a number above 0"));
        }
        let rising = self.deepstack.windows(2).all(|pair| pair[0] < pair[1]);
        if !rising || self.deepstack.last().is_some_and(|&last| last >= self.layers) {
            let expected = format!("rising numbers of its {} blocks", self.layers);
            return Err(self.wrong("deepstack_visual_indexes", format!("{:?}", self.deepstack), &expected));
        }
        if self.generation.architecture != "qwen3_vl" && !self.deepstack.is_empty() {
            return Err(self.wrong("deepstack_visual_indexes", format!("{:?}", self.deepstack), "none in this tower"));
        }
        let unit = self.patch.side * self.patch.merge;
        let windows = match &self.windows {
            None => None,
            Some((stated, whole)) => {
                let pixels = stated.unwrap_or(WINDOW_PIXELS);
                if pixels < unit || pixels > SIZE_MAX {
                    return Err(self.wrong("window_size", pixels, &format!("{unit} to {SIZE_MAX} pixels")));
                }
                // Where every block sees everything, nothing hangs on the side.
                let is_guessed = stated.is_none() && !whole.iter().all(|whole| *whole);
                Some(Windows { side: pixels / unit, whole: whole.clone(), is_guessed })
            }
        };
        Ok(VisionPlan {
            architecture: self.generation.architecture,
            patch: self.patch,
            width: self.width,
            heads: self.heads,
            layers: self.layers,
            ffn: self.ffn,
            norm: self.generation.norm,
            norm_eps: self.norm_eps,
            theta: self.theta,
            table_side: self.table_side,
            windows,
            deepstack: self.deepstack,
            films_by_step: self.generation.has_table,
            positions_per_second: self.positions_per_second,
            out_width: self.out_width,
        })
    }
}
