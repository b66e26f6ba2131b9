//! The table's functions: each looks its handles up in the world of the calling thread, under its lock.

use super::fabric::{
    Channel, Denied, End, Fabric, Pair, Progress, RECEIVES, RETRIES, Registered, SENDS, Window, Work,
    flushed, next_region, regions,
};
use super::here;
use crate::net::Side;
use hawser_runtime::Instant;
use hawser_verbs_abi::{
    CmEvent, ConnectParameters, Device, DeviceAttributes, Domain, EventChannel, Id, Keys, Queue, QueueSize,
    ReceiveRequest, Region, Segment, SendRequest, Table, Window as RawWindow, WorkCompletion, event,
};
use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::net::{Ipv4Addr, SocketAddr};

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
    found.name[..4].copy_from_slice(b"sim0");
    found
}

unsafe extern "C" fn devices(out: *mut DeviceAttributes, len: u32) -> i32 {
    let mut found = attributes();
    match here().denied {
        Some(Denied::Device) => return 0,
        Some(Denied::Access) => found.queues_max = 0,
        Some(Denied::Link) => found.is_up = false,
        _ => {}
    }
    if len > 0 {
        // SAFETY: the caller's promise.
        unsafe { *out = found };
    }
    1
}

unsafe extern "C" fn channel_open(out: *mut *mut EventChannel, fd: *mut i32) -> i32 {
    let mut world = here();
    let number = world.next();
    let descriptor = world.descriptor(number);
    world.channels.insert(number, Channel { fd: descriptor, ..Channel::default() });
    // SAFETY: the caller's promise.
    unsafe { (*out, *fd) = (number as *mut _, descriptor) };
    0
}

/// What is not there was killed with its process, or is closed twice.
fn must_be_dead(world: &Fabric, number: u64) {
    assert!(world.dead.contains(&number), "a handle is closed twice");
}

unsafe extern "C" fn channel_close(channel: *mut EventChannel) {
    let mut world = here();
    match world.channels.remove(&(channel as u64)) {
        Some(channel) => world.close_descriptor(channel.fd),
        None => must_be_dead(&world, channel as u64),
    }
}

unsafe extern "C" fn channel_event(channel: *mut EventChannel, out: *mut CmEvent) -> i32 {
    let mut world = here();
    let now = world.now;
    let Some(channel) = world.channels.get_mut(&(channel as u64)) else { return -libc::EIO };
    let due = channel.events.front().is_some_and(|(at, _)| *at <= now);
    let Some((_, event)) = channel.events.pop_front_if(|_| due) else {
        let fd = channel.fd;
        world.clear(fd);
        return 0;
    };
    // SAFETY: the caller's promise.
    unsafe { *out = event };
    1
}

unsafe extern "C" fn id_open(channel: *mut EventChannel, out: *mut *mut Id) -> i32 {
    let mut world = here();
    let number = world.next();
    world.ends.insert(number, End::new(channel as u64));
    // SAFETY: the caller's promise.
    unsafe { *out = number as *mut _ };
    0
}

unsafe extern "C" fn id_close(id: *mut Id) {
    let mut world = here();
    let Some(end) = world.ends.remove(&(id as u64)) else { return must_be_dead(&world, id as u64) };
    assert!(!world.pairs.contains_key(&end.queue), "its queue was closed before");
    if let Some(channel) = world.channels.get_mut(&end.channel) {
        channel.events.retain(|(_, event)| event.id != id);
    }
}

unsafe extern "C" fn id_migrate(id: *mut Id, channel: *mut EventChannel) -> i32 {
    let mut world = here();
    let Some(end) = world.ends.get_mut(&(id as u64)) else { return -libc::EINVAL };
    let old = std::mem::replace(&mut end.channel, channel as u64);
    let mut moved = Vec::new();
    if let Some(old) = world.channels.get_mut(&old) {
        moved.extend(old.events.iter().copied().filter(|(_, event)| event.id == id));
        old.events.retain(|(_, event)| event.id != id);
    }
    let Some(channel) = world.channels.get_mut(&(channel as u64)) else { return -libc::EINVAL };
    channel.events.extend(moved);
    let fd = channel.fd;
    world.changed = true;
    if !world.is_timed {
        world.signal(fd);
    }
    0
}

