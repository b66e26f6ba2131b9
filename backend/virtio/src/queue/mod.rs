//! One virtqueue on its reactor: takes chains off the ring, gives requests to the device, shows what has ended.
//!
//! ```text
//! available ring ─ drain ─► Chain ─► Slot (pieces, status byte) ─► Channel::submit     one batch
//! used ring ◄─ publish ─ status byte, used element, log ◄─ Channel::reap               one used.idx, one interrupt
//! ```
//!
//! Must not know messages or sockets. Invariants:
//! - A head is in flight at most once; its slot keeps the pieces until the request has ended.
//! - The epoch of memory that a slot's pieces point into is owned until the slot has ended, whatever the front end does.
//! - Nothing is allocated per request. The order of stores is the in-flight log's ([`crate::inflight`]).

mod control;
mod marks;
mod requests;
mod setup;

pub(crate) use setup::QueueSetup;

use crate::blk::VirtioStatus;
use crate::chain::Chain;
use crate::counters::QueueCounters;
use crate::crash::{Recorder, Replay};
use crate::dirty::Marks;
use crate::disk::DiskShared;
use crate::fault;
use crate::gate::Gate;
use crate::inflight::{QueueLog, Unfinished};
use crate::interrupt::Interrupt;
use crate::memory::GuestMemory;
use crate::ring::{DESCRIPTOR_BYTES, Descriptor, FLAG_INDIRECT, Ring, prefetch};
use crate::session::SessionShared;
use crate::shared;
use hawser_block::{Channel, Completion, IoKind, IoStats, Outcome, Request, Status};
use hawser_runtime::{Event, Fd, Instant, Runtime, Source, SourceId};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// Pieces that lie in the slot itself; longer lists go to the queue's overflow area.
const PIECES_INLINE: usize = 6;
const KEY_KICK: u32 = 0;
/// How long an interrupt may wait for more to end. Waking a driver on another CPU costs us up to 16 µs in a virtual machine,
/// however many requests it is for: held so, `nvme+tcp:` 4k reads at depth 32 gain 1.1 to 1.2; depth 1 is never held.
const HOLD_NS: u64 = 5_000;
/// How long few new requests wait for more while others are at the device, and how many are not few. A driver gives what it
/// gives in a few microseconds; a batch costs two system calls and, with a target on this CPU, two switches of process: joined
/// so, `nvme+tcp:` 4k at depth 32 costs 0.91 of the CPU time, and at depth 8, where the wait always runs its time, 0.94 with 1.04
/// to 1.09 of the IOPS. A driver whose last batch was of one request never waits.
const JOIN_NS: u64 = 5_000;
const JOIN_REQUESTS: u16 = 16;
/// Chains that one turn takes off a ring; the rest waits until the reactor's other queues have had theirs. 128 is what a ring
/// of Linux's holds by default, so that its batches stay whole.
const TURN_CHAINS: u16 = 128;
/// Descriptors that one turn walks, for chains may be long: at most this and one chain more
/// ([`crate::chain::DESCRIPTORS_MAX`]), 4351 cache misses at worst, some 0.4 ms.
const TURN_DESCRIPTORS: u32 = 4096;
/// Payload that may be in flight before a queue takes nothing more: 16 of the largest requests that drivers make (4 MiB), or
/// four of the largest that we serve. A ring of 1024 chains that all name the same 16 MiB would else cost the device 16 GiB.
const BYTES_IN_FLIGHT: u64 = 64 << 20;
/// Chains that are fetched ahead of the first one's parsing.
const PREFETCH: u16 = 32;

/// A request that is being executed, by its head.
struct Slot {
    status: *mut u8,
    started: Instant,
    bytes: u32,
    used_len: u32,
    /// Operations of the device that have not ended.
    pending: u32,
    pieces: u16,
    generation: u32,
    kind: IoKind,
    busy: bool,
    /// The session waits for its end.
    awaited: bool,
    outcome: Outcome,
    inline: [libc::iovec; PIECES_INLINE],
}

