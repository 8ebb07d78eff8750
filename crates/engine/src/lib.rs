//! Floor 3: the engine - one loop on one thread that turns requests into tokens, and the session that speaks text with it.
//!
//! The loop (`engine`, `scheduler`, `sampler`, `pages`) knows token ids only; `session` and `model_text` alone know
//! tokenizers and templates. Contract: a request's tokens do not depend on what else the engine is doing. Nothing here
//! prints, downloads or serves.

#![forbid(unsafe_code)]

mod answer;
mod disk;
mod drafter;
mod embedding;
mod engine;
mod error;
mod eyes;
mod guide;
mod held;
mod load;
mod lookup;
mod memory;
mod model_text;
mod pace;
mod pages;
mod pictures;
mod processor;
mod random;
mod request;
mod runner;
mod sampler;
mod scheduler;
pub mod score;
mod sequence;
mod session;
mod speculate;
pub mod split;
mod stop_text;
mod trail;
mod vision;
mod worth;

pub use answer::{Answer, Piece, Summary, TextPiece, Transcript};
pub use disk::PrefixCache;
pub use embedding::{Input, Reading, query_text, unit_vector};
pub use engine::{Canceller, Engine};
pub use error::Error;
pub use guide::{Guide, ThoughtEnd, Verdict};
pub use held::Hold;
pub use load::Load;
pub use memory::available_memory_bytes;
pub use model_text::{ModelText, text_of};
pub use pictures::{Picture, Pictures};
pub use processor::image_processor;
pub use request::{Event, Finish, Goal, Miss, Missed, Priority, Request, TokenLogprobs};
pub use sampler::Sampling;
pub use sequence::Listener;
pub use session::{Ask, Info, Options, Prompt, Session};
pub use speculate::Speculate;
pub use vision::{Placed, View, VisionInfo, Visual, VisualKind};
