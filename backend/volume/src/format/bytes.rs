//! Bytes in and out, for the codecs beside it.
//!
//! Invariant: taking never panics; what is too short is a [`FormatError`].
//!
//! All pages and batches begin alike:
//!
//! ```text
//!    0        8         12       16
//!    │ magic  │ version │ CRC-32C│ …      the CRC over all of it, with these four bytes as zero
//! ```

use super::{FormatError, NONE, PAGE_BYTES, PagePtr, Uuid, is_name};

/// Of everything, for now.
pub(super) const VERSION: u32 = 1;
/// Where the CRC stands.
const CRC: std::ops::Range<usize> = 12..16;

/// A [`FormatError`] from what would be printed.
macro_rules! wrong {
    ($($part:tt)*) => { crate::format::FormatError(format!($($part)*)) };
}
pub(super) use wrong;

pub(super) fn put_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_bits(out: &mut Vec<u8>, bits: &[u64; 4]) {
    bits.iter().for_each(|&word| put_u64(out, word));
}

pub(super) fn put_pointer(out: &mut Vec<u8>, pointer: PagePtr) {
    put_u32(out, pointer.page);
    put_u32(out, pointer.crc);
}

/// One byte of length, then the name.
pub(super) fn put_name(out: &mut Vec<u8>, name: &str) {
    assert!(is_name(name), "the name `{name}` was not checked");
    out.push(u8::try_from(name.len()).expect("at most 64"));
    out.extend_from_slice(name.as_bytes());
}

/// Magic, version, and room for the CRC.
pub(super) fn put_header(out: &mut Vec<u8>, magic: &[u8; 8]) {
    out.extend_from_slice(magic);
    put_u32(out, VERSION);
    put_u32(out, 0);
}

/// Fills up to a whole page.
pub(super) fn fill_page(out: &mut Vec<u8>) {
    assert!(out.len() <= PAGE_BYTES, "{} bytes for a page", out.len());
    out.resize(PAGE_BYTES, 0);
}

/// Of all bytes, with those of the CRC itself as zero.
fn sealing_crc(bytes: &[u8]) -> u32 {
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..CRC.start]), &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[CRC.end..])
}

/// Puts the CRC into its place.
pub(super) fn seal(bytes: &mut [u8]) {
    let crc = sealing_crc(bytes);
    bytes[CRC].copy_from_slice(&crc.to_le_bytes());
}

/// Whether the CRC in its place is right.
pub(super) fn is_sealed(bytes: &[u8]) -> bool {
    bytes.len() >= CRC.end && bytes[CRC] == sealing_crc(bytes).to_le_bytes()
}

/// Reads on from `bytes`.
pub(super) fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], FormatError> {
    let (head, rest) =
        bytes.split_first_chunk::<N>().ok_or_else(|| wrong!("it ends in the middle of a field"))?;
    *bytes = rest;
    Ok(*head)
}

pub(super) fn take_u8(bytes: &mut &[u8]) -> Result<u8, FormatError> {
    Ok(take::<1>(bytes)?[0])
}

pub(super) fn take_u16(bytes: &mut &[u8]) -> Result<u16, FormatError> {
    Ok(u16::from_le_bytes(take(bytes)?))
}

pub(super) fn take_u32(bytes: &mut &[u8]) -> Result<u32, FormatError> {
    Ok(u32::from_le_bytes(take(bytes)?))
}

pub(super) fn take_u64(bytes: &mut &[u8]) -> Result<u64, FormatError> {
    Ok(u64::from_le_bytes(take(bytes)?))
}

pub(super) fn take_uuid(bytes: &mut &[u8]) -> Result<Uuid, FormatError> {
    take(bytes)
}

pub(super) fn take_bits(bytes: &mut &[u8]) -> Result<[u64; 4], FormatError> {
    Ok([take_u64(bytes)?, take_u64(bytes)?, take_u64(bytes)?, take_u64(bytes)?])
}

/// A number of which [`NONE`] is not one.
pub(super) fn take_number(bytes: &mut &[u8], what: &str) -> Result<u32, FormatError> {
    match take_u32(bytes)? {
        NONE => Err(wrong!("there is no {what}")),
        number => Ok(number),
    }
}

/// A pointer to a page that is no root, or none.
pub(super) fn take_pointer(bytes: &mut &[u8]) -> Result<PagePtr, FormatError> {
    let pointer = PagePtr { page: take_u32(bytes)?, crc: take_u32(bytes)? };
    if pointer.page < 2 || (pointer.is_none() && pointer != PagePtr::NONE) {
        return Err(wrong!("a pointer to page {} with CRC {:#x}", pointer.page, pointer.crc));
    }
    Ok(pointer)
}

pub(super) fn take_name(bytes: &mut &[u8]) -> Result<String, FormatError> {
    let len = usize::from(take_u8(bytes)?);
    let (name, rest) =
        bytes.split_at_checked(len).ok_or_else(|| wrong!("it ends in the middle of a name"))?;
    *bytes = rest;
    name_of(name)
}

/// The name that these bytes are.
pub(super) fn name_of(bytes: &[u8]) -> Result<String, FormatError> {
    match std::str::from_utf8(bytes) {
        Ok(name) if is_name(name) => Ok(name.to_owned()),
        _ => {
            Err(wrong!("a name of {} bytes that is none: {:?}", bytes.len(), String::from_utf8_lossy(bytes)))
        }
    }
}

/// Nothing but zeroes from here on.
pub(super) fn take_reserved(bytes: &mut &[u8], len: usize) -> Result<(), FormatError> {
    let (reserved, rest) =
        bytes.split_at_checked(len).ok_or_else(|| wrong!("it ends in a reserved field"))?;
    *bytes = rest;
    if reserved.iter().any(|&byte| byte != 0) {
        return Err(wrong!("a reserved field is not zero"));
    }
    Ok(())
}

/// Magic and version; the CRC is passed over.
pub(super) fn take_header(bytes: &mut &[u8], magic: &[u8; 8]) -> Result<(), FormatError> {
    if take::<8>(bytes)? != *magic {
        return Err(wrong!("it does not begin with {}", String::from_utf8_lossy(magic)));
    }
    let version = take_u32(bytes)?;
    if version != VERSION {
        return Err(wrong!("version {version}, and not {VERSION}"));
    }
    take::<4>(bytes)?;
    Ok(())
}

/// Exactly one page.
pub(super) fn page_of(bytes: &[u8]) -> Result<&[u8], FormatError> {
    if bytes.len() != PAGE_BYTES {
        return Err(wrong!("{} bytes, and not {PAGE_BYTES}", bytes.len()));
    }
    Ok(bytes)
}
