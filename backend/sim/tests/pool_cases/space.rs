//! Room: what gives it back needs none, who waits for it is seen, and members are told of it.

use super::*;
use hawser_volume::pool::NoSpacePolicy;
use orders::noise;
use std::cell::Cell;

const WRITE: Operation = Operation::Write { fua: false };

impl Scene {
    fn open_with(&mut self, devices: Vec<Arc<dyn Device>>, change: impl FnOnce(&mut OpenOptions)) -> Pool {
        let mut options = OpenOptions::new(HOST, Box::new(self.tail.clone()));
        change(&mut options);
        let handle = self.reactors[0].runtime().handle();
        let opened = Pool::open(&handle, devices, options);
        self.ask(opened).unwrap()
    }
}

/// A chunk has 448 extents: each of these is in another one, which takes metadata of its own.
const APART: u64 = 448 * (64 << 10);

#[test]
fn what_is_given_back_needs_no_room_for_metadata() {
    let mut scene = Scene::new(30, 2);
    scene.create(Level::Raid1);
    let pool = scene.open();
    scene.ask(pool.create_volume("old", 64 << 30)).unwrap();
    for at in 0..10 {
        scene.write(&pool, "old", at * APART, &pattern(1, 4096));
    }
    scene.ask(pool.snapshot(vec![("old".to_owned(), "s".to_owned())])).unwrap();
    scene.ask(pool.create_volume("v", 64 << 30)).unwrap();
    let mut written = 0;
    let full = loop {
        match scene.io(&pool, "v", WRITE, written * APART, &pattern(2, 4096)).0 {
            Ok(()) => written += 1,
            Err(status) => break status,
        }
    };
    assert_eq!(full, Status::NoSpace);
    assert!(written > 10, "{written}");
    let view = pool.view();
    assert!(view.free_bytes > view.size_bytes / 4, "it is metadata that has no room: {view:?}");
    // What a snapshot has too would have to be copied: it is left, and nobody is told of an error.
    for at in 0..10 {
        assert_eq!(scene.io(&pool, "old", Operation::Discard, at * APART, &vec![0; 64 << 10]).0, Ok(()));
        assert_eq!(scene.read(&pool, "s", at * APART, 4096), pattern(1, 4096));
    }
    scene.wait(Duration::from_secs(2));
    let before = pool.volumes().iter().find(|it| it.name == "v").unwrap().mapped_bytes;
    for at in 0..written {
        assert_eq!(scene.io(&pool, "v", Operation::Discard, at * APART, &vec![0; 64 << 10]).0, Ok(()));
        assert_eq!(scene.read(&pool, "v", at * APART, 4096), vec![0; 4096]);
    }
    scene.wait(Duration::from_secs(2));
    let after = pool.volumes().iter().find(|it| it.name == "v").unwrap().mapped_bytes;
    assert!(before > 0 && after == 0, "{before} {after}");
    scene.flush(&pool, "v");
    scene.write(&pool, "v", written * APART, &pattern(3, 4096));
    // Zeroes are zeroes, where they have to be written too.
    let zeroes = Operation::WriteZeroes { unmap: true, fua: false };
    assert_eq!(scene.io(&pool, "old", zeroes, 0, &vec![0; 64 << 10]).0, Ok(()));
    assert_eq!(scene.read(&pool, "old", 0, 4096), vec![0; 4096]);
    assert_eq!(scene.read(&pool, "s", 0, 4096), pattern(1, 4096));
    scene.ask(pool.close()).unwrap();
    drop(pool);
    scene.check();
}

/// Guests that write here and there used up the room for mappings: their first writes were refused, while the pool was fine to look at, with half of that
/// room free.
#[test]
fn little_room_for_mappings_is_told_before_writes_are_refused() {
    let mut scene = Scene::new(34, 2);
    scene.create(Level::Raid1);
    let pool = scene.open();
    for name in ["v", "w"] {
        scene.ask(pool.create_volume(name, 64 << 30)).unwrap();
    }
    for at in 0..10 {
        scene.write(&pool, "w", at * APART, &pattern(1, 4096));
    }
    let is_told = |pool: &Pool| {
        let view = pool.view();
        let free = (view.metadata_bytes - view.metadata_used_bytes) * 100 / view.metadata_bytes;
        let begin = format!("{free} % of its room for mappings is free, ");
        let found: Vec<String> =
            view.troubles.iter().filter(|trouble| trouble.contains("mappings")).cloned().collect();
        assert!(found.len() <= 1 && found.iter().all(|trouble| trouble.starts_with(&begin)), "{found:?}");
        assert_eq!(found.len() == 1, free < 10, "{free} % is free: {found:?}");
        found.len() == 1
    };
    let (mut written, mut told) = (0, 0);
    let full = loop {
        scene.wait(Duration::from_secs(2));
        told += u32::from(is_told(&pool));
        match scene.io(&pool, "v", WRITE, written * APART, &pattern(2, 4096)).0 {
            Ok(()) => written += 1,
            Err(status) => break status,
        }
    };
    assert_eq!(full, Status::NoSpace);
    assert!(told > 2 && written > 10, "{told} times of {written}");
    let view = pool.view();
    assert_eq!(view.metadata_used_bytes, view.metadata_bytes, "all of it is used: {view:?}");
    assert!(view.free_bytes > view.size_bytes / 4, "{view:?}");
    scene.ask(pool.delete_volume("w")).unwrap();
    scene.wait(Duration::from_secs(3));
    assert!(!is_told(&pool), "what helps is to delete something");
    scene.write(&pool, "v", written * APART, &pattern(3, 4096));
}

