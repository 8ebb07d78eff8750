//! LoRA adapters as files: a PEFT folder (`adapter_config.json` and `adapter_model.safetensors`) or a GGUF file.
//!
//! An adapter says of some modules of a base model: to `W x` add `scale * B (A x)`, and with DoRA scale each output to a
//! stored length. Every tensor of a file belongs to a module or is a whole tensor in place of the base's; every module that
//! the settings promise is there; whatever cannot be represented is refused. What the modules are in a model, and the
//! arithmetic, belongs to higher floors.

mod gguf;
mod peft;
mod settings;

use std::path::{Path, PathBuf};

pub use self::settings::AdapterSettings;

use crate::Error;

/// Settings file of a PEFT folder.
pub(crate) const CONFIG: &str = "adapter_config.json";
/// Weights of a PEFT folder.
pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";

/// How an adapter's file spells the modules of its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterNames {
    /// `model.layers.0.self_attn.q_proj`
    HuggingFace,
    /// `blk.0.attn_q`
    Gguf,
}

/// A LoRA adapter in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// What it was made with.
    pub settings: AdapterSettings,
    /// How module names are spelt.
    pub names: AdapterNames,
    /// `general.architecture` of a GGUF adapter's base.
    pub gguf_architecture: Option<String>,
    /// The adapted matrices, sorted by name.
    pub modules: Vec<AdapterModule>,
    /// Tensors that stand in the place of the base's, or beside them (`modules_to_save`), sorted by name.
    pub whole: Vec<AdapterTensor>,
}

/// What an adapter adds to one matrix W: (out, in).
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterModule {
    /// The module's path in the base model, without `.weight`.
    pub name: String,
    /// Inputs of W.
    pub inputs: usize,
    /// Outputs of W.
    pub outputs: usize,
    /// R
    pub rank: usize,
    /// What `B A` is multiplied with: `alpha / R`, of rank-stabilised adapters `alpha / sqrt(R)`.
    pub scale: f32,
    /// (R, in)
    pub a: Vec<f32>,
    /// (out, R)
    pub b: Vec<f32>,
    /// DoRA: the length of each row of the adapted W, (out)
    pub magnitude: Option<Vec<f32>>,
}

/// A whole tensor of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterTensor {
    /// Its name in the base model, such as `lm_head.weight`.
    pub name: String,
    /// Outermost axis first.
    pub shape: Vec<usize>,
    /// All values.
    pub values: Vec<f32>,
}

impl Adapter {
    /// Opens a PEFT folder, its `adapter_config.json`, or a GGUF adapter.
    ///
    /// # Errors
    /// When the files are not a whole LoRA adapter, or say something that is not understood.
    pub fn open(path: &Path) -> Result<Adapter, Error> {
        if path.is_dir() {
            return peft::read(path);
        }
        if path.file_name().is_some_and(|name| name == CONFIG) {
            return peft::read(path.parent().unwrap_or(Path::new(".")));
        }
        gguf::read(path)
    }

    /// Writes a PEFT folder, which is made if it does not exist. `remarks` become the `__metadata__` of the weights. The
    /// settings are written last: a folder that has them is whole.
    ///
    /// # Errors
    /// When module names are not Hugging Face's, sizes contradict each other, or writing fails.
    pub fn write_peft(&self, dir: &Path, remarks: &std::collections::BTreeMap<String, String>) -> Result<(), Error> {
        self.check(dir)?;
        peft::write(self, dir, remarks)
    }

    /// Writes a GGUF adapter as llama.cpp reads them. Module names must be GGUF's (see `renamed`).
    ///
    /// # Errors
    /// When the adapter has what GGUF adapters cannot hold (DoRA, whole tensors), or writing fails.
    pub fn write_gguf(&self, path: &Path, architecture: &str) -> Result<(), Error> {
        self.check(path)?;
        gguf::write(self, path, architecture)
    }

