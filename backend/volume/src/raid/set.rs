//! Where a set of members keeps its data: pure arithmetic, as Linux md places it.
//!
//! A member's data area is rows of one strip each. Strips of data, by number; copies are marked with an apostrophe:
//!
//! ```text
//!            RAID 0, 3 members    RAID 10, 4 members       RAID 10, 3 members    RAID 1     linear
//!   row 0    0    1    2          0    0'   1    1'        0    0'   1           0    0'    0    2
//!   row 1    3    4    5          2    2'   3    3'        1'   2    2'          1    1'    1    3
//!   row 2    6    7    8          4    4'   5    5'        3    3'   (padding)   2    2'         4
//! ```
//!
//! RAID 10 is near-2: copy k of strip c is at position 2c + k, counted row by row. With an odd number of members, two
//! copies may so be in different rows, and an odd number of positions leaves the last one without data. Members count as
//! the smallest of them, rounded down to whole strips; only linear uses each to its own end, rounded down the same way.
//! What is left behind the last whole extent has no data either. RAID 5 and 6 are in [`Stripes`]: here their data has one copy.
//!
//! Invariants: [`Set::pieces_of_member`] is the exact inverse of [`Set::pieces`].

use super::divide::{Divisor, Size};
use super::{AtomicBits, Copies, Copy, Level, Parity, Piece, Stripes};
use crate::atomic::{AtomicU8, AtomicU64};
use std::ops::Range;

/// The most members that a set of any level has.
pub const MEMBERS_MAX: u16 = 32;
const MEMBERS: usize = MEMBERS_MAX as usize;

/// The most bytes on all members of a set together: 256 PiB. Positions stay so small that `Divisor` is exact.
pub const SET_BYTES_MAX: u64 = 1 << 58;

/// The longest piece, which any member takes in one request. Only linear and RAID 1 have pieces longer than a strip.
pub const PIECE_BYTES_MAX: u64 = 1 << 20;

/// What a set is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetConfig {
    /// Its level.
    pub level: Level,
    /// Its first member's place in the pool's list; the others follow.
    pub first_member: u16,
    /// The bytes of each member that can hold data.
    pub member_bytes: Vec<u64>,
    /// What of one member follows on what of another; levels without strips round the members down to it.
    pub strip_bytes: u32,
    /// The unit of allocation.
    pub extent_bytes: u64,
    /// What one bit of `intents`, `unsynced` and `touched` covers of each member's data area.
    pub region_bytes: u64,
    /// Where the data area begins on each member.
    pub data_offset: u64,
    /// RAID 5 and 6: where the parity log begins on each member, and its pages for entries.
    pub parity_log: (u64, u32),
}

/// Members that hold data together, and their state.
#[derive(Debug)]
pub struct Set {
    pub(super) level: Level,
    members: u16,
    pub(super) first_member: u16,
    /// Divides by `members`.
    by_members: Divisor,
    by_strip: Size,
    pub(super) by_region: Size,
    extents: u32,
    extent_bytes: u64,
    data_bytes: u64,
    rows_bytes: u64,
    data_offset: u64,
    /// Linear: the address of each member's first byte, and the end of the last one's. Else empty.
    starts: Box<[u64]>,
    parity: Option<Parity>,

    /// Regions whose mark is durable, and is not being cleared.
    pub intents: AtomicBits,
    /// Regions whose copies may differ.
    pub unsynced: AtomicBits,
    /// Regions that were written since the owner looked last.
    pub touched: AtomicBits,
    /// [`super::Mode`], by place in the set.
    pub(super) modes: [AtomicU8; MEMBERS],
    pub(super) window_start: AtomicU64,
    pub(super) window_end: AtomicU64,
}

