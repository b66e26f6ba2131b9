//! Our NVMe-oF target, over TCP and RDMA: devices of this process for other hosts.
//!
//! Owns: subsystems, the controllers that hosts make, connections. Must not know: volumes, who made the devices.
//!
//! ```text
//!   listener ──► connections, spread over the reactors ──► a channel per namespace ──► device
//!                 driver: TCP: one receive, one send at a time, many PDUs in each; rdma: work requests, completions
//!                 connection: the protocol, without a socket
//!   registry: controllers by host, shared by all reactors, never on a command's way
//! ```
//!
//! - **No ghost writes.** A Connect to an admin queue is answered when every command that earlier associations of the same
//!   host (NQN and ID) had at a device has ended, closed associations or not. What such an association may still send is
//!   not taken in once it is closed. Identify says so ([`crate::nvme::identify::VENDOR_MARK`]).
//! - Nothing that a peer sends ends more than its own association, or takes more memory than the limits below.
//! - The discovery service answers at every listener.

mod access;
mod connection;
mod driver;
pub mod fuzz;
mod keeper;
mod listener;
mod namespace;
#[cfg(test)]
mod peer;
mod port;
mod rdma;
mod registry;
mod reservations;
#[cfg(test)]
mod tests;
mod uuid;

use crate::nvme::ana::AnaState;
use crate::nvme::{DISCOVERY_NQN, nqn_is_valid, properties};
use crate::pool::{Budget, BufferPool};
use crate::uri::Transport;
use driver::Driver;
use hawser_block::Device;
use hawser_runtime::{Fd, ReactorHandle, Runtime};
use keeper::Keeper;
use listener::RdmaListener;
use namespace::Namespace;
use port::Port;
use registry::{ConnectionRef, Subsystem};
use std::collections::{BTreeMap, HashMap};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The specification that we follow: VS and VER.
const VERSION: u32 = properties::version(2, 0, 0);
/// CRDT1, in 100 ms: for what passes with a device's way back. A host that tries again at once is done with its five tries
/// before that.
const RETRY_DELAY: u16 = 10;
/// Entries of a queue: what CAP.MQES says, counted from 1.
const QUEUE_ENTRIES_MAX: u16 = 128;
/// I/O queues of one association.
const IO_QUEUES_MAX: u16 = 64;
/// Asynchronous Event Requests of one association.
const ASYNC_EVENTS_MAX: usize = 4;
/// Cross-Controller Resets under way that one controller was asked for: what TP8028 recommends.
const CROSS_RESETS_MAX: u8 = 4;
/// Those that it keeps in its log, ended or not.
const CROSS_RESETS_LOGGED_MAX: usize = 64;
/// How long requests of an ended connection may stay at their devices before they are aborted: devices have time-outs of their
/// own, and a Connect of the same host waits for them. Less where their devices take long after that: [`Quiescing`].
const ABORT_GRACE: Duration = Duration::from_secs(30);
/// The least of it.
const ABORT_GRACE_MIN: Duration = Duration::from_secs(1);
/// What passes between the end of an association and the abort, and between the last request's end and the answer, beside the
/// times that are waited for.
const QUIESCE_MARGIN: Duration = Duration::from_secs(1);
/// CQT is a number of milliseconds in 16 bits.
const QUIESCE_TIME_MAX: Duration = Duration::from_millis(0xffff);
/// Data in a capsule: four pages, so that small writes need no R2T.
const IN_CAPSULE_BYTES_MAX: u32 = 16 << 10;
/// The data of one command (MDTS), and of one H2CData (MAXH2CDATA).
const TRANSFER_BYTES_MAX: u32 = 1 << 20;
/// Connections to all subsystems of a target, beside those that are not connected yet.
const CONNECTIONS_MAX: usize = 2048;
/// Connections whose Connect has not come. Anybody who reaches our port can make them, so a new one takes the place of the
/// oldest: hosts that come back all at once are done with theirs within milliseconds.
const STRANGERS_MAX: usize = 256;
/// What all connections of a target may have in memory together. Beyond it no connection is taken in, and those that are
/// there execute one command each at a time, of at most [`TRANSFER_BYTES_MAX`].
const MEMORY_BYTES_MAX: usize = 1 << 30;
/// Connections that may wait to be accepted; the kernel has a limit of its own (net.core.somaxconn).
const ACCEPT_QUEUE: libc::c_int = 4096;
/// How often what peers can repeat is worth a line.
const LOGGED_EVERY: Duration = Duration::from_secs(10);
/// How long a peer may leave what we sent unacknowledged, or a probe of its silence unanswered, before its connection ends:
/// for hosts that ask for no keep-alive.
const PEER_TIMEOUT: Duration = Duration::from_secs(60);

