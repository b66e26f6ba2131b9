//! The parity log: what a write is about to change in a stripe, data and parity, while neither is in its place yet.
//!
//! ```text
//!   pages 0, 1   header, in turn: whose entries count
//!   from 2 on    entries, each in whole pages and in one piece:
//!                │ head: key, number, row, columns, members │ their bytes, one behind the other … │
//! ```
//!
//! A head is looked for at each page, payload included, and a guest chooses what payload is. So entries are told by a key that was drawn when
//! the pool was opened, and that no guest can know.

use super::bytes::{
    fill_page, is_sealed, put_header, put_u32, put_u64, seal, take, take_header, take_u32, take_u64,
};
use super::{FormatError, PAGE_BYTES, Uuid};

const HEADER_MAGIC: &[u8; 8] = b"HAWSERPH";
const ENTRY_MAGIC: &[u8; 8] = b"HAWSERPE";

/// Pages before the first entry.
pub const HEADER_PAGES: u32 = 2;
/// The most bytes of each member in one entry.
pub const ENTRY_LEN_MAX: u32 = 64 << 10;

/// Whose entries count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParityHeader {
    /// Raised with each header; it stands in page `number % 2`.
    pub number: u64,
    /// Entries before this one are not needed.
    pub released: u64,
    /// Of the opening whose entries these are.
    pub key: [u8; 16],
    /// Whole stripes may have been written without the log, and not flushed.
    pub unlogged: bool,
}

const UNLOGGED: u32 = 1;

impl ParityHeader {
    /// The page.
    #[must_use]
    pub fn encode(&self, pool: &Uuid) -> Vec<u8> {
        let mut out = Vec::with_capacity(PAGE_BYTES);
        put_header(&mut out, HEADER_MAGIC);
        out.extend_from_slice(pool);
        put_u64(&mut out, self.number);
        put_u64(&mut out, self.released);
        out.extend_from_slice(&self.key);
        put_u32(&mut out, if self.unlogged { UNLOGGED } else { 0 });
        fill_page(&mut out);
        seal(&mut out);
        out
    }

    /// The header in a page; `None`: torn, or none of this pool's.
    #[must_use]
    pub fn decode(page: &[u8], pool: &Uuid) -> Option<ParityHeader> {
        if page.len() != PAGE_BYTES || !is_sealed(page) {
            return None;
        }
        let mut bytes = page;
        let mut parse = || -> Result<Option<ParityHeader>, FormatError> {
            take_header(&mut bytes, HEADER_MAGIC)?;
            let other = take::<16>(&mut bytes)?;
            let (number, released) = (take_u64(&mut bytes)?, take_u64(&mut bytes)?);
            let (key, flags) = (take::<16>(&mut bytes)?, take_u32(&mut bytes)?);
            let header = ParityHeader { number, released, key, unlogged: flags & UNLOGGED != 0 };
            Ok((other == *pool).then_some(header))
        };
        let found = parse().ok().flatten()?;
        (found.encode(pool) == page).then_some(found)
    }
}

/// What an entry changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParityEntry {
    /// See [`ParityHeader::key`].
    pub key: [u8; 16],
    /// That of the entry before it, plus one.
    pub number: u64,
    /// The stripe's row in the set.
    pub row: u64,
    /// Where in the strips, in bytes.
    pub within: u32,
    /// How many bytes of each: whole blocks, at most [`ENTRY_LEN_MAX`].
    pub len: u32,
    /// The members of the set whose bytes follow, by place: bits, the lowest first.
    pub places: u32,
}

impl ParityEntry {
    /// How many pages it has, the first one included.
    #[must_use]
    pub fn pages(&self) -> u32 {
        1 + (self.places.count_ones() * self.len).div_ceil(4096)
    }

