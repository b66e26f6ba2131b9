//! A disk: a device offered at a vhost-user socket, with a thread of its own that serves one front end after the other.

use crate::blk::{ID_BYTES, Limits};
use crate::connection;
use crate::counters::{DiskCounters, QueueCounters};
use crate::crash::CrashFile;
use crate::session::{Session, SessionShared};
use crate::sessions::{SESSIONS_MAX, SessionView, Sessions};
use crate::socket::{BoundSocket, SocketAccess, SocketError, SocketLock};
use hawser_block::{Device, Geometry, StatsSet};
use hawser_runtime::ReactorHandle;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The most queues that a disk can have.
pub const QUEUES_MAX: u16 = 64;

/// What a disk is made from.
#[derive(Clone)]
pub struct DiskConfig {
    /// The name from the configuration.
    pub name: String,
    /// Where the front end connects.
    pub socket: PathBuf,
    /// Who may connect.
    pub access: SocketAccess,
    /// What GET_ID answers: at most 20 bytes.
    pub serial: String,
    /// How many queues are offered: 1 to [`QUEUES_MAX`].
    pub queues: u16,
    /// Writes are refused, whatever the device can do.
    pub read_only: bool,
    /// How long a stop waits for requests in flight before it gives them up.
    pub drain_timeout: Duration,
    /// The disk's number in the daemon: queue `i` runs on reactor `(index + i) % reactors`.
    pub index: usize,
    /// Where crashes are recorded.
    pub crash: Option<Arc<CrashFile>>,
}

/// Why a disk cannot be started.
#[derive(Debug)]
pub enum DiskError {
    /// A serial of more than 20 bytes.
    Serial(String),
    /// Not 1 to [`QUEUES_MAX`] queues.
    Queues(u16),
    /// The socket cannot be had.
    Socket(SocketError),
    /// The system said no.
    Io(io::Error),
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskError::Serial(serial) => {
                write!(f, "serial {serial:?} is longer than {ID_BYTES} bytes")
            }
            DiskError::Queues(queues) => {
                write!(f, "queues = {queues}; 1 to {QUEUES_MAX} would be right")
            }
            DiskError::Socket(error) => write!(f, "socket {error}"),
            DiskError::Io(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for DiskError {}

/// What a disk is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DiskState {
    /// The device's size is not known yet: the socket does not listen.
    Waiting = 0,
    /// The socket listens.
    Listening = 1,
    /// A front end is connected.
    Connected = 2,
    /// It was stopped.
    Stopped = 3,
}

impl DiskState {
    /// The word that people and the API see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DiskState::Waiting => "waiting",
            DiskState::Listening => "listening",
            DiskState::Connected => "connected",
            DiskState::Stopped => "stopped",
        }
    }
}

/// What the disk's thread, its queues and its owner share.
pub(crate) struct DiskShared {
    pub(crate) config: DiskConfig,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) stats: Arc<StatsSet>,
    pub(crate) counters: Vec<QueueCounters>,
    pub(crate) disk_counters: DiskCounters,
    geometry: OnceLock<Geometry>,
    /// The size now, in blocks: the one thing of the geometry that changes.
    blocks: AtomicU64,
    /// The driver's wish: false = write-through.
    writeback: AtomicBool,
    state: AtomicU8,
    trouble: Mutex<String>,
    /// Wakes the disk's thread.
    wake: OwnedFd,
    stop: Mutex<Option<Duration>>,
    /// Queues whose session has ended while requests of theirs were at the device, and that have not ended since.
    pub(crate) queues_left: AtomicUsize,
    pub(crate) sessions: Sessions,
}

