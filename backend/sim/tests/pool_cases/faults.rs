//! One byte that is not what was written, anywhere on any member: a scrub finds it; where there are two parities it says on whom, and whether in data
//! or in parity; with `--repair` everything is right again.

use super::*;
use orders::noise;

const STRIP: usize = 16 << 10;
const ROWS: usize = 12;

struct Found {
    mismatches: u64,
    /// Of data, of parity.
    faults: (u64, u64),
    /// On each member, since the pool was opened.
    wrong: Vec<u64>,
}

fn scrub(scene: &mut Scene, pool: &Pool, repair: bool) -> Found {
    scene.ask(pool.scrub(repair)).unwrap();
    let last = |pool: &Pool| pool.view().tasks.into_iter().rev().find(|task| task.kind == "scrub");
    for _ in 0..600 {
        scene.wait(Duration::from_millis(20));
        if last(pool).is_some_and(|task| task.is_done) {
            break;
        }
    }
    let task = last(pool).filter(|task| task.is_done).expect("it ends");
    assert_eq!((task.failures, task.cut_short), (0, None));
    let wrong = pool.view().members.iter().map(|member| member.wrong).collect();
    Found { mismatches: task.mismatches, faults: (task.data_faults, task.parity_faults), wrong }
}

#[test]
fn a_byte_that_is_wrong_on_any_member_is_found_and_told_where_that_can_be() {
    for (level, members) in [(Level::Raid5, 3), (Level::Raid5, 4), (Level::Raid6, 4), (Level::Raid6, 5)] {
        let mut scene = Scene::sized(1, members, 16 << 11);
        scene.create(level);
        let pool = scene.open();
        let count = usize::from(members);
        let data = count - usize::from(level.parities());
        let want = noise(1, ROWS * data * STRIP);
        scene.ask(pool.create_volume("v", want.len() as u64)).unwrap();
        scene.write(&pool, "v", 0, &want);
        scene.flush(&pool, "v");
        let book = Superblock::decode(&scene.disks[0].state().content.get(4096..8192)).unwrap().unwrap();
        let first = usize::try_from(book.layout.data_offset()).unwrap();
        let mut wrong = vec![0; count];
        for member in 0..count {
            for row in 0..ROWS {
                let what = format!("{level} of {members}, member {member}, row {row}");
                let at = first + row * STRIP + (row * 2731 + member * 97) % STRIP;
                scene.disks[member].state().content.change(at..at + 1)[0] ^= 1 << (row % 8);
                let found = scrub(&mut scene, &pool, false);
                assert_eq!(found.mismatches, 1, "{what}");
                let p = count - 1 - row % count;
                let is_parity = member == p || level == Level::Raid6 && member == (p + 1) % count;
                let told = match (level, is_parity) {
                    (Level::Raid5, _) => (0, 0),
                    (_, false) => (1, 0),
                    (_, true) => (0, 1),
                };
                assert_eq!(found.faults, told, "{what}");
                wrong[member] += u64::from(level == Level::Raid6);
                assert_eq!(found.wrong, wrong, "{what}");
                match level {
                    // Whoever repairs it takes data for right.
                    Level::Raid5 if !is_parity => {
                        scene.disks[member].state().content.change(at..at + 1)[0] ^= 1 << (row % 8);
                    }
                    _ => {
                        assert_eq!(scrub(&mut scene, &pool, true).mismatches, 1, "{what}");
                        wrong[member] += u64::from(level == Level::Raid6);
                    }
                }
                assert_eq!(scrub(&mut scene, &pool, false).mismatches, 0, "{what}");
            }
        }
        scene.is_one_of(&pool, 0, &[&want]).unwrap();
        // Two strips of a stripe: who is wrong cannot be told.
        if level == Level::Raid6 {
            for member in 0..2 {
                scene.disks[member].state().content.change(first..first + 1)[0] ^= 1 << (3 + member);
            }
            let found = scrub(&mut scene, &pool, false);
            assert_eq!((found.mismatches, found.faults), (1, (0, 0)), "{level} of {members}");
        }
    }
}
