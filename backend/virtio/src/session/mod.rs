//! One front end's session: its messages, in order, on a thread of its own.
//!
//! Owns the negotiated features, the current epoch of memory, the configuration of the rings, the in-flight log, the log of dirty
//! pages. Tells the queues on their reactors what to do by message, and waits for them where the protocol wants that: a stopped
//! ring is drained, a removed region is not named by anything any more. Its rings run when it is its turn ([`crate::sessions`]).

mod config;
mod dirty;
mod inflight;
mod memory;
mod rings;

use crate::connection::{self, Connection, RawMessage, ReceiveError};
use crate::dirty::DirtyLog;
use crate::disk::DiskShared;
use crate::features;
use crate::gate::Gate;
use crate::inflight::InflightArea;
use crate::interrupt::Interrupt;
use crate::memory::{GuestMemory, Share};
use crate::message::{self, FrontendMessage, MessageError, RingAddresses, protocol};
use crate::queue::with_queue;
use crate::ring;
use hawser_runtime::ReactorHandle;
use rings::Patience;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Why a session is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SessionError {
    /// The queue whose ring is broken.
    pub(crate) queue: u16,
    pub(crate) what: String,
}

/// What a session and its queues share.
pub(crate) struct SessionShared {
    /// Its own in this process.
    pub(crate) number: u64,
    /// What is written into guest memory is logged.
    pub(crate) logging: AtomicBool,
    /// Wakes the session's thread.
    wake: OwnedFd,
    /// The session's thread ends.
    over: AtomicBool,
    error: Mutex<Option<SessionError>>,
    retired: Mutex<Vec<Arc<GuestMemory>>>,
}

impl SessionShared {
    pub(crate) fn new() -> io::Result<SessionShared> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Ok(SessionShared {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            logging: AtomicBool::new(false),
            wake: connection::eventfd()?,
            over: AtomicBool::new(false),
            error: Mutex::default(),
            retired: Mutex::default(),
        })
    }

    /// Wakes the session's thread to look at what has changed.
    pub(crate) fn wake(&self) {
        connection::signal(self.wake.as_fd());
    }

    /// Whether the session's thread ends.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Ends the session, for this reason. Called on reactors.
    pub(crate) fn end(&self, queue: u16, what: &str) {
        let error = SessionError { queue, what: format!("queue {queue}: {what}") };
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.wake();
    }

    /// Takes memory that a queue does not use any more: the session's thread lets it go, for unmapping a large guest takes
    /// longer than a reactor has. Called on reactors.
    pub(crate) fn retire(&self, memory: Arc<GuestMemory>) {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        self.wake();
    }

    /// Lets go of what was retired.
    pub(crate) fn drop_retired(&self) {
        let retired = std::mem::take(&mut *self.retired.lock().unwrap_or_else(PoisonError::into_inner));
        drop(retired);
    }

    /// Why the session is over, if it is.
    pub(crate) fn error(&self) -> Option<SessionError> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// How a message fails.
enum Failure {
    /// Its acknowledgement says so, and the session goes on; without acknowledgements it ends.
    Refused(String),
    /// The session ends.
    End(String),
    /// The front end has gone meanwhile.
    Closed,
}

/// Ends the session with a text.
fn end<T>(what: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::End(what.into()))
}

/// A message's own reply.
enum Reply {
    /// None: it is acknowledged if the front end asked for that.
    Acknowledge,
    Bytes(Vec<u8>),
    WithDescriptor(Vec<u8>, OwnedFd),
}

/// Why a session is over.
enum Over {
    Closed,
    Stopping,
    Failed(String),
}

impl From<String> for Over {
    fn from(error: String) -> Over {
        Over::Failed(error)
    }
}

