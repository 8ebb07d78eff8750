//! One tensor of a file after the other: found by name, checked against the plan's shape, packed, and counted as used.

use std::{collections::HashSet, ops::Range};

use qwenkit_formats::{Error as FormatError, ModelFiles, TensorInfo};
use qwenkit_kernels::{Compute, LoadError, Weight, dequantize_row, is_weight_type, packed_bytes, quantize_row};
use qwenkit_tensor::{DType, HugeArena};

use super::LoadEvent;
use crate::{
    error::Error,
    missing::Place,
    names::{Naming, Pair},
    plan::{NormWeights, Plan},
};

/// Where a copy is held against its original: so many places of so many bytes.
const COPY_PLACES: usize = 64;
const COPY_BYTES: usize = 4096;

/// What weights may be stored as.
const WEIGHT_TYPES: &str = "F32, F16, BF16 or a quantised type whose blocks fill its rows";

/// A file that is being loaded.
pub(super) struct Loader<'a> {
    pub(super) files: &'a ModelFiles,
    pub(super) compute: &'a Compute,
    pub(super) naming: Naming,
    /// D
    pub(super) width: usize,
    architecture: &'static str,
    /// The text model that is being loaded.
    plan: Option<&'a Plan>,
    norms: NormWeights,
    used: HashSet<String>,
    /// What the names of its own tensors begin with; others are not its business.
    scope: &'static str,
    event: LoadEvent,
    progress: &'a mut dyn FnMut(LoadEvent),
    /// Where packed weights go, side by side.
    arena: HugeArena,
    /// What matrices of quantised types become, if anything else.
    pub(super) instead: Option<DType>,
}

/// What a loader has to know beside the file.
pub(super) struct Facts<'a> {
    pub(super) naming: Naming,
    /// Of a text model.
    pub(super) plan: Option<&'a Plan>,
    pub(super) architecture: &'static str,
    pub(super) width: usize,
    pub(super) norms: NormWeights,
    pub(super) scope: &'static str,
}

