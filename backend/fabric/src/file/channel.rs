//! A reactor's way to a file: requests become reads, writes, syncs and fallocates.
//!
//! Two ways of moving payload, chosen when the file was opened: through io_uring, one operation at a time for each
//! request, the rest again when the kernel did only a part; or by system calls at once, for files in memory, a bounded
//! number of bytes per pass of the reactor, so that the first requests of a batch are answered while the last ones run.
//!
//! Invariant: a slot, with its iovecs and its bounce buffer, is freed only when its operation has completed.

use super::Shared;
use super::backing::{ALLOCATE, Alignment, PUNCH, ZERO};
use crate::leaf::{self, Tally};
use crate::pool::BufferPool;
use hawser_block::{Buffers, Channel, Completion, Geometry, IoStats, Operation, Outcome, Request, Status};
use hawser_runtime::buffers::AlignedBuffer;
use hawser_runtime::{Completed, Event, Instant, Op, Runtime, Slab, Source, SourceId};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The most iovecs in one system call (`UIO_MAXIOV`).
const IOVECS_MAX: u32 = 1024;
/// What is moved by system calls in one pass: 8 requests of 4 KiB, or one larger. The guest's wake-up is begun after the first
/// portion and takes place beside the others: against 128 KiB, 4k at depth 32 went up by 1.2 to 1.4.
const PASS_BYTES: usize = 32 << 10;
/// What one channel may have in bounce buffers at a time; a request beyond it waits for another to end.
const BOUNCE_IN_USE_BYTES_MAX: usize = 32 << 20;
/// What is kept while unused.
const BOUNCE_SPARE_BYTES_MAX: usize = 8 << 20;

/// One user's way to the file.
pub(super) struct FileChannel {
    core: Rc<RefCell<Core>>,
    id: SourceId,
    runtime: Runtime,
}

impl FileChannel {
    pub(super) fn open(
        shared: Arc<Shared>,
        stats: Arc<IoStats>,
        runtime: &Runtime,
        user: SourceId,
    ) -> FileChannel {
        let core = Rc::new(RefCell::new(Core {
            geometry: shared.geometry_now(),
            shared,
            stats,
            runtime: runtime.clone(),
            user,
            id: user,
            slots: Slab::default(),
            spare_iovecs: Vec::new(),
            bounce: BufferPool::new(BOUNCE_IN_USE_BYTES_MAX, BOUNCE_SPARE_BYTES_MAX),
            waiting: VecDeque::new(),
            ended: Vec::new(),
            aborting: false,
        }));
        let id = runtime.add_source(Rc::<RefCell<Core>>::clone(&core));
        core.borrow_mut().id = id;
        FileChannel { core, id, runtime: runtime.clone() }
    }
}

impl Channel for FileChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        self.core.borrow_mut().submit(batch);
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        ended.append(&mut self.core.borrow_mut().ended);
    }

    fn is_working(&self) -> bool {
        let core = self.core.borrow();
        // A wake-up for each large request would cost as much as half of its copy.
        core.shared.backing.in_memory
            && core.waiting.front().is_some_and(|(request, _)| request.buffers.len() < PASS_BYTES)
    }

    fn abort(&mut self) {
        self.core.borrow_mut().abort();
    }
}

impl Drop for FileChannel {
    fn drop(&mut self) {
        self.runtime.remove_source(self.id);
    }
}

/// What a request does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Transfer,
    Punch,
    Zero,
    Allocate,
    Sync,
}

/// A request whose operation is under way.
struct Slot {
    request: Request,
    started: Instant,
    step: Step,
    /// Bytes moved so far.
    done: usize,
    /// For payload that is not a whole iovec array: what the kernel reads.
    iovecs: Vec<libc::iovec>,
    bounce: Option<AlignedBuffer>,
}

struct Core {
    shared: Arc<Shared>,
    geometry: Geometry,
    stats: Arc<IoStats>,
    runtime: Runtime,
    user: SourceId,
    id: SourceId,
    slots: Slab<Slot>,
    spare_iovecs: Vec<Vec<libc::iovec>>,
    bounce: BufferPool,
    /// Not started: beyond this pass's bytes, or without a bounce buffer as yet.
    waiting: VecDeque<(Request, Instant)>,
    ended: Vec<Completion>,
    aborting: bool,
}

