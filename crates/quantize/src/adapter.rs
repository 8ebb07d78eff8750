//! An adapter in the other form: a PEFT folder as a GGUF file, a GGUF file as a PEFT folder.

use std::path::Path;

use qwenkit_formats::{Adapter as File, AdapterNames, ModelFiles};
use qwenkit_models::{Adapter, Lora, arch};

use crate::{Error, metadata::unsayable, unproved::Unproved};

/// How far numbers may move, as a share of themselves: GGUF has one alpha for all modules, and what differs goes into B.
const ROUNDING: f32 = 1e-6;

/// Writes the adapter at `from` to `out`: a name that ends in .gguf makes a GGUF file, any other a PEFT folder. `base` is the
/// model that it adapts. What was written is read back and held against what was read before it has its name.
///
/// # Errors
/// When there is no adapter of this model, when the other form has no place for a part of it, or writing fails.
pub fn export_adapter(base: &ModelFiles, from: &Path, out: &Path) -> Result<(), Error> {
    let to_gguf = out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if out.exists() {
        return Err(unsayable(out, "the output", "there already", "a name that is free"));
    }
    let (file, plan) = (File::open(from)?, arch::plan(base)?);
    let before = Adapter::of_file(&plan, &file)?;
    let names = if to_gguf { AdapterNames::Gguf } else { AdapterNames::HuggingFace };
    let mut file = Adapter::in_form(&plan, file, from, names)?;
    if !to_gguf {
        // GGUF files do not list their modules, PEFT wants them.
        file = before.to_file(&plan, before.values(), file.settings);
    }
    let unproved = Unproved::new(out);
    match to_gguf {
        true => file.write_gguf(unproved.path(), arch::gguf_name(plan.architecture).unwrap_or_default())?,
        false => file.write_peft(unproved.path(), &std::collections::BTreeMap::new())?,
    }
    let after = Adapter::of_file(&plan, &File::open(unproved.path())?)?;
    if !is_same(&before, &after) {
        return Err(unsayable(out, "the adapter read back", "another one", "the one that was written"));
    }
    unproved.finish()
}

/// Whether two adapters add the same.
fn is_same(a: &Adapter, b: &Adapter) -> bool {
    let near = |(x, y): (f32, f32)| (x - y).abs() <= ROUNDING * x.abs().max(y.abs());
    let numbers = |one: &Adapter, lora: &Lora| -> Vec<f32> {
        let scaled = one.values()[lora.b()].iter().map(|b| b * lora.scale);
        one.values()[lora.a()].iter().copied().chain(scaled).collect()
    };
    let has_same = |lora: &Lora| {
        let other = b.loras().iter().find(|other| (other.layer, other.module) == (lora.layer, lora.module));
        other
            .filter(|other| other.rank == lora.rank)
            .is_some_and(|other| numbers(a, lora).into_iter().zip(numbers(b, other)).all(near))
    };
    let score = |one: &Adapter| one.score().map(|score| one.values()[score.weights()].to_vec());
    a.loras().len() == b.loras().len() && a.loras().iter().all(has_same) && score(a) == score(b)
}
