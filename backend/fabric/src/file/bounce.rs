//! Aligned buffers for payload that direct I/O cannot take where it lies: kept for the next time, and bounded.

use hawser_runtime::buffers::AlignedBuffer;

/// What one channel may have in use at a time; a request beyond it waits for another to end.
const IN_USE_BYTES_MAX: usize = 32 << 20;
/// What is kept while unused.
const SPARE_BYTES_MAX: usize = 8 << 20;

/// Buffers by powers of two.
#[derive(Default)]
pub(super) struct BouncePool {
    /// By log2 of their length; requests are far below 4 GiB.
    spare: [Vec<AlignedBuffer>; 32],
    spare_bytes: usize,
    in_use_bytes: usize,
}

impl BouncePool {
    /// A buffer of at least `len` bytes, unless too much is in use; a first one is always given.
    pub(super) fn take(&mut self, len: usize) -> Option<AlignedBuffer> {
        let len = len.next_power_of_two().max(AlignedBuffer::ALIGNMENT);
        if self.in_use_bytes > 0 && self.in_use_bytes + len > IN_USE_BYTES_MAX {
            return None;
        }
        self.in_use_bytes += len;
        let spare = self.spare[len.ilog2() as usize].pop();
        if spare.is_some() {
            self.spare_bytes -= len;
        }
        Some(spare.unwrap_or_else(|| AlignedBuffer::new(len)))
    }

    /// Takes a buffer back that no operation names any more.
    pub(super) fn give_back(&mut self, buffer: AlignedBuffer) {
        let len = buffer.len();
        self.in_use_bytes -= len;
        if self.spare_bytes + len <= SPARE_BYTES_MAX {
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
        let mut pool = BouncePool::default();
        let large = pool.take(IN_USE_BYTES_MAX + 1).expect("the first is always given");
        assert!(pool.take(1).is_none());
        pool.give_back(large);
        assert_eq!(pool.spare_bytes, 0, "too large to keep");
        let many: Vec<_> = std::iter::from_fn(|| pool.take(3 << 20)).collect();
        assert_eq!(many.len(), IN_USE_BYTES_MAX / (4 << 20));
        let first = many[0].as_ptr();
        many.into_iter().for_each(|buffer| pool.give_back(buffer));
        assert_eq!((pool.spare_bytes, pool.in_use_bytes), (SPARE_BYTES_MAX, 0));
        let again: Vec<_> = (0..3).filter_map(|_| pool.take(4 << 20)).collect();
        assert!(again.iter().any(|buffer| buffer.as_ptr() == first));
    }
}
