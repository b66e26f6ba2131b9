//! A descriptor chain, walked once: what the driver gives to read, what to write, as pieces of our address space.
//!
//! Must not know requests. No input may make it loop, panic, or name a byte outside of the guest's memory.

use crate::memory::GuestMemory;
use crate::ring::{DESCRIPTOR_BYTES, Descriptor, FLAG_INDIRECT, FLAG_NEXT, FLAG_WRITE, Ring};
use std::fmt;

/// Data segments that we tell the driver of (`seg_max`): a ring of 128 less header and status.
pub(crate) const SEGMENTS_MAX: u16 = 126;
/// Pieces that a chain may have here: [`SEGMENTS_MAX`], header, status, and a few segments that cross regions.
/// 133 x 16 bytes: no power of two, so that the slots of a queue spread over the caches' sets.
pub(crate) const PIECES_MAX: usize = 133;
/// Descriptors that we walk in one chain; a longer one is nobody's who keeps to `seg_max`, or a loop. Header and status are two
/// more than the 126 segments, and twice that leaves each of them room to be torn in two: 2 x (126 + 2).
pub(crate) const DESCRIPTORS_MAX: u32 = 2 * (SEGMENTS_MAX as u32 + 2);
/// Bytes that we serve in one chain: four of the largest requests. More would let a guest fill our memory with pieces of a
/// request whose descriptors all name the same page.
const BYTES_MAX: u64 = 16 << 20;

/// A chain that breaks the rules of the ring (virtio 1.2, 2.7.4 and 2.7.5). It ends the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the descriptor's own")]
pub enum ChainError {
    /// `next` names no descriptor of the table.
    Next { next: u16, size: u32 },
    /// More descriptors than there can be in this ring or table.
    Loop,
    /// More descriptors than we walk.
    TooLong,
    /// The driver did not negotiate indirect descriptors.
    IndirectNotNegotiated,
    /// An indirect descriptor with a next one.
    IndirectNext,
    /// An indirect descriptor within a table.
    IndirectNested,
    /// A table that is empty or no multiple of 16 bytes.
    IndirectLength { len: u32 },
    /// A table that is not in the guest's memory.
    IndirectAddress { address: u64 },
    /// A descriptor to read after one to write.
    Order,
    /// No byte for the status: nothing can be answered.
    NoStatus,
    /// The status byte is not in the guest's memory.
    StatusAddress { address: u64 },
}

impl fmt::Display for ChainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            ChainError::Next { next, size } => write!(f, "descriptor.next {next} with a table of {size}"),
            ChainError::Loop => f.write_str("descriptor.next: the chain does not end"),
            ChainError::TooLong => {
                write!(
                    f,
                    "descriptor.next: more than {DESCRIPTORS_MAX} descriptors; seg_max is {SEGMENTS_MAX}"
                )
            }
            ChainError::IndirectNotNegotiated => f.write_str("descriptor.flags: INDIRECT was not negotiated"),
            ChainError::IndirectNext => f.write_str("descriptor.flags: INDIRECT together with NEXT"),
            ChainError::IndirectNested => f.write_str("descriptor.flags: INDIRECT within an indirect table"),
            ChainError::IndirectLength { len } => {
                write!(f, "descriptor.len {len} of an indirect table is not a multiple of 16")
            }
            ChainError::IndirectAddress { address } => {
                write!(f, "descriptor.addr {address:#x} of an indirect table is not in memory")
            }
            ChainError::Order => f.write_str("descriptor.flags: device-readable after device-writable"),
            ChainError::NoStatus => f.write_str("descriptor.flags: no device-writable byte for the status"),
            ChainError::StatusAddress { address } => {
                write!(f, "descriptor.addr: the status byte at {address:#x} is not in memory")
            }
        }
    }
}

/// Where descriptors come from after the head.
enum Table {
    Ring,
    /// A table in one piece.
    Host {
        start: *const u8,
        count: u32,
    },
    /// A table that crosses regions.
    Guest {
        address: u64,
        count: u32,
    },
}

