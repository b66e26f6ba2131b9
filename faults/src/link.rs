//! One connection through the proxy: a thread that owns both sockets and waits for either, for the test, and for its timers.
//!
//! ```text
//!   host ──read──► received ──whole PDUs──► rules ──► out ──write──► target      (and the same the other way)
//! ```

use super::{Act, Cut, Shared};
use crate::pdu::{self, Commands, Pdu, Way};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// Behind so much that is not passed on yet, nothing more is read: it stays in the kernel's buffers.
const BEHIND_MAX: usize = 8 << 20;

/// Ends a connection with an RST.
pub(super) fn reset(stream: TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let len = libc::socklen_t::try_from(size_of_val(&linger)).unwrap_or(8);
    // SAFETY: `linger` is what SO_LINGER wants, as long as is said; the descriptor is open.
    unsafe {
        let fd = stream.as_raw_fd();
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len);
    }
    drop(stream);
}

/// How a side has ended what it sends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Fin,
    Reset,
}

struct Chunk {
    bytes: Vec<u8>,
    sent: usize,
    not_before: Option<Instant>,
    held_by: Option<u64>,
    then: Option<Cut>,
}

/// What goes one way.
struct Half {
    way: Way,
    buffer: Vec<u8>,
    received: Vec<u8>,
    out: VecDeque<Chunk>,
    behind: usize,
    /// The bytes are no PDUs: they are passed on as they come.
    opaque: bool,
    end: Option<End>,
    /// The end has been passed on, or the receiver takes nothing more: what comes is thrown away.
    over: bool,
}

impl Half {
    fn new(way: Way) -> Half {
        let (buffer, received, out) = (vec![0; 256 << 10], Vec::new(), VecDeque::new());
        Half { way, buffer, received, out, behind: 0, opaque: false, end: None, over: false }
    }

    /// Takes what can be had from `from`.
    fn read(&mut self, from: &mut TcpStream) {
        match from.read(&mut self.buffer) {
            Ok(0) => self.end = Some(End::Fin),
            Ok(len) => self.received.extend_from_slice(&self.buffer[..len]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            // Behind what is held back it is one that was lost: the receiver reads on.
            Err(_) if !self.out.is_empty() => self.end = Some(End::Fin),
            Err(_) => self.end = Some(End::Reset),
        }
    }

    /// Whether more is taken from its side.
    fn is_read(&self) -> bool {
        self.end.is_none() && (self.over || self.behind < BEHIND_MAX)
    }

    /// Puts whole PDUs out, as the rules say.
    fn sort(&mut self, link: u64, commands: &mut Commands, shared: &Shared) {
        if self.over {
            self.received.clear();
            return;
        }
        let mut at = 0;
        while !self.opaque {
            match pdu::length(&self.received[at..]) {
                Ok(Some(length)) if self.received.len() - at >= length => {
                    let bytes = self.received[at..at + length].to_vec();
                    at += length;
                    let command = commands.note(&bytes);
                    let (queue, way) = (commands.queue, self.way);
                    let decided = shared.decide(&Pdu { link, queue, way, bytes: &bytes, command });
                    self.put(bytes, decided);
                }
                Ok(_) => break,
                Err(()) => self.opaque = true,
            }
        }
        self.received.drain(..at);
        if (self.opaque || self.end.is_some()) && !self.received.is_empty() {
            let rest = std::mem::take(&mut self.received);
            self.put(rest, None);
        }
    }

    fn put(&mut self, mut bytes: Vec<u8>, decided: Option<(u64, Act)>) {
        self.behind += bytes.len();
        let mut chunk = Chunk { bytes: Vec::new(), sent: 0, not_before: None, held_by: None, then: None };
        match decided {
            None => {}
            Some((rule, Act::Hold(after))) => {
                let held = bytes.split_off(after.min(bytes.len()));
                self.out.push_back(Chunk { bytes, ..chunk });
                bytes = held;
                chunk =
                    Chunk { bytes: Vec::new(), sent: 0, not_before: None, held_by: Some(rule), then: None };
            }
            Some((_, Act::Delay(delay))) => chunk.not_before = Some(Instant::now() + delay),
            Some((_, Act::Flip(at))) => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1;
                }
            }
            Some((_, Act::CutAfter(after, cut))) => {
                bytes.truncate(after);
                chunk.then = Some(cut);
            }
        }
        self.out.push_back(Chunk { bytes, ..chunk });
    }

    /// Whether the first bytes may be passed on; else when they may, if time alone decides.
    fn is_due(&self, shared: &Shared) -> Result<bool, Instant> {
        let Some(first) = self.out.front() else { return Ok(false) };
        if first.held_by.is_some_and(|rule| shared.is_held_by(rule)) {
            return Ok(false);
        }
        match first.not_before {
            Some(at) if at > Instant::now() => Err(at),
            _ => Ok(true),
        }
    }

    /// Passes on what may be and can be; a cut that came after something.
    fn write(&mut self, to: Option<&mut TcpStream>, shared: &Shared) -> Option<Cut> {
        let Some(to) = to.filter(|_| !self.over) else {
            self.throw_away();
            return None;
        };
        while self.is_due(shared) == Ok(true) {
            let first = self.out.front_mut()?;
            if first.sent < first.bytes.len() {
                match to.write(&first.bytes[first.sent..]) {
                    Ok(len) => first.sent += len,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                    Err(_) => {
                        self.throw_away();
                        return None;
                    }
                }
                continue;
            }
            self.behind -= first.bytes.len().min(self.behind);
            let then = first.then;
            self.out.pop_front();
            if then.is_some() {
                return then;
            }
        }
        None
    }

    fn throw_away(&mut self) {
        self.over = true;
        self.out.clear();
        self.received.clear();
        self.behind = 0;
    }
}

