//! Extents for who writes, and what becomes of those that nobody needs.

use super::{Owner, Written};
use crate::format::{NONE, Record};
use crate::pool::NoSpacePolicy;
use crate::pool::bounce::Bounce;
use crate::pool::coverage;
use crate::pool::lost_caches::Seen;
use crate::pool::resolve::runs;
use crate::pool::shared::{Class, View, lock};
use crate::pool::stripes::{Change, Changed, IsValid};
use crate::pool::wait::{Bell, all};
use crate::raid::{Mode, Parity, Piece, Set, Slow};
use crate::simulated::is_broken;
use crate::thin::Mapped;
use hawser_block::{Outcome, Status};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Chunks of deleted volumes that are let go of without a pause.
const RELEASE_CHUNKS: usize = 64;
/// Extents that are unmapped in one go.
const UNMAP_EXTENTS: u32 = 256;

/// Who is at work at an extent of a volume: several who write whole units, or one who does not.
#[derive(Default)]
pub(crate) struct Locks {
    held: RefCell<BTreeMap<(u32, u32), Held>>,
    mapping: RefCell<BTreeSet<(u32, u32)>>,
    bell: Bell,
}

/// Somebody looks for an extent for an index, until it is dropped.
struct Mapping<'a> {
    locks: &'a Locks,
    key: (u32, u32),
}

impl Drop for Mapping<'_> {
    fn drop(&mut self) {
        self.locks.mapping.borrow_mut().remove(&self.key);
        self.locks.bell.ring();
    }
}

#[derive(Default)]
struct Held {
    shared: usize,
    exclusive: bool,
    /// Those who want to be alone come before others that are still to come.
    wanted: usize,
}

impl Locks {
    async fn take(&self, key: (u32, u32), exclusive: bool) {
        if !exclusive {
            let get = || {
                let mut held = self.held.borrow_mut();
                let held = held.entry(key).or_default();
                let is_free = !held.exclusive && held.wanted == 0;
                held.shared += usize::from(is_free);
                is_free.then_some(())
            };
            return self.bell.until(get).await;
        }
        self.held.borrow_mut().entry(key).or_default().wanted += 1;
        let get = || {
            let mut held = self.held.borrow_mut();
            let held = held.entry(key).or_default();
            if held.exclusive || held.shared > 0 {
                return None;
            }
            (held.exclusive, held.wanted) = (true, held.wanted - 1);
            Some(())
        };
        self.bell.until(get).await;
    }

    /// Whether nobody else looks for an extent for this index.
    fn begin_mapping(&self, key: (u32, u32)) -> bool {
        self.mapping.borrow_mut().insert(key)
    }

    /// Waits until nobody looks for an extent for this index.
    async fn mapped(&self, key: (u32, u32)) {
        self.bell.until(|| (!self.mapping.borrow().contains(&key)).then_some(())).await;
    }

    fn release(&self, key: (u32, u32), exclusive: bool) {
        let mut map = self.held.borrow_mut();
        let held = map.get_mut(&key).expect("who releases has taken");
        match exclusive {
            true => held.exclusive = false,
            false => held.shared -= 1,
        }
        if held.shared == 0 && !held.exclusive && held.wanted == 0 {
            map.remove(&key);
        }
        drop(map);
        self.bell.ring();
    }
}

impl Owner {
    /// Waits until a volume may change, with room in the tail; nothing has been awaited since when it ends.
    async fn changeable(self: &Rc<Self>, volume: u32) -> Outcome {
        loop {
            self.check_writable()?;
            self.room().await?;
            if !self.frozen.borrow().contains(&volume) {
                return self.check_writable();
            }
            self.bell.until(|| (!self.frozen.borrow().contains(&volume)).then_some(())).await;
        }
    }