impl Slot {
    /// Bytes of guest memory that it moves. Those of a discard or write-zeroes are only a length.
    #[inline]
    fn payload(&self) -> u64 {
        match self.kind {
            IoKind::Read | IoKind::Write => u64::from(self.bytes),
            IoKind::Flush | IoKind::Discard | IoKind::WriteZeroes => 0,
        }
    }
}

const NO_PIECE: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// An epoch of memory that is not the current one any more, kept for the requests that point into it.
struct OldMemory {
    generation: u32,
    in_flight: usize,
    memory: Arc<GuestMemory>,
}

/// How a queue ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stopped {
    /// Where the driver's next chain will be.
    pub(crate) next_available: u16,
    /// Requests that were given up and stay in the in-flight log.
    pub(crate) left_in_log: bool,
}

/// A virtqueue at work.
pub(crate) struct Queue {
    key: u64,
    id: Option<SourceId>,
    index: u16,
    ring: Ring,
    memory: Arc<GuestMemory>,
    old_memory: Vec<OldMemory>,
    generation: u32,
    kick: Option<OwnedFd>,
    kick_armed: bool,
    interrupt: Interrupt,
    event_idx: bool,
    indirect: bool,
    flush: bool,
    /// The driver was told not to kick.
    silent: bool,
    log: Option<QueueLog>,
    /// While the front end logs what is written.
    marks: Option<Marks>,
    replay: VecDeque<Unfinished>,
    replaying: bool,
    open: bool,
    next_available: u16,
    next_used: u16,
    published: u16,
    /// What was published when the driver's wish for an interrupt was last looked at and settled.
    signalled: u16,
    /// Since when an interrupt is held back.
    held_since: Option<Instant>,
    /// Since when few new requests wait for more.
    joining_since: Option<Instant>,
    /// The last drain took more than one request: the driver has more to do than to wait for this one.
    deep: bool,
    /// The driver may have missed an interrupt of our predecessor's.
    owes_interrupt: bool,
    /// Counts requests where there is no log that does.
    counter: u64,
    slots: Vec<Slot>,
    /// [`crate::chain::PIECES_MAX`] for each head. Pages that were never used cost nothing.
    overflow: Box<[libc::iovec]>,
    in_flight: usize,
    /// Payload of the requests in flight.
    bytes_in_flight: u64,
    chain: Chain,
    requests: Vec<Request>,
    ended: Vec<Completion>,
    batch: Vec<u16>,
    channel: Option<Box<dyn Channel>>,
    stats: Arc<IoStats>,
    gate: Arc<Gate>,
    disk: Arc<DiskShared>,
    session: Arc<SessionShared>,
    recorder: Recorder,
    /// Stands while there is anything to replay.
    replay_noted: Option<Replay>,
    faults: u64,
    failed: bool,
    aborting: bool,
    /// Nobody's any more: what still ends is not shown to anybody ([`Queue::disown`]).
    disowned: bool,
    left_in_log: bool,
    stopping: Option<Sender<Stopped>>,
    /// It stops, but not before everything is replayed.
    replay_all: bool,
    awaited: usize,
    awaited_ended: Option<Sender<()>>,
}

/// The queues of one reactor, by key, for messages from sessions.
#[derive(Default)]
struct Queues(RefCell<HashMap<u64, Rc<RefCell<Queue>>>>);

/// Runs `act` on the queue `key` of this reactor, if it is there.
pub(crate) fn with_queue(runtime: &Runtime, key: u64, act: impl FnOnce(&mut Queue, &Runtime)) {
    let queue = runtime.local::<Queues>().0.borrow().get(&key).cloned();
    if let Some(queue) = queue {
        act(&mut queue.borrow_mut(), runtime);
    }
}

impl Queue {
    fn id(&self) -> SourceId {
        self.id.expect("set by `start` before anything happens")
    }

    fn counters(&self) -> &QueueCounters {
        &self.disk.counters[usize::from(self.index)]
    }

    /// Ends the session: the guest, or its front end, broke the ring.
    fn fail(&mut self, what: &str) {
        if !self.failed {
            self.failed = true;
            self.session.end(self.index, what);
        }
    }

