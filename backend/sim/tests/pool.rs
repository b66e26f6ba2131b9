//! Pools over simulated disks, one step at a time: what is written is read, through restarts, snapshots and lost members.

#[path = "pool_cases/caches.rs"]
mod caches;
#[path = "pool_cases/check.rs"]
mod check;
#[path = "pool_cases/classes.rs"]
mod classes;
#[path = "pool_cases/ends.rs"]
mod ends;
#[path = "pool_cases/faults.rs"]
mod faults;
#[path = "pool_cases/fewest.rs"]
mod fewest;
#[path = "pool_cases/joined.rs"]
mod joined;
#[path = "pool_cases/manners.rs"]
mod manners;
#[path = "pool_cases/members.rs"]
mod members;
#[path = "pool_cases/missing.rs"]
mod missing;
#[path = "pool_cases/orders.rs"]
mod orders;
#[path = "pool_cases/owners.rs"]
mod owners;
#[path = "pool_cases/parts.rs"]
mod parts;
#[path = "pool_cases/promises.rs"]
mod promises;
#[path = "pool_cases/replace.rs"]
mod replace;
#[path = "pool_cases/scrub.rs"]
mod scrub;
#[path = "pool_cases/shapes.rs"]
mod shapes;
#[path = "pool_cases/space.rs"]
mod space;
#[path = "pool_cases/tables.rs"]
mod tables;

use hawser_block::held::HeldDevice;
use hawser_block::{BlockSize, Device, Geometry, Operation, Outcome, Status};
use hawser_runtime::Reactor;
use hawser_sim::{Client, SimDisk, World, WorldConfig};
use hawser_volume::format::{Record, Superblock, decode_tail, encode_tail_entry};
use hawser_volume::pool::{
    self, Ask, CreateOptions, MemberState, MemoryTail, OpenOptions, Pool, PoolError, Tail,
};
use hawser_volume::raid::Level;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

const HOST: [u8; 16] = [7; 16];

struct Scene {
    world: World,
    reactors: Vec<Reactor>,
    disks: Vec<Arc<SimDisk>>,
    tail: MemoryTail,
}

/// As a process that dies: what is under way has no end.
impl Drop for Scene {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.reactors.drain(..).for_each(|reactor| self.world.kill(reactor));
        }
    }
}

impl Scene {
    fn new(seed: u64, members: u8) -> Scene {
        let world = World::new(WorldConfig::new(seed));
        let reactors = vec![world.reactor()];
        let disk = |number: u8| {
            let geometry = Geometry { volatile_cache: true, ..Geometry::new(BlockSize::B512, 16 << 11) };
            Arc::new(SimDisk::new(&format!("d{number}"), geometry, [number + 1; 16]))
        };
        Scene { world, reactors, disks: (0..members).map(disk).collect(), tail: MemoryTail::default() }
    }

    fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.disks.iter().map(|disk| Arc::clone(disk) as Arc<dyn Device>).collect()
    }

    fn run<T: 'static>(&mut self, work: impl Future<Output = T> + 'static) -> T {
        let result = Rc::new(RefCell::new(None));
        let place = Rc::clone(&result);
        self.reactors[0].runtime().spawn(async move { *place.borrow_mut() = Some(work.await) });
        let done = || result.borrow().is_some();
        self.world.run(&mut self.reactors, Duration::from_secs(600), done).expect("it ends");
        result.take().expect("it is done")
    }

    fn ask<T: Send + 'static>(&mut self, ask: Ask<T>) -> Result<T, PoolError> {
        self.run(ask)
    }

    fn create(&mut self, level: Level) {
        let options = CreateOptions {
            strip_bytes: 16 << 10,
            extent_bytes: 64 << 10,
            region_bytes: 256 << 10,
            log_bytes: 64 << 10,
            metadata_bytes: Some(1 << 20),
            ..CreateOptions::new("p0", [9; 16], level)
        };
        let handle = self.reactors[0].runtime().handle();
        let created = pool::create(&handle, self.devices(), options);
        self.ask(created).unwrap();
    }

    fn try_open(&mut self, devices: Vec<Arc<dyn Device>>, degraded: bool) -> Result<Pool, PoolError> {
        let options = OpenOptions { degraded, ..OpenOptions::new(HOST, Box::new(self.tail.clone())) };
        let handle = self.reactors[0].runtime().handle();
        let opened = Pool::open(&handle, devices, options);
        self.ask(opened)
    }

    fn open(&mut self) -> Pool {
        let devices = self.devices();
        self.try_open(devices, false).unwrap()
    }

    fn io(
        &mut self,
        pool: &Pool,
        volume: &str,
        operation: Operation,
        offset: u64,
        bytes: &[u8],
    ) -> (Outcome, Vec<u8>) {
        let device = pool.device(volume).unwrap();
        let client = Client::new(self.reactors[0].runtime(), &device);
        let bytes = bytes.to_vec();
        self.run(async move { client.io(operation, offset, bytes).await })
    }

    fn write(&mut self, pool: &Pool, volume: &str, offset: u64, bytes: &[u8]) {
        let write = Operation::Write { fua: false };
        assert_eq!(self.io(pool, volume, write, offset, bytes).0, Ok(()));
    }

    fn read(&mut self, pool: &Pool, volume: &str, offset: u64, len: usize) -> Vec<u8> {
        let (outcome, bytes) = self.io(pool, volume, Operation::Read, offset, &vec![0xEE; len]);
        assert_eq!(outcome, Ok(()));
        bytes
    }

    fn flush(&mut self, pool: &Pool, volume: &str) {
        assert_eq!(self.io(pool, volume, Operation::Flush, 0, &[]).0, Ok(()));
    }

    fn kill(&mut self) {
        let reactor = self.reactors.remove(0);
        self.world.kill(reactor);
        self.reactors.push(self.world.reactor());
    }

    fn wait(&mut self, duration: Duration) {
        let runtime = self.reactors[0].runtime().clone();
        self.run(async move {
            runtime.sleep(duration).await;
        });
    }

    fn check(&mut self) {
        let handle = self.reactors[0].runtime().handle();
        let checked = pool::check(&handle, self.devices());
        let report = self.ask(checked).unwrap();
        assert_eq!(report.faults, Vec::<String>::new());
    }
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| seed ^ u8::try_from(at % 251).unwrap()).collect()
}

const LEVELS: [(Level, u8); 8] = [
    (Level::Linear, 1),
    (Level::Linear, 2),
    (Level::Raid0, 3),
    (Level::Raid1, 2),
    (Level::Raid10, 4),
    (Level::Raid10, 3),
    (Level::Raid5, 3),
    (Level::Raid6, 5),
];

#[test]
fn what_is_written_is_read_before_and_after_a_close() {
    for (level, members) in LEVELS {
        let mut scene = Scene::new(1, members);
        scene.create(level);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 10 << 20)).unwrap();
        assert_eq!(scene.read(&pool, "v", 4096, 8192), vec![0; 8192]);
        // Whole units, parts of units, several extents.
        scene.write(&pool, "v", 0, &pattern(1, 4096));
        scene.write(&pool, "v", 10_240, &pattern(2, 512));
        scene.write(&pool, "v", 60 << 10, &pattern(3, 200 << 10));
        let mut want = vec![0; 300 << 10];
        want[..4096].copy_from_slice(&pattern(1, 4096));
        want[10_240..10_752].copy_from_slice(&pattern(2, 512));
        want[60 << 10..260 << 10].copy_from_slice(&pattern(3, 200 << 10));
        assert!(scene.read(&pool, "v", 0, 300 << 10) == want, "{level:?}");
        scene.ask(pool.close()).unwrap();
        drop(pool);
        scene.check();
        let pool = scene.open();
        assert!(scene.read(&pool, "v", 0, 300 << 10) == want, "{level:?} after a close");
    }
}

