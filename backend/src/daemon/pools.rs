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

use super::run_state;
use crate::assemble::device::{self, OpenError, Opening};
use crate::assemble::late::LateDevice;
use crate::assemble::pool::{self as assemble, Found};
use crate::assemble::{host, reserve};
use crate::daemon::api::pool_view::{PoolView, VolumeView};
use crate::tail::{self, FileTail};
use hawser_block::{Device, DeviceState};
use hawser_config::value::{Name, VolumePath};
use hawser_config::{Config, DeviceConfig, Placed};
use hawser_runtime::ReactorHandle;
use hawser_volume::pool::{self, Label, MemberState, OpenOptions, Pool};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A device that is being asked holds the pools up for so long: it may be the second of two that clash.
const ASK_MAX: Duration = Duration::from_secs(2);
/// Between attempts to open what cannot be opened, or to give a member back: doubled each time.
const RETRY_MIN: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// How often an open pool is looked at: for members that are stale though their devices are well.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How often a device that could not be opened is tried again. Longer than a file's lock is waited for.
const ABSENT_EVERY: Duration = Duration::from_secs(35);
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
}

#[derive(Default)]
struct State {
    devices: Vec<Known>,
    /// Devices that could not be opened, and when that is tried again.
    absent: Vec<(Absent, Instant)>,
    pools: BTreeMap<[u8; 16], Entry>,
    wanted: Vec<Wanted>,
    deleting: BTreeSet<VolumePath>,
    /// So many pools were opened: the next one's owner is on the next reactor.
    opened: usize,
    /// Openings and additions that have not ended.
    tasks: usize,
    /// When it must be over, once it is to end.
    stop: Option<Instant>,
}

/// A device that could not be opened, and the place for it.
pub(super) type Absent = (Placed<DeviceConfig>, Arc<LateDevice>);

/// A device of the configuration.
struct Known {
    name: Name,
    device: Arc<dyn Device>,
    /// A disk or namespace has it for itself.
    direct: bool,
    /// A change is under way that gives it to a pool.
    taken: bool,
    knowledge: Knowledge,
    /// When it is next given back to its pool, and how long it is waited for after that.
    again: (Instant, Duration),
}

enum Knowledge {
    Unknown,
    Asking(Instant),
    Nothing,
    Member(Label),
    Failed { again: Instant, wait: Duration },
}

/// A pool that was found.
struct Entry {
    found: Found,
    since: Instant,
    phase: Phase,
    /// Why it is not open; empty when it is.
    trouble: String,
    /// As it was seen last, for the log.
    seen: String,
}

enum Phase {
    Waiting { again: Instant, wait: Duration, tried: Vec<Name> },
    Opening,
    Open(Open),
}

/// What there is of an open pool.
pub(super) struct Open {
    pool: Pool,
    reserved: Vec<Arc<dyn Device>>,
    tail: PathBuf,
}