/// The pieces of one chain. Made once per queue and used for one chain after the other.
pub(crate) struct Chain {
    pieces: [libc::iovec; PIECES_MAX],
    /// The pieces that are left: `first..readable` to read, `readable..end` to write.
    first: usize,
    readable: usize,
    end: usize,
    readable_bytes: u64,
    writable_bytes: u64,
    /// Part of the chain is not in memory, or there are too many pieces: only the status can be written.
    unusable: bool,
    last_writable: (u64, u32),
    descriptors: u32,
}

impl Chain {
    pub(crate) fn new() -> Chain {
        Chain {
            pieces: [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PIECES_MAX],
            first: 0,
            readable: 0,
            end: 0,
            readable_bytes: 0,
            writable_bytes: 0,
            unusable: false,
            last_writable: (0, 0),
            descriptors: 0,
        }
    }

    /// Walks the chain at `head`, which is below the ring's size. Afterwards this is what the chain holds.
    pub(crate) fn walk(
        &mut self,
        ring: &Ring,
        memory: &GuestMemory,
        head: u16,
        indirect: bool,
    ) -> Result<(), ChainError> {
        (self.first, self.readable, self.end) = (0, 0, 0);
        (self.readable_bytes, self.writable_bytes) = (0, 0);
        self.unusable = false;
        self.last_writable = (0, 0);
        let mut table = Table::Ring;
        let mut descriptor = ring.descriptor(head);
        let mut walked = 1;
        loop {
            if descriptor.flags & FLAG_INDIRECT == 0 {
                self.add(memory, &descriptor)?;
                if descriptor.flags & FLAG_NEXT == 0 {
                    break;
                }
                let size = match table {
                    Table::Ring => u32::from(ring.size()),
                    Table::Host { count, .. } | Table::Guest { count, .. } => count,
                };
                if u32::from(descriptor.next) >= size {
                    return Err(ChainError::Next { next: descriptor.next, size });
                }
                descriptor = table.get(ring, memory, descriptor.next)?;
            } else {
                // 2.7.5.3.1: a single indirect descriptor ends the direct ones; its write flag means nothing.
                if !indirect {
                    return Err(ChainError::IndirectNotNegotiated);
                }
                if !matches!(table, Table::Ring) {
                    return Err(ChainError::IndirectNested);
                }
                if descriptor.flags & FLAG_NEXT != 0 {
                    return Err(ChainError::IndirectNext);
                }
                let (address, len) = (descriptor.address, u64::from(descriptor.len));
                if len == 0 || !len.is_multiple_of(DESCRIPTOR_BYTES) {
                    return Err(ChainError::IndirectLength { len: descriptor.len });
                }
                let count = u32::try_from(len / DESCRIPTOR_BYTES).unwrap_or(u32::MAX);
                table = match memory.contiguous(address, len) {
                    Some(start) => Table::Host { start, count },
                    None => Table::Guest { address, count },
                };
                descriptor = table.get(ring, memory, 0)?;
            }
            walked += 1;
            // A chain is not longer than the ring, or than its table.
            let most = match table {
                Table::Ring => u32::from(ring.size()),
                Table::Host { count, .. } | Table::Guest { count, .. } => {
                    count.saturating_add(u32::from(ring.size()))
                }
            };
            if walked > most {
                return Err(ChainError::Loop);
            }
            if walked > DESCRIPTORS_MAX {
                return Err(ChainError::TooLong);
            }
        }
        self.descriptors = walked;
        Ok(())
    }

    /// How many descriptors were walked.
    pub(crate) fn descriptors(&self) -> u32 {
        self.descriptors
    }

