//! Whether the copies of what somebody can read are the same.

use super::Owner;
use super::resync::{SCRUB, window_of};
use crate::pool::PoolError;
use crate::pool::resolve::runs;
use crate::pool::shared::View;
use crate::pool::stripes::Row;
use crate::raid::{Mode, Piece, Set};
use crate::thin::Mapped;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

impl Owner {
    pub(crate) async fn scrub(self: Rc<Self>, repair: bool) -> Result<(), PoolError> {
        if !self.view().is_redundant {
            return Err(PoolError::Wrong(format!("pool {} has nothing to compare", self.shared.name)));
        }
        let mut wanted = self.work.scrub_wanted.borrow_mut();
        if wanted.is_some() || self.work.running.get().is_some_and(|running| running.kind == SCRUB) {
            return Err(PoolError::Conflict(format!("pool {} is being scrubbed", self.shared.name)));
        }
        *wanted = Some(repair);
        // What is told of the last one is not told of this one.
        self.work.last[1].set(None);
        drop(wanted);
        self.publish();
        Ok(())
    }

    /// Compares the copies of everything that somebody can read.
    pub(super) async fn scrub_all(self: &Rc<Self>, repair: bool) {
        let view = self.view();
        let extent_bytes = view.thin.extent_bytes;
        let volumes: Vec<u32> = self.meta.borrow().volumes().map(|(id, _)| id).collect();
        let total = self.meta.borrow().volumes().map(|(_, volume)| volume.mapped_extents()).sum::<u64>()
            * extent_bytes;
        self.work.begin(SCRUB, total, self.runtime.now());
        let mut seen = BTreeSet::new();
        for id in volumes {
            let mut at = Some(0);
            while let Some(index) = at.and_then(|at| self.meta.borrow().next_mapped(id, at)) {
                at = index.checked_add(1);
                if self.is_closing.get() || self.lost.borrow().is_some() {
                    break;
                }
                let began = self.runtime.now();
                let mismatches = self.scrub_extent(id, index, repair, &mut seen).await;
                self.work.add(extent_bytes, mismatches);
                self.throttle(began, extent_bytes * 2).await;
            }
        }
        if repair {
            // The tables too: all of them anew, on all who have them.
            let _ = self.checkpoint(true).await;
        }
        self.work.end(self.runtime.now());
        self.publish();
    }

    async fn scrub_extent(
        self: &Rc<Self>,
        id: u32,
        index: u32,
        repair: bool,
        seen: &mut BTreeSet<u32>,
    ) -> u64 {
        let mapped = self.meta.borrow().entry(id, index);
        let (extent, bits) = match mapped {
            Mapped::None => return 0,
            Mapped::Full { extent, .. } => (extent, self.view().thin.full_bits()),
            Mapped::Partial { extent, bits, .. } => (extent, bits),
        };
        if !seen.insert(extent) {
            return 0;
        }
        let view = self.view();
        let (set, address) = view.array.locate(extent);
        let set = Arc::clone(view.array.set(set));
        let mut mismatches = 0;
        if let Some(parity) = set.parity() {
            let stripe = parity.stripes.stripe_bytes();
            let strip = u64::from(set.strip_bytes());
            for first in (0..view.thin.extent_bytes).step_by(usize::try_from(stripe).unwrap_or(usize::MAX)) {
                let number = (address + first) / stripe;
                let work = self.scrub_stripe(&view, &set, number, (first, bits), repair);
                mismatches += self.in_window(&set, number * strip..(number + 1) * strip, work).await;
            }
            return mismatches;
        }
        let parts: Vec<_> = runs(bits, view.thin.unit_shift(), 0, view.thin.extent_bytes)
            .filter(|(valid, ..)| *valid)
            .collect();
        for (_, within, len) in parts {
            for piece in set.pieces(address + within, len).collect::<Vec<_>>() {
                let work = self.compare(&set, &piece, repair);
                mismatches += self.in_window(&set, window_of(&piece), work).await;
            }
        }
        mismatches
    }

    /// How many columns of a stripe do not go together, of those that somebody can read: what nobody has written has no parity. `first` is
    /// where the stripe begins in its extent, whose valid units are `bits`.
    async fn scrub_stripe(
        self: &Rc<Self>,
        view: &View,
        set: &Set,
        number: u64,
        (first, bits): (u64, [u64; 4]),
        repair: bool,
    ) -> u64 {
        let strip = u64::from(set.strip_bytes());
        let step = strip.min(u64::from(view.thin.unit_bytes));
        let unit_shift = view.thin.unit_shift();
        let mut mismatches = 0;
        for within in (0..strip).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
            let row = Row::new(view, set, number, within, usize::try_from(step).unwrap_or(0));
            let is_valid = (0..row.data() as u64).any(|slot| {
                let at = first + slot * strip + within;
                runs(bits, unit_shift, at, step).any(|(valid, ..)| valid)
            });
            if !is_valid {
                continue;
            }
            match self.scrub_columns(&row, repair).await {
                Ok(found) => mismatches += found,
                Err(status) => {
                    log::error!(
                        "pool {}: some bytes of stripe {number} cannot be read: {}",
                        self.shared.name,
                        status.name()
                    );
                    mismatches += 1;
                }
            }
        }
        mismatches
    }

    /// How many copies of a piece differ from the first.
    async fn compare(self: &Rc<Self>, set: &Arc<Set>, piece: &Piece, repair: bool) -> u64 {
        let view = &self.view();
        let len = piece.len as usize;
        let first = Rc::new(self.place.spare.take(len));
        let from = match self.read_first(view, set, piece, &first, 0).await {
            Ok(from) => from,
            Err(status) => {
                log::error!(
                    "pool {}: no copy of some bytes can be read: {}",
                    self.shared.name,
                    status.name()
                );
                return 1;
            }
        };
        let mut mismatches = 0;
        let mut has_bad = false;
        for copy in piece.copies.as_slice().iter().filter(|copy| copy.member != from.member) {
            let Some(leaf) = &view.leaves[usize::from(copy.member)] else { continue };
            if set.mode(copy.member - set.first_member()) != Mode::InSync {
                continue;
            }
            let other = Rc::new(self.place.spare.take(len));
            match self.lanes.read(leaf, view.data_offset + copy.offset, &other, 0, len).await {
                Ok(()) if other.bytes(0, len) == first.bytes(0, len) => {}
                Ok(()) => {
                    mismatches += 1;
                    let pairs = other.bytes(0, len).iter().zip(first.bytes(0, len));
                    let at = copy.offset + pairs.take_while(|(one, other)| one == other).count() as u64;
                    log::warn!(
                        "pool {}: {} differs from {} at byte {at} of its data",
                        self.shared.name,
                        self.device_name(copy.member),
                        self.device_name(from.member)
                    );
                }
                Err(_) => has_bad = true,
            }
        }
        // A copy that could not be read counts where it is rewritten.
        if has_bad || (repair && mismatches > 0) {
            let _ = match repair && mismatches > 0 {
                true => self.copy_piece(set, piece, None).await,
                false => self.rewrite_bad(set, piece).await,
            };
        }
        mismatches
    }
}