/// Who waits for a volume.
struct Wanted {
    path: VolumePath,
    writes: bool,
    place: Weak<LateDevice>,
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
            again: (now, RETRY_MIN),
        };
        let devices = devices.map(known).collect();
        let absent = absent.into_iter().map(|absent| (absent, now + RETRY_MIN)).collect();
        let state = State { devices, absent, ..State::default() };
        let shared = Shared {
            config: config.clone(),
            folder: run_state::folder_of(config.daemon.api.as_path()),
            reactors: reactors.to_vec(),
            state: Mutex::new(state),
            wake: Notify::new(),
            changed: Condvar::new(),
        };
        Pools { shared: Arc::new(shared), thread: Mutex::default() }
    }

    /// Begins to look for pools.
    ///
    /// # Errors
    /// When there is no thread to be had: one line.
    pub(super) fn start(&self) -> Result<(), String> {
        for known in &self.shared.state().devices {
            let shared = Arc::downgrade(&self.shared);
            known.device.subscribe(Box::new(move || {
                if let Some(shared) = shared.upgrade() {
                    shared.wake.notify_one();
                }
            }));
        }
        let failed = |error: std::io::Error| format!("pools: {error}");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(failed)?;
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name("pools".to_owned()).spawn(move || {
            let all_closed = runtime.block_on(run(shared));
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
            return Err(Lack::Conflict(format!("volume {path} is being deleted")));
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
        let Some(known) = state.devices.iter_mut().find(|known| known.name == *name) else { return Ok(()) };
        if let Knowledge::Member(label) = &known.knowledge {
            return Err(format!("device {name} is a member of pool {}, want one of its volumes", label.pool));
        }
        if known.taken {
            return Err(format!("device {name} is being given to a pool, want another device"));
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
            if let Knowledge::Member(label) = &known.knowledge
                && let Some(Entry { phase: Phase::Open(_), found, .. }) = state.pools.get(&label.pool_uuid)
            {
                let what =
                    format!("device {name} is a member of pool {}, want a free device", found.label.pool);
                return Err(Lack::Conflict(what));
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

    /// Holds `path` for whoever deletes it.
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
        let state = self.shared.state();
        let known = state.devices.iter().find(|known| known.name == *device)?;
        match &known.knowledge {
            Knowledge::Member(label) if !known.direct => Some(label.pool.clone()),
            _ => None,
        }
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

impl Entry {
    fn pool(&self) -> Option<&Pool> {
        match &self.phase {
            Phase::Open(open) => Some(&open.pool),
            Phase::Waiting { .. } | Phase::Opening => None,
        }
    }

    fn not_open(&self) -> String {
        let why = if self.trouble.is_empty() { "it is being opened" } else { &self.trouble };
        format!("pool {} is not open yet: {why}", self.found.label.pool)
    }

    /// Says it in the log, once.
    fn set_trouble(&mut self, trouble: String) {
        if self.trouble != trouble {
            if !trouble.is_empty() {
                log::warn!("pool {}: {trouble}", self.found.label.pool);
            }
            self.trouble = trouble;
        }
    }
}

impl State {
    fn by_name(&self, name: &Name) -> Option<&Entry> {
        let found = self.pools.values().filter(|entry| entry.found.label.pool == name.as_str());
        found.max_by_key(|entry| matches!(entry.phase, Phase::Open(_)))
    }

    fn no_such_pool(&self, name: &str) -> String {
        let names: Vec<&str> = self.pools.values().map(|entry| entry.found.label.pool.as_str()).collect();
        if names.is_empty() {
            return format!("pool {name:?} is not there; there is none");
        }
        format!("pool {name:?} is not there; there are {}", names.join(", "))
    }

    /// Gives volumes that are there to who waits for them, and tells the others why not.
    fn fill(&mut self) {
        let mut wanted = std::mem::take(&mut self.wanted);
        wanted.retain(|wanted| {
            let Some(place) = wanted.place.upgrade() else { return false };
            let VolumePath { pool, .. } = &wanted.path;
            let entry = self.by_name(pool);
            let trouble = match entry {
                None => format!("pool {pool} was not found on any device yet"),
                Some(Entry { phase: Phase::Open(open), .. }) => {
                    match lack_of(&open.pool, &wanted.path, wanted.writes) {
                        Some(what) => what,
                        None => {
                            let device = open.pool.device(wanted.path.volume.as_str());
                            match device {
                                Some(device) => {
                                    place.set(device);
                                    return false;
                                }
                                None => format!("pool {pool} has no volume {}", wanted.path.volume),
                            }
                        }
                    }
                }
                Some(entry) => entry.not_open(),
            };
            place.set_trouble(&trouble);
            true
        });
        self.wanted = wanted;
    }
}

/// Why a volume cannot be served.
fn lack_of(pool: &Pool, path: &VolumePath, writes: bool) -> Option<String> {
    let volumes = pool.volumes();
    match volumes.iter().find(|volume| volume.name == path.volume.as_str()) {
        None => Some(format!("pool {} has no volume {}", path.pool, path.volume)),
        Some(volume) if volume.is_snapshot && writes => {
            Some(format!("{path} is a snapshot, want read_only = true, or a clone of it"))
        }
        Some(_) => None,
    }
}

fn is_reached(device: &dyn Device) -> bool {
    device.state() == DeviceState::Ready && device.geometry().is_some()
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whatever waits for a change looks again.
    fn tell(&self) {
        self.wake.notify_one();
        self.changed.notify_all();
    }

    /// Looks at everything, begins what can be begun, and says when to look again.
    fn look(self: &Arc<Self>) -> Option<Instant> {
        let now = Instant::now();
        let mut state = self.state();
        let tried = self.try_absent(&mut state, now);
        let asked = self.ask(&mut state, now);
        let labels = state.devices.iter().filter(|known| !known.direct && !known.taken).filter_map(|known| {
            let Knowledge::Member(label) = &known.knowledge else { return None };
            Some((&known.name, label))
        });
        let mut all = Found::all(labels);
        state
            .pools
            .retain(|uuid, entry| !matches!(entry.phase, Phase::Waiting { .. }) || all.contains_key(uuid));
        for (uuid, entry) in &mut state.pools {
            if let Some(found) = all.remove(uuid) {
                entry.found = found;
            }
        }
        for (uuid, found) in all {
            log::info!("pool {}: found on {}", found.label.pool, found.device_names());
            let phase = Phase::Waiting { again: now, wait: RETRY_MIN, tried: Vec::new() };
            let (trouble, seen) = (String::new(), String::new());
            state.pools.insert(uuid, Entry { found, since: now, phase, trouble, seen });
        }
        let uuids: Vec<[u8; 16]> = state.pools.keys().copied().collect();
        let mut next = asked;
        for uuid in uuids {
            let at = match state.pools[&uuid].phase {
                Phase::Waiting { .. } if asked.is_none() => self.consider(&mut state, uuid, now),
                Phase::Waiting { .. } | Phase::Opening => None,
                Phase::Open(_) => self.give_back(&mut state, uuid, now),
            };
            next = [next, at].into_iter().flatten().min();
        }
        state.fill();
        let failed = state.devices.iter().filter_map(|known| match known.knowledge {
            Knowledge::Failed { again, .. } => Some(again),
            _ => None,
        });
        failed.chain(next).chain(tried).min()
    }

    /// Tries to open devices that were not there. Returns when to try again.
    fn try_absent(self: &Arc<Self>, state: &mut State, now: Instant) -> Option<Instant> {
        state.absent.retain(|((_, place), _)| !place.is_there());
        for ((placed, place), at) in state.absent.iter_mut().filter(|(_, at)| *at <= now) {
            *at = now + ABSENT_EVERY;
            let (shared, placed, place) = (Arc::clone(self), placed.clone(), Arc::clone(place));
            let opened = move || {
                let opening = Opening { had_predecessor: true, offline: false, in_run_state: true };
                match device::open(&placed, &shared.config, opening, &shared.reactors) {
                    Ok(device) => {
                        log::info!("device {}: is there now", placed.value.name);
                        place.set(device);
                    }
                    Err(OpenError::Config(error)) => place.set_trouble(&error.to_string()),
                    Err(OpenError::Failed(what)) => place.set_trouble(&what),
                }
                Ok(())
            };
            tokio::spawn(blocking(opened));
        }
        state.absent.iter().map(|(_, at)| *at).min()
    }

    /// Asks devices that were reached what they belong to. Returns when those that are being asked are not waited for any more.
    fn ask(self: &Arc<Self>, state: &mut State, now: Instant) -> Option<Instant> {
        let mut until = None;
        for known in state.devices.iter_mut().filter(|known| !known.direct && !known.taken) {
            let is_due = match known.knowledge {
                Knowledge::Unknown => true,
                Knowledge::Failed { again, .. } => again <= now,
                Knowledge::Asking(_) | Knowledge::Nothing | Knowledge::Member(_) => false,
            };
            if is_due && is_reached(known.device.as_ref()) {
                let wait = match known.knowledge {
                    Knowledge::Failed { wait, .. } => wait,
                    _ => RETRY_MIN,
                };
                known.knowledge = Knowledge::Asking(now);
                let asked = pool::probe(&self.reactors[0], Arc::clone(&known.device));
                let (shared, name) = (Arc::clone(self), known.name.clone());
                tokio::spawn(async move { shared.answered(&name, asked.await, wait) });
            }
            if let Knowledge::Asking(since) = known.knowledge
                && since + ASK_MAX > now
            {
                until = until.max(Some(since + ASK_MAX));
            }
        }
        until
    }

    fn answered(&self, name: &Name, answer: Result<Option<Label>, pool::PoolError>, wait: Duration) {
        let mut state = self.state();
        if let Some(known) = state.devices.iter_mut().find(|known| known.name == *name)
            && matches!(known.knowledge, Knowledge::Asking(_))
        {
            known.knowledge = match answer {
                Ok(None) => Knowledge::Nothing,
                Ok(Some(label)) => Knowledge::Member(label),
                Err(error) => {
                    log::warn!(
                        "device {name}: whether it belongs to a pool is not known: {}",
                        assemble::line_of(error)
                    );
                    Knowledge::Failed { again: Instant::now() + wait, wait: (wait * 2).min(RETRY_MAX) }
                }
            };
        }
        drop(state);
        self.tell();
    }

    /// Opens a pool that can be opened now; else says why not, and when to look again.
    fn consider(self: &Arc<Self>, state: &mut State, uuid: [u8; 16], now: Instant) -> Option<Instant> {
        let clash = {
            let entry = &state.pools[&uuid];
            let same = |(other, it): &(&[u8; 16], &Entry)| {
                **other != uuid && it.found.label.pool == entry.found.label.pool
            };
            let other = state.pools.iter().find(same);
            other.map(|(_, other)| assemble::clash_line(&entry.found.label.pool, &entry.found, &other.found))
        };
        let entry = state.pools.get_mut(&uuid)?;
        let Phase::Waiting { again, tried, .. } = &entry.phase else { return None };
        if let Some(what) = clash {
            entry.set_trouble(what);
            return None;
        }
        let Ok(name) = entry.found.label.pool.parse::<Name>() else {
            let what = format!("its name, {:?}, cannot be used here", entry.found.label.pool);
            entry.set_trouble(what);
            return None;
        };
        let policy = self.config.pool(&name);
        let until = entry.since + Duration::from_secs(u64::from(policy.assemble_timeout));
        let missing = entry.found.missing_line();
        if let Some(missing) = &missing
            && until > now
        {
            let what =
                format!("{missing}; waiting for at most {} s (assemble_timeout)", policy.assemble_timeout);
            entry.set_trouble(what);
            return Some(until);
        }
        let names: Vec<Name> = entry.found.devices.iter().map(|(name, _)| name.clone()).collect();
        if *tried == names && *again > now {
            return Some(*again);
        }
        let wait = match &entry.phase {
            Phase::Waiting { wait, tried, .. } if *tried == names => *wait,
            _ => RETRY_MIN,
        };
        entry.phase = Phase::Opening;
        if let Some(missing) = &missing {
            log::warn!("pool {name}: {missing}: it is started without");
        }
        let devices = state.devices.iter().filter(|known| names.contains(&known.name));
        let devices: Vec<Arc<dyn Device>> = devices.map(|known| Arc::clone(&known.device)).collect();
        let owner = self.reactors[state.opened % self.reactors.len()].clone();
        state.opened += 1;
        state.tasks += 1;
        let (shared, degraded) = (Arc::clone(self), missing.is_some());
        tokio::spawn(async move {
            let opened = shared.open(uuid, &policy, owner, devices, degraded).await;
            shared.opened(uuid, opened, names, wait);
        });
        None
    }

    async fn open(
        &self,
        uuid: [u8; 16],
        policy: &hawser_config::PoolConfig,
        owner: ReactorHandle,
        devices: Vec<Arc<dyn Device>>,
        degraded: bool,
    ) -> Result<Open, String> {
        let identity = host::identity(&self.config.host, &self.config.daemon.state_dir)?;
        let host = identity.id.0;
        let (members, assume_exclusive) = (devices.clone(), policy.assume_exclusive);
        let reserved = blocking(move || reserve_all(members, host, assume_exclusive)).await?;
        let path = tail::file_of(&self.folder, &uuid);
        let opened = match FileTail::open(&path, &uuid) {
            Ok(tail) => {
                let options =
                    OpenOptions { degraded, ..assemble::open_options(policy, host, Box::new(tail)) };
                Pool::open(&owner, devices, options).await.map_err(assemble::line_of)
            }
            Err(what) => Err(what),
        };
        match opened {
            Ok(pool) => Ok(Open { pool, reserved, tail: path }),
            Err(what) => {
                // Another host may have more luck.
                let left = blocking(move || {
                    reserved.iter().for_each(|device| reserve::leave(device.as_ref(), &host));
                    Ok(())
                });
                left.await?;
                Err(what)
            }
        }
    }

    fn opened(&self, uuid: [u8; 16], opened: Result<Open, String>, tried: Vec<Name>, wait: Duration) {
        let mut state = self.state();
        state.tasks = state.tasks.saturating_sub(1);
        if let Some(entry) = state.pools.get_mut(&uuid) {
            match opened {
                Ok(open) => {
                    log::info!("pool {}: open, {} volumes", open.pool.name(), open.pool.volumes().len());
                    entry.phase = Phase::Open(open);
                    entry.set_trouble(String::new());
                }
                Err(what) => {
                    let again = Instant::now() + wait;
                    entry.phase = Phase::Waiting { again, wait: (wait * 2).min(RETRY_MAX), tried };
                    entry.set_trouble(what);
                }
            }
        }
        drop(state);
        self.tell();
    }

    /// Gives an open pool its members back that were away and are well again.
    fn give_back(self: &Arc<Self>, state: &mut State, uuid: [u8; 16], now: Instant) -> Option<Instant> {
        let entry = state.pools.get_mut(&uuid)?;
        let pool = entry.pool()?.clone();
        let view = pool.view();
        let name = view.name.clone();
        let shown = assemble::pool_view(&view);
        let seen = std::iter::once(shown.state.name().to_owned())
            .chain(shown.troubles)
            .collect::<Vec<_>>()
            .join(": ");
        if entry.seen != seen {
            log::info!("pool {name}: {seen}");
            entry.seen = seen;
        }
        let members: Vec<Name> = entry.found.devices.iter().map(|(name, _)| name.clone()).collect();
        let mut next = now + LOOK_EVERY;
        for known in state.devices.iter_mut().filter(|known| members.contains(&known.name)) {
            let member =
                view.members.iter().find(|member| member.device.as_deref() == Some(known.name.as_str()));
            let is_away =
                member.is_none_or(|member| matches!(member.state, MemberState::Stale | MemberState::Missing));
            if !is_away {
                known.again = (now, RETRY_MIN);
                continue;
            }
            if known.taken || !is_reached(known.device.as_ref()) {
                continue;
            }
            let (at, wait) = known.again;
            if at > now {
                next = next.min(at);
                continue;
            }
            known.again = (now + wait, (wait * 2).min(RETRY_MAX));
            state.tasks += 1;
            let (shared, device, pool) = (Arc::clone(self), Arc::clone(&known.device), pool.clone());
            let first = wait == RETRY_MIN;
            tokio::spawn(async move {
                let added = shared.add(&pool, Arc::clone(&device)).await;
                let mut state = shared.state();
                state.tasks = state.tasks.saturating_sub(1);
                match added {
                    Ok(reserved) => {
                        log::info!("pool {}: device {} is back", pool.name(), device.name());
                        if let Some(Entry { phase: Phase::Open(open), .. }) = state.pools.get_mut(&uuid) {
                            open.reserved.extend(reserved);
                        }
                    }
                    Err(what) if first => {
                        log::warn!("pool {}: device {}: {what}", pool.name(), device.name())
                    }
                    Err(_) => {}
                }
                drop(state);
                shared.tell();
            });
        }
        Some(next)
    }

    async fn add(&self, pool: &Pool, device: Arc<dyn Device>) -> Result<Vec<Arc<dyn Device>>, String> {
        let identity = host::identity(&self.config.host, &self.config.daemon.state_dir)?;
        let assume_exclusive = pool.name().parse().is_ok_and(|name| self.config.pool(&name).assume_exclusive);
        let (members, host) = (vec![Arc::clone(&device)], identity.id.0);
        let reserved = blocking(move || reserve_all(members, host, assume_exclusive)).await?;
        pool.add_member(device).await.map_err(assemble::line_of)?;
        Ok(reserved)
    }

    /// Closes what is open, in the time that there is.
    async fn close(self: &Arc<Self>, deadline: Instant) -> bool {
        let limit = tokio::time::Instant::from_std(deadline);
        let mut all_closed = true;
        while self.state().tasks > 0 {
            if tokio::time::timeout_at(limit, self.wake.notified()).await.is_err()
                && Instant::now() >= deadline
            {
                log::warn!("pools: what is being opened is left");
                all_closed = false;
                break;
            }
        }
        let identity = host::identity(&self.config.host, &self.config.daemon.state_dir);
        let entries = std::mem::take(&mut self.state().pools);
        let closings: Vec<_> = entries
            .into_values()
            .filter_map(|entry| match entry.phase {
                Phase::Open(open) => Some(open),
                Phase::Waiting { .. } | Phase::Opening => None,
            })
            .map(|open| tokio::spawn(close_one(open, identity.as_ref().ok().map(|it| it.id.0), limit)))
            .collect();
        for closing in closings {
            all_closed &= closing.await.unwrap_or(false);
        }
        all_closed
    }
}

async fn close_one(open: Open, host: Option<[u8; 16]>, limit: tokio::time::Instant) -> bool {
    let Open { pool, reserved, tail } = open;
    let name = pool.name().to_owned();
    match tokio::time::timeout_at(limit, pool.close()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            log::warn!("pool {name}: not closed in order: {}", assemble::line_of(error));
            return false;
        }
        Err(_) => {
            log::warn!(
                "pool {name}: not closed in time: the next start goes on from what the run state has of it"
            );
            return false;
        }
    }
    drop(pool);
    if let Err(error) = std::fs::remove_file(&tail) {
        log::warn!("{}: cannot be removed: {error}", tail.display());
    }
    if let Some(host) = host {
        let left = blocking(move || {
            reserved.iter().for_each(|device| reserve::leave(device.as_ref(), &host));
            Ok(())
        });
        // Then the next opener finds it ours.
        let _ = tokio::time::timeout_at(limit, left).await;
    }
    log::info!("pool {name}: closed");
    true
}

async fn run(shared: Arc<Shared>) -> bool {
    loop {
        let stop = shared.state().stop;
        if let Some(deadline) = stop {
            return shared.close(deadline).await;
        }
        match shared.look() {
            None => shared.wake.notified().await,
            Some(at) => {
                // Whether it was woken or is late, it looks.
                let _ = tokio::time::timeout_at(at.into(), shared.wake.notified()).await;
            }
        }
    }
}

/// Reserves all of them, or none.
pub(crate) fn reserve_all(
    devices: Vec<Arc<dyn Device>>,
    host: [u8; 16],
    assume_exclusive: bool,
) -> Result<Vec<Arc<dyn Device>>, String> {
    let mut reserved: Vec<Arc<dyn Device>> = Vec::new();
    for device in devices {
        match reserve::take(device.as_ref(), &host, assume_exclusive) {
            Ok(reserve::Reserved::Yes) => reserved.push(device),
            Ok(reserve::Reserved::Unsupported) => {}
            Err(what) => {
                reserved.iter().for_each(|device| reserve::leave(device.as_ref(), &host));
                return Err(what);
            }
        }
    }
    Ok(reserved)
}

/// What may take long, on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(error.to_string()))
}
