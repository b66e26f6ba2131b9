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

/// What a slice reads and writes at most, without a rate and with one. Members in memory are read and written by our own CPU, at 5 to 10 GB/s:
/// a step of a slice takes 40 to 60 µs, or 10 to 15, and whoever comes meanwhile waits for it.
const SLICE_BYTES: (u64, u64) = (512 << 10, 128 << 10);
/// Of each member.
const SLICE_OF_MEMBER_MAX: u64 = 128 << 10;
/// The least that is worth a request: what is around it takes half as long as its bytes, at the speed of memory.
const SLICE_OF_MEMBER_MIN: u64 = 16 << 10;
/// How much of a delay is caught up with, where a rate was asked for: timers and others at work make each pause a little longer.
const CATCH_UP: Duration = Duration::from_millis(10);
/// So many passes of the reactor a slice waits at most for requests that are under way.
const PATIENCE: u32 = 4;

/// The most slices that begin in a second, at a rate: two thirds of what fills the CPU. With 34,000 of them it was full where another machine on the
/// same host had its share, and reads had 14 times their p99.
const SLICES_MAX: u64 = 28_000;

/// What of one member a slice covers, when it goes to so many: divides a strip, or is a multiple of it. Small at a rate: who asks for one cares
/// for what is beside. RAID 5 on three members in memory, at half of what goes (AMD EPYC): 4k reads at depth 1 have 1.0 to 1.3 times their p99
/// with 32 KiB, 1.3 to 1.5 times with 64 KiB; with 16 KiB the CPU is full.
pub(crate) fn slice_bytes(members: u16, rate: u64) -> u64 {
    let members = u64::from(members.max(1));
    let all = if rate == 0 { SLICE_BYTES.0 } else { SLICE_BYTES.1 };
    let share = 1 << (all / members).max(1).ilog2();
    let least = (rate / SLICES_MAX / members).next_power_of_two();
    share.max(least).clamp(SLICE_OF_MEMBER_MIN, SLICE_OF_MEMBER_MAX)
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
/// While all of the work that there is waits for our own CPU that costs nothing, and else next to nothing.
#[derive(Default)]
pub(crate) struct Courtesy {
    waited: u32,
}

impl Courtesy {
    /// Whether a slice that is due waits for another pass.
    pub(crate) fn waits(&mut self, place: &Place) -> bool {
        let waits = self.waited < PATIENCE && place.is_anybody_under_way();
        self.waited = if waits { self.waited + 1 } else { 0 };
        waits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Delays do not add up, and a long one is not made good by a burst.
    #[test]
    fn what_is_late_is_caught_up_with_for_a_while() {
        let pace = Pace::default();
        let at = |ms: u64| Instant(ms * 1_000_000);
        assert_eq!(pace.due(at(5)), at(5), "the first at once");
        // A slice takes 4 ms.
        pace.begin(at(5), 4000, 1_000_000);
        assert_eq!(pace.due(at(6)), at(9));
        pace.begin(at(12), 4000, 1_000_000);
        assert_eq!(pace.due(at(12)), at(13), "3 ms late");
        pace.begin(at(60), 4000, 1_000_000);
        assert_eq!(pace.due(at(60)), at(64), "47 ms late");
        pace.begin(at(64), 4000, 0);
        assert_eq!(pace.due(at(64)), at(64), "as fast as it goes");
    }

    #[test]
    fn slices_fit_into_strips_and_strips_into_slices() {
        let sizes = |rate| [2, 3, 4, 8, 16, 32].map(|members| slice_bytes(members, rate) >> 10);
        assert_eq!(sizes(0), [128, 128, 128, 64, 32, 16]);
        assert_eq!(sizes(1 << 30), [64, 32, 32, 16, 16, 16]);
        assert_eq!(sizes(3_300_000_000), [64, 64, 32, 16, 16, 16]);
        assert_eq!(sizes(6_600_000_000), [128, 128, 64, 32, 16, 16]);
    }
}
