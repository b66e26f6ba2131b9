//! Verbs without devices, for tests: a table whose queue pairs move bytes within this process, with everything that a device and a
//! network may do to completions and connections, under a seed.
//!
//! Kept as devices keep it: requests of a queue complete in order, and so do receives; keys are looked at with their place, length and
//! access; a queue in error completes what it has as flushed, and lets nobody in; what a queue uses is not touched once it is closed.
//!
//! Disturbed by [`disturb`]: completions come late, those of sends after the answers to them; connections break under a request, so that
//! it is not known whether it was carried out; the other end hears of that, or does not.

use hawser_verbs_abi::{
    CmEvent, ConnectParameters, Device, DeviceAttributes, Domain, EventChannel, Id, Keys, Queue, QueueSize,
    ReceiveRequest, Region, STATUS_FLUSHED, SendRequest, Table, Window, WorkCompletion, access, event,
    operation,
};
use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `ibv_wc_status`.
const PROTECTION: u32 = 4;
const BIND: u32 = 6;
const ACCESS: u32 = 10;
const RETRIES: u32 = 12;

#[derive(Default)]
struct Channel {
    fd: i32,
    events: VecDeque<CmEvent>,
}

#[derive(Default)]
struct End {
    channel: u64,
    queue: u64,
    peer: u64,
    port: u16,
    dialled: u16,
}

struct Registered {
    start: u64,
    len: u64,
    access: u32,
}

#[derive(Default)]
struct Bound {
    key: u32,
    /// Of what, for whom.
    bound: Option<(u64, u64, u32, u64)>,
}

#[derive(Default)]
struct Pair {
    id: u64,
    fd: i32,
    receives: VecDeque<ReceiveRequest>,
    /// Messages that no receive is there for.
    messages: VecDeque<Message>,
    completions: VecDeque<WorkCompletion>,
    /// Completions that come later: of sends, and of receives.
    late: [VecDeque<WorkCompletion>; 2],
    failed: bool,
    armed: bool,
}

struct Message {
    bytes: Vec<u8>,
    invalidated: Option<u32>,
}

/// How often what happens: one in so many; 0: never.
#[derive(Clone, Copy, Default)]
pub(crate) struct Disturbance {
    /// A completion comes later than it could.
    pub(crate) late: u64,
    /// A request breaks its connection.
    pub(crate) breaks: u64,
}

#[derive(Default)]
struct World {
    last: u64,
    channels: HashMap<u64, Channel>,
    ends: HashMap<u64, End>,
    regions: HashMap<u64, Registered>,
    windows: HashMap<u64, Bound>,
    pairs: HashMap<u64, Pair>,
    disturbance: Disturbance,
    random: u64,
    /// What was done, for tests that ask.
    breaks: u64,
    refused: u64,
}

// SAFETY: pointers in it are handles or addresses, which are looked up or used under the lock.
unsafe impl Send for World {}

static WORLD: Mutex<Option<World>> = Mutex::new(None);

struct Locked(MutexGuard<'static, Option<World>>);

impl std::ops::Deref for Locked {
    type Target = World;
    fn deref(&self) -> &World {
        self.0.as_ref().expect("made where it is locked")
    }
}

impl std::ops::DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut World {
        self.0.as_mut().expect("made where it is locked")
    }
}

fn world() -> Locked {
    let mut world = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    world.get_or_insert_default();
    Locked(world)
}

/// From now on things go wrong so often, by this seed.
pub(crate) fn disturb(disturbance: Disturbance, seed: u64) {
    let mut world = world();
    world.disturbance = disturbance;
    world.random = seed | 1;
}

/// Connections that were broken, and accesses that were refused for their key.
pub(crate) fn counts() -> (u64, u64) {
    let world = world();
    (world.breaks, world.refused)
}

/// Windows that are bound.
pub(crate) fn bound_windows() -> usize {
    world().windows.values().filter(|window| window.bound.is_some()).count()
}

/// A peer's access by a key of a queue's, as its device would judge it. For tests of keys that are not valid any more.
pub(crate) fn is_reachable(key: u32) -> bool {
    let world = world();
    world.windows.values().any(|window| window.key == key && window.bound.is_some())
}

/// The last name of every window.
pub(crate) fn window_names() -> Vec<u32> {
    world().windows.values().map(|window| window.key).collect()
}

impl World {
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn one_in(&mut self, count: u64) -> bool {
        if count == 0 {
            return false;
        }
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.is_multiple_of(count)
    }