impl Set {
    /// A set. All its members are away, its bits clear, and there is no window: its owner knows better.
    ///
    /// # Errors
    /// A line that says why there can be no such set.
    pub fn new(config: SetConfig) -> Result<Set, String> {
        let SetConfig {
            level,
            first_member,
            member_bytes,
            strip_bytes,
            extent_bytes,
            region_bytes,
            data_offset,
            parity_log: (log_offset, log_pages),
        } = config;
        let (least, most) = (level.members_min(), level.members_max());
        let members = u16::try_from(member_bytes.len())
            .ok()
            .filter(|members| (least..=most).contains(members))
            .ok_or_else(|| format!("{level} takes {least} to {most} members, not {}", member_bytes.len()))?;
        if first_member.checked_add(members).is_none() {
            return Err(format!("{members} members from {first_member} on are more than a pool can number"));
        }
        if strip_bytes == 0 || extent_bytes == 0 || region_bytes == 0 {
            return Err("strip, extent and region have at least one byte each".to_owned());
        }
        let total = member_bytes.iter().try_fold(0_u64, |total, bytes| total.checked_add(*bytes));
        if total.is_none_or(|total| total > SET_BYTES_MAX) {
            return Err(format!("the members of a set have together at most {SET_BYTES_MAX} bytes"));
        }

        let strip = u64::from(strip_bytes);
        let rounded: Vec<u64> = member_bytes.iter().map(|bytes| bytes - bytes % strip).collect();
        if let Some(member) = rounded.iter().position(|bytes| *bytes == 0) {
            return Err(format!(
                "member {member} of the set has {} bytes for data, less than a strip of {strip_bytes}",
                member_bytes[member]
            ));
        }
        let smallest = rounded.iter().copied().min().unwrap_or(0);
        let (rows_bytes, capacity) = match level {
            Level::Linear => (rounded.iter().copied().max().unwrap_or(0), rounded.iter().sum()),
            Level::Raid0 => (smallest, smallest * u64::from(members)),
            Level::Raid1 => (smallest, smallest),
            Level::Raid5 | Level::Raid6 => (smallest, smallest * u64::from(members - level.parities())),
            // Half of the positions, and no half strip.
            Level::Raid10 => (smallest, smallest / strip * u64::from(members) / 2 * strip),
        };
        let extents = capacity / extent_bytes;
        if extents == 0 {
            return Err(format!("the members hold {capacity} bytes, less than an extent of {extent_bytes}"));
        }
        let extents = u32::try_from(extents).ok().filter(|extents| *extents < u32::MAX).ok_or_else(|| {
            format!("{extents} extents are too many: larger ones than {extent_bytes} bytes are needed")
        })?;
        let regions = if level == Level::Linear { 0 } else { rows_bytes.div_ceil(region_bytes) };
        let regions = u32::try_from(regions).map_err(|_| {
            format!("{regions} regions are too many: larger ones than {region_bytes} bytes are needed")
        })?;
        let starts = match level {
            Level::Linear => std::iter::once(0)
                .chain(rounded.iter().scan(0, |end, bytes| {
                    *end += bytes;
                    Some(*end)
                }))
                .collect(),
            _ => Box::default(),
        };
        let parity = match level.parities() {
            0 => None,
            parities => {
                let stripes = Stripes::new(members, parities, strip_bytes)?;
                if extent_bytes % stripes.stripe_bytes() != 0 {
                    return Err(format!(
                        "extents of {extent_bytes} bytes are not whole stripes of {}",
                        stripes.stripe_bytes()
                    ));
                }
                Some(Parity::new(stripes, regions, log_offset, log_pages))
            }
        };
        Ok(Set {
            level,
            members,
            first_member,
            by_members: Divisor::new(members),
            by_strip: Size::new(strip),
            by_region: Size::new(region_bytes),
            extents,
            extent_bytes,
            data_bytes: u64::from(extents) * extent_bytes,
            rows_bytes,
            data_offset,
            starts,
            parity,
            intents: AtomicBits::new(regions),
            unsynced: AtomicBits::new(regions),
            touched: AtomicBits::new(regions),
            modes: std::array::from_fn(|_| AtomicU8::new(0)),
            window_start: AtomicU64::new(0),
            window_end: AtomicU64::new(0),
        })
    }

    /// Its level.
    #[must_use]
    pub fn level(&self) -> Level {
        self.level
    }

    /// What it has besides, when it has parity.
    #[must_use]
    #[inline]
    pub fn parity(&self) -> Option<&Parity> {
        self.parity.as_ref()
    }

    /// How many members it has.
    #[must_use]
    pub fn members(&self) -> u16 {
        self.members
    }

    /// Its first member's place in the pool's list.
    #[must_use]
    pub fn first_member(&self) -> u16 {
        self.first_member
    }

    /// How many extents it holds.
    #[must_use]
    pub fn extents(&self) -> u32 {
        self.extents
    }

