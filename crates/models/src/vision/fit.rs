//! Whether a tower is that of the text model: refuses the towers of other models.
//!
//! Contract: whatever both files say is compared. A GGUF model says little of its tower, so the names of the two files tell. A
//! checkpoint describes a tower of its own and mostly holds it too: a mmproj file beside it has to be the same one, to the values.

use std::path::Path;

use qwenkit_formats::{Gguf, ModelFiles, TensorInfo};
use qwenkit_kernels::dequantize_row;
use qwenkit_tensor::DType;

use super::{plan::VisionPlan, read};
use crate::{
    error::Error,
    load::{SCOPES, tower_names},
    plan::{Plan, Sight},
};

/// How far values of one tensor may be apart, as a share of the largest: more than half precision loses.
const ROUNDING: f32 = 4e-3;

/// A tower's file and the text model that shall see by it.
pub(super) struct Pair<'a> {
    pub(super) files: &'a ModelFiles,
    pub(super) text: &'a Plan,
    pub(super) sight: &'a Sight,
    /// The tower's file, or the checkpoint that holds it.
    pub(super) path: &'a Path,
}

impl Pair<'_> {
    /// The plan of the tower in `mmproj`. Where a checkpoint describes its tower, that is taken, as mmproj files do not say all.
    pub(super) fn of_mmproj(&self, mmproj: &Gguf) -> Result<VisionPlan, Error> {
        let found = read::of_mmproj(mmproj)?;
        self.check(&found)?;
        match self.files {
            ModelFiles::Gguf(gguf) => {
                let [tower, model] = [mmproj, gguf].map(|gguf| gguf.metadata().string("general.name"));
                if let (Some(tower), Some(model)) = (tower?, model?)
                    && let (Some(a), Some(b)) = (generation(tower), generation(model))
                    && a != b
                {
                    return Err(self.other("model", format!("`{tower}`"), format!("that of `{model}`")));
                }
                Ok(found)
            }
            ModelFiles::Checkpoint(checkpoint) => {
                let own = read::of_config(checkpoint.config(), self.text.width)?;
                if let Some((what, found, own)) = found.difference(&own) {
                    let expected = format!("{own} as in {}", checkpoint.config().path().display());
                    return Err(self.other(what, found, expected));
                }
                match self.holds_the_same(&own, mmproj)? {
                    Some(true) => {}
                    Some(false) => {
                        let expected = format!("those of the tower in {}", self.files.path().display());
                        return Err(self.other("content", "other values".to_owned(), expected));
                    }
                    None => self.check_name(mmproj)?,
                }
                Ok(own)
            }
        }
    }

    /// Refuses a tower whose plan does not go with the text model.
    pub(super) fn check(&self, plan: &VisionPlan) -> Result<(), Error> {
        let Pair { text, sight, .. } = self;
        if !sight.towers.contains(&plan.architecture) {
            return Err(self.other("architecture", plan.architecture.to_owned(), sight.towers.join(" or ")));
        }
        if plan.out_width != text.width {
            let expected = format!("{} as in {}", text.width, self.files.path().display());
            return Err(self.other("output width", plan.out_width.to_string(), expected));
        }
        let stacked = plan.deepstack.len();
        if let Some(expected) = sight.deepstack.filter(|&expected| expected != stacked) {
            return Err(self.other("number of DeepStack layers", stacked.to_string(), expected.to_string()));
        }
        if stacked > text.layers.len() {
            let expected = format!("at most the {} layers of the text model", text.layers.len());
            return Err(self.other("number of DeepStack layers", stacked.to_string(), expected));
        }
        Ok(())
    }

    fn other(&self, what: &'static str, found: String, expected: String) -> Error {
        let architecture = self.text.architecture;
        Error::OtherTower { path: self.path.to_owned(), what, found, expected, architecture }
    }

    /// Refuses a mmproj file whose name speaks of another generation than the text model's architecture.
    fn check_name(&self, mmproj: &Gguf) -> Result<(), Error> {
        let architecture = self.text.architecture;
        let (Some(name), Some(own)) = (mmproj.metadata().string("general.name")?, generation(architecture)) else {
            return Ok(());
        };
        // 3.6 and 3.8 are architecture 3.5, and mixtures rarely say that they are.
        let is_other = |(number, is_mixture): (String, bool)| line(&number) != line(&own.0) || (is_mixture && !own.1);
        if generation(name).is_some_and(is_other) {
            return Err(self.other("model", format!("`{name}`"), format!("that of a {architecture} model")));
        }
        Ok(())
    }

    /// Whether the mmproj file has the values of the checkpoint's own tower; `None` where the checkpoint holds none. The merger's norm tells:
    /// it lies in both files as it was trained.
    fn holds_the_same(&self, own: &VisionPlan, mmproj: &Gguf) -> Result<Option<bool>, Error> {
        let norm = format!("merger.{}.weight", tower_names(own).merger_norm);
        let here = SCOPES.iter().find_map(|scope| self.files.tensor(&format!("{scope}{norm}")));
        let (Some(here), Some(there)) = (here, mmproj.tensor("v.post_ln.weight")) else { return Ok(None) };
        let here = plain(here, |out| self.files.read(here, 0, out))?;
        let there = plain(there, |out| mmproj.read(there, 0, out))?;
        let (Some(here), Some(there)) = (here, there) else { return Ok(None) };
        let largest = here.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        let is_near = |(a, b): (&f32, &f32)| (a - b).abs() <= ROUNDING * largest;
        Ok(Some(here.len() == there.len() && here.iter().zip(&there).all(is_near)))
    }
}

