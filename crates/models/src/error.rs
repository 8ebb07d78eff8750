//! Why a model could not be loaded: facts with values, and what to do.

use std::path::PathBuf;

use qwenkit_tensor::{AllocError, DType};

use crate::vision::fitting_towers;

/// Why a model could not be planned or loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading the file failed, or a key of it is wrong.
    #[error(transparent)]
    Format(#[from] qwenkit_formats::Error),

    /// An architecture that QwenKit does not compute.
    #[error(
        "{path}: architecture `{found}` is not one that this version runs; it runs {supported}{nearest}",
        path = path.display()
    )]
    Architecture {
        /// The file or folder.
        path: PathBuf,
        /// The name found.
        found: String,
        /// The names known.
        supported: String,
        /// The nearest known thing, as the end of the sentence.
        nearest: String,
    },

    /// A file that goes with a model and is none itself.
    #[error("{path} holds {found}, expected a model; {hint}", path = path.display())]
    NotAModel {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: &'static str,
        /// What to do.
        hint: &'static str,
    },

    /// A value that no such model has.
    #[error("{path}: `{key}` is {found}, expected {expected}", path = path.display())]
    Value {
        /// The file or folder.
        path: PathBuf,
        /// The key.
        key: String,
        /// The value found.
        found: String,
        /// What would have been right.
        expected: String,
    },

    /// Tensors that the plan names are not in the file.
    #[error(
        "{path}, read as {architecture}: tensor `{name}` {shape:?} is missing{beside}",
        path = path.display()
    )]
    TensorMissing {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// The shape that the plan gives it.
        shape: Vec<usize>,
        /// What the file says it is.
        architecture: &'static str,
        /// How many others are missing, what is there instead, and what to do: the end of the sentence.
        beside: Box<str>,
    },

    /// A tensor of another shape than the plan's.
    #[error(
        "{path}: tensor `{name}`: expected {expected:?}, found {found:?}{nearest}\n\
         hint: the weights are not those that the configuration describes; take both from one place",
        path = path.display()
    )]
    TensorShape {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// The plan's shape.
        expected: Box<[usize]>,
        /// The file's shape.
        found: Box<[usize]>,
        /// What would make it right, as the end of the sentence.
        nearest: Box<str>,
    },

    /// A tensor of a type that cannot be used where it stands.
    #[error("{path}: tensor `{name}` has type {found}, expected {expected}", path = path.display())]
    TensorType {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// The type found.
        found: DType,
        /// The types that would do.
        expected: &'static str,
    },

    /// Tensors that the plan does not name.
    #[error(
        "{path}: {count} tensors belong to no part of a {architecture} model, the first is `{first}`{looks}; \
         running without them would give wrong answers\n\
         hint: the weights are not those that the configuration describes, or somebody has added to them; take both from one place",
        path = path.display()
    )]
    TensorsUnused {
        /// The file or folder.
        path: PathBuf,
        /// How many.
        count: usize,
        /// One of them.
        first: String,
        /// What the file says it is.
        architecture: &'static str,
        /// Which models have such tensors, or which of its own is most like it, in the middle of the sentence.
        looks: String,
    },

    /// An image for a model that takes none.
    #[error("{path}: {architecture} reads text only, found an image or a tower for images; take a model with vision, such as Qwen3-VL", path = path.display())]
    Blind {
        /// The file or folder.
        path: PathBuf,
        /// What the file says it is.
        architecture: &'static str,
    },

    /// An image for a model whose tower is in another file.
    #[error(
        "{path} holds the text part of a {architecture} model alone, and an image needs the tower too; \
         expected a mmproj file beside it or named with --mmproj, found none; what fits is {fits}",
        path = path.display(), fits = fitting_towers(architecture)
    )]
    NoTower {
        /// The model's file.
        path: PathBuf,
        /// What the file says it is.
        architecture: &'static str,
    },

    /// Guesses by a block that the model does not have.
    #[error(
        "{path}: expected a block that guesses tokens (mtp.* in checkpoints, blk.N.nextn.* in GGUF), found {found} in this \
         {architecture} model; leave --speculate to its default, or take a file that was made with the whole block",
        path = path.display()
    )]
    NoMtp {
        /// The file or folder.
        path: PathBuf,
        /// What is there of it.
        found: String,
        /// What the file says it is.
        architecture: &'static str,
    },

    /// A tower that belongs to another model.
    #[error(
        "{path} is the tower of another model: its {what} is {found}, expected {expected}; \
         take the mmproj file from the same place as the model: what fits is {fits}",
        path = path.display(), fits = fitting_towers(architecture)
    )]
    OtherTower {
        /// The tower's file.
        path: PathBuf,
        /// What does not fit.
        what: &'static str,
        /// What the tower has.
        found: String,
        /// What the model needs.
        expected: String,
        /// What the model is.
        architecture: &'static str,
    },

    /// A file that should be a tower and is none.
    #[error(
        "{path} holds {found}, expected the vision tower of a model (mmproj); what fits is {fits}",
        path = path.display(), fits = fitting_towers(architecture)
    )]
    NotATower {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: String,
        /// What the model is that should see by it.
        architecture: &'static str,
    },

    /// Patches that are no image of this tower's.
    #[error("pixel values: found {found}, expected {expected}")]
    Pixels {
        /// What was found.
        found: String,
        /// What would have been right.
        expected: String,
    },

    /// An adapter that does not fit the model.
    #[error("the adapter's `{part}`: found {found}, expected {expected}")]
    Adapter {
        /// The module or tensor.
        part: String,
        /// What was found.
        found: String,
        /// What would have been right.
        expected: String,
    },

    /// A block that cannot be trained through.
    #[error(
        "layer {layer} has {found}, through which nothing can be trained yet\nhint: models of attention or DeltaNet with dense blocks or mixtures can be tuned"
    )]
    NoBackward {
        /// The layer.
        layer: usize,
        /// The block.
        found: &'static str,
    },

    /// A model whose own numbers cannot be trained.
    #[error(
        "{found}: its own weights cannot be trained\nhint: dense models of Qwen2, Qwen2.5 and Qwen3 can; an adapter (--method lora) can be trained for any"
    )]
    NotWhole {
        /// What was found.
        found: String,
    },

    /// No memory.
    #[error(transparent)]
    Alloc(#[from] AllocError),
}
