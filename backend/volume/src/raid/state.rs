//! The state of a set's members, and what it allows: which copy a read takes, which copies a write goes to.
//!
//! Owns: nothing that it decides itself. One owner changes the modes, the bits (but `touched`) and the window; every reactor
//! reads them, without locks. When the owner must know that nobody works by the old state any more, it changes the state,
//! then waits for a barrier: until every reactor has finished what it began before.
//!
//! Invariants:
//! - A read never takes a copy that may be older than another one.
//! - A write goes to every copy that is or becomes readable, or is not done here.

use super::{COPIES_MAX, Copies, Copy, Level, Piece, Set, Slow};
use crate::atomic::Ordering;
use crate::simulated::is_broken;
use std::ops::Range;

/// What a member takes part in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Mode {
    /// In nothing.
    Away = 0,
    /// In writes only: what it holds is not yet all right.
    Syncing = 1,
    /// In everything.
    InSync = 2,
}

impl Set {
    /// The mode of a member, by place in the set.
    #[must_use]
    #[inline]
    pub fn mode(&self, member_in_set: u16) -> Mode {
        match self.modes[usize::from(member_in_set)].load(Ordering::Acquire) {
            0 => Mode::Away,
            1 => Mode::Syncing,
            _ => Mode::InSync,
        }
    }

    /// Changes the mode of a member. The owner's.
    pub fn set_mode(&self, member_in_set: u16, mode: Mode) {
        assert!(member_in_set < self.members(), "member {member_in_set} of {}", self.members());
        self.modes[usize::from(member_in_set)].store(mode as u8, Ordering::Release);
    }

    /// Whether all members have everything.
    #[must_use]
    #[inline]
    pub fn are_all_in_sync(&self) -> bool {
        (0..self.members()).all(|member| self.mode(member) == Mode::InSync)
    }

    /// How many members have everything.
    #[must_use]
    pub fn in_sync_count(&self) -> u16 {
        let count = (0..self.members()).filter(|member| self.mode(*member) == Mode::InSync).count();
        u16::try_from(count).unwrap_or(0)
    }

    /// A region was made the same everywhere: takes its mark away, and its doubt. Whoever marks it again says that before, so that `is_current`
    /// is false from then on: then both stay, or come back. Whether it is the same. The owner's.
    #[must_use]
    pub fn declare_same(&self, region: u32, is_current: impl Fn() -> bool) -> bool {
        self.unsynced.clear(region);
        if !is_current() {
            self.unsynced.set(region);
            return false;
        }
        let Some(parity) = self.parity() else { return true };
        // A doubt that has come since that look goes with the old one.
        let was_doubtful = parity.doubtful.take(region);
        if is_current() {
            return true;
        }
        if was_doubtful {
            parity.doubtful.set(region);
        }
        self.unsynced.set(region);
        false
    }

    /// At levels with parity: whether stripes can be written now that are in these bytes of the members' data areas. Marks their regions as
    /// touched when they can.
    ///
    /// # Errors
    /// As [`Set::writable`].
    pub fn are_stripes_writable(&self, offset: u64, len: u64) -> Result<(), Slow> {
        let regions = self.region_of(offset)..=self.region_of(offset + len - 1);
        // First: who finds a mark sees the members as they were when it was set, or later.
        let is_marked = regions.clone().all(|region| self.intents.get(region));
        if self.in_sync_count() + self.level.parities() < self.members() {
            return Err(Slow::Degraded);
        }
        if !is_marked {
            return Err(Slow::Intent);
        }
        if self.in_window(offset, len) {
            return Err(Slow::Window);
        }
        regions.for_each(|region| self.touched.mark(region));
        Ok(())
    }

    #[inline]
    fn mode_of(&self, copy: &Copy) -> Mode {
        self.mode(copy.member - self.first_member)
    }

    /// Announces that these bytes of the members' data areas are being resynchronised; `None`: none are. The owner's.
    ///
    /// It holds for all only after a barrier, which the owner makes before it reads the first byte of the window. Until then
    /// a reader may see the old window, the new one, or one's start with the other's end. The end is stored first when that
    /// makes it wider and last when not, and readers load the start first; so, whatever they see:
    /// - a byte that is in both the old and the new window is in it: what was held stays held while the window moves;
    /// - if the window moves forward, or there was none, it is as wide as the old or the new one, or wider.
    pub fn set_window(&self, window: Option<Range<u64>>) {
        let Range { start, end } = window.unwrap_or(0..0);
        let wide_start = start.min(self.window_start.load(Ordering::Relaxed));
        let wide_end = end.max(self.window_end.load(Ordering::Relaxed));
        self.window_end.store(wide_end, Ordering::Release);
        self.window_start.store(wide_start, Ordering::Release);
        self.window_start.store(start, Ordering::Release);
        self.window_end.store(end, Ordering::Release);
    }

