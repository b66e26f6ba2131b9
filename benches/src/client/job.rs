//! One thread's requests: it keeps the queue full, reaps in batches and counts.
//!
//! Owns: slots, buffers and latencies of one queue. Must not know: the other jobs, or how long to run.
//! Invariants: a slot's buffer belongs to the server from `issue` until its completion is reaped; [`Job::run`]
//! returns only when nothing is in flight; the clock is read once per batch.

use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Instant;

use blkio::{Blkioq, Completion, ReqFlags};

use super::options::WaitMode;
use super::pattern::Pattern;
use super::verify::Ledger;
use crate::histogram::Histogram;
use crate::{to_u64, to_usize};

/// Requests are made, but not counted yet.
pub(super) const WARM: u8 = 0;
/// Requests are made and counted.
pub(super) const MEASURE: u8 = 1;
/// No new requests.
pub(super) const STOP: u8 = 2;

/// What the main thread and all jobs see.
pub(super) struct Shared {
    pub(super) phase: AtomicU8,
    /// One per job: how many requests have completed, for the watchdog.
    pub(super) progress: Vec<AtomicU64>,
}

/// One request's place.
#[derive(Clone, Copy)]
struct Slot {
    block: u64,
    started_ns: u64,
    read: bool,
}

/// What a job has counted during [`MEASURE`].
#[derive(Default)]
pub(super) struct Totals {
    pub(super) reads: Histogram,
    pub(super) writes: Histogram,
    pub(super) batches: u64,
    pub(super) verified: u64,
}

/// What a job is made of.
pub(super) struct Setup {
    pub(super) queue: Blkioq,
    pub(super) wait: WaitMode,
    /// Address of `depth * block_size` bytes that are registered with the server and that only this job uses.
    pub(super) buffers: usize,
    pub(super) block_size: u64,
    pub(super) depth: u16,
    /// What a request's memory is cut into; `block_size` where it is not.
    pub(super) segment: usize,
    pub(super) batch: u16,
    /// Byte on the disk where block 0 of the pattern begins.
    pub(super) first_byte: u64,
}

/// One thread's state.
pub(super) struct Job {
    setup: Setup,
    completion_fd: Option<RawFd>,
    /// One run of segments for each slot, where memory is cut.
    iovecs: Box<[libc::iovec]>,
    /// A block in one piece, likewise.
    whole: Vec<u8>,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    completions: Box<[MaybeUninit<Completion>]>,
    epoch: Instant,
    totals: Totals,
    ledger: Option<Ledger>,
    /// Whether a block that this run has not written must carry a header too.
    expect_headers: bool,
}

