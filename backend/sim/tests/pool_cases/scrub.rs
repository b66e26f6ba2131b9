//! Members that are compared: what is told of what could not be, what nobody but a partial names, and scrubs that a death or another host interrupts.

use super::*;
use hawser_volume::pool::TaskView;
use orders::noise;
use std::ops::Range;

const REDUNDANT: [(Level, u8); 4] =
    [(Level::Raid1, 2), (Level::Raid10, 4), (Level::Raid5, 3), (Level::Raid6, 5)];

fn task(pool: &Pool) -> Option<TaskView> {
    pool.view().tasks.into_iter().rev().find(|task| task.kind == "scrub")
}

/// Waits for the end of a scrub.
fn ended(scene: &mut Scene, pool: &Pool) -> TaskView {
    for _ in 0..600 {
        scene.wait(Duration::from_millis(200));
        if let Some(task) = task(pool).filter(|task| task.is_done) {
            return task;
        }
    }
    panic!("it does not end: {:?}", pool.view());
}

fn scrub(scene: &mut Scene, pool: &Pool, repair: bool) -> TaskView {
    scene.ask(pool.scrub(repair)).unwrap();
    ended(scene, pool)
}

/// A pool with a volume of 1 MiB, of which this is written and durable.
fn written(seed: u64, (level, members): (Level, u8), data: &[u8]) -> (Scene, Pool) {
    let mut scene = Scene::new(seed, members);
    scene.create(level);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    scene.write(&pool, "v", 0, data);
    scene.flush(&pool, "v");
    (scene, pool)
}

fn open_slow(scene: &mut Scene, bytes_per_second: u64) -> Pool {
    let options = OpenOptions {
        sync_bytes_per_second: bytes_per_second,
        ..OpenOptions::new(HOST, Box::new(scene.tail.clone()))
    };
    let handle = scene.reactors[0].runtime().handle();
    let opened = Pool::open(&handle, scene.devices(), options);
    scene.ask(opened).unwrap()
}

/// The last disk that has these bytes among its data, and where.
fn find(scene: &Scene, bytes: &[u8]) -> (usize, usize) {
    let on = |disk: &Arc<SimDisk>| {
        let content = disk.state().snapshot();
        let label = Superblock::decode(&content[4096..8192]).unwrap().unwrap();
        let first = usize::try_from(label.layout.data_offset()).unwrap();
        (first..content.len() - bytes.len()).step_by(512).find(|at| content[*at..at + bytes.len()] == *bytes)
    };
    let mut disks = scene.disks.iter().map(on).enumerate();
    disks.rfind(|(_, at)| at.is_some()).map(|(disk, at)| (disk, at.unwrap())).expect("it is there")
}

fn flip(scene: &Scene, (disk, at): (usize, usize)) {
    scene.disks[disk].state().content.change(at..at + 1)[0] ^= 0x10;
}

/// The scrub that a disk's superblock names: whether it has begun, and how far it is.
fn recorded(scene: &Scene, disk: usize) -> Option<u64> {
    let page = scene.disks[disk].state().snapshot()[4096..8192].to_vec();
    Superblock::decode(&page).unwrap().unwrap().scrub.map(|scrub| scrub.done)
}

/// It was taken, and nobody came to begin it: who waited for its end waited for ever.
#[test]
fn a_pool_that_takes_no_writes_is_not_scrubbed_and_says_why() {
    let mut scene = Scene::new(50, 2);
    scene.create(Level::Raid1);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    scene.ask(pool.lose("another host has opened it")).unwrap();
    let want = "pool p0: cannot be scrubbed: another host has opened it".to_owned();
    assert_eq!(scene.ask(pool.scrub(true)), Err(PoolError::Failed(want)));
    assert!(task(&pool).is_none());
}

/// What was not looked at counted as the same.
#[test]
fn a_scrub_that_is_cut_short_says_so() {
    for after in [Duration::ZERO, Duration::from_secs(2)] {
        for (level, members) in REDUNDANT {
            let mut scene = Scene::new(51, members);
            scene.create(level);
            let pool = open_slow(&mut scene, 256 << 10);
            scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
            scene.write(&pool, "v", 0, &pattern(1, 1 << 20));
            scene.ask(pool.scrub(false)).unwrap();
            scene.wait(after);
            assert!(!task(&pool).unwrap().is_done);
            scene.ask(pool.lose("another host has opened it")).unwrap();
            let task = ended(&mut scene, &pool);
            assert_eq!(task.cut_short.as_deref(), Some("another host has opened it"), "{level}: {task:?}");
            // Whoever has the pool now goes on with it.
            assert!(recorded(&scene, 0).is_some());
        }
    }
}

