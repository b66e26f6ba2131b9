//! One NVMe/TCP queue pair, sans I/O: commands in, bytes out; bytes in, ends out.
//!
//! Owns: slots, command identifiers, what is to be sent in which order, and where received bytes belong. Must not know:
//! sockets, reconnecting, what a command is for.
//!
//! ```text
//!  submit ─► commands ─┐                        ┌─ handle_bytes (staged bytes, copied to where they belong)
//!            data ─────┴► poll_transmit  ...    ├─ receive_into (large data: let the kernel put it there)
//!                         transmitted ◄─ sent   └─ handle_in_place ──► ended
//! ```
//!
//! Invariants:
//! - A slot is freed, and its command's end told, only when the command is answered and nothing that is being sent
//!   names its buffers. Receiving names a slot's buffers only between `receive_into` and the next `handle_*`.
//! - The identifier of a command is its slot and the slot's generation, so that an answer that comes twice, or late, is
//!   found out and not taken for the next command's.
//! - Data with a digest is sent from, and checked in, memory of our own.
//! - Data arrives in order and whole: a read succeeds only with every byte, a write only when every byte was asked for.
//! - After an error the pair does nothing more; what is in its slots is taken out with `drain`.
//! - With SQ flow control no more commands are sent than the controller says that its queue has room for.

mod flow;
mod receive;
#[cfg(test)]
mod tests;

pub(crate) use flow::SqFlow;

use super::batch::{Batch, COPIED_CAPSULE_MAX, COPIES_LEN, HEADERS_LEN};
use super::meter::Moved;
use crate::nvme::bytes::low32;
use crate::nvme::{NvmeStatus, Sgl, Sqe};
use crate::tcp::pdu;
use crate::tcp::{DataPdu, Digests, PduError, Receiver, TermRequest};
use hawser_block::Buffers;
use hawser_runtime::buffers::AlignedBuffer;
use std::collections::VecDeque;
use std::fmt;

/// The data of reads from this length on is received in place, by receives of its own; that of shorter ones is copied from
/// the staging buffer. Measured over loopback, QD 8, in CPU µs per read of host and target together, in place and copied:
/// 16 KiB 7.4 and 3.7, 64 KiB 14.8 and 12.9, 128 KiB 28.5 and 27.0, 256 KiB 46 and 53, 512 KiB 103 and 270. Small receives
/// cost more than copying what is still in the second-level cache. In place, 128 KiB has 0.92 of the IOPS where TCP's congestion
/// control is cubic, and 0.65 with bbr, whose pacing then holds back each reply.
pub(crate) const IN_PLACE_MIN: u32 = 256 << 10;
/// A write in more segments than this does not go into the capsule, so that one command always fits into a send.
const IN_CAPSULE_SEGMENTS_MAX: usize = 256;
/// Bits of a command identifier that name the slot; the rest is the generation.
const SLOT_BITS: u32 = 9;
/// The most slots of a queue pair.
pub(crate) const SLOTS_MAX: u16 = 1 << SLOT_BITS;
/// The longest header that a controller sends once the connection is set up, without and with its digest.
const HEADER_LEN: usize = 24;
const HEADER_LEN_MAX: usize = HEADER_LEN + Digests::LEN as usize;

/// The data of a command.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Transfer {
    /// None.
    None,
    /// The controller sends it.
    ToHost(Buffers),
    /// We send it, in the capsule or when asked.
    FromHost(Buffers),
    /// We send the first so many of these bytes, which need no memory of the caller's: in the capsule or when asked.
    Inline([u8; 16], u8),
}

/// Data that we send.
#[derive(Clone, Copy)]
enum Outgoing {
    Buffers(Buffers),
    Inline([u8; 16], u8),
}

impl Outgoing {
    fn len(&self) -> u32 {
        match self {
            Outgoing::Buffers(buffers) => length(buffers),
            Outgoing::Inline(_, len) => u32::from(*len),
        }
    }
}

impl Transfer {
    fn outgoing(&self) -> Option<Outgoing> {
        match self {
            Transfer::FromHost(buffers) => Some(Outgoing::Buffers(*buffers)),
            Transfer::Inline(bytes, len) => Some(Outgoing::Inline(*bytes, *len)),
            Transfer::None | Transfer::ToHost(_) => None,
        }
    }
}

