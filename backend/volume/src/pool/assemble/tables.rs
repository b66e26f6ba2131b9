//! The tables as the members have them: the newest root, what it points to, and the log behind it. Each page from whoever has it whole.

use super::found::Found;
use crate::format::{self, Layout, PAGE_BYTES, Record, Root, Superblock};
use crate::pool::bounce::Bounce;
use crate::pool::lanes::{Lanes, Leaf};
use crate::pool::owner::Log;
use crate::pool::wait::all;
use crate::pool::{PoolError, coverage};
use crate::raid::Array;
use crate::thin::{Loader, Metadata, Thin};
use std::rc::Rc;

/// What is read of a log at a time.
const LOG_READ_BYTES: u64 = 4 << 20;
/// Pages that are read at a time.
const PAGES_AT_A_TIME: usize = 64;

/// The tables as the members have them.
pub(super) struct Tables {
    pub(super) meta: Metadata,
    /// The next record's number.
    pub(super) seq: u64,
    pub(super) log: Log,
    pub(super) pages_read: u64,
    pub(super) replayed: u64,
    /// Pages that somebody had not whole.
    pub(super) bad_pages: u64,
}

pub(super) fn corrupt(book: &Superblock, what: &str) -> PoolError {
    PoolError::Failed(format!("pool {}: {what}", book.name))
}

pub(super) async fn read_tables(lanes: &Rc<Lanes>, found: &Found) -> Result<Tables, PoolError> {
    let book = &found.book;
    let from = found.with_tables();
    let layout = book.layout;
    let mut root: Option<Root> = None;
    for leaf in &from {
        for slot in [0, 1] {
            if let Ok(page) = lanes.read_bytes(leaf, layout.page_offset(slot), PAGE_BYTES).await
                && let Some(other) = Root::decode(page.bytes(0, PAGE_BYTES), &book.pool_uuid)
                && root.as_ref().is_none_or(|root| root.number < other.number)
            {
                root = Some(other);
            }
        }
    }
    let root = root.ok_or_else(|| corrupt(book, "no member has a root of the tables that is whole"))?;
    let thin =
        Thin { extents: found.array.extents(), extent_bytes: book.extent_bytes, unit_bytes: book.unit_bytes };
    if root.extents > thin.extents {
        return Err(corrupt(book, "its tables name more extents than its members have"));
    }
    if root.log_position > layout.log_bytes {
        return Err(corrupt(book, "its root names a place beyond the log"));
    }
    let mut loader = Loader::new(thin, layout.metadata_pages, &root);
    let (mut pages_read, mut bad_pages) = (0, 0);
    loop {
        let wanted = loader.wanted(PAGES_AT_A_TIME);
        if wanted.is_empty() {
            break;
        }
        let reads = wanted.iter().map(|page| async move {
            (*page, from_first(lanes, &from_leaves(found), layout.page_offset(*page)).await)
        });
        for (page, bytes) in all(reads).await {
            pages_read += 1;
            let (failed, first) =
                bytes.ok_or_else(|| corrupt(book, &format!("page {page} of its tables cannot be read")))?;
            bad_pages += failed;
            let Err(mut what) = loader.give(page, first.bytes(0, PAGE_BYTES)) else { continue };
            bad_pages += 1;
            let mut is_good = false;
            for leaf in &from {
                if let Ok(bytes) = lanes.read_bytes(leaf, layout.page_offset(page), PAGE_BYTES).await {
                    match loader.give(page, bytes.bytes(0, PAGE_BYTES)) {
                        Ok(()) => {
                            is_good = true;
                            break;
                        }
                        Err(other) => what = other,
                    }
                }
            }
            if !is_good {
                return Err(corrupt(book, &what));
            }
        }
    }
    let mut meta = loader.finish().map_err(|what| corrupt(book, &what))?;
    let (seq, log, replayed) = replay(lanes, found, &from, &root, &mut meta).await?;
    Ok(Tables { meta, seq, log, pages_read, replayed, bad_pages })
}

fn from_leaves(found: &Found) -> Vec<Leaf> {
    found.with_tables()
}

