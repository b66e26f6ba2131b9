//! The memory of a connection's own, registered once: capsules, completions, and chunks for payload that cannot be named in place.
//!
//! ```text
//!   capsules      a slot each: 64 bytes of command, then up to 16 of inline data
//!   completions   a receive each: 16 bytes
//!   small chunks  8 KiB each: small payload of memory that is not registered, or is scattered
//!   large chunks  128 KiB each
//! ```
#![forbid(unsafe_code)]

/// Bytes between capsules: two cache lines.
const CAPSULE_STRIDE: usize = 128;
/// Bytes between completions: a cache line.
const COMPLETION_STRIDE: usize = 64;
/// A chunk for a request of few blocks.
pub(super) const SMALL: u32 = 8 << 10;
/// A chunk for a piece of a larger one. More of it than fits goes in several commands.
pub(super) const LARGE: u32 = 128 << 10;
/// Large chunks of an I/O queue: 3 MiB for each reactor and path.
const LARGE_COUNT: u16 = 24;
/// Large chunks of the admin queue, whose commands move 64 KiB at most.
const LARGE_COUNT_ADMIN: u16 = 4;

/// Where everything is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) depth: u16,
    pub(super) receives: u16,
    small: u16,
    large: u16,
}

/// A chunk that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    large: bool,
    index: u16,
}

impl Layout {
    /// For a queue of `depth` commands.
    pub(super) fn new(depth: u16, is_admin: bool) -> Layout {
        let large = if is_admin { LARGE_COUNT_ADMIN } else { LARGE_COUNT };
        // One completion more than commands: the receive of the last is posted again before its slot is.
        Layout { depth, receives: depth + 1, small: depth.min(64), large }
    }

    pub(super) fn capsule(&self, slot: u16) -> usize {
        usize::from(slot) * CAPSULE_STRIDE
    }

    pub(super) fn completion(&self, receive: u16) -> usize {
        self.capsule(self.depth) + usize::from(receive) * COMPLETION_STRIDE
    }

    fn chunks(&self) -> usize {
        self.completion(self.receives).next_multiple_of(4096)
    }

    pub(super) fn chunk(&self, chunk: Chunk) -> usize {
        let index = usize::from(chunk.index);
        match chunk.large {
            false => self.chunks() + index * SMALL as usize,
            true => self.chunks() + usize::from(self.small) * SMALL as usize + index * LARGE as usize,
        }
    }

    /// Length of the whole.
    pub(super) fn len(&self) -> usize {
        self.chunk(Chunk { large: true, index: self.large })
    }
}

/// Which chunks are free.
pub(super) struct Chunks {
    small: Vec<u16>,
    large: Vec<u16>,
}

impl Chunks {
    pub(super) fn new(layout: &Layout) -> Chunks {
        Chunks { small: (0..layout.small).collect(), large: (0..layout.large).collect() }
    }

    /// One that has room for `len` bytes, at most [`LARGE`].
    pub(super) fn take(&mut self, len: u32) -> Option<Chunk> {
        if len <= SMALL
            && let Some(index) = self.small.pop()
        {
            return Some(Chunk { large: false, index });
        }
        self.large.pop().map(|index| Chunk { large: true, index })
    }

    pub(super) fn give_back(&mut self, chunk: Chunk) {
        match chunk.large {
            false => self.small.push(chunk.index),
            true => self.large.push(chunk.index),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps_and_everything_is_inside() {
        for (depth, is_admin) in [(31, true), (1, false), (255, false), (511, false)] {
            let layout = Layout::new(depth, is_admin);
            let mut chunks = Chunks::new(&layout);
            let mut all: Vec<(usize, usize)> = (0..depth).map(|slot| (layout.capsule(slot), 80)).collect();
            all.extend((0..layout.receives).map(|receive| (layout.completion(receive), 16)));
            let mut taken = Vec::new();
            while let Some(chunk) = chunks.take(SMALL) {
                taken.push(chunk);
                all.push((layout.chunk(chunk), if chunk.large { LARGE } else { SMALL } as usize));
            }
            all.sort_unstable();
            assert!(all.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0));
            assert_eq!(all.last().map(|(at, len)| at + len), Some(layout.len()));
            assert_eq!(chunks.take(1), None);
            for chunk in taken {
                chunks.give_back(chunk);
            }
            assert!(chunks.take(LARGE).is_some_and(|chunk| chunk.large));
        }
    }
}
