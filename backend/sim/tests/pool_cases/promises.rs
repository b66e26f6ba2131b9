//! What the order of durable writes promises besides the data: how little is made the same again, and what a write does not wait for.

use super::*;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Mutex;

const REGION: u64 = 256 << 10;
const WRITE: Operation = Operation::Write { fua: false };

/// What has reached the members' data: the member, whether it is a write, which bytes of its data area.
pub(crate) type Seen = Arc<Mutex<Vec<(usize, bool, u64, u64)>>>;

impl Scene {
    /// Where data begins on the members.
    pub(crate) fn data_offset(&self) -> u64 {
        let state = self.disks[0].state();
        Superblock::decode(&state.content.get(4096..8192)).unwrap().unwrap().layout.data_offset()
    }

    /// The members, each in front of a device that notes what goes to the data area, or may hold it back.
    pub(crate) fn watched(&self) -> (Vec<Arc<HeldDevice>>, Seen) {
        let seen = Seen::default();
        let devices = self.devices().into_iter().map(|device| Arc::new(HeldDevice::new(device)));
        let devices: Vec<_> = devices.collect();
        let data = self.data_offset();
        for (member, device) in devices.iter().enumerate() {
            let seen = Arc::clone(&seen);
            device.hold(move |request| {
                let (at, len) = (request.lba.0 << 9, u64::from(request.blocks.0) << 9);
                if matches!(request.operation, Operation::Read | Operation::Write { .. }) && at >= data {
                    let is_write = request.operation.is_write();
                    seen.lock().unwrap().push((member, is_write, at - data, len));
                }
                false
            });
        }
        (devices, seen)
    }
}

pub(crate) fn as_devices(held: &[Arc<HeldDevice>]) -> Vec<Arc<dyn Device>> {
    held.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect()
}

/// The regions that something was written to.
fn written_regions(seen: &Seen) -> BTreeSet<u64> {
    let seen = seen.lock().unwrap();
    let writes = seen.iter().filter(|(_, is_write, ..)| *is_write);
    writes.flat_map(|(_, _, at, len)| at / REGION..=(at + len - 1) / REGION).collect()
}

/// What was read and written since it was last cleared is in these regions. Of no member more is written than they have, nor read; but a mirror's
/// first copy is read once for each of its copies.
fn assert_within(seen: &Seen, regions: &BTreeSet<u64>, (level, members): (Level, u8), what: &str) {
    let seen = seen.lock().unwrap();
    let copies = if level.parities() == 0 { 2 } else { 1 };
    for (is_write, word) in [(false, "read"), (true, "written")] {
        let all = regions.len() as u64 * REGION * if is_write { 1 } else { copies };
        let mut total = 0;
        for member in 0..usize::from(members) {
            let of = seen.iter().filter(|(other, kind, ..)| (*other, *kind) == (member, is_write));
            let bytes = of.map(|(.., len)| len).sum::<u64>();
            assert!(
                bytes <= all,
                "{what}: {bytes} bytes of member {member} {word}, at most {all} would be right"
            );
            total += bytes;
        }
        assert!(total > 0 || is_write, "{what}: nothing is {word}");
    }
    let outside = seen.iter().find(|(_, _, at, len)| {
        !regions.contains(&(at / REGION)) || !regions.contains(&((at + len - 1) / REGION))
    });
    assert_eq!(outside, None, "{what}: regions {regions:?}");
}

/// Waits until something of this kind has ended; how many bytes it was about.
fn work(scene: &mut Scene, pool: &Pool, kind: &str) -> u64 {
    for _ in 0..1000 {
        scene.wait(Duration::from_millis(100));
        if let Some(task) = pool.view().tasks.iter().find(|task| task.kind == kind && task.is_done) {
            return task.total_bytes;
        }
    }
    panic!("no {kind} ends: {:?}", pool.view())
}

/// Even numbers of members: the copies of a strip are in one region.
const SHAPES: [(Level, u8); 4] =
    [(Level::Raid1, 2), (Level::Raid10, 4), (Level::Raid5, 3), (Level::Raid6, 5)];

