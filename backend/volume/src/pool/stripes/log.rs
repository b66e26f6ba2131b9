//! What is about to be changed in place, in the parity log before: with the next loss of a member, or of the power, the stripe is made whole from it.

use super::Ways;
use super::row::{Contents, Row, Slots, each};
use super::stuck::Stuck;
use crate::format::parity_log::HEADER_PAGES;
use crate::format::{PAGE_BYTES, ParityEntry};
use crate::pool::bounce::Bounce;
use crate::pool::coverage;
use crate::pool::owner::Owner;
use crate::pool::shared::Shared;
use crate::pool::wait::all;
use crate::raid::Mode;
use crate::simulated::is_broken;
use hawser_block::{Operation, Outcome, Status};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A write to a member that nobody waits for, until it has ended.
struct LeftBehind {
    shared: Arc<Shared>,
    member: usize,
}

impl LeftBehind {
    fn new(shared: &Arc<Shared>, member: u16) -> LeftBehind {
        let (shared, member) = (Arc::clone(shared), usize::from(member));
        shared.left_behind[member].fetch_add(1, Ordering::AcqRel);
        LeftBehind { shared, member }
    }
}

impl Drop for LeftBehind {
    fn drop(&mut self) {
        self.shared.left_behind[self.member].fetch_sub(1, Ordering::AcqRel);
    }
}

impl Ways {
    /// Makes the new content of these slots durable on as many members as may be lost, and one more. The entry's number.
    pub(super) async fn log(&self, row: &Row<'_>, contents: &Contents, slots: Slots) -> Result<u64, Status> {
        let places = each(slots).fold(0u32, |places, slot| places | 1 << row.place(slot));
        let len = u32::try_from(row.len).expect("columns are few");
        let within = u32::try_from(row.within).expect("a strip is small");
        let mut entry = ParityEntry { key: [0; 16], number: 0, row: row.row, within, len, places };
        let (number, page) = self.log_room(row, entry.pages()).await?;
        (entry.key, entry.number) = (row.parity.ring().key, number);
        let bytes = entry.pages() as usize * PAGE_BYTES;
        let mut bounce = self.place.spare.take(bytes);
        let mut by_place: Vec<usize> = each(slots).collect();
        by_place.sort_by_key(|slot| row.place(*slot));
        let all_bytes = bounce.bytes_mut(0, bytes);
        for (index, slot) in by_place.into_iter().enumerate() {
            let at = PAGE_BYTES + index * row.len;
            let content = contents[slot].as_ref().expect("what is written is there");
            all_bytes[at..at + row.len].copy_from_slice(content.bytes(0, row.len));
        }
        let end = PAGE_BYTES + entry.payload_bytes();
        all_bytes[end..].fill(0);
        let crc = crc32c::crc32c(&all_bytes[PAGE_BYTES..end]);
        all_bytes[..PAGE_BYTES].copy_from_slice(&entry.encode(&self.shared.uuid, crc));
        let offset = row.parity.log_offset + u64::from(HEADER_PAGES + page) * PAGE_BYTES as u64;
        if is_broken("parity_log_after_data") {
            return Ok(number);
        }
        let mut is_begun = false;
        let written = self.log_write(row, slots, offset, &Rc::new(bounce), bytes, &mut is_begun).await;
        match (&written, is_begun) {
            (Ok(()), _) => {}
            // Nothing was changed in place, so nothing is waited for.
            (Err(_), false) => row.parity.ring().placed(number),
            // The next opening may put it in place.
            (Err(_), true) => row.parity.stays_half_written(row.row),
        }
        coverage::count(coverage::Event::StripeLogged);
        written.map(|()| number)
    }

    /// Room in the log, which may have to be made.
    async fn log_room(&self, row: &Row<'_>, pages: u32) -> Result<(u64, u32), Status> {
        loop {
            let (room, is_due) = {
                let mut ring = row.parity.ring();
                let room = ring.begin(pages, row.row);
                let is_due = (room.is_none() || ring.is_half_full()) && !ring.is_release_wanted;
                ring.is_release_wanted |= is_due;
                (room, is_due)
            };
            let first = row.set.first_member();
            if room.is_some() {
                row.parity.guards.is_to_be_logged(row.row);
            }
            if is_due {
                let release =
                    self.shared.ask(move |owner| async move { owner.release_parity_log(first).await });
                match room {
                    Some(_) => drop(release),
                    None => release.await.unwrap_or(Err(Status::Aborted))?,
                }
            }
            if room.is_none() && !self.has_room(row, pages) {
                // Others have it, and are still at work.
                self.runtime.sleep(Duration::from_millis(1)).await;
            }
            match room {
                Some(room) => return Ok(room),
                None if !self.is_writable() => return Err(Status::ReadOnly),
                None => {}
            }
        }
    }

    fn has_room(&self, row: &Row<'_>, pages: u32) -> bool {
        row.parity.ring().has_room(pages)
    }