#[test]
fn what_was_acknowledged_survives_a_kill_and_what_was_flushed_a_power_cut() {
    for (level, members) in LEVELS {
        let mut scene = Scene::new(2, members);
        scene.create(level);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 10 << 20)).unwrap();
        scene.write(&pool, "v", 0, &pattern(1, 64 << 10));
        drop(pool);
        scene.kill();
        let pool = scene.open();
        assert!(scene.read(&pool, "v", 0, 64 << 10) == pattern(1, 64 << 10), "{level:?} after a kill");
        scene.flush(&pool, "v");
        scene.write(&pool, "v", 1 << 20, &pattern(2, 4096));
        drop(pool);
        scene.kill();
        scene.tail = MemoryTail::default();
        scene.disks.iter().for_each(|disk| disk.state().lose_cache());
        let pool = scene.open();
        assert!(scene.read(&pool, "v", 0, 64 << 10) == pattern(1, 64 << 10), "{level:?} after a power cut");
        let late = scene.read(&pool, "v", 1 << 20, 4096);
        assert!(late == pattern(2, 4096) || late == vec![0; 4096], "{level:?}: not flushed");
        // What may differ is being copied still.
        scene.ask(pool.close()).unwrap();
    }
}

#[test]
fn snapshots_keep_what_was_and_clones_go_their_own_way() {
    for (level, members) in LEVELS {
        let mut scene = Scene::new(3, members);
        scene.create(level);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 10 << 20)).unwrap();
        scene.write(&pool, "v", 0, &pattern(1, 128 << 10));
        scene.write(&pool, "v", 1 << 20, &pattern(7, 8192));
        scene.ask(pool.snapshot(vec![("v".to_owned(), "s".to_owned())])).unwrap();
        scene.write(&pool, "v", 4096, &pattern(2, 1024));
        scene.write(&pool, "v", (1 << 20) + 4096, &pattern(8, 8192));
        scene.ask(pool.clone_volume("s", "c")).unwrap();
        scene.write(&pool, "c", 8192, &pattern(3, 70 << 10));
        let was = pattern(1, 128 << 10);
        assert!(scene.read(&pool, "s", 0, 128 << 10) == was, "{level:?}: the snapshot");
        let mut want = was.clone();
        want[4096..5120].copy_from_slice(&pattern(2, 1024));
        assert!(scene.read(&pool, "v", 0, 128 << 10) == want, "{level:?}: the volume");
        let mut want = was.clone();
        want[8192..8192 + (70 << 10)].copy_from_slice(&pattern(3, 70 << 10));
        assert!(scene.read(&pool, "c", 0, 128 << 10) == want, "{level:?}: the clone");
        let write = scene.io(&pool, "s", Operation::Write { fua: false }, 0, &[0; 512]).0;
        assert_eq!(write, Err(Status::ReadOnly));
        // What people see is a second old at most.
        scene.wait(Duration::from_secs(2));
        let free = pool.view().free_bytes;
        scene.ask(pool.delete_volume("s")).unwrap();
        scene.ask(pool.delete_volume("v")).unwrap();
        scene.wait(Duration::from_secs(3));
        assert!(pool.view().free_bytes > free);
        assert!(scene.read(&pool, "c", 0, 128 << 10) == want, "{level:?}: the clone alone");
        scene.ask(pool.delete_volume("c")).unwrap();
        scene.wait(Duration::from_secs(3));
        assert_eq!(pool.view().free_bytes, pool.view().size_bytes);
        scene.ask(pool.close()).unwrap();
        scene.check();
    }
}

