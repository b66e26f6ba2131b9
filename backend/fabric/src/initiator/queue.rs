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

use super::batch::{Batch, COPIES_LEN, HEADERS_LEN, SEND_BYTES_MAX};
use crate::nvme::bytes::{get_array, low32};
use crate::nvme::{Cqe, NvmeStatus, Sgl, Sqe};
use crate::tcp::pdu::{self, FLAG_HEADER_DIGEST, PduKind};
use crate::tcp::{
    CommonHeader, DataPdu, Digests, FatalStatus, PduError, ReadyToTransfer, Receiver, TermRequest,
};
use hawser_block::Buffers;
use hawser_runtime::buffers::AlignedBuffer;
use std::collections::VecDeque;
use std::fmt;

/// The data of reads from this length on is received in place, by receives of its own; that of shorter ones is copied from
/// the staging buffer. Measured over loopback, QD 8, in CPU µs per read of host and target together, in place and copied:
/// 16 KiB 7.4 and 3.7, 64 KiB 14.8 and 12.9, 128 KiB 28.5 and 27.0, 256 KiB 46 and 53, 512 KiB 103 and 270. Small receives
/// cost more than copying what is still in the second-level cache.
pub(crate) const IN_PLACE_MIN: u32 = 256 << 10;
/// A rest below this is not worth a receive of its own.
const IN_PLACE_REST_MIN: u32 = 32 << 10;
/// How much is staged at once while such reads are outstanding: a few headers, so that little of their data is copied.
const STAGING_SHORT: usize = 8 << 10;
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
    /// We send these 16 bytes, which need no memory of the caller's: in the capsule or when asked.
    Inline([u8; 16]),
}

/// Data that we send.
#[derive(Clone, Copy)]
enum Outgoing {
    Buffers(Buffers),
    Inline([u8; 16]),
}

impl Outgoing {
    fn len(&self) -> u32 {
        match self {
            Outgoing::Buffers(buffers) => length(buffers),
            Outgoing::Inline(bytes) => low32(bytes.len() as u64),
        }
    }
}