/// A ring as the front end has configured it.
#[derive(Default)]
struct Vring {
    size: u16,
    addresses: Option<RingAddresses>,
    /// Where writes to its used ring are logged, if they are.
    log_address: Option<u64>,
    base: u16,
    /// A kick was set since the ring was stopped: `Some(None)` without a descriptor.
    kick: Option<Option<OwnedFd>>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    enabled: bool,
    running: Option<Running>,
}

#[derive(Clone, Copy)]
struct Running {
    key: u64,
    reactor: usize,
    /// It has an in-flight log, which remembers what it does not end.
    logged: bool,
}

/// One connection.
pub(crate) struct Session {
    disk: Arc<DiskShared>,
    reactors: Arc<[ReactorHandle]>,
    connection: Connection,
    shared: Arc<SessionShared>,
    features: u64,
    protocol: u64,
    memory: Arc<GuestMemory>,
    share: Share,
    vrings: Vec<Vring>,
    inflight: Option<Arc<InflightArea>>,
    /// Where dirty pages are marked while that is negotiated.
    dirty_log: Option<Arc<DirtyLog>>,
    /// The one before, which queues may still have.
    dirty_log_before: Option<Arc<DirtyLog>>,
    /// Queues that were stopped with requests that did not end, and may still be there.
    left: Vec<Running>,
    /// Since when requests were given up, in a stop after which no ring has started: the stops that follow have no more patience.
    gave_up: Option<Instant>,
    /// It was said that rings wait to start.
    told_to_wait: bool,
    gate: Arc<Gate>,
    backend_requests: Option<UnixStream>,
    /// The capacity that the front end has read in this session.
    told_capacity: Option<u64>,
}

impl Session {
    pub(crate) fn new(
        disk: Arc<DiskShared>,
        reactors: Arc<[ReactorHandle]>,
        stream: UnixStream,
    ) -> io::Result<Session> {
        Ok(Session {
            connection: Connection::new(stream),
            shared: Arc::new(SessionShared::new()?),
            features: 0,
            protocol: 0,
            memory: Arc::default(),
            share: Share::default(),
            vrings: std::iter::repeat_with(Vring::default).take(usize::from(disk.config.queues)).collect(),
            inflight: None,
            dirty_log: None,
            dirty_log_before: None,
            left: Vec::new(),
            gave_up: None,
            told_to_wait: false,
            gate: Arc::default(),
            backend_requests: None,
            told_capacity: None,
            disk,
            reactors,
        })
    }

    /// What others see of it.
    pub(crate) fn shared(&self) -> &Arc<SessionShared> {
        &self.shared
    }

    /// Serves the connection until it is over; then its queues have ended.
    pub(crate) fn run(mut self) {
        let disk = Arc::clone(&self.disk);
        let name = &disk.config.name;
        match disk.sessions.is_anothers_turn(&self.shared) {
            false => log::info!("disk {name}: front end connected"),
            true => log::info!("disk {name}: another front end connected"),
        }
        let over = self.serve();
        match over {
            Over::Closed => log::info!("disk {name}: front end disconnected"),
            Over::Stopping => log::info!("disk {name}: the disk stops, its front end is disconnected"),
            Over::Failed(error) => {
                log::warn!("disk {name}: front end disconnected by us: {error}; it may connect again");
                self.disk.disk_counters.sessions_failed.fetch_add(1, Ordering::Relaxed);
                self.disk.set_trouble(error);
            }
        }
        // The requests in flight end, and are shown in the rings, which are still mapped; then the connection closes.
        let all: Vec<usize> = (0..self.vrings.len()).collect();
        self.stop_queues(&all, Patience::Bounded);
        self.shared.drop_retired();
        disk.sessions.leave(&self.shared);
        let shared = Arc::clone(&self.shared);
        drop(self);
        shared.over.store(true, Ordering::Release);
        connection::signal(disk.wake_fd());
    }