#[test]
fn a_full_pool_says_so_and_goes_on_when_there_is_space() {
    let mut scene = Scene::new(6, 2);
    scene.create(Level::Raid1);
    let pool = scene.open();
    scene.ask(pool.create_volume("big", 64 << 20)).unwrap();
    scene.ask(pool.create_volume("small", 1 << 20)).unwrap();
    scene.write(&pool, "small", 0, &pattern(1, 4096));
    let mut at = 0;
    let write = Operation::Write { fua: false };
    let full = loop {
        match scene.io(&pool, "big", write, at, &pattern(2, 64 << 10)).0 {
            Ok(()) => at += 64 << 10,
            Err(status) => break status,
        }
    };
    assert_eq!(full, Status::NoSpace);
    scene.write(&pool, "small", 0, &pattern(3, 4096));
    assert_eq!(scene.read(&pool, "small", 0, 4096), pattern(3, 4096));
    assert_eq!(scene.io(&pool, "big", Operation::Discard, 0, &vec![0; 1 << 20]).0, Ok(()));
    scene.write(&pool, "big", at, &pattern(4, 64 << 10));
    assert_eq!(scene.read(&pool, "big", 0, 4096), vec![0; 4096]);
    assert_eq!(scene.read(&pool, "big", at, 64 << 10), pattern(4, 64 << 10));
}

/// The whole of what is slow waits for a log that does not answer; what is mapped does not notice.
#[test]
fn a_stopped_slow_path_leaves_mapped_blocks_at_full_speed() {
    let mut scene = Scene::new(7, 2);
    scene.create(Level::Raid1);
    let held: Vec<Arc<HeldDevice>> =
        scene.devices().into_iter().map(|device| Arc::new(HeldDevice::new(device))).collect();
    let devices = held.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect();
    let pool = scene.try_open(devices, false).unwrap();
    scene.ask(pool.create_volume("v", 10 << 20)).unwrap();
    scene.write(&pool, "v", 0, &pattern(1, 64 << 10));
    // From now on nothing that belongs to the pool itself is written.
    for device in &held {
        device.hold(|request| request.operation.is_write() && request.lba.0 << 9 < 2 << 20);
    }
    let device = pool.device("v").unwrap();
    let client = Rc::new(Client::new(scene.reactors[0].runtime(), &device));
    let stuck = Rc::new(RefCell::new(false));
    let (other, ended) = (Rc::clone(&client), Rc::clone(&stuck));
    scene.reactors[0].runtime().spawn(async move {
        // A region that is not marked.
        let write = other.io(Operation::Write { fua: false }, 1 << 20, pattern(2, 64 << 10)).await;
        let flush = other.io(Operation::Flush, 0, Vec::new()).await;
        *ended.borrow_mut() = write.0.is_ok() && flush.0.is_ok();
    });
    let began = scene.world.now();
    for round in 0..200 {
        scene.write(&pool, "v", 4096, &pattern(round, 8192));
        assert_eq!(scene.read(&pool, "v", 4096, 8192), pattern(round, 8192));
    }
    assert!(scene.world.now() - began < Duration::from_secs(1), "{:?}", scene.world.now() - began);
    assert!(!*stuck.borrow());
    held.iter().for_each(|device| device.release());
    scene.wait(Duration::from_secs(5));
    assert!(*stuck.borrow());
    drop(client);
}

