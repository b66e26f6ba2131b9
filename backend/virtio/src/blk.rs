//! virtio-blk's requests (virtio 1.2, section 5.2.6): what a header asks for, checked against what the disk is.
//!
//! Pure: values in, values out. Sectors are 512 bytes whatever the block size is.

#![forbid(unsafe_code)]

use hawser_block::{Geometry, Operation, Outcome, Status};

/// Bytes of a sector, the unit of all addresses in requests.
pub(crate) const SECTOR_SHIFT: u32 = 9;
/// Bytes of a request's header: type u32, reserved u32, sector u64.
pub(crate) const HEADER_BYTES: usize = 16;
/// Bytes that GET_ID answers.
pub(crate) const ID_BYTES: usize = 20;
/// Bytes of one range of a discard or write-zeroes: sector u64, sectors u32, flags u32.
pub(crate) const RANGE_BYTES: usize = 16;
/// Ranges in one discard or write-zeroes that we take.
pub(crate) const RANGES_MAX: usize = 32;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const RANGE_FLAG_UNMAP: u32 = 1;

/// A request's last byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum VirtioStatus {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

impl From<Outcome> for VirtioStatus {
    /// The one place where a device's status becomes virtio's.
    fn from(outcome: Outcome) -> VirtioStatus {
        match outcome {
            Ok(()) => VirtioStatus::Ok,
            Err(Status::Unsupported) => VirtioStatus::Unsupported,
            Err(
                Status::Media
                | Status::Path
                | Status::Timeout
                | Status::NoSpace
                | Status::ReadOnly
                | Status::Conflict
                | Status::Aborted
                | Status::Invalid,
            ) => VirtioStatus::IoErr,
        }
    }
}

/// What the disk is, for one drain of a queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) geometry: Geometry,
    /// The disk, or its device, takes no writes.
    pub(crate) read_only: bool,
    /// Every write is durable when it ends: no FLUSH was negotiated, or the driver has set writeback to 0.
    pub(crate) write_through: bool,
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// One operation of the device over one run of blocks (of the device's block size).
    Submit { operation: Operation, lba: u64, blocks: u64 },
    /// Discard or write-zeroes: the ranges are in the payload.
    Ranges { write_zeroes: bool },
    /// The disk's serial into the payload.
    GetId,
    /// It ends here.
    Answer(VirtioStatus),
}

impl Limits {
    /// Blocks of a run of sectors, if it is aligned, not empty, and on the disk.
    fn blocks(&self, sector: u64, bytes: u64) -> Option<(u64, u64)> {
        let shift = self.geometry.block_size.shift();
        let sectors_per_block = shift - SECTOR_SHIFT;
        let aligned = sector.trailing_zeros() >= sectors_per_block || sector == 0;
        if !aligned || bytes == 0 || bytes & (u64::from(self.geometry.block_size.bytes()) - 1) != 0 {
            return None;
        }
        let (lba, blocks) = (sector >> sectors_per_block, bytes >> shift);
        (lba < self.geometry.blocks && blocks <= self.geometry.blocks - lba).then_some((lba, blocks))
    }

    /// What `header` asks for. `readable` and `writable` are the bytes of the payload either way.
    #[inline]
    pub(crate) fn decode(&self, header: &[u8; HEADER_BYTES], readable: u64, writable: u64) -> Action {
        let value = u128::from_le_bytes(*header);
        #[expect(clippy::cast_possible_truncation, reason = "takes the fields out of the bytes")]
        let (kind, sector) = (value as u32, (value >> 64) as u64);
        match kind {
            T_IN => match self.blocks(sector, writable) {
                Some((lba, blocks)) => Action::Submit { operation: Operation::Read, lba, blocks },
                None => Action::Answer(VirtioStatus::IoErr),
            },
            T_OUT => match self.blocks(sector, readable) {
                Some((lba, blocks)) if !self.read_only => {
                    Action::Submit { operation: Operation::Write { fua: self.write_through }, lba, blocks }
                }
                _ => Action::Answer(VirtioStatus::IoErr),
            },
            T_FLUSH => Action::Submit { operation: Operation::Flush, lba: 0, blocks: 0 },
            T_GET_ID => Action::GetId,
            T_DISCARD if self.discards() => Action::Ranges { write_zeroes: false },
            T_WRITE_ZEROES if self.writes_zeroes() => Action::Ranges { write_zeroes: true },
            _ => Action::Answer(VirtioStatus::Unsupported),
        }
    }

    /// Whether DISCARD is offered.
    pub(crate) fn discards(&self) -> bool {
        !self.read_only && self.geometry.discard.is_some_and(|limits| limits.blocks_max > 0)
    }

    /// Whether WRITE_ZEROES is offered.
    pub(crate) fn writes_zeroes(&self) -> bool {
        !self.read_only && self.geometry.write_zeroes.is_some_and(|limits| limits.blocks_max > 0)
    }

