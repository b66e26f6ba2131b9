//! Members that lose their volatile caches, at moments when it is easy to overlook.

use super::*;
use orders::noise;
use promises::as_devices;

/// A strip that is missing is computed from two that are read one after the other. The first one's member has lost its cache, and what is read there is
/// old; it is given what the log says before the second one is read. Nobody lacks anything then, and what was read does not go together.
#[test]
fn what_was_read_while_a_member_lacked_what_the_log_says_is_read_again() {
    // Row 0 has its data on members 0 and 1, and its parity on member 2.
    let (strip, len) = (16 << 10, 4096);
    let mut scene = Scene::sized(1, 3, 16 << 11);
    scene.create(Level::Raid5);
    let (held, _) = scene.watched();
    let pool = scene.open_quietly(as_devices(&held), |_| {}).unwrap();
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    let (old, new) = (noise(1, 64 << 10), noise(2, len));
    scene.write(&pool, "v", 0, &old);
    scene.flush(&pool, "v");
    scene.lose(&pool, 1);
    scene.write(&pool, "v", 0, &new);
    let data = usize::try_from(scene.data_offset()).unwrap();
    let first = |scene: &Scene| scene.disks[0].state().content.get(data..data + len).into_owned();
    assert!(first(&scene) == new, "it is in place");
    // It was in the cache only; and nobody knows yet.
    scene.disks[0].state().content.write(data, &old[..len]);
    held[2]
        .hold_one(move |request| request.operation == Operation::Read && request.lba.0 << 9 >= data as u64);
    let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
    let ended = Rc::new(RefCell::new(None));
    let place = Rc::clone(&ended);
    scene.reactors[0].runtime().spawn(async move {
        *place.borrow_mut() = Some(client.io(Operation::Read, strip, vec![0; len]).await);
    });
    scene.wait(Duration::from_millis(1));
    assert!(ended.borrow().is_none() && held[2].held() == 1);
    scene.disks[0].state().cache_losses += 1;
    scene.disks[0].fail_all(None);
    scene.wait(Duration::from_secs(5));
    assert!(first(&scene) == new, "the log has made it good");
    assert!(ended.borrow().is_none());
    held[2].release();
    scene.wait(Duration::from_millis(100));
    let (outcome, read) = ended.take().expect("it ends");
    assert_eq!(outcome, Ok(()));
    let strip = usize::try_from(strip).unwrap();
    assert!(read == old[strip..strip + len], "it is what was written");
}

/// A pool that is only looked at loses nothing with a cache, and nobody would write anything down or make it good: it is read on, complete or not.
#[test]
fn a_pool_that_is_only_looked_at_is_read_whatever_cache_is_lost() {
    for (level, members) in LEVELS.into_iter().filter(|(level, _)| level.is_redundant()) {
        for missing in 0..=usize::from(level.parities().max(1)) {
            let mut scene = Scene::new(3, members);
            scene.create(level);
            let pool = scene.open();
            scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
            let want = noise(1, 256 << 10);
            scene.write(&pool, "v", 0, &want);
            scene.ask(pool.close()).unwrap();
            drop(pool);
            let devices = scene.devices().split_off(missing);
            let change = |options: &mut OpenOptions| (options.degraded, options.read_only) = (true, true);
            let pool = scene.open_quietly(devices, change).unwrap();
            for disk in scene.disks.split_off(missing) {
                disk.lose_power();
                scene.wait(Duration::from_secs(2));
                let began = scene.world.now();
                let found = scene.read(&pool, "v", 0, want.len());
                let what = format!("{level} of {members} without {missing}");
                assert!(found == want, "{what}");
                assert!(scene.world.now() - began < Duration::from_secs(1), "{what}");
            }
        }
    }
}