impl<'a> Loader<'a> {
    pub(super) fn new(
        files: &'a ModelFiles,
        compute: &'a Compute,
        plan: &'a Plan,
        progress: &'a mut dyn FnMut(LoadEvent),
    ) -> Result<Loader<'a>, Error> {
        let naming = Naming::of_files(files);
        let (architecture, width, norms) = (plan.architecture, plan.width, plan.norms);
        let facts = Facts { naming, plan: Some(plan), architecture, width, norms, scope: "" };
        Loader::over(files, compute, facts, progress)
    }

    /// A loader of the tensors whose names begin with the scope.
    pub(super) fn over(
        files: &'a ModelFiles,
        compute: &'a Compute,
        facts: Facts<'a>,
        progress: &'a mut dyn FnMut(LoadEvent),
    ) -> Result<Loader<'a>, Error> {
        let Facts { naming, plan, architecture, width, norms, scope } = facts;
        let own = || files.tensors().iter().filter(|t| t.name.starts_with(scope));
        let event = LoadEvent { done_bytes: 0, total_bytes: own().map(|t| t.len_bytes as u64).sum() };
        let arena = HugeArena::new(own().map(arena_bytes).sum())?;
        let used = HashSet::new();
        Ok(Loader {
            files,
            compute,
            naming,
            architecture,
            plan,
            width,
            norms,
            used,
            scope,
            event,
            progress,
            arena,
            instead: None,
        })
    }

    /// Whether the file has a tensor of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.files.tensor(name).is_some()
    }

    /// Counts a tensor as used that need not be there, and has to say the same as another.
    ///
    /// # Errors
    /// When it says something else.
    pub(super) fn copy_of(&mut self, copy: Pair, original: Pair) -> Result<(), Error> {
        let [copy, original] = [copy, original].map(|pair| self.naming.outer(pair));
        let (Some(found), Some(own)) = (self.files.tensor(&copy), self.files.tensor(&original)) else { return Ok(()) };
        let mut differs = found.shape != own.shape;
        if !differs && found.dtype == own.dtype {
            // What was trained apart differs everywhere, so some places tell.
            let step = (own.len_bytes / COPY_PLACES).max(COPY_BYTES);
            for start in (0..own.len_bytes).step_by(step) {
                let len = COPY_BYTES.min(own.len_bytes - start);
                differs |= self.bytes(found, start, len)? != self.bytes(own, start, len)?;
            }
        }
        if differs {
            return Err(Error::Value {
                path: self.files.path().to_owned(),
                key: "tie_word_embeddings".to_owned(),
                found: "true".to_owned(),
                expected: format!("false, as `{copy}` is another matrix than `{original}`; or a file without it"),
            });
        }
        self.used.insert(copy);
        Ok(())
    }

    pub(super) fn outer(&mut self, pair: Pair, rows: usize, cols: usize) -> Result<Weight, Error> {
        self.matrix(self.naming.outer(pair), rows, cols)
    }

    /// An output head, in the form from which the best tokens are found soonest.
    pub(super) fn head(&mut self, pair: Pair, rows: usize, cols: usize) -> Result<Weight, Error> {
        if self.instead.is_some() {
            return self.outer(pair, rows, cols);
        }
        let info = self.find(self.naming.outer(pair), &[&[rows, cols]])?;
        let files = self.files;
        let read = |start: usize, out: &mut [u8]| files.read(info, start, out);
        let weight = Weight::load_head(self.compute.pool(), &self.arena, info.dtype, rows, cols, read);
        let weight = weight.map_err(|e| self.load_error(info, e))?;
        self.done(info.len_bytes);
        Ok(weight)
    }

    pub(super) fn inner(&mut self, layer: usize, pair: Pair, rows: usize, cols: usize) -> Result<Weight, Error> {
        self.matrix(self.naming.inner(layer, pair), rows, cols)
    }

    pub(super) fn matrix(&mut self, name: String, rows: usize, cols: usize) -> Result<Weight, Error> {
        let info = self.find(name, &[&[rows, cols]])?;
        self.matrix_of(info, cols, std::slice::from_ref(&(0..rows)))
    }

    /// The matrix whose rows are the `runs` one after the other; `info` is seen as rows of `cols`, whatever its axes.
    pub(super) fn matrix_of(&mut self, info: &TensorInfo, cols: usize, runs: &[Range<usize>]) -> Result<Weight, Error> {
        let files = self.files;
        let rows = runs.iter().map(Range::len).sum();
        let row_bytes = info.dtype.row_bytes(cols).unwrap_or(0);
        let read = |start: usize, mut out: &mut [u8]| {
            // Whole rows are asked for, and rows are not empty: `Weight::load` has refused the type otherwise.
            let mut skipped = start.checked_div(row_bytes).unwrap_or(0);
            for run in runs {
                if skipped >= run.len() {
                    skipped -= run.len();
                    continue;
                }
                let first = run.start + skipped;
                let bytes = ((run.end - first) * row_bytes).min(out.len());
                let (now, later) = out.split_at_mut(bytes);
                files.read(info, first * row_bytes, now)?;
                (out, skipped) = (later, 0);
            }
            Ok(())
        };
        let (pool, arena) = (self.compute.pool(), &self.arena);
        let weight = match self.instead.filter(|_| info.dtype.block_len() > 1 && is_weight_type(info.dtype)) {
            None => Weight::load(pool, arena, info.dtype, rows, cols, read),
            Some(dtype) => {
                Weight::load(pool, arena, dtype, rows, cols, |start, out: &mut [u8]| -> Result<(), FormatError> {
                    let made_bytes = cols * dtype.block_bytes();
                    let (mut row, mut values) = (vec![0; row_bytes], vec![0.0; cols]);
                    for (i, out) in (start / made_bytes..).zip(out.chunks_exact_mut(made_bytes)) {
                        read(i * row_bytes, &mut row)?;
                        dequantize_row(info.dtype, &row, &mut values);
                        quantize_row(dtype, &values, None, out);
                    }
                    Ok(())
                })
            }
        };
        let weight = weight.map_err(|e| self.load_error(info, e))?;
        self.done(rows * row_bytes);
        Ok(weight)
    }

    /// The matrix whose rows are those of `parts`, one after the other; all have one type.
    pub(super) fn matrix_of_parts(&mut self, parts: &[&TensorInfo], cols: usize) -> Result<Weight, Error> {
        let Some(first) = parts.first() else { unreachable!("a matrix has parts") };
        if let Some(other) = parts.iter().find(|part| part.dtype != first.dtype) {
            return Err(self.wrong_type(other, "that of the part before it"));
        }
        let files = self.files;
        let read = |start: usize, mut out: &mut [u8]| {
            let mut skipped = start;
            for part in parts {
                if skipped >= part.len_bytes {
                    skipped -= part.len_bytes;
                    continue;
                }
                let bytes = (part.len_bytes - skipped).min(out.len());
                let (now, later) = out.split_at_mut(bytes);
                files.read(part, skipped, now)?;
                (out, skipped) = (later, 0);
            }
            Ok(())
        };
        let bytes: usize = parts.iter().map(|part| part.len_bytes).sum();
        let rows = bytes.checked_div(first.dtype.row_bytes(cols).unwrap_or(0)).unwrap_or(0);
        let weight = Weight::load(self.compute.pool(), &self.arena, first.dtype, rows, cols, read);
        let weight = weight.map_err(|e| self.load_error(first, e))?;
        self.done(bytes);
        Ok(weight)
    }

    fn load_error(&self, info: &TensorInfo, error: LoadError<qwenkit_formats::Error>) -> Error {
        match error {
            LoadError::Alloc(e) => Error::Alloc(e),
            LoadError::Read(e) => Error::Format(e),
            LoadError::Unsupported { .. } => self.wrong_type(info, WEIGHT_TYPES),
        }
    }

    /// A small matrix as f32, whatever the file has; one row may be stored without its axis.
    pub(super) fn matrix_f32(&mut self, name: String, rows: usize, cols: usize) -> Result<Weight, Error> {
        let shapes: &[&[usize]] = if rows == 1 { &[&[1, cols], &[cols]] } else { &[&[rows, cols]] };
        let info = self.find(name, shapes)?;
        let values = self.values(info, cols)?;
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
        self.weight_from(info, DType::F32, (rows, cols), &bytes)
    }

    /// A weight from bytes in memory that came from the tensor `info`.
    pub(super) fn weight_from(
        &self,
        info: &TensorInfo,
        dtype: DType,
        (rows, cols): (usize, usize),
        bytes: &[u8],
    ) -> Result<Weight, Error> {
        Weight::from_bytes(self.compute.pool(), dtype, rows, cols, bytes).map_err(|e| match e {
            LoadError::Alloc(e) => Error::Alloc(e),
            LoadError::Unsupported { .. } | LoadError::Read(_) => self.wrong_type(info, WEIGHT_TYPES),
        })
    }

    /// A norm's weights as factors.
    pub(super) fn norm(&mut self, name: String, len: usize) -> Result<Vec<f32>, Error> {
        let mut weights = self.vector(name, len)?;
        if self.norms == NormWeights::ZeroCentred {
            weights.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(weights)
    }

    pub(super) fn vector(&mut self, name: String, len: usize) -> Result<Vec<f32>, Error> {
        self.plain(name, &[&[len]])
    }

    /// All values of a tensor of a plain type and one of these shapes.
    pub(super) fn plain(&mut self, name: String, shapes: &[&[usize]]) -> Result<Vec<f32>, Error> {
        let info = self.find(name, shapes)?;
        if !matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(self.wrong_type(info, "F32, F16 or BF16"));
        }
        self.values(info, info.shape.iter().product())
    }

    /// All values of a tensor in rows of `cols`.
    pub(super) fn values(&mut self, info: &TensorInfo, cols: usize) -> Result<Vec<f32>, Error> {
        let (true, Some(row_bytes)) = (is_weight_type(info.dtype), info.dtype.row_bytes(cols)) else {
            return Err(self.wrong_type(info, WEIGHT_TYPES));
        };
        let bytes = self.bytes(info, 0, info.len_bytes)?;
        self.done(info.len_bytes);
        let mut values = vec![0.0; info.shape.iter().product()];
        for (bytes, values) in bytes.chunks_exact(row_bytes.max(1)).zip(values.chunks_exact_mut(cols.max(1))) {
            dequantize_row(info.dtype, bytes, values);
        }
        Ok(values)
    }

    /// Some bytes of a tensor as they are.
    pub(super) fn bytes(&self, info: &TensorInfo, start: usize, len: usize) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; len];
        self.files.read(info, start, &mut bytes)?;
        Ok(bytes)
    }

    /// The tensor of this name, which must have one of these shapes; it counts as used.
    pub(super) fn find(&mut self, name: String, shapes: &[&[usize]]) -> Result<&'a TensorInfo, Error> {
        let first = || shapes.first().copied().unwrap_or_default().to_vec();
        let Some(info) = self.files.tensor(&name) else {
            return Err(self.place().missing(name, first()));
        };
        if !shapes.contains(&info.shape.as_slice()) {
            return Err(self.place().shape(name, first(), info.shape.clone()));
        }
        self.used.insert(name);
        Ok(info)
    }

    pub(super) fn place(&self) -> Place<'_> {
        Place {
            path: self.files.path(),
            architecture: self.architecture,
            tensors: self.files.tensors(),
            plan: self.plan.map(|plan| (plan, Naming::of_files(self.files))),
        }
    }

    pub(super) fn wrong_type(&self, info: &TensorInfo, expected: &'static str) -> Error {
        let (path, name) = (self.files.path().to_owned(), info.name.clone());
        Error::TensorType { path, name, found: info.dtype, expected }
    }

    /// Counts bytes as loaded.
    pub(super) fn done(&mut self, bytes: usize) {
        self.event.done_bytes += bytes as u64;
        (self.progress)(self.event);
    }

    /// Refuses a file with tensors that nothing has used.
    pub(super) fn finish(self, plan: &Plan) -> Result<(), Error> {
        let naming = self.naming;
        self.finish_but(|name| naming.is_spare(name, plan.spare_blocks(), plan.has_parts_beside))
    }

    /// Refuses a file with tensors of the loader's that nothing has used, unless they are spare.
    pub(super) fn finish_but(self, is_spare: impl Fn(&str) -> bool) -> Result<(), Error> {
        let own = |t: &&TensorInfo| t.name.starts_with(self.scope) && !self.used.contains(&t.name);
        let mut unused = self.files.tensors().iter().filter(own).filter(|t| !is_spare(&t.name));
        match unused.next() {
            None => Ok(()),
            Some(first) => {
                let is_used = |name: &str| self.used.contains(name);
                Err(self.place().unused(1 + unused.count(), first.name.clone(), is_used))
            }
        }
    }
}

/// Room for a tensor that becomes one weight; one that is taken apart may need a little more, and the arena then makes do.
fn arena_bytes(info: &TensorInfo) -> usize {
    let (cols, rows) = info.shape.split_last().map_or((1, 1), |(cols, outer)| (*cols, outer.iter().product()));
    // What is no weight type is refused, or read as a vector, when its turn comes.
    packed_bytes(info.dtype, rows, cols).unwrap_or(0).min(2 * info.len_bytes + (1 << 16))
}
