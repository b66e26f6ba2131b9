//! What a set with parity has besides: its stripes, who is at work at which, and its parity log.
//!
//! Owns: state that all reactors share. Must not know: what a write is, how I/O is done.
//!
//! A stripe is changed by one at a time, and not read for what is lost while it is. Stripes are told apart by a hash: two that share a word
//! wait for each other, nothing worse. A word counts also the entries about its stripes in the parity log that are not released: while there are any, an
//! opening may write them again, so whatever changes such a stripe has to be in the log too, behind them.

use super::{AtomicBits, Ring, Stripes};
use crate::atomic::{AtomicU8, AtomicU32, Ordering};
use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Words: 32 KiB of them.
const WORDS: u64 = if cfg!(loom) { 4 } else { 8192 };
const HELD: u32 = 1 << 31;

/// See [`super::parity`].
#[derive(Debug)]
pub struct Parity {
    /// Where data and parity are.
    pub stripes: Stripes,
    /// Who is at work.
    pub guards: Guards,
    /// Where the parity log begins on each member, in bytes.
    pub log_offset: u64,
    /// Regions where a whole stripe was being written without the log in a crash, and parity was not made right since: what is lost there
    /// cannot be computed.
    pub doubtful: AtomicBits,
    /// Rows that stay half written, whose entries are in the log for the next opening: what is lost there is not computed.
    half_written: Mutex<BTreeSet<u64>>,
    /// Members, by place in the set, that cannot be done without and have lost their caches: what the log says does not stand on them, and nothing is
    /// computed until it does again.
    behind: AtomicU32,
    /// How often one of them was.
    times_behind: AtomicU64,
    /// 1: the members know that whole stripes are written without the log.
    unlogged: AtomicU8,
    ring: Mutex<Ring>,
    /// Writes to members' parity logs, headers too, and their bytes: only counted.
    log_writes: AtomicU64,
    log_bytes: AtomicU64,
}

impl Parity {
    /// Of a set whose members' parity logs have so many pages for entries, from `log_offset` on.
    #[must_use]
    pub fn new(stripes: Stripes, regions: u32, log_offset: u64, pages: u32) -> Parity {
        Parity {
            stripes,
            guards: Guards::default(),
            log_offset,
            doubtful: AtomicBits::new(regions),
            half_written: Mutex::default(),
            behind: AtomicU32::new(0),
            times_behind: AtomicU64::new(0),
            unlogged: AtomicU8::new(0),
            ring: Mutex::new(Ring::new(pages)),
            log_writes: AtomicU64::new(0),
            log_bytes: AtomicU64::new(0),
        }
    }

    /// A row stays half written, until the next opening.
    pub fn stays_half_written(&self, row: u64) {
        self.half_written.lock().unwrap_or_else(PoisonError::into_inner).insert(row);
    }

    /// Whether a row does. Who asks has the stripe.
    #[must_use]
    pub fn is_half_written(&self, row: u64) -> bool {
        self.half_written.lock().unwrap_or_else(PoisonError::into_inner).contains(&row)
    }

