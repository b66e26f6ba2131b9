//! Pools with parity without any of the sets of members that they can do without, byte by byte beside a list of bytes.
//!
//! ```text
//!   filled, closed ─► opened without some ─► read ─► written in parts, read ─► they come back, or others take their places
//!                                                     ─► read, scrubbed, checked ─► opened without others ─► read
//! ```

use super::*;
use hawser_sim::Random;

const VOLUME_BYTES: usize = 768 << 10;
const SHAPES: [(Level, u8); 6] = [
    (Level::Raid5, 3),
    (Level::Raid5, 4),
    (Level::Raid5, 6),
    (Level::Raid6, 4),
    (Level::Raid6, 5),
    (Level::Raid6, 6),
];
const STRIPS: [u32; 3] = [4 << 10, 16 << 10, 64 << 10];

/// All sets of `count` of so many members.
fn sets(members: u8, count: u32) -> Vec<Vec<u8>> {
    let all = (0u32..1 << members).filter(|set| set.count_ones() == count);
    all.map(|set| (0..members).filter(|member| set >> member & 1 != 0).collect()).collect()
}

fn parities(level: Level) -> u32 {
    if level == Level::Raid5 { 1 } else { 2 }
}

fn create(scene: &mut Scene, level: Level, strip_bytes: u32) {
    let options = CreateOptions {
        strip_bytes,
        extent_bytes: 64 << 10,
        region_bytes: 256 << 10,
        log_bytes: 64 << 10,
        parity_log_bytes: 1 << 20,
        metadata_bytes: Some(1 << 20),
        ..CreateOptions::new("p0", [9; 16], level)
    };
    let handle = scene.reactors[0].runtime().handle();
    let created = pool::create(&handle, scene.devices(), options);
    scene.ask(created).unwrap();
}

fn devices_without(scene: &Scene, missing: &[u8]) -> Vec<Arc<dyn Device>> {
    let devices = scene.devices().into_iter().zip(0u8..);
    devices.filter(|(_, number)| !missing.contains(number)).map(|(device, _)| device).collect()
}

/// What the volume should hold, and how to change it.
struct Model {
    random: Random,
    bytes: Vec<u8>,
}

impl Model {
    /// Writes of all sizes, most of them parts of a stripe: whole sectors anywhere.
    fn write(&mut self, scene: &mut Scene, pool: &Pool, count: usize, most: usize) {
        for _ in 0..count {
            let sectors = 1 + self.random.index(most / 512);
            let at = self.random.index(VOLUME_BYTES / 512 - sectors) * 512;
            let bytes: Vec<u8> =
                (0..sectors * 64).flat_map(|_| self.random.next_u64().to_le_bytes()).collect();
            scene.write(pool, "v", at as u64, &bytes);
            self.bytes[at..at + bytes.len()].copy_from_slice(&bytes);
        }
    }

    fn compare(&self, scene: &mut Scene, pool: &Pool, what: &str) {
        let found = scene.read(pool, "v", 0, VOLUME_BYTES);
        if let Some(at) = (0..VOLUME_BYTES).find(|at| found[*at] != self.bytes[*at]) {
            panic!("{what}: byte {at} is {:02x}, not {:02x}", found[at], self.bytes[at]);
        }
    }
}

fn scrub(scene: &mut Scene, pool: &Pool) -> u64 {
    scene.ask(pool.scrub(false)).expect("begun");
    loop {
        scene.wait(Duration::from_millis(200));
        let view = pool.view();
        if let Some(task) = view.tasks.iter().rev().find(|task| task.kind == "scrub" && task.is_done) {
            return task.mismatches;
        }
    }
}

