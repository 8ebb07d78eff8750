//! Tensors as values, wherever they come from: a file's own, or those that `Twins` make of them.
//!
//! Values are asked for in pieces, by several threads at once, and nothing is kept between two pieces.

use std::ops::Range;
use std::path::Path;

use qwenkit_formats::{ModelFiles, TensorInfo};
use qwenkit_kernels::{dequantize_row, is_weight_type};
use qwenkit_models::{Change, Twin, Twins};
use qwenkit_tensor::DType;

use crate::Error;

/// A tensor's outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    /// Its name.
    pub name: String,
    /// Outermost axis first.
    pub shape: Vec<usize>,
    /// What its values are stored as where they come from.
    pub dtype: DType,
}

impl Spec {
    /// How many values it has.
    pub(crate) fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Values along the last axis.
    pub(crate) fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1).max(1)
    }
}

/// A list of tensors that can be read.
pub(crate) trait Tensors: Sync {
    /// The model that they come from, for messages.
    fn path(&self) -> &Path;

    /// The tensors, in the order of their numbers.
    fn specs(&self) -> &[Spec];

    /// Values `range` of tensor `index`, as if its axes were one.
    ///
    /// # Errors
    /// When reading fails.
    fn values(&self, index: usize, range: Range<usize>, out: &mut Vec<f32>) -> Result<(), Error>;

    /// The tensor in a file, where its bytes are its own values in order.
    fn stored(&self, index: usize) -> Option<(&ModelFiles, &TensorInfo)>;
}

/// A file's own tensors.
pub(crate) struct Stored<'a> {
    files: &'a ModelFiles,
    specs: Vec<Spec>,
}

impl<'a> Stored<'a> {
    /// All tensors of `files`.
    pub(crate) fn new(files: &'a ModelFiles) -> Stored<'a> {
        let spec = |t: &TensorInfo| Spec { name: t.name.clone(), shape: t.shape.clone(), dtype: t.dtype };
        Stored { files, specs: files.tensors().iter().map(spec).collect() }
    }
}

impl Tensors for Stored<'_> {
    fn path(&self) -> &Path {
        self.files.path()
    }

    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    fn values(&self, index: usize, range: Range<usize>, out: &mut Vec<f32>) -> Result<(), Error> {
        let info = &self.files.tensors()[index];
        let dtype = info.dtype;
        if !is_weight_type(dtype) {
            return Err(Error::Unsayable {
                path: self.path().to_owned(),
                what: format!("the type of tensor `{}`", info.name),
                found: dtype.to_string(),
                expected: "F32, F16, BF16 or a block-quantised type".into(),
            });
        }
        // Whole blocks around the range.
        let block = dtype.block_len();
        let (first, last) = (range.start / block, range.end.div_ceil(block));
        let mut bytes = vec![0; (last - first) * dtype.block_bytes()];
        self.files.read(info, first * dtype.block_bytes(), &mut bytes)?;
        let start = out.len();
        out.resize(start + (last - first) * block, 0.0);
        dequantize_row(dtype, &bytes, &mut out[start..]);
        let before = range.start - first * block;
        if before > 0 {
            out.drain(start..start + before);
        }
        out.truncate(start + range.len());
        Ok(())
    }

    fn stored(&self, index: usize) -> Option<(&ModelFiles, &TensorInfo)> {
        Some((self.files, &self.files.tensors()[index]))
    }
}

/// Tensors that are made of others.
pub(crate) struct Renamed<'a> {
    from: Box<dyn Tensors + 'a>,
    specs: Vec<Spec>,
    /// Index into `from` of each source that runs name.
    sources: Vec<usize>,
    made: Vec<Made>,
}

struct Made {
    twin: Twin,
    /// The first unit of each run among the twin's.
    starts: Vec<usize>,
    /// The source whose values these are, in order and unchanged.
    whole: Option<usize>,
}