    /// The same adapter with every module called by its other name; `name` gives it, and `None` refuses the module.
    ///
    /// # Errors
    /// When a module has no name in the other world.
    pub fn renamed(
        mut self,
        path: &Path,
        names: AdapterNames,
        name: impl Fn(&str) -> Option<String>,
    ) -> Result<Adapter, Error> {
        for module in &mut self.modules {
            let Some(other) = name(&module.name) else {
                let expected = match names {
                    AdapterNames::HuggingFace => "a module that has a Hugging Face name",
                    AdapterNames::Gguf => "a module that has a name in GGUF files",
                };
                return Err(wrong(path, &module.name, "this module".into(), expected.into()));
            };
            module.name = other;
        }
        self.names = names;
        self.modules.sort_by(|x, y| x.name.cmp(&y.name));
        Ok(self)
    }

    /// That all sizes agree: a caller's slip must not become a broken file.
    fn check(&self, path: &Path) -> Result<(), Error> {
        for m in &self.modules {
            let sizes = [("lora_A", m.a.len(), m.rank * m.inputs), ("lora_B", m.b.len(), m.rank * m.outputs)];
            let magnitude = m.magnitude.as_ref().map(|v| ("lora_magnitude_vector", v.len(), m.outputs));
            for (part, found, expected) in sizes.into_iter().chain(magnitude) {
                if found != expected || m.rank == 0 {
                    let name = format!("{}.{part}", m.name);
                    return Err(wrong(
                        path,
                        &name,
                        format!("{found} values"),
                        format!("{expected} and a rank above 0"),
                    ));
                }
            }
        }
        for t in &self.whole {
            let expected: usize = t.shape.iter().product();
            if t.values.len() != expected {
                return Err(wrong(path, &t.name, format!("{} values", t.values.len()), format!("{expected}")));
            }
        }
        Ok(())
    }
}

/// An error about a tensor of the adapter at `path`.
fn wrong(path: &Path, tensor: &str, found: String, expected: String) -> Error {
    Error::AdapterTensor { path: PathBuf::from(path), tensor: tensor.to_owned(), found, expected }
}

/// The halves of modules, collected while a file is read.
#[derive(Default)]
struct Halves {
    a: Option<(Vec<usize>, Vec<f32>)>,
    b: Option<(Vec<usize>, Vec<f32>)>,
    magnitude: Option<(Vec<usize>, Vec<f32>)>,
}

impl Halves {
    /// The module, if its parts fit each other.
    fn join(self, path: &Path, name: &str, settings: &AdapterSettings) -> Result<AdapterModule, Error> {
        let missing =
            |part: &str| wrong(path, &format!("{name}.{part}"), "none".into(), "both halves of a module".into());
        let (a_shape, a) = self.a.ok_or_else(|| missing("lora_A"))?;
        let (b_shape, b) = self.b.ok_or_else(|| missing("lora_B"))?;
        let (&[rank, inputs], &[outputs, b_rank]) = (a_shape.as_slice(), b_shape.as_slice()) else {
            let found = format!("shapes {a_shape:?} and {b_shape:?}");
            return Err(wrong(path, name, found, "two matrices (R, in) and (out, R)".into()));
        };
        let expected = settings.rank_of(name);
        if rank != b_rank || rank == 0 || expected.is_some_and(|r| r != rank) {
            let of_settings = expected.map_or_else(String::new, |r| format!(" of rank {r}, as {CONFIG} says"));
            let found = format!("ranks {rank} in lora_A and {b_rank} in lora_B");
            return Err(wrong(path, name, found, format!("the same{of_settings}")));
        }
        let magnitude = match (self.magnitude, settings.use_dora) {
            (None, false) => None,
            (Some((shape, values)), true)
                if values.len() == outputs && shape.iter().all(|&n| n == 1 || n == outputs) =>
            {
                Some(values)
            }
            (found, use_dora) => {
                let found = found.map_or("none".into(), |(shape, _)| format!("shape {shape:?}"));
                let expected = if use_dora { format!("[{outputs}]") } else { "none, as use_dora is false".into() };
                return Err(wrong(path, &format!("{name}.lora_magnitude_vector"), found, expected));
            }
        };
        if let Some(index) = a.iter().chain(&b).chain(magnitude.iter().flatten()).position(|x| !x.is_finite()) {
            let expected = "finite numbers; the training run that wrote them went wrong".into();
            return Err(wrong(path, name, format!("value {index} is not finite"), expected));
        }
        let scale = settings.scale_of(name, rank);
        Ok(AdapterModule { name: name.to_owned(), inputs, outputs, rank, scale, a, b, magnitude })
    }
}

#[cfg(test)]
mod tests;
