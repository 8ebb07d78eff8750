//! A run's state on disk, from which it goes on exactly: what is trained, the optimiser's memory, the best so far.
//!
//! A checkpoint is one file, written under another name until it is whole; a run that is killed at any moment finds the last
//! one as it was.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use qwenkit_formats::{Error as FormatError, read_safetensors_file, write_safetensors};
use qwenkit_tensor::DType;

use crate::{
    dynamic::Blocks,
    error::Error,
    optimiser::{KeptMoments, Moments},
};

/// A run's state behind a step; one that is written is lent by the run, as it is several times what is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint<'a> {
    /// Steps done.
    pub step: usize,
    /// The adapter's numbers.
    pub values: Cow<'a, [f32]>,
    /// The optimiser's memory.
    pub moments: Cow<'a, Moments>,
    /// The best so far by validation, if there was one.
    pub best: Option<Cow<'a, Best>>,
    /// Validations since the best.
    pub worse: usize,
    /// Means of losses, by which a run that goes astray is seen.
    pub trend: Trend,
}

/// The best adapter by validation.
#[derive(Clone, Debug, PartialEq)]
pub struct Best {
    /// Behind which step.
    pub step: usize,
    /// What it was chosen by; less is better.
    pub merit: f64,
    /// Its numbers.
    pub values: Vec<f32>,
}

/// Running means of a run's losses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Trend {
    /// Of the last steps.
    pub now: f64,
    /// The lowest that it was.
    pub lowest: f64,
}

impl Checkpoint<'_> {
    /// Writes the checkpoint; `identity` says of which run it is.
    ///
    /// # Errors
    /// When writing fails; what was there before is still there then.
    pub fn write(&self, path: &Path, identity: &str) -> Result<(), Error> {
        let floats = |name, x| Part { name, dtype: DType::F32, bytes: bytes(x) };
        let mut parts = vec![floats("values", &self.values)];
        match &self.moments.kept {
            KeptMoments::F32 { mean, square } => parts.extend([floats("mean", mean), floats("square", square)]),
            KeptMoments::Bits8 { mean, square } => {
                let codes = |name, x| Part { name, dtype: DType::U8, bytes: Cow::Borrowed(x) };
                parts.extend([codes("mean", &mean.codes[..]), floats("mean_scales", &mean.scales)]);
                parts.extend([codes("square", &square.codes[..]), floats("square_scales", &square.scales)]);
            }
        }
        let mut remarks = BTreeMap::from([
            ("identity".to_owned(), identity.to_owned()),
            ("step".to_owned(), self.step.to_string()),
            ("updates".to_owned(), self.moments.steps.to_string()),
            ("worse".to_owned(), self.worse.to_string()),
            ("trend_now".to_owned(), self.trend.now.to_bits().to_string()),
            ("trend_lowest".to_owned(), self.trend.lowest.to_bits().to_string()),
        ]);
        if let Some(best) = &self.best {
            parts.push(floats("best", &best.values));
            remarks.insert("best_step".to_owned(), best.step.to_string());
            remarks.insert("best_merit".to_owned(), best.merit.to_bits().to_string());
        }
        let shapes: Vec<[usize; 1]> = parts.iter().map(|part| [part.bytes.len() / part.dtype.block_bytes()]).collect();
        let list: Vec<_> =
            parts.iter().zip(&shapes).map(|(p, shape)| (p.name, p.dtype, &shape[..], &p.bytes[..])).collect();
        Ok(write_safetensors(path, &list, &remarks)?)
    }

    /// Of which run the checkpoint is; `None` where there is none that says it.
    pub fn identity(path: &Path) -> Option<String> {
        read_safetensors_file(path).ok()?.metadata().get("identity").cloned()
    }

    /// Reads the checkpoint of the run `identity`; `None` where there is none.
    ///
    /// # Errors
    /// When it cannot be read, is not whole, or is another run's.
    pub fn read(path: &Path, identity: &str) -> Result<Option<Checkpoint<'static>>, Error> {
        let file = match read_safetensors_file(path) {
            Err(FormatError::NotFound { .. }) => return Ok(None),
            other => other?,
        };
        let broken = |what: &str| Error::Checkpoint { path: path.to_owned(), what: what.to_owned() };
        let remark = |key: &str| file.metadata().get(key).map(String::as_str);
        let number = |key: &str| remark(key).and_then(|text| text.parse::<u64>().ok()).ok_or_else(|| broken(key));
        let found = remark("identity").ok_or_else(|| broken("identity"))?;
        if found != identity {
            return Err(Error::OtherRun { path: path.to_owned(), differences: differences(found, identity) });
        }
        let stored = |name: &str, dtype: DType| -> Result<Vec<u8>, Error> {
            let info = file.tensor(name).filter(|info| info.dtype == dtype).ok_or_else(|| broken(name))?;
            let mut bytes = vec![0; info.len_bytes];
            file.read(info, 0, &mut bytes)?;
            Ok(bytes)
        };
        let values = |name: &str| -> Result<Vec<f32>, Error> {
            let info = file.tensor(name).filter(|info| info.dtype == DType::F32).ok_or_else(|| broken(name))?;
            // Read to where they stay: of a whole model they are several times its size.
            let mut values = vec![0.0; info.len_bytes / 4];
            file.read(info, 0, bytemuck::cast_slice_mut(&mut values))?;
            if cfg!(target_endian = "big") {
                values.iter_mut().for_each(|x: &mut f32| *x = f32::from_bits(x.to_bits().swap_bytes()));
            }
            Ok(values)
        };
        let in_blocks = file.tensor("mean").is_some_and(|info| info.dtype == DType::U8);
        let kept = match in_blocks {
            false => KeptMoments::F32 { mean: values("mean")?, square: values("square")? },
            true => {
                let blocks = |codes: &str, scales: &str| -> Result<Blocks, Error> {
                    Ok(Blocks { codes: stored(codes, DType::U8)?, scales: values(scales)? })
                };
                let (mean, square) = (blocks("mean", "mean_scales")?, blocks("square", "square_scales")?);
                KeptMoments::Bits8 { mean, square }
            }
        };
        let best = match remark("best_step") {
            None => None,
            Some(_) => Some(Cow::Owned(Best {
                step: number("best_step")? as usize,
                merit: f64::from_bits(number("best_merit")?),
                values: values("best")?,
            })),
        };
        let moments = Moments { steps: number("updates")?, kept };
        let checkpoint = Checkpoint {
            step: number("step")? as usize,
            values: Cow::Owned(values("values")?),
            moments: Cow::Owned(moments),
            best,
            worse: number("worse")? as usize,
            trend: Trend { now: f64::from_bits(number("trend_now")?), lowest: f64::from_bits(number("trend_lowest")?) },
        };
        let len = checkpoint.values.len();
        let of_best = checkpoint.best.as_ref().map_or(len, |best| best.values.len());
        if checkpoint.moments.len() != Some(len) || of_best != len {
            return Err(broken("lengths"));
        }
        Ok(Some(checkpoint))
    }
}

