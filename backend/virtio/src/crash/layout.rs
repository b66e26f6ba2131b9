//! What lies where in the crash record, and the stores of who works.
//!
//! ```text
//! 0        magic, version, signal of a thread that is no reactor, the request of the last crash,
//!          the requests that are being replayed, the reactor of a last crash that nobody is blamed for
//! 4096     disks:    1024 x 128 bytes: set aside, length of the name, name
//! 135168   reactors:  128 x  64 bytes: signal, busy, disk, queue, head, counters from..=to, log
//! ```
//!
//! Fields that came after the first version lie where that had zeroes, and 0 says nothing in them.
//!
//! Invariant: a note is written by one reactor, and read in its signal handler or after the death of the process.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"hawserCR");
/// Changes with the layout. A file of another version is refused and left as it is.
pub(super) const VERSION: u32 = 1;
pub(super) const DISKS_MAX: usize = 1024;
const REACTORS_MAX: usize = 128;
pub(super) const NAME_BYTES_MAX: usize = 120;
/// Queues that can be seen replaying at the same time; of more it is not known.
const REPLAYS_MAX: usize = 32;

#[repr(C)]
pub(super) struct Layout {
    pub(super) magic: AtomicU64,
    pub(super) version: AtomicU32,
    /// The signal that killed us on a thread that is no reactor.
    pub(super) other_signal: AtomicU32,
    /// The request of the last crash, for comparison with the next.
    pub(super) last: Note,
    _free: [Note; 15],
    /// What is being replayed, with its reactor.
    pub(super) replays: [Note; REPLAYS_MAX],
    /// The last process crashed on this reactor (its number + 1) without a request to blame.
    pub(super) unknown: AtomicU32,
    _pad: [u8; 4096 - 16 - 64 * (16 + REPLAYS_MAX) - 4],
    pub(super) disks: [DiskEntry; DISKS_MAX],
    pub(super) reactors: [Note; REACTORS_MAX],
}

#[repr(C)]
pub(super) struct DiskEntry {
    pub(super) set_aside: AtomicU32,
    pub(super) name_bytes: AtomicU32,
    pub(super) name: [AtomicU8; NAME_BYTES_MAX],
}

#[repr(C)]
pub(super) struct Note {
    pub(super) signal: AtomicU32,
    /// 1 while it says something.
    busy: AtomicU32,
    disk: AtomicU32,
    queue: AtomicU32,
    head: AtomicU32,
    /// Of a replay: the reactor's number + 1, and 0 while the note is nobody's.
    reactor: AtomicU32,
    counter_from: AtomicU64,
    counter_to: AtomicU64,
    log: AtomicU64,
    _pad: [u64; 2],
}

const _: () = assert!(size_of::<Note>() == 64 && size_of::<DiskEntry>() == 128);
const _: () = assert!(std::mem::offset_of!(Layout, disks) == 4096);
pub(super) const FILE_BYTES: usize = size_of::<Layout>();

/// What a note says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Noted {
    pub(super) disk: u32,
    pub(super) queue: u32,
    pub(super) head: u32,
    pub(super) counters: (u64, u64),
    log: u64,
}

impl Noted {
    /// Whether both may be the same request: of batches, whether they share one.
    pub(super) fn is_same(&self, other: &Noted) -> bool {
        let ((from, to), (other_from, other_to)) = (self.counters, other.counters);
        (self.disk, self.queue, self.log) == (other.disk, other.queue, other.log)
            && from <= other_to
            && other_from <= to
            && (from != to || other_from != other_to || self.head == other.head)
    }
}

impl Note {
    /// What it says, if it does.
    pub(super) fn get(&self) -> Option<Noted> {
        (self.busy.load(Ordering::Acquire) != 0).then(|| Noted {
            disk: self.disk.load(Ordering::Relaxed),
            queue: self.queue.load(Ordering::Relaxed),
            head: self.head.load(Ordering::Relaxed),
            counters: (self.counter_from.load(Ordering::Relaxed), self.counter_to.load(Ordering::Relaxed)),
            log: self.log.load(Ordering::Relaxed),
        })
    }

    /// The same, and it says nothing any more.
    pub(super) fn take(&self) -> Option<Noted> {
        let noted = self.get();
        self.busy.store(0, Ordering::Release);
        noted
    }

    /// A replay's, with its reactor; the note is free afterwards.
    pub(super) fn take_replay(&self) -> Option<(u32, Noted)> {
        let noted = self.take();
        let reactor = self.reactor.swap(0, Ordering::AcqRel);
        Some((reactor.checked_sub(1)?, noted?))
    }