unsafe fn read_address(address: *const c_void) -> SocketAddr {
    // SAFETY: the caller gives an IPv4 address.
    let raw = unsafe { *address.cast::<libc::sockaddr_in>() };
    SocketAddr::from((Ipv4Addr::from(u32::from_be(raw.sin_addr.s_addr)), u16::from_be(raw.sin_port)))
}

unsafe extern "C" fn resolve_address(id: *mut Id, address: *const c_void, _: i32) -> i32 {
    let mut world = here();
    // SAFETY: the caller's promise.
    let address = unsafe { read_address(address) };
    let Some(end) = world.ends.get_mut(&(id as u64)) else { return -libc::EINVAL };
    end.address = Some(address);
    match world.denied {
        Some(Denied::Device | Denied::Access) => return -libc::ENODEV,
        Some(Denied::Link | Denied::Network) => {
            world.tell(id as u64, (event::ADDRESS_ERROR, -libc::ENODEV), None, None);
            return 0;
        }
        _ => {}
    }
    world.tell(id as u64, (event::ADDRESS_RESOLVED, 0), None, None);
    0
}

unsafe extern "C" fn resolve_route(id: *mut Id, _: i32) -> i32 {
    let mut world = here();
    let told = match world.denied {
        Some(Denied::Route) => (event::ROUTE_ERROR, -libc::ENETUNREACH),
        _ => (event::ROUTE_RESOLVED, 0),
    };
    world.tell(id as u64, told, None, None);
    0
}

unsafe extern "C" fn bind(id: *mut Id, address: *const c_void) -> i32 {
    // SAFETY: the caller's promise.
    let mut wanted = unsafe { read_address(address) };
    let mut world = here();
    if wanted.port() == 0 {
        wanted.set_port(10000 + u16::try_from(world.next() % 50000).unwrap_or(0));
    }
    if world.ends.values().any(|end| end.is_listener && end.address == Some(wanted)) {
        return -libc::EADDRINUSE;
    }
    world.down.remove(&wanted);
    let Some(end) = world.ends.get_mut(&(id as u64)) else { return -libc::EINVAL };
    (end.address, end.is_listener, end.side) = (Some(wanted), true, Side::Target);
    0
}

unsafe extern "C" fn listen(_: *mut Id, _: i32) -> i32 {
    0
}

unsafe extern "C" fn port(id: *mut Id) -> u16 {
    here().ends.get(&(id as u64)).and_then(|end| end.address).map_or(0, |address| address.port())
}

unsafe extern "C" fn connect(id: *mut Id, parameters: *const ConnectParameters) -> i32 {
    let mut world = here();
    let number = id as u64;
    let Some(wanted) = world.ends.get(&number).and_then(|end| end.address) else { return -libc::EINVAL };
    match world.denied {
        Some(Denied::Rejected(reason)) => {
            world.tell(number, (event::REJECTED, reason), None, None);
            return 0;
        }
        Some(Denied::Stranger) => {
            let hello = *b"hello, this is a file system";
            let len = u8::try_from(hello.len()).unwrap_or(0);
            let parameters = ConnectParameters {
                private: hello.as_ptr(),
                private_len: len,
                responder_resources: 0,
                initiator_depth: 0,
            };
            world.tell(number, (event::ESTABLISHED, 0), Some(&parameters), None);
            return 0;
        }
        _ => {}
    }
    let now = world.now;
    world.connects.push((wanted, now));
    let listens = |end: &&End| end.is_listener && end.address == Some(wanted);
    let listener = world.ends.values().find(listens).map(|end| end.channel);
    let Some(channel) = listener.filter(|_| !world.down.contains(&wanted)) else {
        // IB_CM_REJ_INVALID_SERVICE_ID.
        world.tell(number, (event::REJECTED, 8), None, None);
        return 0;
    };
    let other = world.next();
    world
        .ends
        .insert(other, End { peer: number, address: Some(wanted), side: Side::Target, ..End::new(channel) });
    if let Some(end) = world.ends.get_mut(&number) {
        end.peer = other;
    }
    let (arrives, patience) = (world.arrival(number), world.patience());
    if arrives > patience && world.is_timed {
        world.ends.remove(&other);
        if let Some(end) = world.ends.get_mut(&number) {
            end.peer = 0;
        }
        world.tell(number, (event::UNREACHABLE, -libc::ETIMEDOUT), None, Some(patience));
        return 0;
    }
    // SAFETY: the caller's promise.
    world.tell(other, (event::CONNECT_REQUEST, 0), Some(unsafe { &*parameters }), Some(arrives));
    0
}