/// The ANA group of namespaces that are in no other: nvmet's default.
pub const ANA_GROUP: u32 = 1;
/// ANATT: how long an address may stay in the ANA state `change`, in seconds.
const ANA_TRANSITION_SECONDS: u8 = 10;

/// How well namespaces can be reached where, as far as it is not group [`ANA_GROUP`] and `optimized`.
#[derive(Clone, Debug, Default)]
pub struct AnaConfig {
    /// NQN, NSID, and the group that this namespace is in: not 0.
    pub groups: Vec<(String, u32, u32)>,
    /// The states that groups begin with.
    pub states: Vec<AnaSetting>,
}

/// The state of one group at one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnaSetting {
    /// The subsystem.
    pub nqn: String,
    /// Which of its addresses, counted from 0.
    pub port: usize,
    /// The group.
    pub group: u32,
    /// Its state.
    pub state: AnaState,
}

impl AnaConfig {
    fn group_of(&self, nqn: &str, nsid: u32) -> u32 {
        let it = self.groups.iter().find(|(other, number, _)| other == nqn && *number == nsid);
        it.map_or(ANA_GROUP, |(_, _, group)| *group)
    }

    fn state_of(&self, nqn: &str, port: usize, group: u32) -> AnaState {
        let here = |it: &&AnaSetting| it.nqn == nqn && it.port == port && it.group == group;
        self.states.iter().find(here).map(|it| it.state).unwrap_or_default()
    }
}

/// How commands of an association that is lost come to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Quiescing {
    /// After so long they are aborted.
    abort_after: Duration,
    /// After so long they have ended: CQT.
    ended_after: Duration,
}

impl Quiescing {
    /// `device`: how long requests may go on at the subsystem's devices after an abort. A device that needs more than
    /// CQT can say is beyond what one can promise.
    fn new(device: Duration) -> Quiescing {
        let rest = device + QUIESCE_MARGIN;
        let abort_after = QUIESCE_TIME_MAX.saturating_sub(rest).clamp(ABORT_GRACE_MIN, ABORT_GRACE);
        Quiescing { abort_after, ended_after: (abort_after + rest).min(QUIESCE_TIME_MAX) }
    }

    /// CQT, rounded up.
    fn to_ms(self) -> u16 {
        u16::try_from(self.ended_after.as_nanos().div_ceil(1_000_000)).unwrap_or(u16::MAX)
    }
}

/// A device in a subsystem.
pub struct NamespaceConfig {
    /// Its NSID: not 0, and each once.
    pub nsid: u32,
    /// What it is.
    pub device: Arc<dyn Device>,
    /// Its UUID; else one made from NQN and NSID. It never follows what a device says of itself once it is reached: hosts
    /// take a namespace whose UUID changes for another one.
    pub uuid: Option<[u8; 16]>,
}

/// A subsystem that hosts connect to.
pub struct SubsystemConfig {
    /// Its name.
    pub nqn: String,
    /// Where it listens; port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    /// What carries commands at each of these; TCP where it does not say.
    pub transports: Vec<Transport>,
    /// The NQNs of the hosts that may connect; `None`: any.
    pub allowed_hosts: Option<Vec<String>>,
    /// Its serial number, at most 20 characters.
    pub serial: String,
    /// What it consists of.
    pub namespaces: Vec<NamespaceConfig>,
}

/// By what the controllers of this process are told from those of processes before it, when a host has one of them reset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// This process: random, and known to the processes after it before anything is asked of it.
    pub own: u32,
    /// Processes that served the same subsystems before it. Whoever says so has seen that none of them runs any more, and has
    /// opened all devices: what they had begun there has ended, or is waited for by the device.
    pub ended: Vec<u32>,
}

