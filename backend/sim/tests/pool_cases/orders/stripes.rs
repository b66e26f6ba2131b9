//! The write hole, step by step: RAID 5 of three, where row 0 has its data on members 0 and 1 and its parity on member 2; row 1 on 2 and 0, and on 1.

use super::*;
use std::cell::Cell;

const STRIP: u64 = 16 << 10;
const LEN: usize = 64 << 10;

/// A volume of which an extent, two stripes, is written and durable.
fn begin(seed: u64) -> (Scene, Pool, Vec<u8>) {
    begin_with(Scene::sized(seed, 3, 16 << 11))
}

fn begin_with(mut scene: Scene) -> (Scene, Pool, Vec<u8>) {
    scene.create(Level::Raid5);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    let old = noise(1, LEN);
    scene.write(&pool, "v", 0, &old);
    scene.flush(&pool, "v");
    let pool = scene.reopen_quietly(pool, |_| {});
    (scene, pool, old)
}

/// What is there when member 1 is lost with the power: the 4 KiB at the beginning may be old or new.
fn ends_without_member_1(mut scene: Scene, pool: Pool, old: &[u8], new: &[u8]) -> Result<(), String> {
    drop(pool);
    scene.disks[1].fail_all(Some(Status::Path));
    scene.cut();
    let pool = scene.open_degraded();
    let mut other = old.to_vec();
    other[..new.len()].copy_from_slice(new);
    scene.is_one_of(&pool, 0, &[old, &other])
}

/// A strip is changed while member 2, which has the parity, is away: the change is in the log of one member. When member 2 is back one more may be
/// lost, and it is the one with the log; what stands in place is in a cache still.
#[test]
fn what_was_logged_without_a_member_is_durable_before_that_is_back() {
    holds("parity_log_kept_over_rejoin", |seed| {
        let (mut scene, pool, old) = begin(seed);
        scene.lose(&pool, 2);
        let new = noise(2, 4096);
        scene.write(&pool, "v", 0, &new);
        scene.disks[2].fail_all(None);
        scene.until(&pool, 2, MemberState::InSync);
        ends_without_member_1(scene, pool, &old, &new)
    });
}

/// The same, changed while member 2 is being brought up to date.
#[test]
fn what_is_logged_while_a_member_comes_back_is_in_its_log_too() {
    holds("parity_log_not_on_joining", |seed| {
        let (mut scene, pool, old) = begin(seed);
        // Something else for the resync to do, so that it takes a while.
        scene.lose(&pool, 2);
        for at in 1..16 {
            scene.write(&pool, "v", at << 16, &noise(3, LEN));
        }
        scene.flush(&pool, "v");
        scene.disks[2].state().set_latency(Duration::from_millis(20));
        scene.disks[2].fail_all(None);
        scene.until(&pool, 2, MemberState::Syncing);
        let new = noise(2, 4096);
        scene.write(&pool, "v", 0, &new);
        assert_eq!(pool.view().members[2].state, MemberState::Syncing);
        scene.until(&pool, 2, MemberState::InSync);
        ends_without_member_1(scene, pool, &old, &new)
    });
}

/// Whole stripes were being written when the power went, and a member falls silent before their parity is made again: nobody could say what it had,
/// so it is waited for.
#[test]
fn nobody_is_put_out_while_parity_is_unknown() {
    let happen = |seed: u64| {
        let (mut scene, pool, _) = begin(seed);
        let (old, new) = (noise(4, 1 << 20), noise(5, 1 << 20));
        for _ in 0..2 {
            scene.write(&pool, "v", 0, &old);
        }
        scene.flush(&pool, "v");
        let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
        let bytes = new.clone();
        scene.reactors[0].runtime().spawn(async move {
            let _ = client.io(Operation::Write { fua: false }, 0, bytes).await;
        });
        scene.wait(Duration::from_micros(10 + seed));
        drop(pool);
        scene.cut();
        let devices = scene.living();
        // What is marked stays so.
        let pool = scene.open_quietly(devices, |options| options.sync_bytes_per_second = 1).unwrap();
        let silent = third(seed);
        scene.disks[silent].fail_all(Some(Status::Path));
        // Somebody notices.
        let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
        scene.reactors[0].runtime().spawn(async move {
            let _ = client.io(Operation::Flush, 0, Vec::new()).await;
        });
        scene.wait(Duration::from_secs(5));
        scene.disks[silent].fail_all(None);
        scene.wait(Duration::from_secs(5));
        scene.is_one_of(&pool, 0, &[&old, &new])
    };
    holds("doubtful_members_lost", happen);
    holds("doubts_forgotten", happen);
}