/// What a connection was set up with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// The most bytes of data that may be in a capsule.
    pub(crate) in_capsule_max: u32,
    /// MAXH2CDATA.
    pub(crate) host_data_max: u32,
    /// The alignment that CPDA asks for, in bytes.
    pub(crate) alignment: u32,
    /// Which digests there are in both directions.
    pub(crate) digests: Digests,
    /// `None`: the target has switched SQ flow control off.
    pub(crate) flow: Option<SqFlow>,
}

/// What a command ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: NvmeStatus,
    pub(crate) result: u64,
}

/// The end of the command that was submitted with `user`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended<T> {
    pub(crate) user: T,
    pub(crate) answer: Answer,
}

/// What makes a connection unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QueueError {
    /// The controller sent what it may not.
    Protocol(PduError),
    /// The controller says that we did.
    Terminated(TermRequest),
    /// Data did not arrive as it was sent: the digests received and computed.
    Corrupted { received: u32, computed: u32 },
}

impl fmt::Display for QueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QueueError::Protocol(error) => write!(f, "the target broke the protocol: {error}"),
            QueueError::Corrupted { received, computed } => {
                write!(
                    f,
                    "data was corrupted on the way: its digest is {computed:#010x}, not {received:#010x}"
                )
            }
            QueueError::Terminated(term) => {
                write!(f, "the target ended the connection: {} at {:#x}", term.status, term.information)
            }
        }
    }
}

struct Slot<T> {
    generation: u16,
    sequence: u64,
    sqe: Sqe,
    transfer: Transfer,
    /// The command was given to a send.
    begun: bool,
    /// Bytes of data that have arrived, or have been given to a send.
    moved: u32,
    /// The data goes with the capsule.
    in_capsule: bool,
    /// What an R2T asked for and is still to be given to a send.
    wanted: u32,
    tag: u16,
    /// Something being sent names this slot's buffers.
    sending: bool,
    answer: Option<Answer>,
    /// `Some` while the slot is taken.
    user: Option<T>,
}

/// Where the next received bytes belong.
#[derive(Clone, Copy, Debug)]
enum Receive {
    /// To a header, of which `have` bytes are there.
    Header { have: usize },
    /// Nowhere: padding before data.
    Padding { left: u32, data: Data },
    /// To a slot's buffers.
    Data(Data),
    /// To the digest of data, of which `have` bytes are there.
    Digest { have: usize, data: Data },
    /// Nowhere: the copy of an erroneous header in a terminate request.
    Over,
}

#[derive(Clone, Copy, Debug)]
struct Data {
    slot: u16,
    left: u32,
    last: bool,
    success: bool,
    /// CRC32C of what has arrived, where there are data digests.
    crc: u32,
}

/// A queue pair. `T` comes back with each command's end.
pub(crate) struct QueuePair<T> {
    limits: Limits,
    slots: Box<[Slot<T>]>,
    free: Vec<u16>,
    sequence: u64,
    commands: VecDeque<u16>,
    data: VecDeque<u16>,
    /// Slots that the send under way names.
    sending: Vec<u16>,
    headers: AlignedBuffer,
    /// `Some` where data has digests.
    copies: Option<AlignedBuffer>,
    receive: Receive,
    header: [u8; HEADER_LEN_MAX],
    large_reads: u32,
    /// Since it was taken out last.
    moved: Moved,
    ended: Vec<Ended<T>>,
}

impl<T: Copy> QueuePair<T> {
    /// With room for `depth` commands, at most [`SLOTS_MAX`].
    pub(crate) fn new(depth: u16, mut limits: Limits) -> QueuePair<T> {
        if limits.digests.data {
            limits.in_capsule_max = limits.in_capsule_max.min(low32(COPIED_CAPSULE_MAX as u64));
        }
        let depth = depth.clamp(1, SLOTS_MAX);
        let slot = || Slot {
            generation: 0,
            sequence: 0,
            sqe: Sqe::new(0, 0, Sgl::NONE),
            transfer: Transfer::None,
            begun: false,
            moved: 0,
            in_capsule: false,
            wanted: 0,
            tag: 0,
            sending: false,
            answer: None,
            user: None,
        };
        QueuePair {
            limits,
            slots: (0..depth).map(|_| slot()).collect(),
            free: (0..depth).rev().collect(),
            sequence: 0,
            commands: VecDeque::with_capacity(usize::from(depth)),
            data: VecDeque::with_capacity(usize::from(depth)),
            sending: Vec::with_capacity(2 * usize::from(depth)),
            headers: AlignedBuffer::new(HEADERS_LEN),
            copies: limits.digests.data.then(|| AlignedBuffer::new(COPIES_LEN)),
            receive: Receive::Header { have: 0 },
            header: [0; HEADER_LEN_MAX],
            large_reads: 0,
            moved: Moved::default(),
            ended: Vec::with_capacity(usize::from(depth)),
        }
    }

