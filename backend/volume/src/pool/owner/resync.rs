//! What makes members the same again: after a crash, an outage, a replacement; and what looks whether they are.
//!
//! Writers keep out of a *window* of the members while it is copied: it is announced, everybody who is under way ends, the first copy that is in
//! sync is read and the others are written. A region's mark of difference goes when all of it has been copied.

use super::Owner;
use super::parity::{row_of, stripe_window};
use super::slide::Slices;
use crate::format::ScrubRecord;
use crate::pool::TaskView;
use crate::pool::bounce::Bounce;
use crate::pool::coverage;
use crate::pool::manners::{Pace, slice_bytes};
use crate::pool::shared::View;
use crate::pool::wait::{Turn, all};
use crate::raid::{Copy, Mode, Piece, Set};
use crate::simulated::is_broken;
use hawser_block::{Outcome, Status};
use hawser_runtime::Instant;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How often it looks whether there is something to do.
const LOOK: Duration = Duration::from_millis(200);
/// How long it leaves a set alone of which something could not be copied.
const AGAIN: Duration = Duration::from_secs(1);
/// So much of each member is looked at at a time, whether it is in use.
const BLOCK_BYTES: u64 = 1 << 20;

pub(super) const SCRUB: &str = "scrub";

/// Work that takes long.
#[derive(Default)]
pub(crate) struct Work {
    pub(super) running: Cell<Option<Progress>>,
    /// What goes on when other work has had its turn.
    paused: Cell<Option<Progress>>,
    /// The last resync or rebuild, and the last scrub.
    pub(super) last: [Cell<Option<Progress>>; 2],
    /// The scrub that was asked for and has not ended, as superblocks say it: waiting, or under way.
    pub(crate) scrub: Cell<Option<ScrubRecord>>,
    /// The extent that is being compared, as long as somebody has it: what nobody has is discarded on one member after the other, or written by
    /// somebody else.
    pub(super) compared: Cell<Option<u32>>,
    /// Why the last scrub ended before it was through.
    pub(super) cut_short: RefCell<Option<String>>,
    pub(super) pace: Pace,
    /// Pieces whose copies are in different rows: they are copied once for each, and not beside each other.
    across_rows: Turn,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    pub(super) kind: &'static str,
    done_bytes: u64,
    total_bytes: u64,
    began: Instant,
    ended: Option<Instant>,
    mismatches: u64,
    /// Of data, and of parity.
    faults: (u64, u64),
    failures: u64,
}

impl Progress {
    fn new(kind: &'static str, total_bytes: u64, now: Instant) -> Progress {
        Progress {
            kind,
            done_bytes: 0,
            total_bytes,
            began: now,
            ended: None,
            mismatches: 0,
            faults: (0, 0),
            failures: 0,
        }
    }

    /// With what a scrub has found.
    fn of(self, scrub: &ScrubRecord) -> Progress {
        let ScrubRecord { mismatches, failures, data_faults, parity_faults, .. } = *scrub;
        Progress { mismatches, failures, faults: (data_faults, parity_faults), ..self }
    }
}

impl Work {
    pub(super) fn begin(&self, kind: &'static str, total_bytes: u64, now: Instant) {
        self.running.set(Some(Progress::new(kind, total_bytes, now)));
    }

    pub(super) fn add(&self, bytes: u64, mismatches: u64) {
        if let Some(mut progress) = self.running.get() {
            progress.done_bytes += bytes;
            progress.mismatches += mismatches;
            self.running.set(Some(progress));
        }
    }

    /// What a scrub has found so far, before this process too.
    pub(super) fn found(&self, scrub: &ScrubRecord) {
        if let Some(progress) = self.running.get() {
            self.running.set(Some(progress.of(scrub)));
        }
    }

    /// Goes on with what was paused, or begins where `done` of it is done.
    pub(super) fn go_on(&self, kind: &'static str, done: u64, total: u64, now: Instant) {
        if self.running.get().is_none() {
            match self.paused.take() {
                Some(progress) => self.running.set(Some(progress)),
                None => self.begin(kind, total.saturating_sub(done), now),
            }
        }
    }

