//! One NVMe/RDMA queue pair, sans I/O: requests in, work requests out; completions in, ends out.
//!
//! Owns: slots, command identifiers, keys and their names, what is posted in which order. Must not know: the driver, reconnecting, what
//! a request is for.
//!
//! ```text
//!  submit ─► waiting ─► slots ─► posts (bind, send, invalidate; receives) ─► the device
//!                         ▲                                                    │
//!                         └───────────────── handle ◄──────────────────────────┘  ──► ended
//! ```
//!
//! A request is carried out by one command or several ([`super::plan`]), each with a slot of its own. Invariants:
//! - A slot is free again, and its command's end told, only when the command is answered, its send has completed, and the key of its
//!   memory is dead: invalidated by the target with its answer, or by us after it.
//! - A window's name changes with each use, so that a key that comes late is refused by the device.
//! - The identifier of a command is its slot and the slot's generation: an answer that comes twice, or late, is found out.
//! - After an error nothing more is posted. When the device has let everything go ([`RdmaQueue::is_flushed`], or its queue pair is not
//!   there any more), answers that came are answers, and the rest is taken out with `drain`.

mod completions;
#[cfg(test)]
mod tests;

use super::layout::{Chunk, Chunks, LARGE, Layout};
use super::plan::{self, Piece, Place};
use crate::initiator::meter::Moved;
use crate::initiator::queue::{Answer, SLOTS_MAX, SqFlow, Transfer};
use crate::nvme::bytes::{low16, low32};
use crate::nvme::{Cqe, NvmeStatus, Sgl, Sqe, StatusCode, io_opcode};
use crate::rdma::KeyPolicy;
use crate::rdma::domain::Entries;
use crate::simulated::is_broken;
use hawser_block::Buffers;
use hawser_verbs_abi::{
    Keys, ReceiveRequest, Region, Segment, SendRequest, Window, WorkCompletion, access, operation,
};
use std::collections::VecDeque;

/// Bits of a command identifier that name the slot; the rest is the generation.
const SLOT_BITS: u32 = 9;
const _: () = assert!(SLOTS_MAX == 1 << SLOT_BITS);

/// Work requests that one command may have posted at a time: bind and send, or invalidate.
pub(super) const SENDS_PER_SLOT: u32 = 3;
/// Segments of a capsule: the command, and data from where it is.
pub(super) const CAPSULE_SEGMENTS_MAX: usize = 9;

/// What a work request was, in the upper half of what comes back with its completion.
mod kind {
    pub(super) const SEND: u64 = 1;
    pub(super) const BIND: u64 = 2;
    pub(super) const INVALIDATE: u64 = 3;
    pub(super) const RECEIVE: u64 = 4;
}

/// What the pair was set up with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RdmaLimits {
    /// The most bytes of data that may be in a capsule.
    pub(crate) in_capsule_max: u32,
    /// Segments of a send that the device takes, the command's own among them.
    pub(crate) segments_max: usize,
    pub(crate) policy: KeyPolicy,
    /// Runs of memory that a request may be in to go in a command for each.
    pub(crate) runs_max: usize,
    /// `None`: the target has switched SQ flow control off.
    pub(crate) flow: Option<SqFlow>,
}

/// The connection's own memory, and its keys.
#[derive(Clone, Copy)]
pub(super) struct Area {
    pub(super) start: *mut u8,
    pub(super) region: *mut Region,
    pub(super) keys: Keys,
}

/// What makes a connection unusable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RdmaError {
    /// The controller did what it may not.
    Protocol(String),
    /// A work request failed: `ibv_wc_status`, and what the device's maker says.
    Work { status: u32, vendor: u32 },
}

/// The key of a slot's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeyState {
    /// None, or it does not lead anywhere any more.
    Dead,
    /// The target may use it.
    Alive,
    /// We have asked for its end.
    Dying,
}

struct Slot {
    generation: u16,
    cid: u16,
    parent: u16,
    window: *mut Window,
    /// The window's name: the last one that it was bound by.
    name: u32,
    key: KeyState,
    /// A bind was posted, whose completion is told only if it fails.
    binding: bool,
    sending: bool,
    taken: bool,
    answer: Option<Answer>,
    chunk: Option<Chunk>,
    /// Of a read by way of a chunk: where its bytes go.
    copy_back: Buffers,
}

