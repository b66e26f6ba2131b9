//! Volatile caches that were lost with something that no other member has: how many, and whether the owner has seen to what that means.
//!
//! Whoever hears of one says so, on any thread, before anything ends that came after it. Until the tables name nothing that was lost, reads and
//! writes wait; and reads that were under way are done again, since they may have been of the time before ([`super::owner::Owner::take_back`]).
//! A write that was under way is as one that had just ended: the next FLUSH that begins when it has fails.
//!
//! Queues look at it once for each batch that comes or ends.

use std::sync::atomic::{AtomicU64, Ordering};

/// See the module's text.
#[derive(Default)]
pub(crate) struct LostCaches(AtomicU64);

/// As it was at some time: the number of caches, and below it one bit: something is to be seen to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen(u64);

impl LostCaches {
    #[inline]
    pub(crate) fn look(&self) -> Seen {
        Seen(self.0.load(Ordering::Acquire))
    }

    /// One more was lost.
    pub(crate) fn one_more(&self) -> Seen {
        let next = |now: u64| (now | 1) + 2;
        let before = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| Some(next(now)));
        Seen(next(before.expect("it always has a next")))
    }

    /// What had been lost then is seen to, and nothing was since, unless this says otherwise.
    pub(crate) fn is_seen_to(&self, seen: Seen) -> bool {
        self.0.compare_exchange(seen.0, seen.0 & !1, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

impl Seen {
    /// Something is to be seen to.
    #[inline]
    pub(crate) fn is_open(self) -> bool {
        self.0 & 1 == 1
    }

    /// How many were lost.
    #[inline]
    pub(crate) fn number(self) -> u64 {
        self.0 >> 1
    }
}

#[cfg(test)]
mod tests {
    use super::LostCaches;

    #[test]
    fn what_is_lost_meanwhile_is_not_seen_to() {
        let it = LostCaches::default();
        assert!(!it.look().is_open() && it.look().number() == 0);
        let first = it.one_more();
        assert!(first == it.look() && first.is_open() && first.number() == 1);
        let second = it.one_more();
        assert!(!it.is_seen_to(first));
        assert!(it.look() == second && second.is_open() && second.number() == 2);
        assert!(it.is_seen_to(second));
        assert!(!it.look().is_open() && it.look().number() == 2);
        // Once more does no harm.
        assert!(it.is_seen_to(it.look()));
    }
}