    fn tell(&mut self, id: u64, kind: u32, status: i32, parameters: Option<&ConnectParameters>) {
        let Some(end) = self.ends.get(&id) else { return };
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
            channel.events.push_back(event);
            signal(channel.fd);
        }
    }

    fn complete(&mut self, queue: u64, direction: usize, completion: WorkCompletion) {
        let late = self.disturbance.late;
        let is_late = self.one_in(late);
        let Some(pair) = self.pairs.get_mut(&queue) else { return };
        if !pair.failed && (is_late || !pair.late[direction].is_empty()) {
            pair.late[direction].push_back(completion);
        } else {
            pair.completions.push_back(completion);
        }
        if std::mem::take(&mut pair.armed) {
            signal(pair.fd);
        }
    }

    /// Puts a queue into error: what it has completes as flushed.
    fn fail(&mut self, queue: u64) {
        let Some(pair) = self.pairs.get_mut(&queue) else { return };
        if std::mem::replace(&mut pair.failed, true) {
            return;
        }
        let late = std::mem::take(&mut pair.late);
        pair.completions.extend(late.into_iter().flatten());
        for receive in std::mem::take(&mut pair.receives) {
            let flushed =
                WorkCompletion { user: receive.user, status: STATUS_FLUSHED, ..WorkCompletion::NONE };
            pair.completions.push_back(flushed);
        }
        pair.messages.clear();
        if std::mem::take(&mut pair.armed) {
            signal(pair.fd);
        }
    }

    fn peer_queue(&self, queue: u64) -> Option<u64> {
        let peer = self.ends.get(&self.pairs.get(&queue)?.id)?.peer;
        let queue = self.ends.get(&peer)?.queue;
        self.pairs.get(&queue).filter(|pair| !pair.failed).map(|_| queue)
    }

    /// Whether a peer may do this to the memory of `queue`'s owner.
    fn may(&mut self, queue: u64, key: u32, start: u64, len: u64, wanted: u32) -> bool {
        let inside = |from: u64, size: u64| start >= from && len <= size && start - from <= size - len;
        let by_window = self.windows.values().any(|window| {
            window.key == key
                && window.bound.is_some_and(|(from, size, access, owner)| {
                    owner == queue && access & wanted != 0 && inside(from, size)
                })
        });
        let by_region = u64::from(key) < 1 << 31
            && self
                .regions
                .get(&u64::from(key))
                .is_some_and(|region| region.access & wanted != 0 && inside(region.start, region.len));
        let may = by_window || by_region;
        self.refused += u64::from(!may);
        may
    }

    /// Whether a device may use a segment of ours.
    fn is_registered(&self, segment: &hawser_verbs_abi::Segment) -> bool {
        let region = self.regions.get(&u64::from(segment.key));
        region.is_some_and(|region| {
            let (start, len) = (segment.address, u64::from(segment.len));
            start >= region.start && len <= region.len && start - region.start <= region.len - len
        })
    }

    fn deliver(&mut self, queue: u64) {
        loop {
            let Some(pair) = self.pairs.get_mut(&queue) else { return };
            if pair.messages.is_empty() || pair.receives.is_empty() {
                return;
            }
            let (Some(message), Some(receive)) = (pair.messages.pop_front(), pair.receives.pop_front())
            else {
                return;
            };
            let len = message.bytes.len().min(receive.segment.len as usize);
            // SAFETY: a receive that was posted: its memory is valid until it has completed, which is below.
            unsafe {
                let to = receive.segment.address as *mut u8;
                std::ptr::copy_nonoverlapping(message.bytes.as_ptr(), to, len);
            }
            if let Some(key) = message.invalidated
                && let Some(window) = self.windows.values_mut().find(|window| window.key == key)
            {
                window.bound = None;
            }
            let completion = WorkCompletion {
                user: receive.user,
                len: u32::try_from(len).unwrap(),
                invalidated: message.invalidated.unwrap_or(0),
                has_invalidated: message.invalidated.is_some(),
                ..WorkCompletion::NONE
            };
            self.complete(queue, 1, completion);
        }
    }

    /// Carries out one request. `Err`: `ibv_wc_status`.
    unsafe fn execute(&mut self, queue: u64, request: &SendRequest) -> Result<(), u32> {
        // SAFETY: the poster's promise.
        let segments = unsafe {
            match request.segments_len {
                0 => &[][..],
                len => std::slice::from_raw_parts(request.segments, len as usize),
            }
        };
        if !segments.iter().all(|segment| self.is_registered(segment)) {
            return Err(PROTECTION);
        }
        match request.operation {
            operation::BIND => {
                let region = self.regions.get(&(request.region as u64)).ok_or(BIND)?;
                let inside = request.address >= region.start
                    && request.address + request.len <= region.start + region.len;
                let may = region.access & access::WINDOW_BIND != 0 && inside;
                let window = self.windows.get_mut(&(request.window as u64)).ok_or(BIND)?;
                // A window is bound when it is free, and by another name each time.
                if !may
                    || window.bound.is_some()
                    || window.key == request.key
                    || window.key >> 8 != request.key >> 8
                {
                    return Err(BIND);
                }
                window.key = request.key;
                window.bound = Some((request.address, request.len, request.access, queue));
            }
            operation::INVALIDATE => {
                let window = self.windows.values_mut().find(|window| window.key == request.key);
                window.filter(|window| window.bound.is_some()).ok_or(BIND)?.bound = None;
            }
            operation::SEND | operation::SEND_INVALIDATE => {
                let peer = self.peer_queue(queue).ok_or(RETRIES)?;
                let invalidated = (request.operation == operation::SEND_INVALIDATE).then_some(request.key);
                if let Some(key) = invalidated
                    && !self
                        .windows
                        .values()
                        .any(|it| it.key == key && it.bound.is_some_and(|it| it.3 == peer))
                {
                    self.refused += 1;
                    return Err(ACCESS);
                }
                let mut bytes = Vec::new();
                for segment in segments {
                    // SAFETY: registered memory of the poster's, valid until this has completed.
                    bytes.extend_from_slice(unsafe {
                        std::slice::from_raw_parts(segment.address as *const u8, segment.len as usize)
                    });
                }
                if let Some(pair) = self.pairs.get_mut(&peer) {
                    pair.messages.push_back(Message { bytes, invalidated });
                }
                self.deliver(peer);
            }
            operation::READ | operation::WRITE => {
                let peer = self.peer_queue(queue).ok_or(RETRIES)?;
                let len: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
                let is_read = request.operation == operation::READ;
                let wanted = if is_read { access::REMOTE_READ } else { access::REMOTE_WRITE };
                if !self.may(peer, request.key, request.address, len, wanted) {
                    return Err(ACCESS);
                }
                let mut remote = request.address as *mut u8;
                for segment in segments {
                    let (local, len) = (segment.address as *mut u8, segment.len as usize);
                    // SAFETY: both are registered, and their owners keep them until this has completed, or their queue is gone.
                    unsafe {
                        let (from, to) = if is_read { (remote, local) } else { (local, remote) };
                        std::ptr::copy(from, to, len);
                        remote = remote.add(len);
                    }
                }
            }
            _ => return Err(2),
        }
        Ok(())
    }

    /// Breaks the connection of a queue: both ends are in error, and hear of it or not.
    fn break_connection(&mut self, queue: u64) {
        self.breaks += 1;
        let Some(id) = self.pairs.get(&queue).map(|pair| pair.id) else { return };
        let peer = self.ends.get(&id).map_or(0, |end| end.peer);
        let other = self.ends.get(&peer).map_or(0, |end| end.queue);
        for (id, queue) in [(id, queue), (peer, other)] {
            self.fail(queue);
            if self.one_in(2) {
                self.tell(id, event::DISCONNECTED, 0, None);
            }
        }
    }
}

