//! One reactor's driver in a simulated world.

use crate::net::Side;
use crate::verbs::FD_BASE;
use crate::world::World;
use hawser_runtime::{Completed, Driver, Fd, Instant, Op, Wait};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// Descriptors of the world are far above those of the process, which also reach a driver (the inbox's eventfd).
const SOCKET_BASE: i32 = 1 << 24;
pub(crate) const LISTENER_BASE: i32 = 1 << 28;

pub(crate) struct SimDriver {
    world: World,
    index: usize,
    under_way: Vec<Pending>,
    /// Waits for descriptors of verbs.
    polls: Vec<(u64, i32)>,
    completed: Vec<(u64, Completed)>,
}

struct Pending {
    user: u64,
    op: Op,
    /// Nothing happens to it before.
    not_before: Instant,
    /// Bytes of a send that are taken.
    sent: usize,
    /// When it was cancelled, that takes effect; it may be done before.
    cancelled: Instant,
}

impl SimDriver {
    pub(crate) fn new(world: World, index: usize) -> SimDriver {
        SimDriver { world, index, under_way: Vec::new(), polls: Vec::new(), completed: Vec::new() }
    }

    /// Moves everything on that can move at this time, in random order.
    fn progress(&mut self) {
        if self.under_way.is_empty() {
            return;
        }
        let mut pending = std::mem::take(&mut self.under_way);
        for round in (1..pending.len()).rev() {
            let other = self.world.state.borrow_mut().random.index(round + 1);
            // Also among operations of one socket: whoever needs an order has one receive and one send at a time.
            pending.swap(round, other);
        }
        let now = self.world.now();
        let mut next = Instant::NEVER;
        for mut entry in pending {
            if entry.not_before > now {
                next = next.min(entry.not_before);
                self.under_way.push(entry);
                continue;
            }
            let sent = entry.sent;
            match self.advance(&mut entry) {
                Some(result) => self.completed.push((entry.user, Completed { result, more: false })),
                None => {
                    if entry.sent > sent {
                        // The rest goes soon, whether or not anything else happens.
                        next = next.min(now + Duration::from_micros(1));
                    }
                    if entry.cancelled > now {
                        next = next.min(entry.cancelled);
                    }
                    self.under_way.push(entry);
                }
            }
        }
        self.world.state.borrow_mut().due[self.index] = next;
    }

    /// One operation's progress: its result, or `None` while it goes on.
    fn advance(&mut self, entry: &mut Pending) -> Option<i32> {
        let mut state = self.world.state.borrow_mut();
        let state = &mut *state;
        let cancelled = entry.cancelled <= state.now;
        if cancelled && entry.sent == 0 {
            return Some(-libc::ECANCELED);
        }
        match entry.op {
            Op::Nop => Some(0),
            Op::PollReadable { .. } => None,
            Op::Connect { fd, address, len } => {
                // SAFETY: the contract of `Op`: `address` points to `len` bytes until the operation completes.
                let address = unsafe { read_address(address, len) };
                if state.net.is_unreachable(address, state.now) {
                    return None;
                }
                state.trace(&[1, state.now.0]);
                Some(match state.net.connect(socket_key(fd), address, state.now) {
                    Ok(()) => 0,
                    Err(errno) => -errno,
                })
            }
            Op::Accept { fd } => {
                let listener = state.net.listeners.get_mut(usize::try_from(fd.0 - LISTENER_BASE).ok()?)?;
                let accepted = listener.backlog.pop_front()?;
                state.net.own(accepted, self.index);
                Some(SOCKET_BASE + i32::try_from(accepted).unwrap_or(0))
            }
            Op::Recv { .. } | Op::Recvmsg { .. } => {
                let (fd, targets) = receive_targets(&entry.op);
                let room = targets.iter().map(|iovec| iovec.iov_len).sum();
                match state.net.receive(socket_key(fd), room, state.now, &mut state.random) {
                    Err(errno) => Some(-errno),
                    Ok(None) => None,
                    Ok(Some(bytes)) => {
                        // SAFETY: the contract of `Op`: the targets are writable until the operation completes.
                        unsafe { scatter(&bytes, &targets) };
                        state.trace(&[2, fd.0.unsigned_abs().into(), bytes.len() as u64, state.now.0]);
                        i32::try_from(bytes.len()).ok()
                    }
                }
            }
            Op::Send { .. } | Op::Sendmsg { .. } => {
                let (fd, sources) = send_sources(&entry.op);
                let total: usize = sources.iter().map(|iovec| iovec.iov_len).sum();
                let room = match state.net.room(socket_key(fd), state.now) {
                    Ok(room) => room,
                    Err(errno) if entry.sent == 0 => return Some(-errno),
                    Err(_) => return i32::try_from(entry.sent).ok(),
                };
                let left = total - entry.sent;
                if left == 0 {
                    return i32::try_from(total).ok();
                }
                if cancelled {
                    return i32::try_from(entry.sent).ok();
                }
                if room == 0 {
                    return None;
                }
                // The payload is read here, at any time between submission and completion, as a kernel would.
                let most = room.min(left);
                let take = if state.random.chance(500) { most } else { 1 + state.random.index(most) };
                // SAFETY: the contract of `Op`: the sources are readable until the operation completes.
                let bytes = unsafe { gather(&sources, entry.sent, take) };
                let delay = state.random.below(u64::try_from(state.delay_max.as_nanos()).unwrap_or(1).max(1));
                state.trace(&[3, fd.0.unsigned_abs().into(), take as u64, state.now.0]);
                state.net.send(socket_key(fd), bytes, state.now, Duration::from_nanos(delay));
                entry.sent += take;
                (entry.sent == total).then(|| i32::try_from(total).unwrap_or(i32::MAX))
            }
            // No files in this world yet.
            Op::Readv { .. } | Op::Writev { .. } | Op::Fdatasync { .. } | Op::Fallocate { .. } => {
                Some(-libc::EBADF)
            }
        }
    }
}

