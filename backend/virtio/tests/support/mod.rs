//! What the tests share: a short folder, a reactor, a disk over a fake device.

#![allow(dead_code, reason = "each test binary uses its own part")]

use hawser_block::fake::FakeDevice;
use hawser_block::{BlockSize, Device, Geometry};
use hawser_runtime::{ReactorConfig, ReactorHandle, ReactorThread};
use hawser_virtio::{DiskConfig, SocketAccess, VhostDisk};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A folder of its own, removed at the end.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("hv{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn reactor() -> ReactorThread {
    ReactorThread::spawn("test", ReactorConfig { cpu: None, poll_us: 0 }).unwrap()
}

pub fn config(socket: &Path) -> DiskConfig {
    DiskConfig {
        name: "test".into(),
        socket: socket.into(),
        access: SocketAccess::default(),
        serial: "serial-0123456789-xy".into(),
        queues: 4,
        read_only: false,
        drain_timeout: Duration::from_secs(20),
        index: 0,
        crash: None,
    }
}

/// A disk on a reactor of its own. Fields are dropped in order: the disk before its reactor, the folder last.
pub struct Served {
    pub disk: VhostDisk,
    pub reactor: ReactorThread,
    pub device: Arc<FakeDevice>,
    pub socket: PathBuf,
    pub folder: Folder,
}

impl Served {
    pub fn new(geometry: Geometry) -> Served {
        Served::with(geometry, |_| {})
    }

    pub fn with(geometry: Geometry, change: impl FnOnce(&mut DiskConfig)) -> Served {
        let folder = Folder::new();
        let socket = folder.path("s");
        let device = Arc::new(FakeDevice::new(geometry));
        let reactor = reactor();
        let mut config = config(&socket);
        change(&mut config);
        let disk = VhostDisk::start(
            config,
            Arc::clone(&device) as Arc<dyn Device>,
            vec![reactor.handle().clone()],
        )
        .unwrap();
        Served { disk, reactor, device, socket, folder }
    }

    pub fn reactor(&self) -> &ReactorHandle {
        self.reactor.handle()
    }
}

pub fn small() -> Geometry {
    Geometry::new(BlockSize::B512, 8192)
}

/// Waits for something that other threads do; fails loudly, long after it should have happened.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
