//! Encodes tensors and writes them: several threads each take the next piece, read its values, encode them and hand the bytes
//! over; one thread writes the pieces in order. Memory is that of a few pieces.
//!
//! A row's bytes do not depend on who encodes it, so a file has the same bytes on any number of threads.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use qwenkit_kernels::quantize_row;
use qwenkit_tensor::DType;

use crate::{
    Error,
    tensors::{Spec, Tensors},
};

/// Values of one piece: 4 MB of f32.
const PIECE_VALUES: usize = 1 << 20;
/// Finished pieces for each thread that may wait for the writer.
const AHEAD: usize = 4;

/// How much an error in each column of a tensor counts, by the tensor's name: a number for each column, of stacked experts for
/// each column of each expert.
pub type Importance = HashMap<String, Vec<f32>>;

/// How far a step is, in values: done and all.
pub type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// What takes a tensor's bytes, piece after piece.
pub(crate) type Sink<'a> = dyn FnMut(usize, &[u8]) -> Result<(), Error> + 'a;

/// A piece of a tensor.
struct Piece {
    tensor: usize,
    /// Rows of it.
    rows: Range<usize>,
}

/// What the threads share.
struct Shared {
    next: usize,
    /// Pieces that wait for their turn, by number.
    done: BTreeMap<usize, Result<Vec<u8>, Error>>,
    written: usize,
    stopped: bool,
}

/// Stops the other threads when its own panics: they would wait for it.
struct Guard<'a>(&'a Mutex<Shared>, &'a Condvar);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).stopped = true;
            self.1.notify_all();
        }
    }
}

/// Calls `sink(tensor, bytes)` with all tensors' bytes in `types`, in order, in pieces of whole rows.
///
/// # Errors
/// The first one that a piece or `sink` gives.
pub(crate) fn encode(
    tensors: &dyn Tensors,
    types: &[DType],
    importance: &Importance,
    threads: usize,
    progress: &mut Progress<'_>,
    sink: &mut Sink<'_>,
) -> Result<(), Error> {
    let pieces = pieces(tensors);
    let values_of = |piece: &Piece| piece.rows.len() * tensors.specs()[piece.tensor].cols();
    let total: u64 = pieces.iter().map(|piece| values_of(piece) as u64).sum();
    let shared = Mutex::new(Shared { next: 0, done: BTreeMap::new(), written: 0, stopped: false });
    let changed = Condvar::new();
    let lock = || -> MutexGuard<'_, Shared> { shared.lock().unwrap_or_else(PoisonError::into_inner) };
    let threads = threads.max(1);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(pieces.len()) {
            scope.spawn(|| {
                let _guard = Guard(&shared, &changed);
                let mut values = Vec::new();
                loop {
                    let number = {
                        let mut shared = lock();
                        while !shared.stopped && shared.next >= shared.written + AHEAD * threads {
                            shared = changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
                        }
                        if shared.stopped || shared.next == pieces.len() {
                            return;
                        }
                        shared.next += 1;
                        shared.next - 1
                    };
                    let piece = &pieces[number];
                    let bytes = encode_piece(tensors, piece, types[piece.tensor], importance, &mut values);
                    lock().done.insert(number, bytes);
                    changed.notify_all();
                }
            });
        }
        let _guard = Guard(&shared, &changed);
        let mut write_all = || {
            let mut done = 0;
            for (number, piece) in pieces.iter().enumerate() {
                let bytes = {
                    let mut shared = lock();
                    loop {
                        if let Some(bytes) = shared.done.remove(&number) {
                            break bytes;
                        }
                        if shared.stopped {
                            // The scope hands the panic on.
                            return Ok(());
                        }
                        shared = changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
                    }
                };
                sink(piece.tensor, &bytes?)?;
                lock().written += 1;
                changed.notify_all();
                done += values_of(piece) as u64;
                progress(done, total);
            }
            Ok(())
        };
        let outcome = write_all();
        lock().stopped = true;
        changed.notify_all();
        outcome
    })
}

