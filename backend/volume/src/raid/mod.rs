//! Levels, and where they put data.

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