impl Scene {
    /// A volume with data in many regions, none of which is marked any more.
    fn filled(&mut self, level: Level) -> (Pool, Vec<Arc<HeldDevice>>, Seen) {
        self.create(level);
        let (held, seen) = self.watched();
        let options = OpenOptions {
            intent_idle: Duration::from_millis(100),
            ..OpenOptions::new(HOST, Box::new(self.tail.clone()))
        };
        let handle = self.reactors[0].runtime().handle();
        let opened = Pool::open(&handle, as_devices(&held), options);
        let pool = self.ask(opened).unwrap();
        self.ask(pool.create_volume("v", 4 << 20)).unwrap();
        for at in 0..16 {
            self.write(&pool, "v", at * (256 << 10), &pattern(1, 256 << 10));
        }
        assert!(written_regions(&seen).len() >= 5, "{level}: {:?}", written_regions(&seen));
        self.flush(&pool, "v");
        // Marks are cleared when nobody has written for so long.
        self.wait(Duration::from_secs(30));
        seen.lock().unwrap().clear();
        (pool, held, seen)
    }

    /// Two places far from each other are written.
    fn write_two_places(&mut self, pool: &Pool) {
        self.write(pool, "v", 64 << 10, &pattern(2, 8192));
        self.write(pool, "v", (3 << 20) + 4096, &pattern(3, 4096));
    }

    /// They read as written, by everybody.
    fn look_at_two_places(&mut self, pool: &Pool, what: &str) {
        assert!(self.read(pool, "v", 64 << 10, 8192) == pattern(2, 8192), "{what}");
        assert!(self.read(pool, "v", (3 << 20) + 4096, 4096) == pattern(3, 4096), "{what}");
        self.ask(pool.scrub(false)).unwrap();
        self.wait(Duration::from_secs(5));
        let view = pool.view();
        let scrub = view.tasks.iter().find(|task| task.kind == "scrub").expect("it was run");
        assert!(scrub.is_done && scrub.mismatches == 0, "{what}: {scrub:?}");
    }
}

#[test]
fn after_an_outage_only_what_was_written_meanwhile_is_brought_up_to_date() {
    for (level, members) in SHAPES {
        let mut scene = Scene::new(50, members);
        let (pool, _held, seen) = scene.filled(level);
        scene.disks[1].fail_all(Some(Status::Path));
        scene.write_two_places(&pool);
        // Those in which the member has nothing of what was written cannot be told from the others.
        let regions = written_regions(&seen);
        assert!((1..=2).contains(&regions.len()), "{level}: {regions:?}");
        assert_eq!(pool.view().members[1].state, MemberState::Stale, "{level}");
        seen.lock().unwrap().clear();
        scene.disks[1].fail_all(None);
        let total = work(&mut scene, &pool, "rebuild");
        assert!(total > 0 && total <= regions.len() as u64 * REGION, "{level}: {total} for {regions:?}");
        assert_within(&seen, &regions, (level, members), &format!("{level} after an outage"));
        assert_eq!(pool.view().members[1].state, MemberState::InSync, "{level}");
        scene.look_at_two_places(&pool, &level.to_string());
        scene.ask(pool.close()).unwrap();
    }
}

#[test]
fn after_a_kill_only_what_was_marked_is_made_the_same_again() {
    for (level, members) in SHAPES {
        let mut scene = Scene::new(51, members);
        let (pool, _held, seen) = scene.filled(level);
        scene.write_two_places(&pool);
        let regions = written_regions(&seen);
        assert!((1..=2).contains(&regions.len()), "{level}: {regions:?}");
        drop(pool);
        scene.kill();
        let (held, seen) = scene.watched();
        let pool = scene.try_open(as_devices(&held), false).unwrap();
        let total = work(&mut scene, &pool, "resync");
        assert!(total > 0 && total <= regions.len() as u64 * REGION, "{level}: {total} for {regions:?}");
        assert_within(&seen, &regions, (level, members), &format!("{level} after a kill"));
        scene.look_at_two_places(&pool, &level.to_string());
        scene.ask(pool.close()).unwrap();
    }
}

