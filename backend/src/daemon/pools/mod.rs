//! The pools of a running daemon: found on devices as these are reached, opened, given their members back, closed.
//!
//! ```text
//!   a device is reached ─► probe ─► label ─┐
//!   ...                                    ├─► all that are needed are there, or waited for long enough
//!   a device is reached ─► probe ─► label ─┘        ─► reserve ─► tail ─► Pool::open ─► disks and namespaces on its volumes
//! ```
//!
//! Owns: what is known of devices, which pool is in which phase, who waits for which volume. Must not know: what a pool does, how
//! the API looks.
//!
//! All of it is decided on one thread, `pools`, which is the only one that waits for devices, targets and pools here; others read
//! what is known under a lock that nobody holds while waiting.

mod asks;
mod close;
mod look;
pub(crate) mod past;
mod reserved;
mod state;

pub(super) use state::Absent;

use super::run_state;
use crate::assemble::late::LateDevice;
use crate::assemble::pool as assemble;
use crate::daemon::api::pool_view::{PoolView, VolumeView};
use asks::Asks;
use hawser_block::Device;
use hawser_config::Config;
use hawser_config::value::{Name, VolumePath};
use hawser_runtime::ReactorHandle;
use hawser_volume::pool::Pool;
use state::{Entry, Knowledge, Known, Phase, Reservation, State, Wanted, is_reached, lack_of};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A device that is being asked holds the pools up for so long: it may be the second of two that clash.
const ASK_MAX: Duration = Duration::from_secs(2);
/// Between attempts to open what cannot be opened, or to give a member back: doubled each time.
const RETRY_MIN: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// How often an open pool is looked at, for what the log says of it.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A change of superblocks is on its members by then, or failed there.
const SETTLED: Duration = Duration::from_secs(1);
/// How often a device that could not be opened is tried again.
const ABSENT_EVERY: Duration = Duration::from_secs(5);
/// A pool that is closed has at least so long, however little is left of `drain_timeout`.
const CLOSE_MIN: Duration = Duration::from_secs(1);

/// All pools, and the thread that looks after them.
pub(super) struct Pools {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<bool>>>,
}

pub(super) struct Shared {
    config: Config,
    folder: PathBuf,
    reactors: Vec<ReactorHandle>,
    state: Mutex<State>,
    /// Something has changed that the thread should look at.
    wake: Notify,
    /// Something has changed that others may wait for.
    changed: Condvar,
    asks: Asks,
}

/// Devices that a change has for itself; they are looked at anew when it is over.
pub(super) struct Taken {
    shared: Arc<Shared>,
    names: Vec<Name>,
    pub(super) devices: Vec<Arc<dyn Device>>,
}

/// Why something is not to be had.
pub(super) enum Lack {
    /// There is no such thing.
    Unknown(String),
    /// It is there, and not as it must be.
    Conflict(String),
}

impl Pools {
    /// Nothing is done before [`Pools::start`].
    pub(super) fn new(
        config: &Config,
        devices: impl Iterator<Item = (Name, Arc<dyn Device>)>,
        absent: Vec<Absent>,
        reactors: &[ReactorHandle],
    ) -> Pools {
        let free = assemble::free_devices(config);
        let now = Instant::now();
        let known = |(name, device): (Name, Arc<dyn Device>)| Known {
            direct: !free.contains(&name),
            name,
            device,
            taken: false,
            knowledge: Knowledge::Unknown,
            changes: Arc::default(),
            reservation: Reservation::default(),
            again: (now, RETRY_MIN),
        };
        let devices = devices.map(known).collect();
        let state = State { devices, absent, ..State::default() };
        let shared = Shared {
            config: config.clone(),
            folder: run_state::folder_of(config.daemon.api.as_path()),
            reactors: reactors.to_vec(),
            state: Mutex::new(state),
            wake: Notify::new(),
            changed: Condvar::new(),
            asks: Asks::default(),
        };
        Pools { shared: Arc::new(shared), thread: Mutex::default() }
    }

