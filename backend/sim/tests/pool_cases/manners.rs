//! Work that nobody waits for beside requests that somebody does.

use super::*;

/// A pool that has lost a member with all its data, and gets it back: it is about to be made anew.
fn syncing(seed: u64, bytes_per_second: u64) -> (Scene, Pool) {
    let mut scene = Scene::new(seed, 3);
    let options = CreateOptions {
        strip_bytes: 64 << 10,
        extent_bytes: 128 << 10,
        region_bytes: 4 << 20,
        log_bytes: 64 << 10,
        metadata_bytes: Some(1 << 20),
        ..CreateOptions::new("p0", [9; 16], Level::Raid5)
    };
    let handle = scene.reactors[0].runtime().handle();
    let created = pool::create(&handle, scene.devices(), options);
    scene.ask(created).unwrap();
    let options = OpenOptions {
        sync_bytes_per_second: bytes_per_second,
        ..OpenOptions::new(HOST, Box::new(scene.tail.clone()))
    };
    let opened = Pool::open(&handle, scene.devices(), options);
    let pool = scene.ask(opened).unwrap();
    scene.ask(pool.create_volume("v", 8 << 20)).unwrap();
    scene.disks[2].fail_all(Some(Status::Path));
    for at in 0..32 {
        scene.write(&pool, "v", at * (256 << 10), &pattern(1, 256 << 10));
    }
    scene.flush(&pool, "v");
    scene.disks[2].fail_all(None);
    while pool.view().members[2].state != MemberState::Syncing {
        scene.wait(Duration::from_millis(10));
    }
    (scene, pool)
}

/// A window of 1 MiB was copied at once, and the rest of its time slept away: at a rate that takes half of the CPU, whoever came in the wrong half
/// waited for all of that.
#[test]
fn a_rebuild_at_a_rate_is_spread_evenly() {
    // A mebibyte in a second of each member.
    let (mut scene, pool) = syncing(31, 3 << 20);
    let (mut most, mut active, mut all) = (0, 0, 0);
    let mut before = scene.disks[2].state().written_bytes;
    while all < 2 << 20 {
        scene.wait(Duration::from_millis(10));
        let now = scene.disks[2].state().written_bytes;
        most = most.max(now - before);
        active += u32::from(now > before);
        all += now - before;
        before = now;
    }
    assert!(most <= 64 << 10, "{most} bytes within 10 ms");
    assert!(active >= 48, "2 MiB in {active} portions");
    scene.ask(pool.close()).unwrap();
}

/// Reading, computing and writing took turns, 256 KiB at a time: members were idle most of the time when they were far away.
#[test]
fn a_rebuild_keeps_members_busy_that_are_far_away() {
    let (mut scene, pool) = syncing(32, 0);
    scene.disks.iter().for_each(|disk| disk.state().set_latency(Duration::from_millis(10)));
    let start = scene.disks[2].state().written_bytes;
    let when = |scene: &mut Scene, bytes: u64| {
        while scene.disks[2].state().written_bytes < start + bytes {
            scene.wait(Duration::from_millis(1));
        }
        scene.world.now()
    };
    let took = (when(&mut scene, 512 << 10), when(&mut scene, 3 << 20));
    let took = took.1 - took.0;
    assert!(took < Duration::from_millis(100), "2.5 MiB took {took:?}");
    while pool.view().members[2].state != MemberState::InSync {
        scene.wait(Duration::from_millis(100));
    }
    for at in 0..32 {
        assert!(scene.read(&pool, "v", at * (256 << 10), 256 << 10) == pattern(1, 256 << 10), "at {at}");
    }
    scene.ask(pool.close()).unwrap();
    scene.check();
}

/// Between two slices that are far apart nobody is kept out: a window that waited with them would hold up writes for half a second each.
#[test]
fn a_write_beside_a_slow_rebuild_does_not_wait_for_the_next_slice() {
    let (mut scene, pool) = syncing(33, 192 << 10);
    scene.disks.iter().for_each(|disk| disk.state().set_latency(Duration::from_millis(1)));
    let (begin, mut longest, mut at) = (scene.world.now(), Duration::ZERO, 0);
    while scene.world.now() - begin < Duration::from_secs(5) {
        let begin = scene.world.now();
        scene.write(&pool, "v", at, &pattern(2, 4096));
        longest = longest.max(scene.world.now() - begin);
        at = (at + (16 << 10)) % (1 << 20);
    }
    assert!(longest < Duration::from_millis(50), "{longest:?}");
    assert_eq!(pool.view().members[2].state, MemberState::Syncing);
    scene.ask(pool.close()).unwrap();
}

/// A read of what is marked as different wants the window that a resync has. That gave way before it had come forward, so that a few guests who read
/// on kept members from being made the same for ever.
#[test]
fn a_resync_comes_forward_whatever_is_read_meanwhile() {
    let mut scene = Scene::new(34, 2);
    scene.create(Level::Raid1);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", 8 << 20)).unwrap();
    for at in 0..32 {
        scene.write(&pool, "v", at * (256 << 10), &pattern(1, 256 << 10));
    }
    drop(pool);
    scene.kill();
    scene.disks.iter().for_each(|disk| disk.state().set_latency(Duration::from_micros(200)));
    let pool = scene.open();
    assert!(pool.view().unsynced_regions > 0);
    let is_over = Rc::new(std::cell::Cell::new(false));
    for reader in 0..4_u64 {
        let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
        let is_over = Rc::clone(&is_over);
        scene.reactors[0].runtime().spawn(async move {
            let mut at = reader;
            while !is_over.get() {
                at = (at * 5 + 1) % 2048;
                let (outcome, read) = client.io(Operation::Read, at * 4096, vec![0; 4096]).await;
                assert_eq!(outcome, Ok(()));
                assert_eq!(read.len(), 4096);
            }
        });
    }
    let begin = scene.world.now();
    while pool.view().unsynced_regions > 0 {
        scene.wait(Duration::from_millis(100));
        let took = scene.world.now() - begin;
        assert!(took < Duration::from_secs(30), "{:?}", pool.view());
    }
    is_over.set(true);
    scene.wait(Duration::from_millis(100));
}