unsafe extern "C" fn accept(id: *mut Id, parameters: *const ConnectParameters) -> i32 {
    let mut world = here();
    let Some(peer) = world.ends.get(&(id as u64)).map(|end| end.peer) else { return -libc::EINVAL };
    let arrives = world.arrival(id as u64);
    // SAFETY: the caller's promise.
    world.tell(peer, (event::ESTABLISHED, 0), Some(unsafe { &*parameters }), Some(arrives));
    if world.ends.contains_key(&peer) {
        let back = world.arrival(peer).max(arrives);
        world.tell(id as u64, (event::ESTABLISHED, 0), None, Some(back));
    } else {
        let patience = world.patience();
        world.tell(id as u64, (event::UNREACHABLE, -libc::ETIMEDOUT), None, Some(patience));
    }
    0
}

unsafe extern "C" fn reject(id: *mut Id, private: *const u8, len: u8) -> i32 {
    let parameters =
        ConnectParameters { private, private_len: len, responder_resources: 0, initiator_depth: 0 };
    let mut world = here();
    let Some(peer) = world.ends.get(&(id as u64)).map(|end| end.peer) else { return -libc::EINVAL };
    let arrives = world.arrival(id as u64);
    world.tell(peer, (event::REJECTED, 28), Some(&parameters), Some(arrives));
    0
}

unsafe extern "C" fn disconnect(id: *mut Id) -> i32 {
    let mut world = here();
    let Some(end) = world.ends.get(&(id as u64)) else { return -libc::EINVAL };
    let (peer, queue) = (end.peer, end.queue);
    world.fail(queue);
    let lost = world.lost_ends_permille;
    if world.random.chance(lost) {
        return 0;
    }
    if !world.is_timed {
        let other = world.ends.get(&peer).map_or(0, |end| end.queue);
        world.fail(other);
    }
    let arrives = world.arrival(id as u64);
    world.tell(peer, (event::DISCONNECTED, 0), None, Some(arrives));
    0
}

/// One, or another that has no windows; each time that it is replaced, others.
unsafe extern "C" fn device(_: *mut Id) -> *mut Device {
    let world = here();
    let number = if world.denied == Some(Denied::Windows) { 2 } else { 1 };
    std::ptr::without_provenance_mut(number + 2 * world.replaced)
}

unsafe extern "C" fn device_attributes(device: *mut Device, out: *mut DeviceAttributes) -> i32 {
    let attributes = DeviceAttributes { windows_2b: device.addr() % 2 == 1, ..attributes() };
    // SAFETY: the caller's promise.
    unsafe { *out = attributes };
    0
}

unsafe extern "C" fn domain_open(_: *mut Device, out: *mut *mut Domain) -> i32 {
    here().domains += 1;
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
    if let Some(Denied::Registrations(errno)) = here().denied {
        return -errno;
    }
    let number = next_region();
    regions().insert(number, Registered { start: start as u64, len: len as u64, access });
    let key = u32::try_from(number).unwrap_or(0);
    // SAFETY: the caller's promise.
    unsafe { (*out, *keys) = (number as *mut _, Keys { local: key, remote: key }) };
    0
}

unsafe extern "C" fn deregister(region: *mut Region) -> i32 {
    let region = regions().remove(&(region as u64)).expect("deregistered once");
    let world = here();
    let end = region.start + region.len;
    let uses = world.windows.values().filter_map(|window| window.bound);
    assert!(
        !uses.into_iter().any(|bound| (region.start..end).contains(&bound.start)),
        "no window is bound to it"
    );
    0
}