    fn takes_requests(&self) -> bool {
        self.open && !self.replaying && !self.failed && self.stopping.is_none() && !self.is_full()
    }

    /// Whether unfinished requests of the log go on being executed again.
    fn replays(&self) -> bool {
        let goes_on = self.stopping.is_none() || (self.replay_all && !self.aborting && !self.disowned);
        goes_on && !self.failed
    }

    /// Takes nothing before something ends, which wakes it.
    fn is_full(&self) -> bool {
        self.bytes_in_flight >= BYTES_IN_FLIGHT
    }

    /// One turn: what has ended, what is new, what of that has ended at once; then it is shown.
    fn work(&mut self, runtime: &Runtime) {
        self.recorder.queue();
        self.reap(runtime);
        if self.replaying {
            self.replay_next(runtime);
        }
        if self.takes_requests() && !self.waits_for_more(runtime) {
            self.drain(runtime);
        }
        self.publish(runtime);
        self.recorder.idle();
        self.look_for_faults();
        if self.stopping.is_some() {
            self.finish_if_idle(runtime);
        }
    }

    /// Whether the driver is likely to be adding to a batch that has just begun ([`JOIN_NS`]). The reactor keeps looking.
    #[inline]
    fn waits_for_more(&mut self, runtime: &Runtime) -> bool {
        let new = self.ring.available_idx().wrapping_sub(self.next_available);
        if new == 0 || new >= JOIN_REQUESTS || self.in_flight == 0 || !self.deep {
            self.joining_since = None;
            return false;
        }
        let now = runtime.now();
        now.ns_since(*self.joining_since.get_or_insert(now)) < JOIN_NS
    }

    fn look_for_faults(&mut self) {
        let faults = fault::count();
        if faults == self.faults {
            return;
        }
        self.faults = faults;
        if self.memory.faulted() {
            self.fail("the front end truncated its memory under us");
        } else if self.log.as_ref().is_some_and(QueueLog::faulted) {
            self.fail("the front end truncated the in-flight log under us");
        } else if self.marks.as_ref().is_some_and(|marks| marks.log.faulted()) {
            self.fail("the front end truncated the log of dirty pages under us");
        }
    }

    /// Takes new chains off the ring, a turn's worth, and gives them to the device. What is left is seen by [`Source::peek`].
    fn drain(&mut self, runtime: &Runtime) {
        let new = self.ring.available_idx().wrapping_sub(self.next_available);
        if new == 0 {
            return;
        }
        if new > self.ring.size() {
            self.fail(&format!(
                "avail.idx is {new} beyond what was taken, in a ring of {}",
                self.ring.size()
            ));
            return;
        }
        self.deep = new > 1;
        self.joining_since = None;
        let limits = self.disk.limits(self.flush);
        let started = runtime.now();
        let (first, first_counter) = (self.next_available, self.next_counter());
        let new = new.min(TURN_CHAINS);
        let mut descriptors = 0;
        for step in 0..new {
            if descriptors >= TURN_DESCRIPTORS || self.is_full() {
                break;
            }
            if step.is_multiple_of(PREFETCH) {
                self.prefetch((new - step).min(PREFETCH));
            }
            let head = self.ring.available_head(self.next_available);
            if head >= self.ring.size() {
                self.fail(&format!("avail.ring names descriptor {head} in a table of {}", self.ring.size()));
                break;
            }
            if self.slots[usize::from(head)].busy {
                self.fail(&format!("avail.ring names descriptor {head}, which is in flight"));
                break;
            }
            self.recorder.request(head, self.next_counter());
            if let Err(what) = self.begin(head, started, &limits, true) {
                self.fail(&format!("chain at descriptor {head}: {what}"));
                break;
            }
            descriptors += self.chain.descriptors();
            self.next_available = self.next_available.wrapping_add(1);
        }
        let counters = self.counters();
        counters.batches.add(1);
        counters.requests.add(u64::from(self.next_available.wrapping_sub(first)));
        self.recorder.batch(first_counter, self.next_counter().wrapping_sub(1));
        self.submit();
        self.reap(runtime);
    }

