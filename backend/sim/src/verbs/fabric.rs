//! What the table's functions act on: ends, queue pairs, windows, and the network between them.
//!
//! Owns: the order in which requests are carried out, and what may go wrong on the way. Must not know: who posts them.
//!
//! ```text
//!   post ─► Posted ──► Going ──► (carried out at the other end) ──► Back ──► a completion
//!              │          └─ on its way, which outlives its queue pair (Loose)
//!              └─ local: windows are bound and keys invalidated, in the queue's order
//! ```
//!
//! Kept as devices keep it: requests of a queue are carried out and complete in order, and so do receives; keys are looked at with their
//! place, length and access when a message arrives; a queue in error completes what it has as flushed, and lets nobody in; what a queue
//! uses is not touched once it is closed, and no more is posted than it was made for.
//!
//! With a clock (in a [`crate::World`]) everything takes its time, drawn from the seed; without one, all is done as it is posted.

use crate::net::{Side, Sides};
use crate::random::Random;
use hawser_runtime::Instant;
use hawser_verbs_abi::{
    CmEvent, ConnectParameters, Id, QueueSize, ReceiveRequest, STATUS_FLUSHED, Segment, SendRequest,
    WorkCompletion, event, operation,
};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// `ibv_wc_status`.
pub(super) const PROTECTION: u32 = 4;
pub(super) const BIND: u32 = 6;
pub(super) const ACCESS: u32 = 10;
pub(super) const RETRIES: u32 = 12;
/// How long a device repeats a request that nobody acknowledges.
pub(super) const RETRIES_FOR: Duration = Duration::from_secs(3);
/// How long rdma_cm does: 15 times (CMA_MAX_CM_RETRIES), 4.3 s apart (CMA_CM_RESPONSE_TIMEOUT). Whoever has less patience gives up himself.
const CONNECT_FOR: Duration = Duration::from_secs(64);
/// What a step of a message takes at most.
pub(super) const STEP_NS_MAX: u64 = 30_000;
/// Descriptors of this world, which are none of the process's.
pub(crate) const FD_BASE: i32 = 1 << 29;
/// Directions of a queue pair.
pub(super) const SENDS: usize = 0;
pub(super) const RECEIVES: usize = 1;
/// Names of windows are told from keys of regions by this bit.
const WINDOW_BIT: u32 = 1 << 31;

/// The completion of a request that is not carried out any more, or not known to be.
pub(super) fn flushed(user: u64) -> WorkCompletion {
    WorkCompletion { user, status: STATUS_FLUSHED, ..WorkCompletion::NONE }
}

/// Registered memory. It is the process's, as address space is: worlds share it.
#[derive(Clone, Copy)]
pub(super) struct Registered {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) access: u32,
}

impl Registered {
    pub(super) fn has(&self, start: u64, len: u64) -> bool {
        start >= self.start && len <= self.len && start - self.start <= self.len - len
    }
}

static REGIONS: Mutex<BTreeMap<u64, Registered>> = Mutex::new(BTreeMap::new());
static LAST_REGION: AtomicU64 = AtomicU64::new(0);

pub(super) fn regions() -> MutexGuard<'static, BTreeMap<u64, Registered>> {
    REGIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn next_region() -> u64 {
    LAST_REGION.fetch_add(1, Ordering::Relaxed) + 1
}

#[derive(Default)]
pub(super) struct Channel {
    pub(super) fd: i32,
    pub(super) events: VecDeque<(Instant, CmEvent)>,
    /// The reactor that waits for it.
    pub(super) owner: Option<usize>,
}

pub(super) struct End {
    pub(super) channel: u64,
    pub(super) queue: u64,
    pub(super) peer: u64,
    /// The target's address, of either end; a listener's own.
    pub(super) address: Option<SocketAddr>,
    pub(super) side: Side,
    pub(super) is_listener: bool,
    /// Nothing arrives here before.
    pub(super) held: Instant,
}

impl End {
    pub(super) fn new(channel: u64) -> End {
        let held = Instant::default();
        End { channel, queue: 0, peer: 0, address: None, side: Side::Host, is_listener: false, held }
    }
}

/// What a window stands for.
#[derive(Clone, Copy)]
pub(super) struct Bound {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) access: u32,
    pub(super) queue: u64,
}

pub(super) struct Window {
    pub(super) key: u32,
    pub(super) bound: Option<Bound>,
}

