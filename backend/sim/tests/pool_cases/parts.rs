//! A write of many whole stripes goes to the members in parts: what happens to one of them happens to the request, once.

use super::*;
use hawser_volume::pool::coverage;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

const WRITE: Operation = Operation::Write { fua: false };
const LEN: usize = 1 << 20;
const SHAPES: [(Level, u8); 4] = [(Level::Raid5, 3), (Level::Raid5, 5), (Level::Raid6, 4), (Level::Raid6, 6)];

/// How a request ended, when it has.
type Ended = Rc<Cell<Option<Outcome>>>;

struct Story {
    scene: Scene,
    pool: Pool,
    held: Vec<Arc<HeldDevice>>,
    client: Rc<Client>,
    /// Where the rows in the middle of what is written are, on each member.
    middle: u64,
    what: String,
}

impl Story {
    /// A volume whose first MiB is written, and is not slow any more.
    fn new(seed: u64, level: Level, members: u8) -> Story {
        let mut scene = Scene::new(seed, members);
        scene.disks.iter().zip(1..).for_each(|(disk, number)| disk.seed(seed ^ number << 32));
        scene.create(level);
        let held = scene.devices().into_iter().map(|device| Arc::new(HeldDevice::new(device)));
        let held: Vec<_> = held.collect();
        let devices = held.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect();
        let pool = scene.try_open(devices, false).unwrap();
        scene.ask(pool.create_volume("v", 4 << 20)).unwrap();
        for seed in 0..3 {
            scene.write(&pool, "v", 0, &pattern(seed, LEN));
        }
        scene.flush(&pool, "v");
        let book = Superblock::decode(&scene.disks[0].state().content.get(4096..8192)).unwrap().unwrap();
        let data = u64::from(members) - u64::from(level.parities());
        let middle = book.layout.data_offset() + (LEN as u64 / 2 / data).next_multiple_of(16 << 10);
        let client = Rc::new(Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap()));
        Story { scene, pool, held, client, middle, what: format!("{level} of {members}, seed {seed}") }
    }

    fn in_parts() -> u64 {
        coverage().iter().find(|(name, _)| *name == "writes in parts").expect("it is counted").1
    }

    /// Begins a write, which goes out in parts.
    fn begin(&mut self, bytes: Vec<u8>) -> Ended {
        let before = Story::in_parts();
        let ended = Ended::default();
        let (client, told) = (Rc::clone(&self.client), Rc::clone(&ended));
        self.scene.reactors[0].runtime().spawn(async move {
            // A request that ends twice is a panic of the client.
            told.set(Some(client.io(WRITE, 0, bytes).await.0));
        });
        self.scene.wait(Duration::from_micros(10));
        assert!(Story::in_parts() > before, "{}", self.what);
        ended
    }

    /// All members are there and the same, and the same stripes can be written: on the hot path.
    fn into_mended(mut self) {
        let is_whole = |pool: &Pool| {
            let view = pool.view();
            view.unsynced_regions == 0 && view.members.iter().all(|it| it.state == MemberState::InSync)
        };
        for _ in 0..100 {
            if is_whole(&self.pool) {
                break;
            }
            self.scene.wait(Duration::from_secs(1));
        }
        assert!(is_whole(&self.pool), "{}: {:?}", self.what, self.pool.view());
        assert_eq!(self.scrub(), 0, "{}", self.what);
        for seed in 10..13 {
            self.scene.write(&self.pool, "v", 0, &pattern(seed, LEN));
        }
        let slow = self.pool.volumes()[0].slow.clone();
        self.scene.write(&self.pool, "v", 0, &pattern(13, LEN));
        assert_eq!(self.pool.volumes()[0].slow, slow, "{}", self.what);
        assert!(self.scene.read(&self.pool, "v", 0, LEN) == pattern(13, LEN), "{}", self.what);
        assert_eq!(self.scrub(), 0, "{}", self.what);
        drop(self.client);
        self.scene.ask(self.pool.close()).unwrap();
        drop(self.pool);
        self.scene.check();
    }

    fn scrub(&mut self) -> u64 {
        self.scene.ask(self.pool.scrub(false)).unwrap();
        loop {
            self.scene.wait(Duration::from_millis(200));
            let view = self.pool.view();
            if let Some(task) = view.tasks.iter().rev().find(|task| task.kind == "scrub" && task.is_done) {
                return task.mismatches;
            }
        }
    }
}

