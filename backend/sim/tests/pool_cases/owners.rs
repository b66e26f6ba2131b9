//! Two owners of one pool on members that know no reservations; and members that answer when nobody waits any more.

use super::*;
use std::cell::Cell;

const OTHER: [u8; 16] = [8; 16];
const WRITE: Operation = Operation::Write { fua: false };

impl Scene {
    /// Opens the pool for another host, which has its own memory.
    fn open_elsewhere(&mut self, assume_exclusive: bool) -> Result<Pool, PoolError> {
        let options =
            OpenOptions { assume_exclusive, ..OpenOptions::new(OTHER, Box::new(MemoryTail::default())) };
        let handle = self.reactors[0].runtime().handle();
        let devices = self.devices();
        self.ask(Pool::open(&handle, devices, options))
    }
}

/// What is guaranteed where nothing but the superblocks tells: nobody opens a pool over another host by chance; who says that the other one is
/// gone has everything that that one had flushed; and the other one, if it lives, notices within its next look (a second), changes nothing from then on,
/// and says so. What guests of it write before that is what `assume_exclusive` warns of: here they are quiet.
#[test]
fn of_two_owners_without_reservations_the_first_notices_and_stops() {
    for (level, members) in LEVELS {
        let mut scene = Scene::new(40, members);
        scene.create(level);
        let first = scene.open();
        scene.ask(first.create_volume("v", 8 << 20)).unwrap();
        for at in 0..16 {
            scene.write(&first, "v", at << 18, &pattern(1, 4096));
        }
        scene.flush(&first, "v");
        // So that nothing of the first is left to be done: marks, logs.
        scene.wait(Duration::from_secs(20));
        let Err(PoolError::Conflict(what)) = scene.open_elsewhere(false) else { panic!("both have it") };
        assert!(what.contains("is open on host 07070707-"), "{what}");
        assert!(what.contains("--assume-exclusive when that host is dead"), "{what}");
        scene.write(&first, "v", 4096, &pattern(2, 4096));
        scene.flush(&first, "v");
        scene.wait(Duration::from_secs(20));
        let second = scene.open_elsewhere(true).unwrap();
        scene.wait(Duration::from_millis(1500));
        assert!(first.view().is_failed, "{level:?}");
        // Nothing of it is pending, and the members would do it.
        assert_eq!(scene.io(&first, "v", Operation::Flush, 0, &[]).0, Err(Status::Conflict), "{level:?}");
        let troubles = first.view().troubles;
        assert!(
            troubles[0].ends_with("nothing is read or written any more: another host has opened it"),
            "{troubles:?}"
        );
        // Both try to write, mapped blocks and new ones, and to change volumes.
        for round in 0..40u64 {
            let at = (round % 20) << 18;
            let written = scene.io(&first, "v", WRITE, at, &pattern(0xF0, 4096)).0;
            assert_eq!(written, Err(Status::ReadOnly), "{level:?} {round}");
            let bytes = pattern(u8::try_from(10 + round).unwrap(), 4096);
            scene.write(&second, "v", at, &bytes);
            assert_eq!(scene.read(&second, "v", at, 4096), bytes);
        }
        assert!(scene.ask(first.create_volume("w", 1 << 20)).is_err());
        scene.ask(second.create_volume("w", 1 << 20)).unwrap();
        scene.flush(&second, "v");
        let Err(PoolError::Failed(what)) = scene.ask(first.close()) else {
            panic!("it has nothing to close")
        };
        assert!(what.contains("is closed as after a crash: another host has opened it"), "{what}");
        drop(first);
        scene.wait(Duration::from_secs(20));
        assert_eq!(scene.read(&second, "v", 4096, 4096), pattern(2, 4096), "what the first had flushed");
        for round in 20..40u64 {
            let want = pattern(u8::try_from(10 + round).unwrap(), 4096);
            assert_eq!(scene.read(&second, "v", (round % 20) << 18, 4096), want, "{level:?} {round}");
        }
        scene.ask(second.close()).unwrap();
        drop(second);
        scene.check();
    }
}