    /// Makes `within..within + len` of an extent of a volume writable: it is mapped, its own, and its regions are marked. The extent is
    /// held until [`Owner::finish`] when this is `Ok`.
    pub(crate) async fn prepare(
        self: Rc<Self>,
        volume: u32,
        index: u32,
        (within, len): (u64, u64),
        exclusive: bool,
        given_up: Arc<AtomicBool>,
    ) -> Outcome {
        let mut is_counted = false;
        loop {
            self.check_writable()?;
            self.locks.take((volume, index), exclusive).await;
            let prepared = async {
                let extent = self.map(volume, index).await?;
                // Units that are not valid are written whole.
                let unit = u64::from(self.view().thin.unit_bytes);
                let from = within / unit * unit;
                let to = ((within + len).div_ceil(unit) * unit).min(self.view().thin.extent_bytes);
                self.mark_extent(extent, from, to - from).await?;
                self.out_of_window(extent, from, to - from).await;
                Ok(())
            };
            let outcome = prepared.await;
            if outcome.is_err() {
                self.locks.release((volume, index), exclusive);
            }
            if outcome != Err(Status::NoSpace) || self.options.no_space == NoSpacePolicy::Error {
                return outcome;
            }
            // When it begins to wait: it may wait for ever.
            if !std::mem::replace(&mut is_counted, true)
                && let Some(shown) = lock(&self.shared.volumes).get(&volume)
            {
                shown.count(Class::NoSpace);
            }
            // Whoever makes space may need this extent.
            if given_up.load(Ordering::Relaxed) {
                return Err(Status::Aborted);
            }
            self.runtime.sleep(Duration::from_millis(100)).await;
        }
    }

    /// The extent at this index, which is the volume's own from now on.
    async fn map(self: &Rc<Self>, volume: u32, index: u32) -> Result<u32, Status> {
        loop {
            self.changeable(volume).await?;
            let (mapped, is_exclusive, can_rebirth, birth) = {
                let meta = self.meta.borrow();
                if meta.volume(volume).is_none() {
                    return Err(Status::Invalid);
                }
                let is_exclusive = meta.is_exclusive(volume, index);
                let can_rebirth = !is_exclusive && meta.can_rebirth(volume, index);
                (meta.entry(volume, index), is_exclusive, can_rebirth, meta.generation())
            };
            let extent = match mapped {
                Mapped::None => NONE,
                Mapped::Full { extent, .. } | Mapped::Partial { extent, .. } => extent,
            };
            if is_exclusive {
                return Ok(extent);
            }
            if can_rebirth {
                // A power cut must not give it back to who held it too, with what is written to it from now on. Once is enough: it was let go of
                // before we looked.
                let seen = self.shared.lost_caches.look();
                if self.durable.get() < self.let_go.get() && !is_broken("rebirth_before_durable") {
                    Box::pin(self.flush()).await?;
                }
                // Whoever held it too may still be reading it.
                self.barrier().await;
                self.changeable(volume).await?;
                let is_same = {
                    let meta = self.meta.borrow();
                    meta.entry(volume, index) == mapped
                        && meta.can_rebirth(volume, index)
                        && meta.generation() == birth
                        // Who has let go may have taken it back, and let go again.
                        && self.shared.lost_caches.look() == seen
                };
                if !is_same {
                    continue;
                }
                self.make(&Record::Rebirth { volume, index, birth });
                return Ok(extent);
            }
            if !self.locks.begin_mapping((volume, index)) {
                // Another one who writes whole units is at it.
                self.locks.mapped((volume, index)).await;
                continue;
            }
            let mapping = Mapping { locks: &self.locks, key: (volume, index) };
            if !self.meta.borrow().has_room_for_metadata(1) {
                return Err(Status::NoSpace);
            }
            let Some(new) = self.meta.borrow_mut().allocate() else {
                drop(mapping);
                Box::pin(self.make_space()).await?;
                continue;
            };
            let fallback = match mapped {
                Mapped::None => NONE,
                Mapped::Full { extent, .. } => extent,
                Mapped::Partial { extent, fallback, bits, .. } => {
                    let seen = self.shared.lost_caches.look();
                    let copied = Box::pin(self.copy_partial(new, (extent, fallback, bits))).await;
                    // What it covers is let go of at once, and could not be shown again if the copy were lost with a cache.
                    let flushed = match copied {
                        Ok(()) if !is_broken("copy_not_durable") => Box::pin(self.flush_copies()).await,
                        _ => Ok(()),
                    };
                    let copied = match copied.and(flushed) {
                        Ok(()) => self.changeable(volume).await,
                        error => error,
                    };
                    // It may have been lost. Or others who write whole units may have been faster.
                    let is_late = self.shared.lost_caches.look() != seen
                        || self.meta.borrow().entry(volume, index) != mapped
                        || !self.meta.borrow().has_room_for_metadata(1);
                    if copied.is_err() || is_late {
                        self.meta.borrow_mut().give_back(new);
                        match copied {
                            // Somebody else's abort, or another time.
                            Err(Status::Aborted) => {
                                self.runtime.sleep(Duration::from_millis(10)).await;
                            }
                            copied => copied?,
                        }
                        continue;
                    }
                    let bits = if fallback == NONE { bits } else { self.all_units() };
                    let birth = self.meta.borrow().generation();
                    coverage::count(coverage::Event::CopyOnWrite);
                    self.make(&Record::Map { volume, index, birth, extent: new, fallback: NONE, bits });
                    return Ok(new);
                }
            };
            if fallback != NONE {
                coverage::count(coverage::Event::CopyOnWrite);
            }
            self.make(&Record::Map { volume, index, birth, extent: new, fallback, bits: [0; 4] });
            return Ok(new);
        }
    }

