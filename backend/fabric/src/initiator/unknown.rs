//! How many writes of unknown outcome a device has, in all its lanes, and how many of them nobody waits for any more.
//!
//! Owns: the two numbers. Must not know: requests, associations.
//!
//! A write counts as left from when its channel leaves it: until it has ended with an answer, or without having been sent, or until its
//! lost association is quiet, though it has ended for its user before. So there is no time between in which it is in neither number.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

/// See the module's text.
#[derive(Default)]
pub(crate) struct Unknown {
    kept: AtomicU64,
    left: AtomicU64,
}

impl Unknown {
    /// Writes that were not left wait until their associations are quiet.
    pub(crate) fn is_any_kept(&self) -> bool {
        self.kept.load(Ordering::Acquire) > 0
    }

    /// Writes that were left may still be carried out.
    pub(crate) fn is_any_left(&self) -> bool {
        self.left.load(Ordering::Acquire) > 0
    }

    /// A lane keeps so many now, and has kept so many before.
    pub(super) fn keeps(&self, now: u64, before: u64) {
        self.kept.fetch_add(now.wrapping_sub(before), Ordering::AcqRel);
    }

    pub(super) fn leave(&self, writes: u64) {
        self.left.fetch_add(writes, Ordering::AcqRel);
    }

    pub(super) fn are_over(&self, writes: u64) {
        self.left.fetch_sub(writes, Ordering::AcqRel);
    }
}
