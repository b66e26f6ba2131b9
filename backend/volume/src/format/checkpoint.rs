//! The checkpoint: all mappings as a tree of pages, of which none is ever changed in place.
//!
//! ```text
//!   page 0 or 1: root ──► volumes: a chain of pages, each volume with its directories      (volumes.rs)
//!                            └──► directory: 512 pointers, a page each
//!                                    └──► chunk: 448 entries
//!                                           └──► up to 6 pages of 84 partials: entries that are not valid throughout
//! ```
//!
//! Invariants:
//! - A pointer carries the CRC-32C of the whole page that it points to. Only a root has its own.
//! - Volumes share what has not changed: two pointers may be the same.

use super::bytes::{
    fill_page, is_sealed, page_of, put_bits, put_header, put_pointer, put_u16, put_u32, put_u64, seal, take,
    take_bits, take_header, take_number, take_pointer, take_reserved, take_u16, take_u32, take_u64, wrong,
};
use super::{FormatError, NONE, PAGE_BYTES, Uuid};

pub use super::volumes::{VolumeRecord, VolumesDecoder, encode_volumes};

/// Entries of a chunk.
pub const CHUNK_ENTRIES: usize = 448;
/// Partials of a page: 48 bytes each, behind 64.
pub const PARTIALS_PER_PAGE: usize = 84;
/// Pages of partials of a chunk: 6 * 84 is more than 448.
pub const PARTIAL_PAGES: usize = 6;
/// Pointers of a directory.
pub const DIR_POINTERS: usize = 512;

const ROOT_MAGIC: &[u8; 8] = b"HAWSERRT";
const CHUNK_MAGIC: &[u8; 8] = b"HAWSERCH";
const PARTIALS_MAGIC: &[u8; 8] = b"HAWSERPT";
const CHUNK_HEADER_BYTES: usize = 512;
const PARTIALS_HEADER_BYTES: usize = 64;
const PARTIAL_BYTES: usize = 48;
const _: () = assert!(CHUNK_HEADER_BYTES + CHUNK_ENTRIES * 8 == PAGE_BYTES);
const _: () = assert!(PARTIALS_HEADER_BYTES + PARTIALS_PER_PAGE * PARTIAL_BYTES == PAGE_BYTES);
const _: () = assert!(PARTIAL_PAGES * PARTIALS_PER_PAGE >= CHUNK_ENTRIES && DIR_POINTERS * 8 == PAGE_BYTES);

/// Where a page is among the metadata pages, and what its CRC is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagePtr {
    /// The page, or [`NONE`].
    pub page: u32,
    /// Of all its bytes: [`crc_of`].
    pub crc: u32,
}

impl PagePtr {
    /// To nothing.
    pub const NONE: PagePtr = PagePtr { page: NONE, crc: 0 };

    /// It points to nothing.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.page == NONE
    }
}

/// What a pointer to this page carries.
#[must_use]
pub fn crc_of(page: &[u8]) -> u32 {
    crc32c::crc32c(page)
}

/// Where a checkpoint begins. It stands in metadata page `number % 2`, so that the one before it stays whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// The pool.
    pub pool: Uuid,
    /// One more than the checkpoint before it had; the higher one counts.
    pub number: u64,
    /// All records before this one are in it.
    pub record_seq: u64,
    /// Where the next batch stands in the log area: here, or at 0 if it did not fit here.
    pub log_position: u64,
    /// The number of that batch.
    pub log_batch: u64,
    /// The pool's generation, which snapshots raise.
    pub generation: u32,
    /// The number of the next volume that is made.
    pub next_volume: u32,
    /// How many extents the pool has.
    pub extents: u32,
    /// The first page of the volumes; none when there is no volume.
    pub volumes: PagePtr,
    /// How many there are.
    pub volume_count: u32,
}

