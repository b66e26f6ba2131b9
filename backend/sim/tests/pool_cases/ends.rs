//! Every level at its ends: the fewest members and the most, the smallest strips and the largest. Data goes over many strips and an extent's end,
//! and is there again after another opening, without any member that may be missing too.

use super::*;
use orders::noise;

/// Level, and members.
const LEVELS: [(Level, u8); 13] = [
    (Level::Linear, 1),
    (Level::Linear, 32),
    (Level::Raid0, 2),
    (Level::Raid0, 32),
    (Level::Raid1, 2),
    (Level::Raid1, 4),
    (Level::Raid10, 2),
    (Level::Raid10, 3),
    (Level::Raid10, 32),
    (Level::Raid5, 3),
    (Level::Raid5, 32),
    (Level::Raid6, 4),
    (Level::Raid6, 32),
];
const STRIPS: [u32; 2] = [4 << 10, 1 << 20];

fn open(scene: &mut Scene, missing: Option<usize>, read_only: bool) -> Pool {
    let mut devices = scene.devices();
    if let Some(missing) = missing {
        devices.remove(missing);
    }
    let change = |options: &mut OpenOptions| {
        (options.degraded, options.read_only) = (missing.is_some(), read_only);
    };
    scene.open_quietly(devices, change).unwrap()
}

#[test]
fn pools_at_the_ends_of_all_levels_keep_what_is_written() {
    for (level, members) in LEVELS {
        for strip_bytes in STRIPS {
            let what = format!("{level} of {members}, strips of {strip_bytes}");
            let mut scene = Scene::shaped(level, (members, 48 << 11), strip_bytes);
            let pool = open(&mut scene, None, false);
            let (view, strip) = (pool.view(), strip_bytes as usize);
            assert_eq!(view.strip_bytes, strip_bytes, "{what}");
            assert_eq!(view.members.len(), usize::from(members), "{what}");
            let extent = usize::try_from(view.extent_bytes).unwrap();
            // From the middle of a strip to that of another one, over the end of an extent.
            let len = (5 * strip / 2).max(40 << 10) + 512;
            let end = len.next_multiple_of(extent);
            let (at, mut want) = (end - len / 2 / 512 * 512, noise(7, len));
            scene.ask(pool.create_volume("v", 2 * end as u64)).unwrap();
            scene.write(&pool, "v", at as u64, &want);
            scene.flush(&pool, "v");
            let reads = |scene: &mut Scene, pool: &Pool, want: &[u8], when: &str| {
                // With what nobody has written on both sides.
                let found = scene.read(pool, "v", at as u64 - 512, len + 1024);
                assert!(found[512..512 + len] == *want, "{what}, {when}");
                assert!(
                    found[..512].iter().chain(&found[512 + len..]).all(|byte| *byte == 0),
                    "{what}, {when}"
                );
            };
            reads(&mut scene, &pool, &want, "written");
            scene.ask(pool.close()).unwrap();
            drop(pool);
            scene.check();
            let pool = open(&mut scene, None, false);
            reads(&mut scene, &pool, &want, "opened again");
            // Over what is there.
            let middle = len / 2 / 512 * 512 - 1024..len / 2 / 512 * 512 + 1024;
            want[middle.clone()].copy_from_slice(&noise(8, 2048));
            scene.write(&pool, "v", (at + middle.start) as u64, &want[middle.clone()]);
            scene.ask(pool.close()).unwrap();
            drop(pool);
            if !level.is_redundant() {
                let mut devices = scene.devices();
                devices.pop();
                assert!(devices.is_empty() || scene.try_open(devices, true).is_err(), "{what}, without one");
                let pool = open(&mut scene, None, true);
                reads(&mut scene, &pool, &want, "opened once more");
                continue;
            }
            for missing in 0..usize::from(members) {
                let pool = open(&mut scene, Some(missing), true);
                reads(&mut scene, &pool, &want, &format!("without member {missing}"));
                scene.ask(pool.close()).unwrap();
            }
            let last = usize::from(members) - 1;
            let pool = open(&mut scene, Some(last), false);
            want[middle.clone()].copy_from_slice(&noise(9, 2048));
            scene.write(&pool, "v", (at + middle.start) as u64, &want[middle]);
            reads(&mut scene, &pool, &want, "written without one");
            scene.ask(pool.close()).unwrap();
            drop(pool);
            let pool = open(&mut scene, None, false);
            reads(&mut scene, &pool, &want, "with it again");
            scene.ask(pool.close()).unwrap();
        }
    }
}

/// One more, or one less, than there may be: refused in one line that says what may be, and nothing is written.
#[test]
fn what_is_just_outside_of_the_ends_is_refused_in_one_line() {
    let mut scene = Scene::new(1, 33);
    let handle = scene.reactors[0].runtime().handle();
    let devices = scene.devices();
    let strips = "want a power of two from 4KiB to 1MiB";
    let mut cases = vec![
        (Level::Raid1, 5, 64 << 10, "raid1 has 2 to 4 members, and 5 are given".to_owned()),
        (Level::Raid0, 2, 2 << 10, format!("a strip of 2048 bytes cannot be, {strips}")),
        (Level::Raid0, 2, 2 << 20, format!("a strip of 2097152 bytes cannot be, {strips}")),
    ];
    for (level, least, most) in [
        (Level::Linear, 1, 32),
        (Level::Raid0, 2, 32),
        (Level::Raid1, 2, 4),
        (Level::Raid10, 2, 32),
        (Level::Raid5, 3, 32),
        (Level::Raid6, 4, 32),
    ] {
        for count in [least - 1, 33] {
            // No device at all is another matter.
            let given = format!("{level} has {least} to {most} members, and {count} are given");
            cases.extend((count > 0).then_some((level, count, 64 << 10, given)));
        }
    }
    for (level, count, strip_bytes, want) in cases {
        let options = CreateOptions {
            strip_bytes,
            log_bytes: 64 << 10,
            metadata_bytes: Some(256 << 10),
            ..CreateOptions::new("p0", [9; 16], level)
        };
        let created = pool::create(&handle, devices[..count].to_vec(), options);
        assert_eq!(scene.ask(created), Err(PoolError::Wrong(want)), "{level}");
    }
    for device in devices {
        let probed = pool::probe(&handle, device);
        assert_eq!(scene.ask(probed), Ok(None), "nothing was written");
    }
}
