//! The list of volumes in a checkpoint: a chain of pages, and a decoder that asks for one page after the other.
//!
//! ```text
//!   page    0 magic 8 │ version 4 │ reserved 4 │ next pointer 8 │ used 4 │ reserved 4 │ 32: used bytes of records │ zeroes
//!   record  id 4 │ UUID 16 │ name 1 + n │ size_bytes 8 │ shared_generation 4 │ flags 1: 1 snapshot │ origin 4
//!           │ directories 4 │ that many pointers of 8
//! ```
//!
//! Records follow each other and cross pages. A page has the CRC of the next in it, so they are made from the last to the first.
//!
//! Invariant: no page comes twice, so that a chain ends.

use super::bytes::{
    fill_page, page_of, put_header, put_name, put_pointer, put_u32, put_u64, take_name, take_number,
    take_pointer, take_reserved, take_u8, take_u32, take_u64, take_uuid, wrong,
};
use super::checkpoint::{PagePtr, crc_of, take_plain_header};
use super::record::VOLUME_BYTES_MAX;
use super::{FormatError, NONE, PAGE_BYTES, Uuid};
use std::collections::BTreeSet;

const MAGIC: &[u8; 8] = b"HAWSERVL";
const HEADER_BYTES: usize = 32;
const PAYLOAD_BYTES: usize = PAGE_BYTES - HEADER_BYTES;
const SNAPSHOT: u8 = 1;

/// A volume, as a checkpoint has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRecord {
    /// Its number.
    pub id: u32,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its name in the pool.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// What was born in this generation or before may be somebody else's too.
    pub shared_generation: u32,
    /// It cannot be written.
    pub is_snapshot: bool,
    /// The volume or snapshot that it was made of; [`NONE`].
    pub origin: u32,
    /// Its directories, in order; none where all is empty.
    pub dirs: Vec<PagePtr>,
}

impl VolumeRecord {
    fn encode(&self, out: &mut Vec<u8>) {
        put_u32(out, self.id);
        out.extend_from_slice(&self.uuid);
        put_name(out, &self.name);
        put_u64(out, self.size_bytes);
        put_u32(out, self.shared_generation);
        out.push(if self.is_snapshot { SNAPSHOT } else { 0 });
        put_u32(out, self.origin);
        put_u32(out, u32::try_from(self.dirs.len()).expect("indices have 32 bits"));
        self.dirs.iter().for_each(|&pointer| put_pointer(out, pointer));
    }

    fn decode(b: &mut &[u8]) -> Result<VolumeRecord, FormatError> {
        let id = take_number(b, "volume")?;
        let (uuid, name, size_bytes) = (take_uuid(b)?, take_name(b)?, take_u64(b)?);
        let (shared_generation, flags, origin) = (take_u32(b)?, take_u8(b)?, take_u32(b)?);
        let dirs_len = take_u32(b)?;
        if size_bytes > VOLUME_BYTES_MAX || flags & !SNAPSHOT != 0 || origin == id {
            return Err(wrong!("volume `{name}`: {size_bytes} bytes, flags {flags:#x}, origin {origin}"));
        }
        // No capacity from `dirs_len`, which may be anything: bytes run out first.
        let mut dirs = Vec::new();
        for _ in 0..dirs_len {
            dirs.push(take_pointer(b).map_err(|error| wrong!("volume `{name}`: {error}"))?);
        }
        let is_snapshot = flags & SNAPSHOT != 0;
        Ok(VolumeRecord { id, uuid, name, size_bytes, shared_generation, is_snapshot, origin, dirs })
    }
}

/// Pages, each with its number.
pub type Pages = Vec<(u32, Vec<u8>)>;