    fn serve(&mut self) -> Over {
        loop {
            let fds = [self.connection.as_raw_fd(), self.shared.wake.as_raw_fd()];
            let [readable, woken] = connection::wait_readable(fds, -1);
            if woken {
                connection::clear(self.shared.wake.as_fd());
                self.shared.drop_retired();
                self.disk.refresh_geometry();
                self.tell_capacity();
            }
            if self.disk.stopping().is_some() {
                return Over::Stopping;
            }
            if let Some(SessionError { queue, what }) = self.shared.error() {
                self.signal_error(queue);
                return Over::Failed(what);
            }
            if woken && let Err(over) = self.start_waiting() {
                return over;
            }
            if !readable {
                continue;
            }
            match self.connection.receive() {
                Ok(Some(message)) => {
                    if let Err(over) = self.handle(message) {
                        return over;
                    }
                }
                Ok(None) => {}
                Err(ReceiveError::Closed) => return Over::Closed,
                Err(error) => return Over::Failed(error.to_string()),
            }
        }
    }

    /// Tells the front end which ring is broken, where it wants to hear it.
    fn signal_error(&self, queue: u16) {
        let Some(err) = self.vrings.get(usize::from(queue)).and_then(|vring| vring.err.as_ref()) else {
            return;
        };
        // Its file may be blocking, and full: it is no business of this thread to wait for that.
        let signalled = err.try_clone().and_then(|err| {
            let mut interrupt = Interrupt::new()?;
            interrupt.set(Some(err))?;
            interrupt.signal();
            Ok(())
        });
        if let Err(error) = signalled {
            log::warn!(
                "disk {}: queue {queue}: its front end cannot be told of an error: {error}",
                self.disk.config.name
            );
        }
    }

    /// Carries out one message and replies to it. An error ends the session.
    fn handle(&mut self, raw: RawMessage) -> Result<(), Over> {
        let request = raw.header.request;
        let acknowledge = |session: &Self, value: u64| {
            // Who asks for a ring's base would take an error for one: it hears nothing, and that the connection is closed.
            let wants_it = raw.header.need_reply && request != message::request::GET_VRING_BASE;
            if wants_it && session.protocol & protocol::REPLY_ACK != 0 {
                let sent = session.connection.send(&message::reply_u64(request, value), None);
                return sent.map(|()| true).map_err(|error| format!("reply to message {request}: {error}"));
            }
            Ok(false)
        };
        let carried_out = FrontendMessage::parse(request, &raw.payload)
            .map_err(|MessageError(what)| Failure::End(what))
            .and_then(|message| {
                log::debug!("disk {}: {message:?}", self.disk.config.name);
                self.carry_out(message, raw.descriptors)
            });
        match carried_out {
            Ok(Reply::Acknowledge) => Ok(acknowledge(self, 0).map(|_| ())?),
            Ok(Reply::Bytes(bytes)) => self
                .connection
                .send(&bytes, None)
                .map_err(|error| Over::Failed(format!("reply to message {request}: {error}"))),
            Ok(Reply::WithDescriptor(bytes, fd)) => self
                .connection
                .send(&bytes, Some(fd.as_fd()))
                .map_err(|error| Over::Failed(format!("reply to message {request}: {error}"))),
            Err(Failure::Refused(what)) => {
                if acknowledge(self, 1)? {
                    log::warn!(
                        "disk {}: the front end was answered with an error to its message {request}: {what}",
                        self.disk.config.name
                    );
                    Ok(())
                } else {
                    Err(Over::Failed(what))
                }
            }
            Err(Failure::End(what)) => {
                // The front end hears of it if it asked; the reason to end stays the first one.
                let _ = acknowledge(self, 1);
                Err(Over::Failed(what))
            }
            Err(Failure::Closed) => Err(Over::Closed),
        }
    }