    /// The bytes behind the first page.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.places.count_ones() as usize * self.len as usize
    }

    /// The first page, for this payload.
    #[must_use]
    pub fn encode(&self, pool: &Uuid, payload_crc: u32) -> Vec<u8> {
        let mut out = Vec::with_capacity(PAGE_BYTES);
        put_header(&mut out, ENTRY_MAGIC);
        out.extend_from_slice(pool);
        out.extend_from_slice(&self.key);
        put_u64(&mut out, self.number);
        put_u64(&mut out, self.row);
        for word in [self.within, self.len, self.places, payload_crc] {
            put_u32(&mut out, word);
        }
        fill_page(&mut out);
        seal(&mut out);
        out
    }

    /// Whether an entry of this opening begins with this page, torn or not.
    #[must_use]
    pub fn is_begun(page: &[u8], pool: &Uuid, key: &[u8; 16]) -> bool {
        page.len() == PAGE_BYTES && page[..8] == *ENTRY_MAGIC && page[16..32] == *pool && page[32..48] == *key
    }

    /// The entry that begins with this page, and the CRC of its payload; `None`: there is none, or it is torn, or of another opening.
    #[must_use]
    pub fn decode(page: &[u8], pool: &Uuid, key: &[u8; 16]) -> Option<(ParityEntry, u32)> {
        if page.len() != PAGE_BYTES || page[..8] != *ENTRY_MAGIC || !is_sealed(page) {
            return None;
        }
        let mut bytes = page;
        let mut parse = || -> Result<Option<(ParityEntry, u32)>, FormatError> {
            take_header(&mut bytes, ENTRY_MAGIC)?;
            let is_ours = take::<16>(&mut bytes)? == *pool && take::<16>(&mut bytes)? == *key;
            let (number, row) = (take_u64(&mut bytes)?, take_u64(&mut bytes)?);
            let (within, len, places) = (take_u32(&mut bytes)?, take_u32(&mut bytes)?, take_u32(&mut bytes)?);
            let entry = ParityEntry { key: *key, number, row, within, len, places };
            let is_possible = len > 0 && len <= ENTRY_LEN_MAX && len.is_multiple_of(512) && places != 0;
            Ok((is_ours && is_possible).then_some((entry, take_u32(&mut bytes)?)))
        };
        let (found, crc) = parse().ok().flatten()?;
        (found.encode(pool, crc) == page).then_some((found, crc))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: Uuid = [7; 16];

    fn entry() -> ParityEntry {
        ParityEntry { key: [9; 16], number: 5, row: 1 << 40, within: 4096, len: 512, places: 0b1011 }
    }

    #[test]
    fn a_header_and_an_entry_come_back_as_they_were() {
        let header = ParityHeader { number: 3, released: 17, key: [9; 16], unlogged: true };
        assert_eq!(ParityHeader::decode(&header.encode(&POOL), &POOL), Some(header));
        assert_eq!(ParityHeader::decode(&header.encode(&POOL), &[8; 16]), None);
        let page = entry().encode(&POOL, 77);
        assert_eq!(ParityEntry::decode(&page, &POOL, &[9; 16]), Some((entry(), 77)));
        assert_eq!(ParityEntry::decode(&page, &POOL, &[1; 16]), None, "of another opening");
        assert_eq!(ParityEntry::decode(&page, &[8; 16], &[9; 16]), None, "of another pool");
        assert_eq!((entry().pages(), entry().payload_bytes()), (2, 1536));
    }

    #[test]
    fn whatever_bit_is_wrong_it_is_no_header_and_no_entry() {
        let header = ParityHeader { number: 3, released: 17, key: [9; 16], unlogged: true };
        for (page, is_entry) in [(header.encode(&POOL), false), (entry().encode(&POOL, 77), true)] {
            for bit in 0..PAGE_BYTES * 8 {
                let mut other = page.clone();
                other[bit / 8] ^= 1 << (bit % 8);
                match is_entry {
                    true => assert_eq!(ParityEntry::decode(&other, &POOL, &[9; 16]), None),
                    false => assert_eq!(ParityHeader::decode(&other, &POOL), None),
                }
            }
        }
    }

    #[test]
    fn an_entry_that_cannot_be_is_none() {
        for entry in [
            ParityEntry { len: 0, ..entry() },
            ParityEntry { len: ENTRY_LEN_MAX + 512, ..entry() },
            ParityEntry { len: 100, ..entry() },
            ParityEntry { places: 0, ..entry() },
        ] {
            assert_eq!(ParityEntry::decode(&entry.encode(&POOL, 1), &POOL, &[9; 16]), None, "{entry:?}");
        }
    }
}
