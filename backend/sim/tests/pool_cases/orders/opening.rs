//! Making a pool, opening and closing it, growing: rules 0, 1, 9 and 12.

use super::*;
use crate::promises::as_devices;

/// Makes a pool of all disks, which may have been another's, and the power goes after so many steps.
fn create_and_cut(scene: &mut Scene, steps: u64, options: CreateOptions) {
    let handle = scene.reactors[0].runtime().handle();
    let created = pool::create(&handle, scene.devices(), options);
    let _ = scene.trapped(steps, created);
    scene.cut();
    scene.untrap();
}

fn options(name: &str, uuid: u8) -> CreateOptions {
    CreateOptions {
        strip_bytes: 16 << 10,
        extent_bytes: 64 << 10,
        region_bytes: 256 << 10,
        log_bytes: 64 << 10,
        metadata_bytes: Some(256 << 10),
        force: true,
        ..CreateOptions::new(name, [uuid; 16], Level::Raid5)
    }
}

/// The disks that say that they are of this pool.
pub(super) fn labelled(scene: &mut Scene, name: &str) -> Vec<Arc<dyn Device>> {
    let mut found = Vec::new();
    for device in scene.devices() {
        let handle = scene.reactors[0].runtime().handle();
        let probed = pool::probe(&handle, Arc::clone(&device));
        if scene.ask(probed).ok().flatten().is_some_and(|label| label.pool == name) {
            found.push(device);
        }
    }
    found
}

/// The power goes at any step while a pool is made of disks with junk: what says that it is one is one.
#[test]
fn a_pool_that_is_half_made_is_none() {
    holds("superblocks_before_tables", |seed| {
        for steps in (1 + seed..160).step_by(24) {
            let mut scene = Scene::sized(seed, 3, 8 << 11);
            scene.disks.iter().zip(seed..).for_each(|(disk, at)| disk.state().fill_with_junk(at));
            create_and_cut(&mut scene, steps, options("p0", 9));
            let devices = labelled(&mut scene, "p0");
            let is_whole = devices.len() == 3;
            match scene.try_open(devices, true) {
                Err(why) if is_whole => return Err(format!("after {steps} steps: {why}")),
                Err(_) => {}
                Ok(pool) => {
                    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
                    scene.write(&pool, "v", 0, &pattern(1, 4096));
                    scene.ask(pool.close()).unwrap();
                }
            }
        }
        Ok(())
    });
}

/// A pool is made of another's disks by force, and the power goes at any step: the other is there with all its data, or it is not there.
#[test]
fn a_pool_that_was_overwritten_is_not_found_again() {
    holds("old_superblocks_left", |seed| {
        for steps in (1 + seed..160).step_by(24) {
            let mut scene = Scene::sized(seed, 3, 8 << 11);
            let handle = scene.reactors[0].runtime().handle();
            let created = pool::create(&handle, scene.devices(), options("old", 8));
            scene.ask(created).unwrap();
            let pool = scene.open();
            scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
            let data = pattern(1, 64 << 10);
            scene.write(&pool, "v", 0, &data);
            scene.ask(pool.close()).unwrap();
            drop(pool);
            create_and_cut(&mut scene, steps, options("new", 9));
            let devices = labelled(&mut scene, "old");
            let is_whole = devices.len() == 3;
            match scene.try_open(devices, true) {
                Err(why) if is_whole => return Err(format!("after {steps} steps: {why}")),
                Err(_) => {}
                Ok(pool) => {
                    let read = scene.is_one_of(&pool, 0, &[&data]);
                    drop(pool);
                    scene.kill();
                    read?;
                }
            }
        }
        Ok(())
    });
}

/// A mirror is opened without a member, and written; then that is there again. It was not told of anything, so the others know.
#[test]
fn who_is_missing_when_a_pool_is_opened_is_out_before_anything_is_written() {
    holds("opened_unrecorded", |seed| {
        let mut scene = Scene::sized(seed, 2, 16 << 11);
        scene.create(Level::Raid1);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        scene.write(&pool, "v", 0, &pattern(1, 64 << 10));
        scene.ask(pool.close()).unwrap();
        drop(pool);
        scene.disks[0].fail_all(Some(Status::Path));
        let devices = scene.living();
        let pool = scene.open_quietly(devices, |options| options.degraded = true).unwrap();
        let new = pattern(2, 64 << 10);
        scene.write(&pool, "v", 0, &new);
        scene.flush(&pool, "v");
        drop(pool);
        scene.cut();
        scene.disks[0].fail_all(None);
        let devices = scene.devices();
        let pool = scene.try_open(devices, true).map_err(|why| why.to_string())?;
        scene.is_one_of(&pool, 0, &[&new])
    });
}