impl DiskShared {
    pub(crate) fn new(config: DiskConfig, device: Arc<dyn Device>) -> io::Result<DiskShared> {
        Ok(DiskShared {
            stats: Arc::default(),
            counters: (0..config.queues).map(|_| QueueCounters::default()).collect(),
            disk_counters: DiskCounters::default(),
            geometry: OnceLock::new(),
            blocks: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
            state: AtomicU8::new(DiskState::Waiting as u8),
            trouble: Mutex::default(),
            wake: connection::eventfd()?,
            stop: Mutex::default(),
            queues_left: AtomicUsize::new(0),
            sessions: Sessions::default(),
            config,
            device,
        })
    }

    /// What the disk is now. `flush`: the driver negotiated FLUSH.
    #[inline]
    pub(crate) fn limits(&self, flush: bool) -> Limits {
        let mut geometry = *self.geometry.get().expect("sessions begin once the geometry is known");
        geometry.blocks = self.blocks.load(Ordering::Acquire);
        Limits {
            geometry,
            read_only: self.config.read_only || geometry.read_only,
            write_through: !flush || !self.writeback(),
        }
    }

    pub(crate) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    pub(crate) fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Release);
    }

    /// Takes over what the device says about itself; whether it is known.
    pub(crate) fn refresh_geometry(&self) -> bool {
        let Some(now) = self.device.geometry() else { return self.geometry.get().is_some() };
        let first = self.geometry.get_or_init(|| now);
        if now.block_size == first.block_size {
            // A device only grows.
            self.blocks.fetch_max(now.blocks, Ordering::AcqRel);
        }
        true
    }

    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// How long the stop that was asked for may wait.
    pub(crate) fn stopping(&self) -> Option<Duration> {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_state(&self, state: DiskState) {
        self.state.store(state as u8, Ordering::Release);
    }

    pub(crate) fn set_trouble(&self, trouble: String) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }
}

/// A disk that is served. Dropping it stops it.
pub struct VhostDisk {
    shared: Arc<DiskShared>,
    thread: Option<JoinHandle<()>>,
}

impl VhostDisk {
    /// Takes the socket and serves `device` there on `reactors`. If the device's size is not known yet, the socket listens
    /// once it is.
    ///
    /// The reactors must outlive the disk: stop it first.
    ///
    /// # Errors
    /// A value that is wrong, or a socket that cannot be had; then nothing was made.
    ///
    /// # Panics
    /// Without a reactor.
    pub fn start(
        config: DiskConfig,
        device: Arc<dyn Device>,
        reactors: Vec<ReactorHandle>,
    ) -> Result<VhostDisk, DiskError> {
        assert!(!reactors.is_empty(), "a daemon has a reactor");
        if config.serial.len() > ID_BYTES {
            return Err(DiskError::Serial(config.serial));
        }
        if config.queues == 0 || config.queues > QUEUES_MAX {
            return Err(DiskError::Queues(config.queues));
        }
        let lock = SocketLock::take(&config.socket).map_err(DiskError::Socket)?;
        let shared = Arc::new(DiskShared::new(config, device).map_err(DiskError::Io)?);
        let weak = Arc::downgrade(&shared);
        shared.device.subscribe(Box::new(move || {
            if let Some(shared) = weak.upgrade() {
                connection::signal(shared.wake.as_fd());
            }
        }));
        let mut socket = None;
        if shared.refresh_geometry() {
            socket = Some(lock.listen(&shared.config.access).map_err(DiskError::Socket)?);
            shared.set_state(DiskState::Listening);
        }
        let reactors = Arc::from(reactors);
        let server =
            Server { disk: Arc::clone(&shared), reactors, lock, socket, guests: Vec::new(), refuses: false };
        let thread = std::thread::Builder::new()
            .name(format!("disk {}", shared.config.name))
            .spawn(move || server.run())
            .map_err(DiskError::Io)?;
        Ok(VhostDisk { shared, thread: Some(thread) })
    }

    /// What it is made from.
    #[must_use]
    pub fn config(&self) -> &DiskConfig {
        &self.shared.config
    }

