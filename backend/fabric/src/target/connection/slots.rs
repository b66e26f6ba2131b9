//! Commands under way: a fixed table, so that what the kernel and devices are given stays in place.

use super::super::BufferPool;
use crate::nvme::{NvmeStatus, Sgl, Sqe, StatusCode};
use hawser_block::{Buffers, Status};
use hawser_runtime::buffers::AlignedBuffer;

/// Where a command is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Free,
    /// Its capsule's data is coming in.
    Capsule,
    /// It waits for memory.
    Waiting,
    /// An R2T is out; H2CData comes in.
    Transfer,
    /// The device has it, or a part of it.
    Executing,
    /// An Asynchronous Event Request without an event.
    Held,
    /// A Connect or a Cross-Controller Reset that waits until other connections are quiet.
    Awaiting,
    /// Its answer is on its way out.
    Sending,
}

/// A run of blocks that goes to the device in pieces: Write Zeroes, or a range of Dataset Management.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Run {
    pub(super) lba: u64,
    pub(super) blocks: u64,
}

/// One command.
pub(super) struct Slot {
    pub(super) sqe: Sqe,
    pub(super) phase: Phase,
    pub(super) buffer: Option<AlignedBuffer>,
    /// What Compare reads from the device.
    compared: Option<AlignedBuffer>,
    /// The length of its data, to or from the host.
    pub(super) len: u32,
    /// How much of the host's data has come.
    pub(super) received: u32,
    /// How much of it came in the capsule.
    pub(super) in_capsule: u32,
    /// What went wrong on the way in: it is answered, not executed.
    pub(super) refused: Option<NvmeStatus>,
    /// The connection's epoch when the device got it.
    pub(super) epoch: u64,
    /// Requests at the device.
    pub(super) pieces: u32,
    /// What is left of the run in work.
    pub(super) run: Run,
    /// The next range of Dataset Management.
    pub(super) next_range: u32,
    /// The first failure of a piece.
    pub(super) failed: Option<Status>,
    /// The position of its namespace.
    pub(super) namespace: usize,
    /// The transport moves data to and from where keys lead: RDMA.
    pub(super) keyed: bool,
    iovec: libc::iovec,
}

impl Slot {
    fn free(keyed: bool) -> Slot {
        Slot {
            keyed,
            sqe: Sqe::new(0, 0, Sgl::NONE),
            phase: Phase::Free,
            buffer: None,
            compared: None,
            len: 0,
            received: 0,
            in_capsule: 0,
            refused: None,
            epoch: 0,
            pieces: 0,
            run: Run::default(),
            next_range: 0,
            failed: None,
            namespace: 0,
            iovec: libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 },
        }
    }

    /// The first byte of its buffer.
    pub(super) fn data(&self) -> *mut u8 {
        self.buffer.as_ref().expect("a command with data has a buffer").as_ptr()
    }

    /// Its payload as a request carries it: its data, or what Compare reads.
    pub(super) fn payload(&mut self) -> Buffers {
        let start = self.compared.as_ref().map_or_else(|| self.data(), AlignedBuffer::as_ptr);
        self.iovec = libc::iovec { iov_base: start.cast(), iov_len: self.len as usize };
        // SAFETY: the table is a boxed slice, so the iovec stays in place; it and the buffer, which has at least `len`
        // bytes, are left alone until the request has ended (`Slots::release` asserts it). `len` is not 0.
        unsafe { Buffers::new(&raw const self.iovec, 1, self.len) }
    }
}

impl Slot {
    /// Whether Compare has read what the host sent.
    pub(super) fn is_equal(&self) -> bool {
        let (Some(sent), Some(read)) = (&self.buffer, &self.compared) else { return false };
        assert!(self.pieces == 0, "the device is done with the command");
        // SAFETY: both have at least `len` bytes, and nobody writes to them any more.
        unsafe { sent.slice(0, self.len as usize) == read.slice(0, self.len as usize) }
    }
}

