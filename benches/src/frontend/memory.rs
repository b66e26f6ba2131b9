//! Guest memory as a front end has it: one memfd, mapped here, offered to the server.
//!
//! Owns: the mapping and every access to it. Must not know: rings or messages.
//! Invariants: all accesses are bounds-checked and by raw copies or atomics, never by references to plain bytes,
//! because the server writes to the same pages at the same time.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU16, Ordering};

use crate::to_u64;

/// Where guest memory begins in the guest's address space: neither 0 nor our own address, so that a server that
/// mixes up the three kinds of address does not work by chance.
pub const GUEST_BASE: u64 = 0x1_2340_0000;

/// One shared region. Places in it are byte offsets from its start.
pub struct Memory {
    fd: OwnedFd,
    base: *mut u8,
    len: usize,
}

// SAFETY: the pointer is to a shared mapping that lives as long as the value; all accesses go through atomics or raw
// copies of bytes that nothing holds references to, so another thread may make them.
unsafe impl Send for Memory {}
// SAFETY: as for Send; concurrent copies of the same bytes can tear, which is what the server's own accesses do too.
unsafe impl Sync for Memory {}

impl Memory {
    /// `len` zero bytes (rounded up to whole pages by the kernel's mapping, not by us).
    pub fn new(len: usize) -> io::Result<Self> {
        // SAFETY: the name is a C string; no other preconditions.
        let fd = unsafe { libc::memfd_create(c"front-end".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: memfd_create has just returned this descriptor and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let file_len =
            libc::off_t::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: no memory is involved.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), file_len) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice cannot touch existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Memory { fd, base: base.cast(), len })
    }

    /// The file to pass to the server.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Bytes in the region.
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty: mmap refuses it")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The guest's address of a place: what descriptors hold.
    pub fn guest_address(&self, offset: usize) -> u64 {
        GUEST_BASE + to_u64(offset)
    }

    /// Our own address of a place: what `SET_VRING_ADDR` holds.
    pub fn user_address(&self, offset: usize) -> u64 {
        to_u64(self.base.addr() + offset)
    }

    fn check(&self, offset: usize, len: usize) {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len), "{offset}+{len} is outside of {} bytes", self.len);
    }

    /// Copies out of the region.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        self.check(offset, to.len());
        // SAFETY: the source is inside the mapping (checked); the destination is the caller's own slice, which cannot
        // overlap a mapping that nobody has references to.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(offset), to.as_mut_ptr(), to.len()) }
    }

    /// Copies into the region.
    pub fn write(&self, offset: usize, from: &[u8]) {
        self.check(offset, from.len());
        // SAFETY: as in `read`, with the directions exchanged.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.base.add(offset), from.len()) }
    }

    /// Sets a range to zero.
    pub fn clear(&self, offset: usize, len: usize) {
        self.check(offset, len);
        // SAFETY: the range is inside the mapping (checked), and nobody has references to it.
        unsafe { std::ptr::write_bytes(self.base.add(offset), 0, len) }
    }

    /// A little-endian word of fixed size, copied out.
    pub fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes);
        bytes
    }

    fn atomic(&self, offset: usize) -> &AtomicU16 {
        self.check(offset, 2);
        assert!(offset.is_multiple_of(2), "ring indices are aligned");
        // SAFETY: inside the mapping and aligned (checked; the base is page-aligned); the mapping outlives `&self`;
        // ring indices are accessed by atomics only, here and (by the virtio protocol) in the server.
        #[expect(clippy::cast_ptr_alignment, reason = "checked above")]
        unsafe {
            AtomicU16::from_ptr(self.base.add(offset).cast::<u16>())
        }
    }

    /// Loads a ring index.
    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        u16::from_le(self.atomic(offset).load(order))
    }

    /// Stores a ring index.
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        self.atomic(offset).store(value.to_le(), order);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is our own and whole, and nothing borrows from a value that is being dropped.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
