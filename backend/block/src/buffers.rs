//! The payload of a request: a list of memory segments that somebody else owns.
//!
//! Never a Rust reference: the memory is a guest's, which writes to it while we do.

use std::ptr;

/// A run of bytes in our address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first byte.
    pub start: *mut u8,
    /// How many.
    pub len: usize,
}

/// A byte range over an array of iovecs. A plain value; slicing walks the iovecs before the range and copies nothing.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    iovecs: *const libc::iovec,
    count: u32,
    /// Bytes before the range, always within the first iovec.
    skip: u32,
    len: u32,
}

impl Buffers {
    /// No payload.
    pub const EMPTY: Buffers = Buffers { iovecs: ptr::null(), count: 0, skip: 0, len: 0 };

    /// All bytes of `count` iovecs, `len` in total.
    ///
    /// # Safety
    /// The array, and the memory that it names, stay mapped and in place until the request that carries this (or any slice
    /// of it) has ended. For a read the memory is writable. Every iovec's length is not 0 and they add up to `len`.
    /// Others may read and write the memory meanwhile.
    #[must_use]
    pub unsafe fn new(iovecs: *const libc::iovec, count: u32, len: u32) -> Buffers {
        Buffers { iovecs, count, skip: 0, len }
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there is no payload.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The iovecs and how many, if the range begins and ends with whole ones: then they can go to the kernel as they are.
    #[must_use]
    pub fn whole_iovecs(&self) -> Option<(*const libc::iovec, u32)> {
        let mut left = self.len();
        let mut count = 0;
        if self.skip != 0 || left == 0 {
            return None;
        }
        while left > 0 {
            // SAFETY: `new` promised iovecs that add up to at least the range, and `left` bytes of it are to come.
            left = left.checked_sub(unsafe { (*self.iovecs.add(count as usize)).iov_len })?;
            count += 1;
        }
        Some((self.iovecs, count))
    }

    /// The bytes from `offset` on, `len` of them.
    ///
    /// # Panics
    /// When the range is not within this one: our bug.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> Buffers {
        assert!(offset <= self.len() && len <= self.len() - offset, "slice outside of the buffers");
        if len == 0 {
            return Buffers::EMPTY;
        }
        let mut skip = self.skip as usize + offset;
        let mut index = 0;
        loop {
            // SAFETY: `new` promised `count` iovecs that stay in place, and the assertion above keeps us among them.
            let iov_len = unsafe { (*self.iovecs.add(index)).iov_len };
            if skip < iov_len {
                break;
            }
            skip -= iov_len;
            index += 1;
        }
        let narrow = |value: usize| u32::try_from(value).expect("a request is far below 4 GiB");
        // SAFETY: as above.
        let iovecs = unsafe { self.iovecs.add(index) };
        Buffers { iovecs, count: self.count - narrow(index), skip: narrow(skip), len: narrow(len) }
    }

    /// The segments of the range, in order; none is empty.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + use<> {
        let Buffers { iovecs, mut skip, len, .. } = *self;
        let mut left = len as usize;
        let mut index = 0;
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            // SAFETY: `new` promised iovecs that add up to at least the range, and `left` bytes of it are to come.
            let iovec = unsafe { *iovecs.add(index) };
            index += 1;
            let skipped = std::mem::take(&mut skip) as usize;
            let len = (iovec.iov_len - skipped).min(left);
            left -= len;
            Some(Segment { start: iovec.iov_base.cast::<u8>().wrapping_add(skipped), len })
        })
    }

    /// Writes the segments into `out` as iovecs and returns how many; `None` when there are more than `out` holds.
    pub fn fill_iovecs(&self, out: &mut [libc::iovec]) -> Option<usize> {
        let mut used = 0;
        for segment in self.segments() {
            *out.get_mut(used)? = libc::iovec { iov_base: segment.start.cast(), iov_len: segment.len };
            used += 1;
        }
        Some(used)
    }

    /// Copies the payload out to `to`, [`Buffers::len`] bytes.
    ///
    /// # Safety
    /// The request has not ended; `to` has room and does not overlap the payload.
    pub unsafe fn copy_to(&self, to: *mut u8) {
        let mut to = to;
        for segment in self.segments() {
            // SAFETY: the segment is mapped while the request lives; the caller vouches for `to`. Racing writes of the
            // guest give torn bytes, as on any disk; no reference is made.
            unsafe {
                ptr::copy_nonoverlapping(segment.start, to, segment.len);
                to = to.add(segment.len);
            }
        }
    }

    /// Copies `from` into the payload, [`Buffers::len`] bytes.
    ///
    /// # Safety
    /// The request has not ended and is a read; `from` is readable for the length and does not overlap the payload.
    pub unsafe fn copy_from(&self, from: *const u8) {
        let mut from = from;
        for segment in self.segments() {
            // SAFETY: as in `copy_to`.
            unsafe {
                ptr::copy_nonoverlapping(from, segment.start, segment.len);
                from = from.add(segment.len);
            }
        }
    }

    /// Fills the payload with zeroes.
    ///
    /// # Safety
    /// The request has not ended and is a read.
    pub unsafe fn zero(&self) {
        for segment in self.segments() {
            // SAFETY: as in `copy_to`.
            unsafe { ptr::write_bytes(segment.start, 0, segment.len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slice_of_every_layout_names_the_same_bytes_as_a_flat_copy() {
        let mut memory: Vec<u8> = (0..=255).collect();
        let cuts = [[3usize, 5, 1, 7], [1, 1, 1, 1], [16, 2, 9, 4]];
        for cut in cuts {
            let mut at = 0;
            let mut flat = Vec::new();
            let iovecs: Vec<libc::iovec> = cut
                .iter()
                .map(|&len| {
                    flat.extend_from_slice(&memory[at..at + len]);
                    let iovec = libc::iovec { iov_base: memory[at..].as_mut_ptr().cast(), iov_len: len };
                    at += len + 3;
                    iovec
                })
                .collect();
            let total = u32::try_from(flat.len()).unwrap();
            // SAFETY: `iovecs` and `memory` outlive every use below.
            let buffers = unsafe { Buffers::new(iovecs.as_ptr(), 4, total) };
            assert!(buffers.whole_iovecs().is_some());
            for from in 0..=flat.len() {
                for to in from..=flat.len() {
                    let slice = buffers.slice(from, to - from);
                    let mut copy = vec![0; to - from];
                    // SAFETY: `copy` has the slice's length and is apart from `memory`.
                    unsafe { slice.copy_to(copy.as_mut_ptr()) };
                    assert_eq!(copy, flat[from..to]);
                    let ends: Vec<usize> = cut
                        .iter()
                        .scan(0, |sum, len| {
                            *sum += len;
                            Some(*sum)
                        })
                        .collect();
                    let whole = from < to && (from == 0 || ends.contains(&from)) && ends.contains(&to);
                    let count = slice.whole_iovecs().map(|(_, count)| count as usize);
                    assert_eq!(count, whole.then(|| slice.segments().count()), "{from}..{to}");
                    if from < to {
                        let again = slice.slice(1, slice.len() - 1);
                        let mut copy = vec![0; again.len()];
                        // SAFETY: as above.
                        unsafe { again.copy_to(copy.as_mut_ptr()) };
                        assert_eq!(copy, flat[from + 1..to]);
                    }
                }
            }
        }
    }
}
