//! What a range of a set's data is on its members. Plain values.

/// The most copies that any level keeps of a byte: RAID 1 with four members.
pub const COPIES_MAX: usize = 4;

/// One copy: where it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Copy {
    /// The member, by its place in the pool's list.
    pub member: u16,
    /// In the member's data area, in bytes; the set's `data_offset` more is where it is on the device.
    pub offset: u64,
}

/// Up to [`COPIES_MAX`] copies, on different members.
#[derive(Clone, Copy, Debug, Default)]
pub struct Copies {
    len: u8,
    copies: [Copy; COPIES_MAX],
}

impl Copies {
    /// Just this one.
    #[must_use]
    #[inline]
    pub fn one(copy: Copy) -> Copies {
        let mut copies = Copies::default();
        copies.push(copy);
        copies
    }

    /// Adds a copy; more than [`COPIES_MAX`] is our bug.
    #[inline]
    pub fn push(&mut self, copy: Copy) {
        self.copies[usize::from(self.len)] = copy;
        self.len += 1;
    }

    /// The copies.
    #[must_use]
    #[inline]
    pub fn as_slice(&self) -> &[Copy] {
        &self.copies[..usize::from(self.len)]
    }

    /// How many.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// None.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl PartialEq for Copies {
    fn eq(&self, other: &Copies) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Copies {}

/// A range that is in one piece on each member that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins, in bytes from what was asked for: an address, or a member's offset.
    pub start: u64,
    /// In bytes; not 0.
    pub len: u32,
    /// Every copy, whatever the state of its member.
    pub copies: Copies,
}

/// Why a piece cannot be read or written on the spot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slow {
    /// A read where the copies may differ.
    Unsynced,
    /// A write where a resync is at work.
    Window,
    /// A write where no intent is durable.
    Intent,
    /// No copy can be read.
    Degraded,
}