impl<'a> Renamed<'a> {
    /// Makes all of `twins`.
    ///
    /// # Errors
    /// When `from` lacks a source.
    pub(crate) fn new(from: Box<dyn Tensors + 'a>, twins: Twins) -> Result<Renamed<'a>, Error> {
        let by_name: std::collections::HashMap<&str, usize> =
            from.specs().iter().enumerate().map(|(i, spec)| (spec.name.as_str(), i)).collect();
        let find = |source: &qwenkit_models::Source| {
            by_name.get(source.name.as_str()).copied().ok_or_else(|| Error::Unsayable {
                path: from.path().to_owned(),
                what: format!("tensor `{}`", source.name),
                found: "missing".into(),
                expected: format!("{:?}", source.shape),
            })
        };
        let sources = twins.sources.iter().map(find).collect::<Result<Vec<_>, _>>()?;
        let (mut specs, mut made) = (Vec::new(), Vec::new());
        for twin in twins.made {
            let mut units = 0;
            let starts = twin
                .runs
                .iter()
                .map(|run| {
                    units += run.count;
                    units - run.count
                })
                .collect();
            let first = twin.runs.first().map_or(0, |run| sources[run.source]);
            let whole = match twin.runs.as_slice() {
                [run] if run.first == 0 && run.step == 1 && twin.change == Change::Keep => {
                    let all = from.specs()[first].values() == run.count * twin.unit;
                    all.then_some(first)
                }
                _ => None,
            };
            let dtype = from.specs()[first].dtype;
            specs.push(Spec { name: twin.name.clone(), shape: twin.shape.clone(), dtype });
            made.push(Made { starts, whole, twin });
        }
        Ok(Renamed { from, specs, sources, made })
    }
}

impl Tensors for Renamed<'_> {
    fn path(&self) -> &Path {
        self.from.path()
    }

    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    fn values(&self, index: usize, range: Range<usize>, out: &mut Vec<f32>) -> Result<(), Error> {
        let Made { twin, starts, whole } = &self.made[index];
        if let Some(source) = whole {
            return self.from.values(*source, range, out);
        }
        let (unit, begin) = (twin.unit, out.len());
        // Strided runs of one source lie between each other: what one has read serves the next.
        let mut held: Option<(usize, usize, Vec<f32>)> = None;
        let mut at = range.start;
        let mut r = starts.partition_point(|&start| start * unit <= at).saturating_sub(1);
        while at < range.end {
            let run = &twin.runs[r];
            let run_start = starts[r] * unit;
            let end = range.end.min(run_start + run.count * unit);
            let source = self.sources[run.source];
            if run.step == 1 {
                let first = run.first * unit + at - run_start;
                self.from.values(source, first..first + end - at, out)?;
            } else {
                let span = run.first - run.first % run.step;
                let span_end = (run.first + (run.count - 1) * run.step + 1).next_multiple_of(run.step);
                let (from, to) = (span * unit, (span_end * unit).min(self.from.specs()[source].values()));
                if held
                    .as_ref()
                    .is_none_or(|(s, start, values)| *s != source || from < *start || to > start + values.len())
                {
                    let mut values = Vec::new();
                    self.from.values(source, from..to, &mut values)?;
                    held = Some((source, from, values));
                }
                let Some((_, start, values)) = &held else { unreachable!("it was just read") };
                while at < end {
                    let (i, within) = ((at - run_start) / unit, (at - run_start) % unit);
                    let first = (run.first + i * run.step) * unit + within - start;
                    let len = (unit - within).min(end - at);
                    out.extend_from_slice(&values[first..first + len]);
                    at += len;
                }
            }
            at = end;
            r += 1;
        }
        if twin.change != Change::Keep {
            out[begin..].iter_mut().for_each(|x| *x = twin.change.of(*x));
        }
        Ok(())
    }

    fn stored(&self, index: usize) -> Option<(&ModelFiles, &TensorInfo)> {
        self.made[index].whole.and_then(|source| self.from.stored(source))
    }
}
