//! An NVMe namespace as a [`Device`]: what all threads share.
//!
//! Owns: state, geometry and trouble as others see them. Must not know: queues, bytes.

use super::cache::{Caches, Inheritance};
use super::config::{CacheDoubt, IoPolicy, NvmeConfig};
use super::controller;
use super::geometry::Known;
use super::lane::{Lane, LaneChannel, Lanes, Notice};
use super::meter::{History, LaneNumbers, Loss, Moved, PathState};
use super::quiet::{self, Kept, Record, Unquiet};
use super::reserve;
use super::signal::Mailbox;
use super::unknown::Unknown;
use crate::nvme::ana::AnaState;
use crate::simulated::is_broken;
use crate::uri::{NvmeUri, Transport};
use hawser_block::reservation::{ReservationCommand, ReservationStatus, ReserveError};
use hawser_block::{Channel, Device, DeviceState, Geometry, PathView, StatsSet};
use hawser_runtime::{Instant, ReactorHandle, Runtime, SourceId};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

type Listener = Arc<dyn Fn() + Send + Sync>;

/// What is known of the device.
pub(crate) struct Status {
    pub(crate) known: Option<Known>,
    /// As it was set last.
    pub(crate) policy: IoPolicy,
    pub(crate) paths: Vec<PathStatus>,
}

/// What is known of one path.
#[derive(Clone)]
pub(crate) struct PathStatus {
    pub(crate) ready: bool,
    /// It is not waited for: it leads elsewhere, or has been gone for too long.
    pub(crate) hopeless: bool,
    /// `None`: the controller does not report it.
    pub(crate) ana: Option<AnaState>,
    /// The namespace's size on it, from when that was accepted to the association's end.
    pub(crate) blocks: Option<u64>,
    /// Its namespace shall be identified again.
    pub(crate) look_again: bool,
    pub(crate) trouble: String,
    pub(crate) history: History,
}

impl PathStatus {
    fn state(&self) -> PathState {
        match self {
            PathStatus { ready: true, .. } => PathState::Live,
            PathStatus { hopeless: true, .. } => PathState::Failed,
            _ => PathState::Connecting,
        }
    }
}

impl Status {
    fn state(&self) -> DeviceState {
        if self.paths.iter().any(|path| path.ready && !path.hopeless) {
            DeviceState::Ready
        } else if self.paths.iter().all(|path| path.hopeless) {
            DeviceState::Failed
        } else if self.known.is_some() {
            DeviceState::Reconnecting
        } else {
            DeviceState::Connecting
        }
    }

    /// Whether requests can be carried out on another path than this.
    pub(crate) fn serves_without(&self, path: usize) -> bool {
        let usable =
            |other: &PathStatus| other.ready && other.ana.is_none_or(|state| state.refusal().is_none());
        self.paths.iter().enumerate().any(|(index, other)| index != path && usable(other))
    }
}

/// What the device, its owner's task and its lanes share.
pub(crate) struct Shared {
    /// Names the device in [`Lanes`].
    pub(crate) key: u64,
    pub(crate) config: NvmeConfig,
    /// How long a path is waited for where the configuration does not say, in nanoseconds; 0: without end.
    patience_ns: AtomicU64,
    pub(crate) reactors: Vec<ReactorHandle>,
    /// By path.
    pub(crate) notices: Vec<Arc<Mailbox<Notice>>>,
    /// By path: there may be something to look at.
    pub(crate) chores: Vec<Arc<Mailbox<()>>>,
    /// By path: an association was lost.
    pub(crate) losses: Vec<Arc<Mailbox<()>>>,
    /// Tasks of paths that have not ended.
    pub(crate) tasks: AtomicUsize,
    numbers: AtomicU64,
    live: Mutex<BTreeMap<u64, Record>>,
    unquiet: Mutex<Vec<Unquiet>>,
    /// Held while they are kept for a process after us.
    keeping: Mutex<()>,
    pub(crate) stats: Arc<StatsSet>,
    /// By path.
    meters: Vec<Meters>,
    pub(crate) caches: Arc<Caches>,
    unknown: Arc<Unknown>,
    status: Mutex<Status>,
    listeners: Mutex<Vec<Listener>>,
}