    /// What it is doing.
    #[must_use]
    pub fn state(&self) -> DiskState {
        match self.shared.state.load(Ordering::Acquire) {
            0 => DiskState::Waiting,
            1 => DiskState::Listening,
            2 => DiskState::Connected,
            _ => DiskState::Stopped,
        }
    }

    /// Its sessions now: two while a VM migrates from one front end to another.
    #[must_use]
    pub fn sessions(&self) -> Vec<SessionView> {
        self.shared.sessions.view()
    }

    /// What the front end sees of the device: `None` until its size is known. The size is the device's now.
    #[must_use]
    pub fn geometry(&self) -> Option<Geometry> {
        self.shared.geometry.get().map(|_| self.shared.limits(true).geometry)
    }

    /// The last thing that went wrong with the socket or a session; empty if nothing has.
    #[must_use]
    pub fn trouble(&self) -> String {
        self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Requests and latencies as the guest sees them.
    #[must_use]
    pub fn stats(&self) -> Arc<StatsSet> {
        Arc::clone(&self.shared.stats)
    }

    /// Counters of each queue.
    #[must_use]
    pub fn queue_counters(&self) -> &[QueueCounters] {
        &self.shared.counters
    }

    /// Counters of the disk.
    #[must_use]
    pub fn counters(&self) -> &DiskCounters {
        &self.shared.disk_counters
    }

    /// Looks at the device's geometry again and tells the guest of a new size. The device's own listeners do the same.
    pub fn geometry_changed(&self) {
        connection::signal(self.shared.wake.as_fd());
    }

    /// Takes no more requests, waits up to `drain_timeout` for those in flight, gives the rest up, closes the connection and
    /// removes the socket. Requests that the device does not even end within 5 s of being given up are left behind: they stay
    /// in the in-flight log, and the guest's memory stays mapped for them.
    #[must_use]
    pub fn stop(mut self, drain_timeout: Duration) -> LeftBehind {
        self.end(drain_timeout);
        LeftBehind(Arc::clone(&self.shared))
    }

    fn end(&mut self, drain_timeout: Duration) {
        let Some(thread) = self.thread.take() else { return };
        *self.shared.stop.lock().unwrap_or_else(PoisonError::into_inner) = Some(drain_timeout);
        connection::signal(self.shared.wake.as_fd());
        let _ = thread.join();
    }
}

impl Drop for VhostDisk {
    fn drop(&mut self) {
        self.end(self.shared.config.drain_timeout);
    }
}

/// What a stopped disk has left at its device.
pub struct LeftBehind(Arc<DiskShared>);

impl LeftBehind {
    /// Whether every request has ended. Until then the device may still carry one out: it must not be offered again, or an
    /// old write lands on a newer one; and its process has not ended in order.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.0.queues_left.load(Ordering::Acquire) == 0
    }
}

/// The disk's thread: lets front ends in. Each session has a thread of its own.
struct Server {
    disk: Arc<DiskShared>,
    reactors: Arc<[ReactorHandle]>,
    lock: SocketLock,
    socket: Option<BoundSocket>,
    guests: Vec<Guest>,
    /// It was said that there is no room for a third.
    refuses: bool,
}

/// A front end that was let in.
struct Guest {
    session: Arc<SessionShared>,
    /// The session's connection, to see whether its other end is still there.
    stream: UnixStream,
    thread: JoinHandle<()>,
}

/// How long a socket that could not be had is left alone.
const RETRY: Duration = Duration::from_secs(1);

