//! A volatile cache was lost with what no other member has. Where it held the first that was ever written to a unit, the member has what stood
//! there before: another volume's, maybe. Such units show again what they covered, at once and without I/O, while reads and writes wait
//! ([`crate::pool::lost_caches`]). That they were written is told by the volume's next FLUSH, which fails.
//!
//! Only units that became valid with a `Valid` which is in no durable batch are concerned: a batch is written when the data of its records is
//! durable. So those records are made to name no units, in the tail and for the log, and the tables are made as they would be then. To that end:
//!
//! - A unit that becomes valid while an extent is mapped was copied, and is flushed before ([`Owner::map`]).
//! - What is about to be shared by a snapshot is flushed before, so that all that is taken back is the volume's own; and so is what units are
//!   valid before some of them become invalid. Other records do not depend on which units are valid.
//! - What the last `Valid` of an extent let go of is not used again before that is durable.

use super::{Owner, Pending};
use crate::format::{NONE, Record};
use crate::pool::coverage;
use crate::pool::lost_caches::Seen;
use crate::raid::{Piece, Set};
use crate::simulated::is_broken;
use crate::thin::{Bits, Mapped};
use hawser_block::Outcome;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// Units of an extent that have been written, and were not valid before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written {
    pub(super) volume: u32,
    pub(super) index: u32,
    pub(super) bits: Bits,
    pub(super) extent: u32,
    /// What showed where they were not, and was let go of with the last of them; or [`NONE`].
    pub(super) covered: u32,
    /// How many caches had been lost when they were written.
    pub(super) lost_before: u64,
}

impl Written {
    pub(super) fn is_of(&self, volume: u32, index: u32) -> bool {
        (self.volume, self.index) == (volume, index)
    }
}

impl Owner {
    /// Members have flushed: whether the data of records before `upto` is durable, which was written before. `seen`: as it was before they did.
    pub(super) fn are_flushed(&self, seen: Seen, upto: u64) -> bool {
        let now = self.shared.lost_caches.look();
        // What was lost before they began is told to have been flushed, too.
        let are_they =
            now.number() == seen.number() && !now.is_open() || is_broken("flushed_over_lost_cache");
        if are_they {
            self.flushed.set(self.flushed.get().max(upto));
        }
        are_they
    }

    /// Makes durable what such units have.
    pub(super) async fn settle_written(self: &Rc<Self>, is_it: impl Fn(&Written) -> bool) -> Outcome {
        let flushed = || self.flushed.get();
        let is_there = || {
            let pending = self.pending.borrow();
            pending.iter().any(|it| it.seq >= flushed() && it.written.as_ref().is_some_and(&is_it))
        };
        while is_there() && !is_broken("written_not_settled") {
            Box::pin(self.flush()).await?;
        }
        Ok(())
    }

    /// Takes back what was written to these members of a set, by place, before so many caches had been lost. The tail is to be written anew.
    pub(super) fn take_back(&self, set: &Arc<Set>, places: &[u16], lost: u64) {
        if is_broken("lost_units_kept") {
            return;
        }
        let view = self.view();
        let is_there = |extent: u32| {
            let (other, address) = view.array.locate(extent);
            let is_on = |piece: Piece| {
                let mut copies = piece.copies.as_slice().iter();
                copies.any(|copy| places.contains(&(copy.member - set.first_member())))
            };
            Arc::ptr_eq(view.array.set(other), set)
                && (set.parity().is_some() || set.pieces(address, view.thin.extent_bytes).any(is_on))
        };
        let mut units: BTreeMap<(u32, u32, u32), (Bits, u32)> = BTreeMap::new();
        for pending in self.pending.borrow_mut().iter_mut().filter(|it| it.seq >= self.flushed.get()) {
            let Some(written) = pending.written.filter(|written| is_there(written.extent)) else { continue };
            let key = (written.volume, written.index, written.extent);
            let (bits, covered) = units.entry(key).or_insert(([0; 4], NONE));
            if written.covered != NONE {
                *covered = written.covered;
            }
            if written.lost_before < lost {
                bits.iter_mut().zip(written.bits).for_each(|(all, bits)| *all |= bits);
                let Written { volume, index, .. } = written;
                *pending = Pending::new(pending.seq, &Record::Valid { volume, index, bits: [0; 4] });
            }
        }
        let mut taken = 0;
        for ((volume, index, extent), (bits, covered)) in units {
            let mut meta = self.meta.borrow_mut();
            let is_there = match meta.entry(volume, index) {
                Mapped::Full { extent: there, .. } | Mapped::Partial { extent: there, .. } => there == extent,
                Mapped::None => false,
            };
            if !is_there && covered != NONE {
                // Whoever let go of the extent since lets go of what it covered too, and may be lost still.
                let last = self.seq.get().saturating_sub(1);
                let mut freed = self.freed.borrow_mut();
                let its = freed.iter_mut().filter(|(_, freed)| freed.extents().contains(&covered));
                its.for_each(|(seq, _)| *seq = last);
            }
            if bits == [0; 4] || !is_there {
                continue;
            }
            taken += bits.iter().map(|word| word.count_ones()).sum::<u32>();
            if meta.take_back(volume, index, bits, covered) {
                let mut freed = self.freed.borrow_mut();
                let found = freed.iter_mut().any(|(_, freed)| freed.takes_back(covered));
                assert!(found, "extent {covered} is not used again while what let go of it may be lost");
            }
        }
        if taken > 0 {
            coverage::count(coverage::Event::TakenBack);
            log::error!(
                "pool {}: {taken} units that had just been written for the first time are lost, and read as before",
                self.shared.name
            );
        }
    }
}