fn signal(fd: i32) {
    let one = 1u64;
    // SAFETY: eight readable bytes, and a descriptor of ours.
    unsafe { libc::write(fd, (&raw const one).cast(), 8) };
}

fn clear(fd: i32) {
    let mut value = 0u64;
    // SAFETY: eight writable bytes, and a descriptor of ours.
    unsafe { libc::read(fd, (&raw mut value).cast(), 8) };
}

fn eventfd() -> i32 {
    // SAFETY: plain system call.
    unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }
}

fn attributes() -> DeviceAttributes {
    let mut found = DeviceAttributes {
        queues_max: 1000,
        requests_max: 16384,
        segments_max: 16,
        completions_max: 1 << 16,
        windows_max: 1 << 16,
        reads_answered_max: 16,
        reads_max: 16,
        windows_2b: true,
        is_up: true,
        ..DeviceAttributes::NONE
    };
    found.name[..5].copy_from_slice(b"fake0");
    found
}

unsafe extern "C" fn devices(out: *mut DeviceAttributes, len: u32) -> i32 {
    if len > 0 {
        // SAFETY: the caller's promise.
        unsafe { *out = attributes() };
    }
    1
}

unsafe extern "C" fn channel_open(out: *mut *mut EventChannel, fd: *mut i32) -> i32 {
    let mut world = world();
    let (number, descriptor) = (world.next(), eventfd());
    world.channels.insert(number, Channel { fd: descriptor, ..Channel::default() });
    // SAFETY: the caller's promise.
    unsafe { (*out, *fd) = (number as *mut _, descriptor) };
    0
}