struct Parent {
    user: u32,
    taken: bool,
    sequence: u64,
    sqe: Sqe,
    transfer: Transfer,
    /// Bytes of data in all, and those that commands were made for.
    total: u32,
    planned: u32,
    /// Bytes of a block, where the request may be cut; else 0.
    block: u32,
    /// Commands were made for all of it.
    issued: bool,
    /// Commands under way.
    left: u16,
    begun: bool,
    answer: Answer,
}

/// A queue pair. Users are numbers that come back with the ends of their requests.
pub(crate) struct RdmaQueue {
    limits: RdmaLimits,
    layout: Layout,
    area: Area,
    entries: Entries,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    parents: Box<[Parent]>,
    free_parents: Vec<u16>,
    /// Requests of which not all commands have a slot, in order.
    waiting: VecDeque<u16>,
    chunks: Chunks,
    sequence: u64,
    sends: Vec<SendRequest>,
    /// What `sends` name; never longer than it was made for, so that it stays in place.
    segments: Vec<Segment>,
    receives: Vec<ReceiveRequest>,
    /// Posted, and not completed.
    sends_posted: usize,
    receives_posted: usize,
    /// Nothing is posted any more.
    over: bool,
    moved: Moved,
    /// SQHD of the last answer.
    sq_head: u16,
    ended: Vec<(u32, Answer)>,
}

const SUCCESS: Answer = Answer { status: NvmeStatus::SUCCESS, result: 0 };

impl RdmaQueue {
    /// With `windows`, or none where the policy does without, for as many commands as `layout` has room.
    pub(super) fn new(
        layout: Layout,
        limits: RdmaLimits,
        area: Area,
        windows: &[(*mut Window, u32)],
    ) -> RdmaQueue {
        let depth = usize::from(layout.depth);
        let slot = |index: usize| {
            let (window, name) = windows.get(index).copied().unwrap_or((std::ptr::null_mut(), 0));
            Slot {
                generation: 0,
                cid: 0,
                parent: 0,
                window,
                name,
                key: KeyState::Dead,
                binding: false,
                sending: false,
                taken: false,
                answer: None,
                chunk: None,
                copy_back: Buffers::EMPTY,
            }
        };
        let parent = || Parent {
            user: 0,
            taken: false,
            sequence: 0,
            sqe: Sqe::new(0, 0, Sgl::NONE),
            transfer: Transfer::None,
            total: 0,
            planned: 0,
            block: 0,
            issued: false,
            left: 0,
            begun: false,
            answer: SUCCESS,
        };
        let mut queue = RdmaQueue {
            limits,
            layout,
            area,
            entries: Entries::default(),
            slots: (0..depth).map(slot).collect(),
            free: (0..layout.depth).rev().collect(),
            parents: (0..depth).map(|_| parent()).collect(),
            free_parents: (0..layout.depth).rev().collect(),
            waiting: VecDeque::with_capacity(depth),
            chunks: Chunks::new(&layout),
            sequence: 0,
            sends: Vec::with_capacity(SENDS_PER_SLOT as usize * depth),
            segments: Vec::with_capacity(CAPSULE_SEGMENTS_MAX * depth),
            receives: Vec::with_capacity(usize::from(layout.receives)),
            sends_posted: 0,
            receives_posted: 0,
            over: false,
            moved: Moved::default(),
            sq_head: 0,
            ended: Vec::with_capacity(depth),
        };
        for index in 0..layout.receives {
            queue.receive(index);
        }
        queue
    }

    /// What the answer to Connect has settled.
    pub(super) fn set_limits(&mut self, in_capsule_max: u32, flow: Option<SqFlow>) {
        self.limits.in_capsule_max = in_capsule_max;
        self.limits.flow = flow;
    }

    /// Which memory may be named from now on.
    pub(super) fn set_entries(&mut self, entries: Entries) {
        self.entries = entries;
    }

    /// How many more requests can be taken.
    pub(crate) fn room(&self) -> usize {
        if self.over || !self.waiting.is_empty() {
            return 0;
        }
        let room = self.free.len().min(self.free_parents.len());
        self.limits.flow.as_ref().map_or(room, |flow| room.min(flow.room()))
    }

