//! Whether the copies of what somebody can read are the same, and data and parity go together.
//!
//! A scrub is in the superblocks from its beginning to its end, with how far it is: the next opening goes on with it. What several volumes share is
//! compared once by each process.

use super::Owner;
use super::differing::Fault;
use super::parity::Wanted;
use super::resync::{SCRUB, window_of};
use crate::format::{NONE, ScrubRecord};
use crate::pool::PoolError;
use crate::pool::bounce::Bounce;
use crate::pool::coverage;
use crate::pool::resolve::runs;
use crate::pool::shared::View;
use crate::pool::stripes::Row;
use crate::raid::{Copy, Mode, Piece, Set};
use crate::thin::{Bits, Mapped};
use hawser_block::{Outcome, Status};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

/// How far it is is written down so often on its way: every 3 %.
const STEPS: u64 = 32;

/// What was found, in units.
#[derive(Clone, Copy, Default)]
struct Tally {
    mismatches: u64,
    /// Of those, what is known to be of data, and of parity: some of one unit may be both.
    data_faults: u64,
    parity_faults: u64,
    /// Could not be compared, or not be rewritten.
    failures: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.mismatches += other.mismatches;
        self.data_faults += other.data_faults;
        self.parity_faults += other.parity_faults;
        self.failures += other.failures;
    }
}

/// Units of extents that were compared already: extents may be shared.
#[derive(Default)]
struct Seen {
    whole: BTreeSet<u32>,
    parts: BTreeMap<u32, Bits>,
}

impl Seen {
    /// Adds units; gives those of the extent that were there before.
    fn add(&mut self, extent: u32, bits: Bits, full: Bits) -> Bits {
        if self.whole.contains(&extent) {
            return full;
        }
        let before = self.parts.get(&extent).copied().unwrap_or_default();
        let after: Bits = std::array::from_fn(|word| before[word] | bits[word]);
        if after == full {
            self.parts.remove(&extent);
            self.whole.insert(extent);
        } else {
            self.parts.insert(extent, after);
        }
        before
    }
}

fn without(bits: Bits, others: Bits) -> Bits {
    std::array::from_fn(|word| bits[word] & !others[word])
}

impl Owner {
    pub(crate) async fn scrub(self: Rc<Self>, repair: bool) -> Result<(), PoolError> {
        if !self.view().is_redundant {
            return Err(PoolError::Wrong(format!("pool {} has nothing to compare", self.shared.name)));
        }
        let _turn = self.turns.superblock.take().await;
        let cannot = |status| self.failed("cannot be scrubbed", status);
        self.check_writable().map_err(cannot)?;
        if self.work.scrub.get().is_some() {
            return Err(PoolError::Conflict(format!("pool {} is being scrubbed", self.shared.name)));
        }
        self.work.scrub.set(Some(ScrubRecord { repair, ..ScrubRecord::default() }));
        if let Err(status) = self.record_members().await {
            self.work.scrub.set(None);
            return Err(cannot(status));
        }
        // What is told of the last one is not told of this one.
        self.work.last[1].set(None);
        self.work.cut_short.replace(None);
        self.publish();
        Ok(())
    }

    /// The pool cannot be scrubbed any more.
    pub(super) fn give_up_scrub(&self) {
        let why = self.ended();
        if let Some(why) = why.filter(|_| self.work.scrub.get().is_some()) {
            log::error!("pool {}: the scrub ends early: {why}", self.shared.name);
            self.work.cut_short(why, self.runtime.now());
            self.publish();
        }
    }

    /// Whether it does not go on here, and why is told.
    fn is_scrub_over(&self) -> bool {
        if self.is_closing.get() {
            // The next opening goes on.
            self.work.forget(SCRUB);
            return true;
        }
        self.give_up_scrub();
        self.work.scrub.get().is_none()
    }

