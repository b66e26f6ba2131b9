//! What volatile caches hold of us: which paths' controllers have writes that no FLUSH has reached, and whether a cache
//! was lost with them.
//!
//! A loss is told to every FLUSH that came before the first of them was told, because what they all stand for is gone. What a process before us has left in caches counts as ours: which caches that were is kept for us.
//!
//! Counters have one writer each, a reactor's lane; reading them all is for a FLUSH and for a new association.
#![forbid(unsafe_code)]

use super::config::CacheDoubt;
use crate::nvme::vendor::CacheIdentity;
use crate::simulated::is_broken;
use hawser_runtime::Instant;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a FLUSH waits for the paths to caches that a process before us may have left writes in.
const INHERITANCE_WAIT: Duration = Duration::from_secs(10);

/// One path's.
struct PathCache {
    /// Writes that have ended without being durable, by lane.
    written: Vec<AtomicU64>,
    /// A process before us may have left writes in its cache: counts as one more.
    inherited: AtomicU64,
    /// How many of them a FLUSH has reached.
    flushed: AtomicU64,
    identity: Mutex<Option<CacheIdentity>>,
    /// There is an association.
    is_live: AtomicBool,
}

/// What a process before us has left in caches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inheritance {
    /// Caches that may hold writes which no FLUSH has reached, each with its path.
    pub(crate) caches: Vec<(usize, CacheIdentity)>,
    /// A cache was lost with such writes, and no FLUSH has failed for it.
    pub(crate) lost: bool,
}

/// A device's.
pub(crate) struct Caches {
    paths: Vec<PathCache>,
    /// How often a cache was lost with writes in it.
    losses: AtomicU64,
    /// How many of the losses a FLUSH has failed for.
    told: AtomicU64,
    /// Of a process before us: those of paths where there was no association yet.
    inheritance: Mutex<Vec<(usize, CacheIdentity)>>,
    /// Until then a FLUSH waits for those paths: from the first on. 0: none has come.
    inheritance_until_ns: AtomicU64,
    doubt: CacheDoubt,
}

/// What becomes of a FLUSH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flush {
    /// It makes durable what has ended before it.
    Goes,
    /// It cannot.
    Fails,
    /// It is not known yet, until this time.
    Waits(Instant),
}

impl Caches {
    /// `inherited`: what a process before us has left.
    pub(crate) fn new((paths, lanes): (usize, usize), doubt: CacheDoubt, inherited: Inheritance) -> Caches {
        let path = || PathCache {
            written: (0..lanes).map(|_| AtomicU64::new(0)).collect(),
            inherited: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            identity: Mutex::default(),
            is_live: AtomicBool::new(false),
        };
        let mut caches = inherited.caches;
        caches.retain(|(path, _)| *path < paths);
        Caches {
            paths: (0..paths).map(|_| path()).collect(),
            losses: AtomicU64::new(u64::from(inherited.lost)),
            told: AtomicU64::new(0),
            inheritance: Mutex::new(caches),
            inheritance_until_ns: AtomicU64::new(0),
            doubt,
        }
    }

    /// What a process after us inherits if we end now.
    pub(crate) fn bequeath(&self) -> Inheritance {
        let mut caches = self.inheritance().clone();
        for path in 0..self.paths.len() {
            let may_be_dirty = self.paths[path].is_live.load(Ordering::Relaxed) || self.is_dirty(path);
            let known = self.identity(path).filter(|_| may_be_dirty);
            caches.extend(known.map(|identity| (path, identity)));
        }
        let lost = self.told.load(Ordering::Relaxed) < self.losses.load(Ordering::Relaxed);
        Inheritance { caches, lost }
    }

    fn inheritance(&self) -> MutexGuard<'_, Vec<(usize, CacheIdentity)>> {
        self.inheritance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many losses FLUSHes were told of: what one has to know of itself when it comes.
    pub(crate) fn told(&self) -> u64 {
        self.told.load(Ordering::Relaxed)
    }

