//! The entries of a parity log, as members have them.

use crate::format::parity_log::HEADER_PAGES;
use crate::format::{PAGE_BYTES, ParityEntry, ParityHeader, Uuid};
use crate::pool::lanes::{Lanes, Leaf};
use crate::raid::Set;
use hawser_block::Status;
use std::collections::BTreeMap;
use std::rc::Rc;

/// What is read of a log at a time.
const READ_BYTES: usize = 4 << 20;

/// Entries and what they say, by their numbers.
pub(crate) type Entries = BTreeMap<u64, (ParityEntry, Vec<u8>)>;

/// Adds what one member has of those that the header does not call released; says what is wrong there.
pub(crate) async fn read_entries(
    lanes: &Rc<Lanes>,
    leaf: &Leaf,
    (set, pool): (&Set, &Uuid),
    header: &ParityHeader,
    entries: &mut Entries,
    wrong: &mut Vec<String>,
) -> Result<(), Status> {
    let parity = set.parity().expect("only of sets with parity");
    let len = parity.ring().pages() as usize * PAGE_BYTES;
    let first = parity.log_offset + u64::from(HEADER_PAGES) * PAGE_BYTES as u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let part = READ_BYTES.min(len - bytes.len());
        let read = lanes.read_bytes(leaf, first + bytes.len() as u64, part).await?;
        bytes.extend_from_slice(read.bytes(0, part));
    }
    for at in (0..len).step_by(PAGE_BYTES) {
        let page = &bytes[at..at + PAGE_BYTES];
        let Some((entry, crc)) = ParityEntry::decode(page, pool, &header.key) else {
            if ParityEntry::is_begun(page, pool, &header.key) {
                wrong.push(format!("has an entry at page {} that is torn", at / PAGE_BYTES));
            }
            continue;
        };
        if entry.number < header.released || entries.contains_key(&entry.number) {
            continue;
        }
        let payload = bytes.get(at + PAGE_BYTES..at + PAGE_BYTES + entry.payload_bytes());
        // One whose payload is torn was not begun in place.
        let Some(payload) = payload.filter(|payload| crc32c::crc32c(payload) == crc) else { continue };
        if is_possible(set, &entry) {
            entries.insert(entry.number, (entry, payload.to_vec()));
        } else {
            wrong.push(format!("has entry {} of stripe {}, which cannot be", entry.number, entry.row));
        }
    }
    Ok(())
}

/// Only what lies within the members' data.
fn is_possible(set: &Set, entry: &ParityEntry) -> bool {
    let strip = u64::from(set.strip_bytes());
    let end = u64::from(entry.within) + u64::from(entry.len);
    let rows = set.member_rows_bytes() / strip;
    end <= strip && entry.row < rows && u64::from(entry.places) < 1 << set.members()
}