    fn all_units(&self) -> [u64; 4] {
        self.view().thin.full_bits()
    }

    /// Copies what a partial shows to a new extent.
    async fn copy_partial(
        self: &Rc<Self>,
        to: u32,
        (extent, fallback, bits): (u32, u32, [u64; 4]),
    ) -> Outcome {
        let view = self.view();
        let extent_bytes = view.thin.extent_bytes;
        let parts: Vec<_> = runs(bits, view.thin.unit_shift(), 0, extent_bytes)
            .filter_map(|(valid, at, len)| {
                let from = if valid { extent } else { fallback };
                (from != NONE).then_some((from, at, len))
            })
            .collect();
        let written = Rc::new(Cell::new([0; 4]));
        for (from, at, len) in parts {
            let (view, under_way) = loop {
                self.mark_extent(to, at, len).await?;
                let under_way = self.place.under_way();
                self.check_writable()?;
                // As it is now: members may have come since the last part.
                let view = self.view();
                let (set, address) = view.array.locate(to);
                let set = view.array.set(set);
                match set.pieces(address + at, len).find_map(|piece| set.writable(&piece).err()) {
                    None => break (view, under_way),
                    Some(Slow::Degraded) => return Err(Status::Path),
                    Some(_) => {
                        // It is just being resynchronised, or its mark was just being cleared.
                        drop(under_way);
                        self.runtime.sleep(Duration::from_micros(100)).await;
                    }
                }
            };
            let size = usize::try_from(len).expect("extents are small");
            let bounce = Rc::new(Bounce::zeroed(size));
            self.read_extent(&view, from, at, &bounce).await?;
            // Stripes wait until they may be changed, and who waits is not under way.
            let _under_way =
                view.array.sets()[view.array.locate(to).0].parity().is_none().then_some(under_way);
            self.write_extent(&view, to, at, &bounce, &written).await?;
            let mut bits = written.get();
            let unit_shift = view.thin.unit_shift();
            for unit in at >> unit_shift..(at + len).div_ceil(1 << unit_shift) {
                bits[usize::try_from(unit >> 6).unwrap_or(3)] |= 1 << (unit & 63);
            }
            written.set(bits);
        }
        Ok(())
    }