    /// Other work has its turn.
    pub(super) fn pause(&self) {
        if let Some(progress) = self.running.take() {
            self.paused.set(Some(progress));
        }
    }

    /// Work of this kind begins anew, or does not go on.
    pub(super) fn forget(&self, kind: &'static str) {
        for place in [&self.running, &self.paused] {
            place.set(place.take().filter(|progress| progress.kind != kind));
        }
    }

    pub(super) fn end(&self, now: Instant) {
        if let Some(progress) = self.running.take() {
            let place = usize::from(progress.kind == SCRUB);
            self.last[place].set(Some(Progress { ended: Some(now), ..progress }));
        }
    }

    /// The scrub ends, and is not through.
    pub(super) fn cut_short(&self, why: String, now: Instant) {
        let Some(scrub) = self.scrub.take() else { return };
        let running = self.running.get().filter(|running| running.kind == SCRUB);
        if running.is_none() {
            self.begin(SCRUB, 0, now);
        }
        self.found(&scrub);
        self.cut_short.replace(Some(why));
        self.end(now);
    }

    /// Nobody has these extents any more.
    pub(super) fn are_let_go(&self, extents: &[u32]) {
        if self.compared.get().is_some_and(|extent| extents.contains(&extent)) {
            self.compared.set(None);
        }
    }

    pub(crate) fn views(&self, now: Instant) -> Vec<TaskView> {
        let is_running = self.running.get().is_some_and(|running| running.kind == SCRUB);
        let waiting = self.scrub.get().filter(|_| !is_running);
        let waiting = waiting.map(|scrub| Progress::new(SCRUB, 0, now).of(&scrub));
        let each = [self.running.get(), self.paused.get(), waiting, self.last[0].get(), self.last[1].get()]
            .into_iter()
            .flatten();
        each.map(|progress| TaskView {
            kind: progress.kind,
            done_bytes: progress.done_bytes,
            total_bytes: progress.total_bytes.max(progress.done_bytes),
            elapsed: progress.ended.unwrap_or(now) - progress.began,
            mismatches: progress.mismatches,
            data_faults: progress.faults.0,
            parity_faults: progress.faults.1,
            failures: progress.failures,
            is_done: progress.ended.is_some(),
            cut_short: self
                .cut_short
                .borrow()
                .clone()
                .filter(|_| progress.kind == SCRUB && progress.ended.is_some()),
        })
        .collect()
    }
}

impl Owner {
    /// Reads a piece from its first copy that is in sync and gives it; says which that was.
    pub(crate) async fn read_first(
        self: &Rc<Self>,
        view: &View,
        set: &Set,
        piece: &Piece,
        into: &Rc<Bounce>,
        at: usize,
    ) -> Result<Copy, Status> {
        if set.parity().is_some() {
            let found = self.read_or_compute(view, set, piece, false).await?;
            into.fill(at, found.bytes(0, piece.len as usize));
            return Ok(piece.copies.as_slice()[0]);
        }
        let mut last = Status::Path;
        for copy in piece.copies.as_slice() {
            let Some(leaf) = &view.leaves[usize::from(copy.member)] else { continue };
            if set.mode(copy.member - set.first_member()) != Mode::InSync {
                continue;
            }
            match self.lanes.read(leaf, view.data_offset + copy.offset, into, at, piece.len as usize).await {
                Ok(()) if set.mode(copy.member - set.first_member()) == Mode::InSync => return Ok(*copy),
                Ok(()) => {}
                Err(status) => last = status,
            }
        }
        Err(last)
    }

