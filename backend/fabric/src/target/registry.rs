//! What all connections of a target share: subsystems, their namespaces, and the controllers that hosts have made.
//!
//! A controller stands for one association: an admin queue's connection and the I/O queues' connections that joined it.
//! It is listed until the last of its connections is quiet, closed or not: that is what a new association of the same host
//! waits for.
//!
//! Written by connections on any reactor, never on the way of an I/O command: locks here are for connecting, closing and
//! namespace changes; what commands read are atomics.

use super::namespace::Namespace;
use super::port::{Port, PortGroup};
use super::reservations::HostId;
use super::uuid;
use super::{Lineage, Quiescing, Seldom};
use crate::nvme::StatusCode;
use crate::nvme::ana::{AnaLog, AnaState};
use crate::nvme::bytes::low32;
use crate::nvme::cross_reset::ControllerInstance;
use crate::nvme::properties;
use crate::nvme::vendor::CacheIdentity;
use crate::uri::Transport;
use hawser_block::Geometry;
use hawser_runtime::{Instant, ReactorHandle};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Associations with one subsystem.
const CONTROLLERS_MAX: usize = 1024;
/// CNTLID: FFF0h and up are reserved (base 3.1.2).
const CNTLID_MAX: u16 = 0xffef;

/// A connection as others see it.
#[derive(Clone)]
pub(super) struct ConnectionRef {
    pub(super) reactor: ReactorHandle,
    pub(super) id: u64,
}

/// An NVM subsystem.
pub(super) struct Subsystem {
    pub(super) nqn: String,
    pub(super) serial: String,
    /// Where it can be reached, in the order of its configuration.
    pub(super) ports: Vec<Arc<Port>>,
    /// `None`: any host. Changed while `controllers` is locked, so that nobody comes in who is not allowed any more.
    allowed_hosts: Mutex<Option<Vec<String>>>,
    /// In the order of their NSIDs.
    pub(super) namespaces: Vec<Namespace>,
    /// Changes of reservations, for the log.
    pub(super) reservation_changes: Seldom,
    controllers: Mutex<Vec<Arc<Controller>>>,
    next_cntlid: AtomicU32,
    /// The high half of every CIRN of this process: it tells its controllers from those of others, or of its past.
    process: u32,
    /// Those of processes before this one, of which nothing is left.
    processes_ended: Vec<u32>,
    /// The low half of the next.
    next_instance: AtomicU32,
}

/// What Connect said of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    pub(super) nqn: String,
    pub(super) id: [u8; 16],
}

/// One association of a host with a subsystem, or with the discovery service.
pub(super) struct Controller {
    pub(super) cntlid: u16,
    /// What names it in a Cross-Controller Reset. An association is one life of its controller.
    pub(super) instance: ControllerInstance,
    pub(super) host: Host,
    /// `None`: a discovery controller.
    pub(super) subsystem: Option<Arc<Subsystem>>,
    /// Where its host came in; `None`: a discovery controller.
    port: Option<Arc<Port>>,
    /// The most data of one command, in bytes.
    pub(super) transfer_bytes_max: u32,
    /// CC, as the host has set it.
    pub(super) configuration: AtomicU32,
    /// CSTS but for RDY while connections of before a reset go on: see [`Controller::status`].
    status: AtomicU32,
    /// KATO; 0 = none.
    pub(super) keep_alive_ms: AtomicU32,
    /// When the host was last heard of, on any queue.
    last_heard_ns: AtomicU64,
    /// How many I/O queues the host may make.
    pub(super) io_queues_max: AtomicU32,
    /// Asynchronous Event Configuration.
    pub(super) event_mask: AtomicU32,
    /// WCE of the Volatile Write Cache feature: unset, each write is durable when it ends.
    pub(super) write_cache: AtomicBool,
    /// ACRE: the host waits as long as CRD says.
    pub(super) retry_delays: AtomicBool,
    state: Mutex<ControllerState>,
}

