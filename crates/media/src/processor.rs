//! The numbers of an image processor, as `preprocessor_config.json` has them.

use serde_json::Value;

use crate::error::Error;

/// No model sees more pixels; beyond it a file is broken or hostile.
const MAX_PIXELS_LIMIT: usize = 64 << 20;

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
    /// The same of films.
    pub films: FilmBounds,
}

/// Pixels that the frames of a film are brought to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilmBounds {
    /// Each frame alone (Qwen2-VL, Qwen2.5-VL).
    Frame {
        /// At least.
        min_pixels: usize,
        /// At most.
        max_pixels: usize,
    },
    /// All frames together (Qwen3-VL and later).
    Film {
        /// At least.
        min_pixels: usize,
        /// At most.
        max_pixels: usize,
    },
}

fn wrong(field: &'static str, found: impl ToString, expected: impl Into<String>) -> Error {
    Error::Processor { field, found: found.to_string(), expected: expected.into() }
}

/// A key's value, unless it is null.
fn of<'a>(config: &'a Value, key: &str) -> Option<&'a Value> {
    config.get(key).filter(|value| !value.is_null())
}

impl Processor {
    /// What published models of a tower have: OpenAI's mean and deviation and 28 x 28 pixels to 16384 tokens with patches of 14
    /// pixels, and a half and a half and 64 to 16384 tokens with others.
    pub fn of_patches(patch_size: usize, merge_size: usize, temporal_patch_size: usize) -> Processor {
        let (image_mean, image_std, min_pixels, max_pixels) = match patch_size {
            14 => {
                let mean = [0.481_454_66, 0.457_827_5, 0.408_210_73];
                (mean, [0.268_629_54, 0.261_302_6, 0.275_777_1], 3_136, 12_845_056)
            }
            _ => ([0.5; 3], [0.5; 3], 65_536, 16_777_216),
        };
        Processor {
            patch_size,
            merge_size,
            temporal_patch_size,
            image_mean,
            image_std,
            min_pixels,
            max_pixels,
            films: FilmBounds::published(patch_size, merge_size),
        }
    }

    /// From a parsed `preprocessor_config.json`, or `processor_config.json`, which has the same under `image_processor`. The limits
    /// are `min_pixels` and `max_pixels` or, in newer files, `size.shortest_edge` and `size.longest_edge`, which are numbers of
    /// pixels in spite of their names; where a file has both the plain ones count, as in transformers. `merge_size` and
    /// `temporal_patch_size` are 2 where they are absent.
    ///
    /// # Errors
    /// When a number is missing, of another type, or out of range, or when the file asks for something else than these steps.
    pub fn from_json(config: &Value) -> Result<Processor, Error> {
        let whole = config;
        let config = of(whole, "image_processor").unwrap_or(whole);
        if !config.is_object() {
            let expected = "an object with patch_size, image_mean, image_std, min_pixels and max_pixels";
            return Err(wrong("(the file)", config, expected));
        }
        for step in ["do_resize", "do_rescale", "do_normalize"] {
            if of(config, step).is_some_and(|value| *value != Value::Bool(true)) {
                return Err(wrong(step, &config[step], "true"));
            }
        }
        if let Some(found) = of(config, "resample").filter(|value| value.as_u64() != Some(3)) {
            return Err(wrong("resample", found, "3 (bicubic)"));
        }
        if let Some(found) = of(config, "rescale_factor")
            && !found.as_f64().is_some_and(|factor| (factor * 255.0 - 1.0).abs() < 1e-6)
        {
            return Err(wrong("rescale_factor", found, "1 / 255"));
        }
        let patch_size = number("patch_size", of(config, "patch_size"), None)?;
        let merge_size = number("merge_size", of(config, "merge_size"), Some(2))?;
        let films = match of(whole, "video_processor") {
            Some(videos) => FilmBounds::from_json(videos, patch_size, merge_size)?,
            None => FilmBounds::published(patch_size, merge_size),
        };
        let processor = Processor {
            patch_size,
            merge_size,
            temporal_patch_size: number("temporal_patch_size", of(config, "temporal_patch_size"), Some(2))?,
            image_mean: colours("image_mean", of(config, "image_mean"))?,
            image_std: colours("image_std", of(config, "image_std"))?,
            min_pixels: bound(config, Bound::Min)?,
            max_pixels: bound(config, Bound::Max)?,
            films,
        };
        processor.check()?;
        Ok(processor)
    }