impl Driver for SimDriver {
    unsafe fn submit(&mut self, user: u64, op: &Op) {
        let mut state = self.world.state.borrow_mut();
        let wait = match op {
            Op::Connect { .. } => state.random.below(200_000),
            Op::Nop => 0,
            _ => state.random.below(3_000),
        };
        let not_before = state.now + Duration::from_nanos(wait);
        drop(state);
        if let Op::PollReadable { fd } = op {
            // Nothing else ever becomes readable by itself: who posts says so by other means.
            if fd.0 >= FD_BASE {
                self.polls.push((user, fd.0));
                if let Some(verbs) = self.world.state.borrow().verbs {
                    verbs.own(fd.0, self.index);
                }
            }
            return;
        }
        self.under_way.push(Pending { user, op: *op, not_before, sent: 0, cancelled: Instant::NEVER });
        self.world.state.borrow_mut().is_waited_for[self.index] = true;
    }

    fn cancel(&mut self, user: u64) {
        if let Some(place) = self.polls.iter().position(|(poll, _)| *poll == user) {
            self.polls.remove(place);
            self.completed.push((user, Completed { result: -libc::ECANCELED, more: false }));
        }
        let state = &mut *self.world.state.borrow_mut();
        state.is_waited_for[self.index] = true;
        for entry in self.under_way.iter_mut().filter(|entry| entry.user == user) {
            let wait = if state.random.chance(700) { 0 } else { state.random.below(2_000_000) };
            entry.cancelled = entry.cancelled.min(state.now + Duration::from_nanos(wait));
        }
    }

    fn enter(&mut self, wait: Wait) {
        let wake_at = match wait {
            Wait::No => Instant::NEVER,
            Wait::Until(at) => at,
        };
        self.world.state.borrow_mut().wake_at[self.index] = wake_at;
    }

    fn reap(&mut self, out: &mut Vec<(u64, Completed)>) {
        self.progress();
        let (now, verbs) = (self.world.now(), self.world.state.borrow().verbs);
        if let Some(verbs) = verbs {
            verbs.progress(now);
            let ready = self.polls.iter().filter(|(_, fd)| verbs.take_signal(*fd));
            self.completed.extend(ready.map(|(user, _)| (*user, Completed { result: 1, more: true })));
        }
        out.append(&mut self.completed);
        self.world.state.borrow_mut().is_waited_for[self.index] = !self.under_way.is_empty();
    }

    fn quiesce(&mut self) -> bool {
        self.under_way.clear();
        self.polls.clear();
        self.completed.clear();
        true
    }

    fn now(&self) -> Instant {
        self.world.now()
    }

    fn random(&mut self) -> u64 {
        self.world.state.borrow_mut().random.next_u64()
    }

    /// What is done for RDMA on threads takes its time; files are kept at once.
    fn thread_takes(&mut self) -> Duration {
        let state = &mut *self.world.state.borrow_mut();
        match state.verbs {
            None => Duration::ZERO,
            Some(_) => {
                let shift = state.random.below(12);
                Duration::from_nanos(1 + state.random.below(2_000_000 >> shift))
            }
        }
    }

