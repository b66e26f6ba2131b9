//! Devices and the way to them: memory, files, and NVMe over TCP and RDMA from both sides.
//!
//! Owns: the leaf devices behind [`hawser_block::Device`], the NVMe and NVMe/TCP codecs, the initiator and the target.
//! Must not know: rings, volumes, members, stripes.

pub mod file;
pub mod initiator;
mod leaf;
pub mod mem;
pub mod null;
pub mod nvme;
mod pool;
pub mod rdma;
pub mod simulated;
pub mod target;
pub mod tcp;
#[cfg(test)]
mod testing;
pub mod uri;

pub use file::{FileDevice, FileOptions};
pub use mem::MemDevice;
pub use null::NullDevice;
