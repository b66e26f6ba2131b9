//! An NVMe namespace as a [`Device`]: what all threads share.
//!
//! Owns: state, geometry and trouble as others see them. Must not know: queues, bytes.

use super::config::NvmeConfig;
use super::controller;
use super::geometry::Known;
use super::lane::{Lane, LaneChannel, Lanes, Notice};
use super::signal::Mailbox;
use hawser_block::{Channel, Device, DeviceState, Geometry, StatsSet};
use hawser_runtime::{ReactorHandle, Runtime, SourceId};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Listener = Arc<dyn Fn() + Send + Sync>;

/// What is known of the device.
pub(crate) struct Status {
    pub(crate) state: DeviceState,
    pub(crate) known: Option<Known>,
    pub(crate) trouble: String,
}

/// What the device, its owner's task and its lanes share.
pub(crate) struct Shared {
    /// Names the device in [`Lanes`].
    pub(crate) key: u64,
    pub(crate) config: NvmeConfig,
    pub(crate) reactors: Vec<ReactorHandle>,
    pub(crate) notices: Arc<Mailbox<Notice>>,
    pub(crate) stats: Arc<StatsSet>,
    status: Mutex<Status>,
    listeners: Mutex<Vec<Listener>>,
}

impl Shared {
    pub(crate) fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what others see, and tells them if state or geometry changed.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Status)) {
        let changed = {
            let mut status = self.status();
            let before = (status.state, status.known);
            change(&mut status);
            before != (status.state, status.known)
        };
        if changed {
            let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner).clone();
            for listener in listeners {
                listener();
            }
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
        let status = Status {
            state: DeviceState::Connecting,
            known: None,
            trouble: format!("{}: connecting to {}", config.name, config.paths[0].address),
        };
        let shared = Arc::new(Shared {
            key: KEYS.fetch_add(1, Ordering::Relaxed),
            config,
            reactors: distinct,
            notices: Arc::default(),
            stats: Arc::default(),
            status: Mutex::new(status),
            listeners: Mutex::default(),
        });
        for reactor in &shared.reactors {
            let shared = Arc::clone(&shared);
            reactor.run(move |runtime| {
                let timers = shared.config.timers;
                let had_predecessor = shared.config.had_predecessor;
                let stats = shared.stats.writer(runtime);
                let lane = Lane::add(runtime, Arc::clone(&shared.notices), stats, timers, had_predecessor);
                runtime.local::<Lanes>().0.borrow_mut().insert(shared.key, lane);
            });
        }
        let task = Arc::clone(&shared);
        owner.run(move |runtime| runtime.spawn(controller::run(runtime.clone(), task)));
        Ok(Arc::new(NvmeDevice { shared }))
    }
}

impl Drop for NvmeDevice {
    fn drop(&mut self) {
        self.shared.notices.post(Notice::Closed);
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
        self.shared.status().state
    }

    fn trouble(&self) -> String {
        self.shared.status().trouble.clone()
    }

    fn uuid(&self) -> [u8; 16] {
        self.shared.status().known.map_or([0; 16], |known| known.uuid)
    }

    fn subscribe(&self, listener: Box<dyn Fn() + Send + Sync>) {
        self.shared.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::from(listener));
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
}
