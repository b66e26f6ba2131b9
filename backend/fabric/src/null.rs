//! `null:`, the device that does nothing: for measuring everything above it.
//!
//! A request ends as soon as it is submitted. A read leaves its buffers as they are, as QEMU's `null-co` does with
//! `read-zeroes=off`: what a guest then finds there is its own memory. Writes, discards and zeroes vanish.

use crate::leaf::{self, Tally};
use hawser_block::{
    BlockSize, Channel, Completion, Device, DeviceState, DiscardLimits, Geometry, IoStats, Request, StatsSet,
    WriteZeroesLimits,
};
use hawser_runtime::{Runtime, SourceId};
use std::sync::Arc;

/// A device that takes everything and keeps nothing.
pub struct NullDevice {
    name: String,
    geometry: Geometry,
    stats: Arc<StatsSet>,
}

impl NullDevice {
    /// A device of `size_bytes`.
    ///
    /// # Errors
    /// When the size is not a multiple of the block size: one line for people.
    pub fn new(name: &str, size_bytes: u64, block_size: BlockSize) -> Result<NullDevice, String> {
        let mut geometry = Geometry::new(block_size, leaf::blocks_of(size_bytes, block_size)?);
        geometry.discard =
            Some(DiscardLimits { blocks_max: u32::MAX, granularity_blocks: 1, reads_zeroes: false });
        geometry.write_zeroes = Some(WriteZeroesLimits { blocks_max: u32::MAX, may_unmap: true });
        Ok(NullDevice { name: name.to_owned(), geometry, stats: Arc::default() })
    }
}

impl Device for NullDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Option<Geometry> {
        Some(self.geometry)
    }

    fn state(&self) -> DeviceState {
        DeviceState::Ready
    }

    fn uuid(&self) -> [u8; 16] {
        [0; 16]
    }

    fn leaves_payload(&self) -> bool {
        true
    }

    /// There is nothing to lose.
    fn cache_identity(&self) -> Option<[u8; 16]> {
        Some(*b"null\0\0\0\0\0\0\0\0\0\0\0\0")
    }

    /// Nothing ever changes, so nobody is ever called.
    fn subscribe(&self, _: Box<dyn Fn() + Send + Sync>) {}

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn Channel> {
        Box::new(NullChannel {
            geometry: self.geometry,
            stats: self.stats.writer(runtime),
            runtime: runtime.clone(),
            user,
            ended: Vec::new(),
        })
    }

    fn stats(&self) -> Arc<StatsSet> {
        Arc::clone(&self.stats)
    }
}

struct NullChannel {
    geometry: Geometry,
    stats: Arc<IoStats>,
    runtime: Runtime,
    user: SourceId,
    ended: Vec<Completion>,
}

impl Channel for NullChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        let mut tally = Tally::default();
        for request in batch.drain(..) {
            let outcome = leaf::check(&self.geometry, &request);
            match outcome {
                Ok(()) => tally.add(request.operation, leaf::bytes_of(&self.geometry, &request)),
                Err(_) => self.stats.record(request.operation.into(), 0, 0, outcome),
            }
            self.ended.push(Completion { token: request.token, outcome });
        }
        tally.record(&self.stats, 0);
        self.runtime.wake(self.user);
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        ended.append(&mut self.ended);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Harness, refuses_what_is_wrong};
    use hawser_block::{IoKind, Operation};

    #[test]
    fn requests_end_at_once_and_reads_leave_their_buffers_alone() {
        let mut harness = Harness::new();
        let device = NullDevice::new("n", 1 << 40, BlockSize::B4096).unwrap();
        let mut channel = harness.open(&device);
        let mut payload = vec![0xa5; 8192];
        let last = device.geometry().unwrap().blocks - 2;
        for operation in [
            Operation::Write { fua: true },
            Operation::Read,
            Operation::Flush,
            Operation::Discard,
            Operation::WriteZeroes { unmap: true, fua: false },
        ] {
            let len = if operation.has_payload() { 8192 } else { 0 };
            assert_eq!(harness.one(channel.as_mut(), operation, (last, 2), &mut payload[..len], 3), Ok(()));
        }
        assert!(payload.iter().all(|byte| *byte == 0xa5));
        let reads = device.stats().kind(IoKind::Read);
        assert_eq!((reads.requests, reads.bytes, reads.latency.count()), (1, 8192, 1));
        drop(channel);
        refuses_what_is_wrong(&mut harness, &device);
    }

    #[test]
    fn a_size_of_broken_blocks_is_refused_in_one_line() {
        let error = NullDevice::new("n", 1000, BlockSize::B512).err().unwrap();
        assert_eq!(error, "size 1000 is not a multiple of the block size 512; 512 or 1024 would be");
        let error = NullDevice::new("n", 0, BlockSize::B4096).err().unwrap();
        assert_eq!(error, "size 0 is less than one block of 4096 bytes");
    }
}