    /// Says whether some of [offset, offset + len) of the members' data areas is being resynchronised.
    #[must_use]
    #[inline]
    pub fn in_window(&self, offset: u64, len: u64) -> bool {
        let start = self.window_start.load(Ordering::Acquire);
        let end = self.window_end.load(Ordering::Acquire);
        // What is empty overlaps with nothing, an empty window too.
        offset.max(start) < end.min(offset + len)
    }

    /// Whether `check` is true of some region that some copy of `piece` is in.
    #[inline(always)]
    fn any_region(&self, piece: &Piece, check: impl Fn(u32) -> bool) -> bool {
        // Most copies are at the same offset: those regions are looked at once.
        let mut seen = None;
        piece.copies.as_slice().iter().any(|copy| {
            if seen.replace(copy.offset) == Some(copy.offset) {
                return false;
            }
            let last = self.region_of(copy.offset + u64::from(piece.len) - 1);
            (self.region_of(copy.offset)..=last).any(&check)
        })
    }

    /// Whether writes of `piece` may be different on its members after a crash, because the marks of all its regions are durable. Where there
    /// is no redundancy they always may.
    #[must_use]
    #[inline]
    pub fn is_marked(&self, piece: &Piece) -> bool {
        !self.level.is_redundant() || !self.any_region(piece, |region| !self.intents.get(region))
    }

    /// The copy that a read of `piece` takes: of those in sync, another one with each `rotor`.
    ///
    /// # Errors
    /// [`Slow::Degraded`] when no copy can be read; [`Slow::Unsynced`] when more than one can be read and they may differ.
    #[inline(always)]
    pub fn choose(&self, piece: &Piece, rotor: u32) -> Result<Copy, Slow> {
        let (mut readable, mut readable_count) = ([0_u8; COPIES_MAX], 0);
        for (index, copy) in (0..).zip(piece.copies.as_slice()) {
            if self.mode_of(copy) == Mode::InSync
                || (self.mode_of(copy) == Mode::Syncing && is_broken("stale_member_read"))
            {
                readable[readable_count] = index;
                readable_count += 1;
            }
        }
        let turn = match readable_count {
            0 => return Err(Slow::Degraded),
            1 => 0,
            2 => (rotor & 1) as usize,
            count => rotor as usize % count,
        };
        // With parity it matters too: what is read must not change when the member that has it is lost before parity is made again.
        let is_settled_first = readable_count > 1 || (self.parity().is_some() && self.are_all_in_sync());
        let is_unsynced = is_settled_first && self.any_region(piece, |region| self.unsynced.get(region));
        if is_unsynced && !is_broken("read_unsynced_from_any") {
            return Err(Slow::Unsynced);
        }
        Ok(piece.copies.as_slice()[usize::from(readable[turn])])
    }

    /// What [`Set::choose`] says of the one piece that there is, where there is no choice: the strips of a RAID 0. `None`: it has to be asked.
    #[inline(always)]
    pub(crate) fn only_copy(&self, address: u64, len: u64) -> Option<Copy> {
        if self.level != Level::Raid0 {
            return None;
        }
        let (here, copy) = self.place_striped(address);
        (len <= here && self.mode_of(&copy) == Mode::InSync).then_some(copy)
    }

    /// The copies that a write of `piece` goes to; at levels with parity the one that there is, whatever its member's state: whoever writes
    /// knows what else a stripe needs. Marks its regions as touched when it may be done.
    ///
    /// # Errors
    /// [`Slow::Degraded`] when none of them can be read; then, at redundant levels, [`Slow::Intent`] when the mark of a region
    /// of any copy is not durable; then [`Slow::Window`] when any copy is being resynchronised, or copied for a replacement.
    #[inline(always)]
    pub fn writable(&self, piece: &Piece) -> Result<Copies, Slow> {
        if self.parity().is_some() {
            let copy = piece.copies.as_slice()[0];
            return self.are_stripes_writable(copy.offset, u64::from(piece.len)).map(|()| piece.copies);
        }
        let is_redundant = self.level.is_redundant();
        // First: who finds a mark sees the members as they were when it was set, or later.
        let is_marked = self.is_marked(piece);
        let (mut copies, mut is_readable) = (Copies::default(), false);
        for copy in piece.copies.as_slice() {
            let mode = self.mode_of(copy);
            if mode != Mode::Away {
                copies.push(*copy);
                is_readable |= mode == Mode::InSync;
            }
        }
        if !is_readable {
            return Err(Slow::Degraded);
        }
        // A copy of a member that is away counts too: its region is what a resync will look for.
        if !is_marked {
            return Err(Slow::Intent);
        }
        let len = u64::from(piece.len);
        if piece.copies.as_slice().iter().any(|copy| self.in_window(copy.offset, len)) {
            return Err(Slow::Window);
        }
        if !is_redundant {
            return Ok(copies);
        }
        self.any_region(piece, |region| {
            self.touched.mark(region);
            false
        });
        Ok(copies)
    }
}
