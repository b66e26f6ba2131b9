//! Members that die, come back, lack something, or were used without each other.

use super::*;

/// A pool of which a member was out of reach was called ready until somebody wrote, and one without redundancy for good.
#[test]
fn a_member_that_is_out_of_reach_is_told_before_anybody_asks_for_it() {
    for (level, members) in LEVELS.into_iter().filter(|(_, members)| *members > 1) {
        let mut scene = Scene::new(5, members);
        scene.create(level);
        let pool = scene.open();
        scene.wait(Duration::from_secs(2));
        assert!(!pool.view().is_degraded, "{level:?} {:?}", pool.view());
        scene.disks[1].fail_all(Some(Status::Path));
        scene.wait(Duration::from_secs(2));
        assert!(pool.view().is_degraded, "{level:?}");
        scene.disks[1].fail_all(None);
        scene.wait(Duration::from_secs(20));
        assert!(!pool.view().is_degraded, "{level:?} {:?}", pool.view());
    }
}

#[test]
fn a_member_that_dies_is_put_out_and_comes_back() {
    for (level, members) in LEVELS.into_iter().filter(|(level, _)| level.is_redundant()) {
        let mut scene = Scene::new(4, members);
        scene.create(level);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 4 << 20)).unwrap();
        scene.write(&pool, "v", 0, &pattern(1, 256 << 10));
        scene.disks[1].state().errors_permille = 1000;
        scene.write(&pool, "v", 4096, &pattern(2, 256 << 10));
        let mut want = vec![0; 1 << 20];
        want[..256 << 10].copy_from_slice(&pattern(1, 256 << 10));
        want[4096..4096 + (256 << 10)].copy_from_slice(&pattern(2, 256 << 10));
        assert!(scene.read(&pool, "v", 0, 1 << 20) == want, "{level:?} degraded");
        assert!(pool.view().is_degraded);
        assert_eq!(pool.view().members[1].state, MemberState::Stale);
        scene.disks[1].state().errors_permille = 0;
        scene.wait(Duration::from_secs(20));
        assert!(!pool.view().is_degraded, "{level:?} {:?}", pool.view());
        // Each copy alone.
        scene.ask(pool.scrub(false)).unwrap();
        scene.wait(Duration::from_secs(5));
        let view = pool.view();
        let scrub = view.tasks.iter().find(|task| task.kind == "scrub").expect("it was run");
        assert!(scrub.is_done && scrub.mismatches == 0, "{level:?} {scrub:?}");
        scene.ask(pool.close()).unwrap();
        scene.check();
    }
}

/// A member was away when the pool was opened, and had everything again; but its own superblock, of an earlier opening, could not be written. It was
/// read from all the same, and the next look at who owns the pool took that superblock for another host's: no more writes.
#[test]
fn a_member_that_cannot_be_told_that_it_is_whole_stays_out() {
    let mut scene = Scene::new(10, 2);
    scene.create(Level::Raid1);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    scene.ask(pool.close()).unwrap();
    scene.disks[0].fail_all(Some(Status::Path));
    let alone = vec![Arc::clone(&scene.disks[1]) as Arc<dyn Device>];
    let pool = scene.try_open(alone, true).unwrap();
    scene.write(&pool, "v", 0, &pattern(1, 64 << 10));
    scene.disks[0].fail_all(None);
    // Its superblocks, and nothing else of it.
    scene.disks[0].state().unwritable = 0..(1 << 20) / 512;
    let _ = scene.ask(pool.add_member(Arc::clone(&scene.disks[0]) as Arc<dyn Device>));
    scene.wait(Duration::from_secs(30));
    assert_ne!(pool.view().members[0].state, MemberState::InSync, "{:?}", pool.view().members);
    scene.write(&pool, "v", 0, &pattern(2, 64 << 10));
    scene.disks[0].state().unwritable = 0..0;
    scene.wait(Duration::from_secs(30));
    assert_eq!(pool.view().members[0].state, MemberState::InSync, "{:?}", pool.view().members);
    scene.ask(pool.close()).unwrap();
    scene.check();
}

/// A member that was brought up to date lost its cache, with what it had been given and nobody had flushed. The next FLUSH for the marks of regions was
/// one of the new cache; marks were cleared by it, and when the member's loss was looked at, nothing said any more what it lacked.
#[test]
fn a_member_that_loses_its_cache_on_the_way_back_gets_everything_again() {
    let mut scene = Scene::new(11, 2);
    scene.disks.iter().for_each(|disk| disk.state().cache_identity = Some([1; 16]));
    scene.create(Level::Raid1);
    let options = OpenOptions {
        // A region takes a second, and marks are cleared soon.
        sync_bytes_per_second: 512 << 10,
        intent_idle: Duration::from_millis(1),
        ..OpenOptions::new(HOST, Box::new(scene.tail.clone()))
    };
    let handle = scene.reactors[0].runtime().handle();
    let opened = Pool::open(&handle, scene.devices(), options);
    let pool = scene.ask(opened).unwrap();
    scene.ask(pool.create_volume("v", 4 << 20)).unwrap();
    scene.disks[1].fail_all(Some(Status::Path));
    scene.write(&pool, "v", 0, &pattern(1, 256 << 10));
    for at in 1..8 {
        scene.write(&pool, "v", at * (256 << 10), &pattern(1, 256 << 10));
    }
    assert_eq!(pool.view().members[1].state, MemberState::Stale);
    scene.disks[1].fail_all(None);
    while pool.view().members[1].state != MemberState::Syncing {
        scene.wait(Duration::from_millis(10));
    }
    scene.wait(Duration::from_millis(1500));
    scene.disks[1].lose_power();
    while pool.view().members[1].state != MemberState::InSync {
        scene.wait(Duration::from_secs(1));
    }
    scene.ask(pool.close()).unwrap();
    drop(pool);
    let alone = vec![Arc::clone(&scene.disks[1]) as Arc<dyn Device>];
    let pool = scene.try_open(alone, true).unwrap();
    for at in 0..8 {
        assert!(scene.read(&pool, "v", at * (256 << 10), 256 << 10) == pattern(1, 256 << 10), "at {at}");
    }
}

