//! Aligned payload buffers: kept for the next time, and bounded.
//!
//! A pool belongs to one owner on one reactor: a connection of one host, a channel to one file. What a buffer held before
//! is therefore the same owner's.

use hawser_runtime::buffers::AlignedBuffer;

/// Buffers by powers of two.
pub(crate) struct BufferPool {
    in_use_bytes_max: usize,
    spare_bytes_max: usize,
    /// By log2 of their length; requests are far below 4 GiB.
    spare: [Vec<AlignedBuffer>; 32],
    spare_bytes: usize,
    in_use_bytes: usize,
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
        }
    }

    /// A buffer of at least `len` bytes, unless too much is in use; a first one is always given.
    pub(crate) fn take(&mut self, len: usize) -> Option<AlignedBuffer> {
        let len = len.next_power_of_two().max(AlignedBuffer::ALIGNMENT);
        let fits = self.in_use_bytes == 0 || self.in_use_bytes + len <= self.in_use_bytes_max;
        fits.then(|| self.take_anyway(len))
    }

    /// A buffer of at least `len` bytes, for what its owner bounds in another way.
    pub(crate) fn take_anyway(&mut self, len: usize) -> AlignedBuffer {
        let len = len.next_power_of_two().max(AlignedBuffer::ALIGNMENT);
        self.in_use_bytes += len;
        match self.spare[len.ilog2() as usize].pop() {
            Some(buffer) => {
                self.spare_bytes -= len;
                buffer
            }
            None => AlignedBuffer::new(len),
        }
    }

    /// Takes a buffer back that no operation names any more.
    pub(crate) fn give_back(&mut self, buffer: AlignedBuffer) {
        let len = buffer.len();
        self.in_use_bytes -= len;
        if self.spare_bytes + len <= self.spare_bytes_max {
            self.spare_bytes += len;
            self.spare[len.ilog2() as usize].push(buffer);
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
}