impl Server {
    fn run(mut self) {
        while self.disk.stopping().is_none() {
            self.see_off();
            let Some(socket) = &self.socket else {
                self.wait_for_geometry();
                continue;
            };
            let state = if self.guests.is_empty() { DiskState::Listening } else { DiskState::Connected };
            self.disk.set_state(state);
            // Who comes while one that has gone is being seen off is the same front end again, most likely: it waits for that.
            let full = self.guests.len() >= SESSIONS_MAX;
            let waits = full && self.guests.iter().any(|guest| connection::is_closed(guest.stream.as_fd()));
            let listener = if waits { -1 } else { socket.listener().as_raw_fd() };
            let [readable, woken] =
                connection::wait_readable([listener, self.disk.wake_fd().as_raw_fd()], -1);
            if woken {
                connection::clear(self.disk.wake_fd());
                self.disk.refresh_geometry();
                self.disk.sessions.wake();
            }
            if !readable || self.disk.stopping().is_some() {
                continue;
            }
            match socket.listener().accept() {
                Ok((stream, _)) => self.let_in(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    // Out of descriptors, most likely.
                    log::warn!(
                        "disk {}: a front end could not be accepted: {error}; trying again",
                        self.disk.config.name
                    );
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
        self.disk.sessions.wake();
        for guest in std::mem::take(&mut self.guests) {
            let _ = guest.thread.join();
        }
        // The socket first: whoever finds it gone does not find it locked.
        self.socket = None;
        drop(self.lock);
        self.disk.set_state(DiskState::Stopped);
    }

    /// Begins a session, if there is room for one.
    fn let_in(&mut self, stream: UnixStream) {
        let name = &self.disk.config.name;
        let connected = |guest: &Guest| !connection::is_closed(guest.stream.as_fd());
        if self.guests.len() >= SESSIONS_MAX && self.guests.iter().all(connected) {
            if !std::mem::replace(&mut self.refuses, true) {
                log::warn!(
                    "disk {name}: a third front end was refused: two are connected, one that serves a VM and one for its migration"
                );
            }
            self.disk.disk_counters.sessions_refused.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.disk.set_state(DiskState::Connected);
        let begun = stream.try_clone().and_then(|other_end| {
            let session = Session::new(Arc::clone(&self.disk), Arc::clone(&self.reactors), stream)?;
            let shared = Arc::clone(session.shared());
            self.disk.sessions.enter(&shared, other_end.try_clone()?);
            let thread =
                std::thread::Builder::new().name(format!("disk {name}")).spawn(move || session.run());
            match thread {
                Ok(thread) => Ok(Guest { session: shared, stream: other_end, thread }),
                Err(error) => {
                    self.disk.sessions.leave(&shared);
                    Err(error)
                }
            }
        });
        match begun {
            Ok(guest) => {
                self.disk.disk_counters.sessions.fetch_add(1, Ordering::Relaxed);
                self.guests.push(guest);
            }
            Err(error) => {
                log::warn!("disk {name}: no session for a front end, which is disconnected: {error}")
            }
        }
    }

    /// Waits for the threads of sessions that are over.
    fn see_off(&mut self) {
        let mut index = 0;
        while index < self.guests.len() {
            if self.guests[index].session.is_over() {
                let _ = self.guests.swap_remove(index).thread.join();
                self.refuses = false;
            } else {
                index += 1;
            }
        }
    }

    fn wait_for_geometry(&mut self) {
        let tried = Instant::now();
        if self.disk.refresh_geometry() {
            match self.lock.listen(&self.disk.config.access) {
                Ok(socket) => {
                    log::info!("disk {}: listening", self.disk.config.name);
                    self.disk.set_trouble(String::new());
                    self.socket = Some(socket);
                    return;
                }
                Err(error) => {
                    let error = error.to_string();
                    // Once, not at each try.
                    if *self.disk.trouble.lock().unwrap_or_else(PoisonError::into_inner) != error {
                        log::warn!(
                            "disk {}: socket {error}; trying again until it can be made",
                            self.disk.config.name
                        );
                    }
                    self.disk.set_trouble(error);
                }
            }
        }
        let left = RETRY.saturating_sub(tried.elapsed());
        let [woken] = connection::wait_readable(
            [self.disk.wake_fd().as_raw_fd()],
            i32::try_from(left.as_millis()).unwrap_or(1000),
        );
        if woken {
            connection::clear(self.disk.wake_fd());
        }
    }
}
