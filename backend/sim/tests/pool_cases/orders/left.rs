//! Members that hang with a write in them, of which nobody knows what becomes: the guest's write does not wait for it, and it may come
//! long after the member has come back.

use super::*;

const LEVELS: [(Level, u8); 4] =
    [(Level::Raid1, 2), (Level::Raid10, 4), (Level::Raid5, 3), (Level::Raid6, 5)];
/// How long a member is waited for, by default, and until that is looked at.
const WAITED: Duration = Duration::from_secs(12);
/// When what hangs is carried out.
const GHOST: Duration = Duration::from_secs(60);

/// How a guest's write has ended, when it has.
type Ended = Rc<RefCell<Option<Outcome>>>;

/// A pool whose member 1 hangs with a write in it, and is lost.
fn hang(seed: u64, (level, members): (Level, u8), len: usize) -> (Scene, Pool, Ended) {
    let mut scene = Scene::sized(seed, members, 16 << 11);
    scene.create(level);
    let devices = scene.devices();
    let pool = scene.open_quietly(devices, |_| ()).unwrap();
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    scene.write(&pool, "v", 0, &noise(1, 256 << 10));
    scene.flush(&pool, "v");
    // Nothing is left to be done, but what is asked for.
    scene.wait(Duration::from_secs(5));
    {
        let mut disk = scene.disks[1].state();
        (disk.ignores_aborts, disk.writes_stick, disk.stuck_permille) = (true, true, 1000);
        disk.stuck_ns = u64::try_from(GHOST.as_nanos()).unwrap();
    }
    let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
    let ended = Ended::default();
    let (tell, bytes) = (Rc::clone(&ended), noise(2, len));
    scene.reactors[0].runtime().spawn(async move {
        let outcome = client.io(Operation::Write { fua: false }, 0, bytes).await.0;
        *tell.borrow_mut() = Some(outcome);
    });
    // What goes to the others first, or to it first, is there.
    scene.wait(Duration::from_millis(50));
    scene.disks[1].fail_all(Some(Status::Path));
    scene.disks[1].state().stuck_permille = 0;
    (scene, pool, ended)
}

/// A target was killed with a write in it, and nothing else was asked of it: the write waited for as long as the target could have carried it out, 41 s.
#[test]
fn a_write_to_a_member_that_is_lost_with_it_ends_in_the_time_that_a_member_is_waited_for() {
    holds("kept_writes_waited_for", |seed| {
        let all = LEVELS.into_iter().flat_map(|shape| [(shape, false), (shape, true)]);
        for (shape, is_back) in all {
            let (mut scene, _pool, ended) = hang(seed, shape, 4096);
            if is_back {
                scene.wait(Duration::from_secs(1));
                // It goes on to keep the write.
                scene.disks[1].fail_all(None);
                scene.wait(WAITED);
            }
            scene.wait(Duration::from_secs(3));
            let outcome = *ended.borrow();
            if outcome != Some(Ok(())) {
                return Err(format!("{shape:?} back: {is_back}: the write has ended: {outcome:?}"));
            }
        }
        Ok(())
    });
}

/// The member is back long before what was left there is carried out, over what stands there then.
#[test]
fn a_member_that_was_left_comes_back_when_nothing_of_before_can_reach_it() {
    holds("left_writes_forgotten", |seed| {
        for (shape, len) in LEVELS.into_iter().flat_map(|shape| [(shape, 256 << 10), (shape, 4096)]) {
            let (mut scene, pool, ended) = hang(seed, shape, len);
            scene.wait(Duration::from_secs(3));
            let outcome = *ended.borrow();
            if outcome != Some(Ok(())) {
                return Err(format!("{shape:?} {len}: the write has ended: {outcome:?}"));
            }
            let has_all = len > 4096;
            assert!(!has_all || scene.disks[1].has_left_behind(), "some of it was to go there");
            scene.disks[1].fail_all(None);
            let mut want = noise(1, 256 << 10);
            want[..len].copy_from_slice(&noise(2, len));
            for (round, at) in (3..).zip((0..256 << 10).step_by(16 << 10)) {
                let new = noise(round, 4096);
                scene.write(&pool, "v", at as u64, &new);
                want[at..at + 4096].copy_from_slice(&new);
                scene.wait(Duration::from_secs(1));
            }
            scene.wait(GHOST + Duration::from_secs(20));
            let view = pool.view();
            if view.is_degraded {
                return Err(format!("{shape:?} {len}: {:?}", view.members));
            }
            scene.is_one_of(&pool, 0, &[&want])?;
            scene.are_same(&pool)?;
            scene.ask(pool.close()).unwrap();
            drop(pool);
            scene.check();
        }
        Ok(())
    });
}
