//! `Weight`: a matrix of any stored type, packed for the kernels when it is loaded.
//!
//! Sixteen rows lie side by side (`layout` for quantised types). Plain types keep their precision: F32 and F16 as
//! `[k][16 rows]`, BF16 as `[k / 2][16 rows][2]`. A matrix is never expanded to f32; loading holds some rows of the file
//! at a time beside the packed form.

use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
};

use half::{bf16, f16};
use qwenkit_tensor::{AllocError, DType, HugeArena, HugeBuf};

use crate::{
    blocks,
    encode::quantize_row,
    layout::{GROUP_ROWS, Layout},
    planes,
    pool::Pool,
    shared_out::SharedOut,
};

/// Rows of the file that a loading thread reads at once: enough to make reads large, little enough to stay in cache.
const SLAB_GROUPS: usize = 8;

/// The form of activations that a weight multiplies with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    F32,
    Bf16,
    Quantized,
}

/// How the groups of a weight lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Group after group.
    Whole,
    /// In two parts (`planes`); whether bounds of all rows are numbers.
    Planes { bounded: bool },
}

/// A matrix (rows, cols) = (N, K) ready to be multiplied: y = W x.
pub struct Weight {
    dtype: DType,
    rows: usize,
    cols: usize,
    pub(crate) layout: Option<Layout>,
    form: Form,
    group_bytes: usize,
    data: HugeBuf,
}

/// Why a weight could not be loaded; `E` is the reader's error.
#[derive(Debug)]
pub enum LoadError<E> {
    /// No memory for the packed form.
    Alloc(AllocError),
    /// A type that no kernel multiplies, or rows that are no whole number of its blocks.
    Unsupported {
        /// The type found.
        dtype: DType,
        /// The row length found.
        cols: usize,
    },
    /// The reader failed.
    Read(E),
}