/// The pointer to the first page, and the pages, each with its number. `None` when `allocate` has no page any more; those that it
/// gave before are still the caller's. No volumes are no pages.
pub fn encode_volumes(
    volumes: &[VolumeRecord],
    allocate: &mut dyn FnMut() -> Option<u32>,
) -> Option<(PagePtr, Pages)> {
    let mut payload = Vec::new();
    volumes.iter().for_each(|volume| volume.encode(&mut payload));
    let mut next = PagePtr::NONE;
    let mut pages = Vec::new();
    for used in payload.chunks(PAYLOAD_BYTES).rev() {
        let page = allocate()?;
        let mut out = Vec::with_capacity(PAGE_BYTES);
        put_header(&mut out, MAGIC);
        put_pointer(&mut out, next);
        put_u32(&mut out, u32::try_from(used.len()).expect("less than a page"));
        put_u32(&mut out, 0);
        out.extend_from_slice(used);
        fill_page(&mut out);
        next = PagePtr { page, crc: crc_of(&out) };
        pages.push((page, out));
    }
    Some((next, pages))
}

/// Reads such a chain, without doing the reading: give it the page that it wants until it wants none.
#[derive(Debug)]
pub struct VolumesDecoder {
    next: PagePtr,
    pages: Vec<u32>,
    seen: BTreeSet<u32>,
    payload: Vec<u8>,
}

impl VolumesDecoder {
    /// From the root's pointer.
    #[must_use]
    pub fn new(head: PagePtr) -> VolumesDecoder {
        VolumesDecoder { next: head, pages: Vec::new(), seen: BTreeSet::new(), payload: Vec::new() }
    }

    /// The page that it needs next. That it is one of the metadata pages is for the caller to see.
    #[must_use]
    pub fn wanted(&self) -> Option<u32> {
        (!self.next.is_none()).then_some(self.next.page)
    }

    /// Takes that page.
    ///
    /// # Errors
    /// Its CRC is not the pointer's, or it is no page of volumes, or it was here before; it is wanted still.
    pub fn give(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        let wanted = self.next;
        let fault = |error: FormatError| wrong!("page {} of the volumes: {error}", wanted.page);
        if wanted.is_none() {
            return Err(wrong!("a page of volumes that nothing points to"));
        }
        if crc_of(bytes) != wanted.crc {
            return Err(fault(wrong!("its CRC is wrong")));
        }
        let (next, used) = parse_page(bytes).map_err(fault)?;
        if !self.seen.insert(wanted.page) {
            return Err(fault(wrong!("it comes twice")));
        }
        self.pages.push(wanted.page);
        self.payload.extend_from_slice(used);
        self.next = next;
        Ok(())
    }

    /// The pages that it took, in order.
    #[must_use]
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// The volumes.
    ///
    /// # Errors
    /// Pages are missing, a record cannot be, or two volumes have the same number or name.
    pub fn finish(self) -> Result<Vec<VolumeRecord>, FormatError> {
        if let Some(page) = self.wanted() {
            return Err(wrong!("page {page} of the volumes is missing"));
        }
        let mut bytes = self.payload.as_slice();
        let mut volumes = Vec::new();
        let (mut ids, mut names) = (BTreeSet::new(), BTreeSet::new());
        while !bytes.is_empty() {
            let volume = VolumeRecord::decode(&mut bytes)
                .map_err(|error| wrong!("record {} of the volumes: {error}", volumes.len()))?;
            if !ids.insert(volume.id) || !names.insert(volume.name.clone()) {
                return Err(wrong!("two volumes are number {} or `{}`", volume.id, volume.name));
            }
            volumes.push(volume);
        }
        Ok(volumes)
    }
}

/// The next pointer, and the bytes of records.
fn parse_page(bytes: &[u8]) -> Result<(PagePtr, &[u8]), FormatError> {
    let mut b = page_of(bytes)?;
    take_plain_header(&mut b, MAGIC)?;
    let next = take_pointer(&mut b)?;
    let used = take_u32(&mut b)?;
    take_reserved(&mut b, 4)?;
    let used_len = usize::try_from(used).ok().filter(|&used| used > 0);
    let (used, mut rest) = used_len
        .and_then(|len| b.split_at_checked(len))
        .ok_or_else(|| wrong!("{used} bytes of records in a page"))?;
    let rest_len = rest.len();
    // A page that is not the last is full: else one list could stand in many ways.
    if !next.is_none() && rest_len > 0 {
        return Err(wrong!("{} bytes of records, and it is not the last page", used.len()));
    }
    take_reserved(&mut rest, rest_len)?;
    Ok((next, used))
}

const _: () = assert!(NONE == u32::MAX && PAYLOAD_BYTES == 4064);
