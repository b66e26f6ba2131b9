//! Where RAID 5 and 6 keep data and parity: pure arithmetic, as Linux md's left-symmetric layouts place them.
//!
//! A row is one strip of each member, and a stripe is what is in a row. P goes one member to the left with each row; Q stands
//! behind it, and data behind that, around the end. Strips of data, by number:
//!
//! ```text
//!            RAID 5, 4 members     RAID 6, 4 members
//!   row 0    0    1    2    P      Q    0    1    P
//!   row 1    4    5    P    3      2    3    P    Q
//!   row 2    8    P    6    7      5    P    Q    4
//!   row 3    P    9   10   11      P    Q    6    7
//! ```
//!
//! Invariants: [`Stripes::role`] is the exact inverse of [`Stripes::member_of_data`], [`Stripes::member_of_p`] and
//! [`Stripes::member_of_q`]. Members are counted from 0, by place in the set; offsets are in the members' data areas.

use super::divide::{Divisor, Size};
use super::{Level, MEMBERS_MAX, SET_BYTES_MAX};
use std::ops::Range;

/// What a member's strip is in its stripe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// The stripe's data strip of this index, from 0.
    Data(u16),
    /// The sum.
    P,
    /// The weighted sum.
    Q,
}

/// The geometry of a set with parity.
#[derive(Clone, Copy, Debug)]
pub struct Stripes {
    members: u16,
    parities: u16,
    by_members: Divisor,
    /// Divides by the data strips of a stripe.
    by_data: Divisor,
    by_strip: Size,
    by_stripe: Size,
}

impl Stripes {
    /// Of a set of so many members, with one parity or two.
    ///
    /// # Errors
    /// A line that says why there can be no such set.
    pub fn new(members: u16, parities: u16, strip_bytes: u32) -> Result<Stripes, String> {
        let level = match parities {
            1 => Level::Raid5,
            2 => Level::Raid6,
            _ => return Err(format!("stripes have one parity or two, not {parities}")),
        };
        let least = level.members_min();
        if !(least..=MEMBERS_MAX).contains(&members) {
            return Err(format!("{level} takes {least} to {MEMBERS_MAX} members, not {members}"));
        }
        if strip_bytes == 0 {
            return Err("a strip has at least one byte".to_owned());
        }
        let (data, strip) = (members - parities, u64::from(strip_bytes));
        Ok(Stripes {
            members,
            parities,
            by_members: Divisor::new(members),
            by_data: Divisor::new(data),
            by_strip: Size::new(strip),
            by_stripe: Size::new(strip * u64::from(data)),
        })
    }

    /// How many members there are.
    #[must_use]
    #[inline]
    pub fn members(&self) -> u16 {
        self.members
    }

    /// How many strips of a stripe are parity.
    #[must_use]
    #[inline]
    pub fn parities(&self) -> u16 {
        self.parities
    }

    /// How many strips of a stripe are data.
    #[must_use]
    #[inline]
    pub fn data_strips(&self) -> u16 {
        self.members - self.parities
    }

    /// The bytes of a strip.
    #[must_use]
    #[inline]
    pub fn strip_bytes(&self) -> u64 {
        self.by_strip.bytes
    }

    /// The bytes of data in a stripe.
    #[must_use]
    #[inline]
    pub fn stripe_bytes(&self) -> u64 {
        self.by_stripe.bytes
    }

    /// The row of a data strip, counted through the whole set, and its index in the stripe.
    #[must_use]
    #[inline]
    pub fn row_and_index(&self, chunk: u64) -> (u64, u16) {
        self.by_data.divide(chunk)
    }

    /// The row of a data strip, counted through the whole set, and the member that has it.
    #[must_use]
    #[inline]
    pub fn place(&self, chunk: u64) -> (u64, u16) {
        let (row, index) = self.row_and_index(chunk);
        (row, self.member_of_data(row, index))
    }

    /// The member and the offset of the data byte at `address`, and how many bytes from there on are in one piece.
    #[must_use]
    #[inline]
    pub fn locate(&self, address: u64) -> (u16, u64, u64) {
        let (chunk, beyond) = self.by_strip.split(address);
        let (row, member) = self.place(chunk);
        (member, self.by_strip.times(row) + beyond, self.by_strip.bytes - beyond)
    }

    /// The member that has P of this row.
    #[must_use]
    #[inline]
    pub fn member_of_p(&self, row: u64) -> u16 {
        let (_, turn) = self.by_members.divide(row);
        self.members - 1 - turn
    }

    /// The member that has Q of this row, if there is Q.
    #[must_use]
    #[inline]
    pub fn member_of_q(&self, row: u64) -> Option<u16> {
        (self.parities == 2).then(|| self.around(self.member_of_p(row) + 1))
    }

    /// The member that has the data strip of this index in this row.
    #[must_use]
    #[inline]
    pub fn member_of_data(&self, row: u64, index: u16) -> u16 {
        debug_assert!(index < self.data_strips(), "data strip {index} of {}", self.data_strips());
        self.around(self.member_of_p(row) + self.parities + index)
    }

