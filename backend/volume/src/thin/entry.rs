//! What an index of a volume maps to: one `u64`, and bits for the parts of an extent that have content.
//!
//! ```text
//!  bit  0        32             60      61       62
//!      ┌─────────┬──────────────┬───────┬────────┬───┐
//!      │ extent  │ birth        │MAPPED │PARTIAL │ 0 │   0 as a whole: nothing is mapped
//!      │ or id   │ (generation) │       │        │   │   PARTIAL: the id of a partial instead of an extent
//!      └─────────┴──────────────┴───────┴────────┴───┘
//! ```

use crate::format::NONE;

/// Which units of an extent have content of their own.
pub type Bits = [u64; 4];

/// No unit.
pub(super) const NO_BITS: Bits = [0; 4];

/// Generations are smaller than this.
pub(super) const GENERATIONS: u32 = 1 << 28;

const MAPPED: u64 = 1 << 60;
const PARTIAL: u64 = 1 << 61;
const LOW: u64 = 0xffff_ffff;

/// An entry of the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry(pub u64);

impl Entry {
    /// Nothing is mapped.
    pub const EMPTY: Entry = Entry(0);

    /// A whole extent.
    #[must_use]
    pub const fn full(extent: u32, birth: u32) -> Entry {
        Entry(MAPPED | (birth as u64) << 32 | extent as u64)
    }

    /// A partial.
    #[must_use]
    pub const fn partial(id: u32, birth: u32) -> Entry {
        Entry(MAPPED | PARTIAL | (birth as u64) << 32 | id as u64)
    }

    /// Something is mapped.
    #[must_use]
    #[inline]
    pub const fn is_mapped(self) -> bool {
        self.0 & MAPPED != 0
    }

    /// The extent has content in some of its units only.
    #[must_use]
    #[inline]
    pub const fn is_partial(self) -> bool {
        self.0 & PARTIAL != 0
    }

    /// A whole extent is mapped: the one case of the hot path.
    #[must_use]
    #[inline]
    pub const fn is_full(self) -> bool {
        self.0 & (MAPPED | PARTIAL) == MAPPED
    }

    /// The extent, or the partial's id.
    #[must_use]
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
    pub const fn low(self) -> u32 {
        self.0 as u32
    }

    /// The generation that it was mapped in.
    #[must_use]
    #[inline]
    pub const fn birth(self) -> u32 {
        (self.0 >> 32) as u32 & (GENERATIONS - 1)
    }

    /// The same with another birth.
    pub(super) const fn with_birth(self, birth: u32) -> Entry {
        Entry(self.0 & !(((GENERATIONS - 1) as u64) << 32) | (birth as u64) << 32)
    }

    /// As it is stored: the id of a partial means nothing to others.
    pub(super) const fn stored(self) -> u64 {
        if self.is_partial() { self.0 & !LOW } else { self.0 }
    }

    /// No bit is set that means nothing.
    pub(super) const fn is_sound(self) -> bool {
        self.0 == 0 || (self.is_mapped() && self.0 >> 62 == 0 && self.birth() != 0)
    }
}

/// What an index maps to, with all that a partial says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// Nothing: zeroes.
    None,
    /// A whole extent.
    Full {
        /// Where its content is.
        extent: u32,
        /// The generation that it was mapped in.
        birth: u32,
    },
    /// An extent of which some units have content.
    Partial {
        /// Where the units are whose bit is set.
        extent: u32,
        /// The extent where the others are, or [`NONE`]: they are zero.
        fallback: u32,
        /// Which units.
        bits: Bits,
        /// The generation that it was mapped in.
        birth: u32,
    },
}

impl Mapped {
    /// What shows where no unit of its own does: a whole extent, or a partial's fallback; else [`NONE`].
    pub(super) fn background(&self) -> u32 {
        match *self {
            Mapped::None => NONE,
            Mapped::Full { extent, .. } => extent,
            Mapped::Partial { fallback, .. } => fallback,
        }
    }
}

/// All bits of an extent that has so many units.
#[must_use]
pub(super) fn full_bits(units: u32) -> Bits {
    std::array::from_fn(|word| {
        let before = 64 * u32::try_from(word).expect("four words");
        match units.saturating_sub(before) {
            64.. => u64::MAX,
            some => (1 << some) - 1,
        }
    })
}

pub(super) fn or(a: Bits, b: Bits) -> Bits {
    std::array::from_fn(|word| a[word] | b[word])
}

pub(super) fn without(a: Bits, b: Bits) -> Bits {
    std::array::from_fn(|word| a[word] & !b[word])
}

/// All of `a` is in `b`.
pub(super) fn is_within(a: Bits, b: Bits) -> bool {
    without(a, b) == NO_BITS
}
