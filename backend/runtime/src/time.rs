//! Time as the reactor sees it: nanoseconds since an arbitrary start, never wall-clock time.

use std::ops::{Add, Sub};
use std::time::Duration;

/// A point in time: nanoseconds of `CLOCK_MONOTONIC`, or of the simulator's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(pub u64);

impl Instant {
    /// Far enough in the future to never come (584 years).
    pub const NEVER: Instant = Instant(u64::MAX);

    /// Reads `CLOCK_MONOTONIC`. Only drivers call this: everybody else asks its [`crate::Runtime`].
    #[must_use]
    pub fn monotonic() -> Instant {
        let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `ts` is a valid place for the result, and CLOCK_MONOTONIC always exists on Linux.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut ts) };
        Instant(ts.tv_sec.unsigned_abs() * 1_000_000_000 + ts.tv_nsec.unsigned_abs())
    }

    /// Nanoseconds from `earlier` to here; 0 when `earlier` is later.
    #[must_use]
    pub fn ns_since(self, earlier: Instant) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, duration: Duration) -> Instant {
        Instant(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Instant> for Instant {
    type Output = Duration;
    fn sub(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.ns_since(earlier))
    }
}
