//! Replacements: rule 11. RAID 5 of three, whose last member has data and none of the tables.

use super::*;

/// Two windows of a member's data, and a half, so that the last one is not written down before all is copied.
const BLOCKS: u64 = 11 << 10;
/// A window takes half a minute.
const SLOWLY: u64 = 64 << 10;

/// A pool that is full, and durable, with no region marked; and what it has.
fn begin(seed: u64, change: impl FnOnce(&mut OpenOptions)) -> (Scene, Pool, Vec<u8>) {
    let mut scene = Scene::sized(seed, 3, BLOCKS);
    scene.disks.iter().zip(1..).for_each(|(disk, at)| disk.state().cache_identity = Some([at; 16]));
    scene.create(Level::Raid5);
    let pool = scene.open();
    let size = pool.view().size_bytes;
    scene.ask(pool.create_volume("v", size)).unwrap();
    let data = noise(1, usize::try_from(size).unwrap());
    for (at, bytes) in (0..).step_by(1 << 20).zip(data.chunks(1 << 20)) {
        scene.write(&pool, "v", at, bytes);
    }
    let pool = scene.reopen_quietly(pool, change);
    (scene, pool, data)
}

/// Another disk is to take the place of member 2.
fn replace(scene: &mut Scene, pool: &Pool, seed: u64) -> Arc<SimDisk> {
    let new = disk(9, BLOCKS);
    new.seed(seed ^ 0x99);
    scene.ask(pool.replace("d2", Arc::clone(&new) as Arc<dyn Device>, false)).unwrap();
    new
}

fn copied(pool: &Pool) -> (u64, u64) {
    let task = pool.view().tasks.into_iter().find(|task| task.kind == "replace" && !task.is_done);
    task.map_or((0, 1), |task| (task.done_bytes, task.total_bytes))
}

fn is_replaced(pool: &Pool) -> bool {
    let view = pool.view();
    view.members.len() == 3 && view.members[2].device.as_deref() == Some("d9")
}

/// All is copied, and not all of it flushed, when the old member is lost, and the power right behind: what is not durable on the new one is copied again.
#[test]
fn a_replacement_that_takes_over_early_has_only_what_is_durable() {
    holds("taken_over_unflushed", |seed| {
        let (mut scene, pool, _) = begin(seed, |options| options.sync_bytes_per_second = SLOWLY);
        let new = replace(&mut scene, &pool, seed);
        // More is copied than is written down, which each MiB is.
        scene.until_it(&pool, |pool| copied(pool).0 % (1 << 20) >= 512 << 10);
        // It is out by that alone: a write that it fails would be one that the new one may have or not.
        scene.disks[2].lose_power();
        scene.disks[2].fail_all(Some(Status::Path));
        scene.until_it(&pool, |pool| {
            let view = pool.view();
            is_replaced(pool) && view.members[2].state == MemberState::Syncing
        });
        drop(pool);
        scene.disks[2] = new;
        scene.cut();
        let pool = scene.open_degraded();
        scene.are_same(&pool)
    });
}

/// What is given back while a member is copied is discarded on neither device: a power cut may undo one discard and not the other, and parity would be
/// made of the one's bytes and kept with the other's.
#[test]
fn nothing_is_discarded_on_one_of_two_devices() {
    holds("discards_of_twins", |seed| {
        let change = |options: &mut OpenOptions| {
            (options.sync_bytes_per_second, options.discard) = (SLOWLY, true);
        };
        let (mut scene, pool, _) = begin(seed, change);
        let new = replace(&mut scene, &pool, seed);
        scene.until_it(&pool, |pool| copied(pool).0 >= 1 << 20);
        // An extent that is copied, and known to be.
        let extent = vec![0; 64 << 10];
        assert_eq!(scene.io(&pool, "v", Operation::Discard, 0, &extent).0, Ok(()));
        scene.flush(&pool, "v");
        scene.wait(Duration::from_secs(3));
        drop(pool);
        scene.cut();
        scene.disks.push(new);
        let devices = scene.devices();
        let pool = scene.open_quietly(devices, change).unwrap();
        // The only extent that is free. Its second stripe has the other strip of data on member 2.
        scene.write(&pool, "v", 48 << 10, &noise(2, 4096));
        scene.until_it(&pool, is_replaced);
        scene.until_it(&pool, |pool| copied(pool) == (0, 1));
        scene.are_same(&pool)
    });
}

