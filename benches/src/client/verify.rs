//! What a verified block holds, and which blocks may be checked.
//!
//! ```text
//! byte 0    8       16     24           32      36
//! | magic | block | seed | generation | crc32c | words made from (seed, block, generation) … |
//! ```
//!
//! Owns: the header and the record of what was written. Must not know: how blocks travel.
//! Invariant: a block is in flight at most once, so its expected generation is never in doubt.
#![forbid(unsafe_code)]

use super::pattern::mix;
use crate::{to_u64, to_usize};

/// "hawserbk", little-endian.
const MAGIC: u64 = u64::from_le_bytes(*b"hawserbk");
const HEADER: usize = 36;
/// Smallest block that holds a header.
pub(super) const BLOCK_MIN: u64 = 512;

/// The record of a job's own writes.
pub(super) struct Ledger {
    seed: u64,
    first_block: u64,
    /// Generation of each block's last write that completed; 0 = not written by this run.
    generations: Vec<u32>,
    busy: Vec<bool>,
}

/// Why a block is not what it must be.
pub(super) struct Mismatch(String);

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Ledger {
    /// A record for `blocks` blocks, of which the first has number `first_block` on the disk.
    pub(super) fn new(blocks: u64, first_block: u64, seed: u64) -> Self {
        let blocks = to_usize(blocks);
        Ledger { seed, first_block, generations: vec![0; blocks], busy: vec![false; blocks] }
    }

    /// Whether nothing is in flight for `block`; if so, something now is.
    pub(super) fn claim(&mut self, block: u64) -> bool {
        let busy = &mut self.busy[to_usize(block)];
        !std::mem::replace(busy, true)
    }

    /// The request for `block` has ended.
    pub(super) fn release(&mut self, block: u64) {
        self.busy[to_usize(block)] = false;
    }

    /// Whether this run has written `block`.
    pub(super) fn is_written(&self, block: u64) -> bool {
        self.generations[to_usize(block)] != 0
    }

    /// Fills `buffer` with the next generation of `block`.
    pub(super) fn fill(&self, block: u64, buffer: &mut [u8]) {
        let generation = u64::from(self.generations[to_usize(block)]) + 1;
        let number = self.first_block + block;
        fill(buffer, number, self.seed, generation);
    }

    /// The write of what [`Ledger::fill`] made has completed.
    pub(super) fn written(&mut self, block: u64) {
        self.generations[to_usize(block)] += 1;
    }

    /// Checks what was read of `block`. A block that this run has not written may have any generation.
    pub(super) fn check(&self, block: u64, buffer: &[u8]) -> Result<(), Mismatch> {
        let number = self.first_block + block;
        let wrong = |what: &str, found: u64, expected: u64| {
            Err(Mismatch(format!("block {number}: {what} is {found:#x}, expected {expected:#x}")))
        };
        let word = |at: usize| u64::from_le_bytes(buffer[at..at + 8].try_into().expect("eight bytes"));
        if word(0) != MAGIC {
            return wrong("the magic", word(0), MAGIC);
        }
        if word(8) != number {
            return wrong("the block number", word(8), number);
        }
        if word(16) != self.seed {
            return wrong("the seed", word(16), self.seed);
        }
        let generation = u64::from(self.generations[to_usize(block)]);
        if generation != 0 && word(24) != generation {
            return wrong("the generation", word(24), generation);
        }
        let found = u32::from_le_bytes(buffer[32..36].try_into().expect("four bytes"));
        let expected = checksum(buffer);
        if found != expected {
            return wrong("the CRC", u64::from(found), u64::from(expected));
        }
        Ok(())
    }
}

fn checksum(buffer: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&buffer[..32]), &buffer[HEADER..])
}

fn fill(buffer: &mut [u8], number: u64, seed: u64, generation: u64) {
    for (i, word) in [MAGIC, number, seed, generation].into_iter().enumerate() {
        buffer[i * 8..][..8].copy_from_slice(&word.to_le_bytes());
    }
    let base = mix(seed ^ mix(number ^ mix(generation)));
    for (i, chunk) in buffer[HEADER..].chunks_mut(8).enumerate() {
        let word = base.wrapping_mul(to_u64(i) * 2 + 1).to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
    let crc = checksum(buffer);
    buffer[32..36].copy_from_slice(&crc.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> (Ledger, Vec<u8>) {
        let mut ledger = Ledger::new(4, 100, 7);
        let mut buffer = vec![0; 4096];
        assert!(ledger.claim(2));
        ledger.fill(2, &mut buffer);
        ledger.written(2);
        ledger.release(2);
        (ledger, buffer)
    }

    #[test]
    fn a_block_read_back_is_accepted() {
        let (ledger, buffer) = written();
        assert!(ledger.check(2, &buffer).is_ok());
    }

    #[test]
    fn a_changed_byte_anywhere_is_found() {
        let (ledger, mut buffer) = written();
        for at in (0..buffer.len()).step_by(7).chain(0..HEADER) {
            buffer[at] ^= 0x10;
            assert!(ledger.check(2, &buffer).is_err(), "byte {at}");
            buffer[at] ^= 0x10;
        }
    }

    #[test]
    fn another_block_an_older_write_and_another_seed_are_found() {
        let (mut ledger, buffer) = written();
        assert!(ledger.check(1, &buffer).is_err(), "another block");
        ledger.written(2);
        assert!(ledger.check(2, &buffer).is_err(), "an older write");
        assert!(Ledger::new(4, 100, 8).check(2, &buffer).is_err(), "another seed");
        assert!(Ledger::new(4, 100, 7).check(2, &buffer).is_ok(), "an earlier run's block");
    }

    #[test]
    fn a_block_in_flight_is_not_claimed_again() {
        let mut ledger = Ledger::new(4, 0, 7);
        assert!(ledger.claim(3));
        assert!(!ledger.claim(3));
        ledger.release(3);
        assert!(ledger.claim(3));
    }
}