#[test]
fn a_part_that_one_member_fails_puts_it_out_and_the_write_ends_well() {
    for (level, members) in SHAPES {
        for member in 0..usize::from(members) {
            let mut story = Story::new(70, level, members);
            let block = story.middle / 512;
            story.scene.disks[member].state().unwritable = block..block + 8;
            let ended = story.begin(pattern(4, LEN));
            story.scene.wait(Duration::from_secs(1));
            let what = story.what.clone();
            assert_eq!(ended.get(), Some(Ok(())), "{what}");
            assert_ne!(story.pool.view().members[member].state, MemberState::InSync, "{what}");
            assert!(story.scene.read(&story.pool, "v", 0, LEN) == pattern(4, LEN), "{what}");
            story.scene.disks[member].state().unwritable = 0..0;
            story.into_mended();
        }
    }
}

/// One part stays at a member for minutes. The abort ends it there, and nobody knows how: the request has failed.
#[test]
fn a_part_that_is_stuck_ends_with_the_abort_of_its_request() {
    for (level, members) in SHAPES {
        for seed in 71..75 {
            let mut story = Story::new(seed, level, members);
            let (disk, middle) = (Arc::clone(&story.scene.disks[1]), story.middle);
            disk.state().stuck_ns = 300_000_000_000;
            let mut is_caught = false;
            story.held[1].hold(move |request| {
                // What is given to the disk with the row in the middle, once.
                let is_it = !is_caught && request.operation.is_write() && request.lba.0 << 9 == middle;
                is_caught |= is_it;
                let mut state = disk.state();
                state.stuck_permille = if is_it { 1000 } else { state.stuck_permille };
                false
            });
            let ended = story.begin(pattern(5, LEN));
            story.scene.disks[1].state().stuck_permille = 0;
            story.scene.wait(Duration::from_secs(1));
            assert_eq!(ended.get(), None, "{}", story.what);
            story.client.abort();
            story.scene.wait(Duration::from_secs(1));
            assert_eq!(ended.get(), Some(Err(Status::Aborted)), "{}", story.what);
            story.held[1].release();
            story.into_mended();
        }
    }
}

/// One part is kept from a member, and no abort ends it: the request does not end before it has.
#[test]
fn a_part_that_is_held_back_keeps_its_request_until_it_has_ended() {
    for (level, members) in SHAPES {
        let mut story = Story::new(76, level, members);
        let middle = story.middle;
        story.held[1].hold_one(move |request| request.operation.is_write() && request.lba.0 << 9 == middle);
        let ended = story.begin(pattern(6, LEN));
        story.scene.wait(Duration::from_secs(1));
        assert_eq!((ended.get(), story.held[1].held()), (None, 1), "{}", story.what);
        story.client.abort();
        story.scene.wait(Duration::from_secs(1));
        assert_eq!(ended.get(), None, "{}", story.what);
        story.held[1].release();
        story.scene.wait(Duration::from_secs(1));
        assert_eq!(ended.get(), Some(Ok(())), "{}", story.what);
        assert!(story.scene.read(&story.pool, "v", 0, LEN) == pattern(6, LEN), "{}", story.what);
        story.into_mended();
    }
}

