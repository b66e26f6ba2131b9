//! The log: batches of records, each durable as a whole or not there.
//!
//! ```text
//!    0       8         12    16     32       40          48      52              56        60         64
//!    │ magic │ version │ CRC │ pool │ number │ first_seq │ count │ records_bytes │ len_bytes │ reserved │ records │ zeroes │
//!                                                                                                          to whole blocks
//! ```
//!
//! The CRC is over all `len_bytes`. A batch is in one piece: what does not fit at the log's end stands at its beginning.
//!
//! Invariant: what is not the batch that is asked for is the end of the log, whatever it is, unless a later one is there: a
//! batch is written when the one before it is durable.

use super::bytes::{
    is_sealed, put_header, put_u32, put_u64, seal, take, take_header, take_reserved, take_u32, take_u64,
    wrong,
};
use super::{FormatError, Record, Uuid};

const MAGIC: &[u8; 8] = b"HAWSERLG";
const HEADER_BYTES: usize = 64;
/// Where `len_bytes` stands.
const LEN_BYTES: std::ops::Range<usize> = 56..60;

/// A batch as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Its number: one more than the one before it has.
    pub number: u64,
    /// The number of its first record; the others follow it.
    pub first_seq: u64,
    /// Its records.
    pub records: Vec<Record>,
    /// What it takes in the log, the zeroes to whole blocks included.
    pub len_bytes: u64,
}

/// How much of the log a batch takes whose records are `records_len` bytes.
#[must_use]
pub fn batch_len(records_len: usize, block_bytes: u32) -> u64 {
    ((HEADER_BYTES + records_len) as u64).next_multiple_of(u64::from(block_bytes))
}

/// A batch of `count` records, that are already `records`; padded with zeroes to whole blocks.
#[must_use]
pub fn encode_batch(
    pool: &Uuid,
    number: u64,
    first_seq: u64,
    count: u32,
    records: &[u8],
    block_bytes: u32,
) -> Vec<u8> {
    let len =
        u32::try_from(batch_len(records.len(), block_bytes)).expect("a batch is far smaller than a log");
    let mut out = Vec::with_capacity(len as usize);
    put_header(&mut out, MAGIC);
    out.extend_from_slice(pool);
    put_u64(&mut out, number);
    put_u64(&mut out, first_seq);
    put_u32(&mut out, count);
    put_u32(&mut out, u32::try_from(records.len()).expect("less than the batch"));
    put_u32(&mut out, len);
    put_u32(&mut out, 0);
    out.extend_from_slice(records);
    out.resize(len as usize, 0);
    seal(&mut out);
    out
}

/// What stands at the beginning of `bytes`: `None` when it is not the batch of this number, which is how a log ends. An error
/// when it is that batch, whole, and makes no sense all the same.
#[must_use]
pub fn decode_batch(bytes: &[u8], pool: &Uuid, number: u64) -> Option<Result<Batch, FormatError>> {
    let header = bytes.get(..HEADER_BYTES)?;
    let is_it = header[..8] == *MAGIC && header[16..32] == *pool && header[32..40] == number.to_le_bytes();
    if !is_it {
        return None;
    }
    let len = u32::from_le_bytes(header[LEN_BYTES].try_into().ok()?);
    let batch = bytes.get(..usize::try_from(len).ok()?).filter(|batch| batch.len() >= HEADER_BYTES)?;
    is_sealed(batch)
        .then(|| parse(batch, number).map_err(|error| wrong!("batch {number} of the log: {error}")))
}

/// The number of the whole batch that begins here, if it is this one or a later one.
///
/// Records are what guests and people ask for. To make some that look like a batch takes the pool's UUID, which no guest is told.
#[must_use]
pub fn number_from(bytes: &[u8], pool: &Uuid, number: u64) -> Option<u64> {
    let header = bytes.get(..HEADER_BYTES)?;
    let found = u64::from_le_bytes(header[32..40].try_into().ok()?);
    // Cheap, before all of it is looked at: old ones have lower numbers.
    let is_whole = || matches!(decode_batch(bytes, pool, found), Some(Ok(_)));
    (found >= number && is_whole()).then_some(found)
}

/// All of a batch whose CRC is right.
fn parse(mut bytes: &[u8], number: u64) -> Result<Batch, FormatError> {
    let len_bytes = bytes.len() as u64;
    take_header(&mut bytes, MAGIC)?;
    take::<24>(&mut bytes)?;
    let first_seq = take_u64(&mut bytes)?;
    let count = take_u32(&mut bytes)?;
    let records_bytes = take_u32(&mut bytes)?;
    take_u32(&mut bytes)?;
    take_reserved(&mut bytes, 4)?;
    if first_seq.checked_add(u64::from(count)).is_none() {
        return Err(wrong!("{count} records from number {first_seq} on"));
    }
    let (mut records_left, mut padding) = usize::try_from(records_bytes)
        .ok()
        .and_then(|len| bytes.split_at_checked(len))
        .ok_or_else(|| wrong!("{records_bytes} bytes of records in {len_bytes}"))?;
    let padding_len = padding.len();
    take_reserved(&mut padding, padding_len)?;
    if !len_bytes.is_multiple_of(512) || padding_len >= 4096 {
        return Err(wrong!("{len_bytes} bytes are not whole blocks around {records_bytes} of records"));
    }
    let mut records = Vec::new();
    for index in 0..count {
        let record = Record::decode(&mut records_left)
            .map_err(|error| wrong!("record {index} of {count}: {error}"))?;
        records.push(record);
    }
    if !records_left.is_empty() {
        return Err(wrong!("{} bytes behind its {count} records", records_left.len()));
    }
    Ok(Batch { number, first_seq, records, len_bytes })
}
