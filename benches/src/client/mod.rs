//! A client for a vhost-user-blk socket on the crate `blkio`, with fio's option names.
//!
//! ```text
//!  options ──► run::run ──► one job per thread: job::Job ──► blkio queue ──► socket, rings
//!                 │              │ pattern: which block next
//!                 │              │ verify: what is in it
//!                 ▼              ▼
//!              report ◄── histograms, counts
//! ```
//!
//! Owns: the options, the workloads and the report. Must not know: which server answers.
//! Invariant: between the first request and the last nothing is allocated or logged, and the clock is read once per
//! batch, so that the client is not what limits a measurement.

mod job;
pub mod options;
mod pattern;
mod regions;
pub mod report;
mod run;
mod verify;

pub use run::run;