/// A tensor of the file.
struct Part<'a> {
    name: &'a str,
    dtype: DType,
    bytes: Cow<'a, [u8]>,
}

/// Numbers as they stand in the file; of most machines these are their own bytes.
fn bytes(x: &[f32]) -> Cow<'_, [u8]> {
    match cfg!(target_endian = "little") {
        true => Cow::Borrowed(bytemuck::cast_slice(x)),
        false => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// The lines in which two identities differ, for people.
fn differences(found: &str, expected: &str) -> String {
    let (found, expected): (Vec<&str>, Vec<&str>) = (found.lines().collect(), expected.lines().collect());
    let missing = |of: &[&str], others: &[&str]| {
        of.iter().filter(|line| !others.contains(line)).map(|line| line.trim()).collect::<Vec<_>>().join(", ")
    };
    format!("then: {}; now: {}", missing(&found, &expected), missing(&expected, &found))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint() -> Checkpoint<'static> {
        Checkpoint {
            step: 7,
            values: Cow::Owned(vec![1.0, -0.1, f32::MIN_POSITIVE]),
            moments: Cow::Owned(Moments {
                steps: 6,
                kept: KeptMoments::F32 { mean: vec![0.1, 0.2, 0.3], square: vec![0.4, 0.5, 0.6] },
            }),
            best: Some(Cow::Owned(Best { step: 5, merit: 0.1 + 0.2, values: vec![3.0, 2.0, 1.0] })),
            worse: 2,
            trend: Trend { now: 0.3, lowest: 0.1 },
        }
    }

    #[test]
    fn what_was_written_comes_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        assert_eq!(Checkpoint::read(&path, "a").unwrap(), None);
        let blocks = |first: u8| Blocks { codes: vec![first, 0, 255], scales: vec![0.1] };
        let kept = KeptMoments::Bits8 { mean: blocks(3), square: blocks(4) };
        let in_8_bits = Moments { steps: 6, kept };
        let moments = [checkpoint().moments.into_owned(), in_8_bits];
        for (best, moments) in [checkpoint().best, None].into_iter().zip(moments) {
            let written = Checkpoint { best, moments: Cow::Owned(moments), ..checkpoint() };
            written.write(&path, "rank: 4\nlr: 1").unwrap();
            assert_eq!(Checkpoint::read(&path, "rank: 4\nlr: 1").unwrap(), Some(written));
        }
    }

    #[test]
    fn another_runs_and_broken_ones_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        checkpoint().write(&path, "rank: 4\nlr: 1").unwrap();
        let message = Checkpoint::read(&path, "rank: 8\nlr: 1").unwrap_err().to_string();
        assert!(message.contains("then: rank: 4; now: rank: 8"), "{message}");
        let bytes = std::fs::read(&path).unwrap();
        for len in [0, 9, bytes.len() / 2, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert!(Checkpoint::read(&path, "rank: 4\nlr: 1").is_err(), "{len} bytes");
        }
    }
}