    /// Brings the next `count` chains closer, in three turns so that the misses of one turn overlap: descriptors, what they
    /// name (a header or an indirect table), the headers of indirect chains. Every line comes from the driver's core.
    #[inline]
    fn prefetch(&self, count: u16) {
        let heads = |index: u16| {
            self.ring.available_head(self.next_available.wrapping_add(index)) & (self.ring.size() - 1)
        };
        for index in 0..count {
            self.ring.prefetch_descriptor(heads(index));
        }
        let mut tables = [std::ptr::null::<u8>(); PREFETCH as usize];
        let mut found = 0;
        for index in 0..count {
            let descriptor = self.ring.descriptor(heads(index));
            let Some(at) = self.memory.contiguous(descriptor.address, DESCRIPTOR_BYTES) else { continue };
            prefetch(at);
            if descriptor.flags & FLAG_INDIRECT != 0 {
                tables[found] = at;
                found += 1;
            }
        }
        for table in &tables[..found] {
            // SAFETY: 16 bytes in mapped guest memory (`contiguous`), copied out.
            let first = Descriptor::from_bytes(unsafe { table.cast::<[u8; 16]>().read_volatile() });
            if let Some(at) = self.memory.contiguous(first.address, 1) {
                prefetch(at);
            }
        }
    }

    /// Executes unfinished requests of the log again: one at a time, so that a crash names the one.
    fn replay_next(&mut self, runtime: &Runtime) {
        while self.in_flight == 0 && self.replays() {
            let Some(unfinished) = self.replay.pop_front() else {
                self.replaying = false;
                self.replay_noted = None;
                self.gate.set_unfinished(self.index, false);
                return;
            };
            let limits = self.disk.limits(self.flush);
            self.recorder.request(unfinished.head, unfinished.counter);
            if let Some(noted) = &self.replay_noted {
                noted.begin(unfinished.head, unfinished.counter);
            }
            if let Err(what) = self.begin(unfinished.head, runtime.now(), &limits, false) {
                self.fail(&format!("chain at descriptor {}, executed again: {what}", unfinished.head));
                return;
            }
            self.counters().replayed.add(1);
            self.submit();
            self.reap(runtime);
        }
    }

    fn submit(&mut self) {
        if let Some(channel) = self.channel.as_mut().filter(|_| !self.requests.is_empty()) {
            channel.submit(&mut self.requests);
        }
    }

    fn next_counter(&self) -> u64 {
        self.log.as_ref().map_or(self.counter, QueueLog::next_counter)
    }

    /// Takes what has ended.
    fn reap(&mut self, runtime: &Runtime) {
        let Some(channel) = &mut self.channel else { return };
        channel.reap(&mut self.ended);
        if self.ended.is_empty() {
            return;
        }
        let now = runtime.refresh_now();
        let mut ended = std::mem::take(&mut self.ended);
        for Completion { token, outcome } in ended.drain(..) {
            let head = u16::try_from(token.0).expect("a channel gives back the tokens that it was given");
            let slot = &mut self.slots[usize::from(head)];
            slot.pending = slot.pending.checked_sub(1).expect("a request ends once");
            if slot.outcome.is_ok() {
                slot.outcome = outcome;
            }
            if slot.pending > 0 {
                continue;
            }
            let outcome = slot.outcome;
            self.stats.record(slot.kind, u64::from(slot.bytes), now.ns_since(slot.started), outcome);
            if self.disowned {
                self.release(head);
            } else if self.aborting && outcome == Err(Status::Aborted) && self.log.is_some() {
                // Stays in the log, for the next session to execute it again. Part of its data may have come.
                self.mark_request(head);
                self.left_in_log = true;
                self.release(head);
            } else {
                self.show(head, outcome.into());
            }
        }
        self.ended = ended;
    }

    /// Writes the status byte and the used element. The driver sees them at the next [`Queue::publish`].
    #[inline]
    fn show(&mut self, head: u16, status: VirtioStatus) {
        let slot = &self.slots[usize::from(head)];
        // SAFETY: one byte in mapped guest memory of an epoch that is owned while the slot is busy.
        unsafe { shared::store_u8(slot.status, status as u8) };
        let used_len = slot.used_len;
        if self.marks.is_some() {
            self.mark_request(head);
        }
        self.ring.put_used(self.next_used, head, used_len);
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(log) = &self.log {
            log.end(head);
            self.batch.push(head);
        }
        self.release(head);
    }