    /// The operation of one range: 16 bytes from the payload of a discard or write-zeroes.
    pub(crate) fn range(
        &self,
        write_zeroes: bool,
        range: [u8; RANGE_BYTES],
    ) -> Result<(Operation, u64, u64), VirtioStatus> {
        let value = u128::from_le_bytes(range);
        #[expect(clippy::cast_possible_truncation, reason = "takes the fields out of the bytes")]
        let (sector, sectors, flags) = (value as u64, (value >> 64) as u32, (value >> 96) as u32);
        // 5.2.6.2: unknown flags, and unmap on a discard, are unsupported.
        let known = if write_zeroes { RANGE_FLAG_UNMAP } else { 0 };
        if flags & !known != 0 {
            return Err(VirtioStatus::Unsupported);
        }
        let (operation, blocks_max) = if write_zeroes {
            let limits = self.geometry.write_zeroes.ok_or(VirtioStatus::Unsupported)?;
            let unmap = flags & RANGE_FLAG_UNMAP != 0 && limits.may_unmap;
            (Operation::WriteZeroes { unmap, fua: self.write_through }, limits.blocks_max)
        } else {
            (Operation::Discard, self.geometry.discard.ok_or(VirtioStatus::Unsupported)?.blocks_max)
        };
        let bytes = u64::from(sectors) << SECTOR_SHIFT;
        match self.blocks(sector, bytes) {
            Some((lba, blocks)) if blocks <= u64::from(blocks_max) => Ok((operation, lba, blocks)),
            _ => Err(VirtioStatus::IoErr),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawser_block::{BlockSize, DiscardLimits, WriteZeroesLimits};

    fn limits(block_size: BlockSize) -> Limits {
        let mut geometry = Geometry::new(block_size, 1000);
        geometry.discard = Some(DiscardLimits { blocks_max: 100, granularity_blocks: 1, reads_zeroes: true });
        geometry.write_zeroes = Some(WriteZeroesLimits { blocks_max: 50, may_unmap: true });
        Limits { geometry, read_only: false, write_through: false }
    }

    fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES] {
        (u128::from(sector) << 64 | u128::from(kind)).to_le_bytes()
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> [u8; RANGE_BYTES] {
        (u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96).to_le_bytes()
    }

    const IOERR: Action = Action::Answer(VirtioStatus::IoErr);
    const UNSUPPORTED: Action = Action::Answer(VirtioStatus::Unsupported);

    #[test]
    fn sectors_are_512_bytes_on_every_block_size() {
        let read = |limits: Limits, sector, bytes| limits.decode(&header(T_IN, sector), 0, bytes);
        let submit = |lba, blocks| Action::Submit { operation: Operation::Read, lba, blocks };
        let small = limits(BlockSize::B512);
        assert_eq!(read(small, 999, 512), submit(999, 1));
        assert_eq!(read(small, 999, 1024), IOERR);
        assert_eq!(read(small, 0, 0), IOERR);
        assert_eq!(read(small, 0, 511), IOERR);
        assert_eq!(read(small, u64::MAX, 512), IOERR);
        assert_eq!(read(small, 0, !511), IOERR);
        let large = limits(BlockSize::B4096);
        assert_eq!(read(large, 7992, 4096), submit(999, 1));
        assert_eq!(read(large, 8000, 4096), IOERR);
        assert_eq!(read(large, 1, 4096), IOERR);
        assert_eq!(read(large, 8, 512), IOERR);
        assert_eq!(read(large, !7, 4096), IOERR);
    }

    #[test]
    fn writes_are_durable_when_asked_and_refused_when_read_only() {
        let mut limits = limits(BlockSize::B512);
        let write = |limits: &Limits| limits.decode(&header(T_OUT, 1), 512, 0);
        let submit = |fua| Action::Submit { operation: Operation::Write { fua }, lba: 1, blocks: 1 };
        assert_eq!(write(&limits), submit(false));
        limits.write_through = true;
        assert_eq!(write(&limits), submit(true));
        limits.read_only = true;
        assert_eq!(write(&limits), IOERR);
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            assert_eq!(limits.decode(&header(kind, 0), 16, 0), UNSUPPORTED);
        }
    }

    #[test]
    fn what_is_not_offered_is_unsupported() {
        let mut limits = limits(BlockSize::B512);
        limits.geometry.discard = None;
        limits.geometry.write_zeroes = None;
        for kind in [2, 10, T_DISCARD, T_WRITE_ZEROES, 14, u32::MAX] {
            assert_eq!(limits.decode(&header(kind, 0), 16, 0), UNSUPPORTED);
        }
    }

    #[test]
    fn ranges_are_checked_for_flags_limits_and_wrapping() {
        let limits = limits(BlockSize::B512);
        assert_eq!(limits.range(false, range(5, 7, 0)), Ok((Operation::Discard, 5, 7)));
        let zeroes = |unmap| Operation::WriteZeroes { unmap, fua: false };
        assert_eq!(limits.range(true, range(5, 7, 0)), Ok((zeroes(false), 5, 7)));
        assert_eq!(limits.range(true, range(5, 7, 1)), Ok((zeroes(true), 5, 7)));
        assert_eq!(limits.range(false, range(5, 7, 1)), Err(VirtioStatus::Unsupported));
        assert_eq!(limits.range(true, range(5, 7, 2)), Err(VirtioStatus::Unsupported));
        for (sector, sectors) in
            [(0, 0), (0, 101), (1000, 1), (u64::MAX, 1), (u64::MAX, u32::MAX), (901, 100)]
        {
            assert_eq!(limits.range(false, range(sector, sectors, 0)), Err(VirtioStatus::IoErr));
        }
        let limits = super::tests::limits(BlockSize::B4096);
        assert_eq!(limits.range(false, range(8, 16, 0)), Ok((Operation::Discard, 1, 2)));
        assert_eq!(limits.range(false, range(8, 15, 0)), Err(VirtioStatus::IoErr));
        assert_eq!(limits.range(false, range(9, 8, 0)), Err(VirtioStatus::IoErr));
    }
}
