//! From a disk's request to member I/O, in one pass.
//!
//! ```text
//!   plan, engine    a whole device, which splits what is too long for it
//!   pool            an array of devices with thin volumes in it: the hot path, the owner, its log
//!     ├─ thin       what is mapped where, snapshots, allocation: a state machine without I/O
//!     ├─ raid       where levels put data: arithmetic, and which members have it
//!     ├─ parity     what stands there for what may be lost: sums, and what they tell
//!     └─ format     what stands on the members: bytes
//! ```
//!
//! Owns: [`plan::resolve`] and [`pool::resolve`], which are pure; the devices [`Volume`] and those of a [`pool::Pool`]; the tasks that do what is not hot.
//! Must not know: rings, NVMe commands, paths, files.
//!
//! Invariants:
//! - Resolving allocates nothing, locks nothing, calls nothing, and reads nothing but its arguments.
//! - A request that was split ends when its last piece has ended, with the first failure among them.

#![deny(unsafe_code)]

mod atomic;
pub mod engine;
pub mod format;
pub mod parity;
pub mod plan;
pub mod pool;
pub mod raid;
pub mod simulated;
pub mod thin;

pub use engine::Volume;
pub use plan::{Plan, resolve};
