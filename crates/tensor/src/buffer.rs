//! `HugeBuf`: a large zeroed buffer on huge pages, for weights that are streamed once per token.
//!
//! A model read through 4 KiB pages spends its time in page walks; the same bytes on 2 MiB pages decode up to twice as
//! fast. Pages arrive on first touch, so the thread that fills a part decides where it lies. Not for small buffers.

use std::{
    fmt,
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

use bytemuck::Pod;

/// Size of a huge page on the machines this runs on; mappings begin and end at its multiples.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Alignment of every buffer: a cache line, the widest vector.
const ALIGNMENT_BYTES: usize = 64;

/// A zero-initialised, 64-byte aligned buffer whose pages the operating system is asked to make huge: a mapping of its
/// own, or a part of an arena's.
pub struct HugeBuf {
    mapping: Arc<Mapping>,
    start_byte: usize,
    len_bytes: usize,
}

/// One mapping that many buffers share, so that a model's small matrices do not fill a huge page each. Its pages take
/// memory only once they are written.
pub struct HugeArena {
    mapping: Arc<Mapping>,
    /// Bytes given out; buffers never come back before all of them do.
    used_bytes: Mutex<usize>,
}

/// Anonymous pages, given back when the last buffer in them goes.
struct Mapping {
    start: NonNull<u8>,
    size_bytes: usize,
}

/// The machine had no memory of the size asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocError {
    /// The size that was asked for.
    pub wanted_bytes: usize,
}

impl fmt::Display for AllocError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot allocate {} bytes of memory; close other programs or take a smaller model", self.wanted_bytes)
    }
}

impl std::error::Error for AllocError {}

impl Mapping {
    fn new(len_bytes: usize) -> Result<Arc<Mapping>, AllocError> {
        let error = AllocError { wanted_bytes: len_bytes };
        let size_bytes = len_bytes.checked_next_multiple_of(HUGE_PAGE_BYTES).ok_or(error)?;
        let start = match size_bytes {
            0 => NonNull::dangling(),
            _ => pages::map(size_bytes).ok_or(error)?,
        };
        Ok(Arc::new(Mapping { start, size_bytes }))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.size_bytes > 0 {
            // SAFETY: `start` came from `pages::map` with this same size, and no buffer is left that points into it.
            unsafe { pages::unmap(self.start, self.size_bytes) }
        }
    }
}

// SAFETY: a mapping is only an address range; its bytes are reached through `HugeBuf`s, whose ranges do not overlap.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl HugeArena {
    /// An arena for `len_bytes` bytes of buffers, each rounded up to 64.
    ///
    /// # Errors
    /// When the system refuses the address range.
    pub fn new(len_bytes: usize) -> Result<HugeArena, AllocError> {
        Ok(HugeArena { mapping: Mapping::new(len_bytes)?, used_bytes: Mutex::new(0) })
    }

    /// A buffer of `len_bytes` zero bytes in the arena, or with a mapping of its own when the arena is full.
    ///
    /// # Errors
    /// When the system refuses that much memory.
    pub fn zeroed(&self, len_bytes: usize) -> Result<HugeBuf, AllocError> {
        let mut used_bytes = self.used_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let end = len_bytes.checked_next_multiple_of(ALIGNMENT_BYTES).and_then(|len| used_bytes.checked_add(len));
        match end.filter(|end| *end <= self.mapping.size_bytes) {
            Some(end) => {
                let start_byte = std::mem::replace(&mut *used_bytes, end);
                Ok(HugeBuf { mapping: Arc::clone(&self.mapping), start_byte, len_bytes })
            }
            None => HugeBuf::zeroed(len_bytes),
        }
    }
}

impl HugeBuf {
    /// A buffer of `len_bytes` zero bytes with a mapping of its own.
    ///
    /// # Errors
    /// When the system refuses that much memory.
    pub fn zeroed(len_bytes: usize) -> Result<HugeBuf, AllocError> {
        Ok(HugeBuf { mapping: Mapping::new(len_bytes)?, start_byte: 0, len_bytes })
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The buffer as elements of `T`; a tail shorter than one element is left out.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        // SAFETY: see `elements`; Pod accepts every bit pattern, and the borrow is this buffer's.
        unsafe { std::slice::from_raw_parts(self.elements::<T>(), self.len_bytes / size_of::<T>()) }
    }

    /// The buffer as mutable elements of `T`; a tail shorter than one element is left out.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`; ranges of a mapping do not overlap, so the borrow of this buffer is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.elements::<T>(), self.len_bytes / size_of::<T>()) }
    }

    /// Where the buffer begins, aligned for `T`: mappings begin at huge pages, ranges at multiples of 64. Every byte up to
    /// `len_bytes` is mapped and initialised. Without bytes the pointer is only aligned.
    fn elements<T: Pod>(&self) -> *mut T {
        const { assert!(align_of::<T>() <= ALIGNMENT_BYTES && size_of::<T>() > 0) }
        match self.len_bytes {
            0 => NonNull::dangling().as_ptr(),
            // SAFETY: the range lies inside the mapping.
            _ => unsafe { self.mapping.start.as_ptr().add(self.start_byte).cast() },
        }
    }
}

