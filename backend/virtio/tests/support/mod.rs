//! What the tests share: a short folder, a reactor, a disk over a fake device.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

pub mod frontend;

use hawser_block::fake::FakeDevice;
use hawser_block::{BlockSize, Channel, Completion, Device, DeviceState, Geometry, Request, StatsSet};
use hawser_runtime::{ReactorConfig, ReactorHandle, ReactorThread, Runtime, SourceId};
use hawser_virtio::{DiskConfig, SocketAccess, VhostDisk};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A folder of its own, removed at the end.
pub struct Folder {
    folder: tempfile::TempDir,
    /// Locked as long as we live: that is how others' sweeps know.
    _alive: std::fs::File,
}

const PREFIX: &str = "hawser-v";
/// Between making a folder and locking it nobody waits for so long.
const SWEEP_AFTER: Duration = Duration::from_secs(600);

impl Folder {
    pub fn new() -> Folder {
        static SWEPT: std::sync::Once = std::sync::Once::new();
        SWEPT.call_once(sweep);
        // Not TMPDIR: it may be longer than a socket's path can be.
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in("/tmp").unwrap();
        let alive = std::fs::File::open(folder.path()).unwrap();
        alive.lock_shared().unwrap();
        Folder { folder, _alive: alive }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Removes what test processes that were killed have left: old folders that nobody has locked.
fn sweep() {
    for entry in std::fs::read_dir("/tmp").unwrap().flatten() {
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        let age = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
        let old = ours && age().is_some_and(|age| age > SWEEP_AFTER);
        if old && std::fs::File::open(entry.path()).is_ok_and(|folder| folder.try_lock().is_ok()) {
            // Another test may be quicker.
            let _ = std::fs::remove_dir_all(entry.path());
        }
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

/// A fake device that can be told to go on: its users are woken.
pub struct TestDevice {
    pub fake: FakeDevice,
    users: Mutex<Vec<(ReactorHandle, SourceId)>>,
    /// Its channels do not end what they are told to give up.
    pub deaf: AtomicBool,
    grown: Mutex<Option<Geometry>>,
    listeners: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
}

impl TestDevice {
    pub fn new(geometry: Geometry) -> TestDevice {
        TestDevice {
            fake: FakeDevice::new(geometry),
            users: Mutex::default(),
            deaf: AtomicBool::new(false),
            grown: Mutex::default(),
            listeners: Mutex::default(),
        }
    }

    /// Ends what was held.
    pub fn release(&self) {
        self.fake.state().hold = false;
        for (reactor, user) in self.users.lock().unwrap().iter() {
            let user = *user;
            reactor.run(move |runtime| runtime.wake(user));
        }
    }

    /// Says that it is larger now.
    pub fn grow(&self, blocks: u64) {
        let geometry = Geometry { blocks, ..self.geometry().unwrap() };
        *self.grown.lock().unwrap() = Some(geometry);
        self.listeners.lock().unwrap().iter().for_each(|listener| listener());
    }
}

struct Deaf(Box<dyn Channel>);

impl Channel for Deaf {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        self.0.submit(batch);
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        self.0.reap(ended);
    }
}

impl Deref for TestDevice {
    type Target = FakeDevice;
    fn deref(&self) -> &FakeDevice {
        &self.fake
    }
}

impl Device for TestDevice {
    fn name(&self) -> &str {
        self.fake.name()
    }

    fn geometry(&self) -> Option<Geometry> {
        self.grown.lock().unwrap().or_else(|| self.fake.geometry())
    }

    fn state(&self) -> DeviceState {
        DeviceState::Ready
    }

    fn uuid(&self) -> [u8; 16] {
        self.fake.uuid()
    }

    fn subscribe(&self, listener: Box<dyn Fn() + Send + Sync>) {
        self.listeners.lock().unwrap().push(listener);
    }

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn Channel> {
        self.users.lock().unwrap().push((runtime.handle(), user));
        let channel = self.fake.channel(runtime, user);
        if self.deaf.load(Ordering::Acquire) { Box::new(Deaf(channel)) } else { channel }
    }

    fn stats(&self) -> Arc<StatsSet> {
        self.fake.stats()
    }
}

/// A disk on a reactor of its own. Fields are dropped in order: the disk before its reactor, the folder last.
pub struct Served {
    pub disk: VhostDisk,
    pub reactor: ReactorThread,
    /// Those that queues are on besides the first.
    pub more_reactors: Vec<ReactorThread>,
    pub device: Arc<TestDevice>,
    pub socket: PathBuf,
    pub folder: Folder,
}

impl Served {
    pub fn new(geometry: Geometry) -> Served {
        Served::with(geometry, |_| {})
    }

    pub fn with(geometry: Geometry, change: impl FnOnce(&mut DiskConfig)) -> Served {
        Served::on(1, geometry, change)
    }

    /// On so many reactors.
    pub fn on(reactors: usize, geometry: Geometry, change: impl FnOnce(&mut DiskConfig)) -> Served {
        let folder = Folder::new();
        let socket = folder.path("s");
        let device = Arc::new(TestDevice::new(geometry));
        let reactor = reactor();
        let mut config = config(&socket);
        change(&mut config);
        let more_reactors: Vec<_> = std::iter::repeat_with(self::reactor).take(reactors - 1).collect();
        let all =
            std::iter::once(&reactor).chain(&more_reactors).map(|reactor| reactor.handle().clone()).collect();
        let disk = VhostDisk::start(config, Arc::clone(&device) as Arc<dyn Device>, all).unwrap();
        Served { disk, reactor, more_reactors, device, socket, folder }
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
