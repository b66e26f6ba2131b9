//! Where things stand on a member. The same on all members, also on those that have no metadata.
//!
//! ```text
//!   0      4096          64 KiB        1 MiB                                                                1 MiB aligned
//!   │ free │ superblock A │ superblock B │ intent pages │ log │ metadata pages ─────── │ parity log │ … │ data …
//!                                                              0: root  1: root  2: …
//! ```

use super::PAGE_BYTES;

/// One page, in offsets.
const PAGE: u64 = PAGE_BYTES as u64;
/// What data is aligned to.
const ALIGNMENT: u64 = 1 << 20;

/// How large the parts of the metadata area are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Pages of intent bits; those of all sets stand one after the other.
    pub intent_pages: u32,
    /// The log: whole pages.
    pub log_bytes: u64,
    /// Pages of the checkpoint, the two roots included.
    pub metadata_pages: u32,
    /// Pages of the parity log, its two headers included: RAID 5 and 6 only, else 0.
    pub parity_log_pages: u32,
}

impl Layout {
    /// Where the two copies of the superblock stand.
    pub const SUPERBLOCKS: [u64; 2] = [4096, 64 << 10];
    /// Where metadata begins.
    pub const METADATA_OFFSET: u64 = 1 << 20;

    /// Where the intent pages begin.
    #[must_use]
    pub fn intents_offset(&self) -> u64 {
        Layout::METADATA_OFFSET
    }

    /// Where the log begins.
    #[must_use]
    pub fn log_offset(&self) -> u64 {
        self.intents_offset() + u64::from(self.intent_pages) * PAGE
    }

    /// Where the pages of the checkpoint begin.
    #[must_use]
    pub fn pages_offset(&self) -> u64 {
        self.log_offset() + self.log_bytes
    }

    /// Where such a page stands.
    #[must_use]
    pub fn page_offset(&self, page: u32) -> u64 {
        self.pages_offset() + u64::from(page) * PAGE
    }

    /// Where the parity log begins.
    #[must_use]
    pub fn parity_log_offset(&self) -> u64 {
        self.page_offset(self.metadata_pages)
    }

    /// Where data begins.
    #[must_use]
    pub fn data_offset(&self) -> u64 {
        let end = self.parity_log_offset() + u64::from(self.parity_log_pages) * PAGE;
        end.next_multiple_of(ALIGNMENT)
    }
}
