//! What stands on the members of a pool: pure codecs, no I/O.
//!
//! ```text
//!   superblock   who belongs to the pool, and who is in sync          two copies on every member and spare
//!   intents      which regions may differ between members             ┐
//!   log          changes of mappings since the last checkpoint        │ on the metadata members
//!   checkpoint   root → volumes → directories → chunks → partials     ┘
//!   parity log   what is about to change in a stripe                  on every member, RAID 5 and 6
//!   tail         records that are in no batch of the log yet          in memory that outlives the process
//! ```
//!
//! Owns: the bytes; `docs/on-disk-format.md` is their contract. Must not know: devices, requests, what the mapping means.
//!
//! Invariants:
//! - All that is decoded is untrusted: each field is checked, and no input makes a decoder panic or ask for more memory
//!   than a small multiple of its length.
//! - What is decoded without a complaint encodes to the same bytes again.
//! - Integers are little-endian. What is reserved is zero.

mod bytes;
pub mod checkpoint;
pub mod intents;
pub mod layout;
pub mod log;
pub mod parity_log;
pub mod record;
pub mod superblock;
pub mod tail;
pub mod volumes;

#[cfg(test)]
mod superblock_tests;
#[cfg(test)]
mod tests;

pub use checkpoint::{
    CHUNK_ENTRIES, ChunkPage, DIR_POINTERS, PARTIAL_PAGES, PARTIALS_PER_PAGE, PagePtr, PartialRecord, Root,
    crc_of, decode_dir, decode_partials, encode_dir, encode_partials,
};
pub use intents::{INTENTS_PER_PAGE, decode_intents, encode_intents};
pub use layout::Layout;
pub use log::{Batch, batch_len, decode_batch, encode_batch, number_from};
pub use parity_log::{ParityEntry, ParityHeader};
pub use record::{NewSnapshot, Record};
pub use superblock::{
    MemberRecord, Replacement, ScrubRecord, SetRecord, Superblock, metadata_members, parity_log_pages_min,
    unit_bytes_for,
};
pub use tail::{TailContent, decode_tail, encode_tail_entry, encode_tail_header, record_of_tail_entry};
pub use volumes::{VolumeRecord, VolumesDecoder, encode_volumes};

use std::fmt;

/// The unit of metadata: a superblock, a page of intents, a page of the checkpoint.
pub const PAGE_BYTES: usize = 4096;

/// Names pools, members and volumes for ever.
pub type Uuid = [u8; 16];

/// No volume, extent, page.
pub const NONE: u32 = u32::MAX;

/// The longest name of a pool or volume.
pub const NAME_BYTES_MAX: usize = 64;

/// What is wrong with bytes that should be ours, in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError(pub String);

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for FormatError {}

/// Whether a pool or volume may have this name: 1 to 64 of `A-Z a-z 0-9 . _ -`.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(plain)
}