#[derive(Default)]
struct ControllerState {
    /// By queue ID; those that are not quiet yet.
    connections: Vec<(u16, ConnectionRef)>,
    closed: bool,
    /// What the host has been told, or could read, of each namespace.
    known: BTreeMap<u32, Option<Geometry>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whoever panicked did it in the midst of plain assignments; the process is on its way down then.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What we know of a controller that is to be reset across controllers.
pub(super) enum Impacted {
    /// It is none of this host's here.
    Unknown,
    /// It was here, and nothing of it is left.
    Gone,
    /// It is here, or has commands here.
    Found(Arc<Controller>),
}

/// Why a connection cannot join a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JoinError {
    /// There is none with this ID for this host.
    Unknown,
    /// The host has not enabled it.
    NotReady,
    /// The queue exists.
    QueueInUse,
    /// The host has not asked for so many queues.
    QueueBeyond,
}

impl Subsystem {
    pub(super) fn new(
        nqn: &str,
        serial: &str,
        ports: Vec<Arc<Port>>,
        allowed_hosts: Option<Vec<String>>,
        mut namespaces: Vec<Namespace>,
    ) -> Subsystem {
        namespaces.sort_by_key(|namespace| namespace.nsid);
        Subsystem {
            nqn: nqn.to_owned(),
            serial: serial.to_owned(),
            ports,
            allowed_hosts: Mutex::new(allowed_hosts),
            namespaces,
            reservation_changes: Seldom::default(),
            controllers: Mutex::default(),
            next_cntlid: AtomicU32::new(0),
            // Keys from the kernel's random numbers.
            process: low32(RandomState::new().hash_one(nqn)),
            processes_ended: Vec::new(),
            next_instance: AtomicU32::new(1),
        }
    }

    /// This process is known by a number, and so are some before it.
    pub(super) fn known_as(&mut self, lineage: &Lineage) {
        self.process = lineage.own;
        self.processes_ended.clone_from(&lineage.ended);
    }

    pub(super) fn allows(&self, host_nqn: &str) -> bool {
        lock(&self.allowed_hosts).as_ref().is_none_or(|hosts| hosts.iter().any(|host| host == host_nqn))
    }

    /// The hosts that may connect; `None`: any.
    pub(super) fn allowed_hosts(&self) -> Option<Vec<String>> {
        lock(&self.allowed_hosts).clone()
    }

    /// Lets a host in from now on. False when it may come in already.
    pub(super) fn allow(&self, host_nqn: &str) -> bool {
        match lock(&self.allowed_hosts).as_mut() {
            Some(hosts) if !hosts.iter().any(|host| host == host_nqn) => {
                hosts.push(host_nqn.to_owned());
                true
            }
            _ => false,
        }
    }

    /// Lets a host in no more. Returns the connections of its associations, which are over; `None` when it was not among those
    /// that are named.
    pub(super) fn forbid(&self, host_nqn: &str) -> Option<Vec<ConnectionRef>> {
        let controllers = lock(&self.controllers);
        {
            let mut allowed = lock(&self.allowed_hosts);
            let hosts = allowed.as_mut()?;
            let before = hosts.len();
            hosts.retain(|host| host != host_nqn);
            if hosts.len() == before {
                return None;
            }
        }
        let theirs: Vec<_> =
            controllers.iter().filter(|controller| controller.host.nqn == host_nqn).cloned().collect();
        theirs.iter().for_each(|controller| drop(controller.close()));
        Some(theirs.iter().flat_map(|controller| controller.connections()).collect())
    }

    /// The position of a namespace.
    pub(super) fn position(&self, nsid: u32) -> Option<usize> {
        self.namespaces.binary_search_by_key(&nsid, |namespace| namespace.nsid).ok()
    }

    /// The largest NSID, 0 without any.
    pub(super) fn nsid_max(&self) -> u32 {
        self.namespaces.last().map_or(0, |namespace| namespace.nsid)
    }

    /// What is known of the namespaces' sizes now.
    pub(super) fn geometries(&self) -> BTreeMap<u32, Option<Geometry>> {
        self.namespaces.iter().map(|namespace| (namespace.nsid, namespace.device.geometry())).collect()
    }