/// A reactor that connections live on.
struct Place {
    reactor: ReactorHandle,
    /// Its connections that are I/O queues, or may become such.
    io_queues: AtomicUsize,
}

/// What listeners and connections share.
struct Shared {
    subsystems: Vec<Arc<Subsystem>>,
    /// By listener: the positions of the subsystems that can be reached there.
    listeners: Vec<Vec<usize>>,
    places: Vec<Place>,
    next_connection: AtomicU64,
    next_discovery_cntlid: AtomicU16,
    stopping: AtomicBool,
    /// Every connection that is not quiet, by its ID.
    connections: Mutex<HashMap<u64, ReactorHandle>>,
    /// Those of them whose Connect has not come. A new ID is above all earlier ones, so the first is the oldest.
    strangers: Mutex<BTreeMap<u64, ReactorHandle>>,
    /// Told when a connection is gone.
    gone: Condvar,
    memory: Arc<Budget>,
    /// Connections that were not taken in.
    refusals: Seldom,
    /// Connects of hosts that are not allowed.
    forbidden: Seldom,
    /// Connections that ended because their peer broke the protocol.
    broken: Seldom,
    /// Commands whose data came with a wrong digest.
    corrupted: Seldom,
    /// Copied from receives.
    capsule_bytes: AtomicU64,
    /// Connections without a host that ended for another reason.
    strays: Seldom,
    /// Other discovery services, which ours points to.
    referrals: Mutex<Vec<SocketAddr>>,
    /// `None`: reservations end with us.
    keeper: Option<Keeper>,
}

/// What peers can make happen as often as they like: counted, and worth a line now and then.
#[derive(Default)]
struct Seldom {
    count: AtomicU64,
    /// When that was last worth a line, and how many there were then.
    logged: Mutex<Option<(Instant, u64)>>,
}

impl Seldom {
    /// Counts one. Returns how many there were since the last line, if it is time for another.
    fn add(&self) -> Option<u64> {
        self.add_at(Instant::now())
    }

    fn add_at(&self, now: Instant) -> Option<u64> {
        let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let (then, before) = logged.unwrap_or((now, 0));
        if logged.is_some() && now.duration_since(then) < LOGGED_EVERY {
            return None;
        }
        *logged = Some((now, count));
        Some(count.saturating_sub(before))
    }
}

/// How a target is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetStats {
    /// Connections that are open.
    pub connections: usize,
    /// Connections that were not taken in, since the start.
    pub connections_refused: u64,
    /// Connects of hosts that were not among the allowed ones, since the start.
    pub hosts_refused: u64,
    /// Connections that ended because their peer broke the protocol, since the start.
    pub protocol_errors: u64,
    /// Commands whose data came with a wrong digest, since the start.
    pub digest_errors: u64,
    /// Data that came in capsules over RDMA, and was copied from the receive.
    pub capsule_bytes: u64,
    /// What the connections have in memory.
    pub memory_bytes: usize,
}

impl Shared {
    fn subsystems(&self) -> &[Arc<Subsystem>] {
        &self.subsystems
    }

    /// The subsystem of this name, if it can be reached at this listener.
    fn subsystem(&self, nqn: &str, listener: usize) -> Option<&Arc<Subsystem>> {
        let mut here = self.listeners.get(listener)?.iter().filter_map(|at| self.subsystems.get(*at));
        here.find(|subsystem| subsystem.nqn == nqn)
    }