/// Writes of the pool's own are held back: superblocks, marks, log, tables. With parity: also the parity log, so whole stripes are written.
#[test]
fn a_write_in_a_marked_region_waits_for_no_metadata() {
    let levels = [
        (Level::Linear, 2),
        (Level::Raid0, 3),
        (Level::Raid1, 2),
        (Level::Raid10, 4),
        (Level::Raid5, 3),
        (Level::Raid6, 4),
    ];
    for (level, members) in levels {
        let mut scene = Scene::new(52, members);
        scene.create(level);
        let devices = scene.devices();
        let held: Vec<_> = devices.into_iter().map(|device| Arc::new(HeldDevice::new(device))).collect();
        let options = OpenOptions {
            // Marks stay.
            intent_idle: Duration::from_secs(3600),
            ..OpenOptions::new(HOST, Box::new(scene.tail.clone()))
        };
        let handle = scene.reactors[0].runtime().handle();
        let opened = Pool::open(&handle, as_devices(&held), options);
        let pool = scene.ask(opened).unwrap();
        scene.ask(pool.create_volume("v", 10 << 20)).unwrap();
        // A region has several extents on each member: this marks that of the next ones.
        scene.write(&pool, "v", 0, &pattern(1, 64 << 10));
        scene.write(&pool, "v", 1 << 20, &pattern(2, 64 << 10));
        scene.ask(pool.snapshot(vec![("v".to_owned(), "s".to_owned())])).unwrap();
        scene.flush(&pool, "v");
        let data = scene.data_offset();
        for device in &held {
            device.hold(move |request| request.operation.is_write() && request.lba.0 << 9 < data);
        }
        let began = scene.world.now();
        // In place of what a snapshot shares, in an extent that is new.
        scene.write(&pool, "v", 1 << 20, &pattern(3, 64 << 10));
        // Again.
        scene.write(&pool, "v", 1 << 20, &pattern(4, 64 << 10));
        // Where nothing was.
        let part = if level.parities() > 0 { 32 << 10 } else { 4096 };
        scene.write(&pool, "v", 2 << 20, &pattern(5, part));
        scene.write(&pool, "v", 2 << 20, &pattern(6, part));
        assert!(scene.world.now() - began < Duration::from_millis(100), "{level}");
        assert_eq!(held.iter().map(|device| device.held()).sum::<usize>(), 0, "{level}: nothing was wanted");
        // A FLUSH waits: what is held back is what it needs.
        let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
        let ended = Rc::new(Cell::new(None));
        let told = Rc::clone(&ended);
        scene.reactors[0].runtime().spawn(async move {
            told.set(Some(client.io(Operation::Flush, 0, Vec::new()).await.0));
        });
        scene.wait(Duration::from_secs(1));
        assert_eq!(ended.get(), None, "{level}");
        assert!(held.iter().any(|device| device.held() > 0), "{level}");
        if level.is_redundant() {
            // And so does a region that is not marked.
            let client = Client::new(scene.reactors[0].runtime(), &pool.device("v").unwrap());
            let far = Rc::new(Cell::new(None));
            let told = Rc::clone(&far);
            scene.reactors[0].runtime().spawn(async move {
                told.set(Some(client.io(WRITE, 4 << 20, pattern(7, 1 << 20)).await.0));
            });
            scene.wait(Duration::from_secs(1));
            assert_eq!(far.get(), None, "{level}");
            held.iter().for_each(|device| device.release());
            scene.wait(Duration::from_secs(1));
            assert_eq!(far.get(), Some(Ok(())), "{level}");
        }
        held.iter().for_each(|device| device.release());
        scene.wait(Duration::from_secs(1));
        assert_eq!(ended.get(), Some(Ok(())), "{level}");
        assert!(scene.read(&pool, "v", 1 << 20, 64 << 10) == pattern(4, 64 << 10), "{level}");
        assert!(scene.read(&pool, "v", 2 << 20, part) == pattern(6, part), "{level}");
        assert!(scene.read(&pool, "s", 1 << 20, 64 << 10) == pattern(2, 64 << 10), "{level}");
        scene.ask(pool.close()).unwrap();
    }
}
