//! Payload buffers that are parts of memory which is registered once: a buddy allocator.

use hawser_runtime::buffers::AlignedBuffer;
use std::sync::Arc;

/// log2 of the smallest part.
const ORDER_MIN: u32 = AlignedBuffer::ALIGNMENT.ilog2();

/// Memory of which parts are given out, each a power of two.
pub(crate) struct Arena {
    whole: Arc<AlignedBuffer>,
    /// Where it begins in the whole.
    base: usize,
    len: usize,
    /// By log2 of their length: where free parts begin, from the base.
    free: Vec<Vec<usize>>,
}

impl Arena {
    /// The `len` bytes of `whole` from `base` on: a power of two, at least a page.
    pub(crate) fn new(whole: &Arc<AlignedBuffer>, base: usize, len: usize) -> Arena {
        assert!(len.is_power_of_two() && len >= AlignedBuffer::ALIGNMENT, "an arena is a power of two");
        let mut free = vec![Vec::new(); len.ilog2() as usize + 1];
        free[len.ilog2() as usize].push(0);
        Arena { whole: Arc::clone(whole), base, len, free }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// A part of `len` bytes, a power of two; `None`: no run of so many is free.
    pub(crate) fn take(&mut self, len: usize) -> Option<AlignedBuffer> {
        let order = len.max(1).next_power_of_two().ilog2().max(ORDER_MIN) as usize;
        let from = (order..self.free.len()).find(|order| !self.free[*order].is_empty())?;
        let at = self.free[from].pop()?;
        // What is left over of a larger one: its upper halves.
        for half in order..from {
            self.free[half].push(at + (1 << half));
        }
        Some(AlignedBuffer::part(&self.whole, self.base + at, 1 << order))
    }

    /// Whether a buffer is a part of this.
    pub(crate) fn has(&self, buffer: &AlignedBuffer) -> bool {
        let start = self.whole.as_ptr() as usize + self.base;
        (start..start + self.len).contains(&(buffer.as_ptr() as usize))
    }

    /// Takes a part back.
    pub(crate) fn give_back(&mut self, buffer: &AlignedBuffer) {
        let start = self.whole.as_ptr() as usize + self.base;
        let mut at = buffer.as_ptr() as usize - start;
        let mut order = buffer.len().ilog2() as usize;
        while order + 1 < self.free.len() {
            let buddy = at ^ (1 << order);
            let Some(place) = self.free[order].iter().position(|other| *other == buddy) else { break };
            self.free[order].swap_remove(place);
            at = at.min(buddy);
            order += 1;
        }
        self.free[order].push(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Parts never overlap, and all memory is one part again when all are back.
        #[test]
        fn parts_are_apart_and_come_together_again(
            steps in prop::collection::vec((any::<bool>(), 0u32..10, any::<prop::sample::Index>()), 1..200),
        ) {
            let whole = Arc::new(AlignedBuffer::new((1 << 20) + 8192));
            let mut arena = Arena::new(&whole, 8192, 1 << 20);
            let mut out: Vec<AlignedBuffer> = Vec::new();
            for (take, shift, which) in steps {
                if take {
                    if let Some(part) = arena.take(2048 << shift) {
                        let (start, len) = (part.as_ptr() as usize, part.len());
                        prop_assert!(len >= 2048 << shift && arena.has(&part));
                        for other in &out {
                            let at = other.as_ptr() as usize;
                            prop_assert!(start + len <= at || at + other.len() <= start);
                        }
                        out.push(part);
                    }
                } else if !out.is_empty() {
                    let part = out.swap_remove(which.index(out.len()));
                    arena.give_back(&part);
                }
            }
            for part in out {
                arena.give_back(&part);
            }
            prop_assert!(arena.take(1 << 20).is_some());
            prop_assert!(arena.take(1).is_none());
        }
    }
}