    /// How commands of lost associations come to an end here, as far as is known now.
    pub(super) fn quiescing(&self) -> Quiescing {
        let times = self.namespaces.iter().map(|namespace| namespace.device.quiesce_time());
        Quiescing::new(times.max().unwrap_or_default())
    }

    /// What the namespaces' writes are in until they are flushed.
    pub(super) fn cache_identity(&self) -> Option<CacheIdentity> {
        uuid::of_caches(
            self.namespaces.iter().map(|namespace| (namespace.nsid, namespace.device.cache_identity())),
        )
    }

    /// Makes a controller for `host`, with `admin` as its admin queue's connection. Returns it and all connections of
    /// associations of the same host that are not quiet.
    pub(super) fn create(
        self: &Arc<Self>,
        host: Host,
        admin: ConnectionRef,
        listener: usize,
        keep_alive_ms: u32,
        now: Instant,
    ) -> Result<(Arc<Controller>, Vec<ConnectionRef>), StatusCode> {
        let port = self.ports.iter().find(|port| port.listener == listener);
        let port = Arc::clone(port.ok_or(StatusCode::CONNECT_CONTROLLER_BUSY)?);
        let known = self.geometries();
        let mut controllers = lock(&self.controllers);
        if !self.allows(&host.nqn) {
            return Err(StatusCode::CONNECT_INVALID_HOST);
        }
        if controllers.len() >= CONTROLLERS_MAX {
            return Err(StatusCode::CONNECT_CONTROLLER_BUSY);
        }
        let earlier = controllers
            .iter()
            .filter(|controller| controller.host == host)
            .flat_map(|controller| controller.connections())
            .collect();
        let cntlid = loop {
            let next = self.next_cntlid.fetch_add(1, Ordering::Relaxed) % u32::from(CNTLID_MAX) + 1;
            let next = u16::try_from(next).unwrap_or(1);
            if controllers.iter().all(|controller| controller.cntlid != next) {
                break next;
            }
        };
        let transfer_bytes_max = self.transfer_bytes_max(&known);
        let number = self.next_instance.fetch_add(1, Ordering::Relaxed);
        let instance = ControllerInstance {
            cntlid,
            // Any but 0.
            uniquifier: u8::try_from(number % 255 + 1).unwrap_or(1),
            random: u64::from(self.process) << 32 | u64::from(number),
        };
        let controller = Controller::new(instance, host, Some((Arc::clone(self), port)), transfer_bytes_max);
        controller.keep_alive_ms.store(keep_alive_ms, Ordering::Relaxed);
        controller.heard(now);
        {
            let mut state = lock(&controller.state);
            state.connections.push((0, admin));
            state.known = known;
        }
        let controller = Arc::new(controller);
        controllers.push(Arc::clone(&controller));
        Ok((controller, earlier))
    }

    /// The most data that one command may have on every namespace: a power of two, at least a page.
    fn transfer_bytes_max(&self, known: &BTreeMap<u32, Option<Geometry>>) -> u32 {
        let least = known
            .values()
            .flatten()
            .map(|geometry| u64::from(geometry.transfer_blocks_max) << geometry.block_size.shift());
        let bytes = least.chain([u64::from(super::TRANSFER_BYTES_MAX)]).min().unwrap_or(0);
        let bytes = u32::try_from(bytes).unwrap_or(super::TRANSFER_BYTES_MAX).max(4096);
        1 << bytes.ilog2()
    }

    /// Adds an I/O queue's connection to a controller.
    pub(super) fn join(
        &self,
        cntlid: u16,
        host: &Host,
        queue_id: u16,
        connection: ConnectionRef,
    ) -> Result<Arc<Controller>, JoinError> {
        let controllers = lock(&self.controllers);
        let controller = controllers
            .iter()
            .find(|controller| controller.cntlid == cntlid && controller.host == *host)
            .ok_or(JoinError::Unknown)?;
        let mut state = lock(&controller.state);
        if state.closed {
            return Err(JoinError::Unknown);
        }
        if !controller.is_enabled() {
            return Err(JoinError::NotReady);
        }
        if u32::from(queue_id) > controller.io_queues_max.load(Ordering::Relaxed) {
            return Err(JoinError::QueueBeyond);
        }
        if state.connections.iter().any(|(other, _)| *other == queue_id) {
            return Err(JoinError::QueueInUse);
        }
        state.connections.push((queue_id, connection));
        Ok(Arc::clone(controller))
    }