    /// What the strip of `member` is in this row.
    #[must_use]
    #[inline]
    pub fn role(&self, row: u64, member: u16) -> Role {
        assert!(member < self.members, "member {member} of {}", self.members);
        let behind_p = self.around(member + self.members - self.member_of_p(row));
        match behind_p.checked_sub(self.parities) {
            Some(index) => Role::Data(index),
            None if behind_p == 0 => Role::P,
            None => Role::Q,
        }
    }

    /// The address of the data byte that `member` has at `offset`; `None` where it has parity.
    #[must_use]
    pub fn address_of(&self, member: u16, offset: u64) -> Option<u64> {
        let (row, beyond) = self.by_strip.split(offset);
        match self.role(row, member) {
            Role::Data(index) => {
                Some(self.by_stripe.times(row) + self.by_strip.times(u64::from(index)) + beyond)
            }
            Role::P | Role::Q => None,
        }
    }

    /// The stripes that the data bytes in [address, address + len) are in, in order.
    #[must_use]
    pub fn touched(&self, address: u64, len: u64) -> TouchedStripes<'_> {
        let end = address.checked_add(len).filter(|end| *end <= SET_BYTES_MAX);
        let end = end.unwrap_or_else(|| panic!("{len} bytes at {address} of a set"));
        TouchedStripes { stripes: self, first: address, address, end }
    }

    /// A place that may have passed the last member once.
    #[inline]
    fn around(&self, place: u16) -> u16 {
        if place < self.members { place } else { place - self.members }
    }
}

/// See [`Stripes::touched`].
#[derive(Clone, Debug)]
pub struct TouchedStripes<'a> {
    stripes: &'a Stripes,
    first: u64,
    address: u64,
    end: u64,
}

impl<'a> Iterator for TouchedStripes<'a> {
    type Item = Touched<'a>;

    #[inline]
    fn next(&mut self) -> Option<Touched<'a>> {
        if self.address == self.end {
            return None;
        }
        let Size { bytes, .. } = self.stripes.by_stripe;
        let (row, from) = self.stripes.by_stripe.split(self.address);
        let to = bytes.min(from + (self.end - self.address));
        let start = self.address - self.first;
        self.address += to - from;
        Some(Touched { stripes: self.stripes, row, start, from, to })
    }
}

/// What a range touches of one stripe.
#[derive(Clone, Copy, Debug)]
pub struct Touched<'a> {
    stripes: &'a Stripes,
    /// The stripe's row.
    pub row: u64,
    /// Where this begins, in bytes from the range's first one.
    pub start: u64,
    /// It begins here in the stripe's data.
    pub from: u64,
    /// It ends here; more than `from`.
    pub to: u64,
}

impl<'a> Touched<'a> {
    /// All of the stripe's data.
    #[must_use]
    #[inline]
    pub fn is_whole(&self) -> bool {
        self.to - self.from == self.stripes.stripe_bytes()
    }

    /// The parts of its data strips, in order.
    #[must_use]
    #[inline]
    pub fn parts(&self) -> Parts<'a> {
        Parts { touched: *self, at: self.from }
    }

    /// Which bytes of each strip the parts cover together: those of the parities that change with them. Two ranges where a part
    /// ends before the other begins, the second one empty where there is but one.
    #[must_use]
    pub fn columns(&self) -> [Range<u64>; 2] {
        let strip = self.stripes.strip_bytes();
        let (first, begin) = self.stripes.by_strip.split(self.from);
        let (last, end) = self.stripes.by_strip.split(self.to - 1);
        let end = end + 1;
        match last - first {
            0 => [begin..end, 0..0],
            1 if end < begin => [0..end, begin..strip],
            _ => [0..strip, 0..0],
        }
    }
}

/// A part of one data strip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which of the stripe's data strips.
    pub index: u16,
    /// The member that has it.
    pub member: u16,
    /// Where it begins, in bytes from the first one of the range that was asked for.
    pub start: u64,
    /// Where it begins in the strip.
    pub within: u64,
    /// Its bytes; not 0.
    pub len: u64,
}

/// See [`Touched::parts`].
#[derive(Clone, Debug)]
pub struct Parts<'a> {
    touched: Touched<'a>,
    at: u64,
}

impl Iterator for Parts<'_> {
    type Item = Part;

    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "an index in a stripe")]
    fn next(&mut self) -> Option<Part> {
        let Touched { stripes, row, start, from, to } = self.touched;
        if self.at == to {
            return None;
        }
        let (index, within) = stripes.by_strip.split(self.at);
        let index = index as u16;
        let len = (stripes.by_strip.bytes - within).min(to - self.at);
        let start = start + (self.at - from);
        self.at += len;
        Some(Part { index, member: stripes.member_of_data(row, index), start, within, len })
    }
}