    /// How many more commands can be taken.
    pub(crate) fn room(&self) -> usize {
        match &self.limits.flow {
            None => self.free.len(),
            Some(flow) => self.free.len().min(flow.room()),
        }
    }

    /// How many commands are under way.
    pub(crate) fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a command. Its SGL and CID are filled in here. What `transfer` names must stay valid until the command
    /// has ended or was drained.
    ///
    /// # Panics
    /// Without room.
    pub(crate) fn submit(&mut self, mut sqe: Sqe, transfer: Transfer, user: T) {
        let index = self.free.pop().expect("the caller looked for room");
        if let Some(flow) = &mut self.limits.flow {
            flow.submitted();
        }
        let slot = &mut self.slots[usize::from(index)];
        slot.generation = slot.generation.wrapping_add(1) & (u16::MAX >> SLOT_BITS);
        sqe.cid = slot.generation << SLOT_BITS | index;
        slot.in_capsule = false;
        sqe.sgl = match &transfer {
            Transfer::None => Sgl::NONE,
            Transfer::ToHost(buffers) => {
                let len = length(buffers);
                self.large_reads += u32::from(len >= IN_PLACE_MIN);
                Sgl::transport(len)
            }
            Transfer::FromHost(buffers) => {
                let len = length(buffers);
                slot.in_capsule = len <= self.limits.in_capsule_max
                    && buffers.segments().nth(IN_CAPSULE_SEGMENTS_MAX).is_none();
                if slot.in_capsule { Sgl::in_capsule(len) } else { Sgl::transport(len) }
            }
            Transfer::Inline(_, len) => {
                let len = u32::from(*len);
                slot.in_capsule = len <= self.limits.in_capsule_max;
                if slot.in_capsule { Sgl::in_capsule(len) } else { Sgl::transport(len) }
            }
        };
        slot.sqe = sqe;
        slot.transfer = transfer;
        slot.begun = false;
        slot.moved = 0;
        slot.wanted = 0;
        slot.sending = false;
        slot.answer = None;
        slot.sequence = self.sequence;
        slot.user = Some(user);
        self.sequence += 1;
        self.commands.push_back(index);
    }

    /// Whether there is something to send.
    pub(crate) fn wants_to_send(&self) -> bool {
        !self.commands.is_empty() || !self.data.is_empty()
    }

