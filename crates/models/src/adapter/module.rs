//! The matrices that an adapter may add to: their names in both worlds, their shapes in a plan.

use crate::{
    names::{self, Pair},
    plan::{Ffn, Mixer, Plan},
};

/// A matrix of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // each is its name in Hugging Face's checkpoints
pub enum Module {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
    SharedGateProj,
    SharedUpProj,
    SharedDownProj,
    InProjQkv,
    InProjZ,
    InProjB,
    InProjA,
    OutProj,
}

impl Module {
    /// How many there are.
    pub const COUNT: usize = 15;

    /// All of them.
    pub const ALL: [Module; Module::COUNT] = [
        Module::QProj,
        Module::KProj,
        Module::VProj,
        Module::OProj,
        Module::GateProj,
        Module::UpProj,
        Module::DownProj,
        Module::SharedGateProj,
        Module::SharedUpProj,
        Module::SharedDownProj,
        Module::InProjQkv,
        Module::InProjZ,
        Module::InProjB,
        Module::InProjA,
        Module::OutProj,
    ];

    /// The last step of its path in checkpoints, such as `q_proj`.
    pub fn name(self) -> &'static str {
        let path = self.pair().0;
        path.rsplit_once('.').map_or(path, |(_, name)| name)
    }

    /// Its path inside a layer: in checkpoints, in GGUF files.
    pub(super) fn pair(self) -> Pair {
        let (hf, gguf) = match self {
            Module::QProj => names::Q_PROJ,
            Module::KProj => names::K_PROJ,
            Module::VProj => names::V_PROJ,
            Module::OProj => names::O_PROJ,
            Module::GateProj => names::GATE_PROJ,
            Module::UpProj => names::UP_PROJ,
            Module::DownProj => names::DOWN_PROJ,
            Module::SharedGateProj => names::SHARED_GATE,
            Module::SharedUpProj => names::SHARED_UP,
            Module::SharedDownProj => names::SHARED_DOWN,
            Module::InProjQkv => names::IN_QKV,
            Module::InProjZ => names::IN_Z,
            Module::InProjB => names::IN_B,
            Module::InProjA => names::IN_A,
            Module::OutProj => names::DELTA_OUT,
        };
        (hf.trim_end_matches(".weight"), gguf.trim_end_matches(".weight"))
    }

    /// (inputs, outputs) of the matrix in a layer; `None` where the layer has none.
    pub fn shape(self, plan: &Plan, layer: usize) -> Option<(usize, usize)> {
        let (width, layer) = (plan.width, plan.layers.get(layer)?);
        match self {
            Module::QProj | Module::KProj | Module::VProj | Module::OProj => {
                let Mixer::Attention(a) = &layer.mixer else { return None };
                let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
                Some(match self {
                    Module::QProj => (width, if a.output_gate { 2 * q } else { q }),
                    Module::OProj => (q, width),
                    _ => (width, kv),
                })
            }
            Module::GateProj | Module::UpProj | Module::DownProj => match layer.ffn {
                Ffn::Dense { width: f } => Some(if self == Module::DownProj { (f, width) } else { (width, f) }),
                Ffn::Moe(_) => None,
            },
            Module::SharedGateProj | Module::SharedUpProj | Module::SharedDownProj => match layer.ffn {
                Ffn::Moe(moe) => {
                    let f = moe.shared_width?;
                    Some(if self == Module::SharedDownProj { (f, width) } else { (width, f) })
                }
                Ffn::Dense { .. } => None,
            },
            _ => {
                let Mixer::DeltaNet(d) = &layer.mixer else { return None };
                Some(match self {
                    Module::InProjQkv => (width, d.shape.channels()),
                    Module::InProjZ => (width, d.shape.value_width()),
                    Module::OutProj => (d.shape.value_width(), width),
                    _ => (width, d.shape.value_heads),
                })
            }
        }
    }
}
