//! Where hawser's code runs: a reactor per thread, with one io_uring, timers, messages and a small executor.
//!
//! Owns: the loop, time, randomness, and every system interface of the hot path. Must not know: storage.
//!
//! ```text
//!   other threads ── ReactorHandle::run ──► inbox ─┐
//!   kernel        ── completions ──────────────────┼──► events per source ──► Source::poll
//!   timers        ── deadlines ────────────────────┘                            │
//!                                                     Runtime::submit(op) ◄─────┘
//! ```
//!
//! Everything that a [`Source`] asks of the world goes through [`Op`]s, the clock and the random numbers of its
//! [`Runtime`]. A [`Driver`] carries them out: [`uring::Uring`] in production, a seeded one in the simulator, under the
//! same code.
//!
//! Invariants:
//! - A source, its operations and its memory belong to one reactor, and are touched on its thread only.
//! - What an operation points to stays valid until its completion event has been delivered ([`Op`]'s contract).

pub mod buffers;
pub mod executor;
pub mod op;
pub mod reactor;
pub mod simulated;
pub mod slab;
pub mod table;
pub mod time;
mod timers;
pub mod uring;

pub use op::{Completed, Driver, Fd, Op, Wait};
pub use reactor::{Event, Reactor, ReactorConfig, ReactorHandle, ReactorThread, Runtime, Source, SourceId};
pub use slab::Slab;
pub use time::Instant;
pub use timers::TimerId;
