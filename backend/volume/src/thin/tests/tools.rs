//! What the tests share: random numbers with a seed, a disk that is a map, and whole checkpoints.

use crate::format::{Record, Root};
use crate::thin::{Loader, Metadata, Thin};
use std::collections::BTreeMap;

/// xorshift64*.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `limit`.
    pub(super) fn below(&mut self, limit: u32) -> u32 {
        u32::try_from((self.next() >> 16) % u64::from(limit)).expect("below a u32")
    }

    pub(super) fn one_in(&mut self, times: u32) -> bool {
        self.below(times) == 0
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        let limit = u32::try_from(from.len()).ok().filter(|len| *len > 0)?;
        Some(from[self.below(limit) as usize])
    }
}

/// The metadata area.
pub(super) type Disk = BTreeMap<u32, Vec<u8>>;

pub(super) const POOL: [u8; 16] = [7; 16];

/// Loads what the root says.
pub(super) fn load(disk: &Disk, root: &Root, thin: Thin, pages: u32) -> Result<Metadata, String> {
    let mut loader = Loader::new(thin, pages, root);
    loop {
        let wanted = loader.wanted(5);
        if wanted.is_empty() {
            return loader.finish();
        }
        for page in wanted {
            loader.give(page, disk.get(&page).ok_or("a page that was never written")?)?;
        }
    }
}

/// A whole checkpoint, at once.
pub(super) fn checkpoint(metadata: &mut Metadata, disk: &mut Disk, everything: bool) -> Root {
    metadata.begin_checkpoint(everything);
    loop {
        let pages = metadata.checkpoint_step(7).unwrap();
        if pages.is_empty() {
            break;
        }
        disk.extend(pages);
    }
    let root = metadata.checkpoint_root(POOL, 0, 0, 0);
    metadata.end_checkpoint(true);
    root
}

pub(super) fn create(id: u32, size_bytes: u64) -> Record {
    Record::CreateVolume { id, uuid: [1; 16], name: format!("v{id}"), size_bytes }
}