    /// Takes a request: a command whose SGL and CID are filled in here. What `transfer` names must stay valid until it has ended or
    /// was drained.
    ///
    /// # Panics
    /// Without room.
    pub(crate) fn submit(&mut self, sqe: Sqe, transfer: Transfer, user: u32) {
        let index = self.free_parents.pop().expect("the caller looked for room");
        let total = match &transfer {
            Transfer::None => 0,
            Transfer::ToHost(buffers) | Transfer::FromHost(buffers) => low32(buffers.len() as u64),
            Transfer::Inline(_, len) => u32::from(*len),
        };
        let blocks = u32::from(low16(sqe.cdw[2])) + 1;
        let is_divisible = [io_opcode::READ, io_opcode::WRITE].contains(&sqe.opcode)
            && matches!(&transfer, Transfer::ToHost(_) | Transfer::FromHost(_))
            && total.is_multiple_of(blocks);
        let block = if is_divisible { total / blocks } else { 0 };
        self.parents[usize::from(index)] = Parent {
            user,
            taken: true,
            sequence: self.sequence,
            sqe,
            transfer,
            total,
            planned: 0,
            block,
            issued: false,
            left: 0,
            begun: false,
            answer: SUCCESS,
        };
        self.sequence += 1;
        if block == 0 && total > LARGE {
            // Only a report of thousands of registrants is that long.
            let parent = &mut self.parents[usize::from(index)];
            parent.taken = false;
            let status = NvmeStatus::fatal(StatusCode::INVALID_FIELD);
            self.ended.push((user, Answer { status, result: 0 }));
            self.free_parents.push(index);
            return;
        }
        self.waiting.push_back(index);
        self.pump();
    }

    /// Makes commands of what waits, while there are slots and memory for them.
    fn pump(&mut self) {
        while let Some(index) = self.waiting.front().copied() {
            while !self.parents[usize::from(index)].issued {
                if !self.issue(index) {
                    return;
                }
            }
            self.waiting.pop_front();
        }
    }

    /// Makes the next command of a request; false when that has to wait.
    fn issue(&mut self, parent_index: u16) -> bool {
        if self.over || self.limits.flow.as_ref().is_some_and(|flow| flow.room() == 0) {
            return false;
        }
        let Some(slot_index) = self.free.last().copied() else { return false };
        let parent = &self.parents[usize::from(parent_index)];
        let (transfer, offset) = (parent.transfer, parent.planned);
        let rest = parent.total - offset;
        let in_capsule = offset == 0 && rest > 0 && rest <= self.limits.in_capsule_max;
        let segments_max = (self.limits.segments_max - 1).min(CAPSULE_SEGMENTS_MAX - 1);
        let piece = match &transfer {
            Transfer::None => None,
            Transfer::Inline(..) if in_capsule => Some(Piece { len: rest, place: Place::Capsule }),
            Transfer::Inline(..) => Some(Piece { len: rest, place: Place::Copy { scattered: false } }),
            Transfer::FromHost(_) | Transfer::ToHost(_) if rest == 0 => None,
            Transfer::FromHost(buffers) if in_capsule => {
                Some(Piece { len: rest, place: plan::in_capsule(buffers, &self.entries, segments_max) })
            }
            Transfer::FromHost(buffers) | Transfer::ToHost(buffers) => {
                let rest = buffers.slice(offset as usize, rest as usize);
                Some(plan::plan(&rest, &self.entries, parent.block, self.limits.runs_max))
            }
        };
        let chunk = match piece {
            Some(Piece { len, place: Place::Copy { .. } | Place::CapsuleCopy { .. } }) => {
                match self.chunks.take(len) {
                    None => return false,
                    some => some,
                }
            }
            _ => None,
        };
        self.free.pop();
        let slot = &mut self.slots[usize::from(slot_index)];
        slot.generation = slot.generation.wrapping_add(1) & (u16::MAX >> SLOT_BITS);
        slot.cid = slot.generation << SLOT_BITS | slot_index;
        (slot.parent, slot.taken, slot.answer, slot.chunk) = (parent_index, true, None, chunk);
        slot.copy_back = Buffers::EMPTY;
        self.write_command(slot_index, piece.as_ref());

        let parent = &mut self.parents[usize::from(parent_index)];
        parent.begun = true;
        parent.left += 1;
        parent.planned += piece.map_or(0, |piece| piece.len);
        parent.issued = parent.planned == parent.total;
        if let Some(flow) = &mut self.limits.flow {
            flow.submitted();
        }
        true
    }