    #[inline]
    fn add(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), ChainError> {
        let len = u64::from(descriptor.len);
        let writable = descriptor.flags & FLAG_WRITE != 0;
        if writable {
            self.writable_bytes += len;
        } else if self.writable_bytes > 0 {
            // 2.7.4.2: what the device writes comes after what it reads.
            return Err(ChainError::Order);
        } else {
            self.readable_bytes += len;
        }
        if len == 0 {
            return Ok(());
        }
        if writable {
            self.last_writable = (descriptor.address, descriptor.len);
        }
        if self.unusable || self.readable_bytes + self.writable_bytes > BYTES_MAX {
            self.unusable = true;
            return Ok(());
        }
        let (pieces, end) = (&mut self.pieces, &mut self.end);
        let whole = memory.pieces(descriptor.address, len, |start, len| match pieces.get_mut(*end) {
            Some(piece) => {
                *piece = libc::iovec { iov_base: start.cast(), iov_len: len };
                *end += 1;
                true
            }
            None => false,
        });
        self.unusable |= !whole;
        if !writable {
            self.readable = self.end;
        }
        Ok(())
    }

    /// Takes the status byte, the last of what the driver gives to write.
    #[inline]
    pub(crate) fn take_status(&mut self, memory: &GuestMemory) -> Result<*mut u8, ChainError> {
        if self.writable_bytes == 0 {
            return Err(ChainError::NoStatus);
        }
        self.writable_bytes -= 1;
        if self.unusable {
            let (address, len) = self.last_writable;
            let address = address.wrapping_add(u64::from(len) - 1);
            return memory.contiguous(address, 1).ok_or(ChainError::StatusAddress { address });
        }
        let last = &mut self.pieces[self.end - 1];
        last.iov_len -= 1;
        let status = last.iov_base.cast::<u8>().wrapping_add(last.iov_len);
        if last.iov_len == 0 {
            self.end -= 1;
        }
        Ok(status)
    }

    /// Takes the first `N` bytes that the driver gives to read.
    #[inline]
    pub(crate) fn take_front<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.unusable || self.readable_bytes < N as u64 {
            return None;
        }
        self.readable_bytes -= N as u64;
        let front = &mut self.pieces[self.first];
        if front.iov_len == N {
            self.first += 1;
            // SAFETY: N bytes in mapped guest memory (checked by `add`). Copied once; may be torn, is validated.
            return Some(unsafe { front.iov_base.cast::<[u8; N]>().read_volatile() });
        }
        let mut bytes = [0; N];
        let mut filled = 0;
        while filled < N {
            let front = &mut self.pieces[self.first];
            let take = front.iov_len.min(N - filled);
            // SAFETY: `take` bytes of a piece in mapped guest memory, into a part of `bytes` that has room.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    front.iov_base.cast::<u8>(),
                    bytes.as_mut_ptr().add(filled),
                    take,
                );
            }
            filled += take;
            front.iov_base = front.iov_base.wrapping_byte_add(take);
            front.iov_len -= take;
            if front.iov_len == 0 {
                self.first += 1;
            }
        }
        Some(bytes)
    }

    /// Bytes to read that are left.
    #[inline]
    pub(crate) fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    /// Bytes to write that are left.
    #[inline]
    pub(crate) fn writable_bytes(&self) -> u64 {
        self.writable_bytes
    }

    /// The pieces to read that are left.
    #[inline]
    pub(crate) fn readable(&self) -> &[libc::iovec] {
        &self.pieces[self.first..self.readable]
    }

    /// The pieces to write that are left.
    #[inline]
    pub(crate) fn writable(&self) -> &[libc::iovec] {
        &self.pieces[self.readable..self.end]
    }
}

impl Table {
    fn get(&self, ring: &Ring, memory: &GuestMemory, index: u16) -> Result<Descriptor, ChainError> {
        match *self {
            Table::Ring => Ok(ring.descriptor(index)),
            Table::Host { start, .. } => {
                let at = start.wrapping_add(usize::from(index) * size_of::<[u8; 16]>()).cast::<[u8; 16]>();
                // SAFETY: the caller checked `index` against the table, and the table lies in one mapped region.
                Ok(Descriptor::from_bytes(unsafe { at.read_volatile() }))
            }
            Table::Guest { address, .. } => {
                // Does not wrap: a table whose end does is not in memory from its first byte behind the wrap on.
                let at = address.checked_add(u64::from(index) * DESCRIPTOR_BYTES);
                let bytes = at.and_then(|at| memory.read::<16>(at));
                bytes.map(Descriptor::from_bytes).ok_or(ChainError::IndirectAddress { address })
            }
        }
    }
}
