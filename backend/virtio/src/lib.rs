//! vhost-user-blk: a disk at a socket, for a virtual machine.
//!
//! Owns the sessions (vhost-user messages, one thread per disk), the split rings and the parsing of virtio-blk requests (on
//! the reactors), guest memory, the in-flight log and its replay, and the crash record. Must not know volumes, members,
//! or what is behind a [`hawser_block::Device`].
//!
//! ```text
//!  disk (thread) ── accept ──► session ── messages: memory, rings, log ──► queue (reactor) ──► Channel
//!                                 ▲                                          │
//!                                 └───────────── error, stopped ◄────────────┘
//! ```
//!
//! The protocol's choices and what each guest mistake leads to are in `docs/vhost-user.md`.
//!
//! Invariants:
//! - Guest memory is reached by raw pointers that were checked with their length, and never by reference.
//! - What a guest or its front end does ends at most its own session.
//! - A request is shown as used, or stands in the in-flight log, after every single store.

mod blk;
mod chain;
mod connection;
mod counters;
mod crash;
mod dirty;
mod disk;
mod fault;
mod features;
mod gate;
#[cfg(any(test, feature = "fuzzing"))]
pub mod harness;
mod inflight;
mod interrupt;
mod mapping;
mod memory;
mod message;
mod queue;
mod ring;
mod session;
mod sessions;
mod shared;
mod socket;

pub use chain::ChainError;
pub use counters::{DiskCounters, QueueCounters};
pub use crash::{Crash, CrashError, CrashFile, CrashedRequest, NAME_BYTES_MAX};
pub use disk::{DiskConfig, DiskError, DiskState, LeftBehind, QUEUES_MAX, VhostDisk};
pub use sessions::SessionView;
pub use socket::{BoundSocket, SocketAccess, SocketError, remove_stale};

#[cfg(test)]
mod death_tests;
