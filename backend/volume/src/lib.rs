//! From a disk's request to member I/O, in one pass.
//!
//! Owns: [`plan::resolve`], which is pure; the [`Volume`], a device made of member devices; its channels, which carry
//! plans out. Must not know: rings, NVMe commands, paths.
//!
//! Today a volume is one whole member: a plan is the request itself, or its pieces where the member takes less at a time.
//!
//! ```text
//!   Request ── resolve() ──► Plan: Whole            ──► the same request, the same token
//!                            Plan: Pieces(n)        ──► n member requests, one slot that counts them down
//!                            Refused(status)        ──► ended on the spot
//! ```
//!
//! Invariants:
//! - `resolve()` allocates nothing, locks nothing, calls nothing, and reads nothing but its arguments.
//! - A request that was split ends when its last piece has ended, with the first failure among them.

#![deny(unsafe_code)]

pub mod engine;
pub mod format;
pub mod plan;
pub mod pool;
pub mod raid;
pub mod simulated;
pub mod thin;

pub use engine::Volume;
pub use plan::{Plan, resolve};
