//! Requests that do not take the hot path are counted, once under each reason: each is provoked here, and nothing else is counted.

use super::*;
use hawser_volume::pool::NoSpacePolicy;
use std::cell::Cell;

const WRITE: Operation = Operation::Write { fua: false };
const EXTENT: u64 = 64 << 10;

/// How often a volume's requests were slow.
fn slow(pool: &Pool, volume: &str) -> Vec<(&'static str, u64)> {
    pool.volumes().into_iter().find(|view| view.name == volume).expect("it is there").slow
}

/// A pool of this level with a volume of 8 MiB, of which the first 1 MiB is written whole and durable.
fn scene(level: Level, members: u8, change: impl FnOnce(&mut OpenOptions)) -> (Scene, Pool) {
    let mut scene = Scene::new(60, members);
    scene.create(level);
    let mut options = OpenOptions::new(HOST, Box::new(scene.tail.clone()));
    change(&mut options);
    let handle = scene.reactors[0].runtime().handle();
    let opened = Pool::open(&handle, scene.devices(), options);
    let pool = scene.ask(opened).unwrap();
    scene.ask(pool.create_volume("v", 8 << 20)).unwrap();
    scene.write(&pool, "v", 0, &pattern(1, 1 << 20));
    scene.flush(&pool, "v");
    (scene, pool)
}

/// What `work` adds.
fn added(scene: &mut Scene, pool: &Pool, work: impl FnOnce(&mut Scene, &Pool)) -> Vec<(&'static str, u64)> {
    let before = slow(pool, "v");
    work(scene, pool);
    let pairs = slow(pool, "v").into_iter().zip(before);
    pairs.map(|((name, after), (_, before))| (name, after - before)).filter(|(_, more)| *more > 0).collect()
}

#[test]
fn what_takes_the_hot_path_is_not_counted() {
    let (mut scene, pool) = scene(Level::Raid1, 2, |_| {});
    let more = added(&mut scene, &pool, |scene, pool| {
        scene.write(pool, "v", 4096, &pattern(2, 200 << 10));
        scene.read(pool, "v", 0, 2 << 20);
        scene.flush(pool, "v");
        assert_eq!(scene.io(pool, "v", Operation::Write { fua: true }, 0, &pattern(3, 4096)).0, Ok(()));
    });
    assert_eq!(more, []);
}

#[test]
fn first_writes_are_write_misses_and_copies_on_write() {
    let (mut scene, pool) = scene(Level::Raid1, 2, |_| {});
    let more =
        added(&mut scene, &pool, |scene, pool| scene.write(pool, "v", 2 << 20, &pattern(2, 200 << 10)));
    assert_eq!(more, [("write_miss", 1)]);
    scene.ask(pool.snapshot(vec![("v".to_owned(), "s".to_owned())])).unwrap();
    let more = added(&mut scene, &pool, |scene, pool| scene.write(pool, "v", 0, &pattern(2, 200 << 10)));
    assert_eq!(more, [("copy_on_write", 1)]);
}

#[test]
fn reads_of_what_may_differ_are_read_misses() {
    let (mut scene, pool) = scene(Level::Raid1, 2, |_| {});
    drop(pool);
    scene.kill();
    // Resynchronised slowly.
    let options = OpenOptions {
        sync_bytes_per_second: 1 << 10,
        ..OpenOptions::new(HOST, Box::new(scene.tail.clone()))
    };
    let handle = scene.reactors[0].runtime().handle();
    let opened = Pool::open(&handle, scene.devices(), options);
    let pool = scene.ask(opened).unwrap();
    let more = added(&mut scene, &pool, |scene, pool| {
        scene.read(pool, "v", 512 << 10, 4096);
    });
    assert_eq!(more, [("read_miss", 1)]);
}

#[test]
fn parts_of_stripes_are_counted_once_for_a_request() {
    for (level, members) in [(Level::Raid5, 3), (Level::Raid6, 5)] {
        let (mut scene, pool) = scene(level, members, |_| {});
        // Of two extents, and of more stripes.
        let more = added(&mut scene, &pool, |scene, pool| {
            scene.write(pool, "v", EXTENT - 8192, &pattern(2, usize::try_from(EXTENT).expect("small")));
        });
        assert_eq!(more, [("partial_stripe", 1)], "{level}");
    }
}

#[test]
fn reads_and_writes_without_a_member_are_degraded() {
    for (level, members) in [(Level::Raid5, 3), (Level::Raid6, 5)] {
        let (mut scene, pool) = scene(level, members, |_| {});
        scene.disks[1].fail_all(Some(Status::Path));
        while pool.view().members[1].state == MemberState::InSync {
            scene.flush(&pool, "v");
            scene.wait(Duration::from_millis(100));
        }
        let more = added(&mut scene, &pool, |scene, pool| {
            assert!(scene.read(pool, "v", 0, 512 << 10) == pattern(1, 1 << 20)[..512 << 10]);
        });
        assert_eq!(more, [("degraded", 1)], "{level}");
        // Whole stripes.
        let more = added(&mut scene, &pool, |scene, pool| scene.write(pool, "v", 0, &pattern(2, 192 << 10)));
        assert_eq!(more, [("degraded", 1)], "{level}");
    }
}