/// Devices, how a pool of them is asked for, and why it is refused.
type Case = (Vec<Arc<dyn Device>>, CreateOptions, &'static str);

#[test]
fn what_cannot_be_a_pool_is_refused_by_name_and_left_as_it_was() {
    let mut scene = Scene::new(8, 4);
    let handle = scene.reactors[0].runtime().handle();
    let devices = scene.devices();
    let small = Arc::new(SimDisk::new("small", Geometry::new(BlockSize::B512, 1 << 11), [77; 16]));
    let large_blocks = Arc::new(SimDisk::new("4k", Geometry::new(BlockSize::B4096, 4 << 10), [78; 16]));
    let options = |level| CreateOptions {
        metadata_bytes: Some(1 << 20),
        log_bytes: 64 << 10,
        ..CreateOptions::new("p0", [9; 16], level)
    };
    let bad_name = CreateOptions { name: "p 0".to_owned(), ..options(Level::Raid1) };
    let bad_strip = CreateOptions { strip_bytes: 5000, ..options(Level::Raid1) };
    let bad_extent = CreateOptions { extent_bytes: 65 << 20, ..options(Level::Raid1) };
    let cases: Vec<Case> = vec![
        (devices[..1].to_vec(), options(Level::Raid1), "raid1 has 2 to 4 members, and 1 are given"),
        (devices[..1].to_vec(), options(Level::Raid10), "raid10 has 2 to 32 members, and 1 are given"),
        (vec![Arc::clone(&devices[0]), Arc::clone(&devices[0])], options(Level::Raid1), "d0 is given twice"),
        (
            vec![Arc::clone(&devices[0]), small],
            options(Level::Raid1),
            "small has 1048576 bytes, want at least",
        ),
        (
            vec![Arc::clone(&devices[0]), large_blocks],
            options(Level::Raid1),
            "4k has blocks of 4096 bytes and d0 of 512",
        ),
        (devices[..2].to_vec(), bad_name, "\"p 0\" is no name for a pool"),
        (devices[..2].to_vec(), bad_strip, "a strip of 5000 bytes cannot be"),
        (devices[..2].to_vec(), bad_extent, "want 4KiB to 64MiB"),
        (devices[..2].to_vec(), options(Level::Raid5), "raid5 has 3 to 32 members, and 2 are given"),
    ];
    for (devices, options, want) in cases {
        let created = pool::create(&handle, devices, options);
        let Err(PoolError::Wrong(what)) = scene.ask(created) else { panic!("{want}: it was made") };
        assert!(what.contains(want), "{what}");
    }
    for device in &devices {
        let probed = pool::probe(&handle, Arc::clone(device));
        assert_eq!(scene.ask(probed), Ok(None), "nothing was written");
    }
    let created = pool::create(&handle, devices[..2].to_vec(), options(Level::Raid1));
    scene.ask(created).unwrap();
    let other = CreateOptions { name: "p1".to_owned(), uuid: [10; 16], ..options(Level::Raid1) };
    let created = pool::create(&handle, devices[1..3].to_vec(), other.clone());
    let Err(PoolError::Conflict(what)) = scene.ask(created) else { panic!("a member was taken") };
    assert!(what.contains("d1 belongs to pool p0, want another device, or --force"), "{what}");
    let created = pool::create(&handle, devices[2..4].to_vec(), other);
    scene.ask(created).unwrap();
    let mixed = vec![Arc::clone(&devices[0]), Arc::clone(&devices[2])];
    let Err(PoolError::Conflict(what)) = scene.try_open(mixed, true) else { panic!("two pools in one") };
    assert!(what.contains("belongs to pool"), "{what}");
    let pool = scene.try_open(devices[..2].to_vec(), false).unwrap();
    for (name, size, want) in [
        ("a b", 1 << 20, "is no name for a volume"),
        ("v", 0, "a size of 0 bytes"),
        ("v", 1000, "want a multiple of 512"),
    ] {
        let Err(PoolError::Wrong(what)) = scene.ask(pool.create_volume(name, size)) else { panic!("{want}") };
        assert!(what.contains(want), "{what}");
    }
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    assert!(matches!(scene.ask(pool.create_volume("v", 1 << 20)), Err(PoolError::Conflict(_))));
    assert!(matches!(scene.ask(pool.snapshot(vec![])), Err(PoolError::Wrong(_))));
    let nothing = scene.ask(pool.snapshot(vec![("w".to_owned(), "s".to_owned())]));
    assert_eq!(nothing, Err(PoolError::Unknown("volume p0/w is not there".to_owned())));
    assert!(matches!(scene.ask(pool.clone_volume("v", "c")), Err(PoolError::Wrong(_))));
    scene.write(&pool, "v", 512 << 10, &pattern(1, 4096));
    let Err(PoolError::Conflict(what)) = scene.ask(pool.resize_volume("v", 4096)) else {
        panic!("it was cut")
    };
    assert!(what.contains("volume v has data up to"), "{what}");
    scene.ask(pool.resize_volume("v", 2 << 20)).unwrap();
    assert_eq!(scene.read(&pool, "v", 512 << 10, 4096), pattern(1, 4096));
    assert_eq!(scene.read(&pool, "v", (2 << 20) - 512, 512), vec![0; 512]);
}

#[test]
fn damage_is_found_and_the_other_copy_is_used() {
    for at in ["superblock", "log", "root"] {
        let mut scene = Scene::new(9, 2);
        scene.create(Level::Raid1);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 4 << 20)).unwrap();
        scene.write(&pool, "v", 0, &pattern(5, 64 << 10));
        scene.ask(pool.close()).unwrap();
        drop(pool);
        {
            let mut disk = scene.disks[0].state();
            let log = (1 << 20) + 4096;
            let tables = log + (64 << 10);
            let ranges = match at {
                "superblock" => vec![(4196, 8192), (65636, 69632)],
                "root" => vec![(tables, 2 << 20)],
                _ => vec![(log, tables)],
            };
            for (from, to) in ranges {
                for byte in (from..to).step_by(100) {
                    disk.content.change(byte..byte + 1)[0] ^= 0x40;
                }
            }
        }
        let handle = scene.reactors[0].runtime().handle();
        let checked = pool::check(&handle, scene.devices());
        match at {
            "superblock" => {
                let Err(PoolError::Failed(what)) = scene.ask(checked) else { panic!("it was taken") };
                assert!(what.starts_with("d0: superblock at"), "{what}");
                let devices = scene.devices();
                let Err(PoolError::Failed(what)) = scene.try_open(devices, false) else {
                    panic!("it was taken")
                };
                assert!(what.starts_with("d0: superblock at"), "{what}");
                continue;
            }
            // What is behind the last checkpoint is not looked at.
            "log" => assert_eq!(scene.ask(checked).unwrap().faults, Vec::<String>::new()),
            _ => {
                let faults = scene.ask(checked).unwrap().faults;
                let is_said = |fault: &String| {
                    fault.starts_with("d0: ")
                        && fault.ends_with("; the rest of its tables and log is not checked")
                };
                assert!(faults.iter().any(is_said), "{faults:?}");
            }
        }
        let pool = scene.open();
        assert_eq!(scene.read(&pool, "v", 0, 64 << 10), pattern(5, 64 << 10), "{at}");
    }
}