/// A process dies, and the next one while it opens the pool, at any step: what was acknowledged is there.
#[test]
fn what_a_dead_process_has_left_is_kept_until_it_is_durable() {
    holds("tail_not_kept", |seed| {
        for steps in (1 + seed..48).step_by(24) {
            let mut scene = Scene::sized(seed, 2, 16 << 11);
            scene.create(Level::Raid1);
            let pool = scene.open();
            scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
            let data = pattern(1, 64 << 10);
            scene.write(&pool, "v", 0, &data);
            drop(pool);
            scene.kill();
            let options = OpenOptions::new(HOST, Box::new(scene.tail.clone()));
            let handle = scene.reactors[0].runtime().handle();
            let opened = Pool::open(&handle, scene.devices(), options);
            drop(scene.trapped(steps, opened));
            scene.kill();
            scene.untrap();
            let devices = scene.devices();
            let pool = scene.try_open(devices, false).map_err(|why| why.to_string())?;
            scene.is_one_of(&pool, 0, &[&data]).map_err(|why| format!("after {steps} steps: {why}"))?;
        }
        Ok(())
    });
}

/// After a power cut a pool is opened, and another power cut comes behind the first FLUSH: what that promised is there.
#[test]
fn what_was_done_again_is_in_a_checkpoint_before_the_first_answer() {
    holds("opened_without_checkpoint", |seed| {
        let mut scene = Scene::sized(seed, 2, 16 << 11);
        scene.create(Level::Raid1);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        let old = pattern(1, 64 << 10);
        scene.write(&pool, "v", 0, &old);
        scene.flush(&pool, "v");
        drop(pool);
        scene.cut();
        let devices = scene.devices();
        let pool = scene.open_quietly(devices, |_| {}).unwrap();
        let new = pattern(2, 64 << 10);
        scene.write(&pool, "v", 64 << 10, &new);
        scene.flush(&pool, "v");
        drop(pool);
        scene.cut();
        let devices = scene.devices();
        let pool = scene.try_open(devices, false).map_err(|why| why.to_string())?;
        scene.is_one_of(&pool, 0, &[&old])?;
        scene.is_one_of(&pool, 64 << 10, &[&new])
    });
}

/// The power goes at any step while a pool is closed: while it does not say that it is closed, what may differ is made the same.
#[test]
fn a_pool_says_that_it_is_closed_when_everything_is_durable() {
    holds("closed_before_durable", |seed| {
        for (level, members) in [(Level::Raid1, 2), (Level::Raid5, 3)] {
            for steps in (1 + seed..72).step_by(24) {
                let mut scene = Scene::sized(seed, members, 16 << 11);
                scene.create(level);
                let pool = scene.open();
                scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
                let (old, new) = (pattern(1, 64 << 10), pattern(2, 64 << 10));
                scene.write(&pool, "v", 0, &old);
                let pool = scene.reopen_quietly(pool, |_| {});
                scene.write(&pool, "v", 0, &new[..40 << 10]);
                let closed = pool.close();
                drop(pool);
                let closed = scene.trapped(steps, closed);
                scene.cut();
                scene.untrap();
                let pool = scene.open();
                let mut both = new.clone();
                both[40 << 10..].copy_from_slice(&old[40 << 10..]);
                let found = match closed {
                    Some(_) => scene.is_one_of(&pool, 0, &[&both]),
                    None => scene.is_one_of(&pool, 0, &[&old, &both]),
                };
                found
                    .and_then(|()| scene.are_same(&pool))
                    .map_err(|why| format!("{} after {steps} steps: {why}", level.name()))?;
            }
        }
        Ok(())
    });
}