    /// Compares the copies of everything that somebody can read, from where the scrub is that was asked for.
    pub(super) async fn go_on_scrubbing(self: &Rc<Self>) {
        if self.work.scrub.get().is_some() {
            // Whoever asked for it may be writing that down.
            drop(self.turns.superblock.take().await);
        }
        let Some(mut scrub) = self.work.scrub.get() else { return };
        let extent_bytes = self.view().thin.extent_bytes;
        let (volumes, total) = {
            let meta = self.meta.borrow();
            let volumes: Vec<u32> =
                meta.volumes().map(|(id, _)| id).filter(|id| *id >= scrub.volume).collect();
            (volumes, meta.volumes().map(|(_, volume)| volume.mapped_extents()).sum::<u64>())
        };
        self.work.begin(SCRUB, total.saturating_sub(scrub.done) * extent_bytes, self.runtime.now());
        self.work.found(&scrub);
        if scrub.done > 0 {
            coverage::count(coverage::Event::ScrubResumed);
        }
        let step = (total / STEPS).max(1);
        let mut seen = Seen::default();
        for id in volumes {
            let mut at = Some(if id == scrub.volume { scrub.index } else { 0 });
            while let Some(index) = at.and_then(|at| self.meta.borrow().next_mapped(id, at)) {
                at = index.checked_add(1);
                if self.is_scrub_over() {
                    return;
                }
                let found = self.scrub_index(id, index, scrub.repair, &mut seen).await;
                if self.is_scrub_over() {
                    // It may not have been compared to its end.
                    return;
                }
                (scrub.volume, scrub.index) = (id, index.saturating_add(1));
                scrub.done = scrub.done.saturating_add(1);
                scrub.mismatches = scrub.mismatches.saturating_add(found.mismatches);
                scrub.data_faults = scrub.data_faults.saturating_add(found.data_faults);
                scrub.parity_faults = scrub.parity_faults.saturating_add(found.parity_faults);
                scrub.failures = scrub.failures.saturating_add(found.failures);
                self.work.scrub.set(Some(scrub));
                self.work.add(extent_bytes, 0);
                self.work.found(&scrub);
                if scrub.done.is_multiple_of(step) {
                    let _turn = self.turns.superblock.take().await;
                    if !self.is_closing.get() {
                        // Who cannot have it is found out by writes that matter.
                        let _ = self.record_members().await;
                    }
                }
                self.take_time(extent_bytes * 2).await;
            }
        }
        self.end_scrub(scrub.repair).await;
    }

    async fn end_scrub(self: &Rc<Self>, repair: bool) {
        let mut tables = Ok(());
        if repair && !self.is_closing.get() {
            // The tables too: all of them anew, on all who have them.
            tables = self.checkpoint(true).await;
        }
        let _turn = self.turns.superblock.take().await;
        if self.is_scrub_over() {
            return;
        }
        match tables {
            Ok(()) => {
                self.work.scrub.set(None);
                self.work.end(self.runtime.now());
            }
            Err(status) => {
                let why = format!("the tables cannot be written anew: {}", status.name());
                self.work.cut_short(why, self.runtime.now());
            }
        }
        if let Err(status) = self.record_members().await {
            log::warn!(
                "pool {}: members cannot be told that the scrub has ended, and it may begin where they know it: {}",
                self.shared.name,
                status.name()
            );
        }
        self.publish();
    }

    /// What one index of a volume shows: its own extent, and what shows where that has nothing.
    async fn scrub_index(self: &Rc<Self>, id: u32, index: u32, repair: bool, seen: &mut Seen) -> Tally {
        let full = self.view().thin.full_bits();
        let own = match self.meta.borrow().entry(id, index) {
            Mapped::None => return Tally::default(),
            Mapped::Full { extent, .. } => (extent, full),
            Mapped::Partial { extent, bits, .. } => (extent, bits),
        };
        let mut tally = self.scrub_extent(own, repair, seen).await;
        // As it is now: it may have been let go of.
        let fallback = match self.meta.borrow().entry(id, index) {
            Mapped::Partial { fallback, bits, .. } if fallback != NONE => {
                Some((fallback, without(full, bits)))
            }
            _ => None,
        };
        if let Some(fallback) = fallback {
            tally += self.scrub_extent(fallback, repair, seen).await;
        }
        self.work.compared.set(None);
        tally
    }