impl Weight {
    /// Loads a matrix of `rows` rows of `cols` values into `arena`. `read(start, out)` fills `out` with the stored tensor's
    /// bytes from `start`; it is called from all threads of the pool.
    ///
    /// # Errors
    /// When the type is not a weight type, memory is short, or `read` fails.
    pub fn load<E: Send>(
        pool: &Pool,
        arena: &HugeArena,
        dtype: DType,
        rows: usize,
        cols: usize,
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Weight, LoadError<E>> {
        Weight::load_as(Form::Whole, pool, arena, (dtype, rows, cols), read)
    }

    /// As `load`, for a matrix of whose results often only the largest are wanted (`Compute::best`): Q8_0 comes to lie so that
    /// these are found by reading five of eight bits, in 0.4% more memory. Other types lie as always.
    ///
    /// # Errors
    /// As `load`.
    pub fn load_head<E: Send>(
        pool: &Pool,
        arena: &HugeArena,
        dtype: DType,
        rows: usize,
        cols: usize,
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Weight, LoadError<E>> {
        let form = if dtype == DType::Q8_0 { Form::Planes { bounded: true } } else { Form::Whole };
        Weight::load_as(form, pool, arena, (dtype, rows, cols), read)
    }

    fn load_as<E: Send>(
        mut form: Form,
        pool: &Pool,
        arena: &HugeArena,
        (dtype, rows, cols): (DType, usize, usize),
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Weight, LoadError<E>> {
        let unsupported = LoadError::Unsupported { dtype, cols };
        let Some((row_bytes, whole_bytes)) = dtype.row_bytes(cols).zip(whole_bytes(dtype, rows, cols)) else {
            return Err(unsupported);
        };
        let layout = Layout::of(dtype);
        let groups = rows.div_ceil(GROUP_ROWS);
        let group_bytes = whole_bytes.checked_div(groups).unwrap_or(0);
        let in_planes = form != Form::Whole;
        let (coarse_bytes, rest_bytes) = (planes::coarse_bytes(cols), planes::rest_bytes(cols));
        let total_bytes = match in_planes {
            true => groups.checked_mul(planes::group_bytes(cols)).ok_or(unsupported)?,
            false => whole_bytes,
        };
        let mut data = arena.zeroed(total_bytes).map_err(LoadError::Alloc)?;
        let (failure, bounded) = (Mutex::new(None), AtomicBool::new(true));
        let out = SharedOut::new(data.as_mut_slice::<u8>());
        pool.run_split(groups, 1, |range| {
            let mut slab = vec![0; SLAB_GROUPS.min(range.len()) * GROUP_ROWS * row_bytes];
            let mut room = vec![0; if in_planes { group_bytes } else { 0 }];
            for first in range.clone().step_by(SLAB_GROUPS) {
                let end_row = ((first + SLAB_GROUPS).min(range.end) * GROUP_ROWS).min(rows);
                let slab = &mut slab[..(end_row - first * GROUP_ROWS) * row_bytes];
                if let Err(error) = read(first * GROUP_ROWS * row_bytes, slab) {
                    failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
                    return;
                }
                for (i, bytes) in slab.chunks(GROUP_ROWS * row_bytes).enumerate() {
                    let g = first + i;
                    let group = match in_planes {
                        // What rows past the matrix's end leave behind has to be zero.
                        true => {
                            room.fill(0);
                            &mut room[..]
                        }
                        // SAFETY: each group is in exactly one thread's range.
                        false => unsafe { out.slice(g * group_bytes, group_bytes) },
                    };
                    for (r, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
                        match layout {
                            Some(layout) => layout.pack_row(dtype, bytes, r, group),
                            None => pack_plain_row(dtype, bytes, r, group),
                        }
                    }
                    if in_planes {
                        let rest = groups * coarse_bytes + g * rest_bytes;
                        // SAFETY: as above.
                        let parts = unsafe { (out.slice(g * coarse_bytes, coarse_bytes), out.slice(rest, rest_bytes)) };
                        if !planes::split(group, cols, parts.0, parts.1) {
                            bounded.store(false, Ordering::Relaxed);
                        }
                    }
                }
            }
        });
        match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
            Some(error) => Err(LoadError::Read(error)),
            None => {
                if let Form::Planes { bounded: all } = &mut form {
                    *all = bounded.into_inner();
                }
                Ok(Weight { dtype, rows, cols, layout, form, group_bytes, data })
            }
        }
    }

    /// A weight from the bytes of a stored tensor in memory.
    ///
    /// # Errors
    /// As `load`, and when `bytes` is not the size of such a matrix.
    pub fn from_bytes(
        pool: &Pool,
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<Weight, LoadError<&'static str>> {
        let arena = HugeArena::new(0).map_err(LoadError::Alloc)?;
        Weight::load(pool, &arena, dtype, rows, cols, |start, out| copy(bytes, start, out))
    }

    /// As `from_bytes`, in the form of `load_head`.
    ///
    /// # Errors
    /// As `from_bytes`.
    pub fn head_from_bytes(
        pool: &Pool,
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<Weight, LoadError<&'static str>> {
        let arena = HugeArena::new(0).map_err(LoadError::Alloc)?;
        Weight::load_head(pool, &arena, dtype, rows, cols, |start, out| copy(bytes, start, out))
    }

    /// Puts other numbers in their place: `values` (rows, cols), rounded to the stored type.
    ///
    /// # Panics
    /// If the type is a quantised one, or there are not as many values.
    pub fn store(&mut self, pool: &Pool, values: &[f32]) {
        let Weight { dtype, rows, cols, group_bytes, .. } = *self;
        assert!(
            self.layout.is_none() && values.len() == rows * cols,
            "({rows}, {cols}) of {dtype} from {}",
            values.len()
        );
        let out = SharedOut::new(self.data.as_mut_slice::<u8>());
        pool.run_split(rows.div_ceil(GROUP_ROWS), 1, |groups| {
            let mut bytes = vec![0; cols * dtype.block_bytes()];
            for g in groups {
                // SAFETY: each group is in exactly one thread's range.
                let group = unsafe { out.slice(g * group_bytes, group_bytes) };
                let values = &values[g * GROUP_ROWS * cols..rows.min((g + 1) * GROUP_ROWS) * cols];
                for (r, row) in values.chunks_exact(cols.max(1)).enumerate() {
                    quantize_row(dtype, row, None, &mut bytes);
                    pack_plain_row(dtype, &bytes, r, group);
                }
            }
        });
    }

    /// The stored element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Output features N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that one product of all rows reads: the packed size.
    pub fn size_bytes(&self) -> usize {
        self.data.len_bytes()
    }

    /// Writes the values of row `row`: (K).
    ///
    /// # Panics
    /// If there is no such row, or `out` is not of length K.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of ({}, {})", self.rows, self.cols);
        let r = row % GROUP_ROWS;
        if self.in_planes() {
            return self.joined_row(row / GROUP_ROWS, r, out);
        }
        let group = self.group(row / GROUP_ROWS);
        if let Some(layout) = self.layout {
            return layout.unpack_row(group, r, out);
        }
        for (k, x) in out.iter_mut().enumerate() {
            *x = match self.dtype {
                DType::F32 => bytemuck::cast_slice::<u8, f32>(group)[k * GROUP_ROWS + r],
                DType::F16 => bytemuck::cast_slice::<u8, f16>(group)[k * GROUP_ROWS + r].to_f32(),
                _ => bytemuck::cast_slice::<u8, bf16>(group)[(k / 2 * GROUP_ROWS + r) * 2 + k % 2].to_f32(),
            };
        }
    }

    pub(crate) fn operand(&self) -> Operand {
        match self.dtype {
            DType::F32 | DType::F16 => Operand::F32,
            DType::BF16 => Operand::Bf16,
            _ => Operand::Quantized,
        }
    }

    pub(crate) fn groups(&self) -> usize {
        self.rows.div_ceil(GROUP_ROWS)
    }

    /// Whether it lies in two parts, as `planes` says.
    pub(crate) fn in_planes(&self) -> bool {
        self.form != Form::Whole
    }

    /// Whether its largest results can be found from its first part.
    pub(crate) fn is_bounded(&self) -> bool {
        self.form == Form::Planes { bounded: true }
    }

    /// All packed bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.data.as_slice()
    }