/// Its own superblock still said that it had everything, from before it was away, while it was half overwritten: alone it was opened, degraded.
#[test]
fn a_member_that_is_half_brought_up_to_date_is_of_no_use_alone() {
    let mut scene = Scene::new(12, 2);
    scene.create(Level::Raid1);
    let options = OpenOptions {
        sync_bytes_per_second: 512 << 10,
        ..OpenOptions::new(HOST, Box::new(scene.tail.clone()))
    };
    let handle = scene.reactors[0].runtime().handle();
    let opened = Pool::open(&handle, scene.devices(), options);
    let pool = scene.ask(opened).unwrap();
    scene.ask(pool.create_volume("v", 4 << 20)).unwrap();
    scene.disks[1].fail_all(Some(Status::Path));
    for at in 0..8 {
        scene.write(&pool, "v", at * (256 << 10), &pattern(1, 256 << 10));
    }
    scene.disks[1].fail_all(None);
    while pool.view().members[1].state != MemberState::Syncing {
        scene.wait(Duration::from_millis(10));
    }
    drop(pool);
    scene.kill();
    let alone = vec![Arc::clone(&scene.disks[1]) as Arc<dyn Device>];
    let Err(PoolError::Conflict(what)) = scene.try_open(alone, true) else { panic!("it was taken") };
    assert!(what.contains("lacks data without its members 0"), "{what}");
}

/// A member was away while both others were replaced one after the other. It was taken back as what is behind at the next opening, of which it was not
/// told; at the one after that it trusted nobody who was left, nobody trusted it, and the pool was refused.
#[test]
fn a_member_that_was_away_while_the_others_were_replaced_is_taken_for_what_is_behind() {
    let mut scene = Scene::new(13, 5);
    let spares = scene.disks.split_off(3);
    scene.create(Level::Raid1);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", 4 << 20)).unwrap();
    scene.write(&pool, "v", 0, &pattern(1, 64 << 10));
    scene.disks[2].fail_all(Some(Status::Path));
    scene.write(&pool, "v", 0, &pattern(2, 64 << 10));
    for (place, disk) in spares.into_iter().enumerate() {
        let device = Arc::clone(&disk) as Arc<dyn Device>;
        scene.ask(pool.replace(&place.to_string(), device, false)).unwrap();
        scene.disks[place] = disk;
        let name = scene.disks[place].name().to_owned();
        let is_there = |pool: &Pool| {
            let member = &pool.view().members[place];
            member.state == MemberState::InSync && member.device.as_deref() == Some(&name)
        };
        while !is_there(&pool) {
            scene.wait(Duration::from_secs(1));
        }
    }
    scene.ask(pool.close()).unwrap();
    scene.disks[2].fail_all(None);
    for _ in 0..2 {
        let pool = scene.open();
        // Before it has joined.
        assert_eq!(pool.view().members[2].state, MemberState::Stale);
        scene.ask(pool.close()).unwrap();
    }
    let pool = scene.open();
    scene.wait(Duration::from_secs(20));
    assert!(!pool.view().is_degraded, "{:?}", pool.view().members);
}

/// A resync copies a region to each member in turn, from the first that can be read. When the first could not be read for one of them, that one was
/// its own source: it kept what it had, and the region counted as the same everywhere.
#[test]
fn a_resync_whose_source_fails_a_read_leaves_no_difference() {
    for reads in 0..4 {
        let mut scene = Scene::new(14, 2);
        scene.create(Level::Raid1);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        scene.write(&pool, "v", 0, &pattern(1, 64 << 10));
        drop(pool);
        scene.kill();
        // What was under way reached one of them: the region is marked.
        let place = {
            let mut disk = scene.disks[1].state();
            let written = pattern(1, 4096);
            let at = (0..disk.content.len() - 4096)
                .step_by(512)
                .find(|at| *disk.content.get(*at..at + 4096) == written);
            let at = at.expect("it is there");
            disk.content.write(at, &[7; 4096]);
            at as u64 / 512
        };
        scene.disks[0].state().read_that_fails = Some((place..place + 8, reads));
        let pool = scene.open();
        scene.wait(Duration::from_secs(5));
        scene.ask(pool.close()).unwrap();
        drop(pool);
        let (one, other) = (scene.disks[0].state(), scene.disks[1].state());
        let range = usize::try_from(place * 512).unwrap()..usize::try_from(place * 512 + 4096).unwrap();
        assert!(one.content.get(range.clone()) == other.content.get(range), "after {reads} reads");
    }
}

#[test]
fn members_that_were_used_without_each_other_are_refused() {
    let mut scene = Scene::new(5, 2);
    scene.create(Level::Raid1);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", 4 << 20)).unwrap();
    scene.ask(pool.close()).unwrap();
    let devices = scene.devices();
    for device in &devices {
        let alone = vec![Arc::clone(device)];
        assert!(matches!(scene.try_open(alone.clone(), false), Err(PoolError::Conflict(_))));
        let pool = scene.try_open(alone, true).unwrap();
        scene.write(&pool, "v", 0, &pattern(1, 4096));
        scene.ask(pool.close()).unwrap();
    }
    let Err(PoolError::Conflict(what)) = scene.try_open(devices, true) else { panic!("both were taken") };
    assert!(what.contains("were each used without the other"), "{what}");
}
