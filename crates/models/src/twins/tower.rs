//! A vision tower's tensors: those of a checkpoint, and those of a mmproj file.

use super::{Builder, Change, Run, Twins};
use crate::{
    load::{SCOPES, tower_names},
    vision::{VisionFfn, VisionNorm, VisionPlan},
};

/// The twins, and what the names of the checkpoint's tensors begin with, of which `has` says whether there are any.
pub(super) fn twins(plan: &VisionPlan, has: impl Fn(&str) -> bool) -> (Twins, &'static str) {
    let scope = SCOPES.into_iter().find(|scope| has(scope)).unwrap_or(SCOPES[0]);
    let mut b = Tower { b: Builder::default(), scope, plan };
    b.build();
    (b.b.twins, scope)
}

struct Tower<'a> {
    b: Builder,
    scope: &'static str,
    plan: &'a VisionPlan,
}

impl Tower<'_> {
    fn same(&mut self, hf: &str, gguf: &str, shape: &[usize]) {
        self.b.same((format!("{}{hf}", self.scope), shape), (gguf.to_owned(), shape), Change::Keep);
    }

    /// Names are without `weight` and `bias`.
    fn norm(&mut self, hf: &str, gguf: &str, len: usize) {
        self.same(&format!("{hf}.weight"), &format!("{gguf}.weight"), &[len]);
        if self.plan.norm == VisionNorm::Layer {
            self.same(&format!("{hf}.bias"), &format!("{gguf}.bias"), &[len]);
        }
    }

    fn linear(&mut self, hf: &str, gguf: &str, rows: usize, cols: usize) {
        self.same(&format!("{hf}.weight"), &format!("{gguf}.weight"), &[rows, cols]);
        self.same(&format!("{hf}.bias"), &format!("{gguf}.bias"), &[rows]);
    }

    fn build(&mut self) {
        let plan = self.plan;
        let (width, merged, names) = (plan.width, plan.width * plan.patch.merged(), tower_names(plan));
        self.patch();
        if plan.patch.bias {
            self.same("patch_embed.proj.bias", "v.patch_embd.bias", &[width]);
        }
        if let Some(side) = plan.table_side {
            self.same("pos_embed.weight", "v.position_embd.weight", &[side * side, width]);
        }
        for i in 0..plan.layers {
            self.block(i);
        }
        let [fc1, fc2] = names.merger;
        self.norm(&format!("merger.{}", names.merger_norm), "v.post_ln", width);
        self.linear(&format!("merger.{fc1}"), "mm.0", merged, merged);
        self.linear(&format!("merger.{fc2}"), "mm.2", plan.out_width, merged);
        for (k, layer) in plan.deepstack.iter().enumerate() {
            let (hf, gguf) = (format!("deepstack_merger_list.{k}"), format!("v.deepstack.{layer}"));
            self.norm(&format!("{hf}.norm"), &format!("{gguf}.norm"), merged);
            self.linear(&format!("{hf}.linear_fc1"), &format!("{gguf}.fc1"), merged, merged);
            self.linear(&format!("{hf}.linear_fc2"), &format!("{gguf}.fc2"), plan.out_width, merged);
        }
    }

    fn block(&mut self, i: usize) {
        let (width, names) = (self.plan.width, tower_names(self.plan));
        let (hf, gguf) = (format!("blocks.{i}"), format!("v.blk.{i}"));
        self.norm(&format!("{hf}.norm1"), &format!("{gguf}.ln1"), width);
        self.norm(&format!("{hf}.norm2"), &format!("{gguf}.ln2"), width);
        self.qkv(&hf, &gguf);
        self.linear(&format!("{hf}.attn.proj"), &format!("{gguf}.attn_out"), width, width);
        let ffn = self.plan.ffn;
        let mut matrix = |n: usize, own: &str, rows, cols| {
            self.linear(&format!("{hf}.{}", names.ffn[n]), &format!("{gguf}.{own}"), rows, cols);
        };
        match ffn {
            VisionFfn::Plain { width: f, .. } => {
                matrix(0, "ffn_up", f, width);
                matrix(1, "ffn_down", width, f);
            }
            VisionFfn::Gated { width: f } => {
                matrix(0, "ffn_gate", f, width);
                matrix(1, "ffn_up", f, width);
                matrix(2, "ffn_down", width, f);
            }
        }
    }

    /// One tensor in newer towers' files, three in older ones'.
    fn qkv(&mut self, hf: &str, gguf: &str) {
        let width = self.plan.width;
        if self.plan.architecture == "qwen3_vl" {
            return self.linear(&format!("{hf}.attn.qkv"), &format!("{gguf}.attn_qkv"), 3 * width, width);
        }
        for (n, part) in ["q", "k", "v"].into_iter().enumerate() {
            for (kind, cols, shape) in [("weight", width, vec![width, width]), ("bias", 1, vec![width])] {
                let mut whole = shape.clone();
                whole[0] *= 3;
                let source = self.b.source(format!("{}{hf}.attn.qkv.{kind}", self.scope), &whole);
                let runs = vec![Run { source, first: n * width, count: width, step: 1 }];
                self.b.make(format!("{gguf}.attn_{part}.{kind}"), &shape, cols, runs, Change::Keep);
            }
        }
    }

    /// (D, channels, frames, side, side); a tensor for each frame in GGUF.
    fn patch(&mut self) {
        let patch = self.plan.patch;
        let (width, unit) = (self.plan.width, patch.side * patch.side);
        let shape = [width, patch.channels, patch.frames, patch.side, patch.side];
        let source = self.b.source(format!("{}patch_embed.proj.weight", self.scope), &shape);
        for frame in 0..patch.frames {
            let name =
                if frame == 0 { "v.patch_embd.weight".to_owned() } else { format!("v.patch_embd.weight.{frame}") };
            let runs = vec![Run { source, first: frame, count: width * patch.channels, step: patch.frames }];
            self.b.make(name, &[width, patch.channels, patch.side, patch.side], unit, runs, Change::Keep);
        }
    }
}
