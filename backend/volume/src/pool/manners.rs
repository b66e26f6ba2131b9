//! Manners of work that nobody waits for: how much of it is begun, and when, so that whoever waits for an answer has it soon.
//!
//! ```text
//!   time ─►   ▒▒      ▒▒      ▒▒      ▒▒      ▒▒     slices of the work, evenly spread at the rate that was asked for
//!               ░    ░    ░      ░      ░    ░       requests: none waits for more than the rest of what a pass of the reactor does
//! ```
//!
//! Owns: how large a slice is, when the next is due. Must not know: what the work is.

use super::place::Place;
use hawser_runtime::Instant;
use std::cell::Cell;
use std::time::Duration;

/// What a slice reads and writes at most. Members in memory are read and written by our own CPU, at 5 to 10 GB/s: a step of a slice takes
/// 10 to 30 µs, and whoever comes meanwhile waits for it.
const SLICE_BYTES: u64 = 256 << 10;
/// What it reads of a member, or writes to it, at most.
const SLICE_OF_MEMBER_MAX: u64 = 64 << 10;
/// The least that is worth a request.
const SLICE_OF_MEMBER_MIN: u64 = 4 << 10;
/// How much of a delay is caught up with, where a rate was asked for: timers and others at work make each pause a little longer.
const CATCH_UP: Duration = Duration::from_millis(10);
/// So many passes of the reactor a slice waits at most for requests that are under way.
const PATIENCE: u32 = 4;

/// What of one member a slice covers, when it goes to so many: divides a strip, or is a multiple of it.
pub(crate) fn slice_bytes(members: u16) -> u64 {
    let share = SLICE_BYTES / u64::from(members.max(1));
    (1 << share.max(1).ilog2()).clamp(SLICE_OF_MEMBER_MIN, SLICE_OF_MEMBER_MAX)
}

/// When the next slice may begin, at a rate.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    due: Cell<Option<Instant>>,
}

impl Pace {
    /// When the next slice is due.
    pub(crate) fn due(&self, now: Instant) -> Instant {
        self.due.get().unwrap_or(now)
    }

    /// Whether so much has been waited for that the rate would not be kept.
    pub(crate) fn is_late(&self, now: Instant) -> bool {
        self.due.get().is_some_and(|due| due + CATCH_UP / 2 < now)
    }

    /// A slice of so many bytes begins; `rate` is of a second, 0: as many as can be.
    pub(crate) fn begin(&self, now: Instant, bytes: u64, rate: u64) {
        let Some(nanoseconds) = bytes.saturating_mul(1_000_000_000).checked_div(rate) else {
            self.due.set(None);
            return;
        };
        let from = self.due.get().filter(|due| *due + CATCH_UP >= now).unwrap_or(now);
        self.due.set(Some(from + Duration::from_nanos(nanoseconds)));
    }
}

/// Lets requests go first that are under way on this reactor, as far as they only wait for it. Those that wait for members are not waited for.
#[derive(Default)]
pub(crate) struct Courtesy {
    waited: u32,
}

impl Courtesy {
    /// Whether a slice that is due waits for another pass.
    pub(crate) fn waits(&mut self, place: &Place, is_late: bool) -> bool {
        let waits = !is_late && self.waited < PATIENCE && place.is_anybody_under_way();
        self.waited = if waits { self.waited + 1 } else { 0 };
        waits
    }
}