    /// Reads bytes of an extent from its first copies that are in sync.
    pub(crate) async fn read_extent(
        self: &Rc<Self>,
        view: &Arc<View>,
        extent: u32,
        within: u64,
        into: &Rc<Bounce>,
    ) -> Outcome {
        let (set, address) = view.array.locate(extent);
        let set = view.array.set(set);
        for piece in set.pieces(address + within, into.len() as u64) {
            let at = usize::try_from(piece.start).expect("extents are small");
            self.read_first(view, set, &piece, into, at).await?;
        }
        Ok(())
    }

    /// The same where there is parity. `within` is where in the extent at `address`.
    async fn write_stripes(
        self: &Rc<Self>,
        set: &Arc<Set>,
        parity: &Parity,
        (extent, address): (u32, u64),
        within: u64,
        from: &Rc<Bounce>,
        written: &Rc<Cell<[u64; 4]>>,
    ) -> Outcome {
        let (thin, stripe) = (self.view().thin, parity.stripes.stripe_bytes());
        let (strip, data) = (u64::from(set.strip_bytes()), u64::from(parity.stripes.data_strips()));
        let bits = Rc::clone(written);
        let is_valid: IsValid = Rc::new(move |row: u64, within: u64, len: u64| {
            let first = row * stripe - address;
            (0..data).any(|slot| {
                let at = first + slot * strip + within;
                runs(bits.get(), thin.unit_shift(), at, len).any(|(valid, ..)| valid)
            })
        });
        for touched in parity.stripes.touched(address + within, from.len() as u64) {
            let change = Change {
                from: touched.from,
                to: touched.to,
                bounce: Rc::clone(from),
                at: usize::try_from(touched.start).expect("extents are small"),
                is_valid: Rc::clone(&is_valid),
                is_alone: true,
            };
            while self.ways().change(set, touched.row, change.clone()).await? == Changed::NotNow {
                self.runtime.sleep(Duration::from_millis(1)).await;
                self.mark_extent(extent, within, from.len() as u64).await?;
            }
        }
        Ok(())
    }

    /// Writes bytes of an extent that nobody else uses to all copies. `written`: units of it that hold something already.
    async fn write_extent(
        self: &Rc<Self>,
        view: &Arc<View>,
        extent: u32,
        within: u64,
        from: &Rc<Bounce>,
        written: &Rc<Cell<[u64; 4]>>,
    ) -> Outcome {
        let (set, address) = view.array.locate(extent);
        let set = view.array.set(set);
        if let Some(parity) = set.parity() {
            return self.write_stripes(set, parity, (extent, address), within, from, written).await;
        }
        let since = self.shared.joins();
        let mut writes = Vec::new();
        for piece in set.pieces(address + within, from.len() as u64) {
            let at = usize::try_from(piece.start).expect("extents are small");
            for copy in piece.copies.as_slice() {
                if set.mode(copy.member - set.first_member()) == Mode::Away {
                    continue;
                }
                let leaf = view.leaves[usize::from(copy.member)].as_ref();
                writes.push((copy.member, leaf, view.data_offset + copy.offset, at, piece.len as usize));
            }
            let regions = if view.is_redundant { regions_of(set, &piece) } else { BTreeSet::new() };
            for region in regions {
                set.touched.mark(region);
            }
        }
        let requests = writes.into_iter().map(|(member, leaf, offset, at, len)| async move {
            let Some(leaf) = leaf else { return (member, Err(Status::Path)) };
            (member, self.lanes.write(leaf, offset, from, at, len, false).await)
        });
        for (member, outcome) in all(requests).await {
            if let Err(status) = outcome {
                self.report(1 << member, status, since).await?;
            }
        }
        Ok(())
    }

    /// Marks the regions of an extent's bytes.
    async fn mark_extent(self: &Rc<Self>, extent: u32, within: u64, len: u64) -> Outcome {
        let view = self.view();
        if !view.is_redundant {
            return Ok(());
        }
        let (set_index, address) = view.array.locate(extent);
        let set = view.array.set(set_index);
        if set.pieces(address + within, len).all(|piece| set.is_marked(&piece)) {
            return Ok(());
        }
        let regions: BTreeSet<u32> =
            set.pieces(address + within, len).flat_map(|piece| regions_of(set, &piece)).collect();
        // Most are marked, and the tasks of all writes are as large as this one's way.
        Box::pin(self.mark(set_index, &regions)).await
    }