    /// Whether what is being compared still counts.
    fn is_compared(&self) -> bool {
        self.may_mend().is_ok() && self.work.compared.get().is_some()
    }

    /// Units of an extent, until nobody has it any more.
    async fn scrub_extent(
        self: &Rc<Self>,
        (extent, bits): (u32, Bits),
        repair: bool,
        seen: &mut Seen,
    ) -> Tally {
        let view = self.view();
        let before = seen.add(extent, bits, view.thin.full_bits());
        // Somebody has it: the caller has just looked.
        self.work.compared.set(Some(extent));
        let (set, address) = view.array.locate(extent);
        let set = Arc::clone(view.array.set(set));
        let mut tally = Tally::default();
        if without(bits, before) == Bits::default() {
            return tally;
        }
        if let Some(parity) = set.parity() {
            let stripe = parity.stripes.stripe_bytes();
            let strip = u64::from(set.strip_bytes());
            for first in (0..view.thin.extent_bytes).step_by(usize::try_from(stripe).unwrap_or(usize::MAX)) {
                self.give_way().await;
                if !self.is_compared() {
                    return tally;
                }
                let number = (address + first) / stripe;
                let work = self.scrub_stripe(&view, &set, number, (first, bits, before), repair);
                tally += self.in_window(&set, number * strip..(number + 1) * strip, work).await;
            }
            return tally;
        }
        let parts: Vec<_> = runs(without(bits, before), view.thin.unit_shift(), 0, view.thin.extent_bytes)
            .filter(|(valid, ..)| *valid)
            .collect();
        for (_, within, len) in parts {
            for piece in set.pieces(address + within, len).collect::<Vec<_>>() {
                self.give_way().await;
                if !self.is_compared() {
                    return tally;
                }
                let work = self.compare(&set, &piece, repair);
                tally += self.in_window(&set, window_of(&piece), work).await;
            }
        }
        tally
    }

