//! The hawser daemon and its command line, as a library so that tests and fuzzers reach its parts.
//!
//! Owns: assembly of the layers, the daemon's life, the management API, the commands. Must not know: rings,
//! NVMe, io_uring; it sees the layers by their public types only.

pub mod assemble;
pub mod cli;
pub mod daemon;
mod durable;
pub mod image;
mod sandbox;
mod sys;
mod tail;
