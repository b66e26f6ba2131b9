//! One connection of a host, without its socket: bytes in, requests and bytes out.
//!
//! Owns: the state of one NVMe/TCP connection and its queue. Must not know: sockets, reactors, what a device is made of.
//!
//! ```text
//!   receive_space ──► handle_received ──► parse PDUs ──► command in a slot ──► requests (per namespace)
//!                                              │                                     │
//!        batch ◄── answer ◄── admin, fabrics ◄─┘          handle_completion ◄────────┘
//! ```
//!
//! Received bytes land in a staging buffer, many PDUs at once; what is left of a payload lands in its command's own buffer.
//! Nothing that a peer sends panics or allocates without bound: slots are twice the queue's size (a host may reuse an
//! entry before our answer's send has completed), payload beyond [`PAYLOAD_BYTES_MAX`] waits, and a PDU that breaks the
//! protocol ends the connection with a C2HTermReq that names the field.

mod admin;
mod answers;
mod fabrics;
mod io;
mod notices;
mod rdma;
mod receive;
mod reserve;
mod resets;
mod slots;
#[cfg(test)]
mod tests;
mod transmit;

pub(super) use rdma::Move;

use super::port::PortGroup;
use super::registry::{ConnectionRef, Controller, Subsystem};
use super::reservations::Access;
use super::{BufferPool, IN_CAPSULE_BYTES_MAX, Shared, TRANSFER_BYTES_MAX};
use crate::nvme::reservation::ReservationNotice;
use crate::nvme::{Cqe, NvmeStatus, Sqe, StatusCode};
use crate::rdma::arena::Arena;
use crate::tcp::pdu;
use crate::tcp::{DataPdu, Digests, PduKind, ReadyToTransfer, Receiver};
use hawser_block::{Device, Request};
use hawser_runtime::Instant;
use hawser_runtime::buffers::AlignedBuffer;
use notices::Notices;
use reserve::ReservationLog;
use resets::Reset;
use slots::{Phase, Slots};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use transmit::Batch;

/// Bytes that are received at once.
const STAGING_BYTES: usize = 128 << 10;
/// What the commands of one connection may have in payload before others wait, but for what comes in capsules.
const PAYLOAD_BYTES_MAX: usize = 8 << 20;
/// What is kept for the next commands.
const PAYLOAD_SPARE_BYTES_MAX: usize = 8 << 20;
/// Answers that may wait for the socket, in bytes without payload, before no more commands are taken in. A host within its
/// queue's size stays far below: 128 answers are 3 KiB.
const WAITING_ANSWERS_MAX: usize = 64 << 10;
/// What a connection has in memory before its first command: the staging buffer, its slots, and room to answer. It counts from
/// its Connect on: before that there are few of them, and who has not connected must not make others do with less.
pub(super) const OWN_BYTES: usize = 256 << 10;
/// Commands at a time: those of the largest queue, and as many whose answers' send has not completed.
const SLOTS: usize = 2 * super::QUEUE_ENTRIES_MAX as usize;

/// What a host's data goes to.
#[derive(Clone, Copy, Debug)]
struct Payload {
    slot: usize,
    /// Where the PDU's data begins in the command's.
    begin: usize,
    /// What is still to come.
    left: usize,
    kind: PduKind,
    last: bool,
}

/// What comes next.
#[derive(Clone, Copy, Debug)]
enum Receiving {
    Header,
    Payload(Payload),
    /// The data digest of this payload.
    Digest(Payload),
    /// Nothing any more.
    Over,
}

/// What the queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    /// Connect has not come yet.
    None,
    /// Connect in this slot waits for its host's past to end.
    Connecting(usize),
    Admin,
    Io,
}

/// What the driver has to do for a connection.
pub(super) enum Action {
    /// Wait until the commands that these connections have now have ended, then call [`Connection::connected`].
    AwaitQuiet(Vec<ConnectionRef>),
    /// End these connections.
    Close(Vec<ConnectionRef>),
    /// Keep the reservations of this namespace, wait until the commands that these connections have now have ended, then call
    /// [`Connection::reserved`].
    Keep { index: usize, subsystem: Arc<Subsystem>, position: usize, fence: Vec<ConnectionRef> },
    /// Call [`Connection::reservation_notice`] of these connections.
    Notify { connections: Vec<ConnectionRef>, notice: ReservationNotice, nsid: u32 },
    /// End these connections, then call [`Connection::reset_ended`]; [`Connection::reset_lasts`] when that takes long.
    Reset { id: u64, connections: Vec<ConnectionRef> },
}