/// A write that a member holds back lands after its extent was discarded: nobody may have the extent by then. Guests order such requests
/// themselves, so the histories have none; a device that answers minutes late does it to them all the same.
#[test]
fn an_extent_is_not_used_again_while_a_write_to_it_is_under_way() {
    let mut scene = Scene::new(10, 1);
    scene.create(Level::Linear);
    let held = Arc::new(HeldDevice::new(scene.devices().remove(0)));
    let pool = scene.try_open(vec![Arc::clone(&held) as Arc<dyn Device>], false).unwrap();
    scene.ask(pool.create_volume("v", 64 << 10)).unwrap();
    scene.ask(pool.create_volume("w", 64 << 20)).unwrap();
    scene.write(&pool, "v", 0, &pattern(1, 64 << 10));
    held.hold_one(|request| request.operation.is_write() && request.lba.0 << 9 >= 2 << 20);
    let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
    let ended = Rc::new(RefCell::new(false));
    let told = Rc::clone(&ended);
    scene.reactors[0].runtime().spawn(async move {
        let write = client.io(Operation::Write { fua: false }, 0, pattern(0xAA, 64 << 10)).await;
        *told.borrow_mut() = write.0.is_ok();
    });
    assert_eq!(scene.io(&pool, "v", Operation::Discard, 0, &vec![0; 64 << 10]).0, Ok(()));
    scene.flush(&pool, "v");
    scene.wait(Duration::from_secs(10));
    assert_eq!(held.held(), 1);
    let extents = pool.view().size_bytes >> 16;
    let write = Operation::Write { fua: false };
    for extent in 0..extents - 1 {
        scene.write(&pool, "w", extent << 16, &pattern(7, 64 << 10));
    }
    // The last one waits for the write that is held.
    let (other, late) =
        (Rc::new(RefCell::new(None)), Client::new(scene.reactors[0].runtime(), &pool.device("w").unwrap()));
    let place = Rc::clone(&other);
    scene.reactors[0].runtime().spawn(async move {
        *place.borrow_mut() = Some(late.io(write, (extents - 1) << 16, pattern(7, 64 << 10)).await.0);
    });
    scene.wait(Duration::from_secs(5));
    assert_eq!(*other.borrow(), None);
    held.release();
    scene.wait(Duration::from_secs(5));
    assert!(*ended.borrow());
    assert_eq!(*other.borrow(), Some(Ok(())));
    for extent in 0..extents {
        assert_eq!(scene.read(&pool, "w", extent << 16, 64 << 10), pattern(7, 64 << 10), "extent {extent}");
    }
}

