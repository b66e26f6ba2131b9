//! The tables as the members have them: the newest root, what it points to, and the log behind it. Each page from whoever has it whole.

use super::found::Found;
use crate::format::{self, Layout, PAGE_BYTES, Record, Root, Superblock};
use crate::pool::bounce::Bounce;
use crate::pool::lanes::{Lanes, Leaf};
use crate::pool::owner::Log;
use crate::pool::wait::all;
use crate::pool::{PoolError, coverage};
use crate::raid::Array;
use crate::simulated::is_broken;
use crate::thin::{Loader, Metadata, Thin};
use std::rc::Rc;

/// What is read of a log at a time.
const LOG_READ_BYTES: u64 = 4 << 20;
/// No batch is longer: 1 MiB of records, the last of which may go beyond it, and its header.
const BATCH_BYTES_MAX: u64 = 2 << 20;
/// How far behind a batch the next whole one begins, if it is there: the log may have come round and end in the middle of the one between.
const NEXT_BYTES_MAX: u64 = 2 * BATCH_BYTES_MAX;
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
    read_tables_helped(lanes, found, &[], &mut Vec::new()).await
}

/// The same; pages that none of `found` has whole are taken from `helpers`. Names the pages that somebody had not whole, of those who were asked.
pub(super) async fn read_tables_helped(
    lanes: &Rc<Lanes>,
    found: &Found,
    helpers: &[Leaf],
    faults: &mut Vec<(Leaf, String)>,
) -> Result<Tables, PoolError> {
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
    let asked: Vec<Leaf> = from.iter().chain(helpers).cloned().collect();
    let mut loader = Loader::new(thin, layout.metadata_pages, &root);
    let (mut pages_read, mut bad_pages) = (0, 0);
    loop {
        let wanted = loader.wanted(PAGES_AT_A_TIME);
        if wanted.is_empty() {
            break;
        }
        let asked = asked.as_slice();
        let reads = wanted
            .iter()
            .map(|page| async move { (*page, from_first(lanes, asked, layout.page_offset(*page)).await) });
        for (page, bytes) in all(reads).await {
            pages_read += 1;
            let (failed, first) =
                bytes.ok_or_else(|| corrupt(book, &format!("page {page} of its tables cannot be read")))?;
            bad_pages += failed as u64;
            for leaf in &asked[..failed] {
                faults.push((leaf.clone(), format!("page {page} of its tables cannot be read")));
            }
            let Err(mut what) = loader.give(page, first.bytes(0, PAGE_BYTES)) else { continue };
            bad_pages += 1;
            faults.push((asked[failed].clone(), what.to_string()));
            let mut is_good = false;
            for leaf in asked {
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

/// A page from the first who can be read, and how many could not.
async fn from_first(lanes: &Rc<Lanes>, from: &[Leaf], offset: u64) -> Option<(usize, Rc<Bounce>)> {
    for (failed, leaf) in from.iter().enumerate() {
        if let Ok(bytes) = lanes.read_bytes(leaf, offset, PAGE_BYTES).await {
            return Some((failed, bytes));
        }
    }
    None
}

/// A member's log, of which only so much is in memory as is being looked at.
struct LogReader {
    leaf: Leaf,
    start: u64,
    bytes: Vec<u8>,
}

impl LogReader {
    /// What stands at `at`, as much as a batch can have; `None`: it cannot be read.
    async fn at(&mut self, lanes: &Rc<Lanes>, layout: Layout, at: u64) -> Option<&[u8]> {
        if at >= layout.log_bytes {
            return Some(&[]);
        }
        let end = layout.log_bytes.min(at + BATCH_BYTES_MAX);
        if at < self.start || end > self.start + self.bytes.len() as u64 {
            // A root may name any place; a log has whole pages.
            let start = at - at % PAGE_BYTES as u64;
            let len = usize::try_from(LOG_READ_BYTES.min(layout.log_bytes - start)).ok()?;
            self.bytes.clear();
            let part = lanes.read_bytes(&self.leaf, layout.log_offset() + start, len).await.ok()?;
            self.bytes.extend_from_slice(part.bytes(0, len));
            self.start = start;
        }
        self.bytes.get(usize::try_from(at - self.start).ok()?..)
    }
}

/// The batch of this number, from whoever has it whole: at `position`, or at the beginning when it did not fit there. One that failed is tried again
/// with what has come meanwhile, and may not fit any more where it was tried: of several it is the one that goes furthest.
async fn next_batch(
    lanes: &Rc<Lanes>,
    book: &Superblock,
    readers: &mut Vec<[LogReader; 2]>,
    log: Log,
) -> Option<(u64, Result<format::Batch, format::FormatError>)> {
    let mut best: Option<(u64, Result<format::Batch, format::FormatError>)> = None;
    // The beginning is looked at only where the longest does not fit.
    let may_wrap = log.position + BATCH_BYTES_MAX > book.layout.log_bytes;
    let places = if may_wrap && log.position > 0 { vec![log.position, 0] } else { vec![log.position] };
    for (which, place) in places.into_iter().enumerate() {
        let mut at = 0;
        while at < readers.len() {
            let Some(bytes) = readers[at][which].at(lanes, book.layout, place).await else {
                readers.remove(at);
                continue;
            };
            if let Some(batch) = format::decode_batch(bytes, &book.pool_uuid, log.batch) {
                let reach = |batch: &Result<format::Batch, format::FormatError>| match batch {
                    Ok(batch) => batch.first_seq + batch.records.len() as u64,
                    // It makes no sense, and is told.
                    Err(_) => u64::MAX,
                };
                if best.as_ref().is_none_or(|(_, so_far)| reach(so_far) < reach(&batch)) {
                    best = Some((place, batch));
                }
                if is_broken("stale_batch_preferred") {
                    return best;
                }
            }
            at += 1;
        }
    }
    best
}

/// A batch that cannot be there unless the one that is wanted was durable: of its number, where it does not belong, or a later one. Numbers are
/// never used again: a batch is begun when the one before it is durable on all who have tables, an opening begins behind a number that was cut
/// off, and who comes back has no log of its own. Where it is, and on whom.
async fn later_batch(
    lanes: &Rc<Lanes>,
    book: &Superblock,
    readers: &mut [[LogReader; 2]],
    log: Log,
) -> Option<(u64, u64, String)> {
    let (log_bytes, step) = (book.layout.log_bytes, u64::from(book.block_bytes));
    // The next one may have gone to the beginning.
    let may_wrap = log.position > 0 && log.position + NEXT_BYTES_MAX > log_bytes;
    let ranges = [Some(log.position), may_wrap.then_some(0)];
    for reader in readers {
        for (reader, from) in reader.iter_mut().zip(ranges).filter_map(|(reader, from)| Some((reader, from?)))
        {
            let mut at = from;
            while at < log_bytes.min(from + NEXT_BYTES_MAX) {
                // What cannot be read says nothing.
                let Some(bytes) = reader.at(lanes, book.layout, at).await else { break };
                if let Some(number) = format::number_from(bytes, &book.pool_uuid, log.batch) {
                    return Some((number, at, reader.leaf.name().to_owned()));
                }
                at += step;
            }
        }
    }
    None
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
    let reader = |leaf: &Leaf| LogReader { leaf: leaf.clone(), start: 0, bytes: Vec::new() };
    // One for what comes next, and one for the beginning.
    let mut readers: Vec<[LogReader; 2]> = from.iter().map(|leaf| [reader(leaf), reader(leaf)]).collect();
    let mut log = Log { position: root.log_position, batch: root.log_batch, head: 0, tail: 0 };
    let (mut seq, mut replayed) = (root.record_seq, 0);
    loop {
        let next = next_batch(lanes, book, &mut readers, log).await;
        if readers.is_empty() {
            return Err(corrupt(book, "no member's log can be read"));
        }
        let Some((place, batch)) = next else {
            if let Some((number, at, name)) = later_batch(lanes, book, &mut readers, log).await {
                let what = format!(
                    "its log at {} is damaged: batch {} is not there, and batch {number}, which was written after it, is, on {name} at {at}",
                    log.position, log.batch
                );
                return Err(corrupt(book, &what));
            }
            break;
        };
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
    read_intents_of(lanes, found, &mut Vec::new()).await
}

/// The same, and who has which page not whole.
pub(super) async fn read_intents_of(
    lanes: &Rc<Lanes>,
    found: &Found,
    faults: &mut Vec<String>,
) -> Vec<Option<Vec<u64>>> {
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
            if words.is_none() {
                faults.push(format!(
                    "{}: page {page} of the marks of regions, at {offset}, is not whole: all of it counts as marked",
                    leaf.name()
                ));
            }
            all = all
                .zip(words)
                .map(|(all, words)| all.iter().zip(&words).map(|(one, other)| one | other).collect());
        }
        pages.push(all);
    }
    pages
}