    /// Makes all copies of a piece those of the first that is in sync. The window is the caller's.
    pub(super) async fn copy_piece(self: &Rc<Self>, set: &Set, piece: &Piece, only: Option<u16>) -> Outcome {
        let (view, since) = (&self.view(), self.shared.joins());
        let bounce = Rc::new(self.place.spare.take(piece.len as usize));
        let in_sync = |copy: &&Copy| set.mode(copy.member - set.first_member()) == Mode::InSync;
        let wanted = piece.copies.as_slice().iter().find(in_sync).map(|copy| copy.member);
        let first = self.read_first(view, set, piece, &bounce, 0).await?;
        // Who was copied before got it from the first: when that cannot be read this time, all get what there is instead, or they would differ.
        let only = only.filter(|_| set.parity().is_some() || wanted == Some(first.member));
        self.may_mend()?;
        for copy in piece.copies.as_slice().iter().filter(|copy| copy.member != first.member) {
            let index = copy.member - set.first_member();
            if only.is_some_and(|only| only != index) || set.mode(index) == Mode::Away {
                continue;
            }
            let Some(leaf) = &view.leaves[usize::from(copy.member)] else { continue };
            let offset = view.data_offset + copy.offset;
            if let Err(status) = self.lanes.write(leaf, offset, &bounce, 0, piece.len as usize, false).await {
                self.report_lacking(copy.member, status, since).await?;
            }
        }
        Ok(())
    }

    /// Whether it is still ours to write.
    pub(super) fn check_ours(&self) -> Outcome {
        match self.is_read_only || self.is_over.get() || self.lost.borrow().is_some() {
            true => Err(Status::ReadOnly),
            false => Ok(()),
        }
    }

    /// The same of what is copied or mended: a pool that is being closed is about to be another's.
    pub(super) fn may_mend(&self) -> Outcome {
        match self.is_closing.get() || self.stopped.borrow().is_some() {
            true => Err(Status::ReadOnly),
            false => self.check_ours(),
        }
    }

    /// Keeps writers out of a window while `work` runs.
    pub(super) async fn in_window<T>(
        self: &Rc<Self>,
        set: &Arc<Set>,
        window: Range<u64>,
        work: impl Future<Output = T>,
    ) -> T {
        let _turn = self.turns.window.take().await;
        if !is_broken("resync_without_window") {
            set.set_window(Some(window));
            self.barrier().await;
        }
        let result = work.await;
        set.set_window(None);
        self.bell.ring();
        result
    }

    /// Makes the copies of a piece the same before it is read.
    pub(crate) async fn settle(self: Rc<Self>, set: usize, piece: Piece) -> Outcome {
        if self.is_read_only || self.ended().is_some() {
            // The first copy is read all the same.
            return Ok(());
        }
        let view = self.view();
        let set = Arc::clone(view.array.set(set));
        coverage::count(coverage::Event::Settled);
        if set.parity().is_some() {
            let window = stripe_window(&set, &piece);
            let settled = self.in_window(&set, window.clone(), self.mend_stripes(&set, window)).await;
            let (row, _) = row_of(&view, &set, &piece);
            return match settled {
                // Nobody of the set goes before parity is made of what is there, so that this is what will be read.
                Err(_) if row.is_doubtful() && set.are_all_in_sync() => Ok(()),
                // A member does not say what parity is to be made of, with whatever error. Nobody doubts the parity that is there: it would be read by that.
                Err(status) if status != Status::Aborted && !row.is_doubtful() => Ok(()),
                settled => settled.map(drop),
            };
        }
        self.in_window(&set, window_of(&piece), self.copy_piece(&set, &piece, None)).await
    }

    /// A copy could not be read and another could: it is written again.
    pub(crate) async fn repair(self: Rc<Self>, set: usize, piece: Piece) -> Outcome {
        self.check_writable()?;
        let view = self.view();
        let set = Arc::clone(view.array.set(set));
        let window = match set.parity() {
            Some(_) => stripe_window(&set, &piece),
            None => window_of(&piece),
        };
        let outcome = self.in_window(&set, window, self.rewrite_bad(&set, &piece)).await;
        self.publish();
        outcome
    }

