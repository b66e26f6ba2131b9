//! The initiator's queue pairs over RDMA.
//!
//! ```text
//!   connect ──── address, route, queue pair, connection, Fabrics Connect: straight-line code
//!   connection ─ what a lane or the admin queue has: requests to posts, completions to ends; how it is closed
//!   queue ────── the queue pair, sans I/O: slots, keys, what is posted ──┐
//!   plan ─────── which bytes of a request one command moves, and how ────┘ layout ── memory of a connection's own
//! ```

mod connect;
mod connection;
mod layout;
mod plan;
mod queue;

pub(crate) use connect::{RdmaPair, connect_queue};
pub(crate) use connection::RdmaConnection;
