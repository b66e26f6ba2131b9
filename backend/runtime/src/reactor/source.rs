//! What lives on a reactor: the trait [`Source`], the events that it gets, and its name.

use super::Runtime;
use crate::op::Completed;

/// Something that lives on a reactor and reacts to events: a virtqueue, a connection, a device's channel.
pub trait Source {
    /// Handles what has happened: the events of its operations and timers, or none after a [`Runtime::wake`].
    /// Takes events out of `events`; what it leaves is discarded.
    fn poll(&mut self, runtime: &Runtime, events: &mut Vec<Event>);

    /// For a source that watches shared memory ([`Runtime::watch`]): is there work that no event has told of?
    /// Must be cheap: called on every pass while the reactor is awake.
    fn peek(&mut self) -> bool {
        false
    }

    /// For a watching source, before the reactor sleeps: make the other side notify from now on, then look again.
    /// Returns whether there is work after all.
    fn arm(&mut self) -> bool {
        false
    }
}

/// One thing that happened to a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "key: what the operation or timer was given")]
pub enum Event {
    /// The operation submitted with `key` completed, or had one of its events.
    Op { key: u32, completed: Completed },
    /// The timer that was set with `key` is due.
    Timer { key: u32 },
}

/// Names a source on its reactor. Not used again for another source before 4095 others had its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceId(pub(super) u32);

pub(super) const INDEX_BITS: u32 = 20;

impl SourceId {
    pub(crate) const EXECUTOR: SourceId = SourceId(u32::MAX - 1);
    pub(super) const INBOX: SourceId = SourceId(u32::MAX - 2);

    pub(super) fn index(self) -> usize {
        (self.0 & ((1 << INDEX_BITS) - 1)) as usize
    }
}