/// Somebody waits for the commands that devices had at some time.
struct Barrier {
    /// The commands of this epoch and before.
    until: u64,
    /// How many of them have not ended.
    left: usize,
    tell: Box<dyn FnOnce() + Send>,
}

/// A namespace as this connection uses it.
pub(super) struct Lane {
    pub(super) device: Arc<dyn Device>,
    /// How well it can be reached where the host came in.
    ana: Option<Arc<PortGroup>>,
    /// log2 of the block size; `None` until the geometry is known.
    shift: Option<u32>,
    /// Reads must find zeroes in the buffer, which may have held another host's data.
    cleared: bool,
    /// What reservations let the host do, as of `access_epoch`.
    access: Access,
    access_epoch: u64,
    /// For the device.
    pub(super) batch: Vec<Request>,
}

/// One connection.
pub(super) struct Connection {
    shared: Arc<Shared>,
    me: ConnectionRef,
    /// The address that the host dialled.
    local: Option<std::net::SocketAddr>,
    /// Which of the target's listeners took it.
    listener: usize,
    now: Instant,

    staging: AlignedBuffer,
    /// Bytes in `staging` that are not parsed: from, to.
    staged: (usize, usize),
    receiving: Receiving,
    /// ICReq has come.
    initialised: bool,
    digests: Digests,
    /// What the host wants C2HData's payload aligned to.
    host_alignment: u32,

    slots: Slots,
    /// Commands that wait for memory, in order.
    waiting: VecDeque<usize>,
    lanes: Vec<Lane>,
    /// Some lane's batch has requests.
    submitting: bool,
    /// Commands at devices.
    executing: usize,
    epoch: u64,
    barriers: Vec<Barrier>,

    queue: Queue,
    queue_id: u16,
    /// Entries of the queue.
    entries: u16,
    sq_head: u16,
    flow_control: bool,
    /// Set by the Connect that was found good, once; from then on our memory counts.
    controller: Option<Arc<Controller>>,
    notices: Notices,
    /// Cross-Controller Resets that the host asked for.
    resets: Vec<Reset>,
    next_reset: u64,
    changed_namespaces: std::collections::BTreeSet<u32>,
    reservation_log: ReservationLog,

    next: Batch,
    sending: Batch,
    /// Over RDMA, in place of batches: what is to be moved, in order.
    moves: Option<VecDeque<Move>>,
    actions: Vec<Action>,
    /// What was wrong, for the log.
    trouble: Option<String>,
    /// It was we who were wrong, as the host says.
    given_up: bool,
}

impl Connection {
    pub(super) fn new(
        shared: Arc<Shared>,
        me: ConnectionRef,
        listener: usize,
        local: Option<std::net::SocketAddr>,
    ) -> Connection {
        Connection::with(shared, me, listener, local, None)
    }

    /// `arena`: over RDMA, where its payload is.
    fn with(
        shared: Arc<Shared>,
        me: ConnectionRef,
        listener: usize,
        local: Option<std::net::SocketAddr>,
        arena: Option<Arena>,
    ) -> Connection {
        let pool =
            BufferPool::new(PAYLOAD_BYTES_MAX, PAYLOAD_SPARE_BYTES_MAX).within(Arc::clone(&shared.memory));
        let keyed = arena.is_some();
        let pool = match arena {
            Some(arena) => pool.from(arena),
            None => pool,
        };
        let staging = if keyed { AlignedBuffer::ALIGNMENT } else { STAGING_BYTES };
        Connection {
            shared,
            me,
            local,
            listener,
            now: Instant::default(),
            staging: AlignedBuffer::new(staging),
            staged: (0, 0),
            receiving: Receiving::Header,
            initialised: false,
            digests: Digests::NONE,
            host_alignment: 4,
            slots: Slots::new(SLOTS, pool, keyed),
            waiting: VecDeque::new(),
            lanes: Vec::new(),
            submitting: false,
            executing: 0,
            epoch: 0,
            barriers: Vec::new(),
            queue: Queue::None,
            queue_id: 0,
            entries: 0,
            sq_head: 0,
            flow_control: true,
            controller: None,
            notices: Notices::default(),
            resets: Vec::new(),
            next_reset: 0,
            changed_namespaces: std::collections::BTreeSet::new(),
            reservation_log: ReservationLog::default(),
            next: Batch::new(),
            sending: Batch::new(),
            moves: keyed.then(|| VecDeque::with_capacity(SLOTS)),
            actions: Vec::new(),
            trouble: None,
            given_up: false,
        }
    }

