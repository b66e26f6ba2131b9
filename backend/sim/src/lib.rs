//! A world with a seed: clock, network and disks under the production code, in one thread, the same each time.
//!
//! Owns: the [`World`], its [`hawser_runtime::Driver`] for each simulated reactor, and the [`disk::SimDisk`]. Must not
//! know: what runs in it.
//!
//! ```text
//!    Reactor A        Reactor B          production reactors over simulated drivers, stepped in random order
//!       │ Op             │ Op
//!       ▼                ▼
//!    SimDriver ───── SimDriver           one World: the clock moves only when nobody has anything left to do
//!          └── World ──┘                 TCP: delay, any segmentation, resets, refusals, silence
//!                │                        RDMA: the same for messages, keys and completions ([`verbs`])
//! ```
//!
//! Invariants:
//! - Everything that happens follows from the seed: no wall clock, no address, no hash order decides anything.
//! - Memory that an operation names is touched only between its submission and its completion.

pub mod client;
pub mod disk;
mod driver;
pub mod memory;
pub mod net;
pub mod random;
pub mod trap;
pub mod verbs;
pub mod world;

pub use client::Client;
pub use disk::SimDisk;
pub use memory::Memory;
pub use net::{Side, Sides};
pub use random::Random;
pub use trap::Trap;
pub use world::{World, WorldConfig};
