//! What a queue marks in the front end's log of dirty pages, while a VM migrates ([`crate::dirty`]).
//!
//! Everything that was written is marked after it was written; a request's data and status byte, and its used element, before
//! `used.idx` shows them: whoever dies in between leaves no page behind that the driver relies on and nobody copies.

use super::Queue;
use crate::chain::PIECES_MAX;
use crate::dirty::Marks;
use crate::memory::GuestMemory;
use crate::queue::PIECES_INLINE;
use crate::ring::Ring;
use hawser_block::IoKind;

/// Marks bytes of ours that came from `memory`.
fn mark_host(marks: &Marks, memory: &GuestMemory, host: usize, len: usize) {
    // All of a request's bytes come from its epoch.
    if let Some(address) = memory.guest_address(host, len).filter(|_| len > 0) {
        marks.log.mark(address, len as u64);
    }
}

impl Queue {
    /// From now on everything is marked here, or nothing is. What has been shown is in the guest's memory already, and the front
    /// end copies all of that once logging has begun; what is in flight is marked when it ends.
    pub(crate) fn set_marks(&mut self, marks: Option<Marks>) {
        self.marks = marks;
        // A predecessor may have died between a store to the ring and its mark.
        if let Some(marks) = &self.marks {
            marks.used(0, crate::ring::part_bytes(self.ring.size()).2);
        }
    }

    /// Marks what the request at `head` has written, or may have: data and the status byte.
    #[cold]
    pub(super) fn mark_request(&self, head: u16) {
        let Some(marks) = &self.marks else { return };
        let slot = &self.slots[usize::from(head)];
        let memory = if slot.generation == self.generation {
            Some(&self.memory)
        } else {
            self.old_memory.iter().find(|old| old.generation == slot.generation).map(|old| &old.memory)
        };
        let Some(memory) = memory else { return };
        if slot.kind == IoKind::Read {
            let pieces = usize::from(slot.pieces);
            let pieces = if pieces <= PIECES_INLINE {
                &slot.inline[..pieces]
            } else {
                &self.overflow[usize::from(head) * PIECES_MAX..][..pieces]
            };
            for piece in pieces {
                mark_host(marks, memory, piece.iov_base as usize, piece.iov_len);
            }
        }
        mark_host(marks, memory, slot.status as usize, 1);
    }

    /// Marks `bytes` bytes of the current chain's writable pieces.
    #[cold]
    pub(super) fn mark_writable(&self, mut bytes: usize) {
        let Some(marks) = &self.marks else { return };
        for piece in self.chain.writable() {
            let len = piece.iov_len.min(bytes);
            mark_host(marks, &self.memory, piece.iov_base as usize, len);
            bytes -= len;
        }
    }

    /// Marks the used elements that are about to be shown.
    #[cold]
    pub(super) fn mark_elements(&self) {
        let Some(marks) = &self.marks else { return };
        for (offset, len) in self.ring.used_elements(self.published, self.next_used).into_iter().flatten() {
            marks.used(offset, len);
        }
    }

    /// Marks a part of the used ring.
    #[inline]
    pub(super) fn mark_used(&self, (offset, len): (u64, u64)) {
        if let Some(marks) = &self.marks {
            marks.used(offset, len);
        }
    }

    /// Shows the driver what has ended, marking it where that is wanted.
    #[inline]
    pub(super) fn show_used(&mut self) {
        if self.marks.is_some() {
            self.mark_elements();
        }
        self.published = self.next_used;
        self.ring.publish_used(self.published);
        self.mark_used(Ring::USED_IDX);
    }
}
