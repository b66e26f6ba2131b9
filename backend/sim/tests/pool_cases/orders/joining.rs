//! Members that come back, and marks: rules 8 and 10.

use super::*;

const LEN: usize = 1 << 20;

/// A mirror with a volume that is written and durable, and a member that has missed the last write to it.
fn begin(seed: u64, identified: bool) -> (Scene, Pool, Vec<u8>) {
    let mut scene = Scene::sized(seed, 2, 16 << 11);
    if identified {
        scene.disks.iter().zip(1..).for_each(|(disk, at)| disk.state().cache_identity = Some([at; 16]));
    }
    scene.create(Level::Raid1);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", 4 << 20)).unwrap();
    for at in 0..4 {
        scene.write(&pool, "v", at << 20, &pattern(1, LEN));
    }
    let pool = scene.reopen_quietly(pool, |options| options.sync_bytes_per_second = 8 << 20);
    scene.lose(&pool, 0);
    let new = pattern(2, LEN);
    for at in 0..4 {
        scene.write(&pool, "v", at << 20, &new);
    }
    scene.flush(&pool, "v");
    (scene, pool, new)
}

/// What is not flushed when its region is marked no more is not made the same after a power cut.
#[test]
fn a_region_is_durable_on_all_members_before_it_is_not_marked_any_more() {
    holds("clear_intent_without_flush", |seed| {
        let mut scene = Scene::sized(seed, 2, 16 << 11);
        scene.create(Level::Raid1);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        scene.write(&pool, "v", 0, &pattern(1, LEN));
        scene.flush(&pool, "v");
        scene.wait(Duration::from_secs(2));
        scene.write(&pool, "v", 0, &pattern(2, LEN));
        scene.wait(Duration::from_secs(20));
        drop(pool);
        scene.cut();
        let pool = scene.open();
        scene.are_same(&pool)
    });
}

/// Superblocks say that a member has everything, and the power goes: it has, and is read.
#[test]
fn what_a_member_was_given_is_durable_before_it_counts_as_in_sync() {
    holds("joined_unflushed", |seed| {
        let (mut scene, pool, new) = begin(seed, false);
        scene.disks[0].fail_all(None);
        scene.until(&pool, 0, MemberState::InSync);
        drop(pool);
        scene.cut();
        let pool = scene.open();
        (0..4).try_for_each(|at| scene.is_one_of(&pool, at << 20, &[&new]))
    });
}

/// A member that is half overwritten says itself that it is not in sync, so that nobody opens it alone.
#[test]
fn a_member_that_is_half_overwritten_is_no_pool_by_itself() {
    holds("not_told_before_overwritten", |seed| {
        let (mut scene, pool, _) = begin(seed, false);
        scene.disks[0].fail_all(None);
        scene.until(&pool, 0, MemberState::Syncing);
        scene.wait(Duration::from_millis(100 + seed));
        assert_eq!(pool.view().members[0].state, MemberState::Syncing);
        drop(pool);
        scene.disks[1].fail_all(Some(Status::Path));
        scene.cut();
        let devices = scene.living();
        match scene.try_open(devices, true) {
            Err(_) => Ok(()),
            Ok(pool) => {
                drop(pool);
                scene.kill();
                Err("it is opened alone".to_owned())
            }
        }
    });
}

/// A member has the tables as well, also those that have not changed since it was away: it may be the only one next time.
#[test]
fn a_member_that_came_back_has_the_tables() {
    holds("joined_without_tables", |seed| {
        let (mut scene, pool, new) = begin(seed, false);
        scene.ask(pool.snapshot(vec![("v".to_owned(), "s".to_owned())])).unwrap();
        scene.flush(&pool, "v");
        scene.disks[0].fail_all(None);
        scene.until(&pool, 0, MemberState::InSync);
        drop(pool);
        scene.disks[1].fail_all(Some(Status::Path));
        scene.cut();
        let devices = scene.living();
        let pool = scene.try_open(devices, true).map_err(|why| why.to_string())?;
        let names: Vec<String> = pool.volumes().into_iter().map(|volume| volume.name).collect();
        if names != ["s", "v"] {
            drop(pool);
            scene.kill();
            return Err(format!("there are {names:?}"));
        }
        (0..4).try_for_each(|at| scene.is_one_of(&pool, at << 20, &[&new]))
    });
}

/// A member loses its cache while it is being brought up to date: what it was given is lacking again.
#[test]
fn a_member_that_loses_its_cache_on_the_way_begins_again() {
    holds("joined_with_lost_cache", |seed| {
        let (mut scene, pool, new) = begin(seed, true);
        scene.disks[0].fail_all(None);
        scene.until(&pool, 0, MemberState::Syncing);
        scene.wait(Duration::from_millis(300 + seed));
        assert_eq!(pool.view().members[0].state, MemberState::Syncing);
        scene.disks[0].lose_power();
        scene.until(&pool, 0, MemberState::InSync);
        // Both are read, in turns.
        (0..8).try_for_each(|at| scene.is_one_of(&pool, (at % 4) << 20, &[&new]))
    });
}

/// RAID 10 on three members: strip 2 is on members 1 and 2, others on one of them and on member 0, which is away. Member 1 cannot be done without, and loses its
/// cache: its copy of strip 2 is old again, and that of member 2 is not. Nothing was marked, so that they differed for good, and reads took turns.
#[test]
fn copies_of_which_one_was_lost_with_a_cache_are_made_the_same() {
    holds("lost_copies_differ", |seed| {
        let mut scene = Scene::sized(seed, 3, 16 << 11);
        scene.create(Level::Raid10);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        scene.write(&pool, "v", 0, &noise(1, 64 << 10));
        scene.flush(&pool, "v");
        let pool = scene.reopen_quietly(pool, |_| {});
        scene.shake(seed);
        scene.lose(&pool, 0);
        scene.write(&pool, "v", 0, &noise(2, 64 << 10));
        scene.disks[1].lose_power();
        scene.wait(Duration::from_secs(5));
        let (outcome, _) = scene.io(&pool, "v", Operation::Flush, 0, &[]);
        assert_eq!(outcome, Err(Status::Media), "it is told");
        scene.flush(&pool, "v");
        let client = Rc::new(Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap()));
        let mut read = || {
            let client = Rc::clone(&client);
            scene.run(async move { client.io(Operation::Read, 0, vec![0; 64 << 10]).await })
        };
        if read() != read() {
            return Err("what is read depends on who is asked".to_owned());
        }
        scene.disks[0].fail_all(None);
        scene.are_same(&pool)
    });
}