/// A member is lost while nobody writes, and is found to be by the first whole stripe: the others are told before that it need not be in the log, and
/// then that it is, since without a member everything is. The power goes a while later: there is nothing that could not be told.
#[test]
fn a_pool_that_finds_a_member_lost_by_a_whole_stripe_is_opened_without_it() {
    holds("unlogged_begun_without_all", |seed| {
        let (mut scene, pool, old) = begin(seed);
        let away = third(seed);
        scene.disks[away].fail_all(Some(Status::Path));
        let new = noise(2, LEN);
        scene.write(&pool, "v", 0, &new);
        scene.wait(Duration::from_secs(1));
        drop(pool);
        scene.cut();
        let devices = scene.living();
        let pool = scene.try_open(devices, true).map_err(|why| why.to_string())?;
        scene.is_one_of(&pool, 0, &[&old, &new])
    });
}

/// Two write to one new stripe. The one has put his strip in place, and not noted it, when the member with it is lost; the other comes to his turn then:
/// what is lost does not count as zeroes for him.
#[test]
fn what_another_has_just_written_to_a_new_stripe_counts_when_its_member_is_lost() {
    holds("fresh_beside_others", |seed| {
        let mut scene = Scene::sized(seed, 3, 16 << 11);
        scene.create(Level::Raid5);
        let held: Vec<_> =
            scene.devices().into_iter().map(|device| Arc::new(HeldDevice::new(device))).collect();
        let devices = held.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect();
        let pool = scene.open_quietly(devices, |_| {}).unwrap();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        let book = Superblock::decode(&scene.disks[0].state().content.get(4096..8192)).unwrap().unwrap();
        let first = book.layout.data_offset();
        let is_in = move |request: &hawser_block::Request, row: u64| {
            let from = first + row * STRIP;
            request.operation.is_write() && (from..from + STRIP).contains(&(request.lba.0 << 9))
        };
        // Parity of the first stripe, so that its turn lasts; and data of the second, so that the write does not end.
        held[2].hold(move |request| is_in(request, 0));
        held[0].hold(move |request| is_in(request, 1));
        let client = Rc::new(Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap()));
        let ended = Rc::new(RefCell::new(Vec::new()));
        let (mine, theirs) = (noise(6, LEN - 16384), noise(7, 16384));
        for (from, bytes) in [(STRIP, mine.clone()), (0, theirs.clone())] {
            let (client, ended) = (Rc::clone(&client), Rc::clone(&ended));
            scene.reactors[0].runtime().spawn(async move {
                let outcome = client.io(Operation::Write { fua: false }, from, bytes).await.0;
                ended.borrow_mut().push(outcome);
            });
            scene.wait(Duration::from_millis(5));
        }
        assert_eq!((held[2].held(), held[0].held(), ended.borrow().len()), (1, 1, 0));
        scene.lose(&pool, 1);
        held[2].release();
        scene.wait(Duration::from_millis(20));
        held[0].release();
        scene.wait(Duration::from_secs(1));
        assert_eq!(*ended.borrow(), [Ok(()), Ok(())]);
        drop(client);
        scene.is_one_of(&pool, 0, &[&[theirs, mine].concat()])
    });
}

/// Two units beside each other are written, of which one was before; another strip of the stripe cannot be read. What it has is computed where parity is
/// right, and not where nobody has written: there it counts as nothing, and becomes that.
#[test]
fn what_cannot_be_read_is_not_computed_where_parity_is_not_right() {
    holds("mixed_columns_computed", |seed| {
        let mut scene = Scene::sized(seed, 3, 16 << 11);
        scene.disks.iter().zip(seed..).for_each(|(disk, at)| disk.state().fill_with_junk(at));
        scene.create(Level::Raid5);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        scene.write(&pool, "v", 0, &noise(1, 4096));
        let book = Superblock::decode(&scene.disks[0].state().content.get(4096..8192)).unwrap().unwrap();
        let first = book.layout.data_offset() / 512;
        scene.disks[1].state().media_errors.extend(first..first + 16);
        let new = noise(2, 8192);
        scene.write(&pool, "v", 0, &new);
        scene.disks[1].state().media_errors.clear();
        scene.flush(&pool, "v");
        scene.lose(&pool, 0);
        scene.is_one_of(&pool, 0, &[&new])
    });
}