    fn next_discovery_cntlid(&self) -> u16 {
        self.next_discovery_cntlid.fetch_add(1, Ordering::Relaxed) % 0xffef + 1
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<u64, ReactorHandle>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn referrals(&self) -> MutexGuard<'_, Vec<SocketAddr>> {
        self.referrals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connection_refs(&self) -> Vec<ConnectionRef> {
        let connections = self.connections();
        connections.iter().map(|(id, reactor)| ConnectionRef { reactor: reactor.clone(), id: *id }).collect()
    }

    /// Takes a new connection in, where the fewest I/O queues are: a host often has one and an admin queue, and taking
    /// turns would put all that matter on the same reactor.
    fn accepted(self: &Arc<Self>, runtime: &Runtime, fd: Fd, listener: usize) {
        let Some((id, at)) = self.admit() else { return runtime.close(fd) };
        let shared = Arc::clone(self);
        self.places[at].reactor.run(move |runtime| Driver::start(runtime, shared, id, fd, (listener, at)));
    }

    /// Makes room for a new connection: its ID, and where its reactor is; `None`: it is not taken in.
    fn admit(self: &Arc<Self>) -> Option<(u64, usize)> {
        let at = (0..self.places.len())
            .min_by_key(|at| self.places[*at].io_queues.load(Ordering::Relaxed))
            .expect("a target runs on at least one reactor");
        let Place { reactor, io_queues } = &self.places[at];
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let oldest;
        {
            let mut connections = self.connections();
            let mut strangers = self.strangers();
            let refusal = if self.stopping.load(Ordering::Relaxed) {
                Some("the target stops".to_owned())
            } else if connections.len().saturating_sub(strangers.len()) >= CONNECTIONS_MAX {
                Some(format!("{CONNECTIONS_MAX} are open"))
            } else if self.memory.is_over_with(connection::OWN_BYTES) {
                Some(format!("{} MiB are in use by those that are open", self.memory.used() >> 20))
            } else {
                None
            };
            if let Some(why) = refusal {
                drop((connections, strangers));
                self.refused(&why);
                return None;
            }
            oldest = if strangers.len() >= STRANGERS_MAX { strangers.pop_first() } else { None };
            connections.insert(id, reactor.clone());
            strangers.insert(id, reactor.clone());
        }
        if let Some((id, reactor)) = oldest {
            self.refused("they had not connected, and newer ones came");
            driver::tell(&ConnectionRef { reactor, id }, |driver, runtime| driver.end_stranger(runtime));
        }
        io_queues.fetch_add(1, Ordering::Relaxed);
        Some((id, at))
    }

    /// What was admitted did not come to be.
    fn expel(&self, id: u64, at: usize, why: &str) {
        self.places[at].io_queues.fetch_sub(1, Ordering::Relaxed);
        self.forget(id);
        if let Some(count) = self.strays.add() {
            log::info!("target: a connection came to nothing: {why}; {count} such connections so far");
        }
    }

    /// A connection was not taken in.
    fn refused(&self, why: &str) {
        if let Some(count) = self.refusals.add() {
            log::warn!(
                "target: connections are refused, {count} so far: {why}; hosts try again by themselves"
            );
        }
    }

    fn strangers(&self) -> MutexGuard<'_, BTreeMap<u64, ReactorHandle>> {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, id: u64) {
        let mut connections = self.connections();
        self.strangers().remove(&id);
        connections.remove(&id);
        drop(connections);
        self.gone.notify_all();
    }
}

/// A listening socket.
#[derive(Clone)]
enum Listening {
    /// The kernel's.
    Bound(Arc<OwnedFd>),
    /// The simulator's, which outlives us.
    Simulated(Fd),
    /// rdma_cm's, which its task has; told when that shall end.
    Rdma(Arc<RdmaListener>),
}

impl Listening {
    fn fd(&self) -> Fd {
        match self {
            Listening::Bound(fd) => Fd(fd.as_raw_fd()),
            Listening::Simulated(fd) => *fd,
            Listening::Rdma(listener) => Fd(listener.fd),
        }
    }
}

/// A running target. Dropping it stops it, without waiting for its connections to end.
pub struct Target {
    shared: Arc<Shared>,
    /// Kept open until every accept on them has ended.
    listening: Vec<Listening>,
    /// On which reactor the accepting goes on.
    acceptor: ReactorHandle,
}

impl Target {
    /// Binds all addresses and begins to serve. Connections are spread over `reactors`, of which there is at least one.
    ///
    /// # Errors
    /// When a name, an NSID or a serial cannot be used, or an address cannot be bound: one line for people.
    ///
    /// # Panics
    /// Without reactors.
    pub fn start(subsystems: Vec<SubsystemConfig>, reactors: &[ReactorHandle]) -> Result<Target, String> {
        Target::start_with(subsystems, reactors, None, None, &AnaConfig::default(), bind)
    }