/// A copy that failed with anything but a medium's error counted as nothing.
#[test]
fn a_copy_that_cannot_be_compared_is_counted() {
    for (level, members) in REDUNDANT {
        let (mut scene, pool) = written(52, (level, members), &pattern(1, 256 << 10));
        let task = scrub(&mut scene, &pool, false);
        assert_eq!((task.mismatches, task.failures, task.cut_short), (0, 0, None), "{level}");
        let (disk, at) = find(&scene, &pattern(1, 256 << 10)[4096..8192]);
        let block = at as u64 / 512;
        {
            let mut state = scene.disks[disk].state();
            state.read_that_fails = Some((block..block + 1, 0));
            state.error = Status::Path;
        }
        let task = scrub(&mut scene, &pool, false);
        assert_eq!((task.mismatches, task.failures), (0, 1), "{level}");
        // A member that is away cannot be compared either.
        scene.disks[1].fail_all(Some(Status::Path));
        scene.write(&pool, "v", 0, &pattern(1, 256 << 10));
        let task = scrub(&mut scene, &pool, false);
        assert!(task.mismatches == 0 && task.failures > 0, "{level}: {task:?}");
    }
}

/// What could not be rewritten was said to have been.
#[test]
fn a_unit_that_cannot_be_rewritten_is_counted() {
    for (level, members) in REDUNDANT {
        for error in [Status::Path, Status::Invalid] {
            let (mut scene, pool) = written(53, (level, members), &pattern(1, 256 << 10));
            let place = find(&scene, &pattern(1, 256 << 10)[4096..8192]);
            flip(&scene, place);
            {
                let state = |disk: usize| scene.disks[disk].state();
                for disk in 0..usize::from(members) {
                    state(disk).error = error;
                    // RAID 5 does not know who is wrong, and writes parity.
                    if disk == place.0 || level == Level::Raid5 {
                        state(disk).unwritable = (2 << 20) / 512..u64::MAX;
                    }
                }
            }
            let found = scrub(&mut scene, &pool, true);
            match error {
                // One that is out is not compared from then on.
                Status::Path => assert!(found.failures >= 1, "{level}: {found:?}"),
                _ => assert_eq!(found.failures, 1, "{level}: {found:?}"),
            }
            assert!(found.mismatches <= 1, "{level} {error:?}: {found:?}");
        }
    }
}

/// After its snapshot is deleted, an old extent is named by the partial that covers some of it, and by nobody else: it was not compared.
#[test]
fn what_only_a_partial_names_is_compared() {
    for (level, members) in REDUNDANT {
        let mut scene = Scene::new(54, members);
        scene.create(level);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        let old = pattern(1, 256 << 10);
        scene.write(&pool, "v", 0, &old);
        scene.ask(pool.snapshot(vec![("v".to_owned(), "s".to_owned())])).unwrap();
        scene.write(&pool, "v", 8192, &pattern(2, 4096));
        scene.flush(&pool, "v");
        let under = find(&scene, &old[8192..12288]);
        let beside = find(&scene, &old[4096..8192]);
        // Found once, though the snapshot shows it too.
        flip(&scene, beside);
        assert_eq!(scrub(&mut scene, &pool, false).mismatches, 1, "{level}");
        scene.ask(pool.delete_volume("s")).unwrap();
        assert_eq!(scrub(&mut scene, &pool, false).mismatches, 1, "{level}: nobody else names it");
        flip(&scene, beside);
        assert_eq!(scrub(&mut scene, &pool, false).mismatches, 0, "{level}");
        if level == Level::Raid1 {
            // Nobody can read what is under the new unit.
            flip(&scene, under);
            assert_eq!(scrub(&mut scene, &pool, false).mismatches, 0, "{level}");
        }
        scene.ask(pool.close()).unwrap();
    }
}

