//! The NVMe/TCP initiator: a namespace on a remote target as a block device.
//!
//! Owns: associations from connect to loss and back, I/O queues, what is sent again and when. Must not know: rings,
//! volumes, members.
//!
//! ```text
//!   device ──────────── what all threads see                     discover ── the discovery log, for people
//!     │
//!   controller ──────── the owner reactor's task: connect, identify, keep alive, follow, reconnect
//!     │      └ admin ── admin commands, one future each
//!   lane (one per reactor) ── requests of its channels, resent after a loss, no ghost writes
//!     │   └ held ──── one request on its way, or several in the place of one
//!     │
//!   connection ──────── one send and one receive under way: bytes between a socket and ...
//!   queue ───────────── ... the queue pair, sans I/O
//! ```
//!
//! When a connection is lost, every lane is torn down before the next attempt (a barrier): sockets are shut down,
//! operations awaited, commands taken back. Requests wait; after reconnecting they are sent again, writes of unknown
//! outcome only when the lost association is quiet. What proves that, with our own target
//! ([`crate::nvme::identify::VENDOR_MARK`]):
//!
//! - The lost controller was reset through its admin queue, where that is still there: CSTS.RDY clears when its I/O queues
//!   have no command any more.
//! - The target ended the admin queue itself, and has answered a Connect at the same address since: that waits for the
//!   commands of our earlier associations of which it knows that they are over. For a predecessor, its death has closed its
//!   sockets, which is a reset that throws away what was not sent yet, and comes before the new Connect.
//!
//! An end that only we know of (a time-out, a breach of the protocol, silence) proves nothing: our reset may be lost on the
//! way. Then, elsewhere, and at another address, of the same name too, twice `keep_alive_tmo` and CQT or `quiesce_tmo` must
//! have passed since the loss. A middle box that keeps what it took from us, and delivers it after it let a new Connect
//! pass, is beyond this.

mod admin;
pub mod config;
mod connection;
mod controller;
mod device;
mod discover;
pub mod fuzz;
mod geometry;
mod held;
mod lane;
mod probe;
mod queue;
mod signal;
mod socket;
#[cfg(test)]
mod tests;

pub use config::{HostIdentity, NvmeConfig, PathTimers};
pub use device::NvmeDevice;
pub use discover::discover;