pub(super) struct Pair {
    pub(super) id: u64,
    pub(super) fd: i32,
    pub(super) size: QueueSize,
    pub(super) receives: VecDeque<ReceiveRequest>,
    pub(super) works: VecDeque<Work>,
    /// And whether they are of sends.
    pub(super) completions: VecDeque<(bool, WorkCompletion)>,
    /// Completions that come later: of sends, and of receives.
    pub(super) late: [VecDeque<WorkCompletion>; 2],
    /// Keys that are dead when these requests have completed, and not before.
    pub(super) dying: HashMap<u64, u32>,
    pub(super) failed: bool,
    pub(super) armed: bool,
}

pub(super) struct Work {
    pub(super) request: SendRequest,
    pub(super) segments: Vec<Segment>,
    pub(super) state: Progress,
}

pub(super) enum Progress {
    Posted(Instant),
    /// On its way since, to arrive at.
    Going(Instant, Instant, Vec<u8>),
    /// Done, with this `ibv_wc_status`, which is known when it is so late.
    Back(Instant, Instant, u32, Vec<u8>),
}

/// A message whose sender is not there any more.
pub(super) struct Loose {
    pub(super) to: u64,
    pub(super) arrives: Instant,
    request: SendRequest,
    bytes: Vec<u8>,
}

/// How often what happens: one in so many; 0: never.
#[derive(Clone, Copy, Default)]
pub struct Disturbance {
    /// A completion comes later than it could.
    pub late: u64,
    /// A request breaks its connection.
    pub breaks: u64,
    /// An answer that was to invalidate a key does not.
    pub keeps_keys: u64,
}

/// What a host lacks, or a target says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// There is no device.
    Device,
    /// It is there, and cannot be opened.
    Access,
    /// Its link is down.
    Link,
    /// It is on another network.
    Network,
    /// It has no windows of type 2B.
    Windows,
    /// It has no queue pair left.
    Queues,
    /// It has no window left.
    WindowsLeft,
    /// It has no registrations left (`ENOSPC`), or may lock no more memory (`ENOMEM`).
    Registrations(i32),
    /// No route is found.
    Route,
    /// The other end does not let anybody in, for this reason.
    Rejected(i32),
    /// The other end lets everybody in, and says what no NVMe target says.
    Stranger,
}

/// What was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections that were broken.
    pub breaks: u64,
    /// Requests that completed as flushed.
    pub flushed: u64,
    /// Accesses that were refused for their key.
    pub refused: u64,
    /// Messages that arrived when whoever had sent them was not there any more.
    pub ghosts: u64,
    /// Messages that found no receive at a host.
    pub starved: u64,
}

// SAFETY: pointers in it are handles or addresses, which are looked up or used under its lock.
unsafe impl Send for Fabric {}

pub(super) struct Fabric {
    /// With a clock.
    pub(super) is_timed: bool,
    pub(super) now: Instant,
    pub(super) random: Random,
    pub(super) last: u64,
    pub(super) channels: BTreeMap<u64, Channel>,
    pub(super) ends: BTreeMap<u64, End>,
    pub(super) windows: BTreeMap<u64, Window>,
    pub(super) pairs: BTreeMap<u64, Pair>,
    /// Handles of processes that were killed.
    pub(super) dead: BTreeSet<u64>,
    pub(super) loose: Vec<Loose>,
    pub(super) silences: Vec<(SocketAddr, Sides, Instant)>,
    pub(super) down: BTreeSet<SocketAddr>,
    pub(super) lost_ends_permille: u64,
    pub(super) signalled: BTreeSet<i32>,
    pub(super) connects: Vec<(SocketAddr, Instant)>,
    /// Something was posted or has changed.
    pub(super) changed: bool,
    /// When something happens next.
    pub(super) due: Instant,
    pub(super) disturbance: Disturbance,
    pub(super) denied: Option<Denied>,
    /// How often the device was replaced.
    pub(super) replaced: usize,
    pub(super) domains: usize,
    pub(super) counts: Counts,
}

impl Fabric {
    pub(super) fn new(is_timed: bool, seed: u64) -> Fabric {
        Fabric {
            is_timed,
            now: Instant::default(),
            random: Random::new(seed),
            last: 0,
            channels: BTreeMap::new(),
            ends: BTreeMap::new(),
            windows: BTreeMap::new(),
            pairs: BTreeMap::new(),
            dead: BTreeSet::new(),
            loose: Vec::new(),
            silences: Vec::new(),
            down: BTreeSet::new(),
            lost_ends_permille: 0,
            signalled: BTreeSet::new(),
            connects: Vec::new(),
            changed: false,
            due: Instant::NEVER,
            disturbance: Disturbance::default(),
            denied: None,
            replaced: 0,
            domains: 0,
            counts: Counts::default(),
        }
    }

    pub(super) fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    pub(super) fn one_in(&mut self, count: u64) -> bool {
        count > 0 && self.random.below(count) == 0
    }