    /// As [`Target::start`], with reservations that are kept in `folder` over restarts, with what is known of processes before, and
    /// with ANA groups.
    ///
    /// # Errors
    /// As [`Target::start`], and when what is in the folder cannot be read or understood.
    pub fn start_keeping(
        subsystems: Vec<SubsystemConfig>,
        reactors: &[ReactorHandle],
        folder: &Path,
        lineage: &Lineage,
        ana: &AnaConfig,
    ) -> Result<Target, String> {
        Target::start_with(subsystems, reactors, Some(folder), Some(lineage), ana, bind)
    }

    /// As [`Target::start`], with listening sockets that `listen` makes: for a simulated network.
    ///
    /// # Errors
    /// As [`Target::start`].
    pub fn start_simulated(
        subsystems: Vec<SubsystemConfig>,
        reactors: &[ReactorHandle],
        mut listen: impl FnMut(SocketAddr) -> Fd,
    ) -> Result<Target, String> {
        let ana = AnaConfig::default();
        Target::start_with(subsystems, reactors, None, None, &ana, |address| {
            Ok((address, Listening::Simulated(listen(address))))
        })
    }

    fn start_with(
        subsystems: Vec<SubsystemConfig>,
        reactors: &[ReactorHandle],
        folder: Option<&Path>,
        lineage: Option<&Lineage>,
        ana: &AnaConfig,
        mut listen: impl FnMut(SocketAddr) -> std::io::Result<(SocketAddr, Listening)>,
    ) -> Result<Target, String> {
        assert!(!reactors.is_empty(), "a target runs on at least one reactor");
        let mut bound: Vec<(Transport, SocketAddr, Listening)> = Vec::new();
        let mut listeners: Vec<Vec<usize>> = Vec::new();
        let mut made: Vec<Arc<Subsystem>> = Vec::new();
        for config in subsystems {
            check(&config, &made)?;
            let nqn = &config.nqn;
            let mut groups: Vec<u32> =
                config.namespaces.iter().map(|it| ana.group_of(nqn, it.nsid)).collect();
            groups.sort_unstable();
            groups.dedup();
            if groups.is_empty() {
                groups.push(ANA_GROUP);
            }
            let mut ports = Vec::new();
            for (port, address) in config.listen.iter().enumerate() {
                let transport = config.transports.get(port).copied().unwrap_or_default();
                // Port 0 is a port of its own each time; else subsystems may share a listener.
                let known = bound
                    .iter()
                    .position(|(by, other, _)| address.port() != 0 && *by == transport && other == address);
                let at = match known {
                    Some(at) => at,
                    None => {
                        let cannot =
                            |why: String| format!("{}: cannot listen on {address}: {why}", config.nqn);
                        let (address, listening) = match transport {
                            Transport::Tcp => listen(*address).map_err(|error| cannot(error.to_string()))?,
                            Transport::Rdma => {
                                let (port, listener) = RdmaListener::bind(address).map_err(cannot)?;
                                let address = SocketAddr::new(address.ip(), port);
                                (address, Listening::Rdma(Arc::new(listener)))
                            }
                        };
                        bound.push((transport, address, listening));
                        listeners.push(Vec::new());
                        bound.len() - 1
                    }
                };
                listeners[at].push(made.len());
                let states: Vec<_> =
                    groups.iter().map(|group| (*group, ana.state_of(nqn, port, *group))).collect();
                ports.push(Port::new(at, (bound[at].0, bound[at].1), &states));
            }
            let SubsystemConfig { nqn, allowed_hosts, serial, namespaces, .. } = config;
            let namespace = |config: NamespaceConfig| {
                let group = ana.group_of(&nqn, config.nsid);
                Namespace::new(config, &nqn, group)
            };
            let namespaces = namespaces.into_iter().map(namespace).collect();
            let mut subsystem = Subsystem::new(&nqn, &serial, ports, allowed_hosts, namespaces);
            if let Some(lineage) = lineage {
                subsystem.known_as(lineage);
            }
            made.push(Arc::new(subsystem));
        }
        let keeper = folder.map(|folder| Keeper::start(folder, &made)).transpose()?;
        let shared = Arc::new(Shared {
            subsystems: made,
            listeners,
            places: reactors
                .iter()
                .map(|reactor| Place { reactor: reactor.clone(), io_queues: AtomicUsize::new(0) })
                .collect(),
            next_connection: AtomicU64::new(1),
            next_discovery_cntlid: AtomicU16::new(0),
            stopping: AtomicBool::new(false),
            connections: Mutex::default(),
            strangers: Mutex::default(),
            gone: Condvar::new(),
            memory: Arc::new(Budget::new(MEMORY_BYTES_MAX)),
            refusals: Seldom::default(),
            forbidden: Seldom::default(),
            broken: Seldom::default(),
            corrupted: Seldom::default(),
            capsule_bytes: AtomicU64::new(0),
            strays: Seldom::default(),
            referrals: Mutex::default(),
            keeper,
        });
        for subsystem in &shared.subsystems {
            for namespace in &subsystem.namespaces {
                let subsystem = Arc::downgrade(subsystem);
                namespace.device.subscribe(Box::new(move || {
                    let Some(subsystem) = subsystem.upgrade() else { return };
                    for admin in subsystem.admin_connections() {
                        driver::tell(&admin, |driver, runtime| driver.namespace_changed(runtime));
                    }
                }));
            }
        }
        let target = Target {
            shared,
            listening: bound.iter().map(|(.., listening)| listening.clone()).collect(),
            acceptor: reactors[0].clone(),
        };
        for (index, (_, address, listener)) in bound.into_iter().enumerate() {
            match listener {
                Listening::Rdma(listener) => {
                    listener.accept(&target.shared, &target.acceptor, (index, address))
                }
                listener => target.accept(index, listener),
            }
        }
        Ok(target)
    }

