//! Deadlines in order. Not on the hot path: a request has no timer of its own, its owner has one for all.

use crate::reactor::SourceId;
use crate::time::Instant;
use std::collections::BTreeMap;

/// Names a timer so that it can be cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimerId {
    deadline: Instant,
    sequence: u64,
}

#[derive(Default)]
pub(crate) struct Timers {
    by_deadline: BTreeMap<TimerId, (SourceId, u32)>,
    next_sequence: u64,
}

impl Timers {
    pub(crate) fn insert(&mut self, deadline: Instant, source: SourceId, key: u32) -> TimerId {
        let id = TimerId { deadline, sequence: self.next_sequence };
        self.next_sequence += 1;
        self.by_deadline.insert(id, (source, key));
        id
    }

    pub(crate) fn cancel(&mut self, id: TimerId) {
        self.by_deadline.remove(&id);
    }

    /// Cancels all timers of a source.
    pub(crate) fn cancel_source(&mut self, source: SourceId) {
        self.by_deadline.retain(|_, (other, _)| *other != source);
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.by_deadline.first_key_value().map(|(id, _)| id.deadline)
    }

    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<(SourceId, u32)> {
        let entry = self.by_deadline.first_entry()?;
        (entry.key().deadline <= now).then(|| entry.remove())
    }
}
