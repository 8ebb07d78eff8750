//! A run's state on disk, from which it goes on exactly: what is trained, the optimiser's memory, the best so far.
//!
//! A checkpoint is one file, written under another name until it is whole; a run that is killed at any moment finds the last
//! one as it was.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use qwenkit_formats::{Error as FormatError, read_safetensors_file, write_safetensors};
use qwenkit_tensor::DType;

use crate::{error::Error, optimiser::Moments};

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
        let mut parts: Vec<(&str, Cow<'_, [u8]>)> = vec![
            ("values", bytes(&self.values)),
            ("mean", bytes(&self.moments.mean)),
            ("square", bytes(&self.moments.square)),
        ];
        let mut remarks = BTreeMap::from([
            ("identity".to_owned(), identity.to_owned()),
            ("step".to_owned(), self.step.to_string()),
            ("updates".to_owned(), self.moments.steps.to_string()),
            ("worse".to_owned(), self.worse.to_string()),
            ("trend_now".to_owned(), self.trend.now.to_bits().to_string()),
            ("trend_lowest".to_owned(), self.trend.lowest.to_bits().to_string()),
        ]);
        if let Some(best) = &self.best {
            parts.push(("best", bytes(&best.values)));
            remarks.insert("best_step".to_owned(), best.step.to_string());
            remarks.insert("best_merit".to_owned(), best.merit.to_bits().to_string());
        }
        let shape = [self.values.len()];
        let list: Vec<_> = parts.iter().map(|(name, bytes)| (*name, DType::F32, &shape[..], &bytes[..])).collect();
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
        let values = |name: &str| -> Result<Vec<f32>, Error> {
            let info = file.tensor(name).filter(|info| info.dtype == DType::F32).ok_or_else(|| broken(name))?;
            let mut bytes = vec![0; info.len_bytes];
            file.read(info, 0, &mut bytes)?;
            Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let best = match remark("best_step") {
            None => None,
            Some(_) => Some(Cow::Owned(Best {
                step: number("best_step")? as usize,
                merit: f64::from_bits(number("best_merit")?),
                values: values("best")?,
            })),
        };
        let moments = Moments { steps: number("updates")?, mean: values("mean")?, square: values("square")? };
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
        if [checkpoint.moments.mean.len(), checkpoint.moments.square.len(), of_best] != [len; 3] {
            return Err(broken("lengths"));
        }
        Ok(Some(checkpoint))
    }
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
            moments: Cow::Owned(Moments { steps: 6, mean: vec![0.1, 0.2, 0.3], square: vec![0.4, 0.5, 0.6] }),
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
        for best in [checkpoint().best, None] {
            let written = Checkpoint { best, ..checkpoint() };
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