unsafe extern "C" fn channel_close(channel: *mut EventChannel) {
    let channel = world().channels.remove(&(channel as u64)).expect("closed once");
    // SAFETY: ours, once.
    unsafe { libc::close(channel.fd) };
}

unsafe extern "C" fn channel_event(channel: *mut EventChannel, out: *mut CmEvent) -> i32 {
    let mut world = world();
    let channel = world.channels.get_mut(&(channel as u64)).expect("open");
    match channel.events.pop_front() {
        None => {
            clear(channel.fd);
            0
        }
        Some(event) => {
            // SAFETY: the caller's promise.
            unsafe { *out = event };
            1
        }
    }
}

unsafe extern "C" fn id_open(channel: *mut EventChannel, out: *mut *mut Id) -> i32 {
    let mut world = world();
    let number = world.next();
    world.ends.insert(number, End { channel: channel as u64, ..End::default() });
    // SAFETY: the caller's promise.
    unsafe { *out = number as *mut _ };
    0
}

unsafe extern "C" fn id_close(id: *mut Id) {
    let mut world = world();
    let end = world.ends.remove(&(id as u64)).expect("closed once");
    assert!(!world.pairs.contains_key(&end.queue), "its queue was closed before");
    if let Some(channel) = world.channels.get_mut(&end.channel) {
        channel.events.retain(|event| event.id != id);
    }
}

unsafe extern "C" fn id_migrate(id: *mut Id, channel: *mut EventChannel) -> i32 {
    let mut world = world();
    let end = world.ends.get_mut(&(id as u64)).expect("open");
    let old = std::mem::replace(&mut end.channel, channel as u64);
    let mut moved = Vec::new();
    if let Some(old) = world.channels.get_mut(&old) {
        moved.extend(old.events.iter().copied().filter(|event| event.id == id));
        old.events.retain(|event| event.id != id);
    }
    let channel = world.channels.get_mut(&(channel as u64)).expect("open");
    channel.events.extend(moved);
    signal(channel.fd);
    0
}

unsafe fn port_of(address: *const c_void) -> u16 {
    // SAFETY: the caller gives an IPv4 address.
    u16::from_be(unsafe { (*address.cast::<libc::sockaddr_in>()).sin_port })
}

unsafe extern "C" fn resolve_address(id: *mut Id, address: *const c_void, _: i32) -> i32 {
    let mut world = world();
    // SAFETY: the caller's promise.
    let port = unsafe { port_of(address) };
    world.ends.get_mut(&(id as u64)).expect("open").dialled = port;
    world.tell(id as u64, event::ADDRESS_RESOLVED, 0, None);
    0
}

unsafe extern "C" fn resolve_route(id: *mut Id, _: i32) -> i32 {
    world().tell(id as u64, event::ROUTE_RESOLVED, 0, None);
    0
}

unsafe extern "C" fn bind(id: *mut Id, address: *const c_void) -> i32 {
    // SAFETY: the caller's promise.
    let wanted = unsafe { port_of(address) };
    let mut world = world();
    let port = if wanted == 0 { 10000 + u16::try_from(world.next() % 50000).unwrap() } else { wanted };
    if world.ends.values().any(|end| end.port == port) {
        return -libc::EADDRINUSE;
    }
    world.ends.get_mut(&(id as u64)).expect("open").port = port;
    0
}

unsafe extern "C" fn listen(_: *mut Id, _: i32) -> i32 {
    0
}

unsafe extern "C" fn port(id: *mut Id) -> u16 {
    world().ends[&(id as u64)].port
}

unsafe extern "C" fn connect(id: *mut Id, parameters: *const ConnectParameters) -> i32 {
    let mut world = world();
    let number = id as u64;
    let wanted = world.ends[&number].dialled;
    let listener = world.ends.iter().find(|(_, end)| end.port == wanted).map(|(_, end)| end.channel);
    let Some(channel) = listener else {
        // IB_CM_REJ_INVALID_SERVICE_ID.
        world.tell(number, event::REJECTED, 8, None);
        return 0;
    };
    let other = world.next();
    world.ends.insert(other, End { channel, peer: number, ..End::default() });
    world.ends.get_mut(&number).expect("open").peer = other;
    // SAFETY: the caller's promise.
    world.tell(other, event::CONNECT_REQUEST, 0, Some(unsafe { &*parameters }));
    0
}