    /// The same with a film's limits of a parsed `video_preprocessor_config.json`.
    ///
    /// # Errors
    /// When a limit is missing, of another type, or out of range.
    pub fn with_films(self, config: &Value) -> Result<Processor, Error> {
        let films = FilmBounds::from_json(config, self.patch_size, self.merge_size)?;
        let processor = Processor { films, ..self };
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
        let (film_min, film_max) = self.films.limits();
        for (min_pixels, max_pixels) in [(self.min_pixels, self.max_pixels), (film_min, film_max)] {
            within("max_pixels", max_pixels, MAX_PIXELS_LIMIT)?;
            within("min_pixels", min_pixels, max_pixels)?;
        }
        if !self.image_mean.iter().all(|mean| mean.is_finite()) {
            return Err(wrong("image_mean", format!("{:?}", self.image_mean), "finite numbers"));
        }
        match self.image_std.iter().all(|std| std.is_finite() && *std > 0.0) {
            true => Ok(()),
            false => Err(wrong("image_std", format!("{:?}", self.image_std), "numbers above 0")),
        }
    }
}

impl FilmBounds {
    /// What published models have: 128 to 768 tokens for a frame, or for a film.
    fn published(patch_size: usize, merge_size: usize) -> FilmBounds {
        let token = patch_size.saturating_mul(merge_size).saturating_pow(2);
        FilmBounds::new(patch_size, token.saturating_mul(128), token.saturating_mul(768))
    }

    fn new(patch_size: usize, min_pixels: usize, max_pixels: usize) -> FilmBounds {
        match patch_size {
            14 => FilmBounds::Frame { min_pixels, max_pixels },
            _ => FilmBounds::Film { min_pixels, max_pixels },
        }
    }

    fn from_json(config: &Value, patch_size: usize, merge_size: usize) -> Result<FilmBounds, Error> {
        if ["min_pixels", "max_pixels", "size"].iter().all(|key| of(config, key).is_none()) {
            return Ok(FilmBounds::published(patch_size, merge_size));
        }
        Ok(FilmBounds::new(patch_size, bound(config, Bound::Min)?, bound(config, Bound::Max)?))
    }

    fn limits(&self) -> (usize, usize) {
        let (FilmBounds::Frame { min_pixels, max_pixels } | FilmBounds::Film { min_pixels, max_pixels }) = *self;
        (min_pixels, max_pixels)
    }
}

#[derive(Clone, Copy)]
enum Bound {
    Min,
    Max,
}

/// A limit in either spelling.
fn bound(config: &Value, bound: Bound) -> Result<usize, Error> {
    let (plain, edge) = match bound {
        Bound::Min => ("min_pixels", "shortest_edge"),
        Bound::Max => ("max_pixels", "longest_edge"),
    };
    let sized = || of(config, "size").and_then(|size| of(size, edge));
    number(plain, of(config, plain).or_else(sized), None)
}

fn number(field: &'static str, value: Option<&Value>, otherwise: Option<usize>) -> Result<usize, Error> {
    // Some writers have 14.0 for 14.
    let whole = |x: f64| (x.fract() == 0.0 && (0.0..1e15).contains(&x)).then_some(x as usize);
    match (value, otherwise) {
        (None, Some(number)) => Ok(number),
        (None, None) => Err(wrong(field, "nothing", "a whole number")),
        (Some(value), _) => {
            value.as_f64().and_then(whole).ok_or_else(|| wrong(field, value, "a whole number of 0 or more"))
        }
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
        assert_eq!(Processor::from_json(&json!({ "image_processor": new })).expect("whole"), old);
    }

    #[test]
    fn limits_of_films_come_from_their_own_file_or_are_the_published_ones() {
        let processor = Processor::from_json(&config()).expect("whole");
        assert_eq!(processor.films, FilmBounds::Film { min_pixels: 128 << 10, max_pixels: 768 << 10 });
        let own = json!({ "size": { "shortest_edge": 4096, "longest_edge": 8192 } });
        let limited = processor.clone().with_films(&own).expect("whole");
        assert_eq!(limited.films, FilmBounds::Film { min_pixels: 4096, max_pixels: 8192 });
        assert!(processor.with_films(&json!({ "size": { "shortest_edge": 2, "longest_edge": 1 } })).is_err());
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
            ("do_resize", json!(false)),
            ("resample", json!(2)),
            ("rescale_factor", json!(1)),
        ] {
            let mut config = config();
            config[field] = value;
            let error = Processor::from_json(&config).expect_err(field).to_string();
            assert!(error.contains(field) && error.contains("expected"), "{error}");
        }
        assert!(Processor::from_json(&json!([])).is_err());
    }
}
