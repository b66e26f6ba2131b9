//! From what the configuration says to what runs: devices, disks, targets, and who we are to targets.
//!
//! Owns: the only place where the layers meet. Must not know: requests.

pub(crate) mod ana;
pub mod device;
pub mod disk;
pub mod host;
pub(crate) mod late;
pub(crate) mod pool;
pub mod reactors;
pub(crate) mod reserve;
pub mod target;