/// Two members are full when whole stripes are written: neither can be done without, so the write fails, and the stripes have strips of before and
/// after. The next opening lacks a member, and must not compute from them what that had, though the pool was closed.
#[test]
fn a_stripe_that_stays_half_written_is_told_to_the_next_opening() {
    holds("left_undoubted", |seed| {
        let (mut scene, pool, old) = begin(seed);
        scene.write(&pool, "v", 0, &old);
        scene.flush(&pool, "v");
        let data = scene.pool_data();
        for full in [1, 2] {
            let mut disk = scene.disks[full].state();
            (disk.unwritable, disk.error) = (data..u64::MAX, Status::NoSpace);
        }
        let new = noise(2, LEN);
        let written = scene.io(&pool, "v", Operation::Write { fua: false }, 0, &new).0;
        assert_eq!(written, Err(Status::NoSpace));
        // Both serve on, and what each has is read.
        scene.is_one_of(&pool, 0, &[&old, &new])?;
        scene.ask(pool.close()).unwrap();
        drop(pool);
        for full in [1, 2] {
            scene.disks[full].state().unwritable = 0..0;
        }
        scene.disks[1].fail_all(Some(Status::Path));
        scene.cut();
        let devices = scene.living();
        match scene.try_open(devices, true) {
            Err(_) => Ok(()),
            Ok(pool) => scene.is_one_of(&pool, 0, &[&old, &new]),
        }
    });
}

/// A member that is full alone is done without, and the stripe has all that the write said.
#[test]
fn a_member_that_is_full_alone_is_put_out() {
    let (mut scene, pool, old) = begin(1);
    scene.write(&pool, "v", 0, &old);
    let data = scene.pool_data();
    {
        let mut disk = scene.disks[1].state();
        (disk.unwritable, disk.error) = (data..u64::MAX, Status::NoSpace);
    }
    let new = noise(2, LEN);
    scene.write(&pool, "v", 0, &new);
    assert_ne!(pool.view().members[1].state, MemberState::InSync);
    assert_eq!(scene.read(&pool, "v", 0, LEN), new);
}

/// Without member 1 a strip on member 0 is written, through the log; then its extent is discarded, on the members too, and a strip that member 1 would
/// have is written to the same columns. It is in the parity alone, which was made beside zeroes: the opening after a death must not bring back what the
/// log has of member 0. Seed 1568430 found it.
#[test]
fn what_was_discarded_does_not_come_back_from_the_log() {
    holds("discards_of_logged", |seed| {
        let mut scene = Scene::sized(seed, 3, 16 << 11);
        scene.create(Level::Raid5);
        let devices = scene.devices();
        let pool = scene.open_quietly(devices, |options| options.discard = true).unwrap();
        scene.ask(pool.create_volume("v", 1 << 30)).unwrap();
        // All of the pool, so that the extent that is given back is the one that is taken next.
        let old = noise(1, LEN);
        let write = Operation::Write { fua: false };
        let mut at = 0;
        while scene.io(&pool, "v", write, at, &old).0 == Ok(()) {
            at += LEN as u64;
        }
        scene.flush(&pool, "v");
        scene.lose(&pool, 1);
        scene.write(&pool, "v", 0, &noise(2, 4096));
        assert_eq!(scene.io(&pool, "v", Operation::Discard, 0, &old).0, Ok(()));
        let new = noise(3, 4096);
        scene.write(&pool, "v", STRIP, &new);
        drop(pool);
        scene.kill();
        let pool = scene.open_degraded();
        scene.is_one_of(&pool, STRIP, &[&new])
    });
}

/// Member 2 is away, and member 1 is full: of a part of a stripe the data comes to member 0, and the parity does not come to member 1, which nobody can
/// do without. The guest gives up, and the pool is closed: what the log has of it is done by the next opening all the same. What member 2 has of the
/// stripe cannot be computed before.
#[test]
fn a_pool_is_not_closed_over_what_only_its_log_has() {
    holds("closed_with_entries", |seed| {
        let (mut scene, pool, old) = begin(seed);
        scene.lose(&pool, 2);
        let data = scene.pool_data();
        {
            let mut disk = scene.disks[1].state();
            (disk.unwritable, disk.error) = (data..u64::MAX, Status::NoSpace);
        }
        let new = noise(2, 4096);
        let client = Rc::new(Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap()));
        let (writer, bytes) = (Rc::clone(&client), new.clone());
        scene.reactors[0].runtime().spawn(async move {
            let _ = writer.io(Operation::Write { fua: false }, 3 * STRIP, bytes).await;
        });
        scene.wait(Duration::from_secs(2));
        client.abort();
        scene.wait(Duration::from_millis(20));
        drop(client);
        let _ = scene.ask(pool.close());
        drop(pool);
        scene.disks[1].state().unwritable = 0..0;
        let pool = scene.open_degraded();
        let mut other = old.clone();
        let at = usize::try_from(3 * STRIP).unwrap();
        other[at..at + new.len()].copy_from_slice(&new);
        scene.is_one_of(&pool, 0, &[&old, &other])
    });
}