    /// Which columns of a stripe do not go together, of those that somebody can read: what nobody has written has no parity. `first` is
    /// where the stripe begins in its extent, of which the units `bits` are looked at, and `before` were.
    async fn scrub_stripe(
        self: &Rc<Self>,
        view: &View,
        set: &Set,
        number: u64,
        (first, bits, before): (u64, Bits, Bits),
        repair: bool,
    ) -> Tally {
        let strip = u64::from(set.strip_bytes());
        let step = strip.min(u64::from(view.thin.unit_bytes));
        let unit_shift = view.thin.unit_shift();
        let mut tally = Tally::default();
        for within in (0..strip).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
            let row = Row::new(view, set, number, within, usize::try_from(step).unwrap_or(0));
            let has = |bits: Bits| {
                (0..row.data() as u64).any(|slot| {
                    let at = first + slot * strip + within;
                    runs(bits, unit_shift, at, step).any(|(valid, ..)| valid)
                })
            };
            if !has(bits) || has(before) {
                continue;
            }
            let wanted = if repair { Wanted::Repaired } else { Wanted::Compared };
            let found = self.scrub_columns(&row, wanted).await;
            if self.work.compared.get().is_none() {
                return tally;
            }
            match found {
                Ok(found) => {
                    let has = |fault: Fault| u64::from(found.iter().any(|it| it.fault == fault));
                    tally.mismatches += u64::from(!found.is_empty());
                    tally.data_faults += has(Fault::Data);
                    tally.parity_faults += has(Fault::Parity);
                    // Who is out was not compared, or could not be written.
                    tally.failures += u64::from(row.in_sync() != row.all_data() | row.all_parity());
                }
                Err(status) => {
                    log::error!(
                        "pool {}: some bytes of stripe {number} cannot be read, or not be rewritten: {}",
                        self.shared.name,
                        status.name()
                    );
                    tally.failures += 1;
                }
            }
        }
        tally
    }

    /// Which copies of a piece differ from the first that can be read. Nothing is taken for wrong, and overwritten, while one of them does not say what it holds.
    async fn compare(self: &Rc<Self>, set: &Arc<Set>, piece: &Piece, repair: bool) -> Tally {
        let view = &self.view();
        let len = piece.len as usize;
        let is_in_sync = |member: u16| set.mode(member - set.first_member()) == Mode::InSync;
        let mut tally = Tally::default();
        let mut first: Option<(u16, Rc<Bounce>)> = None;
        let (mut wrong, mut bad, mut is_told) = (Vec::new(), Vec::new(), true);
        for copy in piece.copies.as_slice() {
            let leaf = view.leaves[usize::from(copy.member)].as_ref();
            let Some(leaf) = leaf.filter(|_| is_in_sync(copy.member)) else {
                tally.failures += 1;
                continue;
            };
            let bounce = Rc::new(self.place.spare.take(len));
            let read = self.lanes.read(leaf, view.data_offset + copy.offset, &bounce, 0, len).await;
            match (read, &first) {
                (Ok(()), _) if !is_in_sync(copy.member) => tally.failures += 1,
                (Ok(()), None) => first = Some((copy.member, bounce)),
                (Ok(()), Some((_, first))) if bounce.bytes(0, len) == first.bytes(0, len) => {}
                (Ok(()), Some((from, first))) => {
                    wrong.push(*copy);
                    let pairs = bounce.bytes(0, len).iter().zip(first.bytes(0, len));
                    let at = copy.offset + pairs.take_while(|(one, other)| one == other).count() as u64;
                    log::warn!(
                        "pool {}: {} differs from {} at byte {at} of its data",
                        self.shared.name,
                        self.device_name(copy.member),
                        self.device_name(*from)
                    );
                }
                (Err(Status::Media), _) => bad.push(copy.member),
                (Err(status), _) => {
                    log::warn!(
                        "pool {}: {} cannot be compared at {} of its data: {}",
                        self.shared.name,
                        self.device_name(copy.member),
                        copy.offset,
                        status.name()
                    );
                    tally.failures += 1;
                    is_told = false;
                }
            }
        }
        if self.work.compared.get().is_none() {
            // It was let go of while it was read, and may have been discarded.
            return Tally::default();
        }
        let Some((_, first)) = first.filter(|(from, _)| is_in_sync(*from)) else {
            log::error!("pool {}: no copy of some bytes can be read", self.shared.name);
            return Tally { failures: 1, ..Tally::default() };
        };
        tally.mismatches += wrong.len() as u64;
        let is_failed = |outcome: Outcome, member: u16| u64::from(outcome.is_err() || !is_in_sync(member));
        if repair && is_told {
            for copy in wrong {
                tally.failures += is_failed(self.rewrite_copy(&copy, &first, len).await, copy.member);
            }
        }
        // A copy that could not be read counts where it is not rewritten.
        if !bad.is_empty() {
            let rewritten = self.rewrite_bad(set, piece).await;
            tally.failures += bad.into_iter().map(|member| is_failed(rewritten, member)).sum::<u64>();
        }
        tally
    }

    async fn rewrite_copy(self: &Rc<Self>, copy: &Copy, content: &Rc<Bounce>, len: usize) -> Outcome {
        self.may_mend()?;
        let (view, since) = (self.view(), self.shared.joins());
        let leaf = view.leaves[usize::from(copy.member)].as_ref().ok_or(Status::Path)?;
        match self.lanes.write(leaf, view.data_offset + copy.offset, content, 0, len, false).await {
            Ok(()) => Ok(()),
            Err(status) => self.report_lacking(copy.member, status, since).await,
        }
    }
}
