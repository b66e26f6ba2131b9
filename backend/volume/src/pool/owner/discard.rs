//! Extents that nobody has are told to the members as not needed, where the pool is asked to.
//!
//! Where parity is, it goes too: nobody needs it.
//!
//! When: the record that freed them is durable, and everybody who could name them has ended; before anybody gets them again. A discard
//! that failed may still be carried out, as a write may: the member is out, or they wait. Not, because parity is made of what stands where
//! nobody has written: of a member with parity that is being replaced, since two devices need not hold the same after it; of a device
//! that does not promise zeroes, since it need not read the same twice; and of stripes of which something is in the parity log, since an opening
//! would put that back, beside parity that was made of zeroes.

use super::Owner;
use crate::plan;
use crate::pool::coverage;
use crate::pool::lanes::Leaf;
use crate::pool::wait::all;
use crate::raid::Mode;
use crate::simulated::is_broken;
use hawser_block::{Outcome, Status};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;

/// The most that one discard covers: devices take their time.
const DISCARD_BYTES_MAX: u64 = 64 << 20;

impl Owner {
    /// Tells the members that have them.
    pub(super) async fn discard_extents(self: &Rc<Self>, extents: impl Iterator<Item = &u32>) -> Outcome {
        let mut extents: Vec<u32> = extents.copied().collect();
        extents.sort_unstable();
        if !is_broken("discards_of_logged") {
            self.take_out_of_log(&mut extents).await?;
        }
        let (view, since) = (self.view(), self.shared.joins());
        let mut wanted: BTreeMap<u16, Vec<Range<u64>>> = BTreeMap::new();
        for extent in extents {
            let (set, address) = view.array.locate(extent);
            let set = view.array.set(set);
            if let Some(parity) = set.parity() {
                // Whole stripes, with their parity, which nobody trusts any more.
                let (whole, strip) = (parity.stripes.stripe_bytes(), u64::from(set.strip_bytes()));
                let (first, end) = (address / whole, (address + view.thin.extent_bytes) / whole);
                let there = (0..set.members()).filter(|place| set.mode(*place) != Mode::Away);
                for member in there.map(|place| set.first_member() + place) {
                    let rows = view.data_offset + first * strip..view.data_offset + end * strip;
                    add(wanted.entry(member).or_default(), rows);
                }
                continue;
            }
            for piece in set.pieces(address, view.thin.extent_bytes) {
                for copy in piece.copies.as_slice() {
                    if set.mode(copy.member - set.first_member()) == Mode::Away {
                        continue;
                    }
                    let at = view.data_offset + copy.offset;
                    add(wanted.entry(copy.member).or_default(), at..at + u64::from(piece.len));
                }
            }
        }
        // One after the other at each member, all members at the same time.
        let members = wanted.into_iter().filter_map(|(member, mut ranges)| {
            let leaf = view.leaves[usize::from(member)].clone()?;
            let has_parity = self.place_of(member).0.parity().is_some();
            if leaf.twin.is_some() && has_parity && !is_broken("discards_of_twins") {
                return None;
            }
            ranges.sort_unstable_by_key(|range| range.start);
            Some(async move { (member, self.discard_ranges(&leaf, ranges, has_parity).await) })
        });
        for (member, outcome) in all(members).await {
            if let Err(status) = outcome {
                self.may_discard()?;
                self.report(1 << member, status, since).await?;
            }
        }
        Ok(())
    }

    /// Who has the pool next may have given these extents to somebody.
    fn may_discard(&self) -> Outcome {
        match is_broken("discards_outlive_close") {
            true => Ok(()),
            false => self.check_writable(),
        }
    }

    /// Has the parity log forget what it has of these extents, which nobody writes to any more. Those of which it still has something are not
    /// among them when it ends: others are still at work at what came before.
    async fn take_out_of_log(self: &Rc<Self>, extents: &mut Vec<u32>) -> Outcome {
        let view = self.view();
        let logged = || -> Vec<BTreeSet<u64>> {
            let sets = view.array.sets().iter();
            sets.map(|set| set.parity().map_or_else(BTreeSet::new, |parity| parity.ring().rows())).collect()
        };
        let is_in = |rows: &[BTreeSet<u64>], extent: u32| {
            let (set, address) = view.array.locate(extent);
            let Some(parity) = view.array.set(set).parity() else { return false };
            let stripe = parity.stripes.stripe_bytes();
            let all = address / stripe..(address + view.thin.extent_bytes) / stripe;
            rows[set].range(all).next().is_some()
        };
        let before = logged();
        let sets: BTreeSet<usize> = extents
            .iter()
            .filter(|extent| is_in(&before, **extent))
            .map(|extent| view.array.locate(*extent).0)
            .collect();
        if sets.is_empty() {
            return Ok(());
        }
        for set in sets {
            self.release_stripes(view.array.set(set)).await?;
        }
        let left = logged();
        extents.retain(|extent| !is_in(&left, *extent));
        Ok(())
    }

    async fn discard_ranges(
        self: &Rc<Self>,
        leaf: &Leaf,
        ranges: Vec<Range<u64>>,
        has_parity: bool,
    ) -> Outcome {
        let Some(limits) = leaf.device.geometry().and_then(|geometry| geometry.discard) else {
            return Ok(());
        };
        if has_parity && !limits.reads_zeroes {
            return Ok(());
        }
        let grain = u64::from(limits.granularity_blocks.max(1)) << leaf.shift;
        // What is longer is refused.
        let most = u64::from(plan::offered(limits.blocks_max, limits.granularity_blocks)) << leaf.shift;
        let most = most.min(DISCARD_BYTES_MAX).max(grain) / grain * grain;
        let mut joined: Vec<Range<u64>> = Vec::new();
        ranges.into_iter().for_each(|range| add(&mut joined, range));
        for range in joined {
            let (mut at, end) = (range.start.div_ceil(grain) * grain, range.end / grain * grain);
            while at < end {
                self.may_discard()?;
                let len = most.min(end - at);
                match self.lanes.discard(leaf, at, len).await {
                    // It need not be able to.
                    Ok(()) | Err(Status::Unsupported | Status::Invalid) => {}
                    Err(status) => return Err(status),
                }
                coverage::count(coverage::Event::Discarded);
                at += len;
            }
        }
        Ok(())
    }
}

/// Adds a range, which may go on where the last one ends.
fn add(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}
