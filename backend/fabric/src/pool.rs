//! Aligned payload buffers: kept for the next time, and bounded.
//!
//! A pool belongs to one owner on one reactor: a connection of one host, a channel to one file. What a buffer held before
//! is therefore the same owner's.

use crate::rdma::arena::Arena;
use hawser_runtime::buffers::AlignedBuffer;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What the pools and connections of many owners may have together.
///
/// It is not a wall: an owner that has nothing gets one buffer all the same, so that everybody goes on, one command at a
/// time. Owners of whom there is a bounded number therefore have a bounded sum.
pub(crate) struct Budget {
    bytes_max: usize,
    used: AtomicUsize,
}

impl Budget {
    pub(crate) fn new(bytes_max: usize) -> Budget {
        Budget { bytes_max, used: AtomicUsize::new(0) }
    }

    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    pub(crate) fn charge(&self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn credit(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Whether there is no room for `more` bytes.
    pub(crate) fn is_over_with(&self, more: usize) -> bool {
        self.used().saturating_add(more) > self.bytes_max
    }

    /// Whether so much is in use that nobody should keep what it does not need now.
    fn is_tight(&self) -> bool {
        self.used() > self.bytes_max / 2
    }
}

/// Buffers by powers of two.
pub(crate) struct BufferPool {
    in_use_bytes_max: usize,
    spare_bytes_max: usize,
    /// By log2 of their length; requests are far below 4 GiB.
    spare: [Vec<AlignedBuffer>; 32],
    spare_bytes: usize,
    in_use_bytes: usize,
    /// What this pool's memory counts against, if it does.
    budget: Option<Arc<Budget>>,
    /// Where buffers are parts of memory that is there anyway: then all come from there, but those that are given anyway.
    arena: Option<Arena>,
}

impl BufferPool {
    /// A pool that gives out `in_use_bytes_max` at a time, and keeps `spare_bytes_max` while unused.
    pub(crate) fn new(in_use_bytes_max: usize, spare_bytes_max: usize) -> BufferPool {
        BufferPool {
            in_use_bytes_max,
            spare_bytes_max,
            spare: Default::default(),
            spare_bytes: 0,
            in_use_bytes: 0,
            budget: None,
            arena: None,
        }
    }

    /// The same pool with buffers that are parts of `arena`, which counts as a whole.
    pub(crate) fn from(mut self, arena: Arena) -> BufferPool {
        if let Some(budget) = &self.budget {
            budget.charge(arena.len());
        }
        self.arena = Some(arena);
        self
    }

    /// The same pool with its memory, spare or in use, as a part of `budget`.
    pub(crate) fn within(mut self, budget: Arc<Budget>) -> BufferPool {
        self.budget = Some(budget);
        self
    }

    /// A buffer of at least `len` bytes, unless too much is in use; a first one is always given.
    pub(crate) fn take(&mut self, len: usize) -> Option<AlignedBuffer> {
        if let Some(arena) = &mut self.arena {
            return arena.take(len);
        }
        let len = len.next_power_of_two().max(AlignedBuffer::ALIGNMENT);
        let fits = self.in_use_bytes + len <= self.in_use_bytes_max
            && (!self.spare[len.ilog2() as usize].is_empty()
                || self.budget.as_ref().is_none_or(|budget| !budget.is_over_with(len)));
        (fits || self.in_use_bytes == 0).then(|| self.take_anyway(len))
    }

    /// A buffer of at least `len` bytes, for what its owner bounds in another way.
    pub(crate) fn take_anyway(&mut self, len: usize) -> AlignedBuffer {
        if let Some(buffer) = self.arena.as_mut().and_then(|arena| arena.take(len)) {
            return buffer;
        }
        let len = len.next_power_of_two().max(AlignedBuffer::ALIGNMENT);
        self.in_use_bytes += len;
        match self.spare[len.ilog2() as usize].pop() {
            Some(buffer) => {
                self.spare_bytes -= len;
                buffer
            }
            None => {
                if let Some(budget) = &self.budget {
                    budget.charge(len);
                }
                AlignedBuffer::new(len)
            }
        }
    }

    /// Takes a buffer back that no operation names any more.
    pub(crate) fn give_back(&mut self, buffer: AlignedBuffer) {
        if let Some(arena) = self.arena.as_mut().filter(|arena| arena.has(&buffer)) {
            return arena.give_back(&buffer);
        }
        let len = buffer.len();
        self.in_use_bytes -= len;
        let tight = self.budget.as_ref().is_some_and(|budget| budget.is_tight());
        if self.spare_bytes + len <= self.spare_bytes_max && !tight {
            self.spare_bytes += len;
            self.spare[len.ilog2() as usize].push(buffer);
            return;
        }
        let mut freed = len;
        if tight && self.in_use_bytes == 0 {
            // An idle owner keeps nothing that others need.
            self.spare = Default::default();
            freed += std::mem::take(&mut self.spare_bytes);
        }
        if let Some(budget) = &self.budget {
            budget.credit(freed);
        }
    }
}

impl Drop for BufferPool {
    fn drop(&mut self) {
        // Buffers that are out go with their owner, who goes now.
        if let Some(budget) = &self.budget {
            let arena = self.arena.as_ref().map_or(0, Arena::len);
            budget.credit(self.in_use_bytes + self.spare_bytes + arena);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_and_spare_are_bounded_and_one_buffer_is_always_given() {
        let mut pool = BufferPool::new(32 << 20, 8 << 20);
        let large = pool.take((32 << 20) + 1).expect("the first is always given");
        assert!(pool.take(1).is_none());
        let small = pool.take_anyway(1);
        assert_eq!(small.len(), 4096);
        pool.give_back(small);
        pool.give_back(large);
        assert_eq!(pool.spare_bytes, 4096, "too large to keep");
        let many: Vec<_> = std::iter::from_fn(|| pool.take(3 << 20)).collect();
        assert_eq!(many.len(), 8);
        let first = many[0].as_ptr();
        many.into_iter().for_each(|buffer| pool.give_back(buffer));
        assert_eq!((pool.spare_bytes, pool.in_use_bytes), (4096 + (4 << 20), 0));
        assert!(pool.take(4 << 20).is_some_and(|buffer| buffer.as_ptr() == first));
    }

    #[test]
    fn owners_over_their_common_budget_get_one_buffer_each_and_keep_none() {
        let budget = Arc::new(Budget::new(8 << 20));
        let pool = || BufferPool::new(32 << 20, 8 << 20).within(Arc::clone(&budget));
        let (mut first, mut second) = (pool(), pool());
        let many: Vec<_> = std::iter::from_fn(|| first.take(1 << 20)).collect();
        assert_eq!((many.len(), budget.used()), (8, 8 << 20));
        // The other goes on with one at a time.
        let one = second.take(1 << 20).expect("the first is always given");
        assert!(second.take(4096).is_none());
        second.give_back(one);
        assert_eq!((budget.used(), second.spare_bytes), (8 << 20, 0));
        many.into_iter().for_each(|buffer| first.give_back(buffer));
        assert!(first.spare_bytes <= 4 << 20 && budget.used() == first.spare_bytes);
        drop((first, second));
        assert_eq!(budget.used(), 0);
    }
}
