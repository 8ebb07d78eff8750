//! `VisionPlan`: everything that distinguishes one vision tower from another, as numbers and switches. `read` makes it from
//! config.json or from the metadata of a mmproj file.

use qwenkit_kernels::Gelu;

/// A vision tower's shape. D is its own width here, not the text model's.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionPlan {
    /// The tower's name: `qwen2_vl`, `qwen2_5_vl` or `qwen3_vl`.
    pub architecture: &'static str,
    /// What a patch is.
    pub patch: PatchPlan,
    /// D
    pub width: usize,
    /// H
    pub heads: usize,
    /// Blocks.
    pub layers: usize,
    /// The feed-forward block of each.
    pub ffn: VisionFfn,
    /// The norms.
    pub norm: VisionNorm,
    /// Added to the variance in every norm.
    pub norm_eps: f32,
    /// The base of the rotary frequencies.
    pub theta: f64,
    /// The side of the square table of learned positions, which is stretched over each image; none where absent.
    pub table_side: Option<usize>,
    /// Blocks whose patches see only their window; all see their whole frame where absent.
    pub windows: Option<Windows>,
    /// Blocks whose results, merged by mergers of their own, are added to the first layers of the text model (DeepStack).
    pub deepstack: Vec<usize>,
    /// Whether a film comes step by step, with the time written before each, instead of as a whole (Qwen3-VL and later).
    pub films_by_step: bool,
    /// Positions in time that a second of film takes (Qwen2.5-VL); where absent a step of the grid takes one.
    pub positions_per_second: Option<f32>,
    /// D of the text model.
    pub out_width: usize,
}

/// A patch: what becomes one row of the tower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PatchPlan {
    /// Pixels of its side.
    pub side: usize,
    /// Frames that it reaches through, `temporal_patch_size`; an image is repeated so many times.
    pub frames: usize,
    /// Colours.
    pub channels: usize,
    /// Patches of the side of a square that becomes one vector of the text model, `spatial_merge_size`.
    pub merge: usize,
    /// Whether the patch embedding has a bias.
    pub bias: bool,
}

/// The feed-forward block of a tower. Every matrix has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VisionFfn {
    /// `fc2(gelu(fc1(x)))`
    Plain {
        /// F
        width: usize,
        /// Which form of GELU.
        gelu: Gelu,
    },
    /// `down(silu(gate(x)) * up(x))`
    Gated {
        /// F
        width: usize,
    },
}

/// The norm of a tower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VisionNorm {
    /// Layer norm, with a bias.
    Layer,
    /// Root mean square, without.
    RootMeanSquare,
}

/// Window attention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// The window's side in merged squares.
    pub side: usize,
    /// For each block, whether its patches see their whole frame after all.
    pub whole: Vec<bool>,
    /// Whether the side is that of published models because no file states it.
    pub is_guessed: bool,
}

impl VisionPlan {
    /// K
    pub fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    /// What of the tower no file states, so that it was guessed, in words.
    pub fn guess(&self) -> Option<String> {
        let windows = self.windows.as_ref().filter(|windows| windows.is_guessed)?;
        let pixels = windows.side * self.patch.side * self.patch.merge;
        Some(format!("the side of its windows, taken to be the {pixels} pixels of published Qwen2.5-VL"))
    }

    /// The first thing in which another tower differs, of those that files of both kinds state: what, here and there.
    pub(crate) fn difference(&self, other: &VisionPlan) -> Option<(&'static str, String, String)> {
        let ffn = |plan: &VisionPlan| match plan.ffn {
            VisionFfn::Plain { width, .. } => format!("{width}, plain"),
            VisionFfn::Gated { width } => format!("{width}, gated"),
        };
        let patch = |plan: &VisionPlan| {
            let PatchPlan { side, frames, channels, merge, .. } = plan.patch;
            format!("{frames} x {side} x {side} x {channels}, {merge} x {merge} merged")
        };
        let facts = |plan: &VisionPlan| {
            [
                ("architecture", plan.architecture.to_owned()),
                ("depth", plan.layers.to_string()),
                ("width", plan.width.to_string()),
                ("number of heads", plan.heads.to_string()),
                ("feed-forward width", ffn(plan)),
                ("patch", patch(plan)),
                ("side of its table of positions", plan.table_side.map_or("none".to_owned(), |side| side.to_string())),
                ("list of DeepStack layers", format!("{:?}", plan.deepstack)),
                ("output width", plan.out_width.to_string()),
            ]
        };
        let pairs = facts(self).into_iter().zip(facts(other));
        pairs.into_iter().find(|(a, b)| a != b).map(|((what, here), (_, there))| (what, here, there))
    }

    /// Values that one row of the tower's output has: the vector of the text model, and DeepStack's behind it.
    pub fn row_values(&self) -> usize {
        self.out_width * (1 + self.deepstack.len())
    }
}

impl PatchPlan {
    /// Values of a patch: (channels, frames, side, side).
    pub fn values(&self) -> usize {
        self.channels * self.frames * self.side * self.side
    }

    /// Patches that become one vector of the text model.
    pub fn merged(&self) -> usize {
        self.merge * self.merge
    }
}
