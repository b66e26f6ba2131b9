//! Orders of durable writes that chance breaks too seldom for seeds to find: each history is made for one of them. With
//! `--cfg hawser_mutations` the order is broken on purpose too, and that has to be found out.

use super::*;
use hawser_block::{DeviceState, DiscardLimits};
use hawser_sim::Trap;
use hawser_volume::simulated::break_promise;
use std::panic::{AssertUnwindSafe, catch_unwind};

#[path = "orders/crashes.rs"]
mod crashes;
#[path = "orders/joining.rs"]
mod joining;
#[path = "orders/left.rs"]
mod left;
#[path = "orders/opening.rs"]
mod opening;
#[path = "orders/replacing.rs"]
mod replacing;
#[path = "orders/stripes.rs"]
mod stripes;

const SEEDS: u64 = 24;

/// Lets a history happen with some seeds; then again with the promise broken, when something has to be wrong.
pub(crate) fn holds(promise: &str, happen: impl Fn(u64) -> Result<(), String>) {
    for seed in 0..SEEDS {
        happen(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }
    if cfg!(hawser_mutations) {
        break_promise(Some(promise));
        let found = (0..SEEDS).find_map(|seed| {
            let happened = catch_unwind(AssertUnwindSafe(|| happen(seed)));
            happened.unwrap_or_else(|_| Err("a panic, told above".to_owned())).err()
        });
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
    pub(crate) fn cut(&mut self) {
        self.kill();
        self.tail = MemoryTail::default();
        self.disks.iter().for_each(|disk| disk.state().lose_cache());
    }

    /// A member dies, and the pool knows.
    pub(crate) fn lose(&mut self, pool: &Pool, member: usize) {
        self.disks[member].fail_all(Some(Status::Path));
        while pool.view().members[member].state == MemberState::InSync {
            self.flush(pool, "v");
            self.wait(Duration::from_millis(100));
        }
    }

    /// Who is not dead.
    fn living(&self) -> Vec<Arc<dyn Device>> {
        let mut devices = self.devices();
        devices.retain(|device| device.state() == DeviceState::Ready);
        devices
    }

    pub(crate) fn open_degraded(&mut self) -> Pool {
        let devices = self.living();
        self.try_open(devices, true).unwrap()
    }

    /// Opens with these devices, and nothing becomes durable by itself.
    pub(crate) fn open_quietly(
        &mut self,
        devices: Vec<Arc<dyn Device>>,
        change: impl FnOnce(&mut OpenOptions),
    ) -> Result<Pool, PoolError> {
        let mut options = OpenOptions::new(HOST, Box::new(self.tail.clone()));
        options.intent_idle = Duration::from_secs(1 << 20);
        change(&mut options);
        let handle = self.reactors[0].runtime().handle();
        let opened = Pool::open(&handle, devices, options);
        self.ask(opened)
    }

    /// Everything is durable, and no region is marked.
    fn reopen_quietly(&mut self, pool: Pool, change: impl FnOnce(&mut OpenOptions)) -> Pool {
        self.ask(pool.close()).unwrap();
        drop(pool);
        let devices = self.devices();
        self.open_quietly(devices, change).unwrap()
    }

    /// Waits until a member is in this state.
    fn until(&mut self, pool: &Pool, member: usize, state: MemberState) {
        self.until_it(pool, |pool| pool.view().members[member].state == state);
    }

    fn until_it(&mut self, pool: &Pool, is: impl Fn(&Pool) -> bool) {
        for _ in 0..2_000_000 {
            if is(pool) {
                return;
            }
            self.wait(Duration::from_millis(1));
        }
        panic!("it does not come to it: {:?}", pool.view());
    }

    /// How many units are not the same on the members, or do not go with their parity.
    pub(crate) fn differing(&mut self, pool: &Pool) -> u64 {
        self.until_it(pool, |pool| {
            let view = pool.view();
            let is_whole = view.members.iter().all(|member| member.state == MemberState::InSync);
            is_whole && view.unsynced_regions == 0
        });
        self.ask(pool.scrub(false)).unwrap();
        let scrub = |pool: &Pool| pool.view().tasks.into_iter().rev().find(|task| task.kind == "scrub");
        self.until_it(pool, |pool| scrub(pool).is_some_and(|task| task.is_done));
        scrub(pool).unwrap().mismatches
    }

    /// All are the same.
    fn are_same(&mut self, pool: &Pool) -> Result<(), String> {
        match self.differing(pool) {
            0 => Ok(()),
            count => Err(format!("members differ in {count} places")),
        }
    }

    /// The first block of the members' data.
    pub(crate) fn pool_data(&self) -> u64 {
        let book = Superblock::decode(&self.disks[0].state().content.get(4096..8192)).unwrap().unwrap();
        book.layout.data_offset() / 512
    }

    /// Disks of this size.
    pub(crate) fn sized(seed: u64, members: u8, blocks: u64) -> Scene {
        let mut scene = Scene::new(seed, 0);
        scene.disks = (0..members).map(|number| disk(number, blocks)).collect();
        scene.shake(seed);
        scene
    }

    /// What is asked for happens until the process has done so many steps more: then it is dead.
    fn trapped<T: Send + 'static>(&mut self, steps: u64, ask: Ask<T>) -> Option<Result<T, PoolError>> {
        let trap = self.trap(steps);
        let result = Rc::new(RefCell::new(None));
        let place = Rc::clone(&result);
        self.reactors[0].runtime().spawn(async move { *place.borrow_mut() = Some(ask.await) });
        let done = || result.borrow().is_some() || trap.is_sprung();
        self.world.run(&mut self.reactors, Duration::from_secs(600), done).expect("it ends");
        result.take().filter(|_| !trap.is_sprung())
    }

    /// The process does whatever it does, so many steps more.
    fn trapped_at(&mut self, steps: u64, most: Duration) {
        let trap = self.trap(steps);
        let until = self.world.now() + most;
        self.world.run_until(&mut self.reactors, until, || trap.is_sprung()).unwrap();
    }

    fn trap(&self, steps: u64) -> Arc<Trap> {
        let trap = Arc::new(Trap::default());
        self.disks.iter().for_each(|disk| disk.state().trap = Some(Arc::clone(&trap)));
        trap.set(steps);
        trap
    }

    /// What was set by `trapped` is not there any more.
    fn untrap(&mut self) {
        self.disks.iter().for_each(|disk| disk.state().trap = None);
    }

    /// Each block of what is read is that of one of these. Of several copies each is read.
    pub(crate) fn is_one_of(&mut self, pool: &Pool, from: u64, contents: &[&[u8]]) -> Result<(), String> {
        let len = contents[0].len();
        let device = pool.device("v").ok_or("there is no volume")?;
        let client = Rc::new(Client::new(self.reactors[0].runtime(), &device));
        for _ in 0..2 {
            let client = Rc::clone(&client);
            let (outcome, read) =
                self.run(async move { client.io(Operation::Read, from, vec![0xEE; len]).await });
            outcome.map_err(|status| format!("cannot be read at {from}: {}", status.name()))?;
            let is_known =
                |at: &usize| contents.iter().any(|content| content[*at..at + 512] == read[*at..at + 512]);
            if let Some(at) = (0..len).step_by(512).find(|at| !is_known(at)) {
                let at = from + at as u64;
                return Err(format!("byte {at} is what nobody wrote, or not what was durable"));
            }
        }
        Ok(())
    }
}

/// What `pattern` is not: of two of them, different strips differ by different bytes, so that their parities do too.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = hawser_sim::Random::new(seed);
    let words = (0..len.div_ceil(8)).flat_map(|_| random.next_u64().to_le_bytes());
    words.take(len).collect()
}

