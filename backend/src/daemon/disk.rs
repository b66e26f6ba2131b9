//! One disk: its description, and whether it is served now.

use super::api::view::{DiskState, DiskView};
use super::view::{device_trouble, front_ends_view, io_view, rings_view};
use hawser_block::{Device, StatsSet};
use hawser_config::DiskConfig;
use hawser_virtio::{LeftBehind, VhostDisk};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(super) struct Disk {
    pub(super) config: DiskConfig,
    device: Arc<dyn Device>,
    now: Mutex<Now>,
}

/// What changes.
struct Now {
    service: Service,
    saved_in: Option<PathBuf>,
}

/// Whether there is a socket, or will be.
pub(super) enum Service {
    /// The socket listens, or will once the device is reached.
    Serving(VhostDisk),
    /// Set aside, and why.
    Suspended(String),
    /// Over.
    Stopped,
}

impl Disk {
    pub(super) fn new(
        config: DiskConfig,
        device: Arc<dyn Device>,
        service: Service,
        saved_in: Option<PathBuf>,
    ) -> Disk {
        Disk { config, device, now: Mutex::new(Now { service, saved_in }) }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Ends the session, after requests in flight have ended or `drain` has passed, and removes the socket.
    /// Returns what was left at the device, if anything was.
    pub(super) fn stop(&self, drain: Duration) -> Option<LeftBehind> {
        let service = std::mem::replace(&mut self.now().service, Service::Stopped);
        let Service::Serving(server) = service else { return None };
        Some(server.stop(drain)).filter(|left| !left.has_ended())
    }

    pub(super) fn is_suspended(&self) -> bool {
        matches!(self.now().service, Service::Suspended(_))
    }

    /// Ends the suspension.
    pub(super) fn resume(&self, server: VhostDisk) {
        self.now().service = Service::Serving(server);
    }

    pub(super) fn saved_in(&self) -> Option<PathBuf> {
        self.now().saved_in.clone()
    }

    pub(super) fn set_saved_in(&self, file: Option<PathBuf>) {
        self.now().saved_in = file;
    }

    pub(super) fn stats(&self) -> Arc<StatsSet> {
        match &self.now().service {
            Service::Serving(server) => server.stats(),
            Service::Suspended(_) | Service::Stopped => Arc::default(),
        }
    }

    pub(super) fn view(&self) -> DiskView {
        let config = &self.config;
        let geometry = self.device.geometry();
        let some = |trouble: String| Some(trouble).filter(|trouble| !trouble.is_empty());
        let now = self.now();
        let (state, trouble) = match &now.service {
            Service::Suspended(why) => (DiskState::Suspended, Some(why.clone())),
            Service::Stopped => (DiskState::Waiting, None),
            Service::Serving(server) => {
                let state = match server.state() {
                    hawser_virtio::DiskState::Connected => DiskState::Connected,
                    hawser_virtio::DiskState::Listening => DiskState::Listening,
                    hawser_virtio::DiskState::Waiting | hawser_virtio::DiskState::Stopped => {
                        DiskState::Waiting
                    }
                };
                (state, some(server.trouble()).or_else(|| device_trouble(self.device.as_ref())))
            }
        };
        let (rings, front_ends) = match &now.service {
            Service::Serving(server) => (Some(rings_view(server)), front_ends_view(server)),
            Service::Suspended(_) | Service::Stopped => (None, Vec::new()),
        };
        let saved_in = now.saved_in.as_ref().map(|file| file.display().to_string());
        drop(now);
        DiskView {
            name: config.name.to_string(),
            device: config.device.as_ref().map(ToString::to_string),
            volume: config.volume.as_ref().map(ToString::to_string),
            socket: config.socket.to_string(),
            state,
            trouble,
            queues: config.queues,
            serial: config.serial().to_string(),
            size_bytes: geometry.map(|geometry| geometry.size_bytes()),
            block_size: geometry.map(|geometry| geometry.block_size.bytes()),
            read_only: config.read_only || geometry.is_some_and(|geometry| geometry.read_only),
            saved_in,
            front_ends,
            rings,
            io: io_view(&self.stats()),
        }
    }
}