    fn tcp_socket(&mut self, _ipv6: bool) -> io::Result<Fd> {
        let key = self.world.state.borrow_mut().net.socket(self.index, Side::Host);
        Ok(Fd(SOCKET_BASE + i32::try_from(key).unwrap_or(0)))
    }

    fn close(&mut self, fd: Fd) {
        let named = self.under_way.iter().any(|entry| op_fd(&entry.op) == Some(fd));
        assert!(!named, "a socket is closed while an operation names it");
        let state = &mut *self.world.state.borrow_mut();
        state.net.close(socket_key(fd), state.now, &mut state.random);
    }

    fn shutdown(&mut self, fd: Fd) {
        let state = &mut *self.world.state.borrow_mut();
        state.net.shutdown(socket_key(fd), state.now, &mut state.random);
    }
}

fn socket_key(fd: Fd) -> usize {
    usize::try_from(fd.0 - SOCKET_BASE).unwrap_or(usize::MAX)
}

fn op_fd(op: &Op) -> Option<Fd> {
    match *op {
        Op::Recv { fd, .. }
        | Op::Recvmsg { fd, .. }
        | Op::Send { fd, .. }
        | Op::Sendmsg { fd, .. }
        | Op::Connect { fd, .. } => Some(fd),
        _ => None,
    }
}

/// # Safety
/// `address` points to `len` readable bytes of a socket address.
unsafe fn read_address(address: *const libc::sockaddr, len: u32) -> SocketAddr {
    // SAFETY: the caller's promise; the family says which structure it is, and `len` is at least its size.
    unsafe {
        if i32::from((*address).sa_family) == libc::AF_INET6 {
            assert!(len as usize >= size_of::<libc::sockaddr_in6>());
            let v6 = address.cast::<libc::sockaddr_in6>().read_unaligned();
            SocketAddr::new(IpAddr::V6(Ipv6Addr::from(v6.sin6_addr.s6_addr)), u16::from_be(v6.sin6_port))
        } else {
            assert!(len as usize >= size_of::<libc::sockaddr_in>());
            let v4 = address.cast::<libc::sockaddr_in>().read_unaligned();
            let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            SocketAddr::new(IpAddr::V4(ip), u16::from_be(v4.sin_port))
        }
    }
}

fn receive_targets(op: &Op) -> (Fd, Vec<libc::iovec>) {
    match *op {
        Op::Recv { fd, buffer, len } => {
            (fd, vec![libc::iovec { iov_base: buffer.cast(), iov_len: len as usize }])
        }
        // SAFETY: the contract of `Op`: header and iovecs stay in place until the operation completes.
        Op::Recvmsg { fd, message } => (fd, unsafe { message_iovecs(message) }),
        _ => unreachable!("asked for receives only"),
    }
}

fn send_sources(op: &Op) -> (Fd, Vec<libc::iovec>) {
    match *op {
        Op::Send { fd, buffer, len } => {
            (fd, vec![libc::iovec { iov_base: buffer.cast_mut().cast(), iov_len: len as usize }])
        }
        // SAFETY: as in `receive_targets`.
        Op::Sendmsg { fd, message } => (fd, unsafe { message_iovecs(message) }),
        _ => unreachable!("asked for sends only"),
    }
}

/// # Safety
/// `message` and the iovecs that it names are readable.
unsafe fn message_iovecs(message: *const libc::msghdr) -> Vec<libc::iovec> {
    // SAFETY: the caller's promise.
    unsafe { (0..(*message).msg_iovlen).map(|index| *(*message).msg_iov.add(index)).collect() }
}

/// # Safety
/// `targets` are writable and hold at least `bytes`.
unsafe fn scatter(mut bytes: &[u8], targets: &[libc::iovec]) {
    for target in targets {
        let (here, rest) = bytes.split_at(bytes.len().min(target.iov_len));
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(here.as_ptr(), target.iov_base.cast(), here.len()) };
        bytes = rest;
    }
}

/// # Safety
/// `sources` are readable.
unsafe fn gather(sources: &[libc::iovec], mut skip: usize, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::with_capacity(len);
    for source in sources {
        let from = skip.min(source.iov_len);
        skip -= from;
        let take = (source.iov_len - from).min(len - bytes.len());
        let start = source.iov_base.cast::<u8>().wrapping_add(from);
        let len = bytes.len();
        // SAFETY: the caller's promise; there is room for `take` more, which are written before they count.
        unsafe {
            start.copy_to_nonoverlapping(bytes.as_mut_ptr().add(len), take);
            bytes.set_len(len + take);
        }
    }
    bytes
}