    // ---- commands ----

    /// A command is there, with what its capsule carried.
    fn begin(&mut self, index: usize) {
        if let Some(refused) = self.slots.at(index).refused {
            self.fail(index, refused);
            return;
        }
        // FUSES is 0: a fused command would be executed on its own (base 3.4.2).
        if self.slots.at(index).sqe.flags & Sqe::FLAGS_FUSED != 0 {
            self.fail(index, NvmeStatus::fatal(StatusCode::INVALID_FIELD));
            return;
        }
        match self.queue {
            Queue::Io => self.begin_io(index),
            Queue::Admin => self.begin_admin(index),
            Queue::None | Queue::Connecting(_) => self.begin_fabrics(index),
        }
    }

    /// The data that an R2T asked for is there.
    fn transferred(&mut self, index: usize) {
        if let Some(refused) = self.slots.at(index).refused {
            self.fail(index, refused);
            return;
        }
        self.execute_write(index);
    }

    /// Gets a buffer of `len` bytes for a command, or lets it wait for one. Returns whether it has one.
    fn allocate(&mut self, index: usize, len: u32) -> bool {
        let buffer = if self.waiting.is_empty() { self.slots.pool.take(len as usize) } else { None };
        let slot = self.slots.at(index);
        slot.len = len;
        if buffer.is_none() {
            slot.phase = Phase::Waiting;
            self.waiting.push_back(index);
            return false;
        }
        slot.buffer = buffer;
        true
    }

    /// Asks for all data of a command, whose buffer is there.
    fn ask_for_data(&mut self, index: usize) {
        let slot = self.slots.at(index);
        slot.phase = Phase::Transfer;
        if let Some(moves) = &mut self.moves {
            moves.push_back(Move::read(index, slot));
            return;
        }
        let tag = u16::try_from(index).expect("slots number below 2^16");
        let ready = ReadyToTransfer { cid: slot.sqe.cid, tag, offset: 0, len: slot.len };
        let bytes = ready.to_bytes(self.digests);
        self.push_pdu_header(&bytes);
    }

    /// Memory came back: commands that waited for it go on.
    fn go_on_waiting(&mut self) {
        while let Some(index) = self.waiting.front().copied() {
            let len = self.slots.at(index).len as usize;
            let Some(buffer) = self.slots.pool.take(len) else { return };
            self.waiting.pop_front();
            self.slots.at(index).buffer = Some(buffer);
            self.begin_with_buffer(index);
        }
    }

    // ---- answers ----

    /// A header, and its digest where that was agreed.
    fn push_pdu_header(&mut self, bytes: &[u8]) {
        self.next.push_head(bytes);
        if self.digests.header {
            self.next.push_head(&pdu::digest(bytes));
        }
    }

    fn fail(&mut self, index: usize, status: NvmeStatus) {
        self.answer(index, status, 0);
    }

    /// Ends a command without data for the host.
    fn answer(&mut self, index: usize, status: NvmeStatus, result: u64) {
        let cqe = self.completion(index, status, result);
        if let Some(moves) = &mut self.moves {
            moves.push_back(Move::answer(&cqe, self.slots.at(index)));
        } else {
            let bytes = pdu::response_to_bytes(&cqe, self.digests);
            self.push_pdu_header(&bytes);
        }
        self.slots.release(index);
    }

    fn completion(&mut self, index: usize, mut status: NvmeStatus, result: u64) -> Cqe {
        let passes = matches!(status.code, StatusCode::NAMESPACE_NOT_READY | StatusCode::COMMAND_INTERRUPTED);
        if passes && self.controller.as_ref().is_some_and(|it| it.retry_delays.load(Ordering::Relaxed)) {
            // CRDT1.
            status.retry_delay = 1;
        }
        if self.flow_control && self.entries > 0 {
            self.sq_head = (self.sq_head + 1) % self.entries;
        }
        let cid = self.slots.at(index).sqe.cid;
        Cqe { result, sq_head: self.sq_head, sq_id: 0, cid, status }
    }

