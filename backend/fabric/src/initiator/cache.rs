//! What volatile caches hold of us: which paths' controllers have writes that no FLUSH has reached, and whether a cache
//! was lost with them.
//!
//! A loss is told to every FLUSH that came before it was told, because what they all stand for is gone. It has been told when one
//! has failed that came after the last write that may be among what was lost. What a process before us has left in caches
//! counts as ours: which caches that were is kept for us.
//!
//! Counters have one writer each, a reactor's lane; reading them all is for a FLUSH and for a new association.
#![forbid(unsafe_code)]

use super::config::CacheDoubt;
use crate::nvme::vendor::CacheIdentity;
use crate::simulated::is_broken;
use hawser_runtime::Instant;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a FLUSH waits for the paths to caches that a process before us may have left writes in.
const INHERITANCE_WAIT: Duration = Duration::from_secs(10);

/// What is known of unflushed writes after something has happened to the controller that has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// There are none, or their cache is the same.
    Kept,
    /// So many were in a cache that is another one now.
    Lost(u64),
    /// So many were in a cache of which nothing tells whether it was lost; they are taken for lost.
    Doubted(u64),
    /// The same, and they are taken for kept; the first time that it is said of these.
    Trusted(u64),
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fate::Kept => f.write_str("all writes are kept"),
            Fate::Lost(0) => {
                f.write_str("writes before it were lost with a volatile cache, or may have been")
            }
            Fate::Lost(writes) => {
                write!(f, "the target lost its volatile cache with {writes} writes that were not flushed")
            }
            Fate::Doubted(writes) => write!(
                f,
                "the target was away with {writes} writes that were not flushed and does not tell whether its volatile \
                 cache was lost; taken for lost (on_cache_doubt = fail-flush)"
            ),
            Fate::Trusted(writes) => write!(
                f,
                "the target was away with {writes} writes that were not flushed and does not tell whether its volatile \
                 cache was lost; taken for kept (on_cache_doubt = trust)"
            ),
        }
    }
}

/// One path's.
struct PathCache {
    /// Writes that have ended without being durable, by lane.
    written: Vec<AtomicU64>,
    /// A process before us may have left writes in its cache: counts as one more.
    inherited: AtomicU64,
    /// How many of them a FLUSH has reached.
    flushed: AtomicU64,
    /// How many it was already said of that nothing tells whether they were lost.
    doubted: AtomicU64,
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
    /// There is something in `inheritance`.
    is_heir: AtomicBool,
    /// Of a process before us: those of paths where there was no association yet, or is none any more in the configuration.
    inheritance: Mutex<Vec<(usize, CacheIdentity)>>,
    /// Until then a FLUSH waits for those paths: from the first on. 0: none has come.
    inheritance_until_ns: AtomicU64,
    /// How often nothing told whether one was lost.
    doubts: AtomicU64,
    doubt: CacheDoubt,
}

/// How things were when a FLUSH came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Came {
    /// Losses that FLUSHes had been told of.
    told: u64,
    /// Losses that there had been.
    losses: u64,
    /// Writes that had ended: what it stands for.
    written: u64,
}

/// Paths without an association, as bits, and how many writes have ended on them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LostPaths {
    paths: u64,
    written: u64,
}