/// A write to a new extent waits for both copies. The one is full and says so; the other ends since somebody else has waited long enough: it has not
/// failed. The guest, who waits on, was told that there is no space.
#[test]
fn a_copy_that_somebody_else_gave_up_is_written_again_though_the_other_is_full() {
    let mut scene = Scene::sized(4, 2, 16 << 11);
    scene.create(Level::Raid1);
    let (held, _) = scene.watched();
    let pool = scene.open_quietly(as_devices(&held), |_| {}).unwrap();
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    // The region's mark, and the first extent of it.
    scene.write(&pool, "v", 0, &noise(1, 64 << 10));
    let data = scene.data_offset();
    // What comes to the first copy stays there for minutes, unless it is aborted.
    let disk = Arc::clone(&scene.disks[0]);
    disk.state().stuck_ns = 300_000_000_000;
    let stuck = Arc::clone(&disk);
    held[0].hold(move |request| {
        let is_it = request.operation.is_write() && request.lba.0 << 9 >= data;
        stuck.state().stuck_permille = if is_it { 1000 } else { 0 };
        false
    });
    {
        let mut full = scene.disks[1].state();
        (full.unwritable, full.error) = (data / 512..u64::MAX, Status::NoSpace);
    }
    let write = Operation::Write { fua: false };
    let clients = [1u64, 2].map(|extent| {
        let client = Rc::new(Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap()));
        let ended: Rc<RefCell<Option<Outcome>>> = Rc::default();
        let (other, place) = (Rc::clone(&client), Rc::clone(&ended));
        scene.reactors[0].runtime().spawn(async move {
            *place.borrow_mut() = Some(other.io(write, extent << 16, noise(extent + 1, 64 << 10)).await.0);
        });
        (client, ended)
    });
    scene.wait(Duration::from_millis(10));
    assert!(clients.iter().all(|(_, ended)| ended.borrow().is_none()), "both wait");
    held[0].hold(|_| false);
    disk.state().stuck_permille = 0;
    clients[0].0.abort();
    scene.wait(Duration::from_secs(1));
    assert_eq!(*clients[0].1.borrow(), Some(Err(Status::Aborted)));
    assert_eq!(*clients[1].1.borrow(), Some(Ok(())));
    assert!(scene.read(&pool, "v", 2 << 16, 64 << 10) == noise(3, 64 << 10));
    let states: Vec<MemberState> = pool.view().members.iter().map(|member| member.state).collect();
    assert_eq!(states[0], MemberState::InSync, "it has not failed");
    assert_ne!(states[1], MemberState::InSync, "it lacks what the other has");
}

/// A volume gets extents where members still have what somebody else had. Before it flushes, all caches are lost, with the first that it wrote there. It
/// does not read what was there before; and who has lost something is told, once.
#[test]
fn a_volume_reads_nothing_of_anybody_where_a_cache_has_taken_what_it_wrote_first() {
    for (level, members) in LEVELS {
        for seed in 0..12 {
            let mut scene = Scene::sized(seed, members, 16 << 11);
            scene.disks.iter().zip(1..).for_each(|(disk, number)| {
                disk.seed(seed ^ number << 32);
                disk.state().fill_with_junk(number);
            });
            scene.create(level);
            let pool = scene.open();
            for volume in ["quiet", "v"] {
                scene.ask(pool.create_volume(volume, 4 << 20)).unwrap();
            }
            let len = 256 << 10;
            scene.write(&pool, "quiet", 0, &noise(2, 4096));
            scene.flush(&pool, "quiet");
            // Whole extents and parts of some, and one that is whole after two writes.
            let new = noise(3, len);
            for (from, to) in
                [(0, 100 << 10), (100 << 10, 128 << 10), (140 << 10, 150 << 10), (192 << 10, len)]
            {
                scene.write(&pool, "v", from as u64, &new[from..to]);
            }
            scene.disks.iter().for_each(|disk| disk.lose_power());
            let found = scene.read(&pool, "v", 0, len);
            for (at, block) in found.chunks(512).enumerate() {
                let is_mine = *block == new[at * 512..][..512] || block.iter().all(|byte| *byte == 0);
                assert!(is_mine, "{level} of {members}, seed {seed}: block {at} is nothing of this volume's");
            }
            let what = format!("{level} of {members}, seed {seed}");
            let mut flush = |volume: &str| scene.io(&pool, volume, Operation::Flush, 0, &[]).0;
            assert_eq!(flush("v"), Err(Status::Media), "{what}");
            assert_eq!(flush("v"), Ok(()), "{what}");
            // Nor is it told to who has written since, and had flushed before.
            scene.write(&pool, "quiet", 0, &noise(4, 4096));
            assert_eq!(scene.io(&pool, "quiet", Operation::Flush, 0, &[]).0, Ok(()), "{what}");
            // It is what it was also for the next process, whose members' power was gone before.
            scene.write(&pool, "v", 0, &new[..4096]);
            scene.flush(&pool, "v");
            drop(pool);
            scene.cut();
            let pool = scene.open();
            let again = scene.read(&pool, "v", 0, len);
            assert!(again[..4096] == new[..4096] && again[4096..] == found[4096..], "{what}");
        }
    }
}