    pub(super) fn put(&self, noted: &Noted) {
        self.disk.store(noted.disk, Ordering::Relaxed);
        self.queue.store(noted.queue, Ordering::Relaxed);
        self.head.store(noted.head, Ordering::Relaxed);
        self.counter_from.store(noted.counters.0, Ordering::Relaxed);
        self.counter_to.store(noted.counters.1, Ordering::Relaxed);
        self.log.store(noted.log, Ordering::Relaxed);
        self.busy.store(1, Ordering::Release);
    }
}

/// Where a thread that is no reactor leaves its signal.
pub(super) static CURRENT: AtomicPtr<Layout> = AtomicPtr::new(ptr::null_mut());

thread_local! {
    /// The note of the reactor that runs on this thread. No destructor: the handler may read it at any time.
    static NOTE: Cell<*const Note> = const { Cell::new(ptr::null()) };
}

/// In the signal handler: the death that follows is our own fault.
pub(crate) fn mark(signal: i32) {
    let signal = signal.unsigned_abs();
    let note = NOTE.with(Cell::get);
    if !note.is_null() {
        // SAFETY: points into a mapping that is never unmapped.
        unsafe { &*note }.signal.store(signal, Ordering::Release);
        return;
    }
    let layout = CURRENT.load(Ordering::Acquire);
    if !layout.is_null() {
        // SAFETY: as above.
        unsafe { &*layout }.other_signal.store(signal, Ordering::Release);
    }
}

/// Writes one queue's part of its reactor's note. Plain stores: the process that reads them comes after this one's death.
#[derive(Clone, Copy)]
pub(crate) struct Recorder {
    layout: Option<&'static Layout>,
    note: Option<&'static Note>,
    reactor: u32,
    disk: u32,
    queue: u32,
    log: u64,
}

impl Recorder {
    pub(super) fn new(layout: &'static Layout, reactor: usize, disk: u32, queue: u16, log: u64) -> Recorder {
        let note = layout.reactors.get(reactor);
        let reactor = u32::try_from(reactor).unwrap_or(u32::MAX - 1);
        Recorder { layout: Some(layout), note, reactor, disk, queue: u32::from(queue), log }
    }

    /// A pen for a disk that is not recorded.
    pub(crate) fn none() -> Recorder {
        Recorder { layout: None, note: None, reactor: 0, disk: 0, queue: 0, log: 0 }
    }

    /// From now on a fatal signal on this thread marks this reactor's note.
    pub(crate) fn adopt_thread(self) {
        if let Some(ours) = self.note {
            NOTE.with(|note| note.set(ours));
        }
    }

    /// The queue begins to work: everything noted until [`Recorder::idle`] is its.
    #[inline]
    pub(crate) fn queue(self) {
        let Some(note) = self.note else { return };
        note.disk.store(self.disk, Ordering::Relaxed);
        note.queue.store(self.queue, Ordering::Relaxed);
        note.log.store(self.log, Ordering::Relaxed);
    }

    /// It works on this request.
    #[inline]
    pub(crate) fn request(self, head: u16, counter: u64) {
        let Some(note) = self.note else { return };
        note.head.store(u32::from(head), Ordering::Relaxed);
        note.counter_from.store(counter, Ordering::Relaxed);
        note.counter_to.store(counter, Ordering::Relaxed);
        note.busy.store(1, Ordering::Relaxed);
    }

    /// It hands the requests with these counters to the device.
    #[inline]
    pub(crate) fn batch(self, from: u64, to: u64) {
        let Some(note) = self.note else { return };
        note.counter_from.store(from, Ordering::Relaxed);
        note.counter_to.store(to, Ordering::Relaxed);
    }

    /// Its turn is over, or it works on no request.
    #[inline]
    pub(crate) fn idle(self) {
        let Some(note) = self.note else { return };
        note.busy.store(0, Ordering::Relaxed);
    }

    /// A note for the requests that the queue replays: it stands while they are at the device, whatever else the reactor does.
    pub(crate) fn replay(self) -> Replay {
        let free = |note: &&Note| {
            let ours = self.reactor + 1;
            note.reactor.compare_exchange(0, ours, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        Replay { recorder: self, note: self.layout.and_then(|layout| layout.replays.iter().find(free)) }
    }
}

/// See [`Recorder::replay`]. Free again when dropped.
pub(crate) struct Replay {
    recorder: Recorder,
    note: Option<&'static Note>,
}

impl Replay {
    /// This request is replayed from now on.
    pub(crate) fn begin(&self, head: u16, counter: u64) {
        let Some(note) = self.note else { return };
        let Recorder { disk, queue, log, .. } = self.recorder;
        note.busy.store(0, Ordering::Release);
        note.put(&Noted { disk, queue, head: u32::from(head), counters: (counter, counter), log });
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if let Some(note) = self.note {
            note.take();
            note.reactor.store(0, Ordering::Release);
        }
    }
}
