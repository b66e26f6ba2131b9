//! What volatile caches hold of us: which paths' controllers have writes that no FLUSH has reached, and whether a cache
//! was lost with them.
//!
//! Counters have one writer each, a reactor's lane; reading them all is for a FLUSH and for a new association.
#![forbid(unsafe_code)]

use super::config::CacheDoubt;
use crate::nvme::vendor::CacheIdentity;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// One path's.
struct PathCache {
    /// Writes that have ended without being durable, by lane.
    written: Vec<AtomicU64>,
    /// How many of them a FLUSH has reached.
    flushed: AtomicU64,
    identity: Mutex<Option<CacheIdentity>>,
}

/// A device's.
pub(crate) struct Caches {
    paths: Vec<PathCache>,
    /// A cache was lost with writes in it: the next FLUSH fails.
    lost: AtomicBool,
    doubt: CacheDoubt,
}

impl Caches {
    pub(crate) fn new(paths: usize, lanes: usize, doubt: CacheDoubt) -> Caches {
        let path = || PathCache {
            written: (0..lanes).map(|_| AtomicU64::new(0)).collect(),
            flushed: AtomicU64::new(0),
            identity: Mutex::default(),
        };
        Caches { paths: (0..paths).map(|_| path()).collect(), lost: AtomicBool::new(false), doubt }
    }

    /// A write has ended on this path that may be in a cache. Before its user hears of it.
    pub(crate) fn wrote(&self, path: usize, lane: usize) {
        let counter = &self.paths[path].written[lane];
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Release);
    }

    /// How many writes have ended on this path, on all lanes: what a FLUSH that begins now reaches.
    pub(crate) fn written(&self, path: usize) -> u64 {
        self.paths[path].written.iter().map(|counter| counter.load(Ordering::Acquire)).sum()
    }

    /// A FLUSH through this path has reached so many.
    pub(crate) fn flushed(&self, path: usize, written: u64) {
        self.paths[path].flushed.fetch_max(written, Ordering::Relaxed);
    }

    fn is_dirty(&self, path: usize) -> bool {
        self.written(path) > self.paths[path].flushed.load(Ordering::Relaxed)
    }

    fn identity(&self, path: usize) -> Option<CacheIdentity> {
        *self.paths[path].identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new association on this path, whose cache is `now`; says whether writes were lost, or may have been.
    pub(crate) fn begin(&self, path: usize, now: Option<CacheIdentity>) -> bool {
        let mut identity = self.paths[path].identity.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *identity, now);
        drop(identity);
        let kept = match (before, now) {
            (Some(before), Some(now)) => before == now,
            _ => self.doubt != CacheDoubt::FailFlush,
        };
        let lost = !kept && self.is_dirty(path);
        if lost {
            self.forget(path);
            self.lost.store(true, Ordering::Relaxed);
        }
        lost
    }

    /// Whether a FLUSH that reaches the controllers of the paths in `live` makes everything durable that has ended. If not,
    /// it fails, and what it would not reach is forgotten.
    pub(crate) fn may_flush(&self, live: impl Fn(usize) -> bool) -> bool {
        let mut whole = !self.lost.swap(false, Ordering::Relaxed);
        for path in (0..self.paths.len()).filter(|path| !live(*path) && self.is_dirty(*path)) {
            let covered = match self.identity(path) {
                None => self.doubt != CacheDoubt::FailFlush,
                // The same cache behind another path.
                mine => (0..self.paths.len()).any(|other| live(other) && self.identity(other) == mine),
            };
            if !covered {
                self.forget(path);
                whole = false;
            }
        }
        whole
    }

    fn forget(&self, path: usize) {
        self.flushed(path, self.written(path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Option<CacheIdentity> = Some([1; 16]);
    const B: Option<CacheIdentity> = Some([2; 16]);

    #[test]
    fn a_cache_that_is_another_with_unflushed_writes_fails_the_next_flush_once() {
        let caches = Caches::new(1, 2, CacheDoubt::Trust);
        assert!(!caches.begin(0, A));
        assert!(!caches.begin(0, B), "nothing was written");
        caches.wrote(0, 1);
        assert!(!caches.begin(0, B), "it is the same");
        let written = caches.written(0);
        caches.flushed(0, written);
        assert!(!caches.begin(0, A), "it was flushed");
        caches.wrote(0, 0);
        assert!(caches.begin(0, B));
        assert!(!caches.may_flush(|_| true));
        assert!(caches.may_flush(|_| true));
    }

    #[test]
    fn a_path_that_is_gone_is_covered_by_one_to_the_same_cache_only() {
        let caches = Caches::new(2, 1, CacheDoubt::Trust);
        for (other, covered) in [(A, true), (B, false)] {
            caches.begin(0, A);
            caches.begin(1, other);
            caches.wrote(0, 0);
            assert_eq!(caches.may_flush(|path| path == 1), covered);
        }
        assert!(caches.may_flush(|path| path == 1), "told once");
    }

    #[test]
    fn without_an_identity_the_configuration_decides() {
        for (doubt, fails) in [(CacheDoubt::Trust, false), (CacheDoubt::FailFlush, true)] {
            let caches = Caches::new(1, 1, doubt);
            caches.begin(0, None);
            caches.wrote(0, 0);
            assert_eq!(caches.begin(0, None), fails);
            assert_eq!(caches.may_flush(|_| true), !fails);
        }
    }
}