    /// Begins to look for pools.
    ///
    /// # Errors
    /// When there is no thread to be had: one line.
    pub(super) fn start(&self) -> Result<(), String> {
        for known in &self.shared.state().devices {
            let (shared, changes) = (Arc::downgrade(&self.shared), Arc::clone(&known.changes));
            known.device.subscribe(Box::new(move || {
                changes.fetch_add(1, Ordering::Relaxed);
                if let Some(shared) = shared.upgrade() {
                    shared.wake.notify_one();
                }
            }));
        }
        let failed = |error: std::io::Error| format!("pools: {error}");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(failed)?;
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name("pools".to_owned()).spawn(move || {
            let all_closed = runtime.block_on(look::run(shared));
            // A target that does not answer keeps nobody.
            runtime.shutdown_background();
            all_closed
        });
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread.map_err(failed)?);
        Ok(())
    }

    /// Closes all pools; nobody uses a volume any more. Returns whether all are closed in order.
    pub(super) fn stop(&self, drain: Duration) -> bool {
        self.shared.state().stop = Some(Instant::now() + drain.max(CLOSE_MIN));
        self.shared.wake.notify_one();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let all_closed = thread.is_none_or(|thread| thread.join().unwrap_or(false));
        *self.shared.state() = State::default();
        all_closed
    }

    /// A device for a volume, whether it is there yet or not.
    pub(super) fn volume(&self, path: &VolumePath, read_only: bool) -> Arc<LateDevice> {
        let place = Arc::new(LateDevice::new(path.to_string()));
        let mut state = self.shared.state();
        state.wanted.push(Wanted { path: path.clone(), writes: !read_only, place: Arc::downgrade(&place) });
        state.fill();
        place
    }

    /// Whether a disk may be put on a volume now; one whose pool is not open yet waits.
    pub(super) fn check_volume(&self, path: &VolumePath, read_only: bool) -> Result<(), Lack> {
        let state = self.shared.state();
        let Some(entry) = state.by_name(&path.pool) else {
            return Err(Lack::Unknown(state.no_such_pool(path.pool.as_str())));
        };
        if state.deleting.contains(path) {
            return Err(Lack::Conflict(format!("volume {path} is being deleted or made smaller")));
        }
        let Phase::Open(open) = &entry.phase else { return Ok(()) };
        lack_of(&open.pool, path, !read_only).map_or(Ok(()), |what| Err(Lack::Conflict(what)))
    }

    /// The pool called `name`, if it is open.
    pub(super) fn open_pool(&self, name: &str) -> Result<Pool, Lack> {
        let state = self.shared.state();
        let found = state.pools.values().filter(|entry| entry.found.label.pool == name);
        // Of two with one name, at most one is open.
        let entry = found.max_by_key(|entry| matches!(entry.phase, Phase::Open(_)));
        match entry {
            None => Err(Lack::Unknown(state.no_such_pool(name))),
            Some(Entry { phase: Phase::Open(open), .. }) => Ok(open.pool.clone()),
            Some(entry) => Err(Lack::Conflict(entry.not_open())),
        }
    }

    /// Who waits for pools.
    pub(super) fn asks(&self) -> &Asks {
        &self.shared.asks
    }

    /// Whether there is a pool called `name`, open or not.
    pub(super) fn has(&self, name: &str) -> bool {
        self.shared.state().pools.values().any(|entry| entry.found.label.pool == name)
    }

    /// Waits until the pool is open, or until that has taken `limit`.
    pub(super) fn wait_for(&self, uuid: [u8; 16], limit: Duration) {
        let since = Instant::now();
        let mut state = self.shared.state();
        let is_open =
            |state: &State| state.pools.get(&uuid).is_some_and(|entry| matches!(entry.phase, Phase::Open(_)));
        while !is_open(&state) && state.stop.is_none() {
            let Some(left) = limit.checked_sub(since.elapsed()) else { return };
            let waited = self.shared.changed.wait_timeout(state, left.min(Duration::from_millis(200)));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether something is being asked or opened, so that disks may be served soon.
    pub(super) fn is_busy(&self) -> bool {
        let state = self.shared.state();
        let asking = |known: &Known| match known.knowledge {
            Knowledge::Asking(since) => since.elapsed() < ASK_MAX,
            Knowledge::Unknown => !known.direct && is_reached(known.device.as_ref()),
            _ => false,
        };
        let opening = |entry: &Entry| matches!(entry.phase, Phase::Opening);
        state.devices.iter().any(asking) || state.pools.values().any(opening)
    }

    /// A disk is to have the device for itself from now on.
    pub(super) fn claim(&self, name: &Name) -> Result<(), String> {
        let mut state = self.shared.state();
        let pool = state.pool_of(name).map(|entry| entry.found.label.pool.clone());
        let Some(known) = state.devices.iter_mut().find(|known| known.name == *name) else { return Ok(()) };
        if known.taken {
            return Err(format!("device {name} is being given to a pool, want another device"));
        }
        if let Knowledge::Asking(_) = known.knowledge {
            return Err(format!("device {name} is being asked what pool it belongs to, want it tried again"));
        }
        if let Some(pool) = pool {
            return Err(format!("device {name} is a member of pool {pool}, want one of its volumes"));
        }
        (known.direct, known.knowledge) = (true, Knowledge::Unknown);
        Ok(())
    }

    /// Nobody has the device for itself any more.
    pub(super) fn release(&self, name: &Name) {
        if let Some(known) = self.shared.state().devices.iter_mut().find(|known| known.name == *name) {
            known.direct = false;
        }
        self.shared.wake.notify_one();
    }

    /// Takes devices for a pool.
    pub(super) fn take(&self, names: &[Name]) -> Result<Taken, Lack> {
        let mut state = self.shared.state();
        let mut devices = Vec::new();
        for name in names {
            let Some(known) = state.devices.iter().find(|known| known.name == *name) else {
                let there: Vec<&str> = state.devices.iter().map(|known| known.name.as_str()).collect();
                return Err(Lack::Unknown(format!(
                    "device {name} is not there; there are {}",
                    there.join(", ")
                )));
            };
            if known.direct {
                let what = "is a disk's or a subsystem's own, want a free device";
                return Err(Lack::Conflict(format!("device {name} {what}")));
            }
            if known.taken {
                return Err(Lack::Conflict(format!("device {name} is being given to a pool already")));
            }
            if !is_reached(known.device.as_ref()) {
                let what = known.device.trouble();
                return Err(Lack::Conflict(format!("device {name} is not reached: {what}")));
            }
            // Whether it is one of a pool's that is not open, and is taken all the same, is for who takes it to say.
            let busy = state.pool_of(name).filter(|entry| !matches!(entry.phase, Phase::Waiting { .. }));
            if let Some(entry) = busy
                && (entry.has(name) || matches!(entry.phase, Phase::Opening))
            {
                let pool = &entry.found.label.pool;
                return Err(Lack::Conflict(format!(
                    "device {name} is a member of pool {pool}, want a free device"
                )));
            }
            devices.push(Arc::clone(&known.device));
        }
        for known in state.devices.iter_mut().filter(|known| names.contains(&known.name)) {
            known.taken = true;
        }
        Ok(Taken { shared: Arc::clone(&self.shared), names: names.to_vec(), devices })
    }

    /// Devices that are given to an open pool are let go with it.
    pub(super) fn joined(&self, pool: &str, devices: &[Arc<dyn Device>]) {
        let mut state = self.shared.state();
        let entries = state.pools.values_mut().filter(|entry| entry.found.label.pool == pool);
        for entry in entries {
            if let Phase::Open(open) = &mut entry.phase {
                open.reserved.extend(devices.iter().cloned());
            }
        }
    }

    /// Holds `path` for whoever deletes it or makes it smaller.
    pub(super) fn begin_delete(&self, path: &VolumePath) -> bool {
        self.shared.state().deleting.insert(path.clone())
    }

    pub(super) fn end_delete(&self, path: &VolumePath) {
        self.shared.state().deleting.remove(path);
    }

    /// There may be a volume that somebody waits for.
    pub(super) fn volumes_changed(&self) {
        self.shared.state().fill();
    }

    /// The pool that a device is a member of, as far as is known.
    pub(super) fn pool_of(&self, device: &Name) -> Option<String> {
        self.shared.state().pool_of(device).map(|entry| entry.found.label.pool.clone())
    }

    /// The pool that is open, or being opened, on a device.
    pub(super) fn user_of(&self, device: &Name) -> Option<String> {
        let state = self.shared.state();
        let entry = state.pool_of(device).filter(|entry| !matches!(entry.phase, Phase::Waiting { .. }));
        entry.map(|entry| entry.found.label.pool.clone())
    }

    /// All pools, for people.
    pub(super) fn views(&self) -> Vec<PoolView> {
        let state = self.shared.state();
        let view = |entry: &Entry| match &entry.phase {
            Phase::Open(open) => assemble::pool_view(&open.pool.view()),
            Phase::Waiting { .. } | Phase::Opening => entry
                .found
                .view(Some(entry.trouble.clone()).filter(|it| !it.is_empty()).into_iter().collect()),
        };
        let mut views: Vec<PoolView> = state.pools.values().map(view).collect();
        views.sort_by(|one, other| (&one.name, &one.uuid).cmp(&(&other.name, &other.uuid)));
        views
    }

    /// All volumes of all pools that are open, for people.
    pub(super) fn volume_views(&self) -> Vec<VolumeView> {
        let mut views = Vec::new();
        for pool in self.open_pools() {
            views.extend(pool.volumes().iter().map(|volume| assemble::volume_view(pool.name(), volume)));
        }
        views
    }

    fn open_pools(&self) -> Vec<Pool> {
        let state = self.shared.state();
        let mut pools: Vec<Pool> = state.pools.values().filter_map(Entry::pool).cloned().collect();
        drop(state);
        pools.sort_by(|one, other| one.name().cmp(other.name()));
        pools
    }

    /// The names of all pools.
    pub(super) fn no_such_pool(&self, name: &str) -> String {
        self.shared.state().no_such_pool(name)
    }

    /// A reactor for work that belongs to no pool yet.
    pub(super) fn reactor(&self) -> &ReactorHandle {
        &self.shared.reactors[0]
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        for known in state.devices.iter_mut().filter(|known| self.names.contains(&known.name)) {
            (known.taken, known.knowledge) = (false, Knowledge::Unknown);
        }
        drop(state);
        self.shared.wake.notify_one();
    }
}
