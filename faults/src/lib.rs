//! A proxy between NVMe/TCP hosts and their target that delays, holds back, corrupts and cuts: what networks, middle boxes
//! and dying machines do, when a test wants it.
//!
//! ```text
//!   host ──► accept ──► link (a thread) ──► connect ──► target
//!                         │ whole PDUs, in order; each is shown to the rules
//!            test ────────┘ rules, cuts, the door
//! ```
//!
//! Owns: the sockets, and when bytes are passed on. Must not know: hawser's crates, which are tested through it.
//! Invariants:
//! - within a connection that lives no byte is lost, added or moved; only [`Act::Flip`] changes one;
//! - what is held back for the target stays when its host goes away, and is passed on when it is released: so does the network;
//! - a link ends with the proxy.

mod link;
pub mod pdu;
#[cfg(test)]
mod tests;

pub use pdu::{Command, Pdu, Way, kind, opcode};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a target may take to accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// What becomes of a PDU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// So many of its bytes are passed on; the rest, and all behind it, when the rule ends.
    Hold(usize),
    /// It is passed on so much later, and so is all behind it.
    Delay(Duration),
    /// The lowest bit of this byte is turned.
    Flip(usize),
    /// So many of its bytes are passed on; then the connection ends.
    CutAfter(usize, Cut),
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// RST to both.
    Reset,
    /// RST to the host. The target hears nothing.
    ResetHost,
    /// RST to the target. The host hears nothing.
    ResetTarget,
    /// FIN to both, which may still send.
    Fin,
    /// FIN to the host, which may still send.
    FinHost,
    /// FIN to the target, which may still send.
    FinTarget,
}

/// What becomes of new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// They are passed on.
    Open,
    /// They are accepted and reset.
    Refuse,
    /// They are accepted, and nothing is ever said.
    Silent,
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections that came, whatever became of them.
    pub connects: u64,
    /// PDUs that were passed on, held ones too.
    pub pdus: u64,
    /// PDUs that were held back.
    pub held: u64,
    /// PDUs that were delayed.
    pub delayed: u64,
    /// PDUs with a bit turned.
    pub flipped: u64,
    /// Connections that were cut.
    pub cut: u64,
}