/// A tensor's values, if they are stored one by one.
fn plain(
    info: &TensorInfo,
    read: impl FnOnce(&mut [u8]) -> Result<(), qwenkit_formats::Error>,
) -> Result<Option<Vec<f32>>, Error> {
    if !matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Ok(None);
    }
    let mut bytes = vec![0; info.len_bytes];
    read(&mut bytes)?;
    let mut values = vec![0.0; info.shape.iter().product()];
    dequantize_row(info.dtype, &bytes, &mut values);
    Ok(Some(values))
}

/// Which Qwen a name means: its number, and whether it says that it is a mixture. `None` of a name without a number.
fn generation(name: &str) -> Option<(String, bool)> {
    let lower = name.to_ascii_lowercase();
    let (_, rest) = lower.split_once("qwen")?;
    let rest = rest.trim_start_matches(['-', '_', ' ']);
    let number: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    let mut number = number.trim_end_matches('.').to_owned();
    // `qwen2_5_vl` is 2.5, `qwen3_4b` is not 3.4.
    let mut parts = rest.split('_');
    if let (Some(first), Some(second)) = (parts.next(), parts.next())
        && first == number
        && matches!(second.as_bytes(), [digit] if digit.is_ascii_digit())
    {
        number = format!("{number}.{second}");
    }
    (!number.is_empty()).then(|| (number, lower.contains("moe")))
}

/// What of a generation's number decides on its architecture: 2 and 2.5 are two, 3.5 and 3.6 one.
fn line(number: &str) -> (&str, bool) {
    match number.split_once('.') {
        Some((whole, _)) => (whole, true),
        None => (number, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_which_qwen_it_means() {
        for (name, number, is_mixture) in [
            ("Qwen2.5 Vl", "2.5", false),
            ("qwen2_5_vl", "2.5", false),
            ("Qwen3-VL-30B-A3B-Instruct", "3", false),
            ("qwen3_vl_moe", "3", true),
            ("qwen3_5_moe", "3.5", true),
            ("Qwen3_4B_Instruct", "3", false),
            ("Qwen3.6 27B", "3.6", false),
            ("unsloth_Qwen 2 VL", "2", false),
        ] {
            assert_eq!(generation(name), Some((number.to_owned(), is_mixture)), "{name}");
        }
        for name in ["QVQ 72B", "Qwen VL", "a tower"] {
            assert_eq!(generation(name), None, "{name}");
        }
        assert_eq!(line("3.5"), line("3.8"));
        assert_ne!(line("3"), line("3.5"));
        assert_ne!(line("2"), line("3"));
    }
}