impl Source for Core {
    fn poll(&mut self, _: &Runtime, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            if let Event::Op { key, completed } = event {
                self.completed(key, completed);
            }
        }
        self.start_waiting();
        if self.slots.is_empty() && self.waiting.is_empty() {
            self.aborting = false;
        }
    }
}

impl Core {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        self.geometry.blocks = self.shared.blocks.load(Ordering::Relaxed);
        let now = self.runtime.refresh_now();
        let failed = self.shared.failed.load(Ordering::Relaxed);
        for request in batch.drain(..) {
            let checked = if failed { Err(Status::Media) } else { leaf::check(&self.geometry, &request) };
            match checked {
                Ok(()) => self.waiting.push_back((request, now)),
                Err(_) => self.end(&request, now, checked),
            }
        }
        self.start_waiting();
    }

    /// Starts what waits, in order, as far as this pass and the bounce buffers go.
    fn start_waiting(&mut self) {
        if self.shared.backing.in_memory {
            self.run_in_memory();
            return;
        }
        while let Some((request, started)) = self.waiting.front().copied() {
            let bytes = leaf::bytes_of(&self.geometry, &request);
            let mut bounce = None;
            if request.operation.has_payload() && !self.fits(&request.buffers) {
                bounce = self.bounce.take(bytes);
                let Some(buffer) = &bounce else { return };
                self.shared.bounced.add(1);
                self.shared.bounced_bytes.add(bytes as u64);
                if request.operation != Operation::Read {
                    // SAFETY: the request has not ended; the buffer has at least `bytes` bytes, and is ours alone.
                    unsafe { request.buffers.copy_to(buffer.as_ptr()) };
                }
            }
            self.waiting.pop_front();
            self.start(request, started, bounce);
        }
    }

    /// Whether the payload can go to the kernel where it lies.
    fn fits(&self, buffers: &Buffers) -> bool {
        let Some(Alignment { memory, offset }) = self.shared.backing.direct else { return true };
        buffers
            .segments()
            .all(|segment| segment.start.addr() & (memory - 1) == 0 && segment.len & (offset - 1) == 0)
    }

    fn start(&mut self, request: Request, started: Instant, bounce: Option<AlignedBuffer>) {
        let backing = &self.shared.backing;
        let step = match request.operation {
            Operation::Read | Operation::Write { .. } => Step::Transfer,
            Operation::Flush => Step::Sync,
            Operation::Discard => Step::Punch,
            Operation::WriteZeroes { unmap, .. } if backing.can_punch && (unmap || !backing.can_zero) => {
                Step::Punch
            }
            Operation::WriteZeroes { .. } => Step::Zero,
        };
        let iovecs = self.spare_iovecs.pop().unwrap_or_default();
        let key = self.slots.insert(Slot { request, started, step, done: 0, iovecs, bounce });
        self.operate(key);
    }

    /// Submits the operation that the slot's step asks for.
    fn operate(&mut self, key: usize) {
        let Some(slot) = self.slots.get_mut(key) else { return };
        let fd = self.shared.backing.fd();
        let request = slot.request;
        let shift = self.geometry.block_size.shift();
        let offset = request.lba.0 << shift;
        let len = u64::from(request.blocks.0) << shift;
        let op = match slot.step {
            Step::Sync => Op::Fdatasync { fd },
            Step::Punch => Op::Fallocate { fd, mode: PUNCH, offset, len },
            Step::Zero => Op::Fallocate { fd, mode: ZERO, offset, len },
            Step::Allocate => Op::Fallocate { fd, mode: ALLOCATE, offset, len },
            Step::Transfer => {
                let (iovecs, count) = slot_iovecs(slot);
                let offset = offset + slot.done as u64;
                match request.operation {
                    Operation::Write { fua } => Op::Writev { fd, iovecs, count, offset, durable: fua },
                    _ => Op::Readv { fd, iovecs, count, offset },
                }
            }
        };
        // SAFETY: the request's buffers stay until its completion is reaped; iovecs and bounce buffer are the slot's, which
        // is removed only when its operation has completed.
        unsafe { self.runtime.submit(self.id, narrow(key), &op) };
    }

    fn completed(&mut self, key: u32, completed: Completed) {
        let key = key as usize;
        let Some(slot) = self.slots.get_mut(key) else { return };
        let outcome = match completed.into_result() {
            Err(error) => Err(status_of(&error)),
            Ok(got) if slot.step == Step::Transfer => {
                slot.done += got as usize;
                let total = slot.request.buffers.len();
                if slot.done < total {
                    let whole =
                        self.shared.backing.direct.is_none_or(|direct| slot.done % direct.offset == 0);
                    if got > 0 && whole && !self.aborting {
                        self.operate(key);
                        return;
                    }
                    // The end of the file, before the end of the request; or direct I/O that ended within a block.
                    Err(if self.aborting { Status::Aborted } else { Status::Media })
                } else {
                    assert!(slot.done == total, "the kernel moved more bytes than it was asked to");
                    Ok(())
                }
            }
            Ok(_) => Ok(()),
        };
        let can_zero = self.shared.backing.can_zero;
        let next = match outcome {
            Ok(()) => next_step(slot.step, slot.request.operation, can_zero),
            // A block device may lose its command for holes after the kernel has seen it fail; zeroes need none.
            Err(Status::Unsupported)
                if slot.step == Step::Punch && can_zero && slot.request.operation != Operation::Discard =>
            {
                Some(Step::Zero)
            }
            Err(_) => None,
        };
        if let Some(step) = next {
            slot.step = step;
            self.operate(key);
            return;
        }
        let Some(mut slot) = self.slots.remove(key) else { return };
        if let Some(bounce) = slot.bounce.take() {
            if outcome.is_ok() && slot.request.operation == Operation::Read {
                // SAFETY: the request has not ended and is a read; the buffer holds as many bytes, and no operation
                // names it any more.
                unsafe { slot.request.buffers.copy_from(bounce.as_ptr()) };
            }
            self.bounce.give_back(bounce);
        }
        slot.iovecs.clear();
        self.spare_iovecs.push(slot.iovecs);
        self.end(&slot.request, slot.started, outcome);
    }

    fn end(&mut self, request: &Request, started: Instant, outcome: Outcome) {
        let bytes = leaf::bytes_of(&self.geometry, request) as u64;
        self.stats.record(request.operation.into(), bytes, self.runtime.now().ns_since(started), outcome);
        self.push_end(request, outcome);
    }

    fn push_end(&mut self, request: &Request, outcome: Outcome) {
        if self.ended.is_empty() {
            self.runtime.wake(self.user);
        }
        self.ended.push(Completion { token: request.token, outcome });
    }

    /// Moves payload by system calls until this pass has had its bytes; the rest comes in the next pass.
    fn run_in_memory(&mut self) {
        let mut budget = PASS_BYTES;
        let mut tally = Tally::default();
        let mut tally_started = self.runtime.now();
        let mut scratch = self.spare_iovecs.pop().unwrap_or_default();
        while budget > 0 {
            let Some((request, started)) = self.waiting.pop_front() else { break };
            if !request.operation.has_payload() && request.operation != Operation::Flush {
                // Giving space back may take long: on a kernel thread.
                self.start(request, started, None);
                continue;
            }
            let bytes = leaf::bytes_of(&self.geometry, &request);
            let outcome = self.transfer_now(&request, bytes, &mut scratch);
            budget = budget.saturating_sub(bytes);
            if outcome.is_ok() {
                if started != tally_started {
                    tally.record(&self.stats, self.runtime.refresh_now().ns_since(tally_started));
                    tally = Tally::default();
                    tally_started = started;
                }
                tally.add(request.operation, bytes);
                self.push_end(&request, outcome);
            } else {
                self.end(&request, started, outcome);
            }
        }
        self.spare_iovecs.push(scratch);
        tally.record(&self.stats, self.runtime.refresh_now().ns_since(tally_started));
        if !self.waiting.is_empty() {
            self.runtime.wake(self.id);
        }
    }

    /// Reads, writes or syncs a file in memory, here and now.
    fn transfer_now(&self, request: &Request, bytes: usize, scratch: &mut Vec<libc::iovec>) -> Outcome {
        let fd = self.shared.backing.fd().0;
        let begin = request.lba.0 << self.geometry.block_size.shift();
        let mut done = 0;
        loop {
            let (iovecs, count) = iovecs_of(&request.buffers, done, scratch);
            let count = i32::try_from(count).unwrap_or(i32::MAX);
            let offset = i64::try_from(begin + done as u64).map_err(|_| Status::Invalid)?;
            // SAFETY: the iovecs name the request's payload, which is valid until it ends, and writable if it is a read.
            let got = unsafe {
                match request.operation {
                    Operation::Flush => libc::fdatasync(fd) as isize,
                    Operation::Write { fua } => {
                        let flags = if fua { libc::RWF_DSYNC } else { 0 };
                        libc::pwritev2(fd, iovecs, count, offset, flags)
                    }
                    _ => libc::preadv2(fd, iovecs, count, offset, 0),
                }
            };
            match usize::try_from(got) {
                Ok(got) => done += got,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(status_of(&error));
                    }
                    continue;
                }
            }
            if done >= bytes {
                assert!(done == bytes, "the kernel moved more bytes than it was asked to");
                return Ok(());
            }
            if got == 0 {
                return Err(Status::Media);
            }
        }
    }

    fn abort(&mut self) {
        for (request, started) in std::mem::take(&mut self.waiting) {
            self.end(&request, started, Err(Status::Aborted));
        }
        self.aborting = !self.slots.is_empty();
        for (key, _) in self.slots.iter() {
            self.runtime.cancel(self.id, narrow(key));
        }
    }
}