    /// A write has ended on this path that may be in a cache. Before its user hears of it.
    pub(crate) fn wrote(&self, path: usize, lane: usize) {
        let counter = &self.paths[path].written[lane];
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Release);
    }

    /// How many writes have ended on this path, on all lanes: what a FLUSH that begins now reaches.
    pub(crate) fn written(&self, path: usize) -> u64 {
        let PathCache { written, inherited, .. } = &self.paths[path];
        let inherited = inherited.load(Ordering::Acquire);
        written.iter().map(|counter| counter.load(Ordering::Acquire)).sum::<u64>() + inherited
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
        self.paths[path].is_live.store(true, Ordering::Relaxed);
        let kept = match (before, now) {
            (Some(before), Some(now)) => before == now,
            _ => self.doubt != CacheDoubt::FailFlush,
        };
        let mut lost = !kept && self.is_dirty(path) && !is_broken("trust_lost_caches");
        if lost {
            self.forget(path);
        }
        lost |= self.inherit(path, now);
        if lost {
            self.losses.fetch_add(1, Ordering::Relaxed);
        }
        lost
    }

    /// What a process before us left in the cache behind this path is ours now; says whether it was lost.
    fn inherit(&self, path: usize, now: Option<CacheIdentity>) -> bool {
        let mut lost = false;
        self.inheritance().retain(|(of, identity)| {
            if now == Some(*identity) {
                self.paths[path].inherited.store(1, Ordering::Release);
            } else if *of == path {
                // It may be behind another path all the same.
                let there = (0..self.paths.len()).find(|other| self.identity(*other) == Some(*identity));
                match there {
                    Some(other) => self.paths[other].inherited.store(1, Ordering::Release),
                    None => lost = true,
                }
            } else {
                return true;
            }
            false
        });
        lost && !is_broken("forget_inherited_caches")
    }

    /// The association on this path is over.
    pub(crate) fn end(&self, path: usize) {
        self.paths[path].is_live.store(false, Ordering::Relaxed);
    }

    /// What becomes of a FLUSH that came when so many losses were told, and reaches the controllers of the paths in `live`.
    /// If it fails, what it would not reach is forgotten.
    pub(crate) fn flush(&self, came: u64, now: Instant, live: impl Fn(usize) -> bool) -> Flush {
        {
            let mut inheritance = self.inheritance();
            if !inheritance.is_empty() {
                let until = (now + INHERITANCE_WAIT).0;
                let first = self.inheritance_until_ns.compare_exchange(
                    0,
                    until,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                );
                let until = Instant(first.err().unwrap_or(until));
                if now < until {
                    return Flush::Waits(until);
                }
                inheritance.clear();
                self.losses.fetch_add(1, Ordering::Relaxed);
            }
        }
        for path in (0..self.paths.len()).filter(|path| !live(*path) && self.is_dirty(*path)) {
            let covered = match self.identity(path) {
                None => self.doubt != CacheDoubt::FailFlush,
                // The same cache behind another path.
                mine => (0..self.paths.len()).any(|other| live(other) && self.identity(other) == mine),
            };
            if !covered {
                self.forget(path);
                self.losses.fetch_add(1, Ordering::Relaxed);
            }
        }
        let known = self.losses.load(Ordering::Relaxed);
        let told = self.told.fetch_max(known, Ordering::Relaxed);
        let came = if is_broken("tell_one_flush") { told } else { came };
        if came < known { Flush::Fails } else { Flush::Goes }
    }

    fn forget(&self, path: usize) {
        self.flushed(path, self.written(path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caches(paths: usize, lanes: usize, doubt: CacheDoubt) -> Caches {
        Caches::new((paths, lanes), doubt, Inheritance::default())
    }

    impl Caches {
        /// Whether a FLUSH that comes now goes.
        fn may_flush(&self, live: impl Fn(usize) -> bool) -> bool {
            self.flush(self.told(), Instant(1), live) == Flush::Goes
        }
    }

    const A: Option<CacheIdentity> = Some([1; 16]);
    const B: Option<CacheIdentity> = Some([2; 16]);

    #[test]
    fn a_cache_that_is_another_with_unflushed_writes_fails_the_next_flush_once() {
        let caches = caches(1, 2, CacheDoubt::Trust);
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
        let caches = caches(2, 1, CacheDoubt::Trust);
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
            let caches = caches(1, 1, doubt);
            caches.begin(0, None);
            caches.wrote(0, 0);
            assert_eq!(caches.begin(0, None), fails);
            assert_eq!(caches.may_flush(|_| true), !fails);
        }
    }

    /// Several queues had a FLUSH under way when a cache was lost. The first of them failed, and the others, which stood for
    /// the same lost writes, ended well.
    #[test]
    fn each_flush_that_came_before_a_loss_was_told_fails_and_none_after_it() {
        let caches = caches(1, 1, CacheDoubt::Trust);
        caches.begin(0, A);
        caches.wrote(0, 0);
        assert!(caches.begin(0, B));
        let came = caches.told();
        for _ in 0..2 {
            assert_eq!(caches.flush(came, Instant(1), |_| true), Flush::Fails);
        }
        assert!(caches.may_flush(|_| true), "who comes later knows");
    }

    /// A process was killed with unflushed writes, and the target's host lost power before the next one came. That one knew of
    /// no writes, and the guest's FLUSH ended well.
    #[test]
    fn what_a_process_before_us_left_in_a_cache_that_is_lost_fails_the_next_flush() {
        let first = caches(2, 1, CacheDoubt::Trust);
        first.begin(0, A);
        first.wrote(0, 0);
        let left = first.bequeath();
        let next = || Caches::new((2, 1), CacheDoubt::Trust, left.clone());
        let live = |_: usize| true;

        let same = next();
        assert!(!same.begin(1, B), "that cache is behind the other path");
        assert_eq!(same.flush(0, Instant(1), live), Flush::Waits(Instant(1) + INHERITANCE_WAIT));
        assert!(!same.begin(0, A));
        assert!(same.may_flush(live));

        let lost = next();
        assert!(lost.begin(0, B));
        assert!(lost.bequeath().lost, "nobody was told yet");
        assert!(!lost.may_flush(live));
        assert!(lost.may_flush(live));

        let gone = next();
        gone.begin(1, B);
        let Flush::Waits(until) = gone.flush(0, Instant(1), live) else {
            unreachable!("its path is not there")
        };
        assert_eq!(gone.flush(0, until, live), Flush::Fails);
    }
}
