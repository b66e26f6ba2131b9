//! The NVMe-oF initiator, over TCP and RDMA: a namespace on a remote target as a block device.
//!
//! Owns: associations from connect to loss and back, I/O queues, what is sent again and when. Must not know: rings,
//! volumes, members.
//!
//! ```text
//!   device ──────────── what all threads see; its paths        discover ── the discovery log, for people
//!     │   ├ cache ───── what volatile caches hold of us
//!     │   └ quiet ───── associations that are over, and may still write
//!   controller ──────── each path's task on the owner reactor: connect, identify, keep alive, follow, reset the lost, reconnect
//!     │      └ admin ── admin commands, one future each
//!   lane (one per reactor) ── requests of its channels: which path they take, resent after a loss, no ghost writes
//!     │   ├ way ─────── a path's connection here; numa ── how near its interface is
//!     │   ├ held ────── one request on its way, or several in the place of one
//!     │   ├ unknown ─── how many writes of unknown outcome there are, and how many that were left
//!     │   └ control ─── reservations, on the way of requests; reserve ── for who may wait for them
//!   meter ───────── what is counted of a path
//!   transport ───────── a queue pair on its connection, over either transport
//!     ├ connection ────── TCP: one send and one receive under way: bytes between a socket and ...
//!     │   └ queue ───────── ... the queue pair, sans I/O; batch ── one send of it
//!     └ rdma ──────────── RDMA: the same by work requests and completions
//! ```
//!
//! Paths come and go each by itself; a namespace on a path that is not the same (UUID, NGUID or EUI64, format, size) is
//! refused by name. When a connection is lost, its path is torn down in every lane before the next attempt (a barrier):
//! operations are awaited, commands taken back. Reads take another path at once, or wait for one. A write of unknown outcome,
//! and writes to the same blocks after it, wait until the lost association is quiet. What proves that:
//!
//! - The target resets the lost controller when asked through another association, on another path or the same one
//!   (Cross-Controller Reset). A process after us does the same with what we left behind: what names our associations is kept
//!   in a file. Where the target can, this is asked for, and the promise below is not relied upon.
//! - With our own target ([`crate::nvme::identify::VENDOR_MARK`]): the lost controller was reset through its own admin
//!   queue, where that is still there; CSTS.RDY clears when its I/O queues have no command any more.
//! - With our own target, which was started again and knows nothing of the lost controller: its connection's end came from
//!   the other side, and a Connect to the same subsystem at the same address was answered since.
//!
//! Nothing else proves anything. An end that only we know of (a time-out, a breach of the protocol, silence, the death of a
//! process before us) closes our sockets, but the reset that they send may be lost on the way. An end that we were told of may
//! be a middle box's, which keeps the target's side open, with bytes in it that nobody has read. Without proof, twice
//! `keep_alive_tmo` and CQT or `quiesce_tmo` must have passed since the loss; for a process before us that has kept nothing, the
//! longest that a controller says.
//!
//! A user who does not need to know what became of its writes leaves them ([`hawser_block::Channel::leave`]). They end then as soon as nothing
//! names their memory. Until the association is quiet the device says that it has left something behind, and no write goes out
//! on any of its lanes: whoever writes to it too early waits, and loses nothing.

mod admin;
mod batch;
mod cache;
pub mod config;
mod connection;
mod controller;
mod device;
mod discover;
pub mod fuzz;
mod geometry;
mod held;
mod identify;
mod lane;
mod meter;
mod numa;
mod probe;
mod queue;
mod quiet;
mod rdma;
mod reserve;
pub(crate) mod signal;
mod socket;
#[cfg(test)]
mod tests;
mod transport;
mod unknown;
mod way;

pub use config::{CacheDoubt, HostIdentity, IoPolicy, NvmeConfig, PathTimers};
pub use device::NvmeDevice;
pub use discover::discover;
pub(crate) use socket::plain as plain_error;
