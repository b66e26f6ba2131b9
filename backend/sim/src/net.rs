//! TCP as a program sees it: two pipes of bytes with delay and a window, refusals, resets, silence.

use crate::random::Random;
use hawser_runtime::Instant;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

/// Bytes on their way in one direction.
#[derive(Default)]
struct Pipe {
    segments: VecDeque<(Instant, Vec<u8>)>,
    in_flight: usize,
    last_arrival: Instant,
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
    /// Both ends see ECONNRESET from now on.
    Reset,
}

/// One end of a connection, or a socket that will become one.
pub(crate) struct Socket {
    life: Life,
    peer: Option<usize>,
    incoming: Pipe,
    /// Who listens, of the connection's server side: faults are asked for by address.
    address: Option<SocketAddr>,
}

pub(crate) struct Listener {
    pub(crate) address: SocketAddr,
    /// Server ends that wait for an accept.
    pub(crate) backlog: VecDeque<usize>,
    /// Connections are refused while it is down, as if the process were gone.
    pub(crate) down: bool,
}

/// All sockets of a world. Keys are never used again.
#[derive(Default)]
pub(crate) struct Net {
    sockets: Vec<Option<Socket>>,
    pub(crate) listeners: Vec<Listener>,
    /// Addresses through which nothing passes until the time given: bytes wait, as TCP would retransmit them.
    silences: Vec<(SocketAddr, Instant)>,
}

impl Net {
    pub(crate) fn socket(&mut self) -> usize {
        self.sockets.push(Some(Socket {
            life: Life::New,
            peer: None,
            incoming: Pipe::default(),
            address: None,
        }));
        self.sockets.len() - 1
    }

    fn get(&mut self, key: usize) -> Option<&mut Socket> {
        self.sockets.get_mut(key)?.as_mut()
    }

    pub(crate) fn listen(&mut self, address: SocketAddr) -> usize {
        self.listeners.push(Listener { address, backlog: VecDeque::new(), down: false });
        self.listeners.len() - 1
    }

    /// Connects `key` to whoever listens at `address`.
    pub(crate) fn connect(&mut self, key: usize, address: SocketAddr) -> Result<(), i32> {
        let listener = self.listeners.iter().position(|l| l.address == address && !l.down);
        let Some(listener) = listener else { return Err(libc::ECONNREFUSED) };
        let server = self.socket();
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
    pub(crate) fn room(&mut self, key: usize) -> Result<usize, i32> {
        let socket = self.get(key).ok_or(libc::EBADF)?;
        let (life, peer) = (socket.life, socket.peer);
        match (life, peer.and_then(|peer| self.get(peer))) {
            (Life::Reset, _) => Err(libc::ECONNRESET),
            (Life::New, _) => Err(libc::ENOTCONN),
            (Life::Open, None) => Err(libc::EPIPE),
            (Life::Open, Some(peer)) if peer.incoming.ended => Err(libc::EPIPE),
            (Life::Open, Some(peer)) => Ok(WINDOW.saturating_sub(peer.incoming.in_flight)),
        }
    }

    /// Sends bytes that [`Net::room`] allowed; they arrive in order, after a while.
    pub(crate) fn send(&mut self, key: usize, bytes: Vec<u8>, now: Instant, delay: Duration) {
        let Some(peer) = self.get(key).and_then(|socket| socket.peer) else { return };
        let Some(peer) = self.get(peer) else { return };
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
        if silent {
            return Ok(None);
        }
        let pipe = &mut socket.incoming;
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

    /// Ends both directions, as `shutdown(SHUT_RDWR)`.
    pub(crate) fn shutdown(&mut self, key: usize) {
        let Some(socket) = self.get(key) else { return };
        socket.incoming.ended = true;
        socket.incoming.segments.clear();
        socket.incoming.in_flight = 0;
        let peer = socket.peer;
        if let Some(peer) = peer.and_then(|peer| self.get(peer)) {
            peer.incoming.ended = true;
        }
    }

    pub(crate) fn close(&mut self, key: usize) {
        self.shutdown(key);
        if let Some(place) = self.sockets.get_mut(key) {
            *place = None;
        }
    }

    /// Resets every connection to `address`, and loses the bytes under way.
    pub(crate) fn reset_all(&mut self, address: SocketAddr) {
        for socket in self.sockets.iter_mut().flatten() {
            if socket.address == Some(address) && socket.life == Life::Open {
                socket.life = Life::Reset;
                socket.incoming = Pipe::default();
            }
        }
        for listener in self.listeners.iter_mut().filter(|listener| listener.address == address) {
            listener.backlog.clear();
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

    pub(crate) fn silence(&mut self, address: SocketAddr, until: Instant) {
        self.silences.push((address, until));
    }

    fn silent_until(&mut self, key: usize) -> Option<Instant> {
        let address = self.get(key)?.address?;
        self.silences.iter().filter(|(other, _)| *other == address).map(|(_, until)| *until).max()
    }

    /// The next time at which something arrives or a silence ends.
    pub(crate) fn next_event(&self, now: Instant) -> Option<Instant> {
        let arrivals = self.sockets.iter().flatten().filter_map(|socket| socket.incoming.segments.front());
        let times = arrivals.map(|(at, _)| *at).chain(self.silences.iter().map(|(_, until)| *until));
        times.filter(|at| *at > now).min()
    }
}