/// The process dies while a part of a stripe is written, and the pool is only looked at: nobody puts it right. A strip that cannot be read is not made
/// of what may not go together.
#[test]
fn what_is_half_written_is_not_computed_from_in_a_pool_that_is_only_looked_at() {
    holds("read_only_not_doubted", |seed| {
        for steps in 1..8 {
            let (mut scene, pool, old) = begin(seed);
            // Its region is marked.
            scene.write(&pool, "v", 0, &old);
            let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
            let new = noise(2, 4096);
            scene.reactors[0].runtime().spawn(async move {
                let _ = client.io(Operation::Write { fua: false }, 0, new).await;
            });
            scene.trapped_at(steps, Duration::from_secs(1));
            drop(pool);
            scene.kill();
            scene.untrap();
            let devices = scene.devices();
            let pool = scene.open_quietly(devices, |options| options.read_only = true).unwrap();
            let data = scene.pool_data();
            scene.disks[1].state().media_errors.extend(data..data + 8);
            let (outcome, read) = scene.io(&pool, "v", Operation::Read, STRIP, &vec![0; 4096]);
            let at = usize::try_from(STRIP).unwrap();
            if outcome.is_ok() && read != old[at..at + 4096] {
                return Err(format!("after {steps} steps a strip is what nobody wrote"));
            }
        }
        Ok(())
    });
}

/// Member 1 is away, and what it has is computed. A strip of another is changed, in the log and in place, and one of the two that are left loses its
/// cache before anybody flushes, while the pool is open: the strip is old again there, and its parity is new, or the other way round. What stood in
/// member 1's strip, durable for long, was computed from these two; and was lost for good when the log's entry was released.
#[test]
fn the_log_makes_good_what_was_in_the_cache_of_a_member_that_cannot_be_done_without() {
    let happen = |seed: u64, is_waited_for: bool| {
        for lost in [0, 2] {
            let scene = Scene::sized(seed, 3, 16 << 11);
            if seed.is_multiple_of(2) {
                // Else nothing names a cache, and only its loss is told.
                scene
                    .disks
                    .iter()
                    .zip(1..)
                    .for_each(|(disk, it)| disk.state().cache_identity = Some([it; 16]));
            }
            let (mut scene, pool, mut all) = begin_with(scene);
            scene.lose(&pool, 1);
            for (number, at) in (2..).zip([0, 1024, 512, 20480]) {
                // Several that go over each other: the newest counts.
                let new = noise(number, 4096);
                scene.write(&pool, "v", at, &new);
                all[usize::try_from(at).unwrap()..][..4096].copy_from_slice(&new);
            }
            scene.disks[lost].lose_power();
            if is_waited_for {
                scene.wait(Duration::from_secs(5));
            }
            scene.is_one_of(&pool, 0, &[&all])?;
            if scene.io(&pool, "v", Operation::Flush, 0, &[]).0 != Err(Status::Media) {
                return Err("nobody was told that something may be lost".to_owned());
            }
            scene.flush(&pool, "v");
            scene.ask(pool.close()).unwrap();
            drop(pool);
            scene.kill();
            let pool = scene.open_degraded();
            scene.is_one_of(&pool, 0, &[&all])?;
            scene.disks[1].fail_all(None);
            let back = Arc::clone(&scene.disks[1]);
            scene.ask(pool.add_member(back)).unwrap();
            scene.is_one_of(&pool, 0, &[&all])?;
            scene.are_same(&pool)?;
        }
        Ok(())
    };
    holds("lost_cache_not_mended", |seed| happen(seed, true));
    holds("computed_with_lost_cache", |seed| happen(seed, false));
}