    /// The controller that `host` wants to have reset.
    pub(super) fn impacted(&self, instance: &ControllerInstance, host: &Host) -> Impacted {
        let process = low32(instance.random >> 32);
        if instance.uniquifier == 0 {
            return Impacted::Unknown;
        }
        if self.processes_ended.contains(&process) {
            return Impacted::Gone;
        }
        // Of others we know nothing: not that they are quiet either.
        if process != self.process {
            return Impacted::Unknown;
        }
        let controllers = lock(&self.controllers);
        match controllers.iter().find(|controller| controller.instance.random == instance.random) {
            // A controller is listed until the last of its connections is quiet.
            None if low32(instance.random) < self.next_instance.load(Ordering::Relaxed) => Impacted::Gone,
            Some(found) if found.instance == *instance && found.host == *host => {
                Impacted::Found(Arc::clone(found))
            }
            _ => Impacted::Unknown,
        }
    }

    /// Sets the ANA state of a group at a port. Returns the admin connections of the hosts that came in there.
    pub(super) fn set_ana_state(
        &self,
        port: &Arc<Port>,
        group: &PortGroup,
        state: AnaState,
    ) -> Vec<ConnectionRef> {
        if !port.set_state(group, state) {
            return Vec::new();
        }
        let controllers = lock(&self.controllers);
        let here = |controller: &&Arc<Controller>| {
            controller.port.as_ref().is_some_and(|other| Arc::ptr_eq(other, port))
        };
        controllers.iter().filter(here).filter_map(|controller| controller.admin_connection()).collect()
    }

    /// The connection of each controller's admin queue.
    pub(super) fn admin_connections(&self) -> Vec<ConnectionRef> {
        let controllers = lock(&self.controllers);
        controllers.iter().filter_map(|controller| controller.admin_connection()).collect()
    }

    /// The connections of this host's admin queues.
    pub(super) fn admin_connections_of(&self, host: &HostId) -> Vec<ConnectionRef> {
        let controllers = lock(&self.controllers);
        let theirs = controllers.iter().filter(|controller| controller.host.id == *host);
        theirs.filter_map(|controller| controller.admin_connection()).collect()
    }

    /// All connections of these hosts that are not quiet.
    pub(super) fn connections_of(&self, hosts: &[HostId]) -> Vec<ConnectionRef> {
        if hosts.is_empty() {
            return Vec::new();
        }
        let controllers = lock(&self.controllers);
        let theirs = controllers.iter().filter(|controller| hosts.contains(&controller.host.id));
        theirs.flat_map(|controller| controller.connections()).collect()
    }

    /// The hosts that are connected.
    pub(super) fn hosts(&self) -> Vec<String> {
        let controllers = lock(&self.controllers);
        controllers.iter().map(|controller| controller.host.nqn.clone()).collect()
    }

    /// All that are not quiet.
    #[cfg(test)]
    pub(super) fn controllers(&self) -> Vec<Arc<Controller>> {
        lock(&self.controllers).clone()
    }

    fn forget_if_quiet(&self, controller: &Arc<Controller>) {
        let mut controllers = lock(&self.controllers);
        let quiet = {
            let state = lock(&controller.state);
            state.closed && state.connections.is_empty()
        };
        if quiet {
            controllers.retain(|other| !Arc::ptr_eq(other, controller));
        }
    }
}

