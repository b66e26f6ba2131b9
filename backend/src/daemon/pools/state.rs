//! What is known of devices and pools, and who waits for what. Nothing is done here.

use super::RETRY_MIN;
use super::past::Past;
use crate::assemble::late::LateDevice;
use crate::assemble::pool::{self as assemble, Found};
use hawser_block::{Device, DeviceState};
use hawser_config::value::{Name, VolumePath};
use hawser_config::{DeviceConfig, Placed};
use hawser_volume::pool::{Label, Pool};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

#[derive(Default)]
pub(super) struct State {
    pub(super) devices: Vec<Known>,
    /// Devices that could not be opened.
    pub(super) absent: Vec<Absent>,
    pub(super) pools: BTreeMap<[u8; 16], Entry>,
    pub(super) wanted: Vec<Wanted>,
    pub(super) deleting: BTreeSet<VolumePath>,
    /// So many pools were opened: the next one's owner is on the next reactor.
    pub(super) opened: usize,
    /// Openings and additions that have not ended.
    pub(super) tasks: usize,
    /// When it must be over, once it is to end.
    pub(super) stop: Option<Instant>,
}

/// A device that could not be opened, and the place for it.
pub(in crate::daemon) struct Absent {
    pub(super) config: Placed<DeviceConfig>,
    pub(super) place: Arc<LateDevice>,
    /// When that is tried again; `None` while it is.
    pub(super) again: Option<Instant>,
}

impl Absent {
    pub(in crate::daemon) fn new(config: Placed<DeviceConfig>, place: Arc<LateDevice>) -> Absent {
        Absent { config, place, again: Some(Instant::now() + RETRY_MIN) }
    }
}

/// A device of the configuration.
pub(super) struct Known {
    pub(super) name: Name,
    pub(super) device: Arc<dyn Device>,
    /// A disk or namespace has it for itself.
    pub(super) direct: bool,
    /// A change is under way that gives it to a pool.
    pub(super) taken: bool,
    pub(super) knowledge: Knowledge,
    /// Raised whenever it says that it has changed.
    pub(super) changes: Arc<AtomicU64>,
    pub(super) reservation: Reservation,
    /// When it is next given back to its pool, and how long it is waited for after that.
    pub(super) again: (Instant, Duration),
}

/// When it was last seen that a member is reserved for us.
#[derive(Default)]
pub(super) struct Reservation {
    /// As of which of its changes, and when; `None`: never, or it could not be told.
    pub(super) seen: Option<(u64, Instant)>,
    /// It is being looked at.
    pub(super) is_asked: bool,
}

pub(super) enum Knowledge {
    Unknown,
    Asking(Instant),
    Nothing,
    Member(Label),
    Failed { again: Instant, wait: Duration },
}

/// A pool that was found.
pub(super) struct Entry {
    pub(super) found: Found,
    pub(super) since: Instant,
    pub(super) phase: Phase,
    /// Why it is not open; empty when it is.
    pub(super) trouble: String,
    /// As it was seen last, for the log.
    pub(super) seen: String,
    /// How far it was when it was looked at last, and since when, until that is written down.
    pub(super) past: Option<(Past, Option<Instant>)>,
}

pub(super) enum Phase {
    Waiting { again: Instant, wait: Duration, tried: Vec<Name> },
    Opening,
    Open(Open),
}

/// What there is of an open pool.
pub(super) struct Open {
    pub(super) pool: Pool,
    pub(super) reserved: Vec<Arc<dyn Device>>,
    pub(super) tail: PathBuf,
}

/// Who waits for a volume.
pub(super) struct Wanted {
    pub(super) path: VolumePath,
    pub(super) writes: bool,
    pub(super) place: Weak<LateDevice>,
}

impl Entry {
    pub(super) fn pool(&self) -> Option<&Pool> {
        match &self.phase {
            Phase::Open(open) => Some(&open.pool),
            Phase::Waiting { .. } | Phase::Opening => None,
        }
    }

    /// Whether it is open and has a device, as it says itself.
    pub(super) fn has(&self, device: &Name) -> bool {
        self.pool().is_some_and(|pool| {
            pool.view().members.iter().any(|member| member.device.as_deref() == Some(device.as_str()))
        })
    }

    /// Whether it is open, and lacks the device of a member or spare.
    pub(super) fn lacks_device(&self) -> bool {
        self.pool().is_some_and(|pool| pool.view().members.iter().any(|member| member.device.is_none()))
    }

    pub(super) fn not_open(&self) -> String {
        let why = if self.trouble.is_empty() { "it is being opened" } else { &self.trouble };
        let why = assemble::without_name(&self.found.label.pool, why);
        format!("pool {} is not open yet: {why}", self.found.label.pool)
    }

    /// Says it in the log, once.
    pub(super) fn set_trouble(&mut self, trouble: String) {
        if self.trouble != trouble {
            if !trouble.is_empty() {
                let pool = &self.found.label.pool;
                log::warn!("pool {pool}: {}", assemble::without_name(pool, &trouble));
            }
            self.trouble = trouble;
        }
    }
}

impl State {
    pub(super) fn by_name(&self, name: &Name) -> Option<&Entry> {
        let found = self.pools.values().filter(|entry| entry.found.label.pool == name.as_str());
        found.max_by_key(|entry| matches!(entry.phase, Phase::Open(_)))
    }

    /// The pool that has a device, whatever is known of that; else the one that it says it belongs to, unless it was replaced there.
    pub(super) fn pool_of(&self, device: &Name) -> Option<&Entry> {
        let known = self.devices.iter().find(|known| known.name == *device)?;
        if known.direct {
            return None;
        }
        if let Some(entry) = self.pools.values().find(|entry| entry.has(device)) {
            return Some(entry);
        }
        // One that is open and has all of its own was replaced where it says that it is a member.
        let is_possible = |entry: &Entry| entry.pool().is_none() || entry.lacks_device();
        let found = |entry: &&Entry| {
            entry.found.devices.iter().any(|(name, ..)| name == device) && is_possible(entry)
        };
        match (&known.knowledge, self.pools.values().find(found)) {
            (Knowledge::Nothing, _) | (_, None) => None,
            (_, entry) => entry,
        }
    }

    pub(super) fn no_such_pool(&self, name: &str) -> String {
        let names: Vec<&str> = self.pools.values().map(|entry| entry.found.label.pool.as_str()).collect();
        if names.is_empty() {
            return format!("pool {name:?} is not there; there is none");
        }
        format!("pool {name:?} is not there; there are {}", names.join(", "))
    }

    /// Gives volumes that are there to who waits for them, and tells the others why not.
    pub(super) fn fill(&mut self) {
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
pub(super) fn lack_of(pool: &Pool, path: &VolumePath, writes: bool) -> Option<String> {
    let volumes = pool.volumes();
    match volumes.iter().find(|volume| volume.name == path.volume.as_str()) {
        None => Some(format!("pool {} has no volume {}", path.pool, path.volume)),
        Some(volume) if volume.is_snapshot && writes => {
            Some(format!("{path} is a snapshot, want read_only = true, or a clone of it"))
        }
        Some(_) => None,
    }
}

pub(super) fn is_reached(device: &dyn Device) -> bool {
    device.state() == DeviceState::Ready && device.geometry().is_some()
}
