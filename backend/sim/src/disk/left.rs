//! Writes that were left ([`hawser_block::Channel::leave`]): they have ended for their user, and are carried out later.

use super::{SimDiskState, Waiting, give_up};
use hawser_block::{Buffers, Request};

/// A write that was left, with a copy of what it writes.
pub(super) struct Left {
    pub(super) waiting: Waiting,
    payload: Vec<u8>,
}

impl Left {
    pub(super) fn new(waiting: Waiting) -> Left {
        let mut payload = vec![0; waiting.request.buffers.len()];
        // SAFETY: the request has not ended; the copy is as long, and new.
        unsafe { waiting.request.buffers.copy_to(payload.as_mut_ptr()) };
        Left { waiting, payload }
    }

    /// Does with the request what is to be done with it in the end.
    pub(super) fn end(mut self, state: &mut SimDiskState, how: impl FnOnce(&mut SimDiskState, &Request)) {
        let iovec = libc::iovec { iov_base: self.payload.as_mut_ptr().cast(), iov_len: self.payload.len() };
        let len = u32::try_from(self.payload.len()).expect("requests are small");
        let buffers = match len {
            0 => Buffers::EMPTY,
            // SAFETY: iovec and payload live until the end of this function, and `how` keeps nothing.
            _ => unsafe { Buffers::new(&raw const iovec, 1, len) },
        };
        if !self.waiting.is_void {
            how(state, &Request { buffers, ..self.waiting.request });
        }
        state.left_writes -= 1;
    }
}

/// Nobody is there any more: each is carried out or not, as chance has it.
pub(super) fn give_up_left(left: &mut Vec<Left>, state: &mut SimDiskState) {
    for left in left.drain(..) {
        left.end(state, |state, request| {
            if state.failing.is_none() {
                give_up(state, request);
            }
        });
    }
}
