//! What a device is and can do.

use crate::request::BlockCount;

/// The logical block size: a power of two from 512 bytes to 64 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockSize {
    shift: u8,
}

impl BlockSize {
    /// 512 bytes.
    pub const B512: BlockSize = BlockSize { shift: 9 };
    /// 4096 bytes.
    pub const B4096: BlockSize = BlockSize { shift: 12 };

    /// From a size in bytes.
    #[must_use]
    pub fn new(bytes: u32) -> Option<BlockSize> {
        let ok = bytes.is_power_of_two() && (512..=65536).contains(&bytes);
        ok.then(|| BlockSize { shift: u8::try_from(bytes.trailing_zeros()).unwrap_or(0) })
    }

    /// log2 of the size in bytes.
    #[must_use]
    pub fn shift(self) -> u32 {
        u32::from(self.shift)
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u32 {
        1 << self.shift
    }
}

/// How much one discard may cover, and in what units it is worth asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// The most blocks in one request.
    pub blocks_max: u32,
    /// Discards of less than this many blocks, or not aligned to it, may do nothing.
    pub granularity_blocks: u32,
    /// Discarded blocks read as zeroes from then on.
    pub reads_zeroes: bool,
}

/// How much one write-zeroes may cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteZeroesLimits {
    /// The most blocks in one request.
    pub blocks_max: u32,
    /// With the unmap flag the device may give the space back.
    pub may_unmap: bool,
}

/// What a device is: its size, its unit and its abilities. A plain value; a device that grows gives a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The unit of addressing.
    pub block_size: BlockSize,
    /// The size in blocks.
    pub blocks: u64,
    /// The unit that the device writes at no extra cost, in bytes; a multiple of the block size.
    pub physical_block_bytes: u32,
    /// The preferred size of a transfer in bytes, or 0.
    pub optimal_io_bytes: u32,
    /// The most blocks that one read or write may have; whoever asks splits above it.
    pub transfer_blocks_max: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Writes may sit in a volatile cache until a flush, or until they are made with FUA.
    pub volatile_cache: bool,
    /// `None`: cannot discard.
    pub discard: Option<DiscardLimits>,
    /// `None`: cannot write zeroes without payload.
    pub write_zeroes: Option<WriteZeroesLimits>,
}

impl Geometry {
    /// A plain device without extras: no cache, no discard, transfers up to 4 MiB.
    #[must_use]
    pub fn new(block_size: BlockSize, blocks: u64) -> Geometry {
        Geometry {
            block_size,
            blocks,
            physical_block_bytes: block_size.bytes(),
            optimal_io_bytes: 0,
            transfer_blocks_max: (4 << 20) >> block_size.shift(),
            read_only: false,
            volatile_cache: false,
            discard: None,
            write_zeroes: None,
        }
    }

    /// The size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.blocks << self.block_size.shift()
    }

    /// Whether `count` blocks from `lba` on lie within the device; an empty range does not.
    #[must_use]
    pub fn contains(&self, lba: u64, count: BlockCount) -> bool {
        count.0 != 0 && lba < self.blocks && u64::from(count.0) <= self.blocks - lba
    }
}