/// All tensors in pieces of about `PIECE_VALUES`.
fn pieces(tensors: &dyn Tensors) -> Vec<Piece> {
    let of = |(tensor, spec): (usize, &Spec)| {
        let rows = spec.values() / spec.cols();
        let step = (PIECE_VALUES / spec.cols()).max(1);
        (0..rows).step_by(step).map(move |first| Piece { tensor, rows: first..(first + step).min(rows) })
    };
    tensors.specs().iter().enumerate().flat_map(of).collect()
}

fn encode_piece(
    tensors: &dyn Tensors,
    piece: &Piece,
    dtype: DType,
    importance: &Importance,
    values: &mut Vec<f32>,
) -> Result<Vec<u8>, Error> {
    let spec = &tensors.specs()[piece.tensor];
    let cols = spec.cols();
    let row_bytes = dtype.row_bytes(cols).ok_or_else(|| Error::Unsayable {
        path: tensors.path().to_owned(),
        what: format!("tensor `{}`", spec.name),
        found: format!("rows of {cols} values"),
        expected: format!("rows of a multiple of {} for {dtype}", dtype.block_len()),
    })?;
    let mut bytes = vec![0; piece.rows.len() * row_bytes];
    // What is stored so already stays bit for bit.
    if let Some((files, info)) = tensors.stored(piece.tensor).filter(|(_, info)| info.dtype == dtype) {
        files.read(info, piece.rows.start * row_bytes, &mut bytes)?;
        return Ok(bytes);
    }
    values.clear();
    tensors.values(piece.tensor, piece.rows.start * cols..piece.rows.end * cols, values)?;
    if !values.iter().all(|x| x.is_finite()) {
        return Err(Error::NotFinite { path: tensors.path().to_owned(), tensor: spec.name.clone() });
    }
    let weights = importance.get(&spec.name).filter(|_| dtype.is_quantized());
    // Stacked experts have their own importance each.
    let rows_each = weights.map_or(1, |w| (spec.values() / cols / (w.len() / cols).max(1)).max(1));
    let rows = values.chunks_exact(cols).zip(bytes.chunks_exact_mut(row_bytes.max(1)));
    for (row, (values, bytes)) in piece.rows.clone().zip(rows) {
        let weights = weights.and_then(|w| w.get(row / rows_each * cols..).and_then(|w| w.get(..cols)));
        quantize_row(dtype, values, weights, bytes);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::Path;

    use qwenkit_formats::{ModelFiles, TensorInfo};

    use super::*;

    /// Tensors of which the last cannot be read without a panic.
    struct Bad(Vec<Spec>);

    impl Tensors for Bad {
        fn path(&self) -> &Path {
            Path::new("bad")
        }

        fn specs(&self) -> &[Spec] {
            &self.0
        }

        fn values(&self, index: usize, range: Range<usize>, out: &mut Vec<f32>) -> Result<(), Error> {
            assert!(index + 1 < self.0.len(), "the last one");
            out.extend(range.map(|i| i as f32));
            Ok(())
        }

        fn stored(&self, _: usize) -> Option<(&ModelFiles, &TensorInfo)> {
            None
        }
    }

    #[test]
    fn a_panic_ends_the_step() {
        let spec = |i: usize| Spec { name: i.to_string(), shape: vec![4, 32], dtype: DType::F32 };
        let tensors = Bad((0..20).map(spec).collect());
        for threads in [1, 3] {
            let types = vec![DType::F32; 20];
            let mut sink = |_: usize, _: &[u8]| Ok(());
            let run = || encode(&tensors, &types, &Importance::new(), threads, &mut |_, _| {}, &mut sink);
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
            // Of the one that writes, too.
            let whole = Bad((0..21).map(spec).collect());
            let mut sink = |_: usize, _: &[u8]| panic!("no disk");
            let run = || encode(&whole, &[DType::F32; 21], &Importance::new(), threads, &mut |_, _| {}, &mut sink);
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
    }
}
