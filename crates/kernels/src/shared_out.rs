//! A slice that several threads of one fork write at the same time, each its own elements.

use std::marker::PhantomData;

/// A mutable slice taken apart among threads. Whoever takes a part promises that no other part overlaps it.
pub(crate) struct SharedOut<'a, T> {
    start: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are handed out under `slice`'s promise that they do not overlap, which is what `&mut [T]` splitting gives.
unsafe impl<T: Send> Sync for SharedOut<'_, T> {}

impl<'a, T> SharedOut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> SharedOut<'a, T> {
        SharedOut { start: slice.as_mut_ptr(), len: slice.len(), _borrow: PhantomData }
    }

    /// Elements `at..at + len`.
    ///
    /// # Safety
    /// While the part lives, no overlapping part is taken by anyone.
    ///
    /// # Panics
    /// If the part reaches past the end.
    #[allow(clippy::mut_from_ref)] // that is this type's purpose; the promise is the caller's
    pub(crate) unsafe fn slice(&self, at: usize, len: usize) -> &'a mut [T] {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "part {at}+{len} of {}", self.len);
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise; the lifetime is the borrow's.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}
