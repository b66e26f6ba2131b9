//! Levels, and where they put data.
//!
//! Owns: RAID geometry, which is pure arithmetic and places data as Linux md does; what all reactors read of an array's
//! state. Must not know: volumes, devices, how I/O is done, who decides that a member is gone.
//!
//! ```text
//!   Array   extents 0 ........ a-1 | a ............ b-1        immutable; growing makes a new one with the same sets
//!              │                       │
//!   Set     members 0, 1, 2          members 3, 4, 5           one level, one strip size; its state is in atomics
//!              │
//!   Piece   len bytes, and every Copy of them: (member, offset in that member's data area)
//! ```
//!
//! Invariants:
//! - All addresses are bytes. An extent lies wholly in one set.
//! - The copies of a byte are on different members; no two bytes share a place.
//! - What is asked while I/O is under way ([`Set::pieces`], [`Set::choose`], [`Set::writable`], [`Array::locate`]) allocates
//!   nothing and locks nothing.

mod array;
mod bits;
mod divide;
mod parity;
mod piece;
mod ring;
mod set;
mod state;
mod stripes;
#[cfg(test)]
mod stripes_tests;
#[cfg(test)]
pub(crate) mod tests;

pub use array::Array;
pub use bits::AtomicBits;
pub use parity::{Guards, Parity};
pub use piece::{COPIES_MAX, Copies, Copy, Piece, Slow};
pub use ring::Ring;
pub use set::{MEMBERS_MAX, MemberPieces, PIECE_BYTES_MAX, Pieces, SET_BYTES_MAX, Set, SetConfig};
pub use state::Mode;
pub use stripes::{Part, Parts, Role, Stripes, Touched, TouchedStripes};

use std::fmt;
use std::str::FromStr;

/// A RAID level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// One member after the other.
    Linear,
    /// Strips over all members.
    Raid0,
    /// Every member has everything.
    Raid1,
    /// Every strip twice, as md's near-2 layout.
    Raid10,
    /// One parity strip in each stripe.
    Raid5,
    /// Two parity strips in each stripe.
    Raid6,
}

impl Level {
    /// All there are.
    pub const ALL: [Level; 6] =
        [Level::Linear, Level::Raid0, Level::Raid1, Level::Raid10, Level::Raid5, Level::Raid6];

    /// As people write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Level::Linear => "linear",
            Level::Raid0 => "raid0",
            Level::Raid1 => "raid1",
            Level::Raid10 => "raid10",
            Level::Raid5 => "raid5",
            Level::Raid6 => "raid6",
        }
    }

    /// The fewest members of a set.
    #[must_use]
    pub fn members_min(self) -> u16 {
        match self {
            Level::Linear => 1,
            Level::Raid0 | Level::Raid1 | Level::Raid10 => 2,
            Level::Raid5 => 3,
            Level::Raid6 => 4,
        }
    }

    /// The most members of a set.
    #[must_use]
    pub fn members_max(self) -> u16 {
        match self {
            // As many as a piece has room for copies.
            Level::Raid1 => 4,
            _ => MEMBERS_MAX,
        }
    }

    /// How many of a set's `members` may be lost without losing data, whichever they are.
    #[must_use]
    pub fn redundancy(self, members: u16) -> u16 {
        match self {
            Level::Linear | Level::Raid0 => 0,
            Level::Raid1 => members.saturating_sub(1),
            Level::Raid10 | Level::Raid5 => 1,
            Level::Raid6 => 2,
        }
    }

    /// A member may be lost.
    #[must_use]
    pub fn is_redundant(self) -> bool {
        !matches!(self, Level::Linear | Level::Raid0)
    }

    /// How many strips of a stripe are parity.
    #[must_use]
    pub fn parities(self) -> u16 {
        match self {
            Level::Raid5 => 1,
            Level::Raid6 => 2,
            _ => 0,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(name: &str) -> Result<Level, String> {
        Level::ALL.into_iter().find(|level| level.name() == name).ok_or_else(|| {
            format!("{name:?} is not a RAID level: one of linear, raid0, raid1, raid10, raid5, raid6")
        })
    }
}