impl Job {
    /// Takes over `setup.queue`; `ledger` is present where contents are verified.
    pub(super) fn new(mut setup: Setup, ledger: Option<Ledger>, expect_headers: bool) -> Self {
        let completion_fd = setup.queue.get_completion_fd();
        if setup.wait == WaitMode::Eventfd {
            setup.queue.set_completion_fd_enabled(true);
            if let Some(fd) = completion_fd {
                set_blocking(fd);
            }
        }
        let depth = setup.depth;
        let iovecs = segments(&setup);
        let whole = if iovecs.is_empty() { Vec::new() } else { vec![0; to_usize(setup.block_size)] };
        Job {
            completion_fd,
            iovecs,
            whole,
            slots: vec![Slot { block: 0, started_ns: 0, read: false }; usize::from(depth)].into_boxed_slice(),
            free: (0..depth).rev().collect(),
            completions: (0..setup.batch).map(|_| MaybeUninit::uninit()).collect(),
            epoch: Instant::now(),
            totals: Totals::default(),
            ledger,
            expect_headers,
            setup,
        }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).expect("584 years")
    }

    fn buffer(&mut self, slot: u16) -> &mut [u8] {
        let len = to_usize(self.setup.block_size);
        let start = self.setup.buffers + usize::from(slot) * len;
        let start = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: `buffers` is the address of depth * block_size mapped bytes that live as long as the queue and that
        // only this job uses; `slot` < depth; the callers touch a slot only while it is not in flight, so that the
        // server, which is trusted here as far as the protocol goes, does not write to it. `&mut self` keeps a second
        // slice from being made. Bytes have no invalid values.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    /// The segments of a slot; none where its memory is in one piece.
    fn segments(&self, slot: u16) -> &[libc::iovec] {
        let count = self.iovecs.len() / self.slots.len();
        &self.iovecs[usize::from(slot) * count..][..count]
    }

    /// Fills a slot's memory with what the ledger wants in a block.
    fn fill(&mut self, ledger: &Ledger, slot: u16, block: u64) {
        if self.iovecs.is_empty() {
            return ledger.fill(block, self.buffer(slot));
        }
        let mut whole = std::mem::take(&mut self.whole);
        ledger.fill(block, &mut whole);
        for (segment, part) in self.segments(slot).iter().zip(whole.chunks(self.setup.segment)) {
            // SAFETY: a segment of a slot that is not in flight, as long as the part, which is elsewhere.
            unsafe { segment.iov_base.cast::<u8>().copy_from_nonoverlapping(part.as_ptr(), part.len()) };
        }
        self.whole = whole;
    }

    /// Checks what a slot's memory has of a block.
    fn check(&mut self, ledger: &Ledger, slot: u16, block: u64) -> Result<(), String> {
        if self.iovecs.is_empty() {
            return ledger.check(block, self.buffer(slot)).map_err(|e| e.to_string());
        }
        let mut whole = std::mem::take(&mut self.whole);
        for (segment, part) in self.segments(slot).iter().zip(whole.chunks_mut(self.setup.segment)) {
            // SAFETY: as in `fill`.
            unsafe { part.as_mut_ptr().copy_from_nonoverlapping(segment.iov_base.cast(), part.len()) };
        }
        let checked = ledger.check(block, &whole).map_err(|e| e.to_string());
        self.whole = whole;
        checked
    }

    /// Makes requests along `pattern` for at most `passes` passes, or until the phase is [`STOP`], and then waits for
    /// all of them. Ends at the first failed request or wrong block.
    pub(super) fn run(
        &mut self,
        pattern: &mut Pattern,
        passes: Option<u64>,
        only_written: bool,
        shared: &Shared,
        progress: &AtomicU64,
    ) -> Result<(), String> {
        let last_pass = passes.map_or(u64::MAX, |n| pattern.passes() + n);
        let mut first_error = None;
        let mut completed = progress.load(Ordering::Relaxed);
        loop {
            let phase = shared.phase.load(Ordering::Relaxed);
            let now = self.now_ns();
            if phase != STOP && first_error.is_none() {
                self.issue_all(pattern, last_pass, only_written, now);
            }
            if self.free.len() == self.slots.len() {
                break;
            }
            let reaped = self.reap()?;
            let now = self.now_ns();
            for i in 0..reaped {
                // SAFETY: do_io has initialised the first `reaped` completions.
                let (index, ret) = unsafe {
                    let completion = self.completions[i].assume_init_ref();
                    (completion.user_data, completion.ret)
                };
                if let Err(error) = self.finish(index, ret, now, phase == MEASURE) {
                    first_error.get_or_insert(error);
                }
            }
            completed += to_u64(reaped);
            progress.store(completed, Ordering::Relaxed);
            self.totals.batches += u64::from(phase == MEASURE);
        }
        first_error.map_or(Ok(()), Err)
    }

    /// What was counted.
    pub(super) fn into_totals(self) -> Totals {
        self.totals
    }

    /// Gives every free slot a request, as long as the pattern has any.
    fn issue_all(&mut self, pattern: &mut Pattern, last_pass: u64, only_written: bool, now: u64) {
        'slots: while let Some(&slot) = self.free.last() {
            // A block that is in flight already is passed over; when the range is small all may be.
            for _ in 0..4 {
                if pattern.passes() >= last_pass {
                    break 'slots;
                }
                let (block, read) = pattern.next();
                if let Some(ledger) = &mut self.ledger
                    && ((only_written && !ledger.is_written(block)) || !ledger.claim(block))
                {
                    continue;
                }
                self.free.pop();
                self.issue(slot, block, read, now);
                continue 'slots;
            }
            if self.free.len() < self.slots.len() {
                break;
            }
        }
    }

    fn issue(&mut self, slot: u16, block: u64, read: bool, now: u64) {
        self.slots[usize::from(slot)] = Slot { block, started_ns: now, read };
        if !read && let Some(ledger) = self.ledger.take() {
            self.fill(&ledger, slot, block);
            self.ledger = Some(ledger);
        }
        let len = to_usize(self.setup.block_size);
        let address = self.setup.buffers + usize::from(slot) * len;
        let start = self.setup.first_byte + block * self.setup.block_size;
        let flags = ReqFlags::empty();
        if !self.iovecs.is_empty() {
            let segments = self.segments(slot);
            let (first, count) = (segments.as_ptr(), u32::try_from(segments.len()).unwrap_or(u32::MAX));
            if read {
                self.setup.queue.readv(start, first, count, usize::from(slot), flags);
            } else {
                self.setup.queue.writev(start, first, count, usize::from(slot), flags);
            }
            return;
        }
        if read {
            let buffer = std::ptr::with_exposed_provenance_mut(address);
            self.setup.queue.read(start, buffer, len, usize::from(slot), flags);
        } else {
            let buffer = std::ptr::with_exposed_provenance(address);
            self.setup.queue.write(start, buffer, len, usize::from(slot), flags);
        }
    }

    /// Submits what was issued and waits for at least one completion.
    fn reap(&mut self) -> Result<usize, String> {
        let min = match self.setup.wait {
            WaitMode::Eventfd => 0,
            WaitMode::Block | WaitMode::Loop => 1,
        };
        loop {
            let reaped = self.setup.queue.do_io(&mut self.completions, min, None, None);
            let reaped = reaped.map_err(|e| format!("the queue: {e}"))?;
            if reaped > 0 {
                return Ok(reaped);
            }
            if let Some(fd) = self.completion_fd {
                wait_on(fd)?;
            }
        }
    }

    fn finish(&mut self, index: usize, ret: i32, now: u64, count: bool) -> Result<(), String> {
        let slot_number = u16::try_from(index).ok().filter(|&n| n < self.setup.depth);
        let slot_number = slot_number.ok_or_else(|| format!("completion of an unknown request {index}"))?;
        let slot = self.slots[index];
        self.free.push(slot_number);
        let mut result = Ok(());
        if let Some(mut ledger) = self.ledger.take() {
            if ret == 0 && slot.read && (self.expect_headers || ledger.is_written(slot.block)) {
                result = self.check(&ledger, slot_number, slot.block);
                self.totals.verified += u64::from(result.is_ok());
            } else if ret == 0 && !slot.read {
                ledger.written(slot.block);
            }
            ledger.release(slot.block);
            self.ledger = Some(ledger);
        }
        if ret != 0 {
            let what = if slot.read { "read" } else { "write" };
            let byte = self.setup.first_byte + slot.block * self.setup.block_size;
            return Err(format!("{what} at byte {byte}: {}", std::io::Error::from_raw_os_error(-ret)));
        }
        if count {
            let latencies = if slot.read { &mut self.totals.reads } else { &mut self.totals.writes };
            latencies.record(now - slot.started_ns);
        }
        result
    }
}