/// A member is away, or being brought back, and another one fails its part of a stripe for good. Neither can go, and the stripe could not be finished: its
/// write waited for ever, and behind it every snapshot, rejoin and replacement. A pool that was killed then was refused. It waits for a while, and takes no
/// more writes then; what is in the log is put in place by the next opening that finds a member that takes it.
#[test]
fn a_stripe_that_cannot_be_finished_ends_writes_and_nothing_else() {
    let happen = |seed: u64, is_back: bool| {
        for (broken, at) in [(2, STRIP), (1, STRIP)] {
            let (mut scene, pool, old) = begin(seed);
            scene.write(&pool, "v", 0, &old);
            scene.flush(&pool, "v");
            scene.lose(&pool, 0);
            scene.ask(pool.create_volume("w", 1 << 20)).unwrap();
            scene.write(&pool, "w", 0, &old);
            if is_back {
                // It takes its time.
                scene.disks[0].state().set_latency(Duration::from_secs(30));
                scene.disks[0].fail_all(None);
                scene.until(&pool, 0, MemberState::Syncing);
            }
            let data = scene.pool_data();
            {
                let mut disk = scene.disks[broken].state();
                (disk.unwritable, disk.error) = (data..data + (STRIP >> 9), Status::Media);
            }
            let new = noise(2, 4096);
            let (outcome, _) = scene.io(&pool, "v", Operation::Write { fua: false }, at, &new);
            if outcome != Err(Status::Media) {
                return Err(format!("the write ended as {outcome:?}"));
            }
            let snapshot = scene.ask(pool.snapshot(vec![("v".to_owned(), "s".to_owned())]));
            let why = snapshot.expect_err("nothing is changed any more").to_string();
            let told = pool.view().troubles.join("; ");
            assert!(
                why.contains("fails one with") && told.contains("no more writes are taken"),
                "{why}; {told}"
            );
            assert_eq!(
                scene.io(&pool, "w", Operation::Write { fua: false }, 0, &new).0,
                Err(Status::ReadOnly)
            );
            scene.is_one_of(&pool, STRIP * 2, &[&old[2 * 16384..]])?;
            scene.flush(&pool, "w");
            // Its strip in that stripe is lost, or it is as it was.
            let (outcome, read) = scene.io(&pool, "v", Operation::Read, 0, &vec![0; 4096]);
            if outcome.is_ok() && read != old[..4096] {
                return Err("a strip is what nobody wrote".to_owned());
            }
            scene.disks[0].state().set_latency(Duration::ZERO);
            scene.ask(pool.close()).expect_err("the log is needed");
            drop(pool);
            scene.kill();
            if !is_back {
                let devices = scene.living();
                let why = scene.try_open(devices, true).err().expect("it is not mended").to_string();
                assert!(why.contains(&format!("(member {broken})")), "{why}");
                scene.kill();
            }
            scene.disks[broken].state().unwritable = 0..0;
            let pool = scene.open_degraded();
            let mut all = old.clone();
            all[usize::try_from(at).unwrap()..][..4096].copy_from_slice(&new);
            scene.is_one_of(&pool, 0, &[&all])?;
            scene.disks[0].fail_all(None);
            let back = Arc::clone(&scene.disks[0]);
            if !is_back {
                scene.ask(pool.add_member(back)).unwrap();
            }
            scene.are_same(&pool)?;
            scene.is_one_of(&pool, 0, &[&all])?;
        }
        Ok(())
    };
    holds("half_written_computed", |seed| happen(seed, seed.is_multiple_of(2)));
}

/// Who is out of reach is waited for, however long; and when it answers something else for a moment, as a target may that has just started, the pool goes on all
/// the same. The time that it was away counted, and the first other error stopped all writes.
#[test]
fn an_outage_is_no_reason_to_end_writes_at_the_first_error_after_it() {
    let (mut scene, pool, old) = begin(1);
    scene.write(&pool, "v", 0, &old);
    scene.lose(&pool, 0);
    let data = scene.pool_data();
    let fails_with = |scene: &Scene, status| {
        let mut disk = scene.disks[1].state();
        (disk.unwritable, disk.error) = (data..data + (STRIP >> 9), status);
    };
    fails_with(&scene, Status::Path);
    let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
    let (new, ended) = (noise(2, 4096), Rc::new(Cell::new(None)));
    let (bytes, told) = (new.clone(), Rc::clone(&ended));
    scene.reactors[0].runtime().spawn(async move {
        told.set(Some(client.io(Operation::Write { fua: false }, STRIP, bytes).await.0));
    });
    scene.wait(Duration::from_secs(60));
    let why = &pool.view().members[1].why;
    assert!(why.contains("fails writes with path, which wait"), "{why}");
    fails_with(&scene, Status::Media);
    scene.wait(Duration::from_secs(1));
    scene.disks[1].state().unwritable = 0..0;
    scene.wait(Duration::from_secs(2));
    assert_eq!(ended.get(), Some(Ok(())));
    assert_eq!(pool.view().members[1].why, "", "nothing waits any more");
    assert_eq!(scene.read(&pool, "v", STRIP, 4096), new);
}

