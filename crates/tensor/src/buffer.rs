//! `HugeBuf`: a large zeroed buffer on huge pages, for weights that are streamed once per token.
//!
//! A model read through 4 KiB pages spends its time in page walks; the same bytes on 2 MiB pages decode up to twice as
//! fast. Pages arrive on first touch, so the thread that fills a part decides where it lies. Not for small buffers.

use std::{fmt, ptr::NonNull};

use bytemuck::Pod;

/// Size of a huge page on the machines this runs on; also the alignment of every `HugeBuf`.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A zero-initialised, 2 MiB aligned buffer whose pages the operating system is asked to make huge.
pub struct HugeBuf {
    start: NonNull<u8>,
    len_bytes: usize,
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

impl HugeBuf {
    /// A buffer of `len_bytes` zero bytes.
    ///
    /// # Errors
    /// When the system refuses that much memory.
    pub fn zeroed(len_bytes: usize) -> Result<HugeBuf, AllocError> {
        if len_bytes == 0 {
            return Ok(HugeBuf { start: NonNull::dangling(), len_bytes });
        }
        let error = AllocError { wanted_bytes: len_bytes };
        let size_bytes = len_bytes.checked_next_multiple_of(HUGE_PAGE_BYTES).ok_or(error)?;
        let start = pages::map(size_bytes).ok_or(error)?;
        Ok(HugeBuf { start, len_bytes })
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The buffer as elements of `T`; a tail shorter than one element is left out.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        const { assert!(align_of::<T>() <= HUGE_PAGE_BYTES && size_of::<T>() > 0) }
        // SAFETY: `start` is aligned for T (dangling only when the length is 0, then cast below is of length 0 and
        // re-aligned), the range is initialised and ours, and Pod accepts every bit pattern.
        unsafe { std::slice::from_raw_parts(self.aligned::<T>(), self.len_bytes / size_of::<T>()) }
    }

    /// The buffer as mutable elements of `T`; a tail shorter than one element is left out.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        const { assert!(align_of::<T>() <= HUGE_PAGE_BYTES && size_of::<T>() > 0) }
        // SAFETY: as in `as_slice`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.aligned::<T>(), self.len_bytes / size_of::<T>()) }
    }

    fn aligned<T>(&self) -> *mut T {
        if self.len_bytes == 0 { NonNull::dangling().as_ptr() } else { self.start.as_ptr().cast() }
    }
}

impl Drop for HugeBuf {
    fn drop(&mut self) {
        if self.len_bytes > 0 {
            // SAFETY: `start` came from `pages::map` with this same size, and nothing borrows it any more.
            unsafe { pages::unmap(self.start, self.len_bytes.next_multiple_of(HUGE_PAGE_BYTES)) }
        }
    }
}

/// Anonymous pages that are neither touched nor zeroed before their first use.
#[cfg(target_os = "linux")]
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

/// The allocator's pages, where huge ones cannot be asked for.
#[cfg(not(target_os = "linux"))]
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

// SAFETY: the buffer owns its memory exclusively; sharing it gives out plain slices under Rust's borrow rules.
unsafe impl Send for HugeBuf {}
// SAFETY: as above; `&HugeBuf` only reads.
unsafe impl Sync for HugeBuf {}

impl fmt::Debug for HugeBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HugeBuf({} bytes)", self.len_bytes)
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
}