    /// Accepts connections until the target stops.
    fn accept(&self, index: usize, listener: Listening) {
        let shared = Arc::clone(&self.shared);
        self.acceptor.run(move |runtime| {
            let runtime_of_task = runtime.clone();
            runtime.spawn(async move {
                let runtime = runtime_of_task;
                while !shared.stopping.load(Ordering::Relaxed) {
                    let accepted = runtime.accept(listener.fd(), Some(Box::new(listener.clone()))).await;
                    match accepted.into_result().map(i32::try_from) {
                        Ok(Ok(fd)) => shared.accepted(&runtime, Fd(fd), index),
                        Ok(Err(_)) => {}
                        Err(_) if shared.stopping.load(Ordering::Relaxed) => {}
                        Err(error) => {
                            // Out of descriptors or memory: it may pass.
                            shared.refused(&error.to_string());
                            runtime.sleep(Duration::from_millis(100)).await;
                        }
                    }
                }
            });
        });
    }

    /// Each subsystem's name with the addresses that it can be reached at; port 0 has become a real one.
    #[must_use]
    pub fn addresses(&self) -> Vec<(String, Vec<SocketAddr>)> {
        let all = self.shared.subsystems.iter();
        all.map(|subsystem| {
            let addresses = subsystem.ports.iter().map(|port| port.address).collect();
            (subsystem.nqn.clone(), addresses)
        })
        .collect()
    }

    /// The NQNs of the hosts that are connected to a subsystem, one for each association.
    #[must_use]
    pub fn hosts(&self, nqn: &str) -> Vec<String> {
        let subsystem = self.shared.subsystems.iter().find(|subsystem| subsystem.nqn == nqn);
        subsystem.map(|subsystem| subsystem.hosts()).unwrap_or_default()
    }

    fn subsystem(&self, nqn: &str) -> Option<&Arc<Subsystem>> {
        self.shared.subsystems.iter().find(|subsystem| subsystem.nqn == nqn)
    }