/// A page from the first who can be read, and how many could not.
async fn from_first(lanes: &Rc<Lanes>, from: &[Leaf], offset: u64) -> Option<(u64, Rc<Bounce>)> {
    for (failed, leaf) in (0..).zip(from) {
        if let Ok(bytes) = lanes.read_bytes(leaf, offset, PAGE_BYTES).await {
            return Some((failed, bytes));
        }
    }
    None
}

async fn read_log(lanes: &Rc<Lanes>, leaf: &Leaf, layout: Layout) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut at = 0;
    while at < layout.log_bytes {
        let len = LOG_READ_BYTES.min(layout.log_bytes - at);
        let size = usize::try_from(len).ok()?;
        let part = lanes.read_bytes(leaf, layout.log_offset() + at, size).await.ok()?;
        bytes.extend_from_slice(part.bytes(0, size));
        at += len;
    }
    Some(bytes)
}

/// A pool grows after its superblocks: what says otherwise is none of ours, and would name places that are not there.
pub(super) fn is_within(record: &Record, array: &Array) -> bool {
    !matches!(record, Record::Grow { extents } if *extents > array.extents())
}

/// Applies the log behind a root: from whoever has the next batch whole.
async fn replay(
    lanes: &Rc<Lanes>,
    found: &Found,
    from: &[Leaf],
    root: &Root,
    meta: &mut Metadata,
) -> Result<(u64, Log, u64), PoolError> {
    let (book, layout) = (&found.book, found.book.layout);
    let mut logs = Vec::new();
    for leaf in from {
        logs.extend(read_log(lanes, leaf, layout).await);
    }
    if logs.is_empty() {
        return Err(corrupt(book, "no member's log can be read"));
    }
    let mut log = Log { position: root.log_position, batch: root.log_batch, head: 0, tail: 0 };
    let (mut seq, mut replayed) = (root.record_seq, 0);
    loop {
        let places = [log.position, 0];
        let next = places.iter().find_map(|place| {
            let at = usize::try_from(*place).ok()?;
            logs.iter().find_map(|bytes| {
                Some((*place, format::decode_batch(bytes.get(at..)?, &book.pool_uuid, log.batch)?))
            })
        });
        let Some((place, batch)) = next else { break };
        let batch = batch.map_err(|error| corrupt(book, &format!("its log at {place}: {}", error.0)))?;
        for (number, record) in (batch.first_seq..).zip(&batch.records) {
            if number > seq {
                return Err(corrupt(book, &format!("its log at {place} lacks records before {number}")));
            }
            if number == seq {
                if !is_within(record, &found.array) {
                    return Err(corrupt(
                        book,
                        &format!("its log at {place} names more extents than its members have"),
                    ));
                }
                meta.apply(record).map_err(|what| corrupt(book, &format!("its log at {place}: {what}")))?;
                meta.settle();
                seq += 1;
                replayed += 1;
            }
        }
        if place != log.position {
            log.head += layout.log_bytes - log.position;
        }
        log.head += batch.len_bytes;
        log.position = place + batch.len_bytes;
        log.batch += 1;
    }
    if replayed > 0 {
        coverage::count(coverage::Event::LogReplayed);
    }
    Ok((seq, log, replayed))
}

/// The marks of regions, from all who have them: marked is what anybody says is.
pub(super) async fn read_intents(lanes: &Rc<Lanes>, found: &Found) -> Vec<Option<Vec<u64>>> {
    let layout = found.book.layout;
    let from = found.with_tables();
    let mut pages = Vec::new();
    for page in 0..layout.intent_pages {
        let offset = layout.intents_offset() + u64::from(page) * PAGE_BYTES as u64;
        let mut all = Some(vec![0u64; 504]);
        for leaf in &from {
            let words = match lanes.read_bytes(leaf, offset, PAGE_BYTES).await {
                Ok(bytes) => format::decode_intents(bytes.bytes(0, PAGE_BYTES), &found.book.pool_uuid, page),
                Err(_) => None,
            };
            all = all
                .zip(words)
                .map(|(all, words)| all.iter().zip(&words).map(|(one, other)| one | other).collect());
        }
        pages.push(all);
    }
    pages
}