    /// The slot is free, and so is its hold on memory.
    #[inline]
    fn release(&mut self, head: u16) {
        let slot = &mut self.slots[usize::from(head)];
        slot.busy = false;
        self.in_flight -= 1;
        self.bytes_in_flight -= slot.payload();
        if slot.generation != self.generation {
            let generation = slot.generation;
            if let Some(place) = self.old_memory.iter().position(|old| old.generation == generation) {
                self.old_memory[place].in_flight -= 1;
                if self.old_memory[place].in_flight == 0 {
                    self.session.retire(self.old_memory.swap_remove(place).memory);
                }
            }
        }
        self.awaited -= usize::from(std::mem::take(&mut slot.awaited));
    }

    /// Shows the driver everything that has ended, and interrupts it if it wants that.
    #[inline]
    fn publish(&mut self, runtime: &Runtime) {
        if self.published != self.next_used {
            self.show_used();
            if let Some(log) = &self.log {
                log.published(&self.batch, self.published);
                self.batch.clear();
            }
        }
        self.notify(runtime);
        if self.awaited == 0
            && let Some(free) = self.awaited_ended.take()
        {
            // The session may have stopped waiting.
            let _ = free.send(());
        }
    }

    /// Interrupts the driver if it wants that for what was published since it was last asked, or holds the interrupt back
    /// for [`HOLD_NS`] where more is likely to come. A held one is looked at in every pass, and is sent before the reactor sleeps.
    #[inline]
    fn notify(&mut self, runtime: &Runtime) {
        let (old, new) = (self.signalled, self.published);
        let wanted = old != new && self.ring.wants_interrupt(self.event_idx, old, new);
        let more_to_come = (self.deep || self.in_flight > 0) && self.takes_requests();
        if wanted && more_to_come && !self.owes_interrupt && !self.is_working() {
            let now = runtime.now();
            if now.ns_since(*self.held_since.get_or_insert(now)) < HOLD_NS {
                return;
            }
        }
        self.signalled = new;
        self.held_since = None;
        if wanted || std::mem::take(&mut self.owes_interrupt) {
            self.interrupt();
        }
    }

    /// The device ends the rest in this thread: the driver's wake-up takes place beside that.
    fn is_working(&self) -> bool {
        self.channel.as_ref().is_some_and(|channel| channel.is_working())
    }

    fn interrupt(&mut self) {
        if self.interrupt.is_set() {
            self.counters().interrupts.add(1);
            self.interrupt.signal();
        }
    }
}

impl Source for Queue {
    fn poll(&mut self, runtime: &Runtime, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            let Event::Op { key: KEY_KICK, completed } = event else { continue };
            self.counters().kicks.add(1);
            if completed.more {
                continue;
            }
            // The kernel ends a poll when it is cancelled, or when it had no room for an event.
            self.kick_armed = self.stopping.is_none();
            if let Some(kick) = self.kick.as_ref().filter(|_| self.stopping.is_none()) {
                runtime.poll_readable(self.id(), KEY_KICK, Fd(kick.as_raw_fd()));
            }
        }
        if !self.silent {
            self.silent = true;
            self.ring.ask_for_silence(self.event_idx);
            if !self.event_idx {
                self.mark_used(self.ring.used_wish(false));
            }
        }
        self.work(runtime);
    }

    fn peek(&mut self) -> bool {
        self.held_since.is_some()
            || (self.takes_requests() && self.ring.available_idx() != self.next_available)
    }

    fn arm(&mut self) -> bool {
        if self.held_since.take().is_some() {
            self.signalled = self.published;
            self.interrupt();
        }
        if !self.takes_requests() {
            return false;
        }
        self.silent = false;
        let more = self.ring.ask_for_kick(self.event_idx, self.next_available);
        self.mark_used(self.ring.used_wish(self.event_idx));
        more || self.kick.is_none()
    }
}