    pub(super) async fn rewrite_bad(self: &Rc<Self>, set: &Arc<Set>, piece: &Piece) -> Outcome {
        let (view, since) = (&self.view(), self.shared.joins());
        let good = match set.parity() {
            Some(_) => self.read_or_compute(view, set, piece, true).await?,
            None => {
                let good = Rc::new(self.place.spare.take(piece.len as usize));
                self.read_first(view, set, piece, &good, 0).await?;
                good
            }
        };
        self.may_mend()?;
        for copy in piece.copies.as_slice() {
            let index = copy.member - set.first_member();
            let Some(leaf) = &view.leaves[usize::from(copy.member)] else { continue };
            if set.mode(index) != Mode::InSync {
                continue;
            }
            let offset = view.data_offset + copy.offset;
            let look = Rc::new(self.place.spare.take(piece.len as usize));
            if self.lanes.read(leaf, offset, &look, 0, piece.len as usize).await != Err(Status::Media) {
                continue;
            }
            match self.lanes.write(leaf, offset, &good, 0, piece.len as usize, false).await {
                Ok(()) => {
                    coverage::count(coverage::Event::Repaired);
                    self.members.borrow_mut()[usize::from(copy.member)].repaired += 1;
                    let name = leaf.name().to_owned();
                    log::warn!(
                        "pool {}: {name}: bytes that could not be read at {offset} are written again",
                        self.shared.name
                    );
                }
                Err(status) => self.report(1 << copy.member, status, since).await?,
            }
        }
        Ok(())
    }

    /// Runs until the pool is closed: resynchronises what is marked, brings members back, scrubs when asked.
    pub(crate) async fn resync(self: Rc<Self>) {
        while !self.is_closing.get() {
            if self.ended().is_some() || self.is_read_only {
                self.give_up_scrub();
                self.rest(LOOK).await;
                continue;
            }
            let sets = self.view().array.sets().to_vec();
            let mut is_whole = true;
            for set in &sets {
                if set.level().is_redundant() {
                    is_whole &= self.resync_set(set).await;
                }
            }
            self.go_on_replacing().await;
            if !is_whole {
                self.rest(AGAIN).await;
            }
            self.go_on_scrubbing().await;
            self.rest(LOOK).await;
        }
    }

    /// Whether all that could be copied was.
    async fn resync_set(self: &Rc<Self>, set: &Arc<Set>) -> bool {
        let syncing: Vec<u16> =
            (0..set.members()).filter(|member| set.mode(*member) == Mode::Syncing).collect();
        let regions: Vec<u32> = set.unsynced.iter_set().collect();
        let in_sync = usize::from(set.in_sync_count());
        if set.parity().is_some() && regions_wait(set) {
            return true;
        }
        if (regions.is_empty() || in_sync + syncing.len() < 2) && syncing.is_empty() {
            return true;
        }
        let kind = if syncing.is_empty() { "resync" } else { "rebuild" };
        let total = regions.len() as u64 * set.region_bytes();
        if !regions.is_empty() {
            self.work.begin(kind, total, self.runtime.now());
        }
        let mut is_whole = true;
        for region in regions {
            if self.is_closing.get() {
                is_whole = false;
                break;
            }
            is_whole &= self.resync_region(set, region).await;
            self.work.add(set.region_bytes(), 0);
        }
        self.work.end(self.runtime.now());
        if !is_whole || self.is_closing.get() {
            return false;
        }
        for member in syncing {
            if set.mode(member) == Mode::Syncing
                && let Err(status) = self.is_whole_again(set, member).await
            {
                log::warn!("pool {}: member {member}: {}", self.shared.name, status.name());
            }
        }
        true
    }

    /// Copies a region to all who lack it; whether it is the same everywhere now.
    async fn resync_region(self: &Rc<Self>, set: &Arc<Set>, region: u32) -> bool {
        let first = u64::from(region) * set.region_bytes();
        let end = (first + set.region_bytes()).min(set.member_rows_bytes());
        // A write that fails meanwhile marks it again.
        let mut at = first;
        let marks = self.shared.unsynced_marks();
        let strip = u64::from(set.strip_bytes());
        let members = set.members();
        // Copies may be a strip before or behind.
        let len = slice_bytes(members, self.options.sync_bytes_per_second);
        let slices = Slices { len, cost: u64::from(members), margin: strip };
        while at < end {
            let run = self.used_run(set, at..end);
            let work = |rows: Range<u64>| self.resync_slice(set, rows);
            match self.slide(set, run.clone(), slices, work).await {
                Ok(done) if done == run.end => at = run.end,
                Ok(_) | Err(_) => return false,
            }
        }
        if !set.declare_same(region, || self.shared.unsynced_marks() == marks) {
            return false;
        }
        coverage::count(coverage::Event::Resync);
        true
    }