impl Transfer {
    fn outgoing(&self) -> Option<Outgoing> {
        match self {
            Transfer::FromHost(buffers) => Some(Outgoing::Buffers(*buffers)),
            Transfer::Inline(bytes) => Some(Outgoing::Inline(*bytes)),
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
    ended: Vec<Ended<T>>,
}

impl<T: Copy> QueuePair<T> {
    /// With room for `depth` commands, at most [`SLOTS_MAX`].
    pub(crate) fn new(depth: u16, mut limits: Limits) -> QueuePair<T> {
        if limits.digests.data {
            limits.in_capsule_max = limits.in_capsule_max.min(low32((COPIES_LEN - SEND_BYTES_MAX) as u64));
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
            ended: Vec::with_capacity(usize::from(depth)),
        }
    }

    /// How many more commands can be taken.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
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
            Transfer::Inline(bytes) => {
                let len = low32(bytes.len() as u64);
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
                Outgoing::Inline(_) => len,
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
                Outgoing::Inline(bytes) => batch.push_data(&bytes[from..to]),
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
                Transfer::Inline(bytes) if slot.in_capsule => {
                    batch.push_data(bytes);
                    slot.moved = data_len;
                }
                _ => {}
            }
            slot.begun = true;
            slot.sending = true;
            self.sending.push(index);
        }
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

    /// Where the kernel may put the next bytes itself: when they are the rest of large data. Whatever comes after those is
    /// for the staging buffer. To be followed by [`QueuePair::handle_in_place`].
    pub(crate) fn receive_into(&self) -> Option<Buffers> {
        let Receive::Data(Data { slot, left, .. }) = self.receive else { return None };
        let slot = &self.slots[usize::from(slot)];
        let Transfer::ToHost(buffers) = slot.transfer else { return None };
        // A digest is computed before the guest can change what it covers.
        if left < IN_PLACE_REST_MIN || length(&buffers) < IN_PLACE_MIN || self.limits.digests.data {
            return None;
        }
        Some(buffers.slice(slot.moved as usize, left as usize))
    }

    /// How much of the staging buffer the next receive should use.
    pub(crate) fn staging_len(&self, staging: usize) -> usize {
        if self.large_reads > 0 { staging.min(STAGING_SHORT) } else { staging }
    }

    /// `len` bytes were received to where `receive_into` said.
    pub(crate) fn handle_in_place(&mut self, len: u32) -> Result<(), QueueError> {
        let Receive::Data(data) = self.receive else { unreachable!("only data is received in place") };
        self.data_arrived(data, len)
    }

    /// Takes received bytes, as many as there are.
    ///
    /// # Errors
    /// When the connection cannot go on.
    pub(crate) fn handle_bytes(&mut self, mut bytes: &[u8]) -> Result<(), QueueError> {
        while !bytes.is_empty() {
            match self.receive {
                Receive::Header { have: 0 } if bytes.len() >= self.header_len() => {
                    let mut header = [0; HEADER_LEN_MAX];
                    let len = self.header_len();
                    header[..len].copy_from_slice(&bytes[..len]);
                    let len = self.handle_header(&header)?;
                    bytes = &bytes[len..];
                }
                Receive::Header { have } => {
                    // Garbage is told from a header without waiting for more of it.
                    let want = if have < CommonHeader::LEN {
                        CommonHeader::LEN
                    } else {
                        // An ICResp has a longer one; it is refused for what it is.
                        self.common_header(&get_array(&self.header, 0))?.header_len().min(HEADER_LEN_MAX)
                    };
                    let take = bytes.len().min(want - have);
                    self.header[have..have + take].copy_from_slice(&bytes[..take]);
                    bytes = &bytes[take..];
                    let have = have + take;
                    self.receive = Receive::Header { have };
                    if have == CommonHeader::LEN {
                        self.common_header(&get_array(&self.header, 0))?;
                    } else if have == want && want > CommonHeader::LEN {
                        self.handle_header(&{ self.header })?;
                    }
                }
                Receive::Padding { left, data } => {
                    let take = low32(bytes.len() as u64).min(left);
                    bytes = &bytes[take as usize..];
                    let left = left - take;
                    self.receive =
                        if left == 0 { Receive::Data(data) } else { Receive::Padding { left, data } };
                }
                Receive::Digest { have, data } => {
                    let take = bytes.len().min(Digests::LEN as usize - have);
                    self.header[have..have + take].copy_from_slice(&bytes[..take]);
                    bytes = &bytes[take..];
                    let have = have + take;
                    self.receive = Receive::Digest { have, data };
                    if have == Digests::LEN as usize {
                        let received = u32::from_le_bytes(get_array(&self.header, 0));
                        if received != data.crc {
                            return Err(QueueError::Corrupted { received, computed: data.crc });
                        }
                        self.data_over(data)?;
                    }
                }
                Receive::Data(mut data) => {
                    let take = low32(bytes.len() as u64).min(data.left);
                    if self.limits.digests.data {
                        data.crc = crc32c::crc32c_append(data.crc, &bytes[..take as usize]);
                    }
                    let slot = &self.slots[usize::from(data.slot)];
                    let Transfer::ToHost(buffers) = &slot.transfer else {
                        unreachable!("data is taken for reads only")
                    };
                    let place = buffers.slice(slot.moved as usize, take as usize);
                    // SAFETY: the slot is taken, so its request has not ended and its buffers are valid; it is a read;
                    // `bytes` has `take` bytes, and our staging memory is apart from the request's.
                    unsafe { place.copy_from(bytes.as_ptr()) };
                    bytes = &bytes[take as usize..];
                    self.data_arrived(data, take)?;
                }
                Receive::Over => return Ok(()),
            }
        }
        Ok(())
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

    /// How long headers are, but those that never have a digest.
    fn header_len(&self) -> usize {
        if self.limits.digests.header { HEADER_LEN_MAX } else { HEADER_LEN }
    }

    /// The first bytes of a PDU.
    fn common_header(&self, bytes: &[u8; 8]) -> Result<CommonHeader, QueueError> {
        CommonHeader::decode(bytes, Receiver::Host, self.limits.digests).map_err(QueueError::Protocol)
    }

    /// Takes a whole header, with its digest if it has one. Returns how long it was.
    fn handle_header(&mut self, whole: &[u8; HEADER_LEN_MAX]) -> Result<usize, QueueError> {
        let header = self.common_header(&get_array(whole, 0))?;
        let bytes: &[u8; HEADER_LEN] = &get_array(whole, 0);
        let header_len = header.header_len().min(HEADER_LEN_MAX);
        if header.flags & FLAG_HEADER_DIGEST != 0 && pdu::digest(bytes) != get_array::<4>(whole, HEADER_LEN) {
            let received = u32::from_le_bytes(get_array(whole, HEADER_LEN));
            let status = FatalStatus::HEADER_DIGEST_ERROR;
            return Err(with_status(wrong(header.kind, received, "HDGST", received, "the header's"), status));
        }
        self.receive = Receive::Header { have: 0 };
        match header.kind {
            PduKind::ControllerData => {
                let data = DataPdu::decode(&header, bytes).map_err(QueueError::Protocol)?;
                let index = self.find(header.kind, 8, data.cid)?;
                let slot = &self.slots[usize::from(index)];
                let Transfer::ToHost(buffers) = &slot.transfer else {
                    return Err(wrong(header.kind, 8, "CCCID", data.cid, "a command that reads"));
                };
                // In order (TCP 3.3.2: a controller sends the data of one command in order), and not more than asked.
                if data.offset != slot.moved {
                    let error = wrong(header.kind, 12, "DATAO", data.offset, "where the last data ended");
                    return Err(with_status(error, FatalStatus::DATA_OUT_OF_RANGE));
                }
                if data.len > length(buffers) - slot.moved {
                    let error = wrong(header.kind, 16, "DATAL", data.len, "within the command's data");
                    return Err(with_status(error, FatalStatus::DATA_OUT_OF_RANGE));
                }
                let padding = u32::from(header.data_offset).saturating_sub(low32(header_len as u64));
                let DataPdu { len, last, success, .. } = data;
                let state = Data { slot: index, left: len, last, success, crc: 0 };
                self.receive = match (len, padding) {
                    // A C2HData without data has no digest: only its flags count.
                    (0, _) => {
                        self.data_over(state)?;
                        return Ok(header_len);
                    }
                    (_, 0) => Receive::Data(state),
                    (_, left) => Receive::Padding { left, data: state },
                };
            }
            PduKind::Response => {
                let cqe = Cqe::from_bytes(&get_array(bytes, 8));
                let index = self.find(header.kind, 20, cqe.cid)?;
                self.answer(index, Answer { status: cqe.status, result: cqe.result })?;
            }
            PduKind::ReadyToTransfer => {
                let ready = ReadyToTransfer::decode(bytes).map_err(QueueError::Protocol)?;
                let index = self.find(header.kind, 8, ready.cid)?;
                self.ready_to_transfer(index, &ready)?;
            }
            PduKind::ControllerTerm => {
                self.receive = Receive::Over;
                return Err(QueueError::Terminated(TermRequest::decode(bytes)));
            }
            _ => {
                let error = wrong(header.kind, 0, "PDU-Type", header.kind as u8, "a type that may come now");
                return Err(with_status(error, FatalStatus::SEQUENCE_ERROR));
            }
        }
        Ok(header_len)
    }

    /// The slot of a command that is not answered yet.
    fn find(&self, kind: PduKind, offset: u32, cid: u16) -> Result<u16, QueueError> {
        let index = cid & (SLOTS_MAX - 1);
        let field = if kind == PduKind::Response { "CID" } else { "CCCID" };
        match self.slots.get(usize::from(index)) {
            Some(slot)
                if slot.sqe.cid == cid && slot.begun && slot.user.is_some() && slot.answer.is_none() =>
            {
                Ok(index)
            }
            _ => Err(wrong(kind, offset, field, cid, "a command that is outstanding")),
        }
    }

    fn ready_to_transfer(&mut self, index: u16, ready: &ReadyToTransfer) -> Result<(), QueueError> {
        let kind = PduKind::ReadyToTransfer;
        let slot = &mut self.slots[usize::from(index)];
        let Some(outgoing) = slot.transfer.outgoing() else {
            return Err(wrong(kind, 8, "CCCID", ready.cid, "a command that writes"));
        };
        if slot.in_capsule {
            return Err(wrong(kind, 8, "CCCID", ready.cid, "a command whose data was not in the capsule"));
        }
        if slot.wanted > 0 {
            let error = wrong(kind, 10, "TTAG", ready.tag, "the only R2T of its command");
            return Err(with_status(error, FatalStatus::LIMIT_EXCEEDED));
        }
        if ready.offset != slot.moved {
            let error = wrong(kind, 12, "R2TO", ready.offset, "where the last data ended");
            return Err(with_status(error, FatalStatus::DATA_OUT_OF_RANGE));
        }
        if ready.len > outgoing.len() - slot.moved {
            let error = wrong(kind, 16, "R2TL", ready.len, "within the command's data");
            return Err(with_status(error, FatalStatus::DATA_OUT_OF_RANGE));
        }
        slot.tag = ready.tag;
        slot.wanted = ready.len;
        self.data.push_back(index);
        Ok(())
    }

    fn data_arrived(&mut self, mut data: Data, len: u32) -> Result<(), QueueError> {
        self.slots[usize::from(data.slot)].moved += len;
        data.left -= len;
        if data.left > 0 {
            self.receive = Receive::Data(data);
            return Ok(());
        }
        if self.limits.digests.data {
            self.receive = Receive::Digest { have: 0, data };
            return Ok(());
        }
        self.data_over(data)
    }

    /// All data of a PDU is there, and is what was sent.
    fn data_over(&mut self, data: Data) -> Result<(), QueueError> {
        self.receive = Receive::Header { have: 0 };
        if data.success {
            self.answer(data.slot, Answer { status: NvmeStatus::SUCCESS, result: 0 })?;
        } else if data.last {
            self.whole(data.slot, PduKind::ControllerData, 1, "FLAGS.LAST_PDU")?;
        }
        Ok(())
    }

    /// All data of the command has moved.
    fn whole(&self, index: u16, kind: PduKind, offset: u32, field: &'static str) -> Result<(), QueueError> {
        let slot = &self.slots[usize::from(index)];
        let all = match &slot.transfer {
            Transfer::ToHost(buffers) | Transfer::FromHost(buffers) => length(buffers),
            Transfer::Inline(bytes) => low32(bytes.len() as u64),
            Transfer::None => return Ok(()),
        };
        if slot.moved == all && slot.wanted == 0 {
            return Ok(());
        }
        Err(wrong(kind, offset, field, slot.moved, "after all data of the command"))
    }

    fn answer(&mut self, index: u16, answer: Answer) -> Result<(), QueueError> {
        if answer.status.is_success() {
            self.whole(index, PduKind::Response, 22, "success, bytes moved")?;
        }
        let slot = &mut self.slots[usize::from(index)];
        slot.answer = Some(answer);
        if slot.sending {
            return Ok(());
        }
        self.end(index);
        Ok(())
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
    }
}

fn length(buffers: &Buffers) -> u32 {
    low32(buffers.len() as u64)
}

fn wrong(
    kind: PduKind,
    offset: u32,
    field: &'static str,
    value: impl Into<u64>,
    expected: &'static str,
) -> QueueError {
    let status = FatalStatus::INVALID_HEADER_FIELD;
    QueueError::Protocol(PduError { status, offset, pdu: kind.name(), field, value: value.into(), expected })
}

fn with_status(error: QueueError, status: FatalStatus) -> QueueError {
    match error {
        QueueError::Protocol(error) => QueueError::Protocol(PduError { status, ..error }),
        other => other,
    }
}

/// The slot bits of an identifier, for tests that play the controller.
#[cfg(test)]
pub(crate) fn slot_of(cid: u16) -> u16 {
    cid & (SLOTS_MAX - 1)
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