unsafe extern "C" fn window_open(_: *mut Domain, out: *mut *mut RawWindow, key: *mut u32) -> i32 {
    let mut world = here();
    if world.denied == Some(Denied::WindowsLeft) {
        return -libc::ENOMEM;
    }
    let number = world.next();
    let name = Fabric::window_name(number);
    world.windows.insert(number, Window { key: name, bound: None });
    // SAFETY: the caller's promise.
    unsafe { (*out, *key) = (number as *mut _, name) };
    0
}

unsafe extern "C" fn window_close(window: *mut RawWindow) -> i32 {
    here().windows.remove(&(window as u64)).expect("closed once");
    0
}

unsafe extern "C" fn queue_open(
    id: *mut Id,
    _: *mut Domain,
    size: *const QueueSize,
    out: *mut *mut Queue,
    fd: *mut i32,
) -> i32 {
    let mut world = here();
    if world.denied == Some(Denied::Queues) {
        return -libc::ENOMEM;
    }
    let number = world.next();
    let descriptor = world.descriptor(number);
    let Some(end) = world.ends.get_mut(&(id as u64)) else { return -libc::EINVAL };
    end.queue = number;
    let pair = Pair {
        id: id as u64,
        fd: descriptor,
        // SAFETY: the caller's promise.
        size: unsafe { *size },
        receives: VecDeque::new(),
        works: VecDeque::new(),
        completions: VecDeque::new(),
        late: Default::default(),
        dying: HashMap::new(),
        failed: false,
        armed: false,
    };
    world.pairs.insert(number, pair);
    // SAFETY: the caller's promise.
    unsafe { (*out, *fd) = (number as *mut _, descriptor) };
    0
}

unsafe extern "C" fn queue_error(queue: *mut Queue) -> i32 {
    here().fail(queue as u64);
    0
}

unsafe extern "C" fn queue_close(queue: *mut Queue) {
    let mut world = here();
    let number = queue as u64;
    assert!(
        !world.windows.values().any(|window| window.bound.is_some_and(|it| it.queue == number)),
        "a window that is bound holds on to its queue"
    );
    // What is on its way outlives it.
    world.fail(number);
    match world.pairs.remove(&number) {
        Some(pair) => world.close_descriptor(pair.fd),
        None => must_be_dead(&world, number),
    }
}

unsafe extern "C" fn post_send(
    queue: *mut Queue,
    requests: *const SendRequest,
    len: u32,
    posted: *mut u32,
) -> i32 {
    let number = queue as u64;
    let mut world = here();
    // SAFETY: the caller's promise.
    let requests = unsafe { std::slice::from_raw_parts(requests, len as usize) };
    let mut taken = 0;
    let mut result = 0;
    for request in requests {
        let Some(pair) = world.pairs.get(&number) else {
            result = -libc::EINVAL;
            break;
        };
        // Room comes back with completions: those that are not asked for, with the next one that is.
        let unseen = pair.completions.iter().filter(|(is_send, _)| *is_send).count() + pair.late[SENDS].len();
        if world.is_timed && pair.works.len() + unseen >= pair.size.sends as usize {
            result = -libc::ENOMEM;
            break;
        }
        taken += 1;
        let completion = WorkCompletion { user: request.user, ..WorkCompletion::NONE };
        if pair.failed {
            if let Some(pair) = world.pairs.get_mut(&number) {
                pair.completions.push_back((true, flushed(request.user)));
            }
            continue;
        }
        // SAFETY: the caller's promise.
        let segments: Vec<Segment> = unsafe {
            match request.segments_len {
                0 => Vec::new(),
                len => std::slice::from_raw_parts(request.segments, len as usize).to_vec(),
            }
        };
        assert!(segments.len() <= pair.size.segments as usize, "a request has more segments than its queue");
        let breaks = world.disturbance.breaks;
        let is_broken = breaks > 0 && world.random.below(breaks) == 0;
        // Before it is carried out, or after it.
        let carried_out = is_broken && world.random.chance(500);
        let at = world.soon(3_000);
        let last = world.pairs.get(&number).and_then(|pair| match pair.works.back()?.state {
            Progress::Posted(at) => Some(at),
            _ => None,
        });
        let at = last.map_or(at, |last: Instant| last.max(at));
        if !is_broken || carried_out {
            let work = Work { request: *request, segments, state: Progress::Posted(at) };
            if let Some(pair) = world.pairs.get_mut(&number) {
                pair.works.push_back(work);
            }
            world.changed = true;
            if !world.is_timed {
                let now = world.now;
                world.progress(now);
            }
        }
        if is_broken {
            world.break_connection(number);
            if let Some(pair) = world.pairs.get_mut(&number) {
                pair.completions.push_back((true, WorkCompletion { status: RETRIES, ..completion }));
            }
        }
    }
    world.changed = true;
    // SAFETY: the caller's promise.
    unsafe { *posted = taken };
    result
}