/// A pool grows, and the power goes at any step: it is as it was, or larger, and in either case it can be opened and written.
#[test]
fn a_pool_that_grows_can_be_opened_at_any_time() {
    for promise in ["new_members_told_last", "grown_without_log"] {
        holds(promise, |seed| {
            for steps in (1 + seed..72).step_by(24) {
                let mut scene = Scene::sized(seed, 6, 8 << 11);
                let handle = scene.reactors[0].runtime().handle();
                let devices = scene.devices();
                scene.disks[3..].iter().zip(seed..).for_each(|(disk, at)| disk.state().fill_with_junk(at));
                let created = pool::create(&handle, devices[..3].to_vec(), options("p0", 9));
                scene.ask(created).unwrap();
                let pool = scene.open_quietly(devices[..3].to_vec(), |_| {}).unwrap();
                scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
                let data = pattern(1, 64 << 10);
                scene.write(&pool, "v", 0, &data);
                scene.flush(&pool, "v");
                let grown = pool.grow(devices[3..].to_vec(), true);
                drop(pool);
                let _ = scene.trapped(steps, grown);
                scene.cut();
                scene.untrap();
                let what = |why: &dyn std::fmt::Display| format!("after {steps} steps: {why}");
                let devices = labelled(&mut scene, "p0");
                let report = pool::check(&scene.reactors[0].runtime().handle(), devices.clone());
                let faults = scene.ask(report).map_err(|why| what(&why))?.faults;
                let is_expected =
                    |fault: &String| fault.contains("superblock at") || fault.contains("has an entry");
                if let Some(fault) = faults.iter().find(|fault| !is_expected(fault)) {
                    return Err(what(fault));
                }
                let pool = scene.try_open(devices, false).map_err(|why| what(&why))?;
                scene.write(&pool, "v", 4096, &pattern(2, 4096));
                scene.ask(pool.close()).map_err(|why| what(&why))?;
            }
            Ok(())
        });
    }
}

/// Extents that nobody has are being discarded when the pool is closed. Whoever opens it next may give them to somebody, so that no discard comes after.
#[test]
fn nothing_is_discarded_after_the_pool_is_closed() {
    holds("discards_outlive_close", |seed| {
        let mut scene = Scene::sized(seed, 2, 16 << 11);
        scene.create(Level::Raid1);
        let devices = scene.devices();
        let pool = scene.open_quietly(devices, |options| options.discard = true).unwrap();
        for name in ["v", "w"] {
            scene.ask(pool.create_volume(name, 8 << 20)).unwrap();
        }
        // Extents of the one have those of the other between them.
        let (ours, others) = (noise(1, 4096), noise(2, 4096));
        for extent in 0..64 {
            scene.write(&pool, "v", extent << 16, &ours);
            scene.write(&pool, "w", extent << 16, &others);
        }
        scene.flush(&pool, "v");
        scene.disks.iter().for_each(|disk| disk.state().set_latency(Duration::from_millis(40)));
        let gone = scene.io(&pool, "v", Operation::Discard, 0, &vec![0; 4 << 20]);
        assert_eq!(gone.0, Ok(()));
        let content = |scene: &Scene| -> Vec<Vec<u8>> {
            scene.disks.iter().map(|disk| disk.state().snapshot()).collect()
        };
        // The first one goes first.
        let first = content(&scene)[0].chunks(4096).position(|block| block == ours).unwrap() * 4096;
        let is_there = |scene: &Scene| scene.disks[0].state().content.get(first..first + 4096) == ours;
        for _ in 0..1000 {
            if !is_there(&scene) {
                break;
            }
            scene.wait(Duration::from_millis(20));
        }
        scene.ask(pool.close()).unwrap();
        drop(pool);
        let closed = content(&scene);
        scene.wait(Duration::from_secs(10));
        match content(&scene) == closed {
            true => Ok(()),
            false => Err("members were changed after the pool was closed".to_owned()),
        }
    });
}

