//! The tail: records that are in no durable batch yet, in memory that outlives the process and not the power.
//!
//! ```text
//!   header  0 magic 8 │ version 4 │ CRC 4 │ pool 16 │ epoch 8 │ caches 4 │ untold 4   48 bytes
//!   cache   member 16 │ what named its volatile cache when it was known to be whole 16
//!   cache   …
//!   untold  volume 4: something of it was lost, which none of its FLUSHes has told
//!   untold  …                                                                the CRC over all of these
//!   entry   0 len 4 │ CRC-32C 4 │ seq 8 │ record, len bytes          the CRC over len, seq and record
//!   entry   …
//! ```
//!
//! Invariants:
//! - A tail counts only for the opening that wrote it: same pool, same epoch.
//! - Entries have growing numbers. The first that is torn, or is none, ends it: the process died while it wrote it, before
//!   anybody was told of it.

use super::bytes::{is_sealed, put_header, put_u32, put_u64, seal, take, take_header, take_u32, take_u64};
use super::{FormatError, Record, Uuid};

const MAGIC: &[u8; 8] = b"HAWSERTL";
const HEADER_BYTES: usize = 48;
const CACHE_BYTES: usize = 32;
const UNTOLD_BYTES: usize = 4;
/// What stands before the record in an entry.
const ENTRY_HEADER_BYTES: usize = 16;
/// The most that an entry of a mapping has; volumes and snapshots have more.
const ENTRY_BYTES: usize = 80;

/// What a tail says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TailContent {
    /// The opening that it is of.
    pub epoch: u64,
    /// Members, and what named their volatile caches when they were last known to be whole.
    pub caches: Vec<(Uuid, [u8; 16])>,
    /// Volumes that have lost something with a cache, and whose users have not been told.
    pub untold: Vec<u32>,
    /// Records, with their numbers.
    pub records: Vec<(u64, Record)>,
}

/// How a tail begins.
#[must_use]
pub fn encode_tail_header(pool: &Uuid, epoch: u64, caches: &[(Uuid, [u8; 16])], untold: &[u32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + caches.len() * CACHE_BYTES + untold.len() * UNTOLD_BYTES);
    put_header(&mut out, MAGIC);
    out.extend_from_slice(pool);
    put_u64(&mut out, epoch);
    put_u32(&mut out, u32::try_from(caches.len()).expect("one for each member"));
    put_u32(&mut out, u32::try_from(untold.len()).expect("at most one for each volume"));
    for (member, cache) in caches {
        out.extend_from_slice(member);
        out.extend_from_slice(cache);
    }
    untold.iter().for_each(|volume| put_u32(&mut out, *volume));
    seal(&mut out);
    out
}

/// Adds the entry of a record to `out`.
pub fn encode_tail_entry(seq: u64, record: &Record, out: &mut Vec<u8>) {
    let start = out.len();
    out.reserve(ENTRY_BYTES);
    put_u64(out, 0);
    put_u64(out, seq);
    record.encode(out);
    let len = u32::try_from(out.len() - start - ENTRY_HEADER_BYTES).expect("records are small").to_le_bytes();
    let crc = entry_crc(len, &out[start + 8..]).to_le_bytes();
    out[start..start + 4].copy_from_slice(&len);
    out[start + 4..start + 8].copy_from_slice(&crc);
}

/// The record of one entry, as it is in the log.
#[must_use]
pub fn record_of_tail_entry(entry: &[u8]) -> &[u8] {
    &entry[ENTRY_HEADER_BYTES..]
}

/// What a tail says; `None`: it is no tail of this pool.
#[must_use]
pub fn decode_tail(bytes: &[u8], pool: &Uuid) -> Option<TailContent> {
    let (fixed, _) = bytes.split_at_checked(HEADER_BYTES)?;
    let count_at = |at: usize| usize::try_from(take_u32(&mut &fixed[at..at + 4]).ok()?).ok();
    let caches_bytes = count_at(40)?.checked_mul(CACHE_BYTES)?;
    let untold_bytes = count_at(44)?.checked_mul(UNTOLD_BYTES)?;
    let header_bytes = HEADER_BYTES.checked_add(caches_bytes)?.checked_add(untold_bytes)?;
    let (header, mut rest) = bytes.split_at_checked(header_bytes)?;
    if !is_sealed(header) {
        return None;
    }
    let mut header = header;
    take_header(&mut header, MAGIC).ok()?;
    if take::<16>(&mut header).ok()? != *pool {
        return None;
    }
    let epoch = take_u64(&mut header).ok()?;
    take::<8>(&mut header).ok()?;
    let (caches, untold) = header.split_at(caches_bytes);
    let caches = caches.chunks_exact(CACHE_BYTES).map(|mut cache| {
        let member = take::<16>(&mut cache).ok()?;
        Some((member, take::<16>(&mut cache).ok()?))
    });
    let caches = caches.collect::<Option<Vec<_>>>()?;
    let untold = untold.chunks_exact(UNTOLD_BYTES).map(|mut volume| take_u32(&mut volume).ok());
    let untold = untold.collect::<Option<Vec<_>>>()?;
    let mut records: Vec<(u64, Record)> = Vec::new();
    while let Ok(Some((seq, record))) = take_entry(&mut rest) {
        if records.last().is_some_and(|&(last, _)| seq <= last) {
            break;
        }
        records.push((seq, record));
    }
    Some(TailContent { epoch, caches, untold, records })
}

/// `None`: it is torn, or none.
fn take_entry(bytes: &mut &[u8]) -> Result<Option<(u64, Record)>, FormatError> {
    let len = take::<4>(bytes)?;
    let crc = take_u32(bytes)?;
    let body_len = usize::try_from(u32::from_le_bytes(len)).ok().and_then(|len| len.checked_add(8));
    let Some((mut body, rest)) = body_len.and_then(|len| bytes.split_at_checked(len)) else {
        return Ok(None);
    };
    if crc != entry_crc(len, body) {
        return Ok(None);
    }
    *bytes = rest;
    let seq = take_u64(&mut body)?;
    let record = Record::decode(&mut body)?;
    Ok(body.is_empty().then_some((seq, record)))
}

fn entry_crc(len: [u8; 4], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&len), body)
}
