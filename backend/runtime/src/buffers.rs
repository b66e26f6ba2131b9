//! Page-aligned memory that we own: staging areas and bounce buffers.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;

/// A run of zeroed, page-aligned bytes. Given out by pointer, because kernel and peers write into it while we hold it.
#[derive(Debug)]
pub struct AlignedBuffer {
    start: NonNull<u8>,
    len: usize,
    /// The buffer that this is a part of, if it is one.
    whole: Option<Arc<AlignedBuffer>>,
}

// SAFETY: the buffer is plain memory with one owner.
unsafe impl Send for AlignedBuffer {}
// SAFETY: who only has a reference gets no more than its place; what reads it is unsafe, and says what has to hold.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// Alignment in bytes: enough for O_DIRECT on any device.
    pub const ALIGNMENT: usize = 4096;

    /// Allocates `len` bytes (at least 1).
    #[must_use]
    pub fn new(len: usize) -> AlignedBuffer {
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        AlignedBuffer { start, len: layout.size(), whole: None }
    }

    /// A part of a larger buffer, which is kept as long as any of its parts. Whoever makes parts gives out none twice.
    ///
    /// # Panics
    /// When it is not within the whole.
    #[must_use]
    pub fn part(whole: &Arc<AlignedBuffer>, offset: usize, len: usize) -> AlignedBuffer {
        assert!(offset <= whole.len && len <= whole.len - offset, "a part outside of the whole");
        // SAFETY: inside the allocation (just asserted), so that the pointer is not null.
        let start = unsafe { whole.start.add(offset) };
        AlignedBuffer { start, len, whole: Some(Arc::clone(whole)) }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), Self::ALIGNMENT).expect("buffer sizes are far below isize::MAX")
    }

    /// The first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a buffer has at least one byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The bytes from `offset` on, for a parser.
    ///
    /// # Safety
    /// No operation that could write to this range may be under way while the slice lives.
    #[must_use]
    pub unsafe fn slice(&self, offset: usize, len: usize) -> &[u8] {
        assert!(offset <= self.len && len <= self.len - offset, "slice outside of the buffer");
        // SAFETY: inside the allocation (asserted), initialised (zeroed at the start); quiet by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset), len) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        if self.whole.is_some() {
            return;
        }
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.len)) };
    }
}