/// It was known to the process only: a death, or an end in order, was the end of it.
#[test]
fn a_scrub_goes_on_after_a_death_and_knows_what_it_has_found() {
    for dies in [true, false] {
        for (level, members) in REDUNDANT {
            let what = format!("{level} {dies}");
            let mut scene = Scene::new(55, members);
            scene.create(level);
            let pool = open_slow(&mut scene, 1 << 20);
            scene.ask(pool.create_volume("u", 1 << 20)).unwrap();
            scene.ask(pool.create_volume("v", 4 << 20)).unwrap();
            scene.write(&pool, "u", 0, &pattern(1, 512 << 10));
            scene.write(&pool, "v", 0, &pattern(2, 2 << 20));
            scene.flush(&pool, "v");
            let early = find(&scene, &pattern(1, 4096));
            flip(&scene, early);
            assert_eq!(recorded(&scene, 1), None);
            scene.ask(pool.scrub(false)).unwrap();
            assert_eq!(recorded(&scene, 1), Some(0), "{what}");
            scene.wait(Duration::from_secs(3));
            let before = task(&pool).unwrap();
            assert!(!before.is_done && before.mismatches == 1, "{what}: {before:?}");
            assert!(before.done_bytes > 1 << 20, "{what}: {before:?}");
            // Whoever looked again would find nothing here.
            flip(&scene, early);
            if !dies {
                scene.ask(pool.close()).unwrap();
            }
            drop(pool);
            scene.kill();
            let pool = open_slow(&mut scene, 1 << 20);
            let at_once = task(&pool).unwrap();
            assert!(!at_once.is_done && at_once.mismatches == 1, "{what}: {at_once:?}");
            let again = scene.ask(pool.scrub(true));
            assert_eq!(again, Err(PoolError::Conflict("pool p0 is being scrubbed".to_owned())));
            let after = ended(&mut scene, &pool);
            assert_eq!((after.mismatches, after.failures, &after.cut_short), (1, 0, &None), "{what}");
            assert!(after.total_bytes + (1 << 20) <= before.total_bytes, "{what}: {after:?} of {before:?}");
            assert_eq!(recorded(&scene, 1), None, "{what}");
            drop(pool);
            scene.kill();
            let pool = scene.open();
            assert!(task(&pool).is_none(), "{what}: it has ended");
            scene.ask(pool.close()).unwrap();
        }
    }
}

/// What all members hold.
fn contents(scene: &Scene, blocks: &Range<usize>) -> Vec<Vec<u8>> {
    let of = |disk: &Arc<SimDisk>| disk.state().content.get(blocks.clone()).into_owned();
    scene.disks.iter().map(of).collect()
}

/// Where a set's data begins on its members.
fn first(scene: &Scene) -> usize {
    let book = Superblock::decode(&scene.disks[0].state().content.get(4096..8192)).unwrap().unwrap();
    usize::try_from(book.layout.data_offset()).unwrap()
}

/// After so many reads of a member's first 4 KiB of data, one fails with what says nothing of the medium.
fn fail_a_read(scene: &Scene, disk: usize, after: u64, error: Status) {
    let block = first(scene) as u64 / 512;
    let mut state = scene.disks[disk].state();
    state.read_that_fails = Some((block..block + 8, after));
    state.error = error;
}

/// A member did not answer for a moment. What the others say was written over what it has, with or without `--repair`: where parity was wrong, and
/// nobody knew, over the only good data that there was.
#[test]
fn what_a_member_does_not_say_for_a_moment_is_not_overwritten() {
    for (level, members) in [(Level::Raid5, 3), (Level::Raid6, 5)] {
        for (error, repair) in [(Status::Path, false), (Status::Timeout, true), (Status::Path, true)] {
            let what = format!("{level} {error:?} {repair}");
            let (mut scene, pool) = written(56, (level, members), &noise(1, 256 << 10));
            let first = first(&scene);
            // Row 0 has P on the last member; member 1 has data.
            flip(&scene, (usize::from(members) - 1, first));
            fail_a_read(&scene, 1, 0, error);
            let before = contents(&scene, &(first..first + (256 << 10)));
            let task = scrub(&mut scene, &pool, repair);
            assert_eq!((task.mismatches, task.failures), (0, 1), "{what}");
            assert!(
                contents(&scene, &(first..first + (256 << 10))) == before,
                "{what}: something was written"
            );
            let task = scrub(&mut scene, &pool, true);
            assert_eq!((task.mismatches, task.failures), (1, 0), "{what}");
            assert!(scene.read(&pool, "v", 0, 256 << 10) == noise(1, 256 << 10), "{what}");
            assert_eq!(scrub(&mut scene, &pool, false).mismatches, 0, "{what}");
        }
    }
}