#[test]
fn failures_of_members_are_counted_once_for_a_request() {
    for (level, members, len) in [
        (Level::Raid1, 2, 4096),
        (Level::Raid10, 4, 512 << 10),
        // In several parts.
        (Level::Raid5, 3, 1 << 20),
        (Level::Raid6, 4, 1 << 20),
    ] {
        let (mut scene, pool) = scene(level, members, |_| {});
        // The flag of whole stripes is there.
        scene.write(&pool, "v", 0, &pattern(2, 1 << 20));
        scene.disks[1].state().errors_permille = 1000;
        let more = added(&mut scene, &pool, |scene, pool| scene.write(pool, "v", 0, &pattern(3, len)));
        assert_eq!(more, [("device_failure", 1)], "a write of {len} to {level}");
        assert!(scene.read(&pool, "v", 0, len) == pattern(3, len), "{level}");
        scene.disks[1].state().errors_permille = 0;
        scene.wait(Duration::from_secs(20));
        scene.ask(pool.close()).unwrap();
    }
    // A read that fails at one is read from the other.
    let (mut scene, pool) = scene(Level::Raid1, 2, |_| {});
    // The first read of a channel takes the second copy.
    scene.disks[1].state().media_errors = (0..16 << 11).collect();
    let more = added(&mut scene, &pool, |scene, pool| {
        assert!(scene.read(pool, "v", 0, 4096) == pattern(1, 4096));
    });
    assert_eq!(more, [("device_failure", 1)], "a read");
}

/// These are known only when the way is slow already: what made it so is counted too.
#[test]
fn mappings_that_cannot_be_changed_and_lack_of_space_are_counted() {
    let (mut scene, pool) = scene(Level::Raid1, 2, |options| options.no_space = NoSpacePolicy::Error);
    scene.ask(pool.create_volume("big", 64 << 20)).unwrap();
    let mut at = 0;
    while scene.io(&pool, "big", WRITE, at, &pattern(2, 64 << 10)).0 == Ok(()) {
        at += 64 << 10;
    }
    let more = added(&mut scene, &pool, |scene, pool| {
        assert_eq!(scene.io(pool, "v", WRITE, 4 << 20, &pattern(2, 4096)).0, Err(Status::NoSpace));
    });
    assert_eq!(more, [("write_miss", 1), ("no_space", 1)]);
    scene.ask(pool.lose("another host has it")).unwrap();
    let more = added(&mut scene, &pool, |scene, pool| {
        assert_eq!(scene.io(pool, "v", WRITE, 4 << 20, &pattern(2, 4096)).0, Err(Status::ReadOnly));
    });
    assert_eq!(more, [("write_miss", 1), ("mapping_failure", 1)]);
}

#[test]
fn writes_to_regions_that_are_not_marked_are_counted() {
    let (mut scene, pool) =
        scene(Level::Raid1, 2, |options| options.intent_idle = Duration::from_millis(100));
    scene.wait(Duration::from_secs(30));
    let more = added(&mut scene, &pool, |scene, pool| scene.write(pool, "v", 0, &pattern(2, 4096)));
    assert_eq!(more, [("intent", 1)]);
}

#[test]
fn discards_and_zeroes_are_counted() {
    let (mut scene, pool) = scene(Level::Raid1, 2, |_| {});
    let zeroes = Operation::WriteZeroes { unmap: false, fua: false };
    for operation in [zeroes, Operation::Discard] {
        let more = added(&mut scene, &pool, |scene, pool| {
            assert_eq!(scene.io(pool, "v", operation, 4096, &vec![0; 128 << 10]).0, Ok(()));
        });
        assert_eq!(more, [("discard", 1)], "{operation:?}");
    }
}

#[test]
fn a_fua_write_while_the_mapping_is_not_durable_is_counted() {
    let (mut scene, pool) = scene(Level::Raid1, 2, |_| {});
    scene.write(&pool, "v", 2 << 20, &pattern(2, 4096));
    let fua = Operation::Write { fua: true };
    let more = added(&mut scene, &pool, |scene, pool| {
        assert_eq!(scene.io(pool, "v", fua, 0, &pattern(3, 4096)).0, Ok(()));
    });
    assert_eq!(more, [("fua", 1)]);
    // It is durable now.
    let more = added(&mut scene, &pool, |scene, pool| {
        assert_eq!(scene.io(pool, "v", fua, 0, &pattern(3, 4096)).0, Ok(()));
    });
    assert_eq!(more, []);
}

/// 64 MiB may be copied at a time.
#[test]
fn a_write_that_there_is_no_room_to_copy_is_counted() {
    let (mut scene, pool) = scene(Level::Raid1, 2, |_| {});
    for at in 1..4 {
        scene.write(&pool, "v", at << 20, &pattern(1, 1 << 20));
    }
    let more = added(&mut scene, &pool, |scene, pool| {
        let client = Rc::new(Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap()));
        let ended = Rc::new(Cell::new(0));
        for _ in 0..17 {
            let (client, ended) = (Rc::clone(&client), Rc::clone(&ended));
            scene.reactors[0].runtime().spawn(async move {
                assert_eq!(client.io(WRITE, 0, pattern(2, 4 << 20)).await.0, Ok(()));
                ended.set(ended.get() + 1);
            });
        }
        scene.wait(Duration::from_secs(5));
        assert_eq!(ended.get(), 17);
    });
    assert_eq!(more, [("copy_limit", 1)]);
}