/// What a crash leaves on one of the two only is copied again, where a region is marked.
#[test]
fn what_a_crash_leaves_on_one_of_two_devices_is_copied_again() {
    holds("marked_not_copied_again", |seed| {
        let change = |options: &mut OpenOptions| options.sync_bytes_per_second = SLOWLY;
        let (mut scene, pool, data) = begin(seed, change);
        let new = replace(&mut scene, &pool, seed);
        scene.until_it(&pool, |pool| copied(pool).0 >= 1 << 20);
        scene.wait(Duration::from_secs(2));
        let later = noise(2, 64 << 10);
        scene.write(&pool, "v", 0, &later);
        drop(pool);
        scene.cut();
        scene.disks.push(new);
        let devices = scene.devices();
        let pool = scene.open_quietly(devices, |_| {}).unwrap();
        scene.until_it(&pool, is_replaced);
        scene.is_one_of(&pool, 0, &[&later, &data[..64 << 10]])?;
        scene.are_same(&pool)
    });
}

/// The new one is the member, and the power goes: it has everything.
#[test]
fn a_replacement_has_everything_durable_before_it_is_the_member() {
    holds("swapped_unflushed", |seed| {
        let (mut scene, pool, data) = begin(seed, |_| {});
        let new = replace(&mut scene, &pool, seed);
        scene.until_it(&pool, is_replaced);
        drop(pool);
        scene.disks[2] = new;
        scene.cut();
        let pool = scene.open();
        for (at, bytes) in (0..).step_by(1 << 20).zip(data.chunks(1 << 20)) {
            scene.is_one_of(&pool, at, &[bytes])?;
        }
        scene.are_same(&pool)
    });
}

/// The power goes at any step while the new one becomes the member: the pool has one of the two.
#[test]
fn one_of_two_devices_is_the_member_at_any_time() {
    holds("old_member_erased_first", |seed| {
        for steps in (1 + seed..200).step_by(24) {
            let mut scene = Scene::sized(seed, 1, BLOCKS);
            scene.create(Level::Linear);
            let pool = scene.open();
            scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
            let data = noise(1, 64 << 10);
            scene.write(&pool, "v", 0, &data);
            let pool = scene.reopen_quietly(pool, |_| {});
            let new = disk(9, BLOCKS);
            new.seed(seed ^ 0x99);
            scene.ask(pool.replace("d0", Arc::clone(&new) as Arc<dyn Device>, false)).unwrap();
            scene.disks.push(new);
            scene.trapped_at(steps, Duration::from_secs(2));
            scene.cut();
            drop(pool);
            scene.untrap();
            let devices = opening::labelled(&mut scene, "p0");
            let what = |why: String| format!("after {steps} steps: {why}");
            let pool = scene.try_open(devices, false).map_err(|why| what(why.to_string()))?;
            let found = scene.is_one_of(&pool, 0, &[&data]);
            // It goes on being replaced.
            drop(pool);
            scene.kill();
            found.map_err(what)?;
        }
        Ok(())
    });
}

/// What takes the place of a lost member lacks everything, and the power goes when superblocks say that it is one.
#[test]
fn a_new_member_lacks_everything_before_it_is_a_member() {
    holds("put_in_unmarked", |seed| {
        let (mut scene, pool, data) = begin(seed, |options| options.sync_bytes_per_second = SLOWLY);
        scene.disks[2].fail_all(Some(Status::Path));
        scene.write(&pool, "v", 0, &data[..64 << 10]);
        scene.until(&pool, 2, MemberState::Stale);
        let new = replace(&mut scene, &pool, seed);
        scene.until(&pool, 2, MemberState::Syncing);
        drop(pool);
        scene.disks[2] = new;
        scene.cut();
        let pool = scene.open_degraded();
        scene.are_same(&pool)
    });
}