/// The first copy was compared, and then read again to be written over the one that differed. That time it did not answer, and got the content of the other,
/// which was wrong.
#[test]
fn a_copy_is_made_that_of_the_first_though_that_falls_silent() {
    for (level, members) in [(Level::Raid1, 2), (Level::Raid1, 3), (Level::Raid10, 4)] {
        for after in [1, 2, 0] {
            let what = format!("{level} of {members}, after {after}");
            let (mut scene, pool) = written(57, (level, members), &noise(1, 256 << 10));
            let first = first(&scene);
            flip(&scene, (1, first));
            fail_a_read(&scene, 0, after, Status::Path);
            let before = contents(&scene, &(first..first + 4096));
            let task = scrub(&mut scene, &pool, true);
            let now = contents(&scene, &(first..first + 4096));
            assert!(now[0] == before[0], "{what}: the first copy was overwritten");
            // While it is silent nobody can say which of the others is to be as it is.
            assert_eq!(task.failures, u64::from(after == 0), "{what}");
            assert_eq!(now[1] == before[0], after > 0, "{what}");
            scene.disks[0].state().read_that_fails = None;
            scrub(&mut scene, &pool, true);
            assert_eq!(scrub(&mut scene, &pool, false).mismatches, 0, "{what}");
            assert!(contents(&scene, &(first..first + 4096))[1] == before[0], "{what}");
        }
    }
}

/// Parity of a region that a death has left marked was made again while a member did not answer: what that has was computed from parity that was wrong, and
/// counted as right from then on.
#[test]
fn parity_is_not_made_of_what_a_member_does_not_say() {
    for (level, members) in [(Level::Raid5, 3), (Level::Raid6, 5)] {
        let (mut scene, pool) = written(58, (level, members), &noise(1, 256 << 10));
        // From here on nothing is written without the log: parity is not in doubt.
        scene.ask(pool.close()).unwrap();
        drop(pool);
        let pool = scene.open();
        let more = noise(1, 256 << 10)[8192..12288].to_vec();
        scene.write(&pool, "v", 8192, &more);
        drop(pool);
        scene.kill();
        flip(&scene, (usize::from(members) - 1, first(&scene)));
        fail_a_read(&scene, 1, 0, Status::Path);
        let pool = scene.open();
        scene.wait(Duration::from_secs(10));
        assert_eq!(pool.view().unsynced_regions, 0, "{level}");
        assert!(scene.disks[1].state().read_that_fails.is_none(), "{level}: it was read");
        assert_eq!(scene.differing(&pool), 0, "{level}");
        assert!(scene.read(&pool, "v", 0, 256 << 10) == noise(1, 256 << 10), "{level}");
    }
}

/// An extent was given back, and discarded, while a scrub was at it: the zeroes that one member had by then, beside what others had had before, counted as
/// a fault, and on RAID 6 as that of a member that was all right.
#[test]
fn what_is_given_back_while_it_is_compared_is_no_fault() {
    for (level, members) in REDUNDANT {
        for repair in [false, true] {
            let what = format!("{level} {repair}");
            let mut scene = Scene::sized(59, members, 16 << 11);
            scene.create(level);
            let mut devices = scene.devices();
            let held = Arc::new(HeldDevice::new(Arc::clone(&devices[1])));
            devices[1] = Arc::clone(&held) as Arc<dyn Device>;
            let pool = scene.open_quietly(devices, |options| options.discard = true).unwrap();
            scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
            scene.ask(pool.create_volume("w", 1 << 20)).unwrap();
            scene.write(&pool, "v", 0, &noise(1, 256 << 10));
            scene.write(&pool, "w", 0, &noise(2, 64 << 10));
            scene.flush(&pool, "v");
            let (first, len) = (first(&scene), 4096);
            let begins = contents(&scene, &(first..first + len));
            let data = first as u64 / 512;
            held.hold_one(move |request| request.operation == Operation::Read && request.lba.0 >= data);
            scene.ask(pool.scrub(repair)).unwrap();
            scene.wait(Duration::from_secs(1));
            assert_eq!(held.held(), 1, "{what}: it waits for member 1");
            assert_eq!(scene.io(&pool, "v", Operation::Discard, 0, &vec![0; 256 << 10]).0, Ok(()));
            scene.wait(Duration::from_secs(10));
            assert!(contents(&scene, &(first..first + len)) != begins, "{what}: it is discarded");
            held.release();
            let task = ended(&mut scene, &pool);
            let wrong: u64 = pool.view().members.iter().map(|member| member.wrong).sum();
            assert_eq!((task.mismatches, task.failures, wrong), (0, 0, 0), "{what}");
            assert!(scene.read(&pool, "w", 0, 64 << 10) == noise(2, 64 << 10), "{what}");
            scene.ask(pool.close()).unwrap();
        }
    }
}