    /// The bytes of an extent.
    #[must_use]
    pub fn extent_bytes(&self) -> u64 {
        self.extent_bytes
    }

    /// The bytes of all its extents: where its addresses end.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// The bytes of a strip.
    #[must_use]
    pub fn strip_bytes(&self) -> u32 {
        u32::try_from(self.by_strip.bytes).expect("it was made of a u32")
    }

    /// What one region covers of each member's data area.
    #[must_use]
    pub fn region_bytes(&self) -> u64 {
        self.by_region.bytes
    }

    /// Where the data area begins on each member.
    #[must_use]
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// The bytes of each member's data area that are in use; linear: of the longest.
    #[must_use]
    pub fn member_rows_bytes(&self) -> u64 {
        self.rows_bytes
    }

    /// How many regions each member's data area has; linear has none.
    #[must_use]
    pub fn regions(&self) -> u32 {
        self.intents.len()
    }

    /// The region of a member's `offset`.
    #[must_use]
    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "`new` counted them in 32 bits")]
    pub fn region_of(&self, offset: u64) -> u32 {
        self.by_region.split(offset).0 as u32
    }

    /// Every copy of the data bytes in [address, address + len): pieces in order, each within one strip of each member
    /// (linear, RAID 1: within one member, as long as possible). Their `start` counts from `address`.
    #[must_use]
    #[inline]
    pub fn pieces(&self, address: u64, len: u64) -> Pieces<'_> {
        assert!(
            address <= self.data_bytes && len <= self.data_bytes - address,
            "{len} bytes at {address} of {}",
            self.data_bytes
        );
        Pieces { set: self, address, start: 0, len }
    }

    /// What the members hold of that which `member` (by place in the set) holds in its data area at [offset, offset + len):
    /// pieces in order, with all copies, the asked one too. What has no data is skipped. Their `start` counts from `offset`.
    #[must_use]
    pub fn pieces_of_member(&self, member: u16, offset: u64, len: u64) -> MemberPieces<'_> {
        assert!(member < self.members, "member {member} of {}", self.members);
        let end = offset.saturating_add(len).min(self.bytes_of_member(member));
        MemberPieces { set: self, member, first: offset, offset, end }
    }

    /// The address of the data byte that `member` (by place in the set) holds at `offset`; `None` where it holds none.
    #[must_use]
    pub fn address_of(&self, member: u16, offset: u64) -> Option<u64> {
        assert!(member < self.members, "member {member} of {}", self.members);
        if offset >= self.bytes_of_member(member) {
            return None;
        }
        let (row, beyond) = self.by_strip.split(offset);
        let position = row * u64::from(self.members) + u64::from(member);
        let address = match self.level {
            Level::Linear => self.starts[usize::from(member)] + offset,
            Level::Raid0 => position * self.by_strip.bytes + beyond,
            Level::Raid1 => offset,
            Level::Raid5 | Level::Raid6 => self.stripes().address_of(member, offset)?,
            Level::Raid10 => position / 2 * self.by_strip.bytes + beyond,
        };
        (address < self.data_bytes).then_some(address)
    }

    /// Addresses among which are those of all data that the rows [offset, offset + len) of the members hold, and few others.
    #[must_use]
    pub fn data_of_rows(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len).min(self.rows_bytes);
        if offset >= end {
            return 0..0;
        }
        let strip = self.by_strip.bytes;
        let members = u64::from(self.members);
        let (first, rows_end) = (offset / strip * members, end.div_ceil(strip) * members);
        let (from, to) = match self.level {
            Level::Linear => {
                // From the first member that is long enough, up to the last one.
                let has = |member: &u16| self.bytes_of_member(*member) > offset;
                let start = |member: u16| self.starts[usize::from(member)];
                let from = (0..self.members).find(has).map(|member| start(member) + offset);
                let to = (0..self.members)
                    .rfind(has)
                    .map(|member| start(member) + end.min(self.bytes_of_member(member)));
                (from.unwrap_or(0), to.unwrap_or(0))
            }
            Level::Raid0 => (first * strip, rows_end * strip),
            Level::Raid1 => (offset, end),
            Level::Raid5 | Level::Raid6 => {
                let stripe = self.stripes().stripe_bytes();
                (offset / strip * stripe, end.div_ceil(strip) * stripe)
            }
            Level::Raid10 => (first / 2 * strip, rows_end.div_ceil(2) * strip),
        };
        from.min(self.data_bytes)..to.min(self.data_bytes)
    }

    fn stripes(&self) -> &Stripes {
        &self.parity.as_ref().expect("levels with parity have it").stripes
    }

    /// The bytes of the rows of `member`.
    fn bytes_of_member(&self, member: u16) -> u64 {
        match self.level {
            Level::Linear => self.starts[usize::from(member) + 1] - self.starts[usize::from(member)],
            _ => self.rows_bytes,
        }
    }

    /// All copies of what begins at `address`, and how many bytes of it are in one piece.
    #[inline(always)]
    fn place(&self, address: u64) -> (u64, Copies) {
        let at = |member: u16, offset| Copy { member: self.first_member + member, offset };
        match self.level {
            Level::Linear => {
                let member = self.starts.partition_point(|start| *start <= address) - 1;
                let copy = at(u16::try_from(member).unwrap_or(0), address - self.starts[member]);
                (self.starts[member + 1] - address, Copies::one(copy))
            }
            Level::Raid1 => {
                let mut copies = Copies::default();
                for member in 0..self.members {
                    copies.push(at(member, address));
                }
                (self.data_bytes - address, copies)
            }
            Level::Raid0 => {
                let (len, copy) = self.place_striped(address);
                (len, Copies::one(copy))
            }
            Level::Raid5 | Level::Raid6 => {
                let (member, offset, len) = self.stripes().locate(address);
                (len, Copies::one(at(member, offset)))
            }
            Level::Raid10 => {
                let (chunk, beyond) = self.by_strip.split(address);
                let (row, member) = self.by_members.divide(chunk * 2);
                let offset = self.by_strip.times(row) + beyond;
                let mut copies = Copies::one(at(member, offset));
                // The next position: beside it, or the first of the next row.
                copies.push(if member + 1 < self.members {
                    at(member + 1, offset)
                } else {
                    at(0, offset + self.by_strip.bytes)
                });
                (self.by_strip.bytes - beyond, copies)
            }
        }
    }

    /// The same of a RAID 0.
    #[inline(always)]
    pub(super) fn place_striped(&self, address: u64) -> (u64, Copy) {
        let (chunk, beyond) = self.by_strip.split(address);
        let (row, member) = self.by_members.divide(chunk);
        let offset = self.by_strip.times(row) + beyond;
        (self.by_strip.bytes - beyond, Copy { member: self.first_member + member, offset })
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "PIECE_BYTES_MAX")]
    fn piece(&self, address: u64, start: u64, len_max: u64) -> Piece {
        let (len, copies) = self.place(address);
        Piece { start, len: len.min(len_max).min(PIECE_BYTES_MAX) as u32, copies }
    }
}

