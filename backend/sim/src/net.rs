//! TCP as a program sees it: two pipes of bytes with delay and a window, refusals, resets, silence.
//!
//! Faults are asked for by the address that is connected to, and by side: the host connected, the target listens. What is
//! on its way may be held in the network for a while, as a middle box or a queue does, and arrive when nobody expects it.

use crate::random::Random;
use hawser_runtime::Instant;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who connected.
    Host,
    /// Who listens.
    Target,
}

/// Which ends a fault meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sides {
    /// One of them.
    One(Side),
    /// Both.
    Both,
}

impl Sides {
    pub(crate) fn has(self, side: Side) -> bool {
        self == Sides::Both || self == Sides::One(side)
    }
}

/// Bytes on their way in one direction.
#[derive(Default)]
struct Pipe {
    segments: VecDeque<(Instant, Vec<u8>)>,
    in_flight: usize,
    last_arrival: Instant,
    /// Nothing of it arrives before, its end neither.
    held_until: Instant,
    /// The sender will send no more; the receiver sees the end after the bytes.
    ended: bool,
}

/// As much as a sender may have under way before its `send` waits.
const WINDOW: usize = 64 << 10;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    /// Made, not connected.
    New,
    Open,
    /// This end sees ECONNRESET from now on.
    Reset,
}

/// One end of a connection, or a socket that will become one.
pub(crate) struct Socket {
    life: Life,
    side: Side,
    /// The reactor that it lives on; it dies with it.
    owner: usize,
    peer: Option<usize>,
    incoming: Pipe,
    /// It was shut down by its owner.
    shut: bool,
    /// Who listens: faults are asked for by address.
    address: Option<SocketAddr>,
}

pub(crate) struct Listener {
    pub(crate) address: SocketAddr,
    /// Server ends that wait for an accept.
    pub(crate) backlog: VecDeque<usize>,
    /// Connections are refused while it is down, as if the process were gone.
    pub(crate) down: bool,
}

/// Nothing passes to one side.
struct Silence {
    address: SocketAddr,
    /// The side that hears nothing.
    side: Side,
    until: Instant,
}

/// All sockets of a world. Keys are never used again.
#[derive(Default)]
pub(crate) struct Net {
    sockets: Vec<Option<Socket>>,
    /// Those of them that may still be there.
    open: Vec<usize>,
    pub(crate) listeners: Vec<Listener>,
    silences: Vec<Silence>,
    /// When connections were asked for, by address.
    pub(crate) connects: Vec<(SocketAddr, Instant)>,
    /// In 1000 connections that a host ends, how many times its end is lost on the way, with what it sent held up.
    pub(crate) lost_ends_permille: u64,
}

impl Net {
    pub(crate) fn socket(&mut self, owner: usize, side: Side) -> usize {
        self.sockets.push(Some(Socket {
            life: Life::New,
            side,
            owner,
            peer: None,
            incoming: Pipe::default(),
            shut: false,
            address: None,
        }));
        let key = self.sockets.len() - 1;
        self.open.push(key);
        key
    }