    /// Puts together the next send: fills `iovecs` (at most [`super::batch::SEND_IOVECS_MAX`]) and returns its length in bytes; 0 when
    /// there is nothing to send. What the iovecs name stays in place until [`QueuePair::transmitted`].
    ///
    /// # Panics
    /// While another send is under way.
    pub(crate) fn poll_transmit(&mut self, iovecs: &mut Vec<libc::iovec>) -> usize {
        assert!(self.sending.is_empty(), "one send at a time");
        iovecs.clear();
        let copies = self.copies.as_ref();
        let digests = self.limits.digests;
        let mut batch =
            Batch { headers: &self.headers, used: 0, copies, copied: 0, digests, iovecs, bytes: 0 };
        // Older commands' data first; it frees them and the controller's buffers.
        while let Some(index) = self.data.front().copied() {
            let slot = &mut self.slots[usize::from(index)];
            // Answered before all its data was sent, perhaps even followed by another command.
            let Some(outgoing) = slot.transfer.outgoing() else {
                self.data.pop_front();
                continue;
            };
            if slot.user.is_none() || slot.answer.is_some() || slot.wanted == 0 {
                self.data.pop_front();
                continue;
            }
            if !batch.has_room(2) {
                break;
            }
            let len = slot.wanted.min(self.limits.host_data_max);
            let len = match outgoing {
                Outgoing::Buffers(buffers) => batch.fitting(&buffers, slot.moved, len),
                Outgoing::Inline(..) => len,
            };
            if len == 0 {
                break;
            }
            let cid = slot.sqe.cid;
            let last = len == slot.wanted;
            let header = DataPdu { cid, tag: slot.tag, offset: slot.moved, len, last, success: false };
            let header = header.to_bytes(Receiver::Controller, digests, self.limits.alignment);
            batch.push_padded(&header, header[3]);
            let (from, to) = (slot.moved as usize, (slot.moved + len) as usize);
            match outgoing {
                Outgoing::Buffers(buffers) => batch.push_buffers(&buffers.slice(from, len as usize)),
                Outgoing::Inline(bytes, _) => batch.push_data(&bytes[from..to]),
            }
            slot.moved += len;
            slot.wanted -= len;
            if !slot.sending {
                slot.sending = true;
                self.sending.push(index);
            }
            if slot.wanted == 0 {
                self.data.pop_front();
            }
        }
        while let Some(index) = self.commands.front().copied() {
            let slot = &mut self.slots[usize::from(index)];
            let segments = match &slot.transfer {
                Transfer::FromHost(buffers) if slot.in_capsule => buffers.segments().count(),
                _ => 0,
            };
            let data_len = if slot.in_capsule { slot.sqe.sgl.len } else { 0 };
            if !batch.has_room(segments + 2) || !batch.has_copy_room(data_len) {
                break;
            }
            self.commands.pop_front();
            let header = pdu::command_to_bytes(&slot.sqe, data_len, digests, self.limits.alignment);
            batch.push_padded(&header, header[3]);
            match &slot.transfer {
                Transfer::FromHost(buffers) if slot.in_capsule => {
                    batch.push_buffers(buffers);
                    slot.moved = data_len;
                }
                Transfer::Inline(bytes, len) if slot.in_capsule => {
                    batch.push_data(&bytes[..usize::from(*len)]);
                    slot.moved = data_len;
                }
                _ => {}
            }
            slot.begun = true;
            slot.sending = true;
            self.sending.push(index);
        }
        self.moved.digest_write += batch.copied as u64;
        batch.bytes
    }

    /// The send that `poll_transmit` put together is over: nothing names its memory any more.
    pub(crate) fn transmitted(&mut self) {
        while let Some(index) = self.sending.pop() {
            let slot = &mut self.slots[usize::from(index)];
            slot.sending = false;
            if slot.answer.is_some() {
                self.end(index);
            }
        }
    }

    /// What was moved since this was asked last.
    pub(crate) fn take_moved(&mut self) -> Moved {
        std::mem::take(&mut self.moved)
    }

    /// Moves out the commands that have ended.
    pub(crate) fn ended(&mut self) -> std::vec::Drain<'_, Ended<T>> {
        self.ended.drain(..)
    }

    /// Takes out all commands that are under way, in the order in which they came, each with whether any of it may have
    /// reached the controller. The pair is of no use afterwards. Only when no operation is under way on the connection.
    pub(crate) fn drain(&mut self) -> Vec<(T, bool)> {
        self.sending.clear();
        self.commands.clear();
        self.data.clear();
        let mut taken: Vec<(u64, T, bool)> = Vec::with_capacity(self.outstanding());
        for slot in &mut self.slots {
            if let Some(user) = slot.user.take() {
                taken.push((slot.sequence, user, slot.begun));
            }
        }
        taken.sort_by_key(|(sequence, ..)| *sequence);
        taken.into_iter().map(|(_, user, begun)| (user, begun)).collect()
    }

    /// What is under way, to look at or to mark.
    pub(crate) fn users_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut().filter_map(|slot| slot.user.as_mut())
    }

    fn end(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        let (Some(user), Some(answer)) = (slot.user.take(), slot.answer.take()) else {
            unreachable!("a command ends once")
        };
        if let Transfer::ToHost(buffers) = &slot.transfer {
            self.large_reads -= u32::from(length(buffers) >= IN_PLACE_MIN);
        }
        self.ended.push(Ended { user, answer });
        self.free.push(index);
        if let Some(flow) = &mut self.limits.flow
            && self.free.len() == self.slots.len()
        {
            flow.all_answered();
        }
    }
}

fn length(buffers: &Buffers) -> u32 {
    low32(buffers.len() as u64)
}

/// The slot bits of an identifier, for tests that play the controller.
#[cfg(test)]
pub(crate) fn slot_of(cid: u16) -> u16 {
    cid & (SLOTS_MAX - 1)
}