/// What becomes of a FLUSH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flush {
    /// It makes durable what has ended before it, as far as is known; [`Fate::Trusted`] where that is taken on trust.
    Goes(Fate),
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
            doubted: AtomicU64::new(0),
            identity: Mutex::default(),
            is_live: AtomicBool::new(false),
        };
        Caches {
            paths: (0..paths).map(|_| path()).collect(),
            losses: AtomicU64::new(u64::from(inherited.lost)),
            told: AtomicU64::new(0),
            is_heir: AtomicBool::new(!inherited.caches.is_empty()),
            inheritance: Mutex::new(inherited.caches),
            inheritance_until_ns: AtomicU64::new(0),
            doubts: AtomicU64::new(0),
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

    /// What a FLUSH has to know of itself when it comes.
    pub(crate) fn came(&self) -> Came {
        Came {
            told: self.told.load(Ordering::Relaxed),
            losses: self.losses.load(Ordering::Relaxed),
            written: self.written_anywhere(),
        }
    }

    fn written_anywhere(&self) -> u64 {
        (0..self.paths.len()).map(|path| self.written(path)).fold(0, u64::wrapping_add)
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

    /// Something was lost that no FLUSH has told.
    pub(crate) fn owes_a_loss(&self) -> bool {
        self.told.load(Ordering::Relaxed) < self.losses.load(Ordering::Relaxed)
    }

    /// Whether a FLUSH has to be asked about, whatever cache there is now.
    pub(crate) fn has_to_tell(&self) -> bool {
        self.owes_a_loss() || self.is_heir.load(Ordering::Relaxed)
    }

    /// Paths without an association to the cache behind `path`: what was written through them a FLUSH through `path` reaches.
    pub(crate) fn lost_paths(&self, path: usize) -> LostPaths {
        let Some(mine) = self.identity(path) else { return LostPaths::default() };
        let lost =
            |of: &usize| !self.paths[*of].is_live.load(Ordering::Relaxed) && self.identity(*of) == Some(mine);
        let paths = (0..self.paths.len().min(64)).filter(lost).fold(0, |paths, of| paths | 1 << of);
        LostPaths { paths, written: self.written_through(paths) }
    }

    fn written_through(&self, paths: u64) -> u64 {
        let among = |path: &usize| paths >> path & 1 == 1;
        let written = (0..self.paths.len().min(64)).filter(among).map(|path| self.written(path));
        written.fold(0, u64::wrapping_add)
    }

    /// A FLUSH has reached what was written through these, unless something has happened to them meanwhile.
    pub(crate) fn flushed_too(&self, lost: LostPaths) {
        let LostPaths { paths, written } = lost;
        let all = || (0..self.paths.len().min(64)).filter(move |path| paths >> path & 1 == 1);
        let unchanged = all().all(|path| !self.paths[path].is_live.load(Ordering::Relaxed))
            && self.written_through(paths) == written;
        if unchanged {
            all().for_each(|path| self.forget(path));
        }
    }

    /// How often a cache was lost with unflushed writes, and how often nothing told whether it was.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.losses.load(Ordering::Relaxed), self.doubts.load(Ordering::Relaxed))
    }

    fn is_dirty(&self, path: usize) -> bool {
        self.unflushed(path) > 0
    }

    fn unflushed(&self, path: usize) -> u64 {
        self.written(path).saturating_sub(self.paths[path].flushed.load(Ordering::Relaxed))
    }

    /// Nothing tells whether the unflushed writes of this path, of which there are some, were lost.
    fn doubt(&self, path: usize) -> Fate {
        let (unflushed, written) = (self.unflushed(path), self.written(path));
        // The same writes are doubted once, whatever happens to them next.
        let first = self.paths[path].doubted.fetch_max(written, Ordering::Relaxed) < written;
        match self.doubt {
            // Only discards are left in caches.
            CacheDoubt::WriteThrough => return Fate::Kept,
            CacheDoubt::Trust if !first => return Fate::Kept,
            _ => {}
        }
        if first {
            self.doubts.fetch_add(1, Ordering::Relaxed);
        }
        match self.doubt {
            CacheDoubt::FailFlush => Fate::Doubted(unflushed),
            _ => Fate::Trusted(unflushed),
        }
    }

    fn identity(&self, path: usize) -> Option<CacheIdentity> {
        *self.paths[path].identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new association on this path, whose cache is `now`; says what is known of the writes before.
    pub(crate) fn begin(&self, path: usize, now: Option<CacheIdentity>) -> Fate {
        let mut identity = self.paths[path].identity.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *identity, now);
        drop(identity);
        self.paths[path].is_live.store(true, Ordering::Relaxed);
        let mut fate = match (before, now) {
            _ if !self.is_dirty(path) || is_broken("trust_lost_caches") => Fate::Kept,
            (Some(before), Some(now)) if before == now => Fate::Kept,
            (Some(_), Some(_)) => Fate::Lost(self.unflushed(path)),
            _ => self.doubt(path),
        };
        if matches!(fate, Fate::Lost(_) | Fate::Doubted(_)) {
            self.forget(path);
        }
        if self.inherit(path, now) && !matches!(fate, Fate::Lost(_) | Fate::Doubted(_)) {
            fate = Fate::Lost(0);
        }
        if matches!(fate, Fate::Lost(_) | Fate::Doubted(_)) {
            self.losses.fetch_add(1, Ordering::Relaxed);
        }
        fate
    }

    /// What a process before us left in the cache behind this path is ours now; says whether it was lost.
    fn inherit(&self, path: usize, now: Option<CacheIdentity>) -> bool {
        let mut lost = false;
        let mut inheritance = self.inheritance();
        inheritance.retain(|(of, identity)| {
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
        self.is_heir.store(!inheritance.is_empty(), Ordering::Relaxed);
        lost && !is_broken("forget_inherited_caches")
    }

    /// The association on this path is over.
    pub(crate) fn end(&self, path: usize) {
        self.paths[path].is_live.store(false, Ordering::Relaxed);
    }

    /// What becomes of a FLUSH that came then, and reaches the controllers of the paths in `live`.
    /// If it fails, what it would not reach is forgotten.
    pub(crate) fn flush(&self, came: Came, now: Instant, live: impl Fn(usize) -> bool) -> Flush {
        if self.is_heir.load(Ordering::Relaxed) {
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
                self.is_heir.store(false, Ordering::Relaxed);
                self.losses.fetch_add(1, Ordering::Relaxed);
            }
        }
        let mut trusted = Fate::Kept;
        for path in (0..self.paths.len()).filter(|path| !live(*path) && self.is_dirty(*path)) {
            let fate = match self.identity(path) {
                None => self.doubt(path),
                // The same cache behind another path.
                mine if (0..self.paths.len()).any(|other| live(other) && self.identity(other) == mine) => {
                    Fate::Kept
                }
                _ => Fate::Lost(self.unflushed(path)),
            };
            match fate {
                Fate::Kept => {}
                Fate::Trusted(_) => trusted = fate,
                Fate::Lost(_) | Fate::Doubted(_) => {
                    self.forget(path);
                    self.losses.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        let known = self.losses.load(Ordering::Relaxed);
        // Writes that ended after it came are not what it stands for: if there are any, the next one fails too.
        let stands_for_all = came.written == self.written_anywhere();
        let tells = if stands_for_all { known } else { came.losses };
        let told = self.told.fetch_max(tells, Ordering::Relaxed);
        let before = if is_broken("tell_one_flush") { told } else { came.told };
        if before < known { Flush::Fails } else { Flush::Goes(trusted) }
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
            matches!(self.flush(self.came(), Instant(1), live), Flush::Goes(_))
        }
    }

    const A: Option<CacheIdentity> = Some([1; 16]);
    const B: Option<CacheIdentity> = Some([2; 16]);

    #[test]
    fn a_cache_that_is_another_with_unflushed_writes_fails_the_next_flush_once() {
        let caches = caches(1, 2, CacheDoubt::Trust);
        assert_eq!(caches.begin(0, A), Fate::Kept);
        assert_eq!(caches.begin(0, B), Fate::Kept, "nothing was written");
        caches.wrote(0, 1);
        assert_eq!(caches.begin(0, B), Fate::Kept, "it is the same");
        let written = caches.written(0);
        caches.flushed(0, written);
        assert_eq!(caches.begin(0, A), Fate::Kept, "it was flushed");
        caches.wrote(0, 0);
        assert_eq!(caches.begin(0, B), Fate::Lost(1));
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
        for (doubt, fate, fails) in
            [(CacheDoubt::Trust, Fate::Trusted(1), false), (CacheDoubt::FailFlush, Fate::Doubted(1), true)]
        {
            let caches = caches(1, 1, doubt);
            caches.begin(0, None);
            assert_eq!(caches.counts().1, 0, "nothing was written");
            caches.wrote(0, 0);
            assert_eq!(caches.begin(0, None), fate);
            assert_eq!(caches.begin(0, None), Fate::Kept, "of the same writes it was said");
            assert_eq!(caches.may_flush(|_| true), !fails);
            assert_eq!(caches.counts().1, 1);
        }
    }

    /// A FLUSH that could not reach a path's cache was answered through another path, and nothing said that it was on trust.
    #[test]
    fn a_flush_that_misses_a_cache_of_no_name_is_a_doubt_too() {
        let caches = caches(2, 1, CacheDoubt::Trust);
        let flush = || caches.flush(caches.came(), Instant(1), |path| path == 1);
        caches.wrote(0, 0);
        assert_eq!(flush(), Flush::Goes(Fate::Trusted(1)));
        assert_eq!(flush(), Flush::Goes(Fate::Kept));
        assert_eq!(caches.begin(0, None), Fate::Kept, "the same writes");
        caches.wrote(0, 0);
        assert_eq!(caches.begin(0, None), Fate::Trusted(2));
        assert_eq!(caches.counts(), (0, 2));
    }

    /// Several queues had a FLUSH under way when a cache was lost. The first of them failed, and the others, which stood for
    /// the same lost writes, ended well.
    #[test]
    fn each_flush_that_came_before_a_loss_was_told_fails_and_none_after_it() {
        let caches = caches(1, 1, CacheDoubt::Trust);
        caches.begin(0, A);
        caches.wrote(0, 0);
        assert_eq!(caches.begin(0, B), Fate::Lost(1));
        let came = caches.came();
        for _ in 0..2 {
            assert_eq!(caches.flush(came, Instant(1), |_| true), Flush::Fails);
        }
        assert!(caches.may_flush(|_| true), "who comes later knows");
    }

    /// A FLUSH was under way when a cache was lost, and a write ended after it had come: lost too, and the FLUSH that failed did not
    /// stand for it. The next one ended well.
    #[test]
    fn a_write_after_a_flush_that_fails_is_told_by_the_next_one() {
        let caches = caches(1, 1, CacheDoubt::Trust);
        caches.begin(0, A);
        caches.wrote(0, 0);
        let came = caches.came();
        caches.wrote(0, 0);
        assert_eq!(caches.begin(0, B), Fate::Lost(2));
        assert_eq!(caches.flush(came, Instant(1), |_| true), Flush::Fails);
        assert!(caches.owes_a_loss());
        assert!(!caches.may_flush(|_| true), "for the second write");
        assert!(!caches.owes_a_loss() && caches.may_flush(|_| true));
    }

    /// A path died with unflushed writes, a FLUSH reached them through another path to the same cache, and hours later the target
    /// was restarted: the next FLUSH failed, and nothing was lost.
    #[test]
    fn a_flush_reaches_what_was_written_through_a_path_that_is_gone() {
        let caches = caches(2, 1, CacheDoubt::Trust);
        caches.begin(0, A);
        caches.begin(1, A);
        caches.wrote(0, 0);
        caches.end(0);
        let lost = caches.lost_paths(1);
        caches.flushed_too(lost);
        assert_eq!(caches.begin(1, B), Fate::Kept);
        assert!(caches.may_flush(|path| path == 1));
        assert_eq!(caches.begin(0, B), Fate::Kept);

        // It was back in between, and had more written to it.
        caches.wrote(0, 0);
        caches.end(0);
        let lost = caches.lost_paths(1);
        caches.begin(0, B);
        caches.wrote(0, 0);
        caches.end(0);
        caches.flushed_too(lost);
        assert_eq!(caches.begin(0, A), Fate::Lost(2));
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
        assert_eq!(same.begin(1, B), Fate::Kept, "that cache is behind the other path");
        assert_eq!(same.flush(same.came(), Instant(1), live), Flush::Waits(Instant(1) + INHERITANCE_WAIT));
        assert_eq!(same.begin(0, A), Fate::Kept);
        assert!(same.may_flush(live));

        let lost = next();
        assert_eq!(lost.begin(0, B), Fate::Lost(0));
        assert!(lost.bequeath().lost && lost.owes_a_loss(), "nobody was told yet");
        assert!(!lost.may_flush(live));
        assert!(!lost.owes_a_loss() && lost.may_flush(live));

        let gone = next();
        gone.begin(1, B);
        let Flush::Waits(until) = gone.flush(gone.came(), Instant(1), live) else {
            unreachable!("its path is not there")
        };
        assert_eq!(gone.flush(gone.came(), until, live), Flush::Fails);
    }
}