    async fn log_write(
        &self,
        row: &Row<'_>,
        slots: Slots,
        offset: u64,
        bounce: &Rc<Bounce>,
        len: usize,
        is_begun: &mut bool,
    ) -> Result<(), Status> {
        let mut stuck = Stuck::new(&self.shared);
        // Who does not take it, and cannot be put out: others are asked instead.
        let mut refused: Slots = 0;
        loop {
            // A member that has come since the row was looked at has to be put out when it fails: else it is tried for ever.
            let row = &Row { since: self.shared.joins(), ..*row };
            let in_sync = row.in_sync();
            // As many as may be lost still, and one more.
            let count = (in_sync.count_ones() as usize + 1).saturating_sub(row.data());
            if count == 0 {
                if !*is_begun || !self.is_writable() {
                    return Err(Status::Path);
                }
                self.runtime.sleep(Duration::from_millis(500)).await;
                continue;
            }
            // Rather those that the change does not go to. And those that are being brought up to date: when they are, one more may be lost,
            // and what was logged before has to be on one member more.
            let others = each(in_sync & !slots & !refused).chain(each(in_sync & slots & !refused));
            let others = others.chain(each(in_sync & refused));
            let joining = match is_broken("parity_log_not_on_joining") {
                true => 0,
                false => row.written() & !in_sync,
            };
            let writes = others.take(count).chain(each(joining)).map(|slot| async move {
                row.parity.count_log_write(len);
                (slot, self.write_unless_out(row, slot, (offset, true), bounce, len).await)
            });
            let mut is_whole = true;
            let outcomes = all(writes).await;
            // Somebody has it, or may have: the next opening would put it in place, over what was answered since. So it does not fail any more,
            // unless the pool takes no more writes.
            *is_begun |= outcomes.iter().any(|(_, outcome)| !outcome.is_err_and(is_without_effect));
            *is_begun &= !is_broken("entry_left_in_log");
            for (slot, outcome) in outcomes {
                let Err(status) = outcome else { continue };
                is_whole = false;
                let Err(failed) = self.member_failed(row, slot, status, *is_begun).await else { continue };
                refused |= 1 << slot;
                if ((in_sync & !refused).count_ones() as usize) >= count {
                    continue;
                }
                if !*is_begun || !self.is_writable() {
                    return Err(failed);
                }
                // It may come back; and all are asked again.
                self.is_stuck(row, slot, status, true, &mut stuck).await;
                refused = 0;
            }
            if is_whole {
                return Ok(());
            }
            if !self.is_writable() {
                return Err(Status::ReadOnly);
            }
        }
    }

    /// Writes to a slot's member, and waits while that is not out. A write to a device that hangs may end minutes
    /// later: it is left to itself then, and the member is not brought back before it has ended, nor before the device says that nothing of it can come any more.
    pub(super) async fn write_unless_out(
        &self,
        row: &Row<'_>,
        slot: usize,
        (offset, fua): (u64, bool),
        from: &Rc<Bounce>,
        len: usize,
    ) -> Outcome {
        let leaf = row.leaf(slot).expect("who is written to is there");
        let operation = Operation::Write { fua };
        let mut write =
            self.lanes.start(leaf, operation, offset, from.buffers(0, len), Some(Rc::clone(from)));
        let is_out = || row.set.mode(row.place(slot)) == Mode::Away;
        if let Some(outcome) = self.place.bell.until_or(&mut write, is_out).await {
            return outcome;
        }
        self.lanes.leave(leaf);
        let left = LeftBehind::new(&self.shared, row.member(slot));
        self.runtime.spawn(async move {
            // How it ended matters to nobody.
            let _ = write.await;
            drop(left);
        });
        Err(Status::Aborted)
    }

    /// A member failed a write: it is out when this ends, or it can be tried again. `is_half_done`: others have done what it has not.
    pub(super) async fn member_failed(
        &self,
        row: &Row<'_>,
        slot: usize,
        status: Status,
        is_half_done: bool,
    ) -> Result<(), Status> {
        if row.set.mode(row.place(slot)) == Mode::Away {
            return Ok(());
        }
        if status == Status::Aborted {
            // By somebody who does not know of us.
            self.runtime.sleep(Duration::from_millis(10)).await;
            return Ok(());
        }
        let (member, since) = (row.member(slot), row.since);
        let report = move |owner: Rc<Owner>| async move {
            match is_half_done {
                true => owner.report_whatever(1 << member, status, since).await,
                false => owner.report(1 << member, status, since).await,
            }
        };
        self.shared.request(report).await
    }

    pub(super) fn is_writable(&self) -> bool {
        self.shared.is_writable.load(Ordering::Acquire)
    }
}

/// A write that ended so has changed nothing.
fn is_without_effect(status: Status) -> bool {
    matches!(status, Status::NoSpace | Status::Invalid | Status::Unsupported | Status::ReadOnly)
}