impl Root {
    /// The page.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(PAGE_BYTES);
        put_header(&mut out, ROOT_MAGIC);
        out.extend_from_slice(&self.pool);
        for long in [self.number, self.record_seq, self.log_position, self.log_batch] {
            put_u64(&mut out, long);
        }
        for word in [self.generation, self.next_volume, self.extents, self.volume_count] {
            put_u32(&mut out, word);
        }
        put_pointer(&mut out, self.volumes);
        fill_page(&mut out);
        seal(&mut out);
        out
    }

    /// The root in a page. `None`: torn or not ours.
    #[must_use]
    pub fn decode(bytes: &[u8], pool: &Uuid) -> Option<Root> {
        if bytes.len() != PAGE_BYTES || !is_sealed(bytes) {
            return None;
        }
        Root::parse(bytes).ok().filter(|root| root.pool == *pool)
    }

    fn parse(mut bytes: &[u8]) -> Result<Root, FormatError> {
        let b = &mut bytes;
        take_header(b, ROOT_MAGIC)?;
        let pool = take(b)?;
        let (number, record_seq, log_position, log_batch) =
            (take_u64(b)?, take_u64(b)?, take_u64(b)?, take_u64(b)?);
        let (generation, next_volume) = (take_u32(b)?, take_u32(b)?);
        let (extents, volume_count) =
            (take_number(b, "number of extents")?, take_number(b, "number of volumes")?);
        let volumes = take_pointer(b)?;
        take_reserved(b, PAGE_BYTES - 88)?;
        if volumes.is_none() != (volume_count == 0) || !log_position.is_multiple_of(512) {
            return Err(wrong!("a root with {volume_count} volumes at page {}", volumes.page));
        }
        Ok(Root {
            pool,
            number,
            record_seq,
            log_position,
            log_batch,
            generation,
            next_volume,
            extents,
            volumes,
            volume_count,
        })
    }
}

/// A piece of a volume's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkPage {
    /// The pages of its partials.
    pub partial_pages: [PagePtr; PARTIAL_PAGES],
    /// The entries; their meaning is not known here.
    pub entries: Box<[u64; CHUNK_ENTRIES]>,
}

impl ChunkPage {
    /// The page.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(PAGE_BYTES);
        put_header(&mut out, CHUNK_MAGIC);
        self.partial_pages.iter().for_each(|&pointer| put_pointer(&mut out, pointer));
        out.resize(CHUNK_HEADER_BYTES, 0);
        self.entries.iter().for_each(|&entry| put_u64(&mut out, entry));
        fill_page(&mut out);
        out
    }

    /// The chunk in a page whose CRC is right.
    ///
    /// # Errors
    /// It is no chunk.
    pub fn decode(bytes: &[u8]) -> Result<ChunkPage, FormatError> {
        ChunkPage::parse(bytes).map_err(|error| wrong!("a chunk: {error}"))
    }

    fn parse(bytes: &[u8]) -> Result<ChunkPage, FormatError> {
        let mut b = page_of(bytes)?;
        take_plain_header(&mut b, CHUNK_MAGIC)?;
        let mut partial_pages = [PagePtr::NONE; PARTIAL_PAGES];
        for pointer in &mut partial_pages {
            *pointer = take_pointer(&mut b)?;
        }
        take_reserved(&mut b, CHUNK_HEADER_BYTES - 16 - PARTIAL_PAGES * 8)?;
        let mut entries = Box::new([0; CHUNK_ENTRIES]);
        for entry in entries.iter_mut() {
            *entry = take_u64(&mut b)?;
        }
        Ok(ChunkPage { partial_pages, entries })
    }
}

/// An extent of which not all units are valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartialRecord {
    /// Which entry of the chunk.
    pub index: u16,
    /// Where it is in the pool.
    pub extent: u32,
    /// What is read where a unit is not valid: another extent, or [`NONE`] for zeroes.
    pub fallback: u32,
    /// The valid units.
    pub bits: [u64; 4],
}