    /// How it is doing.
    #[must_use]
    pub fn stats(&self) -> TargetStats {
        TargetStats {
            connections: self.shared.connections().len(),
            connections_refused: self.shared.refusals.count.load(Ordering::Relaxed),
            hosts_refused: self.shared.forbidden.count.load(Ordering::Relaxed),
            protocol_errors: self.shared.broken.count.load(Ordering::Relaxed),
            digest_errors: self.shared.corrupted.count.load(Ordering::Relaxed),
            capsule_bytes: self.shared.capsule_bytes.load(Ordering::Relaxed),
            memory_bytes: self.shared.memory.used(),
        }
    }

    /// Stops: no new connections, and the open ones end. Waits at most `wait` for their commands to end; whether they have.
    /// Not to be called on a reactor.
    #[must_use]
    pub fn stop(self, wait: Duration) -> bool {
        self.begin_stop();
        let deadline = Instant::now() + wait;
        let mut connections = self.shared.connections();
        while !connections.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.gone.wait_timeout(connections, left);
            connections = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn begin_stop(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        for listening in &self.listening {
            match listening {
                // SAFETY: plain system call on a descriptor of ours; it makes the accept under way end.
                Listening::Bound(listener) => unsafe {
                    libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR);
                },
                Listening::Simulated(_) => {}
                Listening::Rdma(listener) => listener.stop(),
            }
        }
        for connection in self.shared.connection_refs() {
            driver::tell(&connection, |driver, runtime| {
                driver.end(runtime, "the target stops");
                driver.abort();
            });
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.begin_stop();
    }
}

/// What can be wrong with a subsystem's configuration.
fn check(config: &SubsystemConfig, others: &[Arc<Subsystem>]) -> Result<(), String> {
    let nqn = &config.nqn;
    if !nqn_is_valid(nqn) || nqn == DISCOVERY_NQN {
        return Err(format!(
            "{nqn:?} is not an NQN: at most 223 characters that begin with \"nqn.\" would be"
        ));
    }
    if others.iter().any(|other| other.nqn == *nqn) {
        return Err(format!("{nqn}: there is another subsystem of this name"));
    }
    if config.serial.len() > 20 || !config.serial.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return Err(format!("{nqn}: the serial {:?} is not at most 20 ASCII characters", config.serial));
    }
    let mut seen = std::collections::BTreeSet::new();
    for namespace in &config.namespaces {
        let nsid = namespace.nsid;
        if nsid == 0 || nsid > 0xffff_fffd {
            return Err(format!("{nqn}: nsid {nsid} is not between 1 and 4294967293"));
        }
        if !seen.insert(nsid) {
            return Err(format!("{nqn}: nsid {nsid} is there twice"));
        }
    }
    Ok(())
}

/// Listens at an address of this machine.
fn bind(address: SocketAddr) -> std::io::Result<(SocketAddr, Listening)> {
    let listener = TcpListener::bind(address)?;
    prepare(&listener);
    Ok((listener.local_addr()?, Listening::Bound(Arc::new(OwnedFd::from(listener)))))
}

/// Sets what accepted sockets inherit: a reply never waits for the peer's acknowledgement, and a peer that is gone without a
/// word is noticed.
fn prepare(listener: &TcpListener) {
    let seconds = libc::c_int::try_from(PEER_TIMEOUT.as_secs()).unwrap_or(60);
    let options = [
        (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        // Half the time in silence, then five probes in the other half.
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, seconds / 2),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, seconds / 10),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 5),
        // In milliseconds.
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, seconds * 1000),
    ];
    // More than the standard library asks for: hosts whose storage was away come back all at once, and who finds the queue
    // full tries again a second later.
    // SAFETY: plain system call on a descriptor of ours.
    if unsafe { libc::listen(listener.as_raw_fd(), ACCEPT_QUEUE) } < 0 {
        let error = std::io::Error::last_os_error();
        log::warn!("target: the queue of connections to be accepted stays short: listen: {error}");
    }
    for (level, option, value) in options {
        let len = libc::socklen_t::try_from(size_of_val(&value)).unwrap_or(4);
        // SAFETY: `value` is an int, as long as is said.
        let result =
            unsafe { libc::setsockopt(listener.as_raw_fd(), level, option, (&raw const value).cast(), len) };
        if result < 0 {
            let error = std::io::Error::last_os_error();
            log::warn!("target: hosts that vanish are noticed late: socket option {option}: {error}");
        }
    }
}