/// One story; `turn` says whether members come back or are replaced, and whether the process dies or ends in between.
fn without(level: Level, members: u8, strip: u32, missing: &[u8], turn: u64) {
    let what = format!("{level} of {members}, strips of {strip}, without {missing:?}");
    let mut scene = Scene::new(40 + turn, members);
    create(&mut scene, level, strip);
    let mut model = Model { random: Random::new(turn), bytes: vec![0; VOLUME_BYTES] };
    let pool = scene.open();
    scene.ask(pool.create_volume("v", VOLUME_BYTES as u64)).unwrap();
    model.write(&mut scene, &pool, 3, 400 << 10);
    model.write(&mut scene, &pool, 6, 24 << 10);
    scene.ask(pool.close()).unwrap();
    drop(pool);

    let devices = devices_without(&scene, missing);
    let pool = scene.try_open(devices, true).unwrap_or_else(|why| panic!("{what}: {why}"));
    model.compare(&mut scene, &pool, &what);
    model.write(&mut scene, &pool, 6, 24 << 10);
    model.write(&mut scene, &pool, 1, 400 << 10);
    model.compare(&mut scene, &pool, &format!("{what}, written so"));
    let pool = match turn % 4 < 2 {
        true => pool,
        false => {
            drop(pool);
            scene.kill();
            let devices = devices_without(&scene, missing);
            let pool = scene.try_open(devices, true).unwrap_or_else(|why| panic!("{what}: {why}"));
            model.compare(&mut scene, &pool, &format!("{what}, after a death"));
            pool
        }
    };

    for number in missing {
        if turn.is_multiple_of(2) {
            let back = Arc::clone(&scene.disks[usize::from(*number)]) as Arc<dyn Device>;
            scene.ask(pool.add_member(back)).unwrap_or_else(|why| panic!("{what}: {why}"));
        } else {
            let geometry = Geometry { volatile_cache: true, ..Geometry::new(BlockSize::B512, 16 << 11) };
            let new = Arc::new(SimDisk::new(&format!("n{number}"), geometry, [100 + number; 16]));
            scene.disks[usize::from(*number)] = Arc::clone(&new);
            let replaced = pool.replace(&number.to_string(), new, false);
            scene.ask(replaced).unwrap_or_else(|why| panic!("{what}: {why}"));
        }
    }
    // What is there already is changed while the others are brought up to date.
    model.write(&mut scene, &pool, 3, 24 << 10);
    for round in 0.. {
        if pool.view().members.iter().all(|member| member.state == MemberState::InSync) {
            break;
        }
        assert!(round < 600, "{what}: {:?}", pool.view());
        scene.wait(Duration::from_millis(200));
    }
    model.compare(&mut scene, &pool, &format!("{what}, whole again"));
    assert_eq!(scrub(&mut scene, &pool), 0, "{what}, whole again");
    scene.ask(pool.close()).unwrap();
    drop(pool);
    scene.check();

    // Those who were there all the time are not asked for everything.
    let others: Vec<u8> =
        (0..members).filter(|member| !missing.contains(member)).take(parities(level) as usize).collect();
    let devices = devices_without(&scene, &others);
    let pool = scene.try_open(devices, true).unwrap_or_else(|why| panic!("{what}, then {others:?}: {why}"));
    model.compare(&mut scene, &pool, &format!("{what}, then without {others:?}"));
}

#[test]
fn every_set_of_members_that_parity_makes_up_for_may_be_missing() {
    let mut turn = 0;
    for (level, members) in SHAPES {
        for strip in STRIPS {
            for count in 1..=parities(level) {
                for missing in sets(members, count) {
                    without(level, members, strip, &missing, turn);
                    turn += 1;
                }
            }
        }
    }
}

#[test]
fn one_member_too_many_is_named_and_nothing_is_changed() {
    for (level, members) in SHAPES {
        let mut scene = Scene::new(41, members);
        create(&mut scene, level, 16 << 10);
        let mut model = Model { random: Random::new(5), bytes: vec![0; VOLUME_BYTES] };
        let pool = scene.open();
        scene.ask(pool.create_volume("v", VOLUME_BYTES as u64)).unwrap();
        model.write(&mut scene, &pool, 4, 200 << 10);
        scene.ask(pool.close()).unwrap();
        drop(pool);
        for missing in sets(members, parities(level) + 1) {
            let devices = devices_without(&scene, &missing);
            let refused = scene.try_open(devices, true).map(drop);
            let names: Vec<String> = missing.iter().map(u8::to_string).collect();
            let want = format!("pool p0 lacks data without its members {}", names.join(", "));
            assert_eq!(refused, Err(PoolError::Conflict(want)), "{level} of {members}");
        }
        let pool = scene.open();
        model.compare(&mut scene, &pool, &format!("{level} of {members}, all there again"));
    }
}
