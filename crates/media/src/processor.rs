//! The numbers of an image processor, as `preprocessor_config.json` has them.

use serde_json::Value;

use crate::decode::PIXELS_MAX;
use crate::error::Error;

/// How images become patches.
#[derive(Clone, Debug, PartialEq)]
pub struct Processor {
    /// Pixels of a patch's side.
    pub patch_size: usize,
    /// Patches of the side of a square that becomes one token.
    pub merge_size: usize,
    /// Frames that a patch reaches through; an image is repeated so many times.
    pub temporal_patch_size: usize,
    /// Subtracted from colours between 0 and 1.
    pub image_mean: [f32; 3],
    /// What they are divided by then.
    pub image_std: [f32; 3],
    /// Pixels that an image is brought to at least.
    pub min_pixels: usize,
    /// Pixels that an image is brought to at most.
    pub max_pixels: usize,
}

fn wrong(field: &'static str, found: impl ToString, expected: impl Into<String>) -> Error {
    Error::Processor { field, found: found.to_string(), expected: expected.into() }
}

impl Processor {
    /// From a parsed `preprocessor_config.json`. The limits are `min_pixels` and `max_pixels` or, in newer files,
    /// `size.shortest_edge` and `size.longest_edge`, which are numbers of pixels in spite of their names; where a file has both
    /// the plain ones count, as in transformers. `merge_size` and `temporal_patch_size` are 2 where they are absent.
    ///
    /// # Errors
    /// When a number is missing, of another type, or out of range.
    pub fn from_json(config: &Value) -> Result<Processor, Error> {
        if !config.is_object() {
            return Err(wrong(
                "{}",
                config,
                "an object with patch_size, image_mean, image_std, min_pixels, max_pixels",
            ));
        }
        let pixels = |plain: &'static str, edge: &'static str| {
            let of = |value: Option<&Value>| value.filter(|value| !value.is_null()).cloned();
            let sized = || of(config.get("size").and_then(|size| size.get(edge)));
            number(plain, of(config.get(plain)).or_else(sized).as_ref(), None)
        };
        let processor = Processor {
            patch_size: number("patch_size", config.get("patch_size"), None)?,
            merge_size: number("merge_size", config.get("merge_size"), Some(2))?,
            temporal_patch_size: number("temporal_patch_size", config.get("temporal_patch_size"), Some(2))?,
            image_mean: colours("image_mean", config.get("image_mean"))?,
            image_std: colours("image_std", config.get("image_std"))?,
            min_pixels: pixels("min_pixels", "shortest_edge")?,
            max_pixels: pixels("max_pixels", "longest_edge")?,
        };
        processor.check()?;
        Ok(processor)
    }

    /// Pixels of the side of a square that becomes one token.
    pub fn factor(&self) -> usize {
        self.patch_size * self.merge_size
    }

    /// Checks that every number is in range.
    ///
    /// # Errors
    /// When one is not.
    pub fn check(&self) -> Result<(), Error> {
        let within = |field, found: usize, max: usize| match (1..=max).contains(&found) {
            true => Ok(()),
            false => Err(wrong(field, found, format!("1 to {max}"))),
        };
        within("patch_size", self.patch_size, 256)?;
        within("merge_size", self.merge_size, 16)?;
        within("temporal_patch_size", self.temporal_patch_size, 16)?;
        within("max_pixels", self.max_pixels, PIXELS_MAX as usize)?;
        within("min_pixels", self.min_pixels, self.max_pixels)?;
        let finite = |mean: &f32| mean.is_finite();
        if !self.image_mean.iter().all(finite) {
            return Err(wrong("image_mean", format!("{:?}", self.image_mean), "finite numbers"));
        }
        match self.image_std.iter().all(|std| std.is_finite() && *std > 0.0) {
            true => Ok(()),
            false => Err(wrong("image_std", format!("{:?}", self.image_std), "numbers above 0")),
        }
    }
}

fn number(field: &'static str, value: Option<&Value>, otherwise: Option<usize>) -> Result<usize, Error> {
    match (value, otherwise) {
        (None | Some(Value::Null), Some(number)) => Ok(number),
        (None | Some(Value::Null), None) => Err(wrong(field, "nothing", "a whole number")),
        (Some(value), _) => value
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .ok_or_else(|| wrong(field, value, "a whole number of 0 or more")),
    }
}

fn colours(field: &'static str, value: Option<&Value>) -> Result<[f32; 3], Error> {
    let value = value.ok_or_else(|| wrong(field, "nothing", "three numbers"))?;
    let numbers = value.as_array().map(|all| all.iter().map(|x| x.as_f64().map(|x| x as f32)));
    let numbers: Option<Vec<f32>> = numbers.and_then(Iterator::collect);
    numbers.and_then(|all| all.try_into().ok()).ok_or_else(|| wrong(field, value, "three numbers"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config() -> Value {
        json!({ "patch_size": 16, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
                "min_pixels": 4096, "max_pixels": 50176 })
    }

    #[test]
    fn both_spellings_of_the_limits_are_read() {
        let old = Processor::from_json(&config()).expect("whole");
        assert_eq!((old.factor(), old.min_pixels, old.max_pixels), (32, 4096, 50_176));
        let mut new = config();
        new.as_object_mut().expect("an object").retain(|key, _| !key.ends_with("pixels"));
        assert!(Processor::from_json(&new).is_err());
        new["size"] = json!({ "shortest_edge": 4096, "longest_edge": 50176 });
        new["min_pixels"] = Value::Null;
        assert_eq!(Processor::from_json(&new).expect("whole"), old);
    }

    #[test]
    fn numbers_out_of_range_are_refused_by_name() {
        for (field, value) in [
            ("patch_size", json!(0)),
            ("patch_size", json!(-16)),
            ("patch_size", json!("16")),
            ("merge_size", json!(1 << 20)),
            ("image_mean", json!([0.5, 0.5])),
            ("image_mean", json!([1e300, 0.5, 0.5])),
            ("image_std", json!([0.5, 0.5, 0.0])),
            ("min_pixels", json!(50177)),
            ("max_pixels", json!(u64::MAX)),
        ] {
            let mut config = config();
            config[field] = value;
            let error = Processor::from_json(&config).expect_err(field).to_string();
            assert!(error.contains(field) && error.contains("expected"), "{error}");
        }
        assert!(Processor::from_json(&json!([])).is_err());
    }
}
