//! The initiator on real sockets: against our own target, through a middle box that cuts connections, and against a
//! scripted target that does what ours does not.

mod bad_over_rdma;
mod client;
mod costs_over_rdma;
mod counted;
mod ghosts;
mod lab;
mod left_behind;
mod links;
mod lost_controllers;
mod middle_box;
mod over_rdma;
mod reservations;
mod scripted;
mod several_paths;
mod with_our_target;
mod with_scripted_target;

use super::{HostIdentity, NvmeConfig, NvmeDevice};
use crate::uri::NvmeUri;
use hawser_block::{Device, DeviceState};
use hawser_runtime::{ReactorConfig, ReactorThread};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

const NQN: &str = "nqn.2026-11.io.hawser:test";

/// Long enough for anything that happens at all.
const PATIENCE: Duration = Duration::from_secs(60);

fn reactor(name: &str) -> ReactorThread {
    ReactorThread::spawn(name, ReactorConfig::default()).unwrap()
}

fn host() -> HostIdentity {
    HostIdentity {
        nqn: "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555".into(),
        id: [7; 16],
    }
}

fn config(address: SocketAddr) -> NvmeConfig {
    let uri: NvmeUri = format!("nvme+tcp://{address}/{NQN}?nsid=1").parse().unwrap();
    let mut config = NvmeConfig::new("n0", vec![uri], host());
    config.timers.reconnect_delay = Duration::from_millis(200);
    config
}

/// Waits until `done`, by looking: what changes has no other way to tell a test.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "gave up waiting until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn wait_ready(device: &Arc<NvmeDevice>) {
    wait_until("the device is ready", || device.state() == DeviceState::Ready && device.geometry().is_some());
}

/// A folder of a test's own for what is kept of associations; it goes with this.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let folder = std::env::temp_dir().join(format!("hawser-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    fn file(&self) -> std::path::PathBuf {
        self.0.join("n0")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A device that is on its way out may be writing there.
        let begun = Instant::now();
        while std::fs::remove_dir_all(&self.0).is_err() && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
