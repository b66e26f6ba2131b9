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
//!     │
//!   connection ──────── one send and one receive under way: bytes between a socket and ...
//!   queue ───────────── ... the queue pair, sans I/O
//! ```
//!
//! When a connection is lost, every lane is torn down before the next attempt (a barrier): sockets are shut down,
//! operations awaited, commands taken back. Requests wait; after reconnecting they are sent again, writes of unknown
//! outcome only when the lost association is quiet. Our own target promises that with its answer to Connect
//! ([`crate::nvme::identify::VENDOR_MARK`]): it waits for the commands of our earlier associations, and takes in nothing
//! more of those that are closed. Closing our sockets, by us or by our death, is a reset that throws away what was not sent
//! yet, and that reset comes before the new Connect on the same path. Elsewhere, on another path, and after mere silence (a reset
//! may be lost with the rest), twice `keep_alive_tmo` and CQT or `quiesce_tmo` must have passed since the loss. A middle box that
//! keeps what it took from us, and delivers it after it let a new Connect pass, is beyond this.

mod admin;
pub mod config;
mod connection;
mod controller;
mod device;
mod discover;
pub mod fuzz;
mod geometry;
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