impl fmt::Debug for HugeBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HugeBuf({} bytes)", self.len_bytes)
    }
}

/// Anonymous pages that are neither touched nor zeroed before their first use.
#[cfg(all(target_os = "linux", not(miri)))]
mod pages {
    use super::{HUGE_PAGE_BYTES, NonNull};

    /// `size_bytes` (a multiple of the huge page) of zero pages, aligned to a huge page.
    pub(super) fn map(size_bytes: usize) -> Option<NonNull<u8>> {
        // One huge page more than asked for, so that an aligned range lies inside; the ends are given back.
        let mapped_bytes = size_bytes.checked_add(HUGE_PAGE_BYTES)?;
        // SAFETY: a new private anonymous mapping touches no existing memory.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return None;
        }
        let mapped: *mut u8 = mapped.cast();
        let head_bytes = mapped.align_offset(HUGE_PAGE_BYTES);
        // SAFETY: all three ranges lie inside the mapping made above (`head_bytes` < one huge page), nothing points
        // into the parts that are unmapped, and the advice changes no content; its failure is harmless.
        unsafe {
            let start = mapped.add(head_bytes);
            if head_bytes > 0 {
                libc::munmap(mapped.cast(), head_bytes);
            }
            let tail_bytes = HUGE_PAGE_BYTES - head_bytes;
            if tail_bytes > 0 {
                libc::munmap(start.add(size_bytes).cast(), tail_bytes);
            }
            libc::madvise(start.cast(), size_bytes, libc::MADV_HUGEPAGE);
            NonNull::new(start)
        }
    }

    /// # Safety
    /// `start` and `size_bytes` are those of one `map`, and nothing uses the range any more.
    pub(super) unsafe fn unmap(start: NonNull<u8>, size_bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            libc::munmap(start.as_ptr().cast(), size_bytes);
        }
    }
}

/// The allocator's pages, where huge ones cannot be asked for, and under Miri, which knows no such mappings.
#[cfg(any(not(target_os = "linux"), miri))]
mod pages {
    use super::{HUGE_PAGE_BYTES, NonNull};
    use std::alloc::Layout;

    /// `size_bytes` (not zero) of zero bytes, aligned to a huge page.
    pub(super) fn map(size_bytes: usize) -> Option<NonNull<u8>> {
        let layout = Layout::from_size_align(size_bytes, HUGE_PAGE_BYTES).ok()?;
        // SAFETY: the layout's size is not zero.
        NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })
    }

    /// # Safety
    /// `start` and `size_bytes` are those of one `map`, and nothing uses the range any more.
    pub(super) unsafe fn unmap(start: NonNull<u8>, size_bytes: usize) {
        if let Ok(layout) = Layout::from_size_align(size_bytes, HUGE_PAGE_BYTES) {
            // SAFETY: the caller's promise; the layout is the one of `map`.
            unsafe { std::alloc::dealloc(start.as_ptr(), layout) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroed_aligned_and_writable() {
        let mut buf = HugeBuf::zeroed(3 << 20).unwrap();
        assert!(buf.as_slice::<u64>().iter().all(|&x| x == 0));
        assert_eq!(buf.as_slice::<u8>().as_ptr() as usize % HUGE_PAGE_BYTES, 0);
        buf.as_mut_slice::<f32>()[7] = 1.5;
        assert_eq!(buf.as_slice::<f32>()[7], 1.5);
        assert_eq!(buf.as_slice::<f32>().len(), (3 << 20) / 4);
    }

    #[test]
    fn empty_and_absurd_sizes() {
        assert!(HugeBuf::zeroed(0).unwrap().as_slice::<f32>().is_empty());
        assert_eq!(HugeBuf::zeroed(usize::MAX).unwrap_err(), AllocError { wanted_bytes: usize::MAX });
    }

    #[test]
    fn an_arena_gives_disjoint_aligned_parts_and_overflows_into_new_mappings() {
        let arena = HugeArena::new(3 << 20).unwrap();
        let mut bufs: Vec<_> = [1, 63, 64, 65, 0, 2 << 20, 2 << 20].map(|len| arena.zeroed(len).unwrap()).into();
        drop(arena);
        for (i, buf) in bufs.iter_mut().enumerate() {
            buf.as_mut_slice::<u8>().fill(i as u8 + 1);
        }
        for (i, buf) in bufs.iter().enumerate() {
            assert!(buf.as_slice::<u8>() == vec![i as u8 + 1; buf.len_bytes()], "buffer {i}");
            assert!(buf.len_bytes() == 0 || (buf.as_slice::<u8>().as_ptr() as usize).is_multiple_of(ALIGNMENT_BYTES));
        }
    }
}