impl Shared {
    /// How long a path is waited for at most.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let asked = self.patience_ns.load(Ordering::Relaxed);
        let asked = (asked > 0).then_some(Duration::from_nanos(asked));
        self.config.timers.patience().or(asked)
    }

    pub(crate) fn status(&self) -> MutexGuard<'_, Status> {
        lock(&self.status)
    }

    /// Changes what others see, and tells them if state or geometry changed.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Status)) {
        let changed = {
            let mut status = self.status();
            let before = (status.state(), status.known);
            change(&mut status);
            let now = std::time::Instant::now();
            for path in &mut status.paths {
                path.history.enter(path.state(), now);
            }
            before != (status.state(), status.known)
        };
        if changed {
            self.tell();
        }
    }

    /// Lets listeners look.
    pub(crate) fn tell(&self) {
        let listeners = lock(&self.listeners).clone();
        for listener in listeners {
            listener();
        }
    }

    /// Whether all paths are hopeless.
    pub(crate) fn is_hopeless(&self) -> bool {
        self.status().state() == DeviceState::Failed
    }

    /// Takes what a path has found for what the device is, if it is the same device. It is as large as the smallest of its
    /// paths: of growth the paths of a device learn one after the other, and it has grown when all of them say so. A path
    /// that is new (not `serving`) and larger than the others is refused; they are asked whether they have grown too.
    ///
    /// # Errors
    /// When it is another: one line.
    pub(crate) fn adopt(&self, path: usize, found: &Known, serving: bool) -> Result<Known, String> {
        let several = self.config.paths.len() > 1;
        if several && found.uuid == [0; 16] {
            return Err(
                "the namespace has no UUID, NGUID or EUI64: paths to it cannot be told from others".into()
            );
        }
        let mut result = Ok(*found);
        self.change(|status| {
            let others = status.paths.iter().enumerate().filter(|(index, _)| *index != path);
            let others = others.filter_map(|(_, other)| other.blocks).min();
            let blocks = found.geometry.blocks;
            result = match &status.known {
                None => Ok(*found),
                Some(known) => known.accept_among(found, others.filter(|_| !serving)).map(|()| {
                    let mut known = known.merge(found, several);
                    known.geometry.blocks = others.unwrap_or(blocks).min(blocks);
                    known
                }),
            };
            if let Ok(known) = &result {
                status.known = Some(*known);
                status.paths[path].blocks = Some(blocks);
            }
        });
        self.look_again(|other, _| other < found.geometry.blocks);
        if let Ok(known) = result {
            self.on_lanes(move |lane| lane.set_geometry(known.geometry));
        }
        result
    }

    /// Has the paths identify their namespace again for which that may be of use: by the size there, and the device's.
    pub(crate) fn look_again(&self, is_of_use: impl Fn(u64, u64) -> bool) {
        let mut status = self.status();
        let Some(known) = status.known else { return };
        for (path, chores) in status.paths.iter_mut().zip(&self.chores) {
            if path.blocks.is_some_and(|blocks| is_of_use(blocks, known.geometry.blocks)) {
                path.look_again = true;
                chores.post_once(());
            }
        }
    }

    /// A number for a new association.
    pub(crate) fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes down that there is an association.
    pub(crate) fn born(&self, number: u64, record: Record) {
        lock(&self.live).insert(number, record);
    }

    /// An association has ended: `unquiet`, or quiet already.
    pub(crate) fn died(&self, number: u64, unquiet: Option<Unquiet>) {
        lock(&self.live).remove(&number);
        match unquiet {
            None => self.quiet(number),
            Some(unquiet) => {
                lock(&self.unquiet).push(unquiet);
                for losses in &self.losses {
                    losses.post_once(());
                }
            }
        }
    }

    /// The target has ended this association after all.
    pub(crate) fn target_knows(&self, number: u64) {
        for unquiet in lock(&self.unquiet).iter_mut().filter(|unquiet| unquiet.association == number) {
            unquiet.target_knows = true;
        }
    }

    /// Keeps what names our associations for a process after us, off the reactor's thread. Where that cannot be done, nothing
    /// is kept: a process after us would take what is out of date for all there is.
    ///
    /// # Errors
    /// When what was kept before cannot be taken away either.
    pub(crate) async fn remember(self: &Arc<Self>) -> Result<(), String> {
        let Some(file) = self.config.record.clone() else { return Ok(()) };
        let fails = |error: std::io::Error| format!("{}: cannot be written: {error}", file.display());
        let is_kept = self.keep(file.clone()).await;
        let Err(error) = is_kept else { return Ok(()) };
        log::warn!(
            "{}: {}: a daemon that is started after a crash of this one waits longer before it writes",
            self.config.name,
            fails(error)
        );
        let forget = || {
            let _one = lock(&self.keeping);
            quiet::forget(&file)
        };
        forget().map_err(fails)
    }

    async fn keep(self: &Arc<Self>, file: std::path::PathBuf) -> std::io::Result<()> {
        let (done, shared) = (Arc::new(Mailbox::default()), Arc::clone(self));
        let post = Arc::clone(&done);
        let keep = move || {
            // One after the other, so that the newest is what stays.
            let one = lock(&shared.keeping);
            let mut records: Vec<_> = lock(&shared.live).values().cloned().collect();
            records.extend(lock(&shared.unquiet).iter().map(|unquiet| unquiet.record.clone()));
            if is_broken("keep_old_associations") && file.exists() {
                records.clear();
            }
            let kept = quiet::keep(&file, &Kept { records, caches: shared.caches.bequeath() });
            drop(one);
            post.post(kept);
        };
        Runtime::current().on_thread("keep", keep)?;
        done.next().await
    }

    /// The associations that are not known to be quiet at `now`.
    pub(crate) fn unquiet(&self, now: Instant) -> Vec<Unquiet> {
        let mut all = lock(&self.unquiet);
        all.retain(|unquiet| unquiet.until > now);
        all.clone()
    }

    /// The commands of this association have ended.
    pub(crate) fn quiet(&self, number: u64) {
        lock(&self.unquiet).retain(|unquiet| unquiet.association != number);
        self.on_lanes(move |lane| lane.quiet(number));
    }

    /// A controller has said how long the commands of a process before us may live, of which nothing else is known.
    pub(crate) fn predecessors_live(&self, lives: Duration) {
        for unquiet in lock(&self.unquiet).iter_mut() {
            if unquiet.association < PREDECESSORS && unquiet.record.is_anybodys() {
                // Whichever of them it was at; the first to speak ends the wait for any.
                let spoken = unquiet.until != Instant::NEVER;
                let lives = if spoken { lives.max(unquiet.record.lives) } else { lives };
                unquiet.until = unquiet.since + lives;
                unquiet.record.lives = lives;
                let (number, until) = (unquiet.association, unquiet.until);
                self.on_lanes(move |lane| lane.quiet_from(number, until));
            }
        }
    }

    /// Runs `job` on the lanes of all reactors, soon.
    pub(crate) fn on_lanes(&self, job: impl Fn(&mut Lane) + Clone + Send + 'static) {
        for index in 0..self.reactors.len() {
            self.on_lane(index, job.clone());
        }
    }

    /// Runs `job` on the lane of one reactor, soon.
    pub(crate) fn on_lane(&self, index: usize, job: impl FnOnce(&mut Lane) + Send + 'static) {
        let key = self.key;
        self.reactors[index].run(move |runtime| {
            if let Some(lane) = lane_of(runtime, key) {
                job(&mut lane.borrow_mut());
            }
        });
    }
}