unsafe extern "C" fn accept(id: *mut Id, parameters: *const ConnectParameters) -> i32 {
    let mut world = world();
    let peer = world.ends[&(id as u64)].peer;
    // SAFETY: the caller's promise.
    world.tell(peer, event::ESTABLISHED, 0, Some(unsafe { &*parameters }));
    world.tell(id as u64, event::ESTABLISHED, 0, None);
    0
}

unsafe extern "C" fn reject(id: *mut Id, private: *const u8, len: u8) -> i32 {
    let parameters =
        ConnectParameters { private, private_len: len, responder_resources: 0, initiator_depth: 0 };
    let mut world = world();
    let peer = world.ends[&(id as u64)].peer;
    world.tell(peer, event::REJECTED, 28, Some(&parameters));
    0
}

unsafe extern "C" fn disconnect(id: *mut Id) -> i32 {
    let mut world = world();
    let Some(end) = world.ends.get(&(id as u64)) else { return -libc::EINVAL };
    let (peer, queue) = (end.peer, end.queue);
    world.fail(queue);
    let other = world.ends.get(&peer).map_or(0, |end| end.queue);
    world.fail(other);
    world.tell(peer, event::DISCONNECTED, 0, None);
    0
}

unsafe extern "C" fn device(_: *mut Id) -> *mut Device {
    std::ptr::dangling_mut()
}

unsafe extern "C" fn device_attributes(_: *mut Device, out: *mut DeviceAttributes) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { *out = attributes() };
    0
}

unsafe extern "C" fn domain_open(_: *mut Device, out: *mut *mut Domain) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { *out = std::ptr::dangling_mut() };
    0
}

unsafe extern "C" fn register(
    _: *mut Domain,
    start: *mut c_void,
    len: usize,
    access: u32,
    out: *mut *mut Region,
    keys: *mut Keys,
) -> i32 {
    let mut world = world();
    let number = world.next();
    world.regions.insert(number, Registered { start: start as u64, len: len as u64, access });
    let key = u32::try_from(number).unwrap();
    // SAFETY: the caller's promise.
    unsafe { (*out, *keys) = (number as *mut _, Keys { local: key, remote: key }) };
    0
}

unsafe extern "C" fn deregister(region: *mut Region) -> i32 {
    let mut world = world();
    let region = world.regions.remove(&(region as u64)).expect("deregistered once");
    let uses = |(from, ..): (u64, u64, u32, u64)| from >= region.start && from < region.start + region.len;
    assert!(!world.windows.values().any(|window| window.bound.is_some_and(uses)), "no window is bound to it");
    0
}

unsafe extern "C" fn window_open(_: *mut Domain, out: *mut *mut Window, key: *mut u32) -> i32 {
    let mut world = world();
    let number = world.next();
    // Names of windows are told from those of regions by their highest bit.
    let name = 1 << 31 | u32::try_from(number).unwrap() << 8;
    world.windows.insert(number, Bound { key: name, bound: None });
    // SAFETY: the caller's promise.
    unsafe { (*out, *key) = (number as *mut _, name) };
    0
}

unsafe extern "C" fn window_close(window: *mut Window) -> i32 {
    world().windows.remove(&(window as u64)).expect("closed once");
    0
}

unsafe extern "C" fn queue_open(
    id: *mut Id,
    _: *mut Domain,
    _: *const QueueSize,
    out: *mut *mut Queue,
    fd: *mut i32,
) -> i32 {
    let mut world = world();
    let (number, descriptor) = (world.next(), eventfd());
    world.pairs.insert(number, Pair { id: id as u64, fd: descriptor, ..Pair::default() });
    world.ends.get_mut(&(id as u64)).expect("open").queue = number;
    // SAFETY: the caller's promise.
    unsafe { (*out, *fd) = (number as *mut _, descriptor) };
    0
}

unsafe extern "C" fn queue_error(queue: *mut Queue) -> i32 {
    world().fail(queue as u64);
    0
}

