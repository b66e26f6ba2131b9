//! Records, from the tail to the log to a checkpoint. The order of durable writes is in docs/on-disk-format.md.

use super::{Owner, Pending, Written};
use crate::format::{self, NONE, PAGE_BYTES, Record};
use crate::pool::bounce::Bounce;
use crate::pool::coverage;
use crate::pool::lost_caches::Seen;
use crate::simulated::is_broken;
use crate::thin::Mapped;
use hawser_block::{Outcome, Status};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Where the log is. `head` and `tail` count bytes since the pool was opened; the rest is places.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Log {
    /// Where the next batch goes, in the log's area.
    pub(crate) position: u64,
    /// The next batch's number.
    pub(crate) batch: u64,
    /// Bytes that were ever used, ends that were passed over included.
    pub(crate) head: u64,
    /// Of those, how many are not needed any more.
    pub(crate) tail: u64,
}

/// The most that one batch holds.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Pages that are written at a time.
const CHECKPOINT_PAGES: usize = 64;

impl Owner {
    /// Room in the tail that one change may need: several records, or one that names many snapshots.
    fn tail_margin(&self) -> usize {
        (self.tail.borrow().capacity() / 4).min(64 << 10)
    }

    /// Waits until there is room in the tail for a change.
    pub(crate) async fn room(self: &Rc<Self>) -> Outcome {
        for _ in 0..1000 {
            if self.tail_used.get() + self.tail_margin() <= self.tail.borrow().capacity() {
                return Ok(());
            }
            Box::pin(self.flush()).await?;
        }
        Err(Status::NoSpace)
    }

    /// Makes a change: in the tail, then in the tables. Whoever asks has checked that it can be, and that there is room.
    pub(crate) fn make(&self, record: &Record) {
        self.make_of(record, None);
    }

    /// The same, of units that were `written`.
    pub(super) fn make_of(&self, record: &Record, written: Option<Written>) {
        let seq = self.seq.get();
        let pending = Pending { written, ..Pending::new(seq, record) };
        if !is_broken("tail_skipped") {
            self.tail.borrow_mut().append(&pending.entry);
        }
        self.tail_used.set(self.tail_used.get() + pending.entry.len());
        // Before anybody can see it: who finds none pending takes all that he sees for durable.
        self.shared.pending.store(self.pending.borrow().len() as u64 + 1, Ordering::Release);
        self.note_letting_go(seq, record);
        if let Err(what) = self.meta.borrow_mut().apply(record) {
            panic!("pool {}: a change of our own does not go: {record:?}: {what}", self.shared.name);
        }
        self.seq.set(seq + 1);
        self.pending.borrow_mut().push_back(pending);
        self.count_pending();
        self.take_freed();
    }

    /// Before this record is applied: whether somebody holds an extent no more after it, who does again if it is lost.
    fn note_letting_go(&self, seq: u64, record: &Record) {
        let meta = self.meta.borrow();
        let lets_go = match *record {
            Record::Delete { .. } | Record::Unmap { .. } => true,
            Record::Map { volume, index, .. } => meta.entry(volume, index) != Mapped::None,
            Record::Valid { volume, index, .. } => {
                matches!(meta.entry(volume, index), Mapped::Partial { fallback, .. } if fallback != NONE)
            }
            _ => false,
        };
        if lets_go {
            self.let_go.set(seq + 1);
        }
    }

    /// What has just lost its last reference waits for the newest record to be durable.
    pub(crate) fn take_freed(&self) {
        let freed = self.meta.borrow_mut().take_freed();
        if !freed.is_empty() {
            self.work.are_let_go(freed.extents());
            self.freed.borrow_mut().push((self.seq.get().saturating_sub(1), freed));
        }
    }

    fn count_pending(&self) {
        self.shared.pending.store(self.pending.borrow().len() as u64, Ordering::Release);
    }

    /// Makes records before `upto` durable; their data is.
    pub(crate) async fn commit(self: &Rc<Self>, upto: u64) -> Outcome {
        loop {
            if self.durable.get() >= upto {
                return Ok(());
            }
            let turn = self.turns.commit.take().await;
            if self.durable.get() >= upto {
                return Ok(());
            }
            let layout = self.book.borrow().layout;
            let block_bytes = self.book.borrow().block_bytes;
            let batch_bytes_max =
                BATCH_BYTES_MAX.min(usize::try_from(layout.log_bytes / 4).unwrap_or(BATCH_BYTES_MAX));
            let (mut records, mut count, mut first, mut next) = (Vec::new(), 0u32, upto, upto);
            for pending in self.pending.borrow().iter().take_while(|pending| pending.seq < upto) {
                if count > 0 && records.len() + pending.record().len() > batch_bytes_max {
                    break;
                }
                if count == 0 {
                    first = pending.seq;
                }
                records.extend_from_slice(pending.record());
                count += 1;
                next = pending.seq + 1;
            }
            let len = format::batch_len(records.len(), block_bytes);
            let mut log = self.log.get();
            // A batch does not go round the end: the reader looks at the beginning where it does not fit.
            let wraps = log.position + len > layout.log_bytes;
            let passed_over = if wraps { layout.log_bytes - log.position } else { 0 };
            if log.head + passed_over + len - log.tail > layout.log_bytes {
                drop(turn);
                self.checkpoint(false).await?;
                continue;
            }
            if wraps {
                log.position = 0;
            }
            let batch =
                format::encode_batch(&self.shared.uuid, log.batch, first, count, &records, block_bytes);
            let bounce = Rc::new(Bounce::holding(&batch));
            self.write_everywhere(layout.log_offset() + log.position, &bounce, batch.len(), true).await?;
            log.position += len;
            log.head += passed_over + len;
            log.batch += 1;
            self.log.set(log);
            self.is_durable(next);
            coverage::count(coverage::Event::LogBatch);
            drop(turn);
            if log.head - log.tail > layout.log_bytes / 2 {
                self.start_checkpoint();
            }
        }
    }

