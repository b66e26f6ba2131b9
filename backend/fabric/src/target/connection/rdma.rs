//! A connection over RDMA: capsules in, moves out. What commands do is the same as over TCP.
//!
//! ```text
//!   handle_capsule ──► command in a slot ──► requests ──► ... ──► moves ──► the driver posts them
//!                                                                   data_is_here, answered ◄── they have completed
//! ```
//!
//! Invariant: what a move names stays until the driver has said that it is over, or the queue pair is not there any more.

use super::slots::{Phase, Slot};
use super::{Connection, ConnectionRef, IN_CAPSULE_BYTES_MAX, Receiving, Shared};
use crate::nvme::{Cqe, NvmeStatus, Sgl, Sqe};
use crate::rdma::arena::Arena;
use hawser_runtime::Instant;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The data of a slot, and the host's memory for it.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Payload {
    pub(in super::super) slot: usize,
    /// In our memory.
    pub(in super::super) start: *mut u8,
    pub(in super::super) len: u32,
    /// At the host.
    pub(in super::super) address: u64,
    pub(in super::super) key: u32,
}

/// What is to be moved.
#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Move {
    /// A command's data, from the host: [`Connection::data_is_here`] hears of its end.
    Read(Payload),
    /// An answer, after the data that goes with it: [`Connection::answered`] hears of the end of one with data.
    Answer {
        cqe: [u8; Cqe::LEN],
        /// The key that the host does not need any more.
        invalidate: Option<u32>,
        data: Option<Payload>,
    },
}

fn payload(index: usize, slot: &Slot, len: u32) -> Payload {
    let Sgl { address, key, .. } = slot.sqe.sgl;
    Payload { slot: index, start: slot.data(), len, address, key }
}

/// The key of a command's memory, if the host wants it invalidated with the answer.
fn invalidates(slot: &Slot) -> Option<u32> {
    let sgl = slot.sqe.sgl;
    (sgl.identifier == Sgl::KEYED | Sgl::INVALIDATE && sgl.len > 0).then_some(sgl.key)
}

impl Move {
    pub(super) fn read(index: usize, slot: &Slot) -> Move {
        Move::Read(payload(index, slot, slot.len))
    }

    pub(super) fn answer(cqe: &Cqe, slot: &Slot) -> Move {
        Move::Answer { cqe: cqe.to_bytes(), invalidate: invalidates(slot), data: None }
    }
}

impl Connection {
    /// A connection whose payload is in `arena`.
    pub(in super::super) fn over_rdma(
        shared: Arc<Shared>,
        me: ConnectionRef,
        listener: usize,
        local: Option<SocketAddr>,
        arena: Arena,
    ) -> Connection {
        Connection::with(shared, me, listener, local, Some(arena))
    }

    /// Ends a command well, after the first `len` bytes of its buffer have gone to the host.
    pub(super) fn move_to_host(&mut self, index: usize, len: u32) {
        let cqe = self.completion(index, NvmeStatus::SUCCESS, 0).to_bytes();
        let slot = self.slots.at(index);
        slot.phase = Phase::Sending;
        let answer =
            Move::Answer { cqe, invalidate: invalidates(slot), data: Some(payload(index, slot, len)) };
        self.moves.get_or_insert_default().push_back(answer);
    }

    /// The next thing that is to be moved.
    pub(in super::super) fn next_move(&mut self) -> Option<Move> {
        self.moves.as_mut()?.pop_front()
    }

    /// Takes a capsule: a command, and data behind it.
    ///
    /// # Safety
    /// `len` bytes are at `capsule`, and nobody writes to them meanwhile.
    pub(in super::super) unsafe fn handle_capsule(&mut self, capsule: *const u8, len: usize, now: Instant) {
        self.now = now;
        if let Some(controller) = &self.controller {
            controller.heard(now);
        }
        if self.is_over() {
            return;
        }
        if len < Sqe::LEN || len - Sqe::LEN > IN_CAPSULE_BYTES_MAX as usize {
            return self
                .break_off(format!("a capsule has {len} bytes, want 64 to {}", 64 + IN_CAPSULE_BYTES_MAX));
        }
        let mut bytes = [0; Sqe::LEN];
        // SAFETY: as many bytes are there (just looked at), and apart.
        unsafe { std::ptr::copy_nonoverlapping(capsule, bytes.as_mut_ptr(), bytes.len()) };
        let sqe = Sqe::from_bytes(&bytes);
        let Some(index) = self.slots.take(sqe) else {
            return self.break_off(format!("CID {:#x} is more than the queue's size has room for", sqe.cid));
        };
        let data = len - Sqe::LEN;
        if data > 0 {
            let buffer = self.slots.pool.take_anyway(data);
            // SAFETY: the capsule has so much data (its length says so); the buffer has room for it, and is apart.
            unsafe { buffer.as_ptr().copy_from_nonoverlapping(capsule.add(Sqe::LEN), data) };
            let slot = self.slots.at(index);
            slot.buffer = Some(buffer);
            self.shared.capsule_bytes.fetch_add(data as u64, Ordering::Relaxed);
            let data = u32::try_from(data).unwrap_or(u32::MAX);
            (slot.in_capsule, slot.len, slot.received) = (data, data, data);
        }
        self.begin(index);
    }

    /// The data that a [`Move::Read`] was to bring is there.
    pub(in super::super) fn data_is_here(&mut self, index: usize, now: Instant) {
        self.now = now;
        if !self.is_over() {
            let slot = self.slots.at(index);
            slot.received = slot.len;
            self.transferred(index);
        }
    }

    /// An answer with data has left: nobody reads its memory any more.
    pub(in super::super) fn answered(&mut self, index: usize) {
        self.slots.release(index);
        if !self.is_over() {
            self.go_on_waiting();
        }
    }

    /// Ends the connection over what the peer did.
    fn break_off(&mut self, what: String) {
        self.trouble = Some(what);
        self.receiving = Receiving::Over;
    }
}
