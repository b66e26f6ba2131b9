//! The split virtqueue's three parts as raw pointers (virtio 1.2, section 2.7), and nothing else.
//!
//! ```text
//! descriptors: { addr u64, len u32, flags u16, next u16 } x size
//! available:   flags u16, idx u16, ring[size] u16,           used_event u16    written by the driver
//! used:        flags u16, idx u16, ring[size] { u32, u32 },  avail_event u16   written by us
//! ```
//!
//! Must not know requests. Invariants: the pointers are valid for the whole of their part for as long as the epoch of guest
//! memory that they come from is alive (whoever holds a [`Ring`] holds that too); every index is masked or checked
//! before it is used.

use crate::shared;
use std::sync::atomic::{Ordering, fence};

/// The largest ring that we serve.
pub(crate) const SIZE_MAX: u16 = 1024;

pub(crate) const DESCRIPTOR_BYTES: u64 = 16;
pub(crate) const FLAG_NEXT: u16 = 1;
pub(crate) const FLAG_WRITE: u16 = 2;
pub(crate) const FLAG_INDIRECT: u16 = 4;

const USED_FLAG_NO_NOTIFY: u16 = 1;
const AVAILABLE_FLAG_NO_INTERRUPT: u16 = 1;

/// A descriptor, copied out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    #[inline]
    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Descriptor {
        let value = u128::from_le_bytes(bytes);
        #[expect(clippy::cast_possible_truncation, reason = "takes the fields out of the bytes")]
        Descriptor {
            address: value as u64,
            len: (value >> 64) as u32,
            flags: (value >> 96) as u16,
            next: (value >> 112) as u16,
        }
    }
}

/// Bytes of the three parts of a ring of `size`.
pub(crate) fn part_bytes(size: u16) -> (u64, u64, u64) {
    let size = u64::from(size);
    (DESCRIPTOR_BYTES * size, 6 + 2 * size, 6 + 8 * size)
}

/// A ring of a queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring {
    descriptors: *const u8,
    available: *const u16,
    used: *mut u16,
    size: u16,
}