impl Controller {
    fn new(
        instance: ControllerInstance,
        host: Host,
        subsystem: Option<(Arc<Subsystem>, Arc<Port>)>,
        transfer_bytes_max: u32,
    ) -> Controller {
        let (subsystem, port) = subsystem.unzip();
        Controller {
            cntlid: instance.cntlid,
            instance,
            host,
            subsystem,
            port,
            transfer_bytes_max,
            configuration: AtomicU32::new(0),
            status: AtomicU32::new(0),
            keep_alive_ms: AtomicU32::new(0),
            last_heard_ns: AtomicU64::new(0),
            io_queues_max: AtomicU32::new(0),
            event_mask: AtomicU32::new(0),
            write_cache: AtomicBool::new(true),
            retry_delays: AtomicBool::new(false),
            state: Mutex::default(),
        }
    }

    /// A controller of the discovery service: nobody looks for it, so it is in no list.
    pub(super) fn discovery(
        cntlid: u16,
        host: Host,
        admin: ConnectionRef,
        keep_alive_ms: u32,
        now: Instant,
    ) -> Arc<Controller> {
        let instance = ControllerInstance { cntlid, uniquifier: 0, random: 0 };
        let controller = Controller::new(instance, host, None, super::TRANSFER_BYTES_MAX);
        controller.keep_alive_ms.store(keep_alive_ms, Ordering::Relaxed);
        controller.heard(now);
        lock(&controller.state).connections.push((0, admin));
        Arc::new(controller)
    }

    /// Whether its host came in over RDMA.
    pub(super) fn is_rdma(&self) -> bool {
        self.port.as_ref().is_some_and(|port| port.transport == Transport::Rdma)
    }

    /// How well the namespaces of an ANA group can be reached through it.
    pub(super) fn ana_group(&self, id: u32) -> Option<Arc<PortGroup>> {
        self.port.as_ref()?.group(id).cloned()
    }

    /// The IDs of its ANA groups: how many there are, and the largest.
    pub(super) fn ana_group_count(&self) -> (u32, u32) {
        let groups = self.port.as_ref().map_or(&[][..], |port| &port.groups);
        (u32::try_from(groups.len()).unwrap_or(u32::MAX), groups.last().map_or(0, |group| group.id))
    }

    /// The ANA log page; `None` for a discovery controller.
    pub(super) fn ana_log(&self, groups_only: bool) -> Option<AnaLog> {
        let subsystem = self.subsystem.as_ref()?;
        self.port.as_ref().map(|port| port.log(&subsystem.namespaces, groups_only))
    }

    /// The host gave a sign of life.
    pub(super) fn heard(&self, now: Instant) {
        self.last_heard_ns.store(now.0, Ordering::Relaxed);
    }

    pub(super) fn last_heard(&self) -> Instant {
        Instant(self.last_heard_ns.load(Ordering::Relaxed))
    }

    /// Whether the host has enabled it.
    pub(super) fn is_enabled(&self) -> bool {
        let enabled = self.configuration.load(Ordering::Relaxed) & properties::CC_ENABLE != 0;
        enabled && self.status.load(Ordering::Relaxed) & properties::CSTS_FATAL == 0
    }

    /// CSTS. After a reset it stays ready until the I/O queues of before are quiet.
    pub(super) fn status(&self) -> u32 {
        let busy = lock(&self.state).connections.iter().any(|(queue_id, _)| *queue_id != 0);
        let status = self.status.load(Ordering::Relaxed);
        let ready = status & properties::CSTS_FATAL == 0 && (self.is_enabled() || busy);
        if ready { status | properties::CSTS_READY } else { status }
    }

