//! Verbs without devices: a table ([`TABLE`]) whose queue pairs move bytes within this process, with everything that a device and a
//! network may do to completions and connections, under a seed.
//!
//! Owns: the world that the table acts on: of a thread that has a [`crate::World`] with verbs its own, with that world's clock and faults;
//! of all other threads one, without a clock, which [`disturb`] disturbs. Must not know: NVMe.
//!
//! ```text
//!   table ── the functions    fabric ── what they act on: ends, queue pairs, windows
//!                             carry ─── how a request is carried out    faults ── what goes wrong
//! ```

mod carry;
mod fabric;
mod faults;
mod table;

pub(crate) use fabric::FD_BASE;
pub use fabric::{Counts, Denied, Disturbance};
pub use table::TABLE;

use crate::net::{Side, Sides};
use fabric::Fabric;
use hawser_runtime::Instant;
use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

static EVERYWHERE: LazyLock<Mutex<Fabric>> = LazyLock::new(|| Mutex::new(Fabric::new(false, 1)));

thread_local! {
    static HERE: Cell<Option<&'static Mutex<Fabric>>> = const { Cell::new(None) };
}

fn lock(fabric: &'static Mutex<Fabric>) -> MutexGuard<'static, Fabric> {
    fabric.lock().unwrap_or_else(PoisonError::into_inner)
}

fn here() -> MutexGuard<'static, Fabric> {
    lock(HERE.get().unwrap_or(&EVERYWHERE))
}

/// From now on things go wrong so often, by this seed.
pub fn disturb(disturbance: Disturbance, seed: u64) {
    let mut fabric = here();
    fabric.disturbance = disturbance;
    fabric.random = crate::Random::new(seed);
}

/// From now on this is denied to whoever asks.
pub fn deny(denied: Option<Denied>) {
    here().denied = denied;
}

/// What was seen.
#[must_use]
pub fn counts() -> Counts {
    here().counts
}

/// Windows that are bound.
#[must_use]
pub fn bound_windows() -> usize {
    here().windows.values().filter(|window| window.bound.is_some()).count()
}

/// Whether a peer may reach memory by this name of a window, as its device would judge it.
#[must_use]
pub fn is_reachable(key: u32) -> bool {
    here().window_of(key).is_some_and(|window| window.bound.is_some())
}

/// The last name of every window.
#[must_use]
pub fn window_names() -> Vec<u32> {
    here().windows.values().map(|window| window.key).collect()
}

/// Removes the device, and puts another one in its place.
pub fn replace_device() {
    here().replace_device();
}

/// Domains that were ever opened.
#[must_use]
pub fn domains() -> usize {
    here().domains
}

/// The verbs of a simulated world.
#[derive(Clone, Copy)]
pub(crate) struct Verbs(&'static Mutex<Fabric>);

impl Verbs {
    /// New ones, for this thread; those that it had before are gone.
    pub(crate) fn new(seed: u64, now: Instant) -> Verbs {
        let fabric = HERE.get().unwrap_or_else(|| Box::leak(Box::new(Mutex::new(Fabric::new(true, seed)))));
        HERE.set(Some(fabric));
        let mut fresh = Fabric::new(true, seed);
        fresh.now = now;
        let keeps_keys = [0, 3][fresh.random.index(2)];
        let breaks = [0, 0, 500][fresh.random.index(3)];
        let late = [0, 4][fresh.random.index(2)];
        fresh.disturbance = Disturbance { keeps_keys, breaks, late };
        *lock(fabric) = fresh;
        Verbs(fabric)
    }

    /// Moves on what can move on by now; when more does.
    pub(crate) fn progress(self, now: Instant) {
        lock(self.0).progress(now);
    }

    pub(crate) fn due(self) -> Instant {
        let fabric = lock(self.0);
        if fabric.changed { fabric.now } else { fabric.due }
    }

    pub(crate) fn own(self, fd: i32, owner: usize) {
        lock(self.0).own(fd, owner);
    }

    /// Whether a descriptor was signalled since this was asked last.
    pub(crate) fn take_signal(self, fd: i32) -> bool {
        lock(self.0).signalled.remove(&fd)
    }

    pub(crate) fn kill(self, owner: usize) {
        lock(self.0).kill(owner);
    }

    pub(crate) fn reset(self, address: SocketAddr, sides: Sides, permille: u64, hold: Duration) {
        lock(self.0).reset(address, sides, permille, hold);
    }

    pub(crate) fn half_close(self, address: SocketAddr, side: Side, permille: u64) {
        lock(self.0).half_close(address, side, permille);
    }

    pub(crate) fn hold(self, address: SocketAddr, side: Side, permille: u64, until: Instant) {
        lock(self.0).hold(address, side, permille, until);
    }

    pub(crate) fn silence(self, address: SocketAddr, sides: Sides, until: Instant) {
        lock(self.0).silence(address, sides, until);
    }

    pub(crate) fn lose_ends(self, permille: u64) {
        lock(self.0).lost_ends_permille = permille;
    }

    pub(crate) fn clear_network(self) {
        lock(self.0).clear_network();
    }

    pub(crate) fn set_down(self, address: SocketAddr, down: bool) {
        let mut fabric = lock(self.0);
        match down {
            true => fabric.down.insert(address),
            false => fabric.down.remove(&address),
        };
    }

    pub(crate) fn connects(self) -> Vec<(SocketAddr, Instant)> {
        lock(self.0).connects.clone()
    }

    pub(crate) fn counts(self) -> Counts {
        lock(self.0).counts
    }

    pub(crate) fn reaches(self, start: u64, len: u64) -> bool {
        lock(self.0).reaches(start, len)
    }
}
