//! What goes out: PDU headers and payload, gathered into batches that go to the socket in one call each.
//!
//! ```text
//!   head bytes:  [C2HData][CapsuleResp C2HData][CapsuleResp]        one run of bytes
//!   parts:        head ─► data of slot 3 ─► head ─► data of slot 9 ─► head
//! ```
//!
//! Invariant: the parts of a batch in flight, and the slots whose buffers they name, change only when it has been sent.

use std::ptr;

/// One piece of a batch.
#[derive(Clone, Copy)]
enum Part {
    /// These bytes of `head`.
    Head { from: usize, to: usize },
    /// Payload in a slot's buffer.
    Data { start: *const u8, len: usize },
}

/// What goes out in one `sendmsg`.
pub(super) struct Batch {
    head: Vec<u8>,
    parts: Vec<Part>,
    /// The slots whose answers end with this batch.
    slots: Vec<usize>,
    iovecs: Vec<libc::iovec>,
    message: libc::msghdr,
}

impl Batch {
    pub(super) fn new() -> Batch {
        // SAFETY: an all-zero msghdr is one without anything.
        let message = unsafe { std::mem::zeroed() };
        Batch { head: Vec::new(), parts: Vec::new(), slots: Vec::new(), iovecs: Vec::new(), message }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// How many bytes it has besides payload.
    pub(super) fn head_len(&self) -> usize {
        self.head.len()
    }

    /// Appends bytes of a PDU.
    pub(super) fn push_head(&mut self, bytes: &[u8]) {
        let from = self.head.len();
        self.head.extend_from_slice(bytes);
        let end = self.head.len();
        match self.parts.last_mut() {
            Some(Part::Head { to, .. }) => *to = end,
            _ => self.parts.push(Part::Head { from, to: end }),
        }
    }

    /// Appends payload, which stays in place until the batch gives its slots back.
    pub(super) fn push_data(&mut self, start: *const u8, len: usize) {
        self.parts.push(Part::Data { start, len });
    }

    /// This slot is free once the batch has been sent.
    pub(super) fn push_slot(&mut self, slot: usize) {
        self.slots.push(slot);
    }

    /// The message for `sendmsg`, valid until the batch is changed.
    pub(super) fn message(&mut self) -> *const libc::msghdr {
        self.iovecs.clear();
        for part in &self.parts {
            let (start, len) = match *part {
                Part::Head { from, to } => (self.head[from..to].as_ptr(), to - from),
                Part::Data { start, len } => (start, len),
            };
            self.iovecs.push(libc::iovec { iov_base: start.cast_mut().cast(), iov_len: len });
        }
        self.message.msg_iov = self.iovecs.as_mut_ptr();
        self.message.msg_iovlen = self.iovecs.len();
        &raw const self.message
    }

    /// How many bytes it has.
    pub(super) fn len(&self) -> usize {
        let data = self.parts.iter().map(|part| match part {
            Part::Head { from, to } => to - from,
            Part::Data { len, .. } => *len,
        });
        data.sum()
    }

    /// All bytes, copied: for tests.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in &self.parts {
            match *part {
                Part::Head { from, to } => bytes.extend_from_slice(&self.head[from..to]),
                Part::Data { start, len } => {
                    // SAFETY: the slot's buffer lives until the batch is cleared, and nobody writes to it.
                    bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(start, len) });
                }
            }
        }
        bytes
    }

    /// Empties it after it was sent; the slots that are free now come out one by one.
    pub(super) fn take_slot(&mut self) -> Option<usize> {
        let slot = self.slots.pop();
        if slot.is_none() {
            self.head.clear();
            self.parts.clear();
            self.iovecs.clear();
            self.message.msg_iov = ptr::null_mut();
            self.message.msg_iovlen = 0;
        }
        slot
    }
}
