//! The narrow waist: what a request is, what a device can do, how a request ends. Every layer speaks these types.
//!
//! Owns: [`Request`], [`Buffers`], [`Geometry`], [`Status`], the [`Device`] and [`Channel`] traits, statistics, and
//! devices for tests. Must not know: rings, volumes, members, NVMe.
//!
//! A [`Device`] is shared by all threads; each user on each reactor opens a [`Channel`] of its own and talks to that
//! without locks. virtio and the NVMe-oF target are users; `volume` is both a device and a user; `fabric` has the leaves.
//!
//! Invariants:
//! - A request ends exactly once, with a [`Completion`] that carries its token, after every operation that names its
//!   buffers is terminal. Its memory is valid until then ([`Buffers`]).
//! - Bytes done equal bytes asked; anything else is an error.

pub mod buffers;
pub mod channel;
pub mod fake;
pub mod geometry;
pub mod held;
pub mod regions;
pub mod request;
pub mod reservation;
pub mod stats;
pub mod status;

pub use buffers::{Buffers, Segment};
pub use channel::{Channel, Device, DeviceState, PathView};
pub use geometry::{BlockSize, DiscardLimits, Geometry, WriteZeroesLimits};
pub use request::{BlockCount, Completion, Lba, Operation, Request, Token};
pub use stats::{Counter, Histogram, IoKind, IoStats, KindSnapshot, StatsSet};
pub use status::{Outcome, Status};