    /// The packed bytes of group `g`, 64-byte aligned; not of a weight in two parts.
    pub(crate) fn group(&self, g: usize) -> &[u8] {
        debug_assert!(!self.in_planes(), "a weight in two parts has no whole groups");
        &self.data.as_slice::<u8>()[g * self.group_bytes..][..self.group_bytes]
    }

    /// Rows of group `g` that the matrix has: 16, or fewer in the last.
    pub(crate) fn group_rows(&self, g: usize) -> usize {
        GROUP_ROWS.min(self.rows - g * GROUP_ROWS)
    }
}

/// Fills `out` with what stands at `start` of `bytes`.
fn copy(bytes: &[u8], start: usize, out: &mut [u8]) -> Result<(), &'static str> {
    let found = bytes.get(start..start + out.len()).ok_or("fewer bytes than the matrix has")?;
    out.copy_from_slice(found);
    Ok(())
}

/// Bytes that a matrix of these rows takes at most once packed; what an arena for it must hold. `None` for types that no
/// kernel multiplies, and for sizes that do not fit.
pub fn packed_bytes(dtype: DType, rows: usize, cols: usize) -> Option<usize> {
    let whole = whole_bytes(dtype, rows, cols)?;
    match dtype {
        DType::Q8_0 => rows.div_ceil(GROUP_ROWS).checked_mul(planes::group_bytes(cols)),
        _ => Some(whole),
    }
}

/// The same of a matrix whose groups lie whole.
fn whole_bytes(dtype: DType, rows: usize, cols: usize) -> Option<usize> {
    dtype.row_bytes(cols).filter(|_| blocks::is_weight_type(dtype))?;
    let group_bytes = match Layout::of(dtype) {
        Some(layout) => layout.group_bytes(cols),
        None => plain_group_bytes(dtype, cols),
    };
    rows.div_ceil(GROUP_ROWS).checked_mul(group_bytes)
}

fn plain_group_bytes(dtype: DType, cols: usize) -> usize {
    let cols = if dtype == DType::BF16 { cols.next_multiple_of(2) } else { cols };
    (cols * GROUP_ROWS * dtype.block_bytes()).next_multiple_of(64)
}

fn pack_plain_row(dtype: DType, bytes: &[u8], r: usize, group: &mut [u8]) {
    let size = dtype.block_bytes();
    for (k, value) in bytes.chunks_exact(size).enumerate() {
        let at = match dtype {
            DType::BF16 => (k / 2 * GROUP_ROWS + r) * 2 + k % 2,
            _ => k * GROUP_ROWS + r,
        };
        group[at * size..][..size].copy_from_slice(value);
    }
}
