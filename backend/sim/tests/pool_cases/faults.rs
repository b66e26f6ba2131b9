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

/// All bytes of a unit were judged together. Two members of a RAID 6 that were each wrong in a block of its own counted as nobody knows whom, and a
/// repair made both parities anew of data that was wrong, though each block could be made right.
#[test]
fn members_that_are_wrong_in_blocks_of_their_own_are_all_made_right() {
    for members in [4, 5] {
        let mut scene = Scene::sized(2, members, 16 << 11);
        scene.create(Level::Raid6);
        let pool = scene.open();
        let count = usize::from(members);
        let want = noise(2, ROWS * (count - 2) * STRIP);
        scene.ask(pool.create_volume("v", want.len() as u64)).unwrap();
        scene.write(&pool, "v", 0, &want);
        scene.flush(&pool, "v");
        let book = Superblock::decode(&scene.disks[0].state().content.get(4096..8192)).unwrap().unwrap();
        let first = usize::try_from(book.layout.data_offset()).unwrap();
        let contents = |scene: &Scene| -> Vec<Vec<u8>> {
            scene
                .disks
                .iter()
                .map(|disk| disk.state().content.get(first..first + ROWS * STRIP).into_owned())
                .collect()
        };
        let good = contents(&scene);
        for row in 0..ROWS {
            // The same unit of 4 KiB on all of them, and another block of it on each.
            for (member, disk) in scene.disks.iter().enumerate() {
                let at = first + row * STRIP + 4096 + member * 512 + row;
                disk.state().content.change(at..at + 300).iter_mut().for_each(|byte| *byte ^= 0x55);
            }
        }
        let found = scrub(&mut scene, &pool, true);
        let units = ROWS as u64;
        assert_eq!((found.mismatches, found.faults), (units, (units, units)), "of {members}");
        assert_eq!(found.wrong, vec![units; count], "of {members}");
        assert!(contents(&scene) == good, "of {members}: all is as it was");
        // Of one unit a block that is wrong on one, and a block that is wrong on two: only of the latter parity is made anew. Row 0 has P on the last
        // member, and Q on the first.
        for (member, block) in [(1, 2), (1, 5), (2, 5)] {
            let at = first + block * 512;
            scene.disks[member].state().content.change(at..at + 1)[0] ^= 1 << member;
        }
        let found = scrub(&mut scene, &pool, true);
        assert_eq!(found.mismatches, 1, "of {members}");
        assert_eq!(found.faults, (1, 0), "of {members}");
        for (member, (now, before)) in contents(&scene).iter().zip(&good).enumerate() {
            let differ: Vec<usize> = (0..now.len() / 512)
                .filter(|at| now[at * 512..][..512] != before[at * 512..][..512])
                .collect();
            let is_parity = member == 0 || member == count - 1;
            let expected = if is_parity || member < 3 { vec![5] } else { vec![] };
            assert_eq!(differ, expected, "of {members}: member {member}");
        }
        assert_eq!(scrub(&mut scene, &pool, false).mismatches, 0, "of {members}");
    }
}