/// Found by reading: the record was carried out, and the first write to such an extent was a panic.
#[test]
fn a_tail_that_names_more_extents_than_there_are_is_refused() {
    let mut scene = Scene::new(8, 2);
    scene.create(Level::Raid1);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    scene.write(&pool, "v", 0, &pattern(1, 4096));
    drop(pool);
    scene.kill();
    let book = Superblock::decode(&scene.disks[0].state().content.get(4096..8192)).unwrap().unwrap();
    let content = decode_tail(&scene.tail.content(), &book.pool_uuid).expect("a tail of this pool");
    let (last, _) = *content.records.last().expect("the write is in it");
    let mut more = Vec::new();
    encode_tail_entry(last + 1, &Record::Grow { extents: 1_000_000 }, &mut more);
    scene.tail.append(&more);
    let devices = scene.devices();
    let Err(PoolError::Failed(what)) = scene.try_open(devices, false) else { panic!("it was taken") };
    assert!(what.contains("names more extents than its members have"), "{what}");
}

/// One bit anywhere: what the mirrors' copies say against each other, data and parity say too. RAID 6 knows who is wrong.
#[test]
fn a_bit_that_flips_on_any_member_is_found_by_a_scrub() {
    for (level, members) in [(Level::Raid5, 3), (Level::Raid5, 4), (Level::Raid6, 4), (Level::Raid6, 6)] {
        let mut scene = Scene::new(31, members);
        scene.create(level);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 1 << 20)).expect("made");
        let data = pattern(7, 600 << 10);
        scene.write(&pool, "v", 8192, &data);
        scene.flush(&pool, "v");
        let scrub = |scene: &mut Scene, repair: bool| {
            scene.ask(pool.scrub(repair)).expect("begun");
            loop {
                scene.wait(Duration::from_millis(200));
                let view = pool.view();
                if let Some(task) = view.tasks.iter().rev().find(|task| task.kind == "scrub" && task.is_done)
                {
                    return task.mismatches;
                }
            }
        };
        assert_eq!(scrub(&mut scene, false), 0, "{level}: all is right");
        for member in 0..usize::from(members) {
            let disk = Arc::clone(&scene.disks[member]);
            // The last that stands there: data or parity.
            let at = {
                let mut state = disk.state();
                let at =
                    state.snapshot().iter().rposition(|byte| *byte != 0).expect("something stands there");
                state.content.change(at..at + 1)[0] ^= 0x10;
                at
            };
            let found = scrub(&mut scene, true);
            let of_data = scene.read(&pool, "v", 8192, data.len()) == data;
            assert!(found > 0, "{level}: byte {at} of member {member}");
            assert!(of_data || level == Level::Raid5, "{level}: byte {at} of member {member} is mended");
            assert_eq!(scrub(&mut scene, false), 0, "{level}: member {member} after its repair");
            if !of_data {
                // One parity cannot say who is wrong: the data counts as right.
                scene.write(&pool, "v", 8192, &data);
                scene.flush(&pool, "v");
            }
        }
        scene.ask(pool.close()).expect("closed");
    }
}
