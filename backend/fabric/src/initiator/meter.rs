//! What is counted of a path: its commands on each reactor, and what became of its associations.
//!
//! Owns: the numbers and their names. Must not know: what they are shown in. Each number has one writer: a lane, or, of
//! [`History`], the path's task.
#![forbid(unsafe_code)]

use hawser_block::{Counter, IoStats};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why an association ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Loss {
    /// The target closed or reset the connection.
    Closed,
    /// The system says that the connection does not work.
    Network,
    /// One side broke the protocol, or said that the other did.
    Protocol,
    /// A digest was wrong.
    Corrupted,
    /// A command was not answered in `io_timeout`.
    IoTimeout,
    /// A keep-alive was not answered in `keep_alive_tmo`.
    KeepAlive,
    /// A user of the device wanted requests back.
    GivenUp,
    /// The namespace is not what it was.
    Refused,
    /// An admin command failed.
    #[default]
    Admin,
}

impl Loss {
    pub(crate) const ALL: [Loss; 9] = [
        Loss::Closed,
        Loss::Network,
        Loss::Protocol,
        Loss::Corrupted,
        Loss::IoTimeout,
        Loss::KeepAlive,
        Loss::GivenUp,
        Loss::Refused,
        Loss::Admin,
    ];

    /// The word in the API and in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Loss::Closed => "closed",
            Loss::Network => "network",
            Loss::Protocol => "protocol",
            Loss::Corrupted => "corrupted",
            Loss::IoTimeout => "io_timeout",
            Loss::KeepAlive => "keep_alive",
            Loss::GivenUp => "given_up",
            Loss::Refused => "refused",
            Loss::Admin => "admin",
        }
    }
}

/// Bytes of payload that a queue pair has moved, by how; plain numbers, taken out by the lane once in a pass.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moved {
    /// Data of small reads: received with headers, copied to the guest's pages.
    pub(crate) small_read: u64,
    /// What came with the headers of large reads: the same.
    pub(crate) large_read: u64,
    /// Data of reads that was checked in our own memory first.
    pub(crate) digest_read: u64,
    /// Data of writes that was sent from our own memory.
    pub(crate) digest_write: u64,
    /// Received in the guest's pages by the kernel, or put there by the target.
    pub(crate) in_place: u64,
    /// Over RDMA: by way of memory of our own, because the request's is not registered.
    pub(crate) unregistered: u64,
    /// The same, because it is in too many pieces.
    pub(crate) scattered: u64,
}

/// A path's numbers on one reactor.
#[derive(Debug, Default)]
pub(crate) struct LaneNumbers {
    /// Commands that were answered: from sending to answer, and what was refused by status.
    pub(crate) io: Arc<IoStats>,
    /// Refused commands that are, or were, tried again.
    pub(crate) retries: Counter,
    /// Commands that were taken back because the association was lost.
    pub(crate) requeued: Counter,
    small_read: Counter,
    large_read: Counter,
    digest_read: Counter,
    digest_write: Counter,
    in_place: Counter,
    unregistered: Counter,
    scattered: Counter,
}

impl LaneNumbers {
    /// All zero, with the statistics of this reactor.
    pub(crate) fn new(io: Arc<IoStats>) -> LaneNumbers {
        LaneNumbers { io, ..LaneNumbers::default() }
    }

    pub(crate) fn add(&self, moved: &Moved) {
        self.small_read.add(moved.small_read);
        self.large_read.add(moved.large_read);
        self.digest_read.add(moved.digest_read);
        self.digest_write.add(moved.digest_write);
        self.in_place.add(moved.in_place);
        self.unregistered.add(moved.unregistered);
        self.scattered.add(moved.scattered);
    }

    pub(crate) fn moved(&self) -> Moved {
        Moved {
            small_read: self.small_read.get(),
            large_read: self.large_read.get(),
            digest_read: self.digest_read.get(),
            digest_write: self.digest_write.get(),
            in_place: self.in_place.get(),
            unregistered: self.unregistered.get(),
            scattered: self.scattered.get(),
        }
    }
}

/// What became of a path's associations.
#[derive(Clone, Debug)]
pub(crate) struct History {
    /// Attempts to connect, and those that led to an association.
    pub(crate) attempts: u64,
    pub(crate) connects: u64,
    /// Keep-alives that were not answered in time.
    pub(crate) keep_alive_misses: u64,
    /// Times that other paths had to take over what went here.
    pub(crate) failovers: u64,
    losses: [u64; Loss::ALL.len()],
    state: PathState,
    since: Instant,
    spent: [Duration; PathState::ALL.len()],
}

/// What people see of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PathState {
    Connecting,
    Live,
    /// Not waited for.
    Failed,
}

impl PathState {
    pub(crate) const ALL: [PathState; 3] = [PathState::Connecting, PathState::Live, PathState::Failed];

    pub(crate) fn name(self) -> &'static str {
        match self {
            PathState::Connecting => "connecting",
            PathState::Live => "live",
            PathState::Failed => "failed",
        }
    }
}

impl Default for History {
    fn default() -> Self {
        History {
            attempts: 0,
            connects: 0,
            keep_alive_misses: 0,
            failovers: 0,
            losses: [0; Loss::ALL.len()],
            state: PathState::Connecting,
            since: Instant::now(),
            spent: [Duration::ZERO; PathState::ALL.len()],
        }
    }
}

impl History {
    pub(crate) fn lost(&mut self, loss: Loss) {
        self.losses[loss as usize] += 1;
        self.keep_alive_misses += u64::from(loss == Loss::KeepAlive);
    }

    /// How many associations ended for this.
    pub(crate) fn lost_by(&self, loss: Loss) -> u64 {
        self.losses[loss as usize]
    }

    pub(crate) fn losses(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Loss::ALL.into_iter().map(|loss| (loss.name(), self.losses[loss as usize]))
    }

    /// The path is in `state` from `now` on, if it was not before.
    pub(crate) fn enter(&mut self, state: PathState, now: Instant) {
        if state != self.state {
            self.spent[self.state as usize] += now.saturating_duration_since(self.since);
            (self.state, self.since) = (state, now);
        }
    }

    /// How long it has been in each state, up to `now`.
    pub(crate) fn times(&self, now: Instant) -> impl Iterator<Item = (&'static str, Duration)> {
        let running = now.saturating_duration_since(self.since);
        PathState::ALL.into_iter().map(move |state| {
            let more = if state == self.state { running } else { Duration::ZERO };
            (state.name(), self.spent[state as usize] + more)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_in_states_add_up_and_the_present_one_runs() {
        let mut history = History::default();
        let began = history.since;
        let at = |seconds| began + Duration::from_secs(seconds);
        for (state, second) in
            [(PathState::Live, 2), (PathState::Live, 5), (PathState::Failed, 9), (PathState::Live, 10)]
        {
            history.enter(state, at(second));
        }
        let times: Vec<_> = history.times(at(20)).map(|(name, time)| (name, time.as_secs())).collect();
        assert_eq!(times, [("connecting", 2), ("live", 17), ("failed", 1)]);
    }

    #[test]
    fn every_loss_is_counted_under_its_name() {
        let mut history = History::default();
        for loss in Loss::ALL {
            history.lost(loss);
        }
        history.lost(Loss::KeepAlive);
        let counted: Vec<_> = history.losses().collect();
        assert!(counted.iter().all(|(name, count)| *count == 1 + u64::from(*name == "keep_alive")));
        assert_eq!(history.keep_alive_misses, 2);
    }
}
