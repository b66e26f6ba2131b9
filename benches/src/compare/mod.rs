//! The bench: the same loads on `hawser` and on qemu-storage-daemon, in alternation.
//!
//! ```text
//! cases (what, goal) ──► runner: start servers ──► scout (reap one by one or in batches, which aio) ──► A B A B …
//!                                                        │ each sample under quiet::guard, repeated if disturbed
//!                                                        ▼
//!                                        results: medians, spreads, ratios, goals ──► table, RESULTS.md
//! ```
//!
//! Owns: cases, servers' configurations, alternation, the verdicts. Must not know: anything inside a server.
//! Invariant: everything that it starts is a [`crate::sys::Child`] and ends with it.
#![forbid(unsafe_code)]

pub mod cases;
pub mod fabric;
pub mod hot_path;
pub mod idle;
pub mod load;
pub mod pools;
pub mod quiet;
pub mod results;
pub mod runner;
pub mod servers;