    fn carry_out(
        &mut self,
        message: FrontendMessage,
        mut descriptors: Vec<OwnedFd>,
    ) -> Result<Reply, Failure> {
        use FrontendMessage as M;
        let number = |request: u32, value: u64| Ok(Reply::Bytes(message::reply_u64(request, value)));
        let limits = self.disk.limits(true);
        match message {
            M::GetFeatures => {
                return number(
                    message::request::GET_FEATURES,
                    features::offered(&limits, self.disk.config.queues),
                );
            }
            M::SetFeatures(wanted) => {
                let unknown = wanted & !features::offered(&limits, self.disk.config.queues);
                if unknown != 0 {
                    return end(format!("SET_FEATURES: bits {unknown:#x} were not offered"));
                }
                self.features = wanted;
                self.log_changed("SET_FEATURES")?;
            }
            M::GetProtocolFeatures => {
                return number(message::request::GET_PROTOCOL_FEATURES, protocol::OFFERED);
            }
            M::SetProtocolFeatures(wanted) => {
                let unknown = wanted & !protocol::OFFERED;
                if unknown != 0 {
                    return end(format!("SET_PROTOCOL_FEATURES: bits {unknown:#x} were not offered"));
                }
                self.protocol = wanted;
            }
            M::GetQueueNum => {
                return number(message::request::GET_QUEUE_NUM, u64::from(self.disk.config.queues));
            }
            M::GetMaxMemSlots => {
                return number(message::request::GET_MAX_MEM_SLOTS, GuestMemory::SLOTS as u64);
            }
            M::SetOwner => {}
            M::ResetOwner => self.stop_all()?,
            M::ResetDevice => self.reset_device()?,
            M::SetMemTable(regions) => self.set_mem_table(&regions, &descriptors)?,
            M::AddMemReg(region) => self.add_mem_reg(region, &descriptors)?,
            M::RemMemReg(region) => {
                self.wait_for_departed()?;
                self.rem_mem_reg(region)?;
            }
            M::SetVringNum { queue, size } => {
                let vring = self.stopped_vring(queue, "SET_VRING_NUM")?;
                vring.size = u16::try_from(size)
                    .ok()
                    .filter(|size| size.is_power_of_two() && *size <= ring::SIZE_MAX)
                    .ok_or_else(|| {
                        Failure::End(format!(
                            "SET_VRING_NUM: size {size}; a power of two up to {} would be right",
                            ring::SIZE_MAX
                        ))
                    })?;
            }
            M::SetLogBase(description) => return self.set_log_base(description, &descriptors),
            M::SetLogFd => match descriptors.pop() {
                // We may signal it when the log has changed, and do not: front ends look at the log when they need it.
                Some(fd) if connection::is_eventfd(fd.as_fd()) => {}
                Some(_) => return end("SET_LOG_FD: the descriptor is not an eventfd"),
                None => return end("SET_LOG_FD: no descriptor"),
            },
            M::SetVringAddr { queue, addresses, log } => {
                let index = self.index(queue, "SET_VRING_ADDR")?;
                // Of a running ring only the logging may change.
                if self.vrings[index].addresses != Some(addresses) {
                    self.stopped_vring(queue, "SET_VRING_ADDR")?.addresses = Some(addresses);
                }
                self.vrings[index].log_address = log;
                if self.vrings[index].running.is_some() {
                    self.log_changed("SET_VRING_ADDR")?;
                }
            }
            M::SetVringBase { queue, base } => {
                let vring = self.stopped_vring(queue, "SET_VRING_BASE")?;
                vring.base = u16::try_from(base)
                    .map_err(|_| Failure::End(format!("SET_VRING_BASE: {base} is more than 16 bits")))?;
            }
            M::GetVringBase { queue } => {
                let index = self.index(queue, "GET_VRING_BASE")?;
                self.stop_ring(index)?;
                self.vrings[index].kick = None;
                self.give_turn();
                let vring = &self.vrings[index];
                return Ok(Reply::Bytes(message::reply_vring_base(queue, u32::from(vring.base))));
            }
            M::SetVringKick { queue, has_descriptor } => {
                let fd = ring_descriptor("SET_VRING_KICK", has_descriptor, &mut descriptors)?;
                let index = self.index(queue, "SET_VRING_KICK")?;
                if self.vrings[index].running.is_some() {
                    self.stop_queues(&[index], Patience::UnlessLogging);
                }
                self.vrings[index].kick = Some(fd);
                self.start_if_ready(index)?;
            }
            M::SetVringCall { queue, has_descriptor } => {
                let fd = ring_descriptor("SET_VRING_CALL", has_descriptor, &mut descriptors)?;
                let index = self.index(queue, "SET_VRING_CALL")?;
                let clone = clone_fd(fd.as_ref())?;
                self.vrings[index].call = fd;
                if let Some(Running { key, reactor, .. }) = self.vrings[index].running {
                    self.reactors[reactor].run(move |runtime| {
                        with_queue(runtime, key, |queue, _| queue.set_call(clone));
                    });
                }
            }
            M::SetVringErr { queue, has_descriptor } => {
                let fd = ring_descriptor("SET_VRING_ERR", has_descriptor, &mut descriptors)?;
                let index = self.index(queue, "SET_VRING_ERR")?;
                self.vrings[index].err = fd;
            }
            M::SetVringEnable { queue, enable } => {
                let index = self.index(queue, "SET_VRING_ENABLE")?;
                if !enable {
                    self.stop_ring(index)?;
                }
                self.vrings[index].enabled = enable;
                if enable {
                    self.start_if_ready(index)?;
                }
            }
            M::SetBackendReqFd => {
                let Some(fd) = descriptors.pop() else {
                    return end("SET_BACKEND_REQ_FD: no descriptor");
                };
                self.backend_requests = Some(UnixStream::from(fd));
                self.tell_capacity();
            }
            M::GetConfig { offset, bytes, flags } => {
                let data =
                    features::config(&limits, self.disk.config.queues, self.disk.writeback(), offset, bytes);
                if offset == 0 && bytes >= 8 {
                    self.told_capacity = Some(features::capacity(&limits.geometry));
                }
                return Ok(Reply::Bytes(message::reply_config(offset, flags, &data)));
            }
            M::SetConfig { offset, data } => self.set_config(offset, &data)?,
            M::GetInflightFd(wanted) => return self.get_inflight(wanted),
            M::SetInflightFd(description) => self.set_inflight(description, &descriptors)?,
            M::Unknown(request) => {
                return Err(Failure::Refused(format!("message {request} is not known")));
            }
        }
        Ok(Reply::Acknowledge)
    }

