//! Which block comes next, and whether it is read or written.
//!
//! Owns: the order of blocks. Must not know: what is in them, or who does the I/O.
//! Invariant: one pass visits every block exactly once, in random order too (as fio does with its random map).
#![forbid(unsafe_code)]

/// An endless walk over `blocks` blocks.
pub(super) struct Pattern {
    blocks: u64,
    next: u64,
    /// Passes that have been completed.
    passes: u64,
    random: Option<Permutation>,
    read_percent: u8,
    coin: u64,
}

/// A full-period generator over the next power of two, whose values outside the range are skipped.
struct Permutation {
    state: u64,
    mask: u64,
    half_bits: u32,
}

impl Permutation {
    fn new(blocks: u64, seed: u64) -> Self {
        let mask = blocks.next_power_of_two() - 1;
        let half_bits = mask.count_ones().div_ceil(2).max(1);
        Permutation { state: mix(seed) & mask, mask, half_bits }
    }

    fn next(&mut self) -> u64 {
        // A multiplier of 5 modulo 8 and an odd increment: every value of the mask once per period (Hull, Dobell).
        self.state =
            self.state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f) & self.mask;
        // The low bits of such a generator alternate; xoring the high half in is a bijection.
        self.state ^ (self.state >> self.half_bits)
    }
}

/// A bijection that spreads every bit of `x` over all 64.
pub(super) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Pattern {
    /// A walk over `blocks` ≥ 1 blocks of which `read_percent` of a hundred are read.
    pub(super) fn new(blocks: u64, random: bool, read_percent: u8, seed: u64) -> Self {
        let random = random.then(|| Permutation::new(blocks, seed));
        Pattern { blocks, next: 0, passes: 0, random, read_percent, coin: mix(seed ^ 0x636f_696e) | 1 }
    }

    /// How often every block has been visited.
    pub(super) fn passes(&self) -> u64 {
        self.passes
    }

    /// The next block, and whether it is to be read.
    #[inline]
    pub(super) fn next(&mut self) -> (u64, bool) {
        let block = match &mut self.random {
            None => self.next,
            Some(permutation) => loop {
                let block = permutation.next();
                if block < self.blocks {
                    break block;
                }
            },
        };
        self.next += 1;
        if self.next == self.blocks {
            self.next = 0;
            self.passes += 1;
        }
        let read = match self.read_percent {
            0 => false,
            100 => true,
            percent => {
                self.coin ^= self.coin << 13;
                self.coin ^= self.coin >> 7;
                self.coin ^= self.coin << 17;
                (self.coin >> 32) % 100 < u64::from(percent)
            }
        };
        (block, read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_visits_every_block_once() {
        for blocks in [1_u64, 2, 3, 7, 64, 100, 1000, 4096] {
            for random in [false, true] {
                for seed in 0..4 {
                    let mut pattern = Pattern::new(blocks, random, 100, seed);
                    for pass in 0..3 {
                        let mut seen: Vec<u64> = (0..blocks).map(|_| pattern.next().0).collect();
                        assert_eq!(pattern.passes(), pass + 1);
                        seen.sort_unstable();
                        assert!(seen.into_iter().eq(0..blocks), "{blocks} blocks, seed {seed}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_random_walk_is_not_sequential_and_depends_on_the_seed() {
        let walk = |seed| {
            let mut pattern = Pattern::new(1000, true, 100, seed);
            (0..1000).map(|_| pattern.next().0).collect::<Vec<_>>()
        };
        assert_ne!(walk(1), walk(2));
        let steps = walk(1).windows(2).filter(|w| w[1].abs_diff(w[0]) < 10).count();
        assert!(steps < 100, "{steps} of 999 steps are short");
    }

    #[test]
    fn a_mix_has_about_its_share_of_reads() {
        let mut pattern = Pattern::new(100, true, 30, 5);
        let reads = (0..10_000).filter(|_| pattern.next().1).count();
        assert!((2700..3300).contains(&reads), "{reads} of 10000");
    }
}
