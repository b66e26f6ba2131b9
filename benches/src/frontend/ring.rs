//! The driver's side of one split virtqueue.
//!
//! ```text
//!  at.descriptors  size × { addr u64, len u32, flags u16, next u16 }
//!  at.available    flags u16, idx u16, size × head u16, used_event u16
//!  at.used         flags u16, idx u16, size × { head u32, len u32 }, avail_event u16
//! ```
//!
//! Owns: indices, notifications. Must not know: what the chains mean. Nothing here checks that a chain is sensible:
//! tests make senseless ones on purpose.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::memory::Memory;

/// The chain goes on at `next`.
pub const NEXT: u16 = 1;
/// The device writes here.
pub const WRITE: u16 = 2;
/// The buffer holds descriptors.
pub const INDIRECT: u16 = 4;

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: usize = 16;

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    /// Guest address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next one, with [`NEXT`].
    pub next: u16,
}

impl Descriptor {
    /// The entry as it lies in memory.
    pub fn to_bytes(self) -> [u8; DESCRIPTOR_BYTES] {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Where a ring's three parts lie, as offsets into [`Memory`].
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// The descriptor table; a multiple of 16.
    pub descriptors: usize,
    /// The available ring; even.
    pub available: usize,
    /// The used ring; a multiple of 4.
    pub used: usize,
    /// First byte behind all three.
    pub end: usize,
}

impl Places {
    /// The parts of a ring of `size` entries, one behind the other from `start` (a multiple of 16).
    pub fn new(start: usize, size: u16) -> Self {
        let size = usize::from(size);
        let available = start + DESCRIPTOR_BYTES * size;
        let used = (available + 6 + 2 * size).next_multiple_of(4);
        Places { descriptors: start, available, used, end: (used + 6 + 8 * size).next_multiple_of(64) }
    }
}

/// A chain that the device has given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's first descriptor, as the device wrote it.
    pub head: u32,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The device has signalled.
    Signalled,
    /// The server has closed the socket.
    Disconnected,
    /// Nothing has happened in time.
    TimedOut,
}

/// One queue.
pub struct Ring {
    memory: Arc<Memory>,
    places: Places,
    size: u16,
    event_idx: bool,
    /// Next index to make available; published up to here after [`Ring::publish`].
    available: u16,
    /// Available index at the last decision about a kick.
    kicked: u16,
    /// Next used entry to take.
    used: u16,
    kick: EventFd,
    call: EventFd,
}

impl Ring {
    /// A ring with cleared memory and indices at 0.
    pub fn new(memory: Arc<Memory>, places: Places, size: u16, event_idx: bool) -> io::Result<Self> {
        memory.clear(places.descriptors, places.end - places.descriptors);
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let (kick, call) = (event()?, event()?);
        Ok(Ring { memory, places, size, event_idx, available: 0, kicked: 0, used: 0, kick, call })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the parts lie.
    pub fn places(&self) -> Places {
        self.places
    }

    /// The eventfd that the device waits on.
    pub fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    /// The eventfd that the device signals.
    pub fn call_fd(&self) -> &EventFd {
        &self.call
    }

    /// New eventfds, as a front end makes them when it connects again: an old server's signal must not be ours.
    pub fn renew_events(&mut self) -> io::Result<()> {
        self.kick = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        self.call = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        self.kicked = self.available;
        Ok(())
    }

    /// The device's used index: where a device that knows nothing else goes on.
    pub fn used_index(&self) -> u16 {
        self.memory.load_u16(self.places.used + 2, Ordering::Acquire)
    }

    /// Chains made available and not yet taken back.
    pub fn outstanding(&self) -> u16 {
        self.available.wrapping_sub(self.used)
    }

    /// Writes entry `index` of the descriptor table.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        let offset = self.places.descriptors + DESCRIPTOR_BYTES * usize::from(index % self.size);
        self.memory.write(offset, &descriptor.to_bytes());
    }

    /// Puts a chain into the available ring; the device sees it after [`Ring::publish`].
    #[inline]
    pub fn push(&mut self, head: u16) {
        let at = self.places.available + 4 + 2 * usize::from(self.available % self.size);
        self.memory.store_u16(at, head, Ordering::Relaxed);
        self.available = self.available.wrapping_add(1);
    }

    /// Shows everything that was pushed to the device.
    #[inline]
    pub fn publish(&mut self) {
        self.memory.store_u16(self.places.available + 2, self.available, Ordering::Release);
    }

    /// Publishes an index of the caller's choice: for tests of devices that must not believe it.
    pub fn publish_index(&mut self, index: u16) {
        self.memory.store_u16(self.places.available + 2, index, Ordering::Release);
    }

    /// Kicks if the device wants to be kicked for what was published since the last call.
    pub fn kick(&mut self) -> io::Result<()> {
        // The device stores its wish, fences and looks for chains; we store a chain, fence and look for its wish.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event =
                self.memory.load_u16(self.places.used + 4 + 8 * usize::from(self.size), Ordering::Relaxed);
            let (new, old) = (self.available, self.kicked);
            // VIRTIO 1.2, 2.7.7.1: whether the index has passed the event since the last look.
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.memory.load_u16(self.places.used, Ordering::Relaxed) & 1 == 0
        };
        self.kicked = self.available;
        if wanted { self.kick.write(1) } else { Ok(()) }
    }

    /// Takes the next chain that the device has given back.
    #[inline]
    pub fn take_used(&mut self) -> Option<Used> {
        if self.used_index() == self.used {
            return None;
        }
        let at = self.places.used + 4 + 8 * usize::from(self.used % self.size);
        let entry: [u8; 8] = self.memory.get(at);
        self.used = self.used.wrapping_add(1);
        let [a, b, c, d, e, f, g, h] = entry;
        Some(Used { head: u32::from_le_bytes([a, b, c, d]), len: u32::from_le_bytes([e, f, g, h]) })
    }

    /// Asks for a signal at the next completion; true if one is there already.
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            let at = self.places.available + 4 + 2 * usize::from(self.size);
            self.memory.store_u16(at, self.used, Ordering::Relaxed);
        } else {
            self.memory.store_u16(self.places.available, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.used_index() != self.used
    }

    /// Waits for a signal, for the end of `socket`, or for `limit`. Call [`Ring::arm`] first.
    pub fn wait(&self, socket: RawFd, limit: Duration) -> io::Result<Wake> {
        let mut fds = [
            libc::pollfd { fd: self.call.as_raw_fd(), events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: socket, events: libc::POLLRDHUP, revents: 0 },
        ];
        let milliseconds = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: the pointer and count describe `fds`, which lives through the call.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), 2, milliseconds) };
        if n < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(Wake::Signalled) } else { Err(error) };
        }
        if fds[0].revents != 0 {
            // The counter is what woke us; its value says nothing more.
            let _ = self.call.read();
            return Ok(Wake::Signalled);
        }
        Ok(if fds[1].revents != 0 { Wake::Disconnected } else { Wake::TimedOut })
    }
}