    /// Ends a command well, with the first `len` bytes of its buffer for the host.
    fn answer_with_data(&mut self, index: usize, len: u32) {
        if self.moves.is_some() {
            return self.move_to_host(index, len);
        }
        let slot = self.slots.at(index);
        slot.phase = Phase::Sending;
        let start = slot.data().cast_const();
        // Without flow control nothing but the status would be in the capsule (TCP 3.3.2.2).
        let success = !self.flow_control;
        let data = DataPdu { cid: slot.sqe.cid, tag: 0, offset: 0, len, last: true, success };
        let header = data.to_bytes(Receiver::Host, self.digests, self.host_alignment);
        self.push_pdu_header(&header);
        let padding = usize::from(header[3]) - header.len() - if self.digests.header { 4 } else { 0 };
        self.next.push_head(&[0; 128][..padding]);
        self.next.push_data(start, len as usize);
        if self.digests.data {
            let buffer = self.slots.at(index).buffer.as_ref().expect("it has data");
            // SAFETY: the device is done with the buffer, and nobody writes to it until it is sent.
            let digest = pdu::digest(unsafe { buffer.slice(0, len as usize) });
            self.next.push_head(&digest);
        }
        if !success {
            let cqe = self.completion(index, NvmeStatus::SUCCESS, 0);
            let bytes = pdu::response_to_bytes(&cqe, self.digests);
            self.push_pdu_header(&bytes);
        }
        self.next.push_slot(index);
    }

    // ---- sending ----

    /// The next batch for the socket, if there is one and none is on its way: message and length.
    pub(super) fn poll_transmit(&mut self) -> Option<(*const libc::msghdr, usize)> {
        if !self.sending.is_empty() || self.next.is_empty() {
            return None;
        }
        std::mem::swap(&mut self.next, &mut self.sending);
        Some((self.sending.message(), self.sending.len()))
    }

    /// The batch is out, or the socket will not take it: nobody reads its memory any more.
    pub(super) fn transmitted(&mut self) {
        while let Some(index) = self.sending.take_slot() {
            self.slots.release(index);
        }
        self.go_on_waiting();
    }

    // ---- for the driver ----

    /// Whether requests wait for their devices in the lanes.
    pub(super) fn take_submitting(&mut self) -> bool {
        std::mem::take(&mut self.submitting)
    }

    pub(super) fn lanes(&mut self) -> &mut [Lane] {
        &mut self.lanes
    }

    pub(super) fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    pub(super) fn take_trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }

    /// Whether the host has ended it with a terminate request.
    pub(super) fn was_given_up(&self) -> bool {
        self.given_up
    }

    /// Whether the peer's bytes are not wanted any more.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.receiving, Receiving::Over)
    }

    /// Whether nothing more is to be read for now: the peer sends without reading what it is answered, or there is no memory
    /// for more. In both cases something of its own will end that makes the driver look again.
    pub(super) fn is_congested(&self) -> bool {
        self.next.head_len() > WAITING_ANSWERS_MAX
            || self.moves.as_ref().is_some_and(|moves| moves.len() > SLOTS)
            || self.executing > 0 && self.shared.memory.is_over_with(IN_CAPSULE_BYTES_MAX as usize)
    }

    /// Whether no device has a command of it.
    pub(super) fn is_quiet(&self) -> bool {
        self.executing == 0
    }

    pub(super) fn controller(&self) -> Option<&Arc<Controller>> {
        self.controller.as_ref()
    }

    /// Whether a Connect has succeeded.
    pub(super) fn is_connected(&self) -> bool {
        matches!(self.queue, Queue::Admin | Queue::Io)
    }

    /// Whether this is an association's admin queue.
    pub(super) fn is_admin(&self) -> bool {
        self.controller.is_some() && self.queue_id == 0
    }

    /// Calls `tell` when all commands that devices have now have ended: perhaps at once. Else returns what names the barrier.
    pub(super) fn add_barrier(&mut self, tell: Box<dyn FnOnce() + Send>) -> Option<u64> {
        if self.executing == 0 {
            tell();
            return None;
        }
        let until = self.epoch;
        self.barriers.push(Barrier { until, left: self.executing, tell });
        self.epoch += 1;
        Some(until)
    }

    /// Whether commands of before this barrier are still at devices.
    pub(super) fn is_waited_for(&self, barrier: u64) -> bool {
        self.barriers.iter().any(|other| other.until == barrier)
    }

    /// A device is done with a command that it got in `epoch`.
    fn count_ended(&mut self, epoch: u64) {
        self.executing -= 1;
        if self.barriers.is_empty() {
            return;
        }
        for barrier in &mut self.barriers {
            if epoch <= barrier.until {
                barrier.left -= 1;
            }
        }
        while let Some(at) = self.barriers.iter().position(|barrier| barrier.left == 0) {
            let barrier = self.barriers.remove(at);
            (barrier.tell)();
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.controller.is_some() {
            self.shared.memory.credit(OWN_BYTES);
        }
    }
}
