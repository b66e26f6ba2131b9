//! Stripes that were being written when the power went, and a member with it; rows as in [`super::stripes`].

use super::*;

const LEN: usize = 64 << 10;
const LARGE: usize = 1 << 20;

/// A volume that is written and durable, and whole stripes of it were written before.
fn begin(seed: u64, change: impl FnOnce(&mut OpenOptions)) -> (Scene, Pool, Vec<u8>) {
    let mut scene = Scene::sized(seed, 3, 16 << 11);
    scene.disks.iter().zip(1..).for_each(|(disk, at)| disk.state().cache_identity = Some([at; 16]));
    scene.create(Level::Raid5);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", LARGE as u64)).unwrap();
    let old = noise(1, LARGE);
    scene.write(&pool, "v", 0, &old);
    let pool = scene.reopen_quietly(pool, change);
    (scene, pool, old)
}

/// Begins to write all of it, from now on on the hot path.
fn begin_large(scene: &mut Scene, pool: &Pool, bytes: &[u8]) {
    let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
    let bytes = bytes.to_vec();
    scene.reactors[0].runtime().spawn(async move {
        let _ = client.io(Operation::Write { fua: false }, 0, bytes).await;
    });
}

/// A part of a stripe is in the log when the power goes; and it goes again at any step of the next opening, with a member: what is put in place from
/// the log is durable before the log says that it is not needed.
#[test]
fn what_is_put_in_place_from_the_log_is_durable_before_the_log_is_begun_anew() {
    for promise in ["parity_replayed_unflushed", "parity_log_ended_before_replay"] {
        holds(promise, |seed| {
            for steps in (1 + seed..144).step_by(24) {
                let (mut scene, pool, old) = begin(seed, |_| {});
                let new = noise(2, 4096);
                scene.write(&pool, "v", 0, &new);
                drop(pool);
                scene.cut();
                let options = OpenOptions::new(HOST, Box::new(scene.tail.clone()));
                let handle = scene.reactors[0].runtime().handle();
                let opened = Pool::open(&handle, scene.devices(), options);
                drop(scene.trapped(steps, opened));
                scene.disks[1].fail_all(Some(Status::Path));
                scene.cut();
                scene.untrap();
                let pool = scene.open_degraded();
                let mut other = old[..LEN].to_vec();
                other[..new.len()].copy_from_slice(&new);
                scene
                    .is_one_of(&pool, 0, &[&old[..LEN], &other])
                    .map_err(|why| format!("after {steps} steps: {why}"))?;
            }
            Ok(())
        });
    }
}

/// Whole stripes are being written without the log when the power goes, and a member with it: what it had cannot be told, and that is said.
#[test]
fn a_pool_that_cannot_tell_what_a_lost_member_had_is_refused() {
    let refused = Rc::new(RefCell::new(0));
    for promise in ["half_written_opened", "unlogged_not_told"] {
        holds(promise, |seed| {
            let (mut scene, pool, old) = begin(seed, |_| {});
            for _ in 0..2 {
                scene.write(&pool, "v", 0, &old);
            }
            scene.flush(&pool, "v");
            let new = noise(2, LARGE);
            begin_large(&mut scene, &pool, &new);
            scene.wait(Duration::from_micros(10 + seed));
            drop(pool);
            scene.disks[third(seed)].fail_all(Some(Status::Path));
            scene.cut();
            let devices = scene.living();
            match scene.try_open(devices, true) {
                Err(PoolError::Conflict(why)) if why.contains("whole stripes were being written") => {
                    *refused.borrow_mut() += 1;
                    Ok(())
                }
                Err(why) => Err(why.to_string()),
                Ok(pool) => scene.is_one_of(&pool, 0, &[&old, &new]),
            }
        });
    }
    assert!(*refused.borrow() > 0);
}

/// A member is lost a while after whole stripes were written, and the power a while later: what was written without the log is durable by then, on those
/// who are left.
#[test]
fn what_was_written_without_the_log_is_durable_soon_after_a_member_is_lost() {
    holds("unlogged_ended_unflushed", |seed| {
        let (mut scene, pool, old) = begin(seed, |_| {});
        let new = noise(2, LARGE);
        scene.write(&pool, "v", 0, &new);
        // By that alone: nobody writes, or flushes.
        let lost = third(seed);
        scene.disks[lost].lose_power();
        scene.disks[lost].fail_all(Some(Status::Path));
        scene.wait(Duration::from_millis(200));
        drop(pool);
        scene.cut();
        let pool = scene.open_degraded();
        scene.is_one_of(&pool, 0, &[&old, &new])
    });
}

/// A member says that it is full when a stripe's parity is new already: it is out, or the others would make something of its old strip.
#[test]
fn a_stripe_that_a_member_does_not_take_is_whole_without_it() {
    holds("left_half_written", |seed| {
        let (mut scene, pool, old) = begin(seed, |_| {});
        let book = Superblock::decode(&scene.disks[0].state().content.get(4096..8192)).unwrap().unwrap();
        let first = book.layout.data_offset() / 512;
        {
            let mut state = scene.disks[0].state();
            (state.unwritable, state.error) = (first..first + 8, Status::NoSpace);
        }
        let new = noise(2, 4096);
        let _ = scene.io(&pool, "v", Operation::Write { fua: false }, 0, &new);
        scene.wait(Duration::from_millis(100));
        // Nobody has been told yet that another one is lost too; then that one is there again, and not the first.
        let mut other = old[..LEN].to_vec();
        other[..new.len()].copy_from_slice(&new);
        if pool.view().members[0].state == MemberState::InSync {
            scene.lose(&pool, 1);
        }
        scene.is_one_of(&pool, 0, &[&old[..LEN], &other])
    });
}

/// Two of the three members that may get an entry of the log are full. The third has it: the change is not given up as one that never was, or the next
/// opening puts it in place, and over a parity that knows nothing of it.
#[test]
fn an_entry_that_one_member_has_is_not_given_up() {
    holds("entry_left_in_log", |seed| {
        let (mut scene, pool, old) = begin(seed, |_| {});
        let book = Superblock::decode(&scene.disks[0].state().content.get(4096..8192)).unwrap().unwrap();
        for full in [1, 2] {
            let mut state = scene.disks[full].state();
            let log = (book.layout.parity_log_offset() + 8192) / 512..book.layout.data_offset() / 512;
            (state.unwritable, state.error) = (log, Status::NoSpace);
        }
        let (first, second) = (noise(2, 4096), noise(3, 4096));
        let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
        let bytes = first.clone();
        scene.reactors[0].runtime().spawn(async move {
            let _ = client.io(Operation::Write { fua: false }, 0, bytes).await;
        });
        scene.wait(Duration::from_secs(5));
        [1, 2].into_iter().for_each(|full| scene.disks[full].state().unwritable = 0..0);
        scene.wait(Duration::from_secs(5));
        scene.until(&pool, 1, MemberState::InSync);
        scene.write(&pool, "v", 16 << 10, &second);
        drop(pool);
        scene.disks[1].fail_all(Some(Status::Path));
        scene.cut();
        let pool = scene.open_degraded();
        let mut other = old[..LEN].to_vec();
        other[..first.len()].copy_from_slice(&first);
        other[16 << 10..20 << 10].copy_from_slice(&second);
        scene.is_one_of(&pool, 0, &[&old[..LEN], &other])
    });
}