type Decide = Box<dyn FnMut(&Pdu<'_>) -> Option<Act> + Send>;

struct RuleState {
    decide: Decide,
    caught: u64,
}

struct LinkState {
    wake: UnixStream,
    cuts: Vec<Cut>,
}

struct State {
    target: SocketAddr,
    door: Door,
    links: BTreeMap<u64, LinkState>,
    next: u64,
    rules: BTreeMap<u64, RuleState>,
    counts: Counts,
    /// FIN and RST are not passed on.
    ends_held: bool,
    /// Connections that nothing is said on.
    silent: Vec<TcpStream>,
    ended: bool,
}

struct Shared {
    state: Mutex<State>,
    /// Told when a rule has caught something, or a link has ended.
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What becomes of this PDU, and by which rule. A rule that holds back what is there already is asked all the same.
    fn decide(&self, pdu: &Pdu<'_>) -> Option<(u64, Act)> {
        let mut state = self.lock();
        state.counts.pdus += 1;
        let decided = state.rules.iter_mut().find_map(|(id, rule)| {
            let act = (rule.decide)(pdu)?;
            rule.caught += 1;
            Some((*id, act))
        });
        match decided? {
            (_, Act::Hold(_)) => state.counts.held += 1,
            (_, Act::Delay(_)) => state.counts.delayed += 1,
            (_, Act::Flip(_)) => state.counts.flipped += 1,
            (_, Act::CutAfter(..)) => state.counts.cut += 1,
        }
        drop(state);
        self.changed.notify_all();
        decided
    }

    fn is_held_by(&self, rule: u64) -> bool {
        self.lock().rules.contains_key(&rule)
    }
}

impl State {
    fn wake_all(&mut self) {
        for link in self.links.values_mut() {
            wake(&link.wake);
        }
    }
}

fn wake(stream: &UnixStream) {
    // Full: it will look anyway. Gone: its link ends.
    let _ = (&mut &*stream).write(&[1]);
}

/// A running proxy. Dropping it resets all its connections.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens on a free port of the loopback, for connections that go to `target`.
    ///
    /// # Errors
    /// When there is no port or no thread.
    pub fn start(target: SocketAddr) -> io::Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = State {
            target,
            door: Door::Open,
            links: BTreeMap::new(),
            next: 0,
            rules: BTreeMap::new(),
            counts: Counts::default(),
            ends_held: false,
            silent: Vec::new(),
            ended: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let own = Arc::clone(&shared);
        thread::Builder::new().name("proxy".into()).spawn(move || accept(&listener, &own))?;
        Ok(Proxy { address, shared })
    }

    /// Where hosts connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where new connections go from now on.
    pub fn set_target(&self, target: SocketAddr) {
        self.shared.lock().target = target;
    }

    /// What becomes of new connections from now on. Those that [`Door::Silent`] took in stay as they are.
    pub fn set_door(&self, door: Door) {
        self.shared.lock().door = door;
    }

    /// Asks `decide` about each PDU from now on, before the rules that are younger, until the rule is dropped. It must not call
    /// the proxy.
    #[must_use = "a rule ends when it is dropped"]
    pub fn rule(&self, decide: impl FnMut(&Pdu<'_>) -> Option<Act> + Send + 'static) -> Rule {
        let mut state = self.shared.lock();
        let id = state.next;
        state.next += 1;
        state.rules.insert(id, RuleState { decide: Box::new(decide), caught: 0 });
        Rule { shared: Arc::clone(&self.shared), id }
    }

    /// Holds back the first PDU of which `which` says so, and all behind it.
    #[must_use = "a rule ends when it is dropped"]
    pub fn hold_one(&self, mut which: impl FnMut(&Pdu<'_>) -> bool + Send + 'static) -> Rule {
        let mut caught = false;
        self.rule(move |pdu| {
            let catches = !caught && which(pdu);
            caught |= catches;
            catches.then_some(Act::Hold(0))
        })
    }

    /// Ends all connections, in the middle of whatever they carry. What is held back for a side that is not cut off stays.
    pub fn cut(&self, cut: Cut) {
        let mut state = self.shared.lock();
        state.silent.clear();
        state.counts.cut += state.links.len() as u64;
        for link in state.links.values_mut() {
            link.cuts.push(cut);
            wake(&link.wake);
        }
    }

    /// Whether the ends of connections (FIN, RST) are held back from now on, as where they are lost: a side that dies is not
    /// missed by the other.
    pub fn hold_ends(&self, held: bool) {
        let mut state = self.shared.lock();
        state.ends_held = held;
        state.wake_all();
    }

    /// How many connections are passed on now.
    #[must_use]
    pub fn links(&self) -> usize {
        self.shared.lock().links.len()
    }

    /// What has happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.shared.lock().counts
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ended = true;
        state.silent.clear();
        state.rules.clear();
        for link in state.links.values_mut() {
            link.cuts.push(Cut::Reset);
            wake(&link.wake);
        }
        drop(state);
        // The acceptor looks when somebody comes.
        let _ = TcpStream::connect(self.address);
    }
}

/// A rule of a [`Proxy`]. When it is dropped it catches nothing more, and what it has held back is passed on.
pub struct Rule {
    shared: Arc<Shared>,
    id: u64,
}

impl Rule {
    /// How many PDUs it has caught.
    #[must_use]
    pub fn caught(&self) -> u64 {
        self.shared.lock().rules.get(&self.id).map_or(0, |rule| rule.caught)
    }

    /// Waits until it has caught so many; false when they do not come in time.
    #[must_use]
    pub fn wait_caught(&self, count: u64, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut state = self.shared.lock();
        while state.rules.get(&self.id).is_some_and(|rule| rule.caught < count) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Ends it, as dropping does.
    pub fn release(self) {}
}

impl Drop for Rule {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.rules.remove(&self.id);
        state.wake_all();
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for host in listener.incoming() {
        let (door, target) = {
            let mut state = shared.lock();
            if state.ended {
                return;
            }
            state.counts.connects += 1;
            (state.door, state.target)
        };
        let Ok(host) = host else { continue };
        match door {
            Door::Refuse => link::reset(host),
            Door::Silent => shared.lock().silent.push(host),
            Door::Open => {
                if let Some(target) = passes_on(&host, target) {
                    start_link(host, target, shared);
                } else {
                    link::reset(host);
                }
            }
        }
    }
}

/// Connects to the target for `host`, and sets both sockets up.
fn passes_on(host: &TcpStream, target: SocketAddr) -> Option<TcpStream> {
    let target = TcpStream::connect_timeout(&target, CONNECT_LIMIT).ok()?;
    for stream in [host, &target] {
        stream.set_nodelay(true).ok()?;
        stream.set_nonblocking(true).ok()?;
    }
    Some(target)
}

fn start_link(host: TcpStream, target: TcpStream, shared: &Arc<Shared>) {
    let Ok((ours, theirs)) = UnixStream::pair() else { return link::reset(host) };
    if ours.set_nonblocking(true).is_err() || theirs.set_nonblocking(true).is_err() {
        return link::reset(host);
    }
    let id = {
        let mut state = shared.lock();
        let id = state.next;
        state.next += 1;
        state.links.insert(id, LinkState { wake: ours, cuts: Vec::new() });
        id
    };
    let own = Arc::clone(shared);
    let spawned = thread::Builder::new().name(format!("link {id}")).spawn(move || {
        link::run(id, host, target, &theirs, &own);
        own.lock().links.remove(&id);
        own.changed.notify_all();
    });
    if spawned.is_err() {
        shared.lock().links.remove(&id);
    }
}

/// An address whose handshakes are never answered: SYNs are dropped, because its queue of connections is full.
pub struct BlackHole {
    listener: TcpListener,
    _fill: Vec<TcpStream>,
}

impl BlackHole {
    /// Makes one on a free port of the loopback.
    ///
    /// # Errors
    /// When there is no port, or it takes in everybody.
    pub fn start() -> io::Result<BlackHole> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        // SAFETY: plain system call on a descriptor of ours.
        if unsafe { libc::listen(listener.as_raw_fd(), 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let address = listener.local_addr()?;
        let mut fill = Vec::new();
        while fill.len() < 16 {
            match TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
                Ok(stream) => fill.push(stream),
                Err(_) => return Ok(BlackHole { listener, _fill: fill }),
            }
        }
        Err(io::Error::other("the kernel takes in more connections than were asked for"))
    }

    /// Its address.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}