/// Another host has taken the pool, deleted a volume, and given its extents to another one. The first host, which lives, went on reading by its tables: its guests saw
/// what others had written. Reads fail as soon as it knows, also one that was under way, of snapshots and of what was never written too.
#[test]
fn who_has_lost_the_pool_reads_nothing_of_it_any_more() {
    for (level, members) in LEVELS {
        let mut scene = Scene::new(43, members);
        scene.create(level);
        let held: Vec<Arc<HeldDevice>> =
            scene.devices().into_iter().map(|device| Arc::new(HeldDevice::new(device))).collect();
        let devices = held.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect();
        let first = scene.try_open(devices, false).unwrap();
        scene.ask(first.create_volume("v", 8 << 20)).unwrap();
        let extents = 32u64;
        for extent in 0..extents {
            scene.write(&first, "v", extent << 16, &pattern(1, 64 << 10));
        }
        scene.ask(first.snapshot(vec![("v".to_owned(), "s".to_owned())])).unwrap();
        scene.flush(&first, "v");
        // Marks are gone, and nothing is settled any more.
        scene.wait(Duration::from_secs(20));
        // A read that takes long, at a member and in parts of a request.
        held.iter().for_each(|device| {
            device.hold(|request| request.operation == Operation::Read && request.lba.0 << 9 >= 2 << 20)
        });
        let ended: Rc<RefCell<Vec<Outcome>>> = Rc::default();
        for len in [4096, 100 << 10] {
            let client = Client::new(scene.reactors[0].runtime(), &first.device("v").unwrap());
            let ended = Rc::clone(&ended);
            scene.reactors[0].runtime().spawn(async move {
                let read = client.io(Operation::Read, 0, vec![0; len]).await;
                ended.borrow_mut().push(read.0);
            });
        }
        scene.wait(Duration::from_millis(10));
        assert!(held.iter().map(|device| device.held()).sum::<usize>() > 1, "{level:?}");
        let second = scene.open_elsewhere(true).unwrap();
        for name in ["s", "v"] {
            scene.ask(second.delete_volume(name)).unwrap();
        }
        scene.wait(Duration::from_secs(3));
        scene.ask(second.create_volume("w", 64 << 20)).unwrap();
        let others = pattern(0xF0, 64 << 10);
        for extent in 0..(second.view().size_bytes >> 16) {
            scene.write(&second, "w", extent << 16, &others);
        }
        assert!(first.view().is_failed, "{level:?}");
        held.iter().for_each(|device| device.release());
        scene.wait(Duration::from_millis(100));
        let late = ended.borrow().clone();
        assert_eq!(late.len(), 2, "{level:?}");
        assert!(late.iter().all(|outcome| *outcome == Err(Status::Conflict)), "{level:?}: a late read");
        for name in ["v", "s"] {
            for (at, len) in [(0, 4096), (60 << 10, 100 << 10), (7 << 20, 4096)] {
                let (outcome, bytes) = scene.io(&first, name, Operation::Read, at, &vec![0; len]);
                assert_eq!(outcome, Err(Status::Conflict), "{level:?}: {name} at {at}");
                assert_eq!(bytes, vec![0; len], "{level:?}: {name} at {at}");
            }
            assert_eq!(first.device(name).unwrap().state(), hawser_block::DeviceState::Failed);
        }
        assert_eq!(scene.read(&second, "w", 0, 64 << 10), others);
    }
}

/// The same of a read that was slow already, since its member is missing: what it is computed from may be another volume's by now.
#[test]
fn who_has_lost_the_pool_computes_nothing_from_it_any_more() {
    for (level, members) in [(Level::Raid5, 3), (Level::Raid6, 5)] {
        let mut scene = Scene::new(44, members);
        scene.create(level);
        let (held, _) = scene.watched();
        let pool = scene.open_quietly(promises::as_devices(&held), |_| {}).unwrap();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        scene.write(&pool, "v", 0, &pattern(1, 256 << 10));
        scene.flush(&pool, "v");
        scene.lose(&pool, 1);
        let data = scene.data_offset();
        held.iter().for_each(|device| {
            device.hold(move |request| request.operation == Operation::Read && request.lba.0 << 9 >= data);
        });
        let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
        let ended = Rc::new(Cell::new(None));
        let told = Rc::clone(&ended);
        scene.reactors[0].runtime().spawn(async move {
            told.set(Some(client.io(Operation::Read, 0, vec![0; 256 << 10]).await.0));
        });
        scene.wait(Duration::from_millis(10));
        assert!(held.iter().any(|device| device.held() > 0) && ended.get().is_none(), "{level}");
        scene.ask(pool.lose("another host has opened it")).unwrap();
        held.iter().for_each(|device| device.release());
        scene.wait(Duration::from_secs(1));
        assert_eq!(ended.get(), Some(Err(Status::Conflict)), "{level}");
    }
}