/// A batch of the log comes to one member and not to the other, which is full for a moment, and cannot be put out, since nobody can write that down. It is tried again with what has come meanwhile, does not fit
/// any more behind the one before, and goes to the beginning. Its first try is still there: the next opening must not take it for the batch.
#[test]
fn a_batch_that_was_tried_again_is_read_where_it_went() {
    holds("stale_batch_preferred", |seed| {
        // One of these comes to the log's end.
        for commits in (96 + seed % 2..144).step_by(2) {
            let (mut scene, pool) = tables::committed(Scene::sized(seed, 2, 32 << 11), commits);
            let book = Superblock::decode(&scene.disks[0].state().content.get(4096..8192)).unwrap().unwrap();
            let log =
                book.layout.log_offset() / 512..(book.layout.log_offset() + book.layout.log_bytes) / 512;
            {
                let mut disk = scene.disks[1].state();
                (disk.unwritable, disk.error) = (log, Status::NoSpace);
                let mut disk = scene.disks[0].state();
                (disk.unwritable, disk.error) = (8..(128 << 10) / 512, Status::Media);
            }
            scene.write(&pool, "v", commits << 16, &noise(commits, 512));
            let _ = scene.io(&pool, "v", Operation::Flush, 0, &[]);
            scene.disks.iter().for_each(|disk| disk.state().unwritable = 0..0);
            let end = commits + 12;
            for extent in commits + 1..end {
                scene.write(&pool, "v", extent << 16, &noise(extent, 512));
            }
            scene.flush(&pool, "v");
            drop(pool);
            scene.cut();
            let pool = scene.open();
            for extent in commits..end {
                scene
                    .is_one_of(&pool, extent << 16, &[&noise(extent, 512)])
                    .map_err(|why| format!("after {commits} commits: {why}"))?;
            }
        }
        Ok(())
    });
}

/// A mirror's halves were used without each other, and one is given up: it takes the other's content. What it has of its own life, roots with higher
/// numbers too, is nobody's from then on.
#[test]
fn a_half_that_is_given_up_has_no_tables_of_its_own() {
    holds("old_tables_kept", |seed| {
        let mut scene = Scene::sized(seed, 2, 16 << 11);
        scene.create(Level::Raid1);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        scene.write(&pool, "v", 0, &noise(1, 4096));
        scene.ask(pool.close()).unwrap();
        drop(pool);
        let devices = scene.devices();
        for life in 0..8 {
            let pool = scene.try_open(vec![Arc::clone(&devices[1])], true).unwrap();
            scene.write(&pool, "v", 0, &noise(2, 4096));
            scene.ask(pool.create_volume(&format!("w{life}"), 1 << 20)).unwrap();
            scene.ask(pool.close()).unwrap();
        }
        let pool = scene.try_open(vec![Arc::clone(&devices[0])], true).unwrap();
        let ours = noise(3, 4096);
        scene.write(&pool, "v", 1 << 16, &ours);
        scene.flush(&pool, "v");
        scene.ask(pool.replace("1", Arc::clone(&devices[1]), true)).unwrap();
        scene.until(&pool, 1, MemberState::InSync);
        drop(pool);
        scene.cut();
        let pool = scene.try_open(devices, false).map_err(|why| format!("{why:?}"))?;
        scene.is_one_of(&pool, 1 << 16, &[&ours])
    });
}

/// The last copy has lost its cache, which is told once, to whoever flushes it next, the pool itself as a rule: everybody is told, each volume's users
/// at their next FLUSH.
#[test]
fn a_lost_cache_is_told_to_the_users_of_each_volume() {
    holds("loss_told_to_one", |seed| {
        for wait in [0, 20] {
            let mut scene = Scene::sized(seed, 2, 16 << 11);
            scene.disks.iter().zip(1..).for_each(|(disk, it)| disk.state().cache_identity = Some([it; 16]));
            scene.create(Level::Raid1);
            let pool = scene.open();
            for name in ["u", "v", "w", "idle"] {
                scene.ask(pool.create_volume(name, 1 << 20)).unwrap();
            }
            scene.write(&pool, "u", 0, &noise(1, 4096));
            scene.flush(&pool, "u");
            scene.lose(&pool, 1);
            for name in ["v", "w"] {
                scene.write(&pool, name, 0, &noise(1, 4096));
                scene.flush(&pool, name);
                scene.write(&pool, name, 1 << 16, &noise(2, 4096));
            }
            scene.disks[0].lose_power();
            scene.wait(Duration::from_secs(wait));
            if wait > 0 {
                // These have lost nothing.
                for name in ["u", "idle"] {
                    assert_eq!(scene.io(&pool, name, Operation::Flush, 0, &[]).0, Ok(()));
                }
            }
            for name in ["v", "w"] {
                let outcome = scene.io(&pool, name, Operation::Flush, 0, &[]).0;
                if outcome != Err(Status::Media) {
                    return Err(format!("{name} was not told after {wait} s: {outcome:?}"));
                }
            }
            for name in ["w", "v"] {
                assert_eq!(scene.io(&pool, name, Operation::Flush, 0, &[]).0, Ok(()), "it is told once");
            }
            scene.ask(pool.create_volume("x", 1 << 20)).unwrap();
            scene.flush(&pool, "x");
        }
        Ok(())
    });
}