#[test]
fn a_write_that_waits_for_space_is_counted_while_it_waits() {
    let mut scene = Scene::new(31, 2);
    scene.create(Level::Raid1);
    let devices = scene.devices();
    let pool = scene.open_with(devices, |options| options.no_space = NoSpacePolicy::Wait);
    scene.ask(pool.create_volume("v", 64 << 20)).unwrap();
    let count = |pool: &Pool| {
        let volumes = pool.volumes();
        volumes[0].slow.iter().find(|(class, _)| *class == "no_space").unwrap().1
    };
    let extents = pool.view().size_bytes >> 16;
    for extent in 0..extents {
        scene.write(&pool, "v", extent << 16, &pattern(1, 64 << 10));
    }
    assert_eq!(count(&pool), 0);
    let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
    let ended = Rc::new(Cell::new(false));
    let told = Rc::clone(&ended);
    scene.reactors[0].runtime().spawn(async move {
        told.set(client.io(WRITE, extents << 16, pattern(2, 64 << 10)).await.0.is_ok());
    });
    scene.wait(Duration::from_secs(5));
    assert!(!ended.get(), "it waits");
    assert_eq!(count(&pool), 1, "once, however often it looks");
    assert_eq!(scene.io(&pool, "v", Operation::Discard, 0, &vec![0; 64 << 10]).0, Ok(()));
    scene.wait(Duration::from_secs(5));
    assert!(ended.get());
}

/// A disk that is thin itself, and shows where nothing is.
fn thin_disk(number: u8) -> Arc<SimDisk> {
    thin_disk_that(false, number)
}

fn thin_disk_that(reads_zeroes: bool, number: u8) -> Arc<SimDisk> {
    let geometry = Geometry {
        volatile_cache: true,
        discard: Some(hawser_block::DiscardLimits {
            blocks_max: 1 << 12,
            granularity_blocks: 8,
            reads_zeroes,
        }),
        ..Geometry::new(BlockSize::B512, 16 << 11)
    };
    Arc::new(SimDisk::new(&format!("d{number}"), geometry, [0xE0 + number; 16]))
}

#[test]
fn members_are_told_of_what_is_free_when_that_is_durable_and_only_if_asked_to() {
    for (level, members) in [(Level::Raid1, 2), (Level::Raid10, 3), (Level::Linear, 2)] {
        for discard in [true, false] {
            let mut scene = Scene::new(32, members);
            scene.disks = (0..members).map(thin_disk).collect();
            scene.create(level);
            let devices = scene.devices();
            let pool = scene.open_with(devices, |options| options.discard = discard);
            scene.ask(pool.create_volume("v", 8 << 20)).unwrap();
            scene.ask(pool.create_volume("w", 8 << 20)).unwrap();
            // Nothing else has such a byte.
            for extent in 0..8 {
                scene.write(&pool, "v", (extent * 2) << 16, &vec![0xAB; 64 << 10]);
                scene.write(&pool, "w", extent << 16, &vec![0xCD; 64 << 10]);
            }
            let copies = if level.is_redundant() { 2 } else { 1 };
            let count = |scene: &Scene, byte: u8| -> usize {
                let disks = scene.disks.iter();
                disks.map(|disk| disk.state().snapshot().iter().filter(|it| **it == byte).count()).sum()
            };
            let all = copies * ((8 * 64) << 10);
            assert!(count(&scene, 0xAB) >= all);
            let gone = scene.io(&pool, "v", Operation::Discard, 0, &vec![0; 1 << 20]);
            assert_eq!(gone.0, Ok(()));
            assert!(count(&scene, 0xAB) >= all, "not before it is durable that nobody has it");
            scene.wait(Duration::from_secs(10));
            let left = count(&scene, 0xAB);
            match discard {
                true => assert!(left < 4096, "{level:?}: {left}"),
                false => assert!(left >= all, "{level:?}: {left}"),
            }
            assert!(count(&scene, 0xCD) >= all, "what somebody has is there");
            for extent in 0..8 {
                assert_eq!(scene.read(&pool, "w", extent << 16, 64 << 10), vec![0xCD; 64 << 10]);
                scene.write(&pool, "v", extent << 16, &pattern(9, 4096));
                assert_eq!(scene.read(&pool, "v", extent << 16, 4096), pattern(9, 4096));
                assert_eq!(scene.read(&pool, "v", (extent << 16) + 4096, 4096), vec![0; 4096]);
            }
            scene.ask(pool.close()).unwrap();
            drop(pool);
            scene.check();
        }
    }
}