/// A page of partials: at most 84, their indices growing.
#[must_use]
pub fn encode_partials(partials: &[PartialRecord]) -> Vec<u8> {
    assert!(partials.len() <= PARTIALS_PER_PAGE, "{} partials for one page", partials.len());
    assert!(partials.windows(2).all(|pair| pair[0].index < pair[1].index), "partials out of order");
    let mut out = Vec::with_capacity(PAGE_BYTES);
    put_header(&mut out, PARTIALS_MAGIC);
    put_u32(&mut out, u32::try_from(partials.len()).expect("at most 84"));
    out.resize(PARTIALS_HEADER_BYTES, 0);
    for partial in partials {
        put_u16(&mut out, partial.index);
        put_u16(&mut out, 0);
        put_u32(&mut out, partial.extent);
        put_u32(&mut out, partial.fallback);
        put_u32(&mut out, 0);
        put_bits(&mut out, &partial.bits);
    }
    fill_page(&mut out);
    out
}

/// The partials in a page whose CRC is right.
///
/// # Errors
/// It is no such page, or one of them cannot be.
pub fn decode_partials(bytes: &[u8]) -> Result<Vec<PartialRecord>, FormatError> {
    parse_partials(bytes).map_err(|error| wrong!("a page of partials: {error}"))
}

fn parse_partials(bytes: &[u8]) -> Result<Vec<PartialRecord>, FormatError> {
    let mut b = page_of(bytes)?;
    take_plain_header(&mut b, PARTIALS_MAGIC)?;
    let count = take_u32(&mut b)?;
    let count = usize::try_from(count).ok().filter(|&count| count <= PARTIALS_PER_PAGE);
    let count = count.ok_or_else(|| wrong!("more than {PARTIALS_PER_PAGE} partials"))?;
    take_reserved(&mut b, PARTIALS_HEADER_BYTES - 20)?;
    let mut partials: Vec<PartialRecord> = Vec::with_capacity(count);
    for _ in 0..count {
        let index = take_u16(&mut b)?;
        take_reserved(&mut b, 2)?;
        let (extent, fallback) = (take_number(&mut b, "extent")?, take_u32(&mut b)?);
        take_reserved(&mut b, 4)?;
        let is_next = partials.last().is_none_or(|last| last.index < index);
        if usize::from(index) >= CHUNK_ENTRIES || !is_next {
            return Err(wrong!("index {index} is out of order, or not in a chunk"));
        }
        partials.push(PartialRecord { index, extent, fallback, bits: take_bits(&mut b)? });
    }
    let rest = b.len();
    take_reserved(&mut b, rest)?;
    Ok(partials)
}

/// A directory: at most 512 pointers to chunks, then none.
#[must_use]
pub fn encode_dir(pointers: &[PagePtr]) -> Vec<u8> {
    assert!(pointers.len() <= DIR_POINTERS, "{} pointers for one directory", pointers.len());
    let mut out = Vec::with_capacity(PAGE_BYTES);
    pointers.iter().for_each(|&pointer| put_pointer(&mut out, pointer));
    (pointers.len()..DIR_POINTERS).for_each(|_| put_pointer(&mut out, PagePtr::NONE));
    out
}

/// The 512 pointers of a directory whose CRC is right.
///
/// # Errors
/// One of them cannot be.
pub fn decode_dir(bytes: &[u8]) -> Result<Vec<PagePtr>, FormatError> {
    let mut b = page_of(bytes).map_err(|error| wrong!("a directory: {error}"))?;
    let mut pointers = Vec::with_capacity(DIR_POINTERS);
    for index in 0..DIR_POINTERS {
        pointers.push(take_pointer(&mut b).map_err(|error| wrong!("a directory, {index}: {error}"))?);
    }
    Ok(pointers)
}

/// The header of a page that has no CRC of its own, so that those bytes are zero.
pub(super) fn take_plain_header(bytes: &mut &[u8], magic: &[u8; 8]) -> Result<(), FormatError> {
    let crc = bytes.get(12..16).is_some_and(|crc| crc == [0; 4]);
    take_header(bytes, magic)?;
    if crc { Ok(()) } else { Err(wrong!("a reserved field is not zero")) }
}