/// A copy of a mirror does not take what the other has taken, since it is full. It is out, whichever it is, and the write has not failed: it failed for
/// ever where that was the first copy, which the other one was then made the same as.
#[test]
fn a_copy_that_is_full_is_out_and_the_other_goes_on() {
    holds("full_copy_kept", |seed| {
        for full in [0, 1] {
            let mut scene = Scene::sized(seed, 2, 16 << 11);
            scene.create(Level::Raid1);
            let pool = scene.open();
            scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
            scene.write(&pool, "v", 0, &noise(1, 4096));
            scene.flush(&pool, "v");
            let data = scene.pool_data();
            {
                let mut disk = scene.disks[full].state();
                (disk.unwritable, disk.error) = (data..u64::MAX, Status::NoSpace);
            }
            let new = noise(2, 4096);
            let write = Operation::Write { fua: false };
            // What is there, what is new, and what is written as zeroes.
            for (operation, at, bytes) in [
                (write, 0, new.clone()),
                (write, 1 << 16, new.clone()),
                (Operation::WriteZeroes { unmap: false, fua: false }, 4096, vec![0; 4096]),
            ] {
                let outcome = scene.io(&pool, "v", operation, at, &bytes).0;
                if outcome != Ok(()) {
                    return Err(format!("{operation:?} at {at}, member {full} is full: {outcome:?}"));
                }
            }
            scene.wait(Duration::from_secs(5));
            scene.is_one_of(&pool, 0, &[&new])?;
            scene.is_one_of(&pool, 1 << 16, &[&new])?;
            // There is room again.
            scene.disks[full].state().unwritable = 0..0;
            scene.are_same(&pool)?;
            scene.is_one_of(&pool, 0, &[&new])?;
            // All are full: that is an error, and nobody is out.
            for disk in &scene.disks {
                let mut disk = disk.state();
                (disk.unwritable, disk.error) = (data..u64::MAX, Status::NoSpace);
            }
            let outcome = scene.io(&pool, "v", write, 0, &noise(3, 4096)).0;
            let states = pool.view().members.iter().map(|member| member.state).collect::<Vec<_>>();
            if outcome != Err(Status::NoSpace) || states != [MemberState::InSync; 2] {
                return Err(format!("all are full: {outcome:?}, {states:?}"));
            }
            scene.disks.iter().for_each(|disk| disk.state().unwritable = 0..0);
        }
        Ok(())
    });
}

/// A process dies while whole stripes are written without the log, and a member loses its cache before the next process comes. All members are there:
/// none of them is put out for it, or what it has could not be computed, and the pool was refused for lack of it.
#[test]
fn nobody_is_put_out_at_an_opening_whose_stripes_could_not_be_computed_then() {
    holds("needed_member_put_out", |seed| {
        let mut scene = Scene::sized(seed, 3, 16 << 11);
        scene.disks.iter().zip(1..).for_each(|(disk, it)| disk.state().cache_identity = Some([it; 16]));
        scene.create(Level::Raid5);
        let devices = scene.devices();
        let pool = scene.open_quietly(devices, |_| {}).unwrap();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        let (old, new) = (noise(1, 1 << 18), noise(2, 1 << 18));
        for _ in 0..2 {
            scene.write(&pool, "v", 0, &old);
        }
        scene.flush(&pool, "v");
        scene.write(&pool, "v", 0, &new);
        drop(pool);
        scene.kill();
        scene.disks[third(seed)].lose_power();
        let devices = scene.devices();
        let pool = scene.try_open(devices, false).map_err(|why| why.to_string())?;
        scene.is_one_of(&pool, 0, &[&old, &new])?;
        scene.are_same(&pool)?;
        match scene.io(&pool, "v", Operation::Flush, 0, &[]).0 {
            Err(Status::Media) => Ok(()),
            outcome => Err(format!("nobody was told: {outcome:?}")),
        }
    });
}