unsafe extern "C" fn post_receive(
    queue: *mut Queue,
    requests: *const ReceiveRequest,
    len: u32,
    posted: *mut u32,
) -> i32 {
    let mut world = here();
    // SAFETY: the caller's promise.
    let requests = unsafe { std::slice::from_raw_parts(requests, len as usize) };
    let number = queue as u64;
    let mut taken = 0;
    let mut result = 0;
    for request in requests {
        let start = (request.segment.address, u64::from(request.segment.len));
        let region = regions().get(&u64::from(request.segment.key)).copied();
        assert!(region.is_some_and(|it| it.has(start.0, start.1)), "receives go to registered memory");
        let Some(pair) = world.pairs.get_mut(&number) else {
            result = -libc::EINVAL;
            break;
        };
        if pair.receives.len() >= pair.size.receives as usize {
            result = -libc::ENOMEM;
            break;
        }
        taken += 1;
        if pair.failed {
            pair.completions.push_back((false, flushed(request.user)));
        } else {
            pair.receives.push_back(*request);
        }
    }
    // SAFETY: the caller's promise.
    unsafe { *posted = taken };
    world.changed = true;
    if !world.is_timed {
        let now = world.now;
        world.progress(now);
    }
    result
}

unsafe extern "C" fn poll(queue: *mut Queue, out: *mut WorkCompletion, len: u32) -> i32 {
    let mut world = here();
    let number = queue as u64;
    let Some(failed) = world.pairs.get(&number).map(|pair| pair.failed) else { return -libc::EIO };
    // A queue in error is not flushed at once.
    if failed && world.is_timed && world.random.chance(200) {
        return 0;
    }
    // What is late comes by and by, in an order of its own for each direction.
    for direction in [SENDS, RECEIVES] {
        while world.pairs.get(&number).is_some_and(|pair| !pair.late[direction].is_empty())
            && world.random.chance(500)
        {
            let Some(pair) = world.pairs.get_mut(&number) else { break };
            let late = pair.late[direction].pop_front();
            pair.completions.extend(late.map(|completion| (direction == SENDS, completion)));
        }
    }
    let Some(pair) = world.pairs.get_mut(&number) else { return 0 };
    let count = pair.completions.len().min(len as usize);
    let mut dead = Vec::new();
    for (index, (_, completion)) in pair.completions.drain(..count).enumerate() {
        dead.extend(pair.dying.remove(&completion.user).filter(|_| completion.status == 0));
        // SAFETY: the caller gives room for `len`.
        unsafe { *out.add(index) = completion };
    }
    for key in dead {
        if let Some(window) = world.window_of(key) {
            window.bound = None;
        }
    }
    i32::try_from(count).unwrap_or(0)
}

unsafe extern "C" fn arm(queue: *mut Queue) -> i32 {
    let mut world = here();
    let Some(pair) = world.pairs.get_mut(&(queue as u64)) else { return -libc::EIO };
    pair.armed = true;
    // What is late is noticed all the same.
    let (fd, is_late) = (pair.fd, pair.late.iter().any(|late| !late.is_empty()));
    world.clear(fd);
    if is_late {
        world.signal(fd);
    }
    0
}

/// See the module's text.
pub static TABLE: Table = Table {
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