/// A write that a member kept fails when the member was out and is back again: that says nothing of what it is now.
#[test]
fn a_failure_of_before_does_not_put_out_a_member_that_has_come_back() {
    let mut scene = Scene::new(41, 2);
    scene.create(Level::Raid1);
    let held: Vec<Arc<HeldDevice>> =
        scene.devices().into_iter().map(|device| Arc::new(HeldDevice::new(device))).collect();
    let devices = held.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect();
    let pool = scene.try_open(devices, false).unwrap();
    scene.ask(pool.create_volume("v", 4 << 20)).unwrap();
    for at in 0..4 {
        scene.write(&pool, "v", at << 18, &pattern(1, 256 << 10));
    }
    held[1].hold_one(|request| request.operation.is_write() && request.lba.0 << 9 >= 2 << 20);
    let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
    let ended = Rc::new(Cell::new(false));
    let told = Rc::clone(&ended);
    scene.reactors[0].runtime().spawn(async move {
        told.set(client.io(WRITE, 0, pattern(2, 4096)).await.0.is_ok());
    });
    scene.wait(Duration::from_millis(10));
    assert_eq!(held[1].held(), 1);
    // Another write fails there: the member is out, and after a while it is back.
    scene.disks[1].state().errors_permille = 1000;
    scene.write(&pool, "v", 1 << 18, &pattern(3, 4096));
    assert_eq!(pool.view().members[1].state, MemberState::Stale);
    scene.disks[1].state().errors_permille = 0;
    let mut waited = 0;
    while pool.view().members[1].state == MemberState::Stale && waited < 100 {
        // It is told of once a second.
        scene.wait(Duration::from_millis(100));
        waited += 1;
    }
    assert_eq!(pool.view().members[1].state, MemberState::Syncing, "it waits for who is under way");
    assert!(!ended.get());
    // Now the first one fails, and nothing else.
    scene.disks[1].state().errors_permille = 1000;
    held[1].release();
    let mut steps = 0;
    while !ended.get() && steps < 1000 {
        scene.wait(Duration::from_micros(1));
        steps += 1;
    }
    assert!(ended.get(), "the other one has it");
    scene.disks[1].state().errors_permille = 0;
    let mut was_stale = false;
    for _ in 0..100 {
        scene.wait(Duration::from_millis(50));
        was_stale |= pool.view().members[1].state == MemberState::Stale;
    }
    assert!(!was_stale, "it was put out again");
    assert!(!pool.view().is_degraded, "{:?}", pool.view());
    scene.ask(pool.scrub(false)).unwrap();
    scene.wait(Duration::from_secs(5));
    let view = pool.view();
    let scrub = view.tasks.iter().find(|task| task.kind == "scrub").expect("it was run");
    assert!(scrub.is_done && scrub.mismatches == 0, "{scrub:?}");
    assert_eq!(scene.read(&pool, "v", 0, 4096), pattern(2, 4096));
}

/// Each member's own copy of the tables is looked at, whichever of them is damaged.
#[test]
fn a_check_looks_at_every_members_tables() {
    for number in 0..3 {
        let mut scene = Scene::new(42, 3);
        scene.create(Level::Raid1);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 4 << 20)).unwrap();
        scene.write(&pool, "v", 0, &pattern(5, 64 << 10));
        scene.ask(pool.close()).unwrap();
        drop(pool);
        let tables = (1 << 20) + 4096 + (64 << 10);
        {
            // Behind the roots: pages of volumes and chunks.
            let mut disk = scene.disks[number].state();
            for byte in (tables + 8192..2 << 20).step_by(100) {
                disk.content.change(byte..byte + 1)[0] ^= 0x40;
            }
        }
        let handle = scene.reactors[0].runtime().handle();
        let checked = pool::check(&handle, scene.devices());
        let faults = scene.ask(checked).unwrap().faults;
        // Each page that is used, since the others' lead to the next.
        let want = format!("d{number}: metadata page ");
        assert!(faults.len() > 1 && faults.iter().all(|fault| fault.starts_with(&want)), "{faults:?}");
    }
}