/// A process dies, with writes that were acknowledged and that nobody has flushed, and the only copy loses its cache before the next process comes, to
/// which the guest goes on to talk: its next FLUSH tells it.
#[test]
fn a_cache_that_was_lost_between_two_processes_is_told() {
    holds("loss_before_opening_not_told", |seed| {
        for level in [Level::Linear, Level::Raid1] {
            let mut scene = Scene::sized(seed, 1 + u8::from(level == Level::Raid1), 16 << 11);
            scene.disks.iter().zip(1..).for_each(|(disk, it)| disk.state().cache_identity = Some([it; 16]));
            scene.create(level);
            let pool = scene.open();
            scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
            scene.write(&pool, "v", 0, &noise(1, 4096));
            scene.flush(&pool, "v");
            if level == Level::Raid1 {
                scene.lose(&pool, 1);
            }
            scene.write(&pool, "v", 0, &noise(2, 4096));
            drop(pool);
            scene.kill();
            scene.disks[0].lose_power();
            let pool = scene.open_degraded();
            let outcome = scene.io(&pool, "v", Operation::Flush, 0, &[]).0;
            if outcome != Err(Status::Media) {
                return Err(format!("{level:?}: {outcome:?}"));
            }
            scene.flush(&pool, "v");
            drop(pool);
            scene.kill();
            // Nothing was lost this time.
            let pool = scene.open_degraded();
            scene.flush(&pool, "v");
        }
        Ok(())
    });
}

/// The only copy loses its cache, in a running pool or between two processes, and the process that has noticed it dies before anybody flushes. The next one
/// tells it, to those who have lost something, and once. Or the pool is closed, since the daemon is started anew.
#[test]
fn what_a_lost_cache_took_is_told_also_when_the_process_that_noticed_it_is_gone() {
    holds("loss_not_kept", |seed| {
        for (is_open, is_closed) in [(true, false), (false, false), (true, true)] {
            let mut scene = Scene::sized(seed, 1, 16 << 11);
            scene.disks[0].state().cache_identity = Some([1; 16]);
            scene.create(Level::Linear);
            let mut pool = scene.open();
            for volume in ["v", "quiet"] {
                scene.ask(pool.create_volume(volume, 1 << 20)).unwrap();
                scene.write(&pool, volume, 0, &noise(1, 4096));
                scene.flush(&pool, volume);
            }
            scene.write(&pool, "v", 8192, &noise(2, 4096));
            match is_open {
                true => scene.disks[0].lose_power(),
                false => {
                    drop(pool);
                    scene.kill();
                    scene.disks[0].lose_power();
                    pool = scene.open();
                }
            }
            scene.wait(Duration::from_secs(1));
            if is_closed {
                scene.ask(pool.close()).unwrap();
            }
            drop(pool);
            scene.kill();
            let pool = scene.open();
            // Between two processes nobody knows whose it was.
            let quiet = scene.io(&pool, "quiet", Operation::Flush, 0, &[]).0;
            if quiet != if is_open { Ok(()) } else { Err(Status::Media) } {
                return Err(format!("quiet, open {is_open}: {quiet:?}"));
            }
            let outcome = scene.io(&pool, "v", Operation::Flush, 0, &[]).0;
            if outcome != Err(Status::Media) {
                return Err(format!("open {is_open}, closed {is_closed}: {outcome:?}"));
            }
            scene.wait(Duration::from_millis(1));
            drop(pool);
            scene.kill();
            let pool = scene.open();
            scene.flush(&pool, "v");
            scene.flush(&pool, "quiet");
        }
        Ok(())
    });
}

/// A pool with one member whose cache has no name, used before: `v` has a new unit in the tail when its process dies.
fn written_and_killed(seed: u64) -> Scene {
    let mut scene = Scene::sized(seed, 1, 16 << 11);
    scene.disks[0].seed(seed);
    scene.disks[0].state().fill_with_junk(seed + 1);
    scene.create(Level::Linear);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    scene.write(&pool, "v", 0, &noise(1, 4096));
    drop(pool);
    scene.kill();
    scene
}