/// One of the two that are left of a RAID 5 has a bad block in its parity log. An entry need not be on just that one.
#[test]
fn an_entry_goes_to_another_member_when_one_does_not_take_it() {
    let (mut scene, pool, old) = begin(1);
    scene.write(&pool, "v", 0, &old);
    scene.lose(&pool, 0);
    let book = Superblock::decode(&scene.disks[0].state().content.get(4096..8192)).unwrap().unwrap();
    let log = (book.layout.parity_log_offset() + 8192) / 512;
    for bad in [1, 2] {
        for status in [Status::Media, Status::NoSpace] {
            let mut disk = scene.disks[bad].state();
            (disk.unwritable, disk.error) = (log..scene.pool_data(), status);
            drop(disk);
            for at in [STRIP, 2 * STRIP, 3 * STRIP] {
                let new = noise(at, 4096);
                scene.write(&pool, "v", at, &new);
                assert_eq!(scene.read(&pool, "v", at, 4096), new);
            }
        }
        scene.disks[bad].state().unwritable = 0..0;
    }
}

/// Writes have ended, and a member that cannot be done without loses its cache. Reads of what is computed wait until the log is put in place on it again,
/// which nobody did any more; and a file system that is read-only by then asks for no FLUSH.
#[test]
fn reads_go_on_after_a_lost_cache_though_writes_have_ended() {
    let (mut scene, pool, old) = begin(1);
    scene.write(&pool, "v", 0, &old);
    scene.flush(&pool, "v");
    scene.lose(&pool, 0);
    let data = scene.pool_data();
    {
        let mut disk = scene.disks[1].state();
        (disk.unwritable, disk.error) = (data..data + (STRIP >> 9), Status::Media);
    }
    let (outcome, _) = scene.io(&pool, "v", Operation::Write { fua: false }, STRIP, &noise(2, 4096));
    assert_eq!(outcome, Err(Status::Media));
    scene.disks[2].lose_power();
    // Member 0 has the second strip of row 1.
    assert_eq!(scene.read(&pool, "v", 3 * STRIP, 4096), old[3 * 16384..][..4096]);
    let back: Arc<dyn Device> = scene.disks[0].clone();
    let why = scene.ask(pool.add_member(back)).expect_err("writes have ended").to_string();
    assert!(why.contains("no more writes are taken"), "{why}");
}

/// A whole stripe is written without the log, one member falls silent and is put out, and another fails its strip for good: nobody could have said what the
/// first one had there, and the pool was refused from then on. It is in the log by then.
#[test]
fn a_whole_stripe_that_cannot_be_finished_is_in_the_log_after_all() {
    holds("stuck_stripe_unlogged", |seed| {
        let (mut scene, pool, _) = begin(seed);
        let all = noise(4, LEN);
        scene.write(&pool, "v", 0, &all);
        let data = scene.pool_data();
        {
            let mut disk = scene.disks[1].state();
            (disk.unwritable, disk.error) = (data..data + (STRIP >> 9), Status::Media);
        }
        scene.disks[0].fail_all(Some(Status::Path));
        let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
        let (new, ended) = (noise(5, 32 << 10), Rc::new(Cell::new(None)));
        let (bytes, told) = (new.clone(), Rc::clone(&ended));
        scene.reactors[0].runtime().spawn(async move {
            told.set(Some(client.io(Operation::Write { fua: false }, 0, bytes).await.0));
        });
        scene.wait(Duration::from_secs(1));
        let _ = scene.io(&pool, "v", Operation::Flush, 0, &[]);
        scene.wait(Duration::from_secs(60));
        if !matches!(ended.get(), Some(Err(_))) {
            return Err(format!("the write ended as {:?}", ended.get()));
        }
        let why = scene.ask(pool.close()).expect_err("the log is needed").to_string();
        drop(pool);
        scene.kill();
        scene.disks[1].state().unwritable = 0..0;
        let devices = scene.living();
        let pool = scene.try_open(devices, true).map_err(|error| format!("{error}; before: {why}"))?;
        let mut want = all.clone();
        want[..new.len()].copy_from_slice(&new);
        scene.is_one_of(&pool, 0, &[&want])?;
        Ok(())
    });
}