/// All commands of a connection.
pub(super) struct Slots {
    slots: Box<[Slot]>,
    free: Vec<usize>,
    pub(super) pool: BufferPool,
}

impl Slots {
    /// `keyed`: over RDMA.
    pub(super) fn new(count: usize, pool: BufferPool, keyed: bool) -> Slots {
        Slots {
            slots: (0..count).map(|_| Slot::free(keyed)).collect(),
            free: (0..count).rev().collect(),
            pool,
        }
    }

    /// Puts a command into a free slot.
    pub(super) fn take(&mut self, sqe: Sqe) -> Option<usize> {
        let index = self.free.pop()?;
        let slot = &mut self.slots[index];
        slot.sqe = sqe;
        slot.phase = Phase::Capsule;
        slot.len = 0;
        slot.received = 0;
        slot.in_capsule = 0;
        slot.refused = None;
        slot.pieces = 0;
        slot.run = Run::default();
        slot.next_range = 0;
        slot.failed = None;
        Some(index)
    }

    pub(super) fn get(&self, index: usize) -> Option<&Slot> {
        self.slots.get(index)
    }

    pub(super) fn at(&mut self, index: usize) -> &mut Slot {
        &mut self.slots[index]
    }

    /// Gives Compare a second buffer. There is one for each whose data is here: they are bounded together.
    pub(super) fn add_compared(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.compared = Some(self.pool.take_anyway(slot.len as usize));
    }

    /// Gives a slot's buffers back.
    pub(super) fn drop_buffer(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        assert!(slot.pieces == 0, "a buffer goes back only when the device is done with it");
        for buffer in [slot.buffer.take(), slot.compared.take()].into_iter().flatten() {
            self.pool.give_back(buffer);
        }
    }

    /// Frees a slot.
    pub(super) fn release(&mut self, index: usize) {
        self.drop_buffer(index);
        let slot = &mut self.slots[index];
        assert!(slot.phase != Phase::Free, "a slot is freed once");
        slot.phase = Phase::Free;
        self.free.push(index);
    }

    /// The commands in `phase`.
    pub(super) fn in_phase(&self, phase: Phase) -> impl Iterator<Item = usize> {
        self.slots.iter().enumerate().filter(move |(_, slot)| slot.phase == phase).map(|(index, _)| index)
    }
}

/// Where a command says its data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In its capsule.
    Capsule,
    /// The transport moves it.
    Transport,
}

/// Whether a descriptor says by which key its data is reached, with or without the key's end.
fn is_reachable(sgl: &Sgl) -> bool {
    sgl.identifier == Sgl::KEYED || sgl.identifier == Sgl::KEYED | Sgl::INVALIDATE
}

/// Where a command's `len` bytes of data are (TCP 3.3.2, and of RDMA's binding the same with keyed descriptors).
///
/// # Errors
/// The status to answer with, when the SGL is not one of the two kinds, or not of this length.
pub(super) fn place_of(slot: &Slot, len: u32) -> Result<Place, NvmeStatus> {
    let sgl = slot.sqe.sgl;
    let place = match sgl.identifier {
        Sgl::IN_CAPSULE if sgl.address != 0 => return Err(NvmeStatus::fatal(StatusCode::INVALID_SGL_OFFSET)),
        Sgl::IN_CAPSULE => Place::Capsule,
        Sgl::TRANSPORT if !slot.keyed => Place::Transport,
        _ if slot.keyed && is_reachable(&sgl) => Place::Transport,
        _ => return Err(NvmeStatus::fatal(StatusCode::INVALID_SGL_TYPE)),
    };
    let carried = if place == Place::Capsule { len } else { 0 };
    if sgl.len != len || slot.in_capsule != carried {
        return Err(NvmeStatus::fatal(StatusCode::INVALID_SGL_LENGTH));
    }
    Ok(place)
}