/// The segments of all slots, each slot's last in memory first: no segment is followed by its neighbour.
fn segments(setup: &Setup) -> Box<[libc::iovec]> {
    let count = to_usize(setup.block_size) / setup.segment;
    if count < 2 {
        return Box::default();
    }
    let depth = usize::from(setup.depth);
    let at = |slot: usize, number: usize| {
        let start = setup.buffers + ((count - 1 - number) * depth + slot) * setup.segment;
        libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(start), iov_len: setup.segment }
    };
    (0..depth).flat_map(|slot| (0..count).map(move |number| at(slot, number))).collect()
}

/// Makes reads of the eventfd wait; the library makes it non-blocking for its own use.
fn set_blocking(fd: RawFd) {
    // SAFETY: fcntl with these commands takes no pointers; a wrong descriptor gives an error, not a fault.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK);
    }
}

/// Waits until the server signals, and takes the signal.
fn wait_on(fd: RawFd) -> Result<(), String> {
    let mut value = 0_u64;
    // SAFETY: the buffer is eight bytes that live through the call; the descriptor is the queue's own.
    let n = unsafe { libc::read(fd, (&raw mut value).cast(), 8) };
    if n == 8 {
        return Ok(());
    }
    match std::io::Error::last_os_error() {
        e if e.kind() == std::io::ErrorKind::Interrupted => Ok(()),
        e => Err(format!("waiting for completions: {e}")),
    }
}
