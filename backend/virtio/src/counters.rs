//! What a disk counts besides its requests' latencies ([`hawser_block::StatsSet`]).

#![forbid(unsafe_code)]

use hawser_block::Counter;
use std::sync::atomic::AtomicU64;

/// One queue's counters: written by the one reactor that the queue runs on, read by anybody.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Chains taken from the ring.
    pub requests: Counter,
    /// Drains that found something.
    pub batches: Counter,
    /// Kicks heard.
    pub kicks: Counter,
    /// Interrupts sent.
    pub interrupts: Counter,
    /// Requests answered here with an error: the guest's mistakes, and what the disk does not offer.
    pub mistakes: Counter,
    /// Requests of a predecessor that were executed again.
    pub replayed: Counter,
}

/// A disk's counters; rare events.
#[derive(Debug, Default)]
pub struct DiskCounters {
    /// Connections accepted.
    pub sessions: AtomicU64,
    /// Sessions that ended for a fault of the guest or its front end.
    pub sessions_failed: AtomicU64,
    /// Front ends that were refused, because two were connected.
    pub sessions_refused: AtomicU64,
}