/// What it reads is what it wrote, or nothing; and its next FLUSH tells that something was lost, once.
fn is_nothing_strange_and_told(scene: &mut Scene, pool: &Pool) -> Result<(), String> {
    let (found, new) = (scene.read(pool, "v", 0, 4096), noise(1, 4096));
    for (at, block) in found.chunks(512).enumerate() {
        if *block != new[at * 512..][..512] && block.iter().any(|byte| *byte != 0) {
            return Err(format!("block {at} is what stood there before"));
        }
    }
    let outcome = scene.io(pool, "v", Operation::Flush, 0, &[]).0;
    if outcome != Err(Status::Media) {
        return Err(format!("its FLUSH: {outcome:?}"));
    }
    scene.flush(pool, "v");
    Ok(())
}

/// Between two processes the only copy loses a cache that has no name. The device knows that something was lost, from what the dead process has kept of it,
/// and has told nobody.
#[test]
fn a_loss_that_a_device_owes_is_one_of_the_process_before() {
    holds("owed_loss_ignored", |seed| {
        let mut scene = written_and_killed(seed);
        scene.disks[0].lose_power();
        scene.disks[0].state().owes_a_loss = true;
        let pool = scene.open();
        scene.disks[0].state().owes_a_loss = false;
        is_nothing_strange_and_told(&mut scene, &pool)
    });
}

/// The same while the next process opens the pool, and has done again what the tail says.
#[test]
fn a_loss_while_a_pool_is_opened_is_one_of_the_process_before() {
    holds("loss_at_opening_overlooked", |seed| {
        let mut scene = written_and_killed(seed);
        let (held, _) = scene.watched();
        // That of the opening's checkpoint.
        held[0].hold_one(|request| request.operation == Operation::Flush);
        let handle = scene.reactors[0].runtime().handle();
        let options = OpenOptions::new(HOST, Box::new(scene.tail.clone()));
        let ask = Pool::open(&handle, as_devices(&held), options);
        let opened = Rc::new(RefCell::new(None));
        let place = Rc::clone(&opened);
        scene.reactors[0].runtime().spawn(async move { *place.borrow_mut() = Some(ask.await) });
        scene.wait(Duration::from_secs(1));
        assert!(held[0].held() == 1 && opened.borrow().is_none());
        scene.disks[0].lose_power();
        held[0].release();
        scene.wait(Duration::from_secs(5));
        let pool = match opened.take().expect("it ends") {
            Ok(pool) => pool,
            Err(error) => {
                assert!(format!("{error:?}").contains("while it was being opened"), "{error:?}");
                scene.kill();
                scene.open()
            }
        };
        is_nothing_strange_and_told(&mut scene, &pool)
    });
}

/// A FLUSH is under way, a write ends behind it, and both copies' caches are lost. The FLUSH that fails did not stand for that write: the next one has to
/// tell it, too.
#[test]
fn a_write_behind_a_flush_that_tells_a_loss_is_told_by_the_next_one() {
    holds("loss_of_later_writes_not_told", |seed| {
        let mut scene = Scene::sized(seed, 2, 16 << 11);
        scene.create(Level::Raid1);
        let (held, _) = scene.watched();
        let pool = scene.open_quietly(as_devices(&held), |_| {}).unwrap();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        scene.write(&pool, "v", 0, &noise(1, 4096));
        held[0].hold_one(|request| request.operation == Operation::Flush);
        let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
        let ended: Rc<RefCell<Option<Outcome>>> = Rc::default();
        let place = Rc::clone(&ended);
        scene.reactors[0].runtime().spawn(async move {
            *place.borrow_mut() = Some(client.io(Operation::Flush, 0, Vec::new()).await.0);
        });
        scene.wait(Duration::from_millis(1));
        assert!(held[0].held() == 1 && ended.borrow().is_none());
        scene.write(&pool, "v", 0, &noise(2, 4096));
        scene.disks.iter().for_each(|disk| disk.lose_power());
        held[0].release();
        scene.wait(Duration::from_secs(1));
        assert_eq!(*ended.borrow(), Some(Err(Status::Media)));
        let outcome = scene.io(&pool, "v", Operation::Flush, 0, &[]).0;
        if outcome != Err(Status::Media) {
            return Err(format!("the next FLUSH: {outcome:?}"));
        }
        scene.flush(&pool, "v");
        Ok(())
    });
}