    /// Records before `next` are durable.
    fn is_durable(&self, next: u64) {
        self.durable.set(self.durable.get().max(next));
        let mut pending = self.pending.borrow_mut();
        while pending.front().is_some_and(|pending| pending.seq < next) {
            pending.pop_front();
        }
        let half = self.tail.borrow().capacity() / 2;
        if pending.is_empty() || self.tail_used.get() > half {
            let kept = self.tail_content(&pending);
            self.tail_used.set(kept.len());
            self.tail.borrow_mut().replace(&kept);
        }
        drop(pending);
        self.count_pending();
        self.bell.ring();
    }

    fn tail_content(&self, pending: &VecDeque<Pending>) -> Vec<u8> {
        let (epoch, untold) = (self.book.borrow().epoch, self.shared.untold());
        let mut content = format::encode_tail_header(&self.shared.uuid, epoch, &self.whole_caches(), &untold);
        for pending in pending {
            content.extend_from_slice(&pending.entry);
        }
        content
    }

    /// Fills the tail with what is pending, for this epoch.
    pub(crate) fn begin_tail(&self) {
        let content = self.tail_content(&self.pending.borrow());
        self.tail_used.set(content.len());
        self.tail.borrow_mut().replace(&content);
        self.count_pending();
    }

    /// Begins a checkpoint unless one runs.
    fn start_checkpoint(self: &Rc<Self>) {
        if !self.turns.checkpoint.is_taken() {
            let owner = Rc::clone(self);
            self.runtime.spawn(async move {
                // Closing makes its own.
                if owner.is_closing.get() {
                    return;
                }
                if let Err(status) = owner.checkpoint(false).await {
                    log::warn!("pool {}: a checkpoint failed: {}", owner.shared.name, status.name());
                }
            });
        }
    }

    /// Writes the tables as they are now, so that the log before is not needed any more.
    pub(crate) async fn checkpoint(self: &Rc<Self>, everything: bool) -> Outcome {
        let _turn = self.turns.checkpoint.take().await;
        let (seq, log) = loop {
            // What the tables say of a lost cache is not for ever.
            self.put_out_doubted().await?;
            if self.has_lost_while_opening() {
                return Err(Status::Media);
            }
            let (seq, log, seen) = {
                let _turn = self.turns.commit.take().await;
                let seen = self.shared.lost_caches.look();
                if seen.is_open() && !is_broken("lost_units_checkpointed") {
                    continue;
                }
                self.meta.borrow_mut().begin_checkpoint(everything);
                (self.seq.get(), self.log.get(), seen)
            };
            let written = self.write_checkpoint((seq, seen), log).await;
            self.meta.borrow_mut().end_checkpoint(written == Ok(true));
            if written? {
                break (seq, log);
            }
        };
        let mut now = self.log.get();
        now.tail = log.head;
        self.log.set(now);
        self.is_durable(seq);
        coverage::count(coverage::Event::Checkpoint);
        Ok(())
    }

    /// Whether it was; not, when what it would say was lost meanwhile.
    async fn write_checkpoint(
        self: &Rc<Self>,
        (seq, seen): (u64, Seen),
        log: super::Log,
    ) -> Result<bool, Status> {
        let layout = self.book.borrow().layout;
        if is_broken("checkpoint_frees_log_early") {
            let mut now = self.log.get();
            now.tail = log.head;
            self.log.set(now);
        }
        loop {
            let pages = self.meta.borrow_mut().checkpoint_step(CHECKPOINT_PAGES);
            let pages = pages.map_err(|what| {
                log::error!("pool {}: a checkpoint does not fit: {what}", self.shared.name);
                Status::NoSpace
            })?;
            if pages.is_empty() {
                break;
            }
            // Neighbours go in one request.
            let mut at = 0;
            let mut writes = Vec::new();
            while at < pages.len() {
                let first = pages[at].0;
                let mut bytes = Vec::new();
                while at < pages.len()
                    && u64::from(pages[at].0) == u64::from(first) + (bytes.len() / PAGE_BYTES) as u64
                {
                    bytes.extend_from_slice(&pages[at].1);
                    at += 1;
                }
                let bounce = Rc::new(Bounce::holding(&bytes));
                writes.push(async move {
                    self.write_everywhere(layout.page_offset(first), &bounce, bytes.len(), false).await
                });
            }
            crate::pool::wait::all(writes).await.into_iter().collect::<Outcome>()?;
        }
        // The pages, and the data of all records that are in them.
        if !is_broken("checkpoint_root_before_pages") {
            self.flush_members().await?;
            if !self.are_flushed(seen, seq) && !is_broken("lost_units_checkpointed") {
                return Ok(false);
            }
        }
        let root = self.meta.borrow_mut().checkpoint_root(self.shared.uuid, seq, log.position, log.batch);
        let bounce = Rc::new(Bounce::holding(&root.encode()));
        let slot = layout.page_offset(u32::from(root.number % 2 == 1));
        // Once it was tried it may be there: there is no way back to the old one.
        while let Err(status) = self.write_everywhere(slot, &bounce, PAGE_BYTES, true).await {
            if self.lost.borrow().is_some() || status == Status::Conflict || self.is_closing.get() {
                self.lose("the root of a checkpoint could not be written");
                return Err(status);
            }
            self.runtime.sleep(Duration::from_millis(500)).await;
        }
        Ok(true)
    }
}