    fn get(&mut self, key: usize) -> Option<&mut Socket> {
        self.sockets.get_mut(key)?.as_mut()
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Socket> {
        self.sockets.iter_mut().flatten()
    }

    pub(crate) fn own(&mut self, key: usize, owner: usize) {
        if let Some(socket) = self.get(key) {
            socket.owner = owner;
        }
    }

    pub(crate) fn listen(&mut self, address: SocketAddr) -> usize {
        self.listeners.push(Listener { address, backlog: VecDeque::new(), down: false });
        self.listeners.len() - 1
    }

    /// Whether a connection's beginning is on its way to `address` in vain.
    pub(crate) fn is_unreachable(&self, address: SocketAddr, now: Instant) -> bool {
        self.silences.iter().any(|silence| silence.address == address && silence.until > now)
    }

    /// Connects `key` to whoever listens at `address`: the newest listener there.
    pub(crate) fn connect(&mut self, key: usize, address: SocketAddr, now: Instant) -> Result<(), i32> {
        self.connects.push((address, now));
        let listener = self.listeners.iter().rposition(|l| l.address == address && !l.down);
        let Some(listener) = listener else { return Err(libc::ECONNREFUSED) };
        let server = self.socket(usize::MAX, Side::Target);
        for (end, peer) in [(key, server), (server, key)] {
            let socket = self.get(end).ok_or(libc::EBADF)?;
            socket.life = Life::Open;
            socket.peer = Some(peer);
            socket.address = Some(address);
        }
        self.listeners[listener].backlog.push_back(server);
        Ok(())
    }

    /// How many bytes `key` may send now; an error when it is not connected.
    pub(crate) fn room(&mut self, key: usize, now: Instant) -> Result<usize, i32> {
        let socket = self.get(key).ok_or(libc::EBADF)?;
        let (life, peer, shut) = (socket.life, socket.peer, socket.shut);
        match life {
            Life::Reset => return Err(libc::ECONNRESET),
            Life::New => return Err(libc::ENOTCONN),
            Life::Open if shut => return Err(libc::EPIPE),
            Life::Open => {}
        }
        // Where nothing comes back, nobody tells that the other end is gone.
        let deaf = self.silent_until(key).is_some_and(|until| until > now);
        let Some(key) = peer else { return Err(libc::EPIPE) };
        let peer = self.get(key).filter(|peer| !deaf || (peer.life == Life::Open && !peer.shut));
        match peer {
            None if deaf => Ok(WINDOW),
            None => Err(libc::EPIPE),
            // It answers with a reset, from now on.
            Some(peer) if peer.life == Life::Reset => Err(libc::ECONNRESET),
            Some(peer) if peer.shut => Err(libc::EPIPE),
            Some(peer) => Ok(WINDOW.saturating_sub(peer.incoming.in_flight)),
        }
    }

    /// Sends bytes that [`Net::room`] allowed; they arrive in order, after a while.
    pub(crate) fn send(&mut self, key: usize, bytes: Vec<u8>, now: Instant, delay: Duration) {
        let Some(peer) = self.get(key).and_then(|socket| socket.peer) else { return };
        let Some(peer) = self.get(peer) else { return };
        if peer.life == Life::Reset || peer.shut || peer.incoming.ended {
            return;
        }
        let arrival = (now + delay).max(peer.incoming.last_arrival);
        peer.incoming.last_arrival = arrival;
        peer.incoming.in_flight += bytes.len();
        peer.incoming.segments.push_back((arrival, bytes));
    }

    /// Bytes that have arrived at `key`, at most `len`, any prefix of them. `None`: nothing yet. Empty: the end.
    pub(crate) fn receive(
        &mut self,
        key: usize,
        len: usize,
        now: Instant,
        random: &mut Random,
    ) -> Result<Option<Vec<u8>>, i32> {
        let silent = self.silent_until(key).is_some_and(|until| until > now);
        let socket = self.get(key).ok_or(libc::EBADF)?;
        match socket.life {
            Life::New => return Err(libc::ENOTCONN),
            Life::Reset => return Err(libc::ECONNRESET),
            Life::Open => {}
        }
        let pipe = &mut socket.incoming;
        if !socket.shut && (silent || pipe.held_until > now) {
            return Ok(None);
        }
        let mut arrived = Vec::new();
        while arrived.len() < len && pipe.segments.front().is_some_and(|(at, _)| *at <= now) {
            let (at, mut segment) = pipe.segments.pop_front().unwrap_or_default();
            let rest = segment.split_off(segment.len().min(len - arrived.len()));
            arrived.extend(segment);
            if !rest.is_empty() {
                pipe.segments.push_front((at, rest));
            }
        }
        if arrived.is_empty() {
            return Ok((pipe.ended && pipe.segments.is_empty()).then(Vec::new));
        }
        // TCP keeps no message boundaries: sometimes give back less than there is.
        if random.chance(300) {
            let rest = arrived.split_off(1 + random.index(arrived.len()));
            if !rest.is_empty() {
                pipe.segments.push_front((now, rest));
            }
        }
        pipe.in_flight -= arrived.len();
        Ok(Some(arrived))
    }

    /// Ends both directions, as `shutdown(SHUT_RDWR)`. What a host's end sent before may be held up, and its end lost.
    pub(crate) fn shutdown(&mut self, key: usize, now: Instant, random: &mut Random) {
        let lost_ends_permille = self.lost_ends_permille;
        let Some(socket) = self.get(key).filter(|socket| !socket.shut) else { return };
        socket.shut = true;
        socket.incoming = Pipe { ended: true, ..Pipe::default() };
        let (peer, side) = (socket.peer, socket.side);
        let is_lost = side == Side::Host && lost_ends_permille > 0 && random.chance(lost_ends_permille);
        if let Some(peer) = peer.and_then(|peer| self.get(peer)) {
            if is_lost {
                let bound = random_bound(random);
                let hold = Duration::from_millis(1 + random.below(bound));
                peer.incoming.held_until = peer.incoming.held_until.max(now + hold);
            } else {
                peer.incoming.ended = true;
            }
        }
    }

    pub(crate) fn close(&mut self, key: usize, now: Instant, random: &mut Random) {
        self.shutdown(key, now, random);
        if let Some(place) = self.sockets.get_mut(key) {
            *place = None;
        }
        self.open.retain(|other| *other != key);
    }

    /// Closes everything of a reactor, as the kernel does for a process that is killed.
    pub(crate) fn kill(&mut self, owner: usize, now: Instant, random: &mut Random) {
        let of_owner = |key: &usize| self.sockets[*key].as_ref().is_some_and(|s| s.owner == owner);
        let keys: Vec<_> = self.open.iter().copied().filter(of_owner).collect();
        for key in keys {
            self.close(key, now, random);
        }
    }

    /// Resets connections to `address` at these ends, all or each by chance: what was on its way to such an end is lost. What is
    /// on its way to the other end arrives, but not before `hold` is over.
    pub(crate) fn reset(
        &mut self,
        address: SocketAddr,
        sides: Sides,
        (each_permille, hold): (u64, Duration),
        now: Instant,
        random: &mut Random,
    ) {
        let mut chosen = std::collections::BTreeSet::new();
        for at in 0..self.open.len() {
            let key = self.open[at];
            let Some(socket) = self.get(key).filter(|s| s.address == Some(address)) else { continue };
            let pair = key.min(socket.peer.unwrap_or(key));
            // Both ends of a connection share its fate.
            if socket.side == Side::Host && (each_permille >= 1000 || random.chance(each_permille)) {
                chosen.insert(pair);
            }
            if socket.side == Side::Target && each_permille >= 1000 {
                chosen.insert(pair);
            }
        }
        for socket_key in self.open.clone() {
            let Some(socket) = self.get(socket_key) else { continue };
            let pair = socket_key.min(socket.peer.unwrap_or(socket_key));
            if socket.life != Life::Open || !chosen.contains(&pair) {
                continue;
            }
            if sides.has(socket.side) {
                socket.life = Life::Reset;
                socket.incoming = Pipe::default();
            } else {
                socket.incoming.held_until = socket.incoming.held_until.max(now + hold);
            }
        }
        if sides == Sides::Both {
            for listener in self.listeners.iter_mut().filter(|listener| listener.address == address) {
                listener.backlog.clear();
            }
        }
    }

    /// Ends one direction of connections to `address`, each by chance: that side sees the end, after what is on its way.
    pub(crate) fn half_close(&mut self, address: SocketAddr, side: Side, permille: u64, random: &mut Random) {
        for socket in self.all().filter(|s| s.address == Some(address) && s.side == side) {
            if random.chance(permille) {
                socket.incoming.ended = true;
            }
        }
    }

    /// Holds what is on its way, and what will be, to that side of connections to `address`, each by chance.
    pub(crate) fn hold(
        &mut self,
        address: SocketAddr,
        side: Side,
        permille: u64,
        until: Instant,
        random: &mut Random,
    ) {
        for socket in self.all().filter(|s| s.address == Some(address) && s.side == side) {
            if random.chance(permille) {
                socket.incoming.held_until = socket.incoming.held_until.max(until);
            }
        }
    }

    /// Changes a bit of a byte that is on its way to or from `address`; says whether there was any.
    pub(crate) fn corrupt(&mut self, address: SocketAddr, random: &mut Random) -> bool {
        let there = |socket: &&mut Socket| socket.address == Some(address);
        let sockets = self.sockets.iter_mut().flatten().filter(there);
        let mut segments: Vec<_> =
            sockets.flat_map(|socket| &mut socket.incoming.segments).map(|(_, bytes)| bytes).collect();
        segments.retain(|bytes| !bytes.is_empty());
        if segments.is_empty() {
            return false;
        }
        let segment = random.index(segments.len());
        let at = random.index(segments[segment].len());
        segments[segment][at] ^= 1 << random.index(8);
        true
    }

    pub(crate) fn silence(&mut self, address: SocketAddr, sides: Sides, until: Instant) {
        for side in [Side::Host, Side::Target] {
            if sides.has(side) {
                self.silences.push(Silence { address, side, until });
            }
        }
    }

    /// All silences end now; what was held arrives.
    pub(crate) fn end_silences(&mut self, now: Instant) {
        self.silences.clear();
        for socket in self.all() {
            socket.incoming.held_until = socket.incoming.held_until.min(now);
        }
    }

    fn silent_until(&mut self, key: usize) -> Option<Instant> {
        let (address, side) = self.get(key).and_then(|socket| Some((socket.address?, socket.side)))?;
        let meets = |silence: &&Silence| silence.address == address && silence.side == side;
        self.silences.iter().filter(meets).map(|silence| silence.until).max()
    }

    /// The next time at which something arrives or a silence ends.
    pub(crate) fn next_event(&self, now: Instant) -> Option<Instant> {
        let sockets = self.open.iter().filter_map(|key| self.sockets[*key].as_ref());
        let arrivals = sockets.filter_map(|socket| {
            let pipe = &socket.incoming;
            let first = pipe.segments.front().map(|(at, _)| (*at).max(pipe.held_until));
            first.or((pipe.held_until > now).then_some(pipe.held_until))
        });
        let times = arrivals.chain(self.silences.iter().map(|silence| silence.until));
        times.filter(|at| *at > now).min()
    }
}

/// Holds are mostly short, and sometimes longer than a keep-alive.
fn random_bound(random: &mut Random) -> u64 {
    [20, 400, 3_000, 12_000][random.index(4)]
}
