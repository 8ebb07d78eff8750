//! Floor 2: Qwen models as data. A file's configuration becomes a `Plan`; shared blocks load and compute it.
//!
//! One definition serves every weight type, because a `Weight` knows how to multiply. No block asks which model it
//! serves: switches in the plan say what to do. Scheduling, sampling and text are not here.

#![forbid(unsafe_code)]

mod adapter;
pub mod arch;
mod blocks;
mod error;
mod forward;
mod grad;
mod guess;
mod load;
mod missing;
mod names;
mod near;
mod plan;
mod rope;
mod state;
mod tap;
mod twins;
mod vision;
mod wanted;
mod whole;

pub use adapter::{Adapter, Lora, LoraShape, Module, Score};
pub use error::Error;
pub use forward::{Batch, BatchSeq, Buffers, Outputs, Seen, SeenRows};
pub use grad::{Aim, Lesson, LessonSize, Tape};
pub use guess::{GuessSeq, Guesses};
pub use load::{LoadEvent, Model};
pub use plan::{
    AttentionPlan, DeltaNetPlan, Ffn, IndexerPlan, LayerPlan, Mixer, MoePlan, NgramPlan, NormWeights, Plan, RopePlan,
    RopeSections, Sight, StateNeed, StreamsPlan, Yarn,
};
pub use state::{LayerState, ModelState, NgramState, RecurrentState};
pub use tap::{Site, Tap};
pub use twins::{Change, Run, Source, Twin, Twins};
pub use vision::{
    Encoding, Grid, PatchPlan, Pixels, Positions, Span, Tower, TowerBuffers, VisionFfn, VisionNorm, VisionPlan,
    Windows, mmproj_beside, vision_plan,
};
pub use whole::{Whole, WholeTensor};