    /// Takes a new CC over (base 3.1.3.5). Returns whether I/O queues have to end.
    pub(super) fn configure(&self, value: u32) -> bool {
        use properties::{
            CC_ENABLE, CC_SHUTDOWN_MASK, CSTS_FATAL, CSTS_SHUTDOWN_COMPLETE, CSTS_SHUTDOWN_MASK,
        };
        let before = self.configuration.swap(value, Ordering::Relaxed);
        let mut status = self.status.load(Ordering::Relaxed);
        if value & !before & CC_ENABLE != 0 {
            // IOSQES 6, IOCQES 4; MPS, AMS and CSS 0: all else is nothing that we said we could. A discovery controller
            // has no I/O queues, so their entries' sizes may be 0.
            let sizes = value >> 16 & 0xff;
            let sizes_fit = sizes == 0x46 || self.subsystem.is_none() && sizes == 0;
            let fatal = !sizes_fit || value & 0x3ff0 != 0;
            status = if fatal { CSTS_FATAL } else { 0 };
        }
        if value & CC_SHUTDOWN_MASK != 0 {
            status = status & !CSTS_SHUTDOWN_MASK | CSTS_SHUTDOWN_COMPLETE;
        }
        if value & CC_ENABLE == 0 && before & CC_ENABLE != 0 {
            status &= !CSTS_FATAL;
        }
        self.status.store(status, Ordering::Relaxed);
        before & !value & CC_ENABLE != 0
    }

    /// All its connections that are not quiet.
    pub(super) fn connections(&self) -> Vec<ConnectionRef> {
        lock(&self.state).connections.iter().map(|(_, connection)| connection.clone()).collect()
    }

    /// The connections of its I/O queues.
    pub(super) fn io_connections(&self) -> Vec<ConnectionRef> {
        let state = lock(&self.state);
        let io = state.connections.iter().filter(|(queue_id, _)| *queue_id != 0);
        io.map(|(_, connection)| connection.clone()).collect()
    }

    fn admin_connection(&self) -> Option<ConnectionRef> {
        let state = lock(&self.state);
        state
            .connections
            .iter()
            .find(|(queue_id, _)| *queue_id == 0)
            .map(|(_, connection)| connection.clone())
    }

    /// The association is over: nobody joins it any more. Returns the connections that have to end.
    pub(super) fn close(&self) -> Vec<ConnectionRef> {
        lock(&self.state).closed = true;
        self.io_connections()
    }

    /// Whether the association is over.
    pub(super) fn is_closed(&self) -> bool {
        lock(&self.state).closed
    }

    /// A connection of it is quiet: no command of it is under way, and none will come.
    pub(super) fn leave(self: &Arc<Self>, connection_id: u64) {
        lock(&self.state).connections.retain(|(_, connection)| connection.id != connection_id);
        if let Some(subsystem) = &self.subsystem {
            subsystem.forget_if_quiet(self);
        }
    }

    /// The namespaces that have changed since the host was last told; from now on it knows.
    pub(super) fn take_changes(&self) -> Vec<u32> {
        let Some(subsystem) = &self.subsystem else { return Vec::new() };
        let now = subsystem.geometries();
        let mut state = lock(&self.state);
        let changed = now
            .iter()
            .filter(|(nsid, geometry)| state.known.get(nsid) != Some(geometry))
            .map(|(nsid, _)| *nsid)
            .collect();
        state.known = now;
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use properties::{
        CC_ENABLE, CC_SHUTDOWN_NORMAL, CC_START, CSTS_FATAL, CSTS_READY, CSTS_SHUTDOWN_COMPLETE,
    };

    #[test]
    fn a_controller_starts_stops_and_refuses_what_it_cannot() {
        let instance = ControllerInstance { cntlid: 1, uniquifier: 0, random: 0 };
        let controller = Controller::new(instance, Host { nqn: "nqn.h".into(), id: [1; 16] }, None, 4096);
        assert_eq!(controller.status(), 0);
        assert!(!controller.configure(CC_START));
        assert_eq!(controller.status(), CSTS_READY);
        assert!(!controller.configure(CC_START | CC_SHUTDOWN_NORMAL));
        assert_eq!(controller.status(), CSTS_READY | CSTS_SHUTDOWN_COMPLETE);
        assert!(controller.configure(CC_START & !CC_ENABLE));
        assert_eq!(controller.status() & CSTS_READY, 0);
        // 64 KiB pages.
        assert!(!controller.configure(CC_START | 4 << 7));
        assert_eq!(controller.status(), CSTS_FATAL);
        assert!(controller.configure(0));
        assert_eq!(controller.status(), 0);
    }
}