    fn index(&self, queue: u32, message: &str) -> Result<usize, Failure> {
        match usize::try_from(queue) {
            Ok(index) if index < self.vrings.len() => Ok(index),
            _ => end(format!("{message}: queue {queue}; the disk has {}", self.vrings.len())),
        }
    }

    fn stopped_vring(&mut self, queue: u32, message: &str) -> Result<&mut Vring, Failure> {
        let index = self.index(queue, message)?;
        let vring = &mut self.vrings[index];
        if vring.running.is_some() {
            return end(format!("{message}: queue {queue} is running"));
        }
        Ok(vring)
    }
}

/// The descriptor of a SET_VRING_KICK, CALL or ERR.
fn ring_descriptor(
    message: &str,
    has_descriptor: bool,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<Option<OwnedFd>, Failure> {
    match (has_descriptor, descriptors.pop()) {
        (true, Some(fd)) if connection::is_eventfd(fd.as_fd()) => Ok(Some(fd)),
        (true, Some(_)) => end(format!("{message}: the descriptor is not an eventfd")),
        (true, None) => end(format!("{message}: no descriptor")),
        (false, _) => Ok(None),
    }
}

fn clone_fd(fd: Option<&OwnedFd>) -> Result<Option<OwnedFd>, Failure> {
    fd.map(OwnedFd::try_clone)
        .transpose()
        .map_err(|error: io::Error| Failure::End(format!("descriptor: {error}")))
}