/// A path's numbers on all reactors.
#[derive(Default)]
struct Meters {
    io: Arc<StatsSet>,
    lanes: Mutex<Vec<Arc<LaneNumbers>>>,
}

impl Meters {
    /// What a new lane on this reactor writes to.
    fn lane(&self, runtime: &Runtime) -> Arc<LaneNumbers> {
        let numbers = Arc::new(LaneNumbers::new(self.io.writer(runtime)));
        lock(&self.lanes).push(Arc::clone(&numbers));
        numbers
    }

    fn sum(&self, number: impl Fn(&LaneNumbers) -> u64) -> u64 {
        lock(&self.lanes).iter().map(|lane| number(lane)).sum()
    }
}

/// The device's lane on this reactor.
pub(crate) fn lane_of(runtime: &Runtime, key: u64) -> Option<Rc<std::cell::RefCell<Lane>>> {
    runtime.local::<Lanes>().0.borrow().get(&key).map(Rc::clone)
}

/// A namespace behind one path or several. Dropping it ends its association in order.
pub struct NvmeDevice {
    shared: Arc<Shared>,
}

impl NvmeDevice {
    /// Starts to reach for a namespace, and returns at once: its geometry is `None` until it was reached. The first of
    /// `reactors` owns the controller; each of them gets an I/O queue. Channels are opened on these reactors only.
    ///
    /// # Errors
    /// One line, when the configuration names no path or no reactor.
    pub fn open(config: NvmeConfig, reactors: &[ReactorHandle]) -> Result<Arc<NvmeDevice>, String> {
        static KEYS: AtomicU64 = AtomicU64::new(0);
        if config.paths.is_empty() {
            return Err("the device names no path, want nvme+tcp://HOST:PORT/SUBNQN?nsid=1".to_owned());
        }
        let Some(owner) = reactors.first() else { return Err("no reactor to run on".to_owned()) };
        // A reactor that is named twice has one lane.
        let mut distinct: Vec<ReactorHandle> = Vec::new();
        for reactor in reactors {
            if !distinct.iter().any(|other| other.same(reactor)) {
                distinct.push(reactor.clone());
            }
        }
        let path = |uri: &NvmeUri| PathStatus {
            ready: false,
            hopeless: false,
            ana: None,
            blocks: None,
            look_again: false,
            trouble: format!("{}: connecting to {}", config.name, uri.address),
            history: History::default(),
        };
        let status =
            Status { known: None, policy: config.policy, paths: config.paths.iter().map(path).collect() };
        let (predecessors, inherited) = predecessors(&config);
        let paths = config.paths.len();
        let caches = Arc::new(Caches::new((paths, distinct.len()), config.on_cache_doubt, inherited));
        let shared = Arc::new(Shared {
            patience_ns: AtomicU64::new(0),
            key: KEYS.fetch_add(1, Ordering::Relaxed),
            config,
            reactors: distinct,
            notices: (0..paths).map(|_| Arc::default()).collect(),
            chores: (0..paths).map(|_| Arc::default()).collect(),
            losses: (0..paths).map(|_| Arc::default()).collect(),
            tasks: AtomicUsize::new(paths),
            numbers: AtomicU64::new(PREDECESSORS),
            live: Mutex::default(),
            unquiet: Mutex::default(),
            keeping: Mutex::default(),
            stats: Arc::default(),
            meters: (0..paths).map(|_| Meters::default()).collect(),
            caches,
            unknown: Arc::default(),
            status: Mutex::new(status),
            listeners: Mutex::default(),
        });
        for (index, reactor) in shared.reactors.iter().enumerate() {
            let shared = Arc::clone(&shared);
            let predecessors = predecessors.clone();
            reactor.run(move |runtime| {
                let own = (Arc::clone(&shared.caches), Arc::clone(&shared.unknown), index);
                let config = &shared.config;
                let stats = shared.stats.writer(runtime);
                let now = runtime.now();
                let until = |(number, record): &(u64, Record)| (*number, predecessor_until(record, now));
                let until: Vec<_> = predecessors.iter().map(until).collect();
                let numbers = shared.meters.iter().map(|meters| meters.lane(runtime));
                let ways = shared.notices.iter().cloned().zip(numbers).collect();
                let lane = Lane::add(runtime, ways, stats, own, config, &until);
                runtime.local::<Lanes>().0.borrow_mut().insert(shared.key, lane);
            });
        }
        let task = Arc::clone(&shared);
        owner.run(move |runtime| {
            let now = runtime.now();
            lock(&task.unquiet).extend(predecessors.into_iter().map(|(association, record)| {
                let until = predecessor_until(&record, now);
                // Its death has closed its sockets; whether the target has heard of that is not known.
                Unquiet { association, since: now, until, record, target_knows: false }
            }));
            for path in 0..paths {
                runtime.spawn(controller::run(runtime.clone(), Arc::clone(&task), path));
            }
        });
        Ok(Arc::new(NvmeDevice { shared }))
    }
}

