//! Memory for large tables that are read at random: zeroed words, in huge pages where the kernel has them.
//!
//! With pages of 4 KiB a look-up at random in 512 MiB misses the TLB too, and a megabyte of page tables competes for the caches:
//! 192 ns against 167, in batches 54 against 50, more on a busy machine (`volume/benches/resolve.rs`). Only what is touched takes
//! memory, a huge page at a time.
//!
//! Invariants: the words begin at a huge page's boundary, never move, and are zero at first.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

/// The size and alignment of a huge page.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A run of words that anybody may read and write.
#[derive(Debug)]
pub struct TableMemory {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: plain memory with one owner, which is given out as atomics only.
unsafe impl Send for TableMemory {}
// SAFETY: as above.
unsafe impl Sync for TableMemory {}

impl TableMemory {
    /// Maps `words` words (at least 1), all zero.
    #[must_use]
    pub fn new(words: usize) -> TableMemory {
        let words = words.max(1);
        let layout = Layout::array::<AtomicU64>(words).expect("tables are far below isize::MAX");
        let len = Self::mapped_bytes(words);
        // So much more that a boundary is in it, whatever begins where.
        let reserved = len + HUGE_PAGE_BYTES;
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, of nothing that exists.
        let mapped = unsafe { libc::mmap(ptr::null_mut(), reserved, protection, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            handle_alloc_error(layout);
        }
        let before = mapped.align_offset(HUGE_PAGE_BYTES);
        let start = mapped.wrapping_byte_add(before);
        let behind = reserved - before - len;
        // SAFETY: all of these ranges are within the mapping just made, which nobody else knows. What is refused costs
        // address space, or speed.
        unsafe {
            if before > 0 {
                libc::munmap(mapped, before);
            }
            if behind > 0 {
                libc::munmap(start.wrapping_byte_add(len), behind);
            }
            libc::madvise(start, len, libc::MADV_HUGEPAGE);
        }
        let start = NonNull::new(start.cast::<AtomicU64>()).unwrap_or_else(|| handle_alloc_error(layout));
        TableMemory { start, words }
    }

    fn mapped_bytes(words: usize) -> usize {
        (words * size_of::<AtomicU64>()).next_multiple_of(HUGE_PAGE_BYTES)
    }
}

impl Deref for TableMemory {
    type Target = [AtomicU64];

    #[inline]
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is at least so long, aligned, zeroed by the kernel, and there until `drop`; zero bytes are
        // atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for TableMemory {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` kept of its mapping; no borrow of it outlives us.
        unsafe { libc::munmap(self.start.as_ptr().cast(), Self::mapped_bytes(self.words)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn words_are_zero_keep_what_is_stored_and_begin_at_a_huge_page() {
        for words in [1, 511, HUGE_PAGE_BYTES / 8, HUGE_PAGE_BYTES / 8 + 1] {
            let tables: Vec<TableMemory> = (0..3).map(|_| TableMemory::new(words)).collect();
            for (number, table) in (1..).zip(&tables) {
                assert_eq!((table.len(), table.as_ptr().align_offset(HUGE_PAGE_BYTES)), (words, 0));
                assert!(table.iter().all(|word| word.load(Ordering::Relaxed) == 0));
                table.iter().for_each(|word| word.store(number, Ordering::Relaxed));
            }
            for (number, table) in (1..).zip(&tables) {
                assert!(table.iter().all(|word| word.load(Ordering::Relaxed) == number));
            }
        }
    }

    #[test]
    fn no_words_are_one() {
        assert_eq!(TableMemory::new(0).len(), 1);
    }
}