    /// The first rows of these that are in use, and those behind them that are; none: an empty run at the end.
    fn used_run(&self, set: &Set, rows: Range<u64>) -> Range<u64> {
        let is_used = |at: &u64| self.is_in_use(set, *at, BLOCK_BYTES.min(rows.end - at));
        let mut blocks = rows.clone().step_by(1 << BLOCK_BYTES.ilog2());
        let Some(start) = blocks.find(is_used) else { return rows.end..rows.end };
        let behind = blocks.take_while(is_used).count() as u64;
        start..rows.end.min(start + (behind + 1) * BLOCK_BYTES)
    }

    /// The window is the caller's.
    async fn resync_slice(self: &Rc<Self>, set: &Arc<Set>, rows: Range<u64>) -> Outcome {
        if set.parity().is_some() {
            return self.mend_stripes(set, rows).await.map(drop);
        }
        let len = rows.end - rows.start;
        for member in (0..set.members()).filter(|member| set.mode(*member) != Mode::Away) {
            let pieces = set.pieces_of_member(member, rows.start, len).collect::<Vec<_>>();
            // Beside each other, or the way to the members and back is all that it does.
            for copied in all(pieces.iter().map(|piece| self.copy_for(set, piece, member))).await {
                copied?;
            }
        }
        Ok(())
    }

    /// Makes a member's copy of a piece that of the first.
    async fn copy_for(self: &Rc<Self>, set: &Set, piece: &Piece, member: u16) -> Outcome {
        let copies = piece.copies.as_slice();
        if copies.iter().any(|copy| copy.offset != copies[0].offset) {
            let _turn = self.work.across_rows.take().await;
            return self.copy_piece(set, piece, Some(member)).await;
        }
        let first = copies.iter().find(|copy| set.mode(copy.member - set.first_member()) == Mode::InSync);
        if first.is_some_and(|first| first.member - set.first_member() == member) {
            // It is read when the others' turn comes, which is in the same slice.
            return Ok(());
        }
        self.copy_piece(set, piece, Some(member)).await
    }

    /// Whether some extent that lies there is in use: what was never written need not be the same.
    pub(super) fn is_in_use(&self, set: &Set, offset: u64, len: u64) -> bool {
        let data = set.data_of_rows(offset, len);
        let view = self.view();
        let extent_bytes = view.thin.extent_bytes;
        let before: u64 = view
            .array
            .sets()
            .iter()
            .take_while(|other| other.first_member() < set.first_member())
            .map(|other| u64::from(other.extents()))
            .sum();
        let meta = self.meta.borrow();
        let (first, last) = (data.start / extent_bytes, data.end.div_ceil(extent_bytes));
        (first..last).any(|extent| u32::try_from(before + extent).is_ok_and(|extent| !meta.is_free(extent)))
    }
}

/// Nothing can be made right: what is lost is not there to be brought up to date, and what is left cannot be told from it.
fn regions_wait(set: &Set) -> bool {
    let is = |mode: Mode| (0..set.members()).filter(|member| set.mode(*member) == mode).count();
    is(Mode::Syncing) == 0 && is(Mode::Away) > 0
}

/// The members' bytes that a piece's copies are in, and what is between.
pub(super) fn window_of(piece: &Piece) -> Range<u64> {
    let starts = piece.copies.as_slice().iter().map(|copy| copy.offset);
    let start = starts.clone().min().unwrap_or(0);
    start..starts.max().unwrap_or(0) + u64::from(piece.len)
}