    /// Some time from now, at most so much.
    pub(super) fn soon(&mut self, ns_max: u64) -> Instant {
        if !self.is_timed {
            return self.now;
        }
        self.now + Duration::from_nanos(self.random.below(ns_max) + 1)
    }

    /// A descriptor that becomes readable when it is signalled.
    pub(super) fn descriptor(&mut self, number: u64) -> i32 {
        if self.is_timed {
            return FD_BASE + i32::try_from(number).unwrap_or(0);
        }
        // SAFETY: plain system call.
        unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }
    }

    pub(super) fn signal(&mut self, fd: i32) {
        if self.is_timed {
            self.signalled.insert(fd);
            return;
        }
        let one = 1u64;
        // SAFETY: eight readable bytes, and a descriptor of ours.
        unsafe { libc::write(fd, (&raw const one).cast(), 8) };
    }

    pub(super) fn clear(&mut self, fd: i32) {
        if self.is_timed {
            self.signalled.remove(&fd);
            return;
        }
        let mut value = 0u64;
        // SAFETY: eight writable bytes, and a descriptor of ours.
        unsafe { libc::read(fd, (&raw mut value).cast(), 8) };
    }

    pub(super) fn close_descriptor(&mut self, fd: i32) {
        self.signalled.remove(&fd);
        if !self.is_timed {
            // SAFETY: ours, once.
            unsafe { libc::close(fd) };
        }
    }

    /// An event for this end, soon or at that time.
    pub(super) fn tell(
        &mut self,
        id: u64,
        (kind, status): (u32, i32),
        parameters: Option<&ConnectParameters>,
        at: Option<Instant>,
    ) {
        let at = at.unwrap_or_else(|| self.soon(300_000));
        let Some(end) = self.ends.get(&id) else { return };
        let at = if end.peer != 0 && kind != event::CONNECT_REQUEST { at.max(end.held) } else { at };
        let mut event = CmEvent { kind, status, id: id as *mut Id, ..CmEvent::NONE };
        if let Some(parameters) = parameters {
            let len = usize::from(parameters.private_len);
            // SAFETY: the caller of the table gives so many bytes.
            unsafe { std::ptr::copy_nonoverlapping(parameters.private, event.private.as_mut_ptr(), len) };
            // As rdma_cm, which fills up.
            event.private_len = parameters.private_len + 24;
            event.responder_resources = parameters.initiator_depth;
            event.initiator_depth = parameters.responder_resources;
        }
        if let Some(channel) = self.channels.get_mut(&end.channel) {
            let place = channel.events.partition_point(|(other, _)| *other <= at);
            channel.events.insert(place, (at, event));
            let fd = channel.fd;
            self.changed = true;
            if at <= self.now {
                self.signal(fd);
            }
        }
    }

    /// Until when nothing arrives at this side of a connection to `address`.
    pub(super) fn silent_until(&self, address: Option<SocketAddr>, side: Side) -> Instant {
        let silences = self.silences.iter().filter(|(at, sides, _)| Some(*at) == address && sides.has(side));
        silences.map(|(.., until)| *until).max().unwrap_or_default()
    }

    /// When something that is sent now from this end to the other gets there.
    pub(super) fn arrival(&mut self, from: u64) -> Instant {
        let soon = self.soon(300_000);
        let Some(end) = self.ends.get(&from) else { return soon };
        let (peer, address) = (end.peer, end.address);
        let Some(other) = self.ends.get(&peer) else { return soon };
        soon.max(other.held).max(self.silent_until(address, other.side))
    }

    /// By when something that is sent now is given up.
    pub(super) fn patience(&self) -> Instant {
        self.now + CONNECT_FOR
    }

    pub(super) fn complete(&mut self, queue: u64, direction: usize, completion: WorkCompletion) {
        let late = self.disturbance.late;
        let is_late = self.one_in(late);
        let Some(pair) = self.pairs.get_mut(&queue) else { return };
        if !pair.failed && (is_late || !pair.late[direction].is_empty()) {
            pair.late[direction].push_back(completion);
        } else {
            pair.completions.push_back((direction == SENDS, completion));
        }
        if std::mem::take(&mut pair.armed) {
            let fd = pair.fd;
            self.signal(fd);
        }
    }

    /// Puts a queue into error: what it has completes as flushed. What is on its way may still arrive.
    pub(super) fn fail(&mut self, queue: u64) {
        let to = self.peer_queue(queue);
        let Some(pair) = self.pairs.get_mut(&queue) else { return };
        if std::mem::replace(&mut pair.failed, true) {
            return;
        }
        for direction in [SENDS, RECEIVES] {
            let late = std::mem::take(&mut pair.late[direction]);
            pair.completions.extend(late.into_iter().map(|completion| (direction == SENDS, completion)));
        }
        let (works, receives) = (std::mem::take(&mut pair.works), std::mem::take(&mut pair.receives));
        self.counts.flushed += (works.len() + receives.len()) as u64;
        pair.completions.extend(works.iter().map(|work| (true, flushed(work.request.user))));
        pair.completions.extend(receives.iter().map(|receive| (false, flushed(receive.user))));
        if std::mem::take(&mut pair.armed) {
            let fd = pair.fd;
            self.signal(fd);
        }
        let Some(to) = to.filter(|_| self.is_timed) else { return };
        // Packets are numbered: what comes behind one that is lost is not taken.
        for work in works {
            let Progress::Going(_, arrives, bytes) = work.state else { continue };
            if !self.random.chance(700) {
                break;
            }
            if work.request.operation != operation::READ {
                self.loose.push(Loose { to, arrives, request: work.request, bytes });
                self.changed = true;
            }
        }
    }

    pub(super) fn peer_queue(&self, queue: u64) -> Option<u64> {
        let peer = self.ends.get(&self.pairs.get(&queue)?.id)?.peer;
        let queue = self.ends.get(&peer)?.queue;
        self.pairs.get(&queue).filter(|pair| !pair.failed).map(|_| queue)
    }

    pub(super) fn window_of(&mut self, key: u32) -> Option<&mut Window> {
        let number = u64::from((key & !WINDOW_BIT) >> 8);
        self.windows.get_mut(&number).filter(|window| window.key == key)
    }

    /// The first name of a window.
    pub(super) fn window_name(number: u64) -> u32 {
        WINDOW_BIT | u32::try_from(number).expect("few windows") << 8
    }

    /// Whether a peer may do this to the memory of `queue`'s owner.
    pub(super) fn may(&mut self, queue: u64, key: u32, (start, len): (u64, u64), wanted: u32) -> bool {
        let inside = |from: u64, size: u64| start >= from && len <= size && start - from <= size - len;
        let may = match key & WINDOW_BIT {
            0 => {
                regions().get(&u64::from(key)).is_some_and(|it| it.access & wanted != 0 && it.has(start, len))
            }
            _ => self.window_of(key).and_then(|window| window.bound).is_some_and(|bound| {
                bound.queue == queue && bound.access & wanted != 0 && inside(bound.start, bound.len)
            }),
        };
        self.counts.refused += u64::from(!may);
        may
    }

    /// Moves on all that can move on by now.
    pub(super) fn progress(&mut self, now: Instant) {
        self.now = now;
        if !self.changed && now < self.due {
            return;
        }
        self.changed = false;
        self.silences.retain(|(.., until)| *until > now);
        loop {
            let mut moved = self.land();
            let numbers: Vec<u64> = self.pairs.keys().copied().collect();
            for number in numbers {
                while self.step(number) {
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        let told: Vec<i32> = self
            .channels
            .values()
            .filter(|channel| self.is_timed && channel.events.front().is_some_and(|(at, _)| *at <= now))
            .map(|channel| channel.fd)
            .collect();
        for fd in told {
            self.signal(fd);
        }
        self.changed = false;
        self.due = self.next_due();
    }

    /// What has no sender any more arrives.
    pub(super) fn land(&mut self) -> bool {
        let now = self.now;
        // In the order in which it was sent.
        let is_first =
            |index: usize, to: u64| self.loose.iter().position(|loose| loose.to == to) == Some(index);
        let due = |(index, loose): (usize, &Loose)| loose.arrives <= now && is_first(index, loose.to);
        let Some(index) = self.loose.iter().enumerate().position(due) else { return false };
        let Loose { to, request, bytes, .. } = self.loose.remove(index);
        if self.pairs.get(&to).is_some_and(|pair| !pair.failed) {
            self.counts.ghosts += 1;
            let _ = self.arrive(to, &request, &bytes, &[]);
        }
        true
    }

    fn next_due(&self) -> Instant {
        let now = self.now;
        let mut due = Instant::NEVER;
        let mut at = |time: Instant| {
            if time > now {
                due = due.min(time);
            }
        };
        self.loose.iter().for_each(|loose| at(loose.arrives));
        self.silences.iter().for_each(|(.., until)| at(*until));
        for channel in self.channels.values() {
            channel.events.front().into_iter().for_each(|(when, _)| at(*when));
        }
        for pair in self.pairs.values() {
            for work in &pair.works {
                match &work.state {
                    Progress::Posted(when) => at(*when),
                    Progress::Going(since, when, _) | Progress::Back(since, when, ..) => {
                        at(*when);
                        at(*since + RETRIES_FOR);
                    }
                }
            }
        }
        due
    }
}
