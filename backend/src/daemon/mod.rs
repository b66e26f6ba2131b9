//! The life of a daemon: from a configuration to its last drained request.
//!
//! Owns: the order of starting and stopping, the disks that come and go, the run state. Must not know: how the API or the
//! command line look, nor what layers do inside.
//!
//! Order of starting, so that a failure leaves nothing half-created: lock, run state, devices, reactors, targets, pools, disks,
//! API. Threads: one for each reactor; `api`; `pools`; `signals`; and the main thread, which waits for news of devices and for
//! the end. Only [`Daemon`]'s own locks are taken, none while another is held (but that of its pools, last), except that `changes`, `ana_changes`, `pool_creation`
//! and `volume_reading` are outermost.

pub mod api;
mod build_id;
mod disk;
pub(crate) mod host_lock;
pub(crate) mod lock;
mod notify;
mod pool_changes;
pub(crate) mod pools;
mod reservation;
pub(crate) mod run_state;
mod save;
mod signals;
mod subsystem;
mod view;

use crate::assemble::device::{self, OpenError, Opening};
use crate::assemble::disk as assemble_disk;
use crate::assemble::host;
use crate::assemble::late::LateDevice;
use crate::assemble::pool as assemble_pool;
use crate::assemble::reactors::Reactors;
use crate::assemble::target as assemble_target;
use crate::durable::{self, Machine};
use crate::sandbox::{self, AllowedPaths};
use api::ApiSocket;
use api::view::{DeviceView, DiskState, DiskView, StatusView};
use disk::{Disk, Service};
use hawser_block::{Device, StatsSet};
use hawser_config::value::{Name, SocketPath};
use hawser_config::{Backing, Config, ConfigError, DeviceConfig, DiskConfig};
use hawser_fabric::target::{Target, TargetStats};
use hawser_virtio::{LeftBehind, VhostDisk};
use host_lock::HostLock;
use lock::Lock;
use pools::{Absent, Pools};
use run_state::RunState;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Why a daemon does not start.
#[derive(Debug)]
pub enum StartError {
    /// The configuration is wrong.
    Config(ConfigError),
    /// The world is not as it should be: one line.
    Failed(String),
}

impl From<ConfigError> for StartError {
    fn from(error: ConfigError) -> StartError {
        StartError::Config(error)
    }
}

impl From<String> for StartError {
    fn from(error: String) -> StartError {
        StartError::Failed(error)
    }
}

/// Why a change was not made; nothing of it was. One line each.
#[derive(Debug)]
pub enum ChangeError {
    /// What was asked for cannot be right.
    Wrong(String),
    /// There is no such thing.
    Unknown(String),
    /// It does not go together with what is there.
    Conflict(String),
    /// It could be right, and did not work.
    Failed(String),
}