/// What follows a step that went well.
fn next_step(step: Step, operation: Operation, can_zero: bool) -> Option<Step> {
    let Operation::WriteZeroes { unmap, fua } = operation else { return None };
    match step {
        // The space is to stay taken, and the file system cannot zero it in place.
        Step::Punch if !unmap && !can_zero => Some(Step::Allocate),
        Step::Punch | Step::Zero | Step::Allocate if fua => Some(Step::Sync),
        _ => None,
    }
}

/// The iovecs for what is left of a slot's payload.
fn slot_iovecs(slot: &mut Slot) -> (*const libc::iovec, u32) {
    let total = slot.request.buffers.len();
    if let Some(bounce) = &slot.bounce {
        slot.iovecs.clear();
        slot.iovecs.push(libc::iovec {
            iov_base: bounce.as_ptr().wrapping_add(slot.done).cast(),
            iov_len: total - slot.done,
        });
        return (slot.iovecs.as_ptr(), 1);
    }
    iovecs_of(&slot.request.buffers, slot.done, &mut slot.iovecs)
}

/// The iovecs for `buffers` from `done` on, at most as many as one call takes: the payload's own array where it fits.
fn iovecs_of(buffers: &Buffers, done: usize, scratch: &mut Vec<libc::iovec>) -> (*const libc::iovec, u32) {
    if done == 0
        && let Some((iovecs, count)) = buffers.whole_iovecs()
    {
        return (iovecs, count.min(IOVECS_MAX));
    }
    scratch.clear();
    scratch.extend(
        buffers
            .slice(done, buffers.len() - done)
            .segments()
            .take(IOVECS_MAX as usize)
            .map(|segment| libc::iovec { iov_base: segment.start.cast(), iov_len: segment.len }),
    );
    (scratch.as_ptr(), narrow(scratch.len()))
}

fn narrow(value: usize) -> u32 {
    u32::try_from(value).expect("slots and iovecs number far below 2^32")
}

fn status_of(error: &io::Error) -> Status {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Status::NoSpace,
        Some(libc::EROFS | libc::EPERM | libc::EACCES) => Status::ReadOnly,
        Some(libc::EOPNOTSUPP | libc::ENOSYS) => Status::Unsupported,
        // The guest took its memory away.
        Some(libc::EFAULT) => Status::Invalid,
        Some(libc::ECANCELED | libc::EINTR) => Status::Aborted,
        _ => Status::Media,
    }
}