/// What nobody has needs no parity either: all of the stripes is given back, and goes together as zeroes do.
#[test]
fn parity_of_what_is_free_is_given_back_too() {
    for (level, members) in [(Level::Raid5, 3), (Level::Raid5, 4), (Level::Raid6, 4), (Level::Raid6, 5)] {
        let mut scene = Scene::new(34, members);
        scene.disks = (0..members).map(|number| thin_disk_that(true, number)).collect();
        scene.create(level);
        let devices = scene.devices();
        let pool = scene.open_with(devices, |options| options.discard = true);
        for (volume, seed) in [("v", 1), ("w", 2)] {
            scene.ask(pool.create_volume(volume, 4 << 20)).unwrap();
            scene.write(&pool, volume, 0, &noise(seed, 2 << 20));
        }
        scene.flush(&pool, "w");
        let data = usize::try_from(scene.pool_data()).unwrap() * 512;
        let used = |scene: &Scene| -> Vec<usize> {
            let is_used = |block: &&[u8]| block.iter().any(|byte| *byte != 0);
            let disks = scene.disks.iter().map(|disk| disk.state().snapshot());
            disks.map(|bytes| bytes[data..].chunks(4096).filter(is_used).count()).collect()
        };
        let before = used(&scene);
        scene.ask(pool.delete_volume("v")).unwrap();
        scene.wait(Duration::from_secs(10));
        // Half of each member, whether it was data or parity there, but for extents that only one of them has a part of.
        for (left, before) in used(&scene).into_iter().zip(before) {
            assert!(left * 20 <= before * 11, "{level} on {members}: {left} of {before} blocks");
        }
        assert_eq!(scene.read(&pool, "w", 0, 2 << 20), noise(2, 2 << 20));
        scene.ask(pool.scrub(false)).unwrap();
        scene.wait(Duration::from_secs(30));
        let scrub = pool.view().tasks.into_iter().rev().find(|task| task.kind == "scrub").unwrap();
        assert!(scrub.is_done && scrub.mismatches == 0, "{scrub:?}");
        scene.ask(pool.close()).unwrap();
        drop(pool);
        scene.check();
    }
}

/// A discard that a member carries out late would destroy what was written meanwhile.
#[test]
fn an_extent_is_not_used_again_while_a_discard_of_it_is_under_way() {
    let mut scene = Scene::new(33, 1);
    scene.disks = vec![thin_disk(0)];
    scene.create(Level::Linear);
    let held = Arc::new(HeldDevice::new(scene.devices().remove(0)));
    let devices = vec![Arc::clone(&held) as Arc<dyn Device>];
    let pool = scene.open_with(devices, |options| options.discard = true);
    scene.ask(pool.create_volume("v", 64 << 20)).unwrap();
    let extents = pool.view().size_bytes >> 16;
    for extent in 0..extents {
        scene.write(&pool, "v", extent << 16, &pattern(1, 64 << 10));
    }
    held.hold(|request| request.operation == Operation::Discard);
    assert_eq!(scene.io(&pool, "v", Operation::Discard, 0, &vec![0; 64 << 10]).0, Ok(()));
    scene.wait(Duration::from_secs(10));
    assert_eq!(held.held(), 1);
    let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
    let outcome = Rc::new(Cell::new(None));
    let told = Rc::clone(&outcome);
    scene.reactors[0].runtime().spawn(async move {
        told.set(Some(client.io(WRITE, extents << 16, pattern(7, 64 << 10)).await.0));
    });
    scene.wait(Duration::from_secs(5));
    assert_ne!(outcome.get(), Some(Ok(())), "it has the extent");
    held.release();
    scene.wait(Duration::from_secs(5));
    if outcome.get() != Some(Ok(())) {
        scene.write(&pool, "v", extents << 16, &pattern(7, 64 << 10));
    }
    assert_eq!(scene.read(&pool, "v", extents << 16, 64 << 10), pattern(7, 64 << 10));
}