/// See [`Set::pieces`].
#[derive(Clone, Debug)]
pub struct Pieces<'a> {
    set: &'a Set,
    address: u64,
    start: u64,
    len: u64,
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    #[inline(always)]
    fn next(&mut self) -> Option<Piece> {
        if self.start == self.len {
            return None;
        }
        let piece = self.set.piece(self.address + self.start, self.start, self.len - self.start);
        self.start += u64::from(piece.len);
        Some(piece)
    }
}

/// See [`Set::pieces_of_member`].
#[derive(Clone, Debug)]
pub struct MemberPieces<'a> {
    set: &'a Set,
    member: u16,
    first: u64,
    offset: u64,
    end: u64,
}

impl Iterator for MemberPieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.offset >= self.end {
            return None;
        }
        let mut found = self.set.address_of(self.member, self.offset);
        if found.is_none() && self.set.parity.is_some() {
            // Parity is no data. No two strips of it follow each other but those of Q and P.
            let strip = self.set.by_strip.bytes;
            for _ in 0..2 {
                self.offset = (self.offset / strip + 1) * strip;
                found =
                    (self.offset < self.end).then(|| self.set.address_of(self.member, self.offset)).flatten();
                if found.is_some() {
                    break;
                }
            }
        }
        // Addresses ascend with offsets: nothing comes behind the end of the data.
        let address = found?;
        let len_max = (self.end - self.offset).min(self.set.data_bytes - address);
        let piece = self.set.piece(address, self.offset - self.first, len_max);
        self.offset += u64::from(piece.len);
        Some(piece)
    }
}
