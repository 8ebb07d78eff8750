//! Loads a vision tower. Its tensors have other names in every generation and in GGUF; here all become one form.

use qwenkit_formats::{ModelFiles, TensorInfo};
use qwenkit_kernels::{Compute, Weight};
use qwenkit_tensor::DType;

use super::{
    LoadEvent,
    tensors::{Facts, Loader},
};
use crate::{
    error::Error,
    names::Naming,
    plan::NormWeights,
    vision::{Block, BlockFfn, BlockNorm, Linear, Merger, Tower, VisionFfn, VisionNorm, VisionPlan},
};

/// Where checkpoints keep the tower: before transformers 4.52, since then, in MLX's.
pub(crate) const SCOPES: [&str; 3] = ["model.visual.", "visual.", "vision_tower."];

/// Names of one generation in Hugging Face's checkpoints.
pub(crate) struct Names {
    /// Of the feed-forward block, without its matrices' `weight` and `bias`.
    pub(crate) ffn: &'static [&'static str],
    pub(crate) merger_norm: &'static str,
    pub(crate) merger: [&'static str; 2],
}

pub(crate) fn tower_names(plan: &VisionPlan) -> Names {
    match plan.architecture {
        "qwen2_vl" => Names { ffn: &["mlp.fc1", "mlp.fc2"], merger_norm: "ln_q", merger: ["mlp.0", "mlp.2"] },
        "qwen2_5_vl" => Names {
            ffn: &["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
            merger_norm: "ln_q",
            merger: ["mlp.0", "mlp.2"],
        },
        _ => Names {
            ffn: &["mlp.linear_fc1", "mlp.linear_fc2"],
            merger_norm: "norm",
            merger: ["linear_fc1", "linear_fc2"],
        },
    }
}

/// Loads the tower of `plan` from `files`: a checkpoint with a tower in it, or a mmproj file.
pub(crate) fn load_tower(
    plan: VisionPlan,
    files: &ModelFiles,
    compute: &Compute,
    progress: &mut dyn FnMut(LoadEvent),
) -> Result<Tower, Error> {
    let is_gguf = matches!(files, ModelFiles::Gguf(_));
    let is_there = |scope: &&str| files.tensors().iter().any(|t| t.name.starts_with(*scope));
    let scope = if is_gguf { "" } else { SCOPES.into_iter().find(is_there).unwrap_or(SCOPES[0]) };
    let facts = Facts {
        naming: Naming::Gguf,
        plan: None,
        architecture: plan.architecture,
        width: plan.width,
        norms: NormWeights::Plain,
        scope,
    };
    let loader = Loader::over(files, compute, facts, progress)?;
    TowerLoader { loader, is_gguf, scope, names: tower_names(&plan), plan: &plan }
        .load()
        .map(|parts| parts.into_tower(plan))
}

struct TowerLoader<'a, 'p> {
    loader: Loader<'a>,
    is_gguf: bool,
    scope: &'static str,
    names: Names,
    plan: &'p VisionPlan,
}

/// A tower before its plan joins it.
struct Parts {
    patch: Weight,
    patch_bias: Option<Vec<f32>>,
    table: Option<Vec<f32>>,
    blocks: Vec<Block>,
    merger: Merger,
    stacked: Vec<Merger>,
}

impl Parts {
    fn into_tower(self, plan: VisionPlan) -> Tower {
        let Parts { patch, patch_bias, table, blocks, merger, stacked } = self;
        Tower { plan, patch, patch_bias, table, blocks, merger, stacked }
    }
}

impl TowerLoader<'_, '_> {
    fn load(mut self) -> Result<Parts, Error> {
        let plan = self.plan;
        let (width, merged) = (plan.width, plan.width * plan.patch.merged());
        let patch = self.patch()?;
        let patch_bias = match plan.patch.bias {
            true => Some(self.vector("patch_embed.proj.bias", "v.patch_embd.bias", width)?),
            false => None,
        };
        let table = match plan.table_side {
            None => None,
            Some(side) => {
                let name = self.name("pos_embed.weight", "v.position_embd.weight");
                let info = self.loader.find(name, &[&[side * side, width]])?;
                Some(self.loader.values(info, width)?)
            }
        };
        let blocks = (0..plan.layers).map(|i| self.block(i)).collect::<Result<_, _>>()?;
        let [fc1, fc2] = self.names.merger;
        let norm = self.names.merger_norm;
        let merger = Merger {
            norm: self.norm(&format!("merger.{norm}"), "v.post_ln", width)?,
            fc1: self.linear(&format!("merger.{fc1}"), "mm.0", merged, merged)?,
            fc2: self.linear(&format!("merger.{fc2}"), "mm.2", plan.out_width, merged)?,
        };
        let mut stacked = Vec::with_capacity(plan.deepstack.len());
        for (k, layer) in plan.deepstack.iter().enumerate() {
            let (hf, gguf) = (format!("deepstack_merger_list.{k}"), format!("v.deepstack.{layer}"));
            stacked.push(Merger {
                norm: self.norm(&format!("{hf}.norm"), &format!("{gguf}.norm"), merged)?,
                fc1: self.linear(&format!("{hf}.linear_fc1"), &format!("{gguf}.fc1"), merged, merged)?,
                fc2: self.linear(&format!("{hf}.linear_fc2"), &format!("{gguf}.fc2"), plan.out_width, merged)?,
            });
        }
        self.loader.finish_but(|name| name.ends_with("rotary_pos_emb.inv_freq"))?;
        Ok(Parts { patch, patch_bias, table, blocks, merger, stacked })
    }

    fn name(&self, hf: &str, gguf: &str) -> String {
        if self.is_gguf { gguf.to_owned() } else { format!("{}{hf}", self.scope) }
    }

    fn vector(&mut self, hf: &str, gguf: &str, len: usize) -> Result<Vec<f32>, Error> {
        let name = self.name(hf, gguf);
        self.loader.vector(name, len)
    }

    /// A norm; the names are without `weight` and `bias`.
    fn norm(&mut self, hf: &str, gguf: &str, len: usize) -> Result<BlockNorm, Error> {
        let weight = self.vector(&format!("{hf}.weight"), &format!("{gguf}.weight"), len)?;
        let bias = match self.plan.norm {
            VisionNorm::Layer => Some(self.vector(&format!("{hf}.bias"), &format!("{gguf}.bias"), len)?),
            VisionNorm::RootMeanSquare => None,
        };
        Ok(BlockNorm { weight, bias })
    }

    /// A matrix and its bias; the names are without `weight` and `bias`.
    fn linear(&mut self, hf: &str, gguf: &str, rows: usize, cols: usize) -> Result<Linear, Error> {
        let weight = self.name(&format!("{hf}.weight"), &format!("{gguf}.weight"));
        Ok(Linear {
            weight: self.loader.matrix(weight, rows, cols)?,
            bias: self.vector(&format!("{hf}.bias"), &format!("{gguf}.bias"), rows)?,
        })
    }

    fn block(&mut self, i: usize) -> Result<Block, Error> {
        let (width, ffn) = (self.plan.width, self.plan.ffn);
        let (hf, gguf) = (format!("blocks.{i}"), format!("v.blk.{i}"));
        let norm1 = self.norm(&format!("{hf}.norm1"), &format!("{gguf}.ln1"), width)?;
        let [q, k, v] = self.qkv(&hf, &gguf)?;
        let proj = self.linear(&format!("{hf}.attn.proj"), &format!("{gguf}.attn_out"), width, width)?;
        let norm2 = self.norm(&format!("{hf}.norm2"), &format!("{gguf}.ln2"), width)?;
        let names = self.names.ffn;
        let mut matrix = |n: usize, own: &str, rows, cols| {
            self.linear(&format!("{hf}.{}", names[n]), &format!("{gguf}.{own}"), rows, cols)
        };
        let ffn = match ffn {
            VisionFfn::Plain { width: f, gelu } => {
                BlockFfn::Plain { fc1: matrix(0, "ffn_up", f, width)?, gelu, fc2: matrix(1, "ffn_down", width, f)? }
            }
            VisionFfn::Gated { width: f } => BlockFfn::Gated {
                gate: matrix(0, "ffn_gate", f, width)?,
                up: matrix(1, "ffn_up", f, width)?,
                down: matrix(2, "ffn_down", width, f)?,
            },
        };
        Ok(Block { norm1, q, k, v, proj, norm2, ffn })
    }

    /// Queries, keys and values: one tensor, in some GGUF files three.
    fn qkv(&mut self, hf: &str, gguf: &str) -> Result<[Linear; 3], Error> {
        let width = self.plan.width;
        let parts = ["q", "k", "v"];
        if self.is_gguf && self.loader.has(&format!("{gguf}.attn_q.weight")) {
            let [q, k, v] = parts.map(|part| self.linear("", &format!("{gguf}.attn_{part}"), width, width));
            return Ok([q?, k?, v?]);
        }
        let weight = self.name(&format!("{hf}.attn.qkv.weight"), &format!("{gguf}.attn_qkv.weight"));
        let info = self.loader.find(weight, &[&[3 * width, width]])?;
        let bias = self.vector(&format!("{hf}.attn.qkv.bias"), &format!("{gguf}.attn_qkv.bias"), 3 * width)?;
        let mut part = |n: usize| -> Result<Linear, Error> {
            let rows = n * width..(n + 1) * width;
            let bias = bias[rows.clone()].to_vec();
            Ok(Linear { weight: self.loader.matrix_of(info, width, std::slice::from_ref(&rows))?, bias })
        };
        Ok([part(0)?, part(1)?, part(2)?])
    }

    /// The patch embedding: (D, channels, frames, side, side) seen as a matrix. GGUF files have a tensor for each frame.
    fn patch(&mut self) -> Result<Weight, Error> {
        let (patch, width) = (self.plan.patch, self.plan.width);
        let (side, values) = (patch.side, patch.values());
        if !self.is_gguf {
            let name = self.name("patch_embed.proj.weight", "");
            let shape = [width, patch.channels, patch.frames, side, side];
            let info = self.loader.find(name, &[&shape])?;
            return self.loader.matrix_of(info, values, std::slice::from_ref(&(0..width)));
        }
        let shape = [width, patch.channels, side, side];
        let mut frames = Vec::with_capacity(patch.frames);
        for frame in 0..patch.frames {
            let name =
                if frame == 0 { "v.patch_embd.weight".to_owned() } else { format!("v.patch_embd.weight.{frame}") };
            frames.push(self.loader.find(name, &[&shape])?);
        }
        self.interleaved(&frames, side * side, (width, values))
    }

    /// The matrix whose rows take `piece` values of each tensor in turn.
    fn interleaved(
        &mut self,
        tensors: &[&TensorInfo],
        piece: usize,
        (rows, cols): (usize, usize),
    ) -> Result<Weight, Error> {
        let first = tensors[0];
        let size = match first.dtype {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            _ => return Err(self.loader.wrong_type(first, "F32, F16 or BF16")),
        };
        let mut stored = Vec::with_capacity(tensors.len());
        for info in tensors {
            if info.dtype != first.dtype {
                return Err(self.loader.wrong_type(info, "the type of the other frames"));
            }
            stored.push(self.loader.bytes(info, 0, info.len_bytes)?);
            self.loader.done(info.len_bytes);
        }
        let mut bytes = Vec::with_capacity(rows * cols * size);
        for at in (0..stored[0].len()).step_by(piece * size) {
            stored.iter().for_each(|tensor| bytes.extend_from_slice(&tensor[at..at + piece * size]));
        }
        self.loader.weight_from(first, first.dtype, (rows, cols), &bytes)
    }
}