// SAFETY: plain addresses of shared memory; a ring is used by one thread at a time.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring of `size`, a power of two. `None` when a part is not aligned: descriptors to 8 bytes (16 by the specification,
    /// which our own mapping may break; 8 is what we need), available to 2, used to 4.
    ///
    /// # Safety
    /// The parts have [`part_bytes`] mapped bytes each for as long as the ring is used.
    pub(crate) unsafe fn new(
        descriptors: *mut u8,
        available: *mut u8,
        used: *mut u8,
        size: u16,
    ) -> Option<Ring> {
        let aligned = (descriptors as usize).is_multiple_of(8)
            && (available as usize).is_multiple_of(2)
            && (used as usize).is_multiple_of(4);
        #[expect(clippy::cast_ptr_alignment, reason = "checked above")]
        (aligned && size.is_power_of_two() && size <= SIZE_MAX).then_some(Ring {
            descriptors,
            available: available.cast_const().cast::<u16>(),
            used: used.cast::<u16>(),
            size,
        })
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// How far the driver has made chains available. What it wrote before is visible after this.
    #[inline]
    pub(crate) fn available_idx(&self) -> u16 {
        // SAFETY: within the available ring, aligned (`new`).
        unsafe { shared::load_u16(self.available.add(1)) }
    }

    /// The head of the chain at `index`; any number.
    #[inline]
    pub(crate) fn available_head(&self, index: u16) -> u16 {
        // SAFETY: the slot is masked, so this is within the available ring.
        unsafe { self.available.add(2 + self.slot(index)).read_volatile() }
    }

    /// Copies a descriptor out. `index` must be below the size.
    #[inline]
    pub(crate) fn descriptor(&self, index: u16) -> Descriptor {
        assert!(index < self.size, "checked by the caller");
        // SAFETY: within the table. Bytes have no alignment; the driver may write meanwhile, then the copy is torn and is
        // validated as any other.
        let bytes = unsafe {
            self.descriptors
                .add(usize::from(index) * size_of::<[u8; 16]>())
                .cast::<[u8; 16]>()
                .read_volatile()
        };
        Descriptor::from_bytes(bytes)
    }

    /// Brings a descriptor's cache line closer.
    #[inline]
    pub(crate) fn prefetch_descriptor(&self, index: u16) {
        prefetch(self.descriptors.wrapping_add(self.slot(index) * size_of::<[u8; 16]>()));
    }

    /// Writes a used element. Not seen by the driver before [`Ring::publish_used`].
    #[inline]
    pub(crate) fn put_used(&self, index: u16, head: u16, len: u32) {
        let element = u64::from(head) | u64::from(len) << 32;
        // SAFETY: the slot is masked; elements are 4-aligned at 4 bytes into a 4-aligned ring, so two halves are stored.
        unsafe {
            #[expect(clippy::cast_ptr_alignment, reason = "4 bytes and whole elements into a 4-aligned part")]
            let at = self.used.add(2 + 4 * self.slot(index)).cast::<u32>();
            #[expect(clippy::cast_possible_truncation, reason = "the low half")]
            shared::store_u32(at, element as u32);
            shared::store_u32(at.add(1), len);
        }
    }

    /// Where the elements from index `from` up to `to` (not the same) lie in the used ring: offsets and lengths in bytes; two
    /// pieces where they wrap around.
    pub(crate) fn used_elements(&self, from: u16, to: u16) -> [Option<(u64, u64)>; 2] {
        let piece = |slot: u64, count: u64| (count > 0).then_some((4 + 8 * slot, 8 * count));
        let (slot, count) = (self.slot(from) as u64, u64::from(to.wrapping_sub(from).min(self.size)));
        let first = count.min(u64::from(self.size) - slot);
        [piece(slot, first), piece(0, count - first)]
    }

    /// Where `avail_event` lies in the used ring, or the flags without EVENT_IDX: what asks for kicks. Offset and length.
    pub(crate) fn used_wish(&self, event_idx: bool) -> (u64, u64) {
        (if event_idx { 4 + 8 * u64::from(self.size) } else { 0 }, 2)
    }

    /// Where `used.idx` lies in the used ring: offset and length.
    pub(crate) const USED_IDX: (u64, u64) = (2, 2);

    /// Shows the driver all elements below `index`.
    #[inline]
    pub(crate) fn publish_used(&self, index: u16) {
        // SAFETY: within the used ring, aligned.
        unsafe { shared::store_u16(self.used.add(1), index) };
    }

    /// What was published last, by us or by our predecessor.
    pub(crate) fn used_idx(&self) -> u16 {
        // SAFETY: within the used ring, aligned.
        unsafe { shared::load_u16(self.used.add(1)) }
    }

    /// Whether the driver wants to hear that used.idx went from `old` to `new`. Virtio 1.2, 2.7.7.2: the index is stored
    /// before the driver's wish is read, with a fence between, or an interrupt is lost.
    #[inline]
    pub(crate) fn wants_interrupt(&self, event_idx: bool, old: u16, new: u16) -> bool {
        fence(Ordering::SeqCst);
        if event_idx {
            // SAFETY: used_event follows the available ring's elements: within the part.
            let event = unsafe { shared::load_u16(self.available.add(2 + usize::from(self.size))) };
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            // SAFETY: within the available ring.
            let flags = unsafe { shared::load_u16(self.available) };
            flags & AVAILABLE_FLAG_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver to kick when it goes beyond `next`, then looks: whether it has gone beyond already.
    /// Virtio 1.2, 2.7.10.1.
    pub(crate) fn ask_for_kick(&self, event_idx: bool, next: u16) -> bool {
        // SAFETY: avail_event follows the used ring's elements; flags are its first field: both within the part.
        unsafe {
            if event_idx {
                shared::store_u16(self.used.add(2 + 4 * usize::from(self.size)), next);
            } else {
                shared::store_u16(self.used, 0);
            }
        }
        fence(Ordering::SeqCst);
        self.available_idx() != next
    }

    /// Asks the driver not to kick while we look ourselves. With EVENT_IDX the old event index does that.
    pub(crate) fn ask_for_silence(&self, event_idx: bool) {
        if !event_idx {
            // SAFETY: within the used ring.
            unsafe { shared::store_u16(self.used, USED_FLAG_NO_NOTIFY) };
        }
    }
}

/// Brings a cache line closer; any address will do.
#[inline]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is harmless.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