/// One of three.
fn third(seed: u64) -> usize {
    usize::try_from(seed % 3).unwrap()
}

pub(crate) fn disk(number: u8, blocks: u64) -> Arc<SimDisk> {
    let geometry = Geometry {
        volatile_cache: true,
        discard: Some(DiscardLimits { blocks_max: 1 << 12, granularity_blocks: 1, reads_zeroes: true }),
        ..Geometry::new(BlockSize::B512, blocks)
    };
    Arc::new(SimDisk::new(&format!("d{number}"), geometry, [number + 1; 16]))
}

/// Every promise that can be broken is in the manual, with what finds it out.
#[test]
fn every_mutation_is_told_in_the_manual() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let manual = std::fs::read_to_string(folder.join("../../docs/testing.md")).unwrap();
    let lists = std::fs::read_to_string(folder.join("tests/pools/mutations.rs")).unwrap();
    let mut folders = vec![folder.join("../volume/src")];
    let mut count = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            for name in text.split("is_broken(\"").skip(1).filter_map(|rest| rest.split('"').next()) {
                assert!(manual.contains(&format!("`{name}`")), "{name} is not in docs/testing.md");
                assert!(lists.contains(&format!("\"{name}\"")), "{name} is not in pools/mutations.rs");
                count += 1;
            }
        }
    }
    assert!(count > 50, "{count}");
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