struct Link<'a> {
    id: u64,
    host: Option<TcpStream>,
    target: Option<TcpStream>,
    to_target: Half,
    to_host: Half,
    commands: Commands,
    shared: &'a Shared,
}

/// Passes on until both ways have ended.
pub(super) fn run(id: u64, host: TcpStream, target: TcpStream, wakes: &UnixStream, shared: &Shared) {
    let (to_target, to_host) = (Half::new(Way::ToTarget), Half::new(Way::ToHost));
    let commands = Commands::default();
    let mut link = Link { id, host: Some(host), target: Some(target), to_target, to_host, commands, shared };
    loop {
        let cuts = {
            let mut state = shared.lock();
            state.links.get_mut(&id).map(|link| std::mem::take(&mut link.cuts)).unwrap_or_default()
        };
        for cut in cuts {
            link.cut(cut);
        }
        if link.pass_on() {
            return;
        }
        link.wait(wakes);
        let mut drain = [0; 64];
        while (&mut &*wakes).read(&mut drain).is_ok_and(|len| len == drain.len()) {}
    }
}

impl Link<'_> {
    /// Passes on what can be; whether the link is over.
    fn pass_on(&mut self) -> bool {
        if let Some(host) = self.host.as_mut().filter(|_| self.to_target.is_read()) {
            self.to_target.read(host);
        }
        if let Some(target) = self.target.as_mut().filter(|_| self.to_host.is_read()) {
            self.to_host.read(target);
        }
        self.to_target.sort(self.id, &mut self.commands, self.shared);
        self.to_host.sort(self.id, &mut self.commands, self.shared);
        for cut in [
            self.to_target.write(self.target.as_mut(), self.shared),
            self.to_host.write(self.host.as_mut(), self.shared),
        ]
        .into_iter()
        .flatten()
        {
            self.cut(cut);
        }
        self.pass_ends_on();
        // A side whose peer was cut off is kept until it ends by itself, and what is held back is passed on before.
        let done = |half: &Half, from: &Option<TcpStream>| {
            (from.is_none() || half.end.is_some() && half.over) && (half.over || half.out.is_empty())
        };
        done(&self.to_target, &self.host) && done(&self.to_host, &self.target)
    }

    fn pass_ends_on(&mut self) {
        if self.shared.lock().ends_held {
            return;
        }
        for to_target in [true, false] {
            let half = if to_target { &mut self.to_target } else { &mut self.to_host };
            let Some(end) = half.end.filter(|_| half.out.is_empty() && !half.over) else { continue };
            half.over = true;
            let to = if to_target { &mut self.target } else { &mut self.host };
            match end {
                End::Fin => {
                    let _ = to.as_ref().map(|to| to.shutdown(Shutdown::Write));
                }
                // Whoever sent it takes nothing more either.
                End::Reset => {
                    to.take().into_iter().for_each(reset);
                }
            }
        }
    }

    fn cut(&mut self, cut: Cut) {
        if matches!(cut, Cut::Reset | Cut::ResetHost) {
            self.host.take().into_iter().for_each(reset);
            self.to_host.throw_away();
        }
        if matches!(cut, Cut::Reset | Cut::ResetTarget) {
            self.target.take().into_iter().for_each(reset);
            self.to_target.throw_away();
        }
        if matches!(cut, Cut::Fin | Cut::FinHost) {
            let _ = self.host.as_ref().map(|host| host.shutdown(Shutdown::Write));
            self.to_host.throw_away();
        }
        if matches!(cut, Cut::Fin | Cut::FinTarget) {
            let _ = self.target.as_ref().map(|target| target.shutdown(Shutdown::Write));
            self.to_target.throw_away();
        }
    }

    /// Waits for either side, the test, or a time.
    fn wait(&self, wakes: &UnixStream) {
        let mut until: Option<Instant> = None;
        let mut interest = |half: &Half, from: &Option<TcpStream>, to: &Option<TcpStream>| {
            let writes = match half.is_due(self.shared) {
                Ok(due) => due && to.is_some(),
                Err(at) => {
                    until = Some(until.map_or(at, |until| until.min(at)));
                    false
                }
            };
            (from.is_some() && half.is_read(), writes)
        };
        let (host_in, target_out) = interest(&self.to_target, &self.host, &self.target);
        let (target_in, host_out) = interest(&self.to_host, &self.target, &self.host);
        let entry = |stream: &Option<TcpStream>, reads: bool, writes: bool| {
            let events = if reads { libc::POLLIN } else { 0 } | if writes { libc::POLLOUT } else { 0 };
            // A side that nothing is wanted of would report its hang-up for ever.
            let fd: RawFd = match stream {
                Some(stream) if events != 0 => stream.as_raw_fd(),
                _ => -1,
            };
            libc::pollfd { fd, events, revents: 0 }
        };
        let mut entries = [
            libc::pollfd { fd: wakes.as_raw_fd(), events: libc::POLLIN, revents: 0 },
            entry(&self.host, host_in, host_out),
            entry(&self.target, target_in, target_out),
        ];
        let timeout_ms = until.map_or(-1, |until| {
            let left = until.saturating_duration_since(Instant::now());
            i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1)
        });
        // SAFETY: three valid entries; descriptors are ours, or negative, which poll passes over.
        unsafe { libc::poll(entries.as_mut_ptr(), 3, timeout_ms) };
    }
}