    /// One member's parity log is written to.
    pub fn count_log_write(&self, bytes: usize) {
        self.log_writes.fetch_add(1, Ordering::Relaxed);
        self.log_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Writes to members' parity logs since this was made, and their bytes.
    #[must_use]
    pub fn log_writes(&self) -> (u64, u64) {
        (self.log_writes.load(Ordering::Relaxed), self.log_bytes.load(Ordering::Relaxed))
    }

    /// Whether some member lacks what the log says.
    #[must_use]
    #[inline]
    pub fn is_behind(&self) -> bool {
        self.behind.load(Ordering::Acquire) != 0
    }

    /// The same number as long as no member has begun to lack what the log says; `None` while one does.
    #[must_use]
    pub fn when_level(&self) -> Option<u64> {
        let times = self.times_behind.load(Ordering::Acquire);
        (!self.is_behind()).then_some(times)
    }

    /// Whether this one does, by place in the set.
    #[must_use]
    pub fn is_member_behind(&self, place: u16) -> bool {
        self.behind.load(Ordering::Acquire) >> place & 1 != 0
    }

    /// A member, by place in the set, lacks what the log says; or has it again, or is out.
    pub fn set_behind(&self, place: u16, is: bool) {
        if is {
            // First: who sees that it is over sees that it was.
            self.times_behind.fetch_add(1, Ordering::AcqRel);
        }
        match is {
            true => self.behind.fetch_or(1 << place, Ordering::AcqRel),
            false => self.behind.fetch_and(!(1 << place), Ordering::AcqRel),
        };
    }

    /// Whether a whole stripe may be written without the log.
    #[must_use]
    #[inline]
    pub fn is_unlogged(&self) -> bool {
        self.unlogged.load(Ordering::Acquire) != 0
    }

    /// Lets whole stripes be written without the log from now on, or not. The owner's.
    pub fn set_unlogged(&self, is: bool) {
        self.unlogged.store(u8::from(is), Ordering::Release);
    }

    /// The parity log, for a moment.
    pub fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Entries before this number are released: their stripes can be changed without the log again.
    pub fn release(&self, before: u64) {
        for row in self.ring().release(before) {
            self.guards.is_released(row);
        }
    }
}

/// One bit and one number for each stripe.
#[derive(Debug)]
pub struct Guards(Box<[AtomicU32]>);

impl Default for Guards {
    fn default() -> Guards {
        Guards((0..WORDS).map(|_| AtomicU32::new(0)).collect())
    }
}

impl Guards {
    #[inline]
    fn word(&self, row: u64) -> &AtomicU32 {
        #[allow(clippy::cast_possible_truncation, reason = "below WORDS")]
        &self.0[(row % WORDS) as usize]
    }

    /// Takes a stripe that nobody has, and of which nothing is in the log. Given back by [`Guards::give_back`].
    #[must_use]
    #[inline]
    pub fn take_unlogged(&self, row: u64) -> bool {
        self.word(row).compare_exchange(0, HELD, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Takes a stripe that nobody has. Given back by [`Guards::give_back`].
    #[must_use]
    pub fn take(&self, row: u64) -> bool {
        self.word(row).fetch_or(HELD, Ordering::AcqRel) & HELD == 0
    }

    /// Gives a stripe back.
    #[inline]
    pub fn give_back(&self, row: u64) {
        let before = self.word(row).fetch_and(!HELD, Ordering::AcqRel);
        debug_assert!(before & HELD != 0, "row {row} was nobody's");
    }

    /// Whether something about a stripe is in the log. Whoever has taken it is the only one who adds to that.
    #[must_use]
    pub fn is_logged(&self, row: u64) -> bool {
        self.word(row).load(Ordering::Acquire) & !HELD != 0
    }

    /// An entry about a stripe comes into the log. Whoever has taken it says so.
    pub fn is_to_be_logged(&self, row: u64) {
        self.word(row).fetch_add(1, Ordering::AcqRel);
    }

    /// An entry about a stripe is not needed any more, and no opening will look at it.
    pub fn is_released(&self, row: u64) {
        let before = self.word(row).fetch_sub(1, Ordering::AcqRel);
        assert!(before & !HELD != 0, "row {row} has nothing in the log");
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_stripe_is_taken_once_and_not_without_the_log_while_something_is_in_it() {
        let guards = Guards::default();
        assert!(guards.take_unlogged(3) && !guards.take_unlogged(3) && !guards.take(3));
        assert!(!guards.take(3 + WORDS), "shares its word");
        guards.is_to_be_logged(3);
        guards.give_back(3);
        assert!(guards.is_logged(3) && !guards.take_unlogged(3));
        assert!(guards.take(3));
        guards.is_released(3);
        assert!(!guards.is_logged(3));
        guards.give_back(3);
        assert!(guards.take_unlogged(3));
    }
}
