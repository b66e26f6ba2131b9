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
    WorkCompletion, access, event, operation,
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
const RETRIES_FOR: Duration = Duration::from_secs(3);
/// How long rdma_cm does.
const CONNECT_FOR: Duration = Duration::from_secs(4);
/// What a step of a message takes at most.
pub(super) const STEP_NS_MAX: u64 = 30_000;
/// Descriptors of this world, which are none of the process's.
pub(crate) const FD_BASE: i32 = 1 << 29;
/// Directions of a queue pair.
pub(super) const SENDS: usize = 0;
pub(super) const RECEIVES: usize = 1;
/// Names of windows are told from keys of regions by this bit.
const WINDOW_BIT: u32 = 1 << 31;

/// What is in the memory of a request that has not completed.
fn gather(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments {
        // SAFETY: registered memory of the poster's, valid until the request has completed.
        bytes.extend_from_slice(unsafe {
            std::slice::from_raw_parts(segment.address as *const u8, segment.len as usize)
        });
    }
    bytes
}

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
    access: u32,
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
            counts: Counts::default(),
        }
    }

    pub(super) fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn one_in(&mut self, count: u64) -> bool {
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
    fn silent_until(&self, address: Option<SocketAddr>, side: Side) -> Instant {
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

    fn complete(&mut self, queue: u64, direction: usize, completion: WorkCompletion) {
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
        for work in works {
            if let Progress::Going(_, arrives, bytes) = work.state
                && work.request.operation != operation::READ
                && self.random.chance(700)
            {
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
    fn may(&mut self, queue: u64, key: u32, (start, len): (u64, u64), wanted: u32) -> bool {
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

    /// Begins a request: what is local is done, and what is not is on its way.
    fn begin(&mut self, queue: u64, work: &Work) -> Progress {
        let (request, now) = (&work.request, self.now);
        let done = |status| Progress::Back(now, now, status, Vec::new());
        let is_registered = |segment: &Segment| {
            let region = regions().get(&u64::from(segment.key)).copied();
            region.is_some_and(|region| region.has(segment.address, u64::from(segment.len)))
        };
        if !work.segments.iter().all(is_registered) {
            return done(PROTECTION);
        }
        match request.operation {
            operation::BIND => done(if self.bind(queue, request) { 0 } else { BIND }),
            operation::INVALIDATE => {
                if self.window_of(request.key).is_none_or(|window| window.bound.is_none()) {
                    return done(BIND);
                }
                // As late as can be: when the completion is seen.
                if let Some(pair) = self.pairs.get_mut(&queue) {
                    pair.dying.insert(request.user, request.key);
                }
                done(0)
            }
            _ => {
                let is_read = request.operation == operation::READ;
                let bytes = if is_read { Vec::new() } else { gather(&work.segments) };
                let id = self.pairs.get(&queue).map_or(0, |pair| pair.id);
                Progress::Going(now, self.held_arrival(id), bytes)
            }
        }
    }

    /// As [`Fabric::arrival`], for messages of a queue: silence is looked at when they arrive.
    fn held_arrival(&mut self, from: u64) -> Instant {
        let soon = self.soon(STEP_NS_MAX);
        let held = self.ends.get(&from).and_then(|end| self.ends.get(&end.peer)).map(|end| end.held);
        soon.max(held.unwrap_or_default())
    }

    fn bind(&mut self, queue: u64, request: &SendRequest) -> bool {
        let region = regions().get(&(request.region as u64)).copied();
        let may = region.is_some_and(|region| {
            region.access & access::WINDOW_BIND != 0 && region.has(request.address, request.len)
        });
        let Some(window) = self.windows.get_mut(&(request.window as u64)) else { return false };
        // A window is bound when it is free, and by another name each time.
        if !may || window.bound.is_some() || window.key == request.key || window.key >> 8 != request.key >> 8
        {
            return false;
        }
        window.key = request.key;
        let (start, len, access) = (request.address, request.len, request.access);
        window.bound = Some(Bound { start, len, access, queue });
        true
    }

    /// Carries out what has arrived at `peer`. `Err`: `ibv_wc_status`; `None`: no receive is there yet.
    fn arrive(
        &mut self,
        peer: u64,
        request: &SendRequest,
        bytes: &[u8],
        segments: &[Segment],
    ) -> Option<Result<Vec<u8>, u32>> {
        match request.operation {
            operation::SEND | operation::SEND_INVALIDATE => {
                let side = self.pairs.get(&peer).and_then(|pair| self.ends.get(&pair.id)).map(|end| end.side);
                let pair = self.pairs.get_mut(&peer)?;
                let Some(receive) = pair.receives.front().copied() else {
                    self.counts.starved += u64::from(side == Some(Side::Host));
                    return None;
                };
                let keeps_keys = self.disturbance.keeps_keys;
                let keeps = self.one_in(keeps_keys);
                let invalidates = request.operation == operation::SEND_INVALIDATE && !keeps;
                if invalidates {
                    match self.window_of(request.key) {
                        Some(window) if window.bound.is_some_and(|bound| bound.queue == peer) => {
                            window.bound = None
                        }
                        _ => {
                            self.counts.refused += 1;
                            return Some(Err(ACCESS));
                        }
                    }
                }
                let len = bytes.len().min(receive.segment.len as usize);
                // SAFETY: a receive that was posted: its memory is valid until it has completed, which is below.
                unsafe {
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), receive.segment.address as *mut u8, len);
                }
                if let Some(pair) = self.pairs.get_mut(&peer) {
                    pair.receives.pop_front();
                }
                let completion = WorkCompletion {
                    user: receive.user,
                    len: u32::try_from(len).unwrap_or(0),
                    invalidated: if invalidates { request.key } else { 0 },
                    has_invalidated: invalidates,
                    ..WorkCompletion::NONE
                };
                self.complete(peer, RECEIVES, completion);
                Some(Ok(Vec::new()))
            }
            operation::WRITE => {
                if !self.may(peer, request.key, (request.address, bytes.len() as u64), access::REMOTE_WRITE) {
                    return Some(Err(ACCESS));
                }
                // SAFETY: registered, and its owner keeps it until the key is dead, or its queue is gone.
                unsafe { std::ptr::copy(bytes.as_ptr(), request.address as *mut u8, bytes.len()) };
                Some(Ok(Vec::new()))
            }
            operation::READ => {
                let len: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
                if !self.may(peer, request.key, (request.address, len), access::REMOTE_READ) {
                    return Some(Err(ACCESS));
                }
                let len = usize::try_from(len).unwrap_or(0);
                // SAFETY: as above.
                Some(Ok(unsafe { std::slice::from_raw_parts(request.address as *const u8, len) }.to_vec()))
            }
            _ => Some(Err(2)),
        }
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
    fn land(&mut self) -> bool {
        let now = self.now;
        let Some(index) = self.loose.iter().position(|loose| loose.arrives <= now) else { return false };
        let Loose { to, request, bytes, .. } = self.loose.remove(index);
        if self.pairs.get(&to).is_some_and(|pair| !pair.failed) {
            self.counts.ghosts += 1;
            let _ = self.arrive(to, &request, &bytes, &[]);
        }
        true
    }

    /// Moves one request of a queue on by a step; says whether there was one.
    fn step(&mut self, queue: u64) -> bool {
        let now = self.now;
        let Some(pair) = self.pairs.get_mut(&queue).filter(|pair| !pair.failed) else { return false };
        let id = pair.id;
        let mut works = std::mem::take(&mut pair.works);
        let mut end = None;
        let mut moved = false;
        let (own, other) = match self.ends.get(&id) {
            Some(end) => {
                let other = if end.side == Side::Host { Side::Target } else { Side::Host };
                (self.silent_until(end.address, end.side), self.silent_until(end.address, other))
            }
            None => Default::default(),
        };
        if let Some(work) = works.front() {
            let is_local = [operation::BIND, operation::INVALIDATE].contains(&work.request.operation);
            let own = if is_local { now } else { own };
            // A peer that has no receive is waited for; silence is not.
            let (since, waits) = match &work.state {
                Progress::Posted(_) => (now, false),
                Progress::Going(since, arrives, _) => (*since, *arrives > now || other > now),
                Progress::Back(since, ..) => (*since, own > now),
            };
            if waits && self.is_timed && since + RETRIES_FOR <= now {
                end = Some(RETRIES);
            } else if let Progress::Back(_, at, status, bytes) = &work.state
                && *at <= now
                && own <= now
            {
                end = Some(*status);
                let mut bytes = &bytes[..];
                for segment in work.segments.iter().filter(|_| !bytes.is_empty()) {
                    let (here, rest) = bytes.split_at((segment.len as usize).min(bytes.len()));
                    // SAFETY: registered memory of the poster's, valid until this has completed.
                    unsafe {
                        std::ptr::copy_nonoverlapping(here.as_ptr(), segment.address as *mut u8, here.len());
                    }
                    bytes = rest;
                }
            }
        }
        if end.is_none() {
            moved = self.step_inside(queue, &mut works, other);
        }
        let ended = end.and_then(|status| works.pop_front().map(|work| (status, work.request)));
        match self.pairs.get_mut(&queue).filter(|pair| !pair.failed) {
            Some(pair) => pair.works = works,
            // It has failed meanwhile, without these.
            None => {
                for work in works {
                    self.complete(queue, SENDS, flushed(work.request.user));
                }
                return true;
            }
        }
        let Some((status, request)) = ended else { return moved };
        if status != 0 || request.signalled {
            self.complete(
                queue,
                SENDS,
                WorkCompletion { user: request.user, status, ..WorkCompletion::NONE },
            );
        }
        if status != 0 {
            self.counts.breaks += u64::from(status == RETRIES);
            self.fail(queue);
        }
        true
    }

    /// Begins the next request, or lets the next one arrive.
    fn step_inside(&mut self, queue: u64, works: &mut VecDeque<Work>, silent: Instant) -> bool {
        let now = self.now;
        for index in 0..works.len() {
            match &works[index].state {
                Progress::Back(..) => {}
                Progress::Going(_, arrives, _) if *arrives > now || silent > now => {
                    // What is behind it may begin, but not overtake it.
                    continue;
                }
                Progress::Going(since, _, bytes) => {
                    if works.iter().take(index).any(|before| matches!(before.state, Progress::Going(..))) {
                        continue;
                    }
                    let since = *since;
                    let Some(peer) = self.peer_queue(queue) else {
                        // Nobody answers: the device finds out in time.
                        let at = if self.is_timed { now + RETRIES_FOR } else { now };
                        works[index].state = Progress::Back(since, at, RETRIES, Vec::new());
                        return true;
                    };
                    // What was lost on the way is sent once more, as it is now.
                    let (request, mut bytes) = (works[index].request, bytes.clone());
                    if request.operation != operation::READ && self.random.chance(500) {
                        bytes = gather(&works[index].segments);
                    }
                    let Some(result) = self.arrive(peer, &request, &bytes, &works[index].segments) else {
                        continue;
                    };
                    let at = self.soon(STEP_NS_MAX);
                    works[index].state = match result {
                        Ok(bytes) => Progress::Back(since, at, 0, bytes),
                        Err(status) => {
                            // A peer whose memory was not to be reached so has an error too.
                            self.fail(peer);
                            Progress::Back(since, at, status, Vec::new())
                        }
                    };
                    return true;
                }
                Progress::Posted(at) if *at <= now => {
                    if works.iter().take(index).any(|before| matches!(before.state, Progress::Posted(_))) {
                        continue;
                    }
                    let state = self.begin(queue, &works[index]);
                    works[index].state = state;
                    return true;
                }
                Progress::Posted(_) => return false,
            }
        }
        false
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