    /// Waits while some of an extent's bytes are being resynchronised.
    async fn out_of_window(&self, extent: u32, within: u64, len: u64) {
        let view = self.view();
        let (set, address) = view.array.locate(extent);
        let set = view.array.set(set);
        let is_out = || {
            let is_in = |piece: Piece| {
                let copies = piece.copies.as_slice();
                copies.iter().any(|copy| set.in_window(copy.offset, u64::from(piece.len)))
            };
            (!set.pieces(address + within, len).any(is_in)).then_some(())
        };
        self.bell.until(is_out).await;
    }

    /// The write that was prepared has ended; these units are valid now.
    ///
    /// `seen`: the caches that had been lost when it began; `false`: it is to be written again, since one was lost meanwhile.
    pub(crate) async fn finish(
        self: Rc<Self>,
        volume: u32,
        index: u32,
        exclusive: bool,
        (bits, seen): ([u64; 4], Seen),
    ) -> Result<bool, Status> {
        let outcome = self.validate_units(volume, index, (bits, seen)).await;
        self.locks.release((volume, index), exclusive);
        outcome
    }

    /// These units have been written.
    pub(crate) async fn validate(
        self: Rc<Self>,
        volume: u32,
        index: u32,
        written: ([u64; 4], Seen),
    ) -> Result<bool, Status> {
        self.validate_units(volume, index, written).await
    }

    async fn validate_units(
        self: &Rc<Self>,
        volume: u32,
        index: u32,
        (bits, seen): ([u64; 4], Seen),
    ) -> Result<bool, Status> {
        if bits == [0; 4] {
            return Ok(true);
        }
        self.room().await?;
        if self.shared.lost_caches.look() != seen && !is_broken("lost_unit_noted") {
            return Ok(false);
        }
        let mapped = self.meta.borrow().entry(volume, index);
        let Mapped::Partial { extent, fallback, bits: before, .. } = mapped else { return Ok(true) };
        let new: [u64; 4] = std::array::from_fn(|word| bits[word] & !before[word]);
        if new != [0; 4] {
            let bits = new;
            let is_whole = std::array::from_fn(|word| before[word] | bits[word]) == self.all_units();
            let covered = if is_whole { fallback } else { NONE };
            let written = Written { volume, index, bits, extent, covered, lost_before: seen.number() };
            self.make_of(&Record::Valid { volume, index, bits }, Some(written));
        }
        Ok(true)
    }

    /// These units read as zeroes from now on; `false`: only when they are written.
    pub(crate) async fn invalidate(
        self: Rc<Self>,
        volume: u32,
        index: u32,
        bits: [u64; 4],
    ) -> Result<bool, Status> {
        self.locks.take((volume, index), true).await;
        let changeable = match self.settle_written(|written| written.is_of(volume, index)).await {
            Ok(()) => self.changeable(volume).await,
            error => error,
        };
        let mut done = changeable.map(|()| {
            let (mapped, is_exclusive) = {
                let meta = self.meta.borrow();
                (meta.entry(volume, index), meta.is_exclusive(volume, index))
            };
            match mapped {
                Mapped::None => true,
                Mapped::Partial { fallback, .. } if fallback != NONE => false,
                _ if !is_exclusive || !self.meta.borrow().has_room_for_metadata(1) => false,
                _ => {
                    self.make(&Record::Invalid { volume, index, bits });
                    true
                }
            }
        });
        let has_parity = self.view().array.sets().iter().any(|set| set.parity().is_some());
        if done == Ok(true) && has_parity && !is_broken("invalid_units_not_durable") {
            // Where nothing is valid parity is not kept right: that must not be valid again after a power cut.
            done = self.flush().await.map(|()| true);
        }
        self.locks.release((volume, index), true);
        done
    }