unsafe extern "C" fn queue_close(queue: *mut Queue) {
    let mut world = world();
    let number = queue as u64;
    assert!(
        !world.windows.values().any(|window| window.bound.is_some_and(|it| it.3 == number)),
        "a window that is bound holds on to its queue"
    );
    let pair = world.pairs.remove(&number).expect("closed once");
    // SAFETY: ours, once.
    unsafe { libc::close(pair.fd) };
}

unsafe extern "C" fn post_send(
    queue: *mut Queue,
    requests: *const SendRequest,
    len: u32,
    posted: *mut u32,
) -> i32 {
    let number = queue as u64;
    let mut world = world();
    // SAFETY: the caller's promise.
    let requests = unsafe { std::slice::from_raw_parts(requests, len as usize) };
    // SAFETY: the caller's promise.
    unsafe { *posted = len };
    for request in requests {
        let completion = WorkCompletion { user: request.user, ..WorkCompletion::NONE };
        if world.pairs[&number].failed {
            world.complete(number, 0, WorkCompletion { status: STATUS_FLUSHED, ..completion });
            continue;
        }
        let breaks = world.disturbance.breaks;
        if world.one_in(breaks) {
            // Before it is carried out, or after it.
            let carried_out = world.one_in(2);
            // SAFETY: the caller's promise.
            if !carried_out || unsafe { world.execute(number, request) }.is_ok() {
                world.break_connection(number);
                world.complete(number, 0, WorkCompletion { status: RETRIES, ..completion });
                continue;
            }
        }
        // SAFETY: the caller's promise.
        match unsafe { world.execute(number, request) } {
            Ok(()) if request.signalled => world.complete(number, 0, completion),
            Ok(()) => {}
            Err(status) => {
                world.complete(number, 0, WorkCompletion { status, ..completion });
                world.fail(number);
                // A peer whose memory was not to be reached so has an error too.
                if status == ACCESS
                    && let Some(peer) = world.peer_queue(number)
                {
                    world.fail(peer);
                }
            }
        }
    }
    0
}

unsafe extern "C" fn post_receive(
    queue: *mut Queue,
    requests: *const ReceiveRequest,
    len: u32,
    posted: *mut u32,
) -> i32 {
    let mut world = world();
    // SAFETY: the caller's promise.
    let requests = unsafe { std::slice::from_raw_parts(requests, len as usize) };
    // SAFETY: the caller's promise.
    unsafe { *posted = len };
    let number = queue as u64;
    for request in requests {
        assert!(world.is_registered(&request.segment), "receives go to registered memory");
        let pair = world.pairs.get_mut(&number).expect("open");
        if pair.failed {
            let flushed =
                WorkCompletion { user: request.user, status: STATUS_FLUSHED, ..WorkCompletion::NONE };
            pair.completions.push_back(flushed);
        } else {
            pair.receives.push_back(*request);
        }
    }
    world.deliver(number);
    0
}

unsafe extern "C" fn poll(queue: *mut Queue, out: *mut WorkCompletion, len: u32) -> i32 {
    let mut world = world();
    let number = queue as u64;
    // What is late comes by and by, in an order of its own for each direction.
    for direction in 0..2 {
        while world.one_in(2) {
            let pair = world.pairs.get_mut(&number).expect("open");
            let Some(completion) = pair.late[direction].pop_front() else { break };
            pair.completions.push_back(completion);
        }
    }
    let pair = world.pairs.get_mut(&number).expect("open");
    let count = pair.completions.len().min(len as usize);
    for (index, completion) in pair.completions.drain(..count).enumerate() {
        // SAFETY: the caller gives room for `len`.
        unsafe { *out.add(index) = completion };
    }
    i32::try_from(count).unwrap()
}

unsafe extern "C" fn arm(queue: *mut Queue) -> i32 {
    let mut world = world();
    let pair = world.pairs.get_mut(&(queue as u64)).expect("open");
    clear(pair.fd);
    pair.armed = true;
    // What is late is noticed all the same.
    if pair.late.iter().any(|late| !late.is_empty()) {
        signal(pair.fd);
    }
    0
}

/// See the module's text.
pub(crate) static TABLE: Table = Table {
    devices,
    channel_open,
    channel_close,
    channel_event,
    id_open,
    id_close,
    id_migrate,
    resolve_address,
    resolve_route,
    bind,
    listen,
    port,
    connect,
    accept,
    reject,
    disconnect,
    device,
    device_attributes,
    domain_open,
    register,
    deregister,
    window_open,
    window_close,
    queue_open,
    queue_error,
    queue_close,
    post_send,
    post_receive,
    poll,
    arm,
};
