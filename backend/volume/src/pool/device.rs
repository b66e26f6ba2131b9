//! A volume as a device: what it is, how it is doing, and its counters. Its channels are [`super::channel`].

use super::channel::VolumeChannel;
use super::shared::{Shared, VolumeShared, lock};
use hawser_block::{
    BlockSize, Device, DeviceState, DiscardLimits, Geometry, StatsSet, WriteZeroesLimits, channel,
};
use hawser_runtime::{Runtime, SourceId};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The most that one discard covers.
const DISCARD_BYTES_MAX: u64 = 1 << 30;
/// The most that one write-zeroes covers: it may have to be written.
const ZERO_BYTES_MAX: u64 = 32 << 20;

/// A volume, offered like any device.
pub(crate) struct VolumeDevice {
    name: String,
    shared: Arc<Shared>,
    volume: Arc<VolumeShared>,
}

impl VolumeDevice {
    pub(crate) fn new(shared: Arc<Shared>, volume: Arc<VolumeShared>) -> VolumeDevice {
        VolumeDevice { name: format!("{}/{}", shared.name, volume.name), shared, volume }
    }
}

impl Device for VolumeDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Option<Geometry> {
        let view = self.shared.view();
        let shift = view.block_shift;
        let blocks = |bytes: u64| u32::try_from(bytes >> shift).unwrap_or(u32::MAX);
        let size_bytes = self.volume.map().size_bytes();
        let unit_bytes = u64::from(view.thin.unit_bytes);
        Some(Geometry {
            physical_block_bytes: 4096.max(1 << shift),
            optimal_io_bytes: 0,
            read_only: self.shared.is_read_only || self.volume.is_snapshot,
            volatile_cache: true,
            discard: Some(DiscardLimits {
                blocks_max: blocks(DISCARD_BYTES_MAX),
                granularity_blocks: blocks(unit_bytes),
                reads_zeroes: false,
            }),
            write_zeroes: Some(WriteZeroesLimits { blocks_max: blocks(ZERO_BYTES_MAX), may_unmap: true }),
            ..Geometry::new(BlockSize::new(1 << shift)?, size_bytes >> shift)
        })
    }

    fn state(&self) -> DeviceState {
        let is_reading = self.shared.is_read_only || self.volume.is_snapshot && !self.shared.view().is_lost;
        let is_stopped = self.shared.is_stopped.load(Ordering::Acquire) && !self.shared.view().is_lost;
        match self.shared.is_writable.load(Ordering::Acquire) || is_reading || is_stopped {
            true => DeviceState::Ready,
            false => DeviceState::Failed,
        }
    }

    fn trouble(&self) -> String {
        lock(&self.shared.told).pool.troubles.join("; ")
    }

    fn uuid(&self) -> [u8; 16] {
        self.volume.uuid
    }

    fn subscribe(&self, listener: Box<dyn Fn() + Send + Sync>) {
        lock(&self.volume.listeners).push(listener);
    }

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn channel::Channel> {
        Box::new(VolumeChannel::new(runtime, user, &self.shared, &self.volume))
    }

    fn stats(&self) -> Arc<StatsSet> {
        Arc::clone(&self.volume.stats)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.volume.slow_counts()
    }

    fn copied_bytes(&self) -> Vec<(&'static str, u64)> {
        let has_parity = self.shared.view().array.sets().iter().any(|set| set.parity().is_some());
        vec![(if has_parity { "parity" } else { "mirror" }, self.volume.copied_bytes.load(Ordering::Relaxed))]
    }
}
