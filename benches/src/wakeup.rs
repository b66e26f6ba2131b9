//! How long this machine takes to wake a thread that sleeps on another CPU: the unit in which everything that waits on an
//! eventfd is measured. A server that polls for less than this is asleep again before a client that slept is back.
//!
//! Owns: the measurement. Must not know: servers or clients.
#![forbid(unsafe_code)]

use std::io;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::sys;

/// Round trips that are timed.
const ROUNDS: usize = 300;
/// Between two of them, so that both CPUs have gone to sleep.
const PAUSE: Duration = Duration::from_micros(300);

/// The median time from writing an eventfd on `cpus[0]` until a thread that slept on it runs on `cpus[1]`, by half of a
/// round trip in which both sides sleep.
pub fn wake_up(cpus: [usize; 2]) -> io::Result<Duration> {
    let (there, back) = (EventFd::new(EFD_CLOEXEC)?, EventFd::new(EFD_CLOEXEC)?);
    let mut round_trips = std::thread::scope(|scope| {
        // Both go on where they could not be pinned, so that neither waits for ever for the other.
        let echo = scope.spawn(|| {
            let pinned = sys::pin_to(cpus[1]);
            for _ in 0..ROUNDS {
                there.read()?;
                back.write(1)?;
            }
            pinned
        });
        let measure = scope.spawn(|| {
            let pinned = sys::pin_to(cpus[0]);
            let mut times = Vec::with_capacity(ROUNDS);
            for _ in 0..ROUNDS {
                std::thread::sleep(PAUSE);
                let start = Instant::now();
                there.write(1)?;
                back.read()?;
                times.push(start.elapsed());
            }
            pinned.map(|()| times)
        });
        let died = |_| io::Error::other("a thread of the measurement died");
        let (measured, echoed) = (measure.join().map_err(died)?, echo.join().map_err(died)?);
        echoed.and(measured)
    })?;
    round_trips.sort_unstable();
    Ok(round_trips[ROUNDS / 2] / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_up_takes_some_time() {
        let time = wake_up([0, sys::cpus() - 1]).expect("two eventfds");
        assert!(time > Duration::from_nanos(100) && time < Duration::from_secs(60), "{time:?}");
        assert!(wake_up([0, usize::MAX]).is_err());
    }
}