/// The power goes when the first parts are on the members and the others are not: each block is as it was or as it was to be.
#[test]
fn a_power_cut_between_the_parts_leaves_each_block_old_or_new() {
    for (level, members) in SHAPES {
        for seed in 77..83 {
            let mut story = Story::new(seed, level, members);
            let is_cut = Arc::new(AtomicBool::new(false));
            for held in &story.held {
                let (middle, is_cut) = (story.middle, Arc::clone(&is_cut));
                held.hold(move |request| {
                    let is_late = request.operation.is_write() && request.lba.0 << 9 >= middle;
                    is_cut.fetch_or(is_late, Ordering::Relaxed);
                    is_late
                });
            }
            let ended = story.begin(pattern(7, LEN));
            story.scene.wait(Duration::from_millis(1));
            assert!(is_cut.load(Ordering::Relaxed) && ended.get().is_none(), "{}", story.what);
            let Story { mut scene, pool, what, middle, held, client } = story;
            scene.kill();
            drop((pool, held, client));
            scene.tail = MemoryTail::default();
            scene.disks.iter().for_each(|disk| disk.state().lose_cache());
            let held = scene.devices().into_iter().map(|device| Arc::new(HeldDevice::new(device)));
            let held: Vec<_> = held.collect();
            let devices = held.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect();
            let pool = scene.try_open(devices, false).unwrap();
            let (old, new) = (pattern(2, LEN), pattern(7, LEN));
            let found = scene.read(&pool, "v", 0, LEN);
            let mut kinds = [0; 2];
            for at in (0..LEN).step_by(512) {
                let block = at..at + 512;
                let is_new = found[block.clone()] == new[block.clone()];
                assert!(is_new || found[block.clone()] == old[block], "{what}: byte {at}");
                kinds[usize::from(is_new)] += 1;
            }
            assert!(kinds[0] > 0 && kinds[1] > 0, "{what}: {kinds:?}");
            let client = Rc::new(Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap()));
            Story { scene, pool, held, client, middle, what }.into_mended();
        }
    }
}

/// A write of whole stripes is given up while one member has all of them still before it, and another member is lost right behind: of each stripe
/// some strips were new, one was not, and the parity fitted neither. What was computed for the lost one was what nobody had written.
#[test]
fn a_stripe_that_is_given_up_half_written_is_ended_all_the_same() {
    orders::holds("stripe_left_half_written", |seed| {
        for (level, members) in SHAPES {
            let mut story = Story::new(seed, level, members);
            let disk = Arc::clone(&story.scene.disks[1]);
            {
                let mut state = disk.state();
                (state.stuck_permille, state.stuck_ns) = (1000, 300_000_000_000);
            }
            let old = orders::noise(2, LEN);
            disk.state().stuck_permille = 0;
            story.scene.write(&story.pool, "v", 0, &old);
            disk.state().stuck_permille = 1000;
            let ended = story.begin(orders::noise(8, LEN));
            disk.state().stuck_permille = 0;
            story.scene.wait(Duration::from_millis(1));
            story.client.abort();
            story.scene.wait(Duration::from_micros(seed % 4 * 30));
            let lost = Arc::clone(&story.scene.disks[0]);
            lost.fail_all(Some(Status::Path));
            story.scene.wait(Duration::from_secs(1));
            assert_eq!(ended.get(), Some(Err(Status::Aborted)), "{}", story.what);
            let new = orders::noise(8, LEN);
            let found = story.scene.read(&story.pool, "v", 0, LEN);
            for at in (0..LEN).step_by(512) {
                let block = at..at + 512;
                let is_known =
                    found[block.clone()] == new[block.clone()] || found[block.clone()] == old[block];
                if !is_known {
                    return Err(format!("{}: byte {at} is what nobody has written", story.what));
                }
            }
            lost.fail_all(None);
            story.into_mended();
        }
        Ok(())
    });
}

/// The same where the member says that it has no space: that is none of the guest's business, and the member is out.
#[test]
fn a_stripe_that_a_full_member_does_not_take_is_whole_without_it() {
    for (level, members) in SHAPES {
        let mut story = Story::new(97, level, members);
        let block = story.middle / 512;
        {
            let mut state = story.scene.disks[1].state();
            (state.unwritable, state.error) = (block..block + 8, Status::NoSpace);
        }
        let ended = story.begin(pattern(9, LEN));
        story.scene.wait(Duration::from_secs(1));
        assert_eq!(ended.get(), Some(Ok(())), "{}", story.what);
        assert_ne!(story.pool.view().members[1].state, MemberState::InSync, "{}", story.what);
        assert!(story.scene.read(&story.pool, "v", 0, LEN) == pattern(9, LEN), "{}", story.what);
        {
            let mut state = story.scene.disks[1].state();
            (state.unwritable, state.error) = (0..0, Status::Media);
        }
        story.into_mended();
    }
}