    /// Gives extents back of a volume of which the asker takes the last one for whole, because it ends there at this `size`; those that there is no room for, because a snapshot has them too, are left as they are, and told: from, to.
    pub(crate) async fn unmap(
        self: Rc<Self>,
        volume: u32,
        (index, count): (u32, u32),
        size: u64,
    ) -> Result<Vec<(u32, u32)>, Status> {
        let mut left = Vec::new();
        let end = index.saturating_add(count);
        let mut at = index;
        while at < end {
            let upto = end.min(at.saturating_add(UNMAP_EXTENTS));
            for index in at..upto {
                self.locks.take((volume, index), true).await;
            }
            let outcome = self.unmap_held(volume, (at, upto), size).await;
            for index in at..upto {
                self.locks.release((volume, index), true);
            }
            if !outcome? {
                left.push((at, upto));
            }
            at = upto;
        }
        Ok(left)
    }

    async fn unmap_held(
        self: &Rc<Self>,
        volume: u32,
        (from, to): (u32, u32),
        size: u64,
    ) -> Result<bool, Status> {
        self.changeable(volume).await?;
        let is_past_end = u64::from(to) * self.view().thin.extent_bytes > size;
        let is_as_asked = self.meta.borrow().volume(volume).is_some_and(|it| it.size_bytes() == size);
        if is_past_end && !is_as_asked {
            // It has grown since, and something may have been written behind where it ended.
            return Ok(false);
        }
        let is_mapped = |index: &u32| self.meta.borrow().entry(volume, *index) != Mapped::None;
        if (from..to).any(|index| is_mapped(&index)) {
            if !self.meta.borrow().has_room_to_unmap(volume, from, to) {
                return Ok(false);
            }
            self.make(&Record::Unmap { volume, index: from, count: to - from });
            self.space.ring();
        }
        Ok(true)
    }

    /// There is no free extent: finds some, or says that there are none.
    async fn make_space(self: &Rc<Self>) -> Outcome {
        if self.has_garbage() {
            self.reclaim().await?;
            if self.meta.borrow().free_extents() > 0 {
                return Ok(());
            }
        }
        Err(Status::NoSpace)
    }

    pub(crate) fn has_garbage(&self) -> bool {
        let meta = self.meta.borrow();
        !self.freed.borrow().is_empty() || meta.quarantined_extents() > 0 || meta.has_more_to_release()
    }

    /// Makes what nobody needs any more free again: its records are durable, and all who could name it have ended.
    pub(crate) async fn reclaim(self: &Rc<Self>) -> Outcome {
        let _turn = self.turns.reclaim.take().await;
        loop {
            let more = self.meta.borrow_mut().release_some(RELEASE_CHUNKS);
            self.take_freed();
            if !more {
                break;
            }
            self.runtime.sleep(Duration::ZERO).await;
        }
        if self.freed.borrow().is_empty() {
            return Ok(());
        }
        if !is_broken("reuse_before_durable") {
            self.flush().await?;
        }
        let durable = match is_broken("reuse_before_durable") {
            true => u64::MAX,
            false => self.durable.get(),
        };
        let ready: Vec<_> = self.freed.borrow_mut().extract_if(.., |(seq, _)| *seq < durable).collect();
        self.barrier().await;
        if self.options.discard
            && let Err(status) =
                self.discard_extents(ready.iter().flat_map(|(_, freed)| freed.extents())).await
        {
            // A discard that is carried out late may not find anything new there: they wait.
            self.freed.borrow_mut().extend(ready);
            return Err(status);
        }
        for (_, freed) in ready {
            coverage::count(coverage::Event::Recycled);
            self.meta.borrow_mut().recycle(freed);
        }
        self.space.ring();
        Ok(())
    }
}

/// The regions of all copies of a piece.
pub(crate) fn regions_of(set: &Set, piece: &Piece) -> BTreeSet<u32> {
    let each = piece.copies.as_slice().iter().flat_map(|copy| {
        let last = copy.offset + u64::from(piece.len) - 1;
        set.region_of(copy.offset)..=set.region_of(last)
    });
    each.collect()
}