    /// Puts a command into its slot's capsule, and what is to be posted for it behind the rest.
    fn write_command(&mut self, index: u16, piece: Option<&Piece>) {
        let slot = &mut self.slots[usize::from(index)];
        let parent = &self.parents[usize::from(slot.parent)];
        let mut sqe = parent.sqe;
        sqe.cid = slot.cid;
        let capsule = self.layout.capsule(index);
        let first_segment = self.segments.len();
        let own = |at: usize, len: u32| Segment {
            address: (self.area.start as usize + at) as u64,
            len,
            key: self.area.keys.local,
        };
        self.segments.push(own(capsule, low32(Sqe::LEN as u64)));
        sqe.sgl = Sgl::NO_KEY;
        if let Some(piece) = piece {
            let offset = parent.planned;
            if parent.block > 0 && piece.len < parent.total {
                let first = u64::from(sqe.cdw[0]) | u64::from(sqe.cdw[1]) << 32;
                let first = first + u64::from(offset / parent.block);
                (sqe.cdw[0], sqe.cdw[1]) = (low32(first), low32(first >> 32));
                sqe.cdw[2] = sqe.cdw[2] & 0xffff_0000 | (piece.len / parent.block - 1);
            }
            let part = match &parent.transfer {
                Transfer::FromHost(buffers) | Transfer::ToHost(buffers) => {
                    buffers.slice(offset as usize, piece.len as usize)
                }
                Transfer::None | Transfer::Inline(..) => Buffers::EMPTY,
            };
            let is_read = matches!(&parent.transfer, Transfer::ToHost(_));
            if let Some(chunk) = slot.chunk {
                let at = self.layout.chunk(chunk);
                // SAFETY: the chunk is within our memory, free until now, and has room for the piece (`Chunks::take`); no command
                // names it yet. The request has not ended, so its buffers are valid; they are elsewhere.
                unsafe {
                    let place = self.area.start.add(at);
                    match &parent.transfer {
                        Transfer::FromHost(_) => part.copy_to(place),
                        Transfer::Inline(bytes, len) => {
                            std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, usize::from(*len));
                        }
                        _ => {}
                    }
                }
                if is_read {
                    slot.copy_back = part;
                }
            }
            let keyed = match piece.place {
                Place::Capsule => {
                    if let Transfer::Inline(bytes, len) = &parent.transfer {
                        // SAFETY: a capsule's place has room for a command and 16 bytes; no command names it yet.
                        unsafe {
                            let place = self.area.start.add(capsule + Sqe::LEN);
                            std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, usize::from(*len));
                        }
                        self.segments.push(own(capsule + Sqe::LEN, piece.len));
                    } else {
                        plan::capsule_segments(&part, &self.entries, |segment| self.segments.push(segment));
                    }
                    None
                }
                Place::CapsuleCopy { .. } => {
                    let at = slot.chunk.map_or(0, |chunk| self.layout.chunk(chunk));
                    self.segments.push(own(at, piece.len));
                    None
                }
                Place::Direct { start, entry } => Some((start as u64, entry.region, entry.keys)),
                Place::Copy { .. } => {
                    let at = slot.chunk.map_or(0, |chunk| self.layout.chunk(chunk));
                    Some(((self.area.start as usize + at) as u64, self.area.region, self.area.keys))
                }
            };
            match piece.place {
                Place::Direct { .. } if is_read => self.moved.in_place += u64::from(piece.len),
                Place::Copy { scattered: true } | Place::CapsuleCopy { scattered: true } => {
                    self.moved.scattered += u64::from(piece.len);
                }
                Place::Copy { .. } | Place::CapsuleCopy { .. }
                    if !matches!(&parent.transfer, Transfer::Inline(..)) =>
                {
                    self.moved.unregistered += u64::from(piece.len);
                }
                _ => {}
            }
            sqe.sgl = match keyed {
                None => Sgl::in_capsule(piece.len),
                Some((address, _, keys)) if self.limits.policy == KeyPolicy::Region => {
                    Sgl::keyed(address, piece.len, keys.remote, false)
                }
                Some((address, region, _)) => {
                    let name = slot.name;
                    slot.name = slot.name & !0xff | slot.name.wrapping_add(1) & 0xff;
                    if is_broken("rdma_use_names_again") {
                        slot.name = name;
                    }
                    (slot.key, slot.binding) = (KeyState::Alive, true);
                    self.sends.push(SendRequest {
                        user: kind::BIND << 32 | u64::from(slot.cid),
                        operation: operation::BIND,
                        signalled: false,
                        window: slot.window,
                        region,
                        key: slot.name,
                        address,
                        len: u64::from(piece.len),
                        access: if is_read { access::REMOTE_WRITE } else { access::REMOTE_READ },
                        ..SendRequest::NONE
                    });
                    Sgl::keyed(address, piece.len, slot.name, true)
                }
            };
        }
        let bytes = sqe.to_bytes();
        // SAFETY: the slot's capsule is within our memory, and no send that names it is under way: the slot was free.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.area.start.add(capsule), bytes.len());
        }
        slot.sending = true;
        self.sends.push(SendRequest {
            user: kind::SEND << 32 | u64::from(slot.cid),
            operation: operation::SEND,
            signalled: true,
            // By index: the pointer is made when all are there.
            address: first_segment as u64,
            segments_len: low32((self.segments.len() - first_segment) as u64),
            ..SendRequest::NONE
        });
    }

    fn receive(&mut self, index: u16) {
        let address = (self.area.start as usize + self.layout.completion(index)) as u64;
        let segment = Segment { address, len: low32(Cqe::LEN as u64), key: self.area.keys.local };
        self.receives.push(ReceiveRequest { user: kind::RECEIVE << 32 | u64::from(index), segment });
    }

    /// What is to be posted, receives before sends. To be followed by [`RdmaQueue::posted`].
    pub(super) fn posts(&mut self) -> (&[ReceiveRequest], &[SendRequest]) {
        for send in self.sends.iter_mut().filter(|send| send.operation == operation::SEND) {
            let first = usize::try_from(send.address).unwrap_or(0);
            send.segments = &raw const self.segments[first];
        }
        (&self.receives, &self.sends)
    }

    /// So many of each were posted. When it is not all of them, the pair is of no use any more.
    pub(super) fn posted(&mut self, receives: usize, sends: usize) {
        self.over |= receives < self.receives.len() || sends < self.sends.len();
        self.receives_posted += receives;
        self.sends_posted += sends;
        self.receives.clear();
        self.sends.clear();
        self.segments.clear();
    }

    /// Whether the device has nothing of ours any more.
    pub(super) fn is_flushed(&self) -> bool {
        self.sends_posted == 0 && self.receives_posted == 0
    }

    /// Counts a completion that came after the end. Whether it was the last.
    pub(super) fn counter(&self) -> impl FnMut(&WorkCompletion) -> bool + Send + use<> {
        let (mut sends, mut receives) = (self.sends_posted, self.receives_posted);
        let mut binding: Vec<bool> = self.slots.iter().map(|slot| slot.binding).collect();
        move |completion| {
            let index = usize::from(low16(low32(completion.user)) & (SLOTS_MAX - 1));
            match completion.user >> 32 {
                kind::RECEIVE => receives = receives.saturating_sub(1),
                kind::SEND => {
                    let bound = binding.get_mut(index).is_some_and(std::mem::take);
                    sends = sends.saturating_sub(1 + usize::from(bound));
                }
                what => {
                    if what == kind::BIND
                        && let Some(bound) = binding.get_mut(index)
                    {
                        *bound = false;
                    }
                    sends = sends.saturating_sub(1);
                }
            }
            sends == 0 && receives == 0
        }
    }

    /// Nothing more is posted.
    pub(super) fn end_posting(&mut self) {
        self.over = true;
        self.sends.clear();
        self.receives.clear();
        self.segments.clear();
    }

    /// The queue pair is not there any more: commands that were answered have ended.
    pub(super) fn end_answered(&mut self) {
        self.over = true;
        for index in 0..self.layout.depth {
            let slot = &self.slots[usize::from(index)];
            if slot.taken && slot.answer.is_some() {
                self.end(index);
            }
        }
    }

    /// SQHD of the last answer.
    pub(super) fn sq_head(&self) -> u16 {
        self.sq_head
    }

    /// What was moved since this was asked last.
    pub(super) fn take_moved(&mut self) -> Moved {
        std::mem::take(&mut self.moved)
    }

    /// Moves out the requests that have ended.
    pub(super) fn ended(&mut self) -> std::vec::Drain<'_, (u32, Answer)> {
        self.ended.drain(..)
    }

    /// Takes out all requests that are under way, in the order in which they came, each with whether any of it may have reached the
    /// controller. The pair is of no use afterwards. Only when the device has nothing of ours any more.
    pub(super) fn drain(&mut self) -> Vec<(u32, bool)> {
        self.over = true;
        let mut taken: Vec<_> = self.parents.iter_mut().filter(|parent| parent.taken).collect();
        taken.sort_by_key(|parent| parent.sequence);
        taken
            .into_iter()
            .map(|parent| {
                parent.taken = false;
                (parent.user, parent.begun)
            })
            .collect()
    }
}

// What is not cut, and the longest that an admin command moves, has room in a chunk.
const _: () = assert!(LARGE >= 64 << 10 && LARGE <= Sgl::KEYED_LEN_MAX);