/// Numbers below this are associations of a process before us.
const PREDECESSORS: u64 = 1 << 32;

/// The associations that a process before us may have left behind, and what it may have left in caches.
fn predecessors(config: &NvmeConfig) -> (Vec<(u64, Record)>, Inheritance) {
    if is_broken("forget_predecessors") {
        return (Vec::new(), Inheritance::default());
    }
    // Also after an orderly end: that process may have known of writes of the one before it, and of caches that hold writes.
    let kept = config.record.as_deref().and_then(quiet::kept);
    if kept.is_none() && !config.had_predecessor {
        return (Vec::new(), Inheritance::default());
    }
    let Kept { records, caches } = kept.unwrap_or_else(|| {
        let lives = quiet::lives(&config.timers, 0);
        let record = Record { address: None, subsystem_nqn: String::new(), instance: None, lives };
        Kept { records: vec![record], caches: Inheritance::default() }
    });
    // Whose caches those writes are in, nothing tells.
    let in_doubt =
        config.had_predecessor && config.on_cache_doubt == CacheDoubt::FailFlush && caches.caches.is_empty();
    let caches = Inheritance { lost: caches.lost || in_doubt, ..caches };
    ((0..).zip(records).collect(), caches)
}

/// Until when the commands of a predecessor's association may live. Of one of which we know nothing, a controller says.
fn predecessor_until(record: &Record, now: Instant) -> Instant {
    if record.is_anybodys() { Instant::NEVER } else { now + record.lives }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NvmeDevice {
    fn moved(&self, number: impl Fn(&Moved) -> u64) -> u64 {
        self.shared.meters.iter().map(|path| path.sum(|lane| number(&lane.moved()))).sum()
    }
}

impl Drop for NvmeDevice {
    fn drop(&mut self) {
        for notices in &self.shared.notices {
            notices.post(Notice::Closed);
        }
    }
}

impl Device for NvmeDevice {
    fn name(&self) -> &str {
        &self.shared.config.name
    }

    fn geometry(&self) -> Option<Geometry> {
        self.shared.status().known.map(|known| known.geometry)
    }

    fn state(&self) -> DeviceState {
        self.shared.status().state()
    }

    fn trouble(&self) -> String {
        let status = self.shared.status();
        let troubles = status.paths.iter().map(|path| path.trouble.as_str());
        troubles.filter(|trouble| !trouble.is_empty()).collect::<Vec<_>>().join("; ")
    }

    fn uuid(&self) -> [u8; 16] {
        self.shared.status().known.map_or([0; 16], |known| known.uuid)
    }

    fn cache_losses(&self) -> u64 {
        self.shared.caches.counts().0
    }

    /// A write of unknown outcome is kept until its association is quiet: how long that takes the target has told, or our
    /// configuration says.
    fn quiesce_time(&self) -> Duration {
        let told = {
            let (live, unquiet) = (lock(&self.shared.live), lock(&self.shared.unquiet));
            let records = live.values().chain(unquiet.iter().map(|unquiet| &unquiet.record));
            records.map(|record| record.lives).max()
        };
        // The next association may be with a target that says nothing.
        told.unwrap_or_default().max(quiet::lives(&self.shared.config.timers, 0))
    }

    fn owes_a_loss(&self) -> bool {
        self.shared.caches.owes_a_loss()
    }

    fn has_unknown_writes(&self) -> bool {
        self.shared.unknown.is_any_kept()
    }

    fn has_left_behind(&self) -> bool {
        self.shared.unknown.is_any_left()
    }

    fn reserve(&self, command: ReservationCommand) -> Result<(), ReserveError> {
        reserve::reserve(&self.shared, command)
    }

    fn reservations(&self) -> Result<ReservationStatus, ReserveError> {
        reserve::report(&self.shared)
    }

    fn subscribe(&self, listener: Box<dyn Fn() + Send + Sync>) {
        lock(&self.shared.listeners).push(Arc::from(listener));
    }

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn Channel> {
        let lane = lane_of(runtime, self.shared.key)
            .expect("channels are opened on the reactors that the device was opened with");
        let channel = lane.borrow_mut().open(user, self.geometry());
        Box::new(LaneChannel { lane, channel })
    }

    fn stats(&self) -> Arc<StatsSet> {
        Arc::clone(&self.shared.stats)
    }

    fn paths(&self) -> Vec<PathView> {
        let status = self.shared.status();
        let both = self.shared.config.paths.iter().zip(&status.paths);
        let now = std::time::Instant::now();
        both.zip(&self.shared.meters)
            .map(|((uri, path), meters)| PathView {
                uri: uri.to_string(),
                state: path.state().name(),
                ana: path.ana.map(AnaState::name),
                trouble: path.trouble.clone(),
                stats: Arc::clone(&meters.io),
                counters: vec![
                    ("connect_attempts", path.history.attempts),
                    ("connects", path.history.connects),
                    ("keep_alive_misses", path.history.keep_alive_misses),
                    ("failovers", path.history.failovers),
                    ("retries", meters.sum(|lane| lane.retries.get())),
                    ("requeued", meters.sum(|lane| lane.requeued.get())),
                ],
                losses: path.history.losses().collect(),
                times: path.history.times(now).collect(),
            })
            .collect()
    }

    fn settings(&self) -> Vec<(&'static str, &'static str)> {
        let policy = self.shared.status().policy.name();
        let config = &self.shared.config;
        let mut settings = vec![("io_policy", policy), ("on_cache_doubt", config.on_cache_doubt.name())];
        if config.paths.iter().any(|uri| uri.transport == Transport::Rdma) {
            settings.push(("rdma_keys", config.rdma_keys.name()));
        }
        settings
    }

    fn fail_after(&self, patience: Duration) {
        let ns = match patience {
            Duration::MAX => 0,
            patience => u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX).max(1),
        };
        self.shared.patience_ns.store(ns, Ordering::Relaxed);
    }

    fn set_io_policy(&self, policy: &str) -> Result<(), String> {
        let policy: IoPolicy = policy.parse()?;
        let mut status = self.shared.status();
        status.policy = policy;
        // Under the lock, so that the lanes hear of two changes in one order.
        self.shared.on_lanes(move |lane| lane.set_policy(policy));
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let (losses, doubts) = self.shared.caches.counts();
        let ended_by = |loss| self.shared.status().paths.iter().map(|path| path.history.lost_by(loss)).sum();
        vec![
            ("received_in_place_bytes", self.moved(|moved| moved.in_place)),
            ("protocol_errors", ended_by(Loss::Protocol)),
            ("digest_errors", ended_by(Loss::Corrupted)),
            ("cache_losses", losses),
            ("cache_doubts", doubts),
        ]
    }

    fn copied_bytes(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("small_read", self.moved(|moved| moved.small_read)),
            ("large_read_start", self.moved(|moved| moved.large_read)),
            ("digest_read", self.moved(|moved| moved.digest_read)),
            ("digest_write", self.moved(|moved| moved.digest_write)),
            ("rdma_unregistered", self.moved(|moved| moved.unregistered)),
            ("rdma_scattered", self.moved(|moved| moved.scattered)),
        ]
    }
}
