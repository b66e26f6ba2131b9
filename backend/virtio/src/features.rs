//! What the disk offers to a driver: feature bits, and the configuration space that goes with them.
//!
//! Virtio 1.2, 5.2.3 and 5.2.4. What the device cannot do is not offered; a limit of an offered feature is never 0 (a zero
//! crashes Windows).

#![forbid(unsafe_code)]

use crate::blk::{Limits, RANGES_MAX, SECTOR_SHIFT};
use crate::chain::SEGMENTS_MAX;
use hawser_block::Geometry;

pub(crate) const SEG_MAX: u64 = 1 << 2;
pub(crate) const RO: u64 = 1 << 5;
pub(crate) const BLK_SIZE: u64 = 1 << 6;
pub(crate) const FLUSH: u64 = 1 << 9;
pub(crate) const TOPOLOGY: u64 = 1 << 10;
pub(crate) const CONFIG_WCE: u64 = 1 << 11;
pub(crate) const MQ: u64 = 1 << 12;
pub(crate) const DISCARD: u64 = 1 << 13;
pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
/// vhost's own: what we write into guest memory is logged.
pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
/// vhost-user's own: there are protocol features to negotiate.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
pub(crate) const VERSION_1: u64 = 1 << 32;

/// Where `writeback` is in the configuration space.
pub(crate) const WRITEBACK_OFFSET: u32 = 32;
const CONFIG_BYTES: usize = 60;

/// The features that a disk with these limits offers.
pub(crate) fn offered(limits: &Limits, queues: u16) -> u64 {
    let mut features = SEG_MAX
        | BLK_SIZE
        | TOPOLOGY
        | FLUSH
        | CONFIG_WCE
        | LOG_ALL
        | INDIRECT_DESC
        | EVENT_IDX
        | PROTOCOL_FEATURES
        | VERSION_1;
    for (feature, condition) in [
        (RO, limits.read_only),
        (MQ, queues > 1),
        (DISCARD, limits.discards()),
        (WRITE_ZEROES, limits.writes_zeroes()),
    ] {
        features |= if condition { feature } else { 0 };
    }
    features
}

/// The size in sectors: what the driver knows as the disk's capacity.
pub(crate) fn capacity(geometry: &Geometry) -> u64 {
    geometry.size_bytes() >> SECTOR_SHIFT
}

/// `bytes` of the configuration space from `offset` on. Past its end it is zero.
pub(crate) fn config(limits: &Limits, queues: u16, writeback: bool, offset: u32, bytes: u32) -> Vec<u8> {
    let space = config_space(limits, queues, writeback);
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    (0..usize::try_from(bytes).unwrap_or(0))
        .map(|index| from.checked_add(index).and_then(|at| space.get(at)).copied().unwrap_or(0))
        .collect()
}

fn config_space(limits: &Limits, queues: u16, writeback: bool) -> [u8; CONFIG_BYTES] {
    let geometry = &limits.geometry;
    let block_bytes = geometry.block_size.bytes();
    let mut space = [0u8; CONFIG_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| space[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &capacity(geometry).to_le_bytes());
    put(12, &u32::from(SEGMENTS_MAX).to_le_bytes());
    put(20, &block_bytes.to_le_bytes());

    // Topology, in logical blocks: the physical block as a power of two, then minimum and preferred transfer.
    let physical_blocks = (geometry.physical_block_bytes / block_bytes).max(1);
    let physical_exponent = u8::try_from(physical_blocks.ilog2()).unwrap_or(0);
    put(24, &[physical_exponent, 0]);
    put(26, &u16::try_from(physical_blocks).unwrap_or(1).to_le_bytes());
    put(28, &(geometry.optimal_io_bytes / block_bytes).to_le_bytes());

    put(32, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());

    let sectors = |blocks: u32| {
        let sectors = u64::from(blocks) << (geometry.block_size.shift() - SECTOR_SHIFT);
        // Rounded down to whole blocks where it does not fit.
        let most = u64::from(u32::MAX) & !(u64::from(block_bytes >> SECTOR_SHIFT) - 1);
        u32::try_from(sectors.min(most)).unwrap_or(u32::MAX)
    };
    let ranges = u32::try_from(RANGES_MAX).unwrap_or(1);
    if let Some(discard) = geometry.discard.filter(|_| limits.discards()) {
        put(36, &sectors(discard.blocks_max).to_le_bytes());
        put(40, &ranges.to_le_bytes());
        put(44, &sectors(discard.granularity_blocks.max(1)).to_le_bytes());
    }
    if let Some(zeroes) = geometry.write_zeroes.filter(|_| limits.writes_zeroes()) {
        put(48, &sectors(zeroes.blocks_max).to_le_bytes());
        put(52, &ranges.to_le_bytes());
        put(56, &[u8::from(zeroes.may_unmap)]);
    }
    space
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawser_block::{BlockSize, DiscardLimits, WriteZeroesLimits};

    fn field(space: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(space[offset..offset + 4].try_into().unwrap())
    }

    #[test]
    fn no_limit_of_an_offered_feature_is_zero() {
        for block_size in [BlockSize::B512, BlockSize::B4096] {
            for blocks_max in [0, 1, 8, u32::MAX] {
                for granularity_blocks in [0, 1, 256] {
                    let mut geometry = Geometry::new(block_size, 1 << 40);
                    geometry.discard =
                        Some(DiscardLimits { blocks_max, granularity_blocks, reads_zeroes: true });
                    geometry.write_zeroes = Some(WriteZeroesLimits { blocks_max, may_unmap: true });
                    let limits = Limits { geometry, read_only: false, write_through: false };
                    let space = config(&limits, 1, true, 0, 60);
                    let features = offered(&limits, 1);
                    assert_eq!(features & DISCARD != 0, blocks_max > 0);
                    assert_eq!(features & WRITE_ZEROES != 0, blocks_max > 0);
                    for offset in [36, 40, 44, 48, 52] {
                        assert_eq!(field(&space, offset) != 0, blocks_max > 0, "{offset}");
                    }
                    let sectors_per_block = block_size.bytes() / 512;
                    assert!(field(&space, 36).is_multiple_of(sectors_per_block));
                    assert!(field(&space, 44).is_multiple_of(sectors_per_block));
                }
            }
        }
    }

    #[test]
    fn capacity_topology_and_the_end_of_the_space() {
        let mut geometry = Geometry::new(BlockSize::B512, 12345);
        geometry.physical_block_bytes = 4096;
        geometry.optimal_io_bytes = 65536;
        let limits = Limits { geometry, read_only: true, write_through: false };
        let space = config(&limits, 3, false, 0, 64);
        assert_eq!(space[..8], 12345u64.to_le_bytes());
        assert_eq!(field(&space, 12), 126);
        assert_eq!(field(&space, 20), 512);
        assert_eq!((space[24], field(&space, 28)), (3, 128));
        assert_eq!((space[32], space[34]), (0, 3));
        assert_eq!(space[60..], [0; 4]);
        assert_eq!(config(&limits, 3, false, 34, 2), [3, 0]);
        assert_eq!(config(&limits, 3, false, 4000, 2), [0, 0]);
        assert_ne!(offered(&limits, 3) & (RO | MQ), 0);
        assert_eq!(offered(&limits, 1) & (MQ | DISCARD | WRITE_ZEROES), 0);
        let geometry = Geometry::new(BlockSize::B4096, 100);
        let limits = Limits { geometry, read_only: false, write_through: false };
        assert_eq!(config(&limits, 1, true, 0, 8), 800u64.to_le_bytes());
    }
}