/// What the main thread waits for.
#[derive(Debug)]
pub(crate) enum News {
    /// It is time to go.
    Stop(&'static str),
}

/// What is counted of one device.
pub(crate) struct DeviceNumbers {
    pub(crate) name: String,
    pub(crate) stats: Arc<StatsSet>,
    pub(crate) counters: Vec<(&'static str, u64)>,
    pub(crate) copied_bytes: Vec<(&'static str, u64)>,
    pub(crate) settings: Vec<(&'static str, &'static str)>,
    pub(crate) paths: Vec<hawser_block::PathView>,
}

/// A running daemon.
pub struct Daemon {
    config: Config,
    allowed: AllowedPaths,
    build_id: String,
    since: Instant,
    reactors: Reactors,
    devices: Mutex<Vec<(DeviceConfig, Arc<dyn Device>)>>,
    disks: Mutex<Vec<Arc<Disk>>>,
    pools: Pools,
    /// What removed disks have left at their devices and volumes.
    left_behind: Mutex<Vec<(Backing, LeftBehind)>>,
    target: Mutex<Option<Target>>,
    run_state: Mutex<RunState>,
    /// Held while disks are added or removed: one change at a time.
    changes: Mutex<()>,
    /// Held while an ANA state is kept and set: what is kept is what is in force. Not `changes`, because a disk that is removed may
    /// take minutes.
    ana_changes: Mutex<()>,
    /// Held while a pool is made: two at once could take the same name.
    pool_creation: Mutex<()>,
    /// Held while a volume is read for a client of the API.
    volume_reading: Mutex<()>,
    disks_started: AtomicUsize,
}

/// How long a start may take at most: it waits for a predecessor that is being killed ([`Lock`]), then for its files.
const START_MAX: Duration = Duration::from_secs(120);
/// How long the start waits for devices that are being reached.
const ANSWER_AT_ONCE: Duration = Duration::from_secs(1);
/// How long the start waits for pools that are being opened, whose logs have to be read.
const POOLS_MAX: Duration = Duration::from_secs(60);
/// A process that is killed closes its descriptors one after the other: its lock may be free before its sockets are.
const SOCKETS_LAST: Duration = Duration::from_secs(5);

/// Tries again for a while where a predecessor may not be quite gone.
fn patiently<T>(had_predecessor: bool, mut start: impl FnMut() -> Result<T, String>) -> Result<T, String> {
    let since = Instant::now();
    loop {
        match start() {
            Err(_) if had_predecessor && since.elapsed() < SOCKETS_LAST => {
                std::thread::sleep(Duration::from_millis(50));
            }
            result => return result,
        }
    }
}

/// Runs what `config` describes until a signal ends it. `ready` is called once, when everything that can be reached is.
///
/// # Errors
/// When it cannot start; nothing is left behind then.
pub fn serve(config: Config, ready: impl FnOnce(&SocketPath)) -> Result<(), StartError> {
    device::check(&config)?;
    let reactors_wanted = Reactors::check(&config)?;
    let allowed = AllowedPaths::of(&config)?;
    let api = config.daemon.api.clone();
    sandbox::become_configured(&config)?;
    notify::waiting(START_MAX);
    let folder = run_state::folder_of(api.as_path());
    run_state::make_folder(&folder)?;
    let lock = Lock::take(&folder.join("lock"))?;
    let build_id = build_id::own();
    let run_state = RunState::take_over(&folder, &build_id)?;
    match &run_state.previous {
        Some(previous) if *previous != build_id => {
            log::info!("build {build_id} takes over from build {previous}")
        }
        Some(_) => log::info!("build {build_id} starts again"),
        None => log::info!("build {build_id} starts"),
    }
    let host_lock = if host_lock::is_needed(&config) {
        let identity = host::identity(&config.host, &config.daemon.state_dir)?;
        Some(HostLock::take(&identity)?)
    } else {
        None
    };
    if sandbox::uses_state(&config) {
        // Once in the sandbox it cannot be made. Who needs it and does not have it says so.
        let _ = durable::make_folder(&Machine, &config.daemon.state_dir, 0o755);
    }
    if config.daemon.sandbox && allowed.check(&config.conf_d()).is_ok() {
        // For `--save`. Who may not make it may still start: saving then says what was wrong.
        let _ = durable::make_folder(&Machine, &config.conf_d(), 0o755);
    }
    device::open_verbs(&config)?;
    sandbox::enter(&config, &allowed)?;
    let (news, inbox) = mpsc::channel();
    signals::watch(news).map_err(|error| format!("signals: {error}"))?;
    let daemon = Arc::new(Daemon::start(config, allowed, build_id, reactors_wanted, run_state)?);
    let served = ApiSocket::bind(&api, daemon.config.daemon.api_mode).and_then(|socket| {
        api::serve(Arc::clone(&daemon), &socket).map_err(|error| format!("{api}: {error}"))?;
        Ok(socket)
    });
    let socket = served.inspect_err(|_| daemon.give_up())?;
    daemon.wait_for_disks();
    ready(&api);
    notify::ready();
    daemon.run(&inbox);
    drop(socket);
    drop(host_lock);
    drop(lock);
    Ok(())
}

impl Daemon {
    fn start(
        config: Config,
        allowed: AllowedPaths,
        build_id: String,
        reactors_wanted: Vec<Option<usize>>,
        mut run_state: RunState,
    ) -> Result<Daemon, StartError> {
        let had_predecessor = run_state.had_predecessor;
        let reactors = Reactors::start(&reactors_wanted, config.daemon.poll_us)?;
        let mut devices: Vec<(DeviceConfig, Arc<dyn Device>)> = Vec::new();
        // A pool may do without a member whose device has died.
        let uses_pools = !config.pools.is_empty() || config.used().any(|backing| backing.volume().is_some());
        let free = assemble_pool::free_devices(&config);
        let mut absent = Vec::new();
        for placed in &config.devices {
            let opening = Opening { had_predecessor, offline: false, in_run_state: true };
            let name = &placed.value.name;
            let device = match device::open(placed, &config, opening, reactors.handles()) {
                Ok(device) => device,
                Err(OpenError::Config(error)) => return Err(StartError::Config(error)),
                Err(OpenError::Failed(what)) if uses_pools && free.contains(name) => {
                    log::warn!("{what}; it may be a pool's member, and is tried again");
                    let place = Arc::new(LateDevice::new(name.to_string()));
                    place.set_trouble(&what);
                    absent.push(Absent::new(placed.clone(), Arc::clone(&place)));
                    place
                }
                Err(OpenError::Failed(what)) => return Err(StartError::Failed(what)),
            };
            devices.push((placed.value.clone(), device));
        }
        let find = |name: &Name| {
            devices.iter().find(|(config, _)| config.name == *name).map(|(_, device)| Arc::clone(device))
        };
        let all = devices.iter().map(|(config, device)| (config.name.clone(), Arc::clone(device)));
        let pools = Pools::new(&config, all, absent, reactors.handles());
        let behind = |backing: &Backing| match backing {
            Backing::Device(name) => find(name),
            // Of a snapshot, hosts are told that they may only read.
            Backing::Volume(path) => Some(pools.volume(path, true) as Arc<dyn Device>),
        };
        // With the lock and all devices ours, nothing is left of the processes before us.
        let lineage = run_state.begin()?;
        let target =
            patiently(had_predecessor, || assemble_target::start(&config, &reactors, &lineage, behind))
                .inspect_err(|_| run_state.never_begun())?;
        let daemon = Daemon {
            allowed,
            build_id,
            since: Instant::now(),
            reactors,
            devices: Mutex::new(devices),
            disks: Mutex::default(),
            pools,
            left_behind: Mutex::default(),
            target: Mutex::new(target),
            run_state: Mutex::new(run_state),
            changes: Mutex::default(),
            ana_changes: Mutex::default(),
            pool_creation: Mutex::default(),
            volume_reading: Mutex::default(),
            disks_started: AtomicUsize::new(0),
            config,
        };
        daemon.pools.start().inspect_err(|_| daemon.give_up())?;
        daemon.start_disks(had_predecessor).inspect_err(|_| daemon.give_up())?;
        Ok(daemon)
    }

    /// Undoes a start that failed half-way.
    fn give_up(&self) {
        if self.stop(Duration::ZERO) {
            self.lock_run_state().never_begun();
        }
    }

    /// Gives targets that answer at once the time to, and pools that are whole, so that being ready means that their disks listen.
    fn wait_for_disks(&self) {
        let since = Instant::now();
        let waiting = || self.all_disks().iter().any(|disk| disk.view().state == DiskState::Waiting);
        let is_soon = || match since.elapsed() {
            short if short < ANSWER_AT_ONCE => true,
            long => long < POOLS_MAX && self.pools.is_busy(),
        };
        while (waiting() || self.pools.is_busy()) && is_soon() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn start_disks(&self, had_predecessor: bool) -> Result<(), StartError> {
        for placed in &self.config.disks {
            let disk = patiently(had_predecessor, || {
                self.start_disk(placed.value.clone(), Some(placed.file().to_owned()))
            });
            let disk = disk.map_err(|what| StartError::Failed(placed.error("socket", what).to_string()))?;
            self.lock_disks().push(Arc::new(disk));
        }
        Ok(())
    }

    fn start_disk(&self, config: DiskConfig, saved_in: Option<PathBuf>) -> Result<Disk, String> {
        let name = &config.name;
        let backing = config.backing().map_err(|(_, what)| what)?;
        let device: Arc<dyn Device> = match &backing {
            Backing::Device(device) => self.device(device).ok_or_else(|| format!("no device {device}"))?,
            Backing::Volume(path) => self.pools.volume(path, config.read_only),
        };
        let suspended = self.lock_run_state().suspended(name.as_str());
        let service = match suspended {
            Some(why) => {
                log::error!("disk {name}: suspended: {why}; `hawser disk resume {name}` returns it");
                Service::Suspended(why)
            }
            None => Service::Serving(self.start_server(&config, Arc::clone(&device))?),
        };
        Ok(Disk::new(config, device, service, saved_in))
    }

    fn start_server(&self, config: &DiskConfig, device: Arc<dyn Device>) -> Result<VhostDisk, String> {
        let index = self.disks_started.fetch_add(1, Ordering::Relaxed);
        let crash_file = Arc::clone(&self.lock_run_state().crash_file);
        let known = device.geometry().is_some();
        let server = assemble_disk::start(config, index, device, &self.reactors, self.drain(), &crash_file)?;
        let DiskConfig { name, socket, .. } = config;
        match config.backing() {
            _ if known => log::info!("disk {name}: listening at {socket}"),
            Ok(Backing::Volume(path)) => {
                log::info!("disk {name}: {socket} listens once its volume {path} is open")
            }
            Ok(Backing::Device(device)) => {
                log::info!("disk {name}: {socket} listens once its device {device} is reached");
            }
            Err(_) => {}
        }
        Ok(server)
    }

    fn drain(&self) -> Duration {
        Duration::from_secs(u64::from(self.config.daemon.drain_timeout))
    }

    fn device(&self, name: &Name) -> Option<Arc<dyn Device>> {
        self.lock_devices()
            .iter()
            .find(|(config, _)| config.name == *name)
            .map(|(_, device)| Arc::clone(device))
    }

    fn lock_devices(&self) -> MutexGuard<'_, Vec<(DeviceConfig, Arc<dyn Device>)>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_disks(&self) -> MutexGuard<'_, Vec<Arc<Disk>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_left_behind(&self) -> MutexGuard<'_, Vec<(Backing, LeftBehind)>> {
        self.left_behind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_run_state(&self) -> MutexGuard<'_, RunState> {
        self.run_state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_changes(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all_disks(&self) -> Vec<Arc<Disk>> {
        self.lock_disks().clone()
    }

    /// Waits until it is time to go, then drains.
    fn run(&self, inbox: &Receiver<News>) {
        if let Ok(News::Stop(why)) = inbox.recv() {
            log::info!("{why}: draining for up to {} s", self.config.daemon.drain_timeout);
        }
        if !self.stop(self.drain()) {
            // The next process waits until what we leave behind is over, as after a death.
            log::warn!(
                "requests may still be carried out by a device: the next start waits until they cannot be, as after a crash"
            );
        } else if let Err(error) = self.lock_run_state().end() {
            log::error!("{error}");
        }
        log::info!("ended");
    }

    /// Ends all disks at the same time, then the target, then the pools, then the devices. Returns whether every request has ended.
    fn stop(&self, drain: Duration) -> bool {
        // A disk that is being removed right now takes its own time to drain, as long as that of all disks.
        notify::stopping(drain);
        let _change = self.lock_changes();
        notify::stopping(drain);
        let since = Instant::now();
        let disks = std::mem::take(&mut *self.lock_disks());
        let mut all_ended = std::thread::scope(|scope| {
            let ends: Vec<_> = disks.iter().map(|disk| scope.spawn(|| disk.stop(drain))).collect();
            ends.into_iter().all(|end| end.join().is_ok_and(|left| left.is_none()))
        });
        drop(disks);
        all_ended &= std::mem::take(&mut *self.lock_left_behind()).iter().all(|(_, left)| left.has_ended());
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner).take();
        let drain_left = drain.saturating_sub(since.elapsed());
        notify::stopping(drain_left);
        if target.is_some_and(|target| !target.stop(drain_left)) {
            log::warn!(
                "target: commands of hosts were still under way after {} s: they are left",
                drain.as_secs()
            );
            all_ended = false;
        }
        let drain_left = drain.saturating_sub(since.elapsed());
        notify::stopping(drain_left);
        all_ended &= self.pools.stop(drain_left);
        let devices = std::mem::take(&mut *self.lock_devices());
        device::close(devices.into_iter().map(|(_, device)| device).collect());
        all_ended
    }

    /// Adds a disk to the running daemon; with `save`, also to `conf.d`.
    ///
    /// # Errors
    /// When it cannot be had; then nothing has changed.
    pub fn add_disk(&self, config: DiskConfig, save: bool) -> Result<DiskView, ChangeError> {
        let _change = self.lock_changes();
        let wrong = |(key, what): (&str, String)| ChangeError::Wrong(format!("{key}: {what}"));
        config.check().map_err(wrong)?;
        let backing = config.backing().map_err(wrong)?;
        self.config.check_backing(&backing).map_err(|what| wrong((backing.key(), what)))?;
        self.check_free(&self.pools, &backing, config.read_only)?;
        for other in self.all_disks() {
            if other.config.name == config.name {
                return Err(ChangeError::Conflict(format!(
                    "disk {} is there, want another name",
                    config.name
                )));
            }
            if other.config.socket == config.socket {
                let what =
                    format!("socket {} is disk {}'s, want another path", config.socket, other.config.name);
                return Err(ChangeError::Conflict(what));
            }
        }
        self.allowed
            .check(config.socket.as_path())
            .map_err(|what| ChangeError::Wrong(format!("socket: {what}")))?;
        if config.socket == self.config.daemon.api {
            let what = format!("socket {} is the API's own, want another path", config.socket);
            return Err(ChangeError::Conflict(what));
        }
        if self.has_left_behind(&backing) {
            // An old write would land on what the new disk writes.
            let key = backing.key();
            return Err(ChangeError::Conflict(format!(
                "{key} {backing} still has requests of a disk that was removed, want another {key}, or wait until it answers"
            )));
        }
        self.config
            .check_sharing(&config, self.all_disks().iter().map(|other| &other.config))
            .map_err(|what| ChangeError::Conflict(format!("{} {what}", backing.key())))?;
        if let Backing::Device(device) = &backing {
            self.pools.claim(device).map_err(ChangeError::Conflict)?;
        }
        let name = config.name.clone();
        let disk = self.start_disk(config, None).map_err(|what| {
            self.release(&backing);
            ChangeError::Failed(format!("disk {name}: {what}"))
        })?;
        if save {
            match save::save_disk(&Machine, &self.config, &disk.config) {
                Ok(file) => disk.set_saved_in(Some(file)),
                Err(what) => {
                    // A front end may have been faster.
                    self.end_disk(&disk, Duration::ZERO);
                    self.release(&backing);
                    return Err(ChangeError::Failed(what));
                }
            }
        }
        log::info!("disk {name}: added");
        let disk = Arc::new(disk);
        self.lock_disks().push(Arc::clone(&disk));
        Ok(disk.view())
    }

    /// Removes a disk from the running daemon; with `save`, also from `conf.d`.
    ///
    /// # Errors
    /// When there is none, or it is not ours to remove; then nothing has changed.
    pub fn remove_disk(&self, name: &str, save: bool) -> Result<DiskView, ChangeError> {
        let _change = self.lock_changes();
        let disk = self.find_disk(name)?;
        if save {
            save::unsave_disk(&self.config, &disk.config.name, disk.saved_in().as_deref())
                .map_err(ChangeError::Conflict)?;
            disk.set_saved_in(None);
        }
        let view = disk.view();
        self.end_disk(&disk, self.drain());
        self.lock_disks().retain(|other| !Arc::ptr_eq(other, &disk));
        if let Ok(backing) = disk.config.backing() {
            self.release(&backing);
        }
        Ok(view)
    }

    /// Leaves a device that nobody has for himself any more to pools.
    fn release(&self, backing: &Backing) {
        if let Backing::Device(device) = backing
            && self.user_of(backing).is_none()
            && !self.has_left_behind(backing)
        {
            self.pools.release(device);
        }
    }

    /// Stops a disk, and remembers what it leaves at its device.
    fn end_disk(&self, disk: &Disk, drain: Duration) {
        let name = &disk.config.name;
        let Some(left) = disk.stop(drain) else {
            log::info!("disk {name}: removed");
            return;
        };
        if let Ok(backing) = disk.config.backing() {
            log::warn!(
                "disk {name}: removed; {} {backing} still has requests of it, and cannot be used before they end",
                backing.key()
            );
            self.lock_left_behind().push((backing, left));
        }
    }

    /// Whether what was behind a disk that was removed still has requests of it.
    fn has_left_behind(&self, backing: &Backing) -> bool {
        let mut left_behind = self.lock_left_behind();
        left_behind.retain(|(_, left)| !left.has_ended());
        left_behind.iter().any(|(other, _)| other == backing)
    }

    /// Returns a disk that was set aside.
    ///
    /// # Errors
    /// When there is none, or it is not set aside, or its socket cannot be had.
    pub fn resume_disk(&self, name: &str) -> Result<DiskView, ChangeError> {
        let _change = self.lock_changes();
        let disk = self.find_disk(name)?;
        if !disk.is_suspended() {
            return Err(ChangeError::Conflict(format!("disk {name} is not suspended")));
        }
        self.lock_run_state().resume(name).map_err(ChangeError::Failed)?;
        let server = self
            .start_server(&disk.config, Arc::clone(disk.device()))
            .map_err(|what| ChangeError::Failed(format!("disk {name}: {what}")))?;
        disk.resume(server);
        log::info!("disk {name}: resumed");
        Ok(disk.view())
    }

    fn find_disk(&self, name: &str) -> Result<Arc<Disk>, ChangeError> {
        let disk = self.all_disks().into_iter().find(|disk| disk.config.name.as_str() == name);
        disk.ok_or_else(|| ChangeError::Unknown(self.no_such_disk(name)))
    }

    pub(crate) fn no_such_disk(&self, name: &str) -> String {
        let disks = self.all_disks();
        let names: Vec<&str> = disks.iter().map(|disk| disk.config.name.as_str()).collect();
        if names.is_empty() {
            return format!("disk {name:?} is not there; there is none");
        }
        format!("disk {name:?} is not there; there are {}", names.join(", "))
    }

    /// Everything.
    #[must_use]
    pub fn status(&self) -> StatusView {
        StatusView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            build_id: self.build_id.clone(),
            pid: std::process::id(),
            uptime_seconds: self.since.elapsed().as_secs(),
            crashes: self.lock_run_state().crashes(),
            reactors: self.reactors.views(),
            disks: self.disk_views(),
            devices: self.device_views(),
            subsystems: self.subsystem_views(),
            pools: self.pool_views(),
            volumes: self.volume_views(),
        }
    }

    /// All disks.
    #[must_use]
    pub fn disk_views(&self) -> Vec<DiskView> {
        self.all_disks().iter().map(|disk| disk.view()).collect()
    }

    /// All devices.
    #[must_use]
    pub fn device_views(&self) -> Vec<DeviceView> {
        let pool_of = |config: &DeviceConfig| self.pools.pool_of(&config.name);
        self.lock_devices()
            .iter()
            .map(|(config, device)| view::device_view(config, device.as_ref(), pool_of(config)))
            .collect()
    }

    /// One device.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn device_view(&self, name: &str) -> Result<DeviceView, ChangeError> {
        let devices = self.lock_devices();
        let found = devices.iter().find(|(config, _)| config.name.as_str() == name);
        let (config, device) = found.ok_or_else(|| {
            let names: Vec<&str> = devices.iter().map(|(config, _)| config.name.as_str()).collect();
            let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            ChangeError::Unknown(format!("device {name:?} is not there; there is {there}"))
        })?;
        Ok(view::device_view(config, device.as_ref(), self.pools.pool_of(&config.name)))
    }

    /// Takes a device's paths by another policy, until the daemon ends.
    ///
    /// # Errors
    /// When there is no such device or policy.
    pub fn set_device(&self, name: &str, io_policy: &str) -> Result<DeviceView, ChangeError> {
        let before = self.device_view(name)?;
        let device = self
            .lock_devices()
            .iter()
            .find(|(config, _)| config.name.as_str() == name)
            .map(|(_, device)| Arc::clone(device));
        let Some(device) = device else { return Err(ChangeError::Failed("the daemon ends".to_owned())) };
        device.set_io_policy(io_policy).map_err(|what| ChangeError::Wrong(format!("io_policy: {what}")))?;
        if before.settings.get("io_policy").is_none_or(|before| before != io_policy) {
            log::info!("{name}: paths are taken by io_policy {io_policy} from now on, until the daemon ends");
        }
        self.device_view(name)
    }

    /// How the target is doing, if there is one.
    #[must_use]
    pub(crate) fn target_stats(&self) -> Option<TargetStats> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Target::stats)
    }

    /// The numbers of all disks, with their names.
    #[must_use]
    pub(crate) fn disk_stats(&self) -> Vec<(String, Arc<StatsSet>)> {
        self.all_disks().iter().map(|disk| (disk.config.name.to_string(), disk.stats())).collect()
    }

    /// The numbers of all devices.
    #[must_use]
    pub(crate) fn device_numbers(&self) -> Vec<DeviceNumbers> {
        let devices = self.lock_devices();
        let numbers = |(config, device): &(DeviceConfig, Arc<dyn Device>)| DeviceNumbers {
            name: config.name.to_string(),
            stats: device.stats(),
            counters: device.counters(),
            copied_bytes: device.copied_bytes(),
            settings: device.settings(),
            paths: device.paths(),
        };
        devices.iter().map(numbers).collect()
    }
}
