//! Memory of simulated disks: zero at first, used again by the next disk of the thread.
//!
//! A disk has megabytes, of which a history writes some hundred pages. To get such memory from the system and give it back costs more than all
//! that happens on it, so each thread keeps it, and only the pages that were written are made zero again.
//!
//! Invariants: a page that is not marked is zero; what is kept for the next is zero throughout.

use std::cell::RefCell;
use std::fmt;
use std::ops::{Deref, Range};

const PAGE_BYTES: usize = 4096;
/// What a thread keeps at most: the disks of a large history, twice.
const KEPT_MAX: usize = 64;

thread_local! {
    static KEPT: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// So many bytes.
pub struct Memory {
    /// At least as many as there are.
    bytes: Vec<u8>,
    len: usize,
    /// Pages that may not be zero.
    is_written: Vec<bool>,
}

impl Memory {
    /// All zero.
    #[must_use]
    pub fn new(len: usize) -> Memory {
        let kept = KEPT.with_borrow_mut(|kept| {
            let fitting = kept.iter().rposition(|bytes| bytes.len() >= len)?;
            Some(kept.swap_remove(fitting))
        });
        // Any of about this size takes it over.
        let bytes = kept.unwrap_or_else(|| vec![0; len.next_power_of_two().max(PAGE_BYTES)]);
        Memory { bytes, len, is_written: vec![false; len.div_ceil(PAGE_BYTES)] }
    }

    /// These bytes, to be changed.
    pub fn change(&mut self, range: Range<usize>) -> &mut [u8] {
        assert!(range.end <= self.len, "{range:?} of {} bytes", self.len);
        self.is_written[range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)].fill(true);
        &mut self.bytes[range]
    }

    /// Makes these bytes zero.
    pub fn zero(&mut self, range: Range<usize>) {
        let mut from = range.start;
        while from < range.end {
            let to = (from / PAGE_BYTES + 1) * PAGE_BYTES;
            let to = to.min(range.end);
            if !self.is_zero(from) {
                self.bytes[from..to].fill(0);
            }
            from = to;
        }
    }

    /// The page that this byte is in was never written.
    #[must_use]
    pub fn is_zero(&self, at: usize) -> bool {
        !self.is_written[at / PAGE_BYTES]
    }

    /// Becomes the same as the other, which is as long.
    pub fn copy(&mut self, other: &Memory) {
        self.clear();
        for page in (0..other.is_written.len()).filter(|page| other.is_written[*page]) {
            let range = page * PAGE_BYTES..((page + 1) * PAGE_BYTES).min(other.len);
            self.change(range.clone()).copy_from_slice(&other[range]);
        }
    }

    /// More of them; none fewer.
    pub fn grow(&mut self, len: usize) {
        if self.bytes.len() < len {
            let mut larger = Memory::new(len);
            larger.change(0..self.len).copy_from_slice(self);
            *self = larger;
        }
        self.len = self.len.max(len);
        self.is_written.resize(self.len.div_ceil(PAGE_BYTES), false);
    }

    /// All zero again.
    pub fn clear(&mut self) {
        for (page, is_written) in self.is_written.iter_mut().enumerate() {
            if std::mem::take(is_written) {
                let to = ((page + 1) * PAGE_BYTES).min(self.len);
                self.bytes[page * PAGE_BYTES..to].fill(0);
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.clear();
        let bytes = std::mem::take(&mut self.bytes);
        // A thread that ends keeps nothing.
        let _ = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            if kept.len() < KEPT_MAX {
                kept.push(bytes);
            }
        });
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl PartialEq<Vec<u8>> for Memory {
    fn eq(&self, other: &Vec<u8>) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} bytes", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_another_has_written_is_zero_again() {
        let mut first = Memory::new(20_000);
        first.change(4090..4100).fill(1);
        first.change(19_999..20_000).fill(1);
        let place = first.as_ptr();
        drop(first);
        let mut second = Memory::new(20_001);
        assert_eq!(second.as_ptr(), place, "it is used again");
        assert!(second.iter().all(|byte| *byte == 0));
        second.change(0..20_001).fill(2);
        second.grow(70_000);
        assert!(
            second[..20_001].iter().all(|byte| *byte == 2) && second[20_001..].iter().all(|byte| *byte == 0)
        );
        let mut third = Memory::new(70_000);
        third.copy(&second);
        second.zero(10..20_000);
        assert!(
            third[10..20_001].iter().all(|byte| *byte == 2) && third[20_001..].iter().all(|byte| *byte == 0)
        );
        assert!(second[9..11] == [2, 0] && second[19_999..20_001] == [0, 2] && second.is_zero(69_999));
        second.clear();
        assert!(second.len() == 70_000 && second.iter().all(|byte| *byte == 0));
    }
}
