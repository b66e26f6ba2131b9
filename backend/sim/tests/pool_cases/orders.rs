//! Orders of durable writes that chance breaks too seldom for seeds to find: each history is made for one of them. With
//! `--cfg hawser_mutations` the order is broken on purpose too, and that has to be found out.

use super::*;
use hawser_block::DeviceState;
use hawser_volume::simulated::break_promise;

const SEEDS: u64 = 24;

/// Lets a history happen with some seeds; then again with the promise broken, when something has to be wrong.
fn holds(promise: &str, happen: impl Fn(u64) -> Result<(), String>) {
    for seed in 0..SEEDS {
        happen(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }
    if cfg!(hawser_mutations) {
        break_promise(Some(promise));
        let found = (0..SEEDS).find_map(|seed| happen(seed).err());
        break_promise(None);
        println!("{promise}: {}", found.expect("it is found out"));
    }
}

impl Scene {
    /// What is lost in a cut is another thing on each disk.
    fn shake(&mut self, seed: u64) {
        self.disks.iter().zip(1..).for_each(|(disk, number)| disk.seed(seed ^ number << 32));
    }

    /// The power goes, and all is there again but who is dead.
    fn cut(&mut self) {
        self.kill();
        self.tail = MemoryTail::default();
        self.disks.iter().for_each(|disk| disk.state().lose_cache());
    }

    /// A member dies, and the pool knows.
    fn lose(&mut self, pool: &Pool, member: usize) {
        self.disks[member].fail_all(Some(Status::Path));
        while pool.view().members[member].state == MemberState::InSync {
            self.flush(pool, "v");
            self.wait(Duration::from_millis(100));
        }
    }

    fn open_degraded(&mut self) -> Pool {
        let mut devices = self.devices();
        devices.retain(|device| device.state() == DeviceState::Ready);
        self.try_open(devices, true).unwrap()
    }
}

/// Of a stripe whose blocks have all been discarded a part is written, without the log, since nothing else counts there. Where the power
/// brings the discarded back it has to be what it was, or nothing: also on the member that is away.
#[test]
fn a_discard_is_durable_before_its_stripe_is_written_as_a_new_one() {
    holds("invalid_units_not_durable", |seed| {
        for away in 0..3 {
            let mut scene = Scene::new(seed, 3);
            scene.shake(seed);
            scene.create(Level::Raid5);
            let pool = scene.open();
            scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
            let old = pattern(1, 64 << 10);
            scene.write(&pool, "v", 0, &old);
            scene.flush(&pool, "v");
            scene.lose(&pool, away);
            let row = vec![0; 32 << 10];
            assert_eq!(scene.io(&pool, "v", Operation::Discard, 0, &row).0, Ok(()));
            let new = pattern(2, 4096);
            scene.write(&pool, "v", 0, &new);
            drop(pool);
            scene.cut();
            let pool = scene.open_degraded();
            let read = scene.read(&pool, "v", 0, 64 << 10);
            for (at, block) in read.chunks(512).enumerate() {
                let at = at * 512;
                let is_old =
                    block == &old[at..at + 512] || at < row.len() && block.iter().all(|byte| *byte == 0);
                let is_new = new.get(at..at + 512).is_some_and(|new| block == new);
                if !is_old && !is_new {
                    return Err(format!("byte {at} is what nobody wrote, without member {away}"));
                }
            }
        }
        Ok(())
    });
}

/// Two hold an extent, and one lets go of it: the other may write to it in place when that is durable, and not before. After a power cut
/// the first would find there what the other has written.
#[test]
fn who_let_go_of_an_extent_does_not_get_it_back_with_what_another_has_written() {
    holds("rebirth_before_durable", |seed| {
        let mut scene = Scene::new(seed, 2);
        scene.shake(seed);
        scene.create(Level::Raid1);
        let pool = scene.open();
        scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
        let old = pattern(1, 64 << 10);
        scene.write(&pool, "v", 0, &old);
        scene.ask(pool.snapshot(vec![("v".to_owned(), "s".to_owned())])).unwrap();
        scene.ask(pool.clone_volume("s", "c")).unwrap();
        scene.ask(pool.delete_volume("s")).unwrap();
        scene.wait(Duration::from_secs(3));
        scene.flush(&pool, "v");
        let all = vec![0; old.len()];
        assert_eq!(scene.io(&pool, "v", Operation::Discard, 0, &all).0, Ok(()));
        scene.write(&pool, "c", 0, &pattern(2, 64 << 10));
        drop(pool);
        scene.cut();
        let pool = scene.open();
        let read = scene.read(&pool, "v", 0, old.len());
        // Extents are being given back still.
        drop(pool);
        scene.kill();
        match read == old || read == all {
            true => Ok(()),
            false => Err("what was discarded is what another volume has written".to_owned()),
        }
    });
}
