//! Tables that are damaged: what was flushed is there, or the pool is refused by name. It never goes back to what was before.

use super::*;
use hawser_volume::format::{self, Batch, PAGE_BYTES, Root};
use orders::noise;

const POOL: [u8; 16] = [9; 16];

fn place(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

fn bytes(scene: &Scene, at: u64, len: u64) -> Vec<u8> {
    scene.disks[0].state().content.get(place(at)..place(at + len)).to_vec()
}

fn book(scene: &Scene) -> Superblock {
    Superblock::decode(&bytes(scene, 4096, 4096)).unwrap().unwrap()
}

/// The roots that are whole, the newest one last, and the pages that they stand in.
fn roots(scene: &Scene) -> Vec<(u64, Root)> {
    let layout = book(scene).layout;
    let mut found = Vec::new();
    for page in [0, 1] {
        let at = layout.page_offset(page);
        found.extend(Root::decode(&bytes(scene, at, PAGE_BYTES as u64), &POOL).map(|root| (at, root)));
    }
    found.sort_by_key(|(_, root)| root.number);
    found
}

/// The batches behind a root, and where they stand on the disk.
fn batches(scene: &Scene, root: &Root) -> Vec<(u64, Batch)> {
    let layout = book(scene).layout;
    let log = bytes(scene, layout.log_offset(), layout.log_bytes);
    let (mut at, mut number, mut found) = (root.log_position, root.log_batch, Vec::new());
    loop {
        let here = |at: u64| format::decode_batch(&log[place(at)..], &POOL, number);
        let batch = here(at).map(|batch| (at, batch)).or_else(|| here(0).map(|batch| (0, batch)));
        let Some((start, batch)) = batch else { return found };
        let batch = batch.unwrap();
        (at, number) = (start + batch.len_bytes, number + 1);
        found.push((layout.log_offset() + start, batch));
    }
}

fn turn_a_bit(scene: &Scene, disk: usize, at: u64) {
    scene.disks[disk].state().content.change(place(at)..place(at) + 1)[0] ^= 0x10;
}

fn contents(scene: &Scene) -> Vec<Vec<u8>> {
    scene.disks.iter().map(|disk| disk.state().snapshot()).collect()
}

/// A pool of one disk or a mirror, with so many writes to extents of their own, each flushed.
pub(crate) fn committed(mut scene: Scene, commits: u64) -> (Scene, Pool) {
    scene.create(if scene.disks.len() == 1 { Level::Linear } else { Level::Raid1 });
    let devices = scene.devices();
    let pool = scene.open_quietly(devices, |_| {}).unwrap();
    scene.ask(pool.create_volume("v", 16 << 20)).unwrap();
    for extent in 0..commits {
        scene.write(&pool, "v", extent << 16, &noise(extent, 512));
        scene.flush(&pool, "v");
    }
    (scene, pool)
}

/// Then the power goes.
fn written(members: u8, commits: u64) -> Scene {
    let (mut scene, pool) = committed(Scene::sized(commits, members, 16 << 11), commits);
    drop(pool);
    scene.cut();
    scene
}

fn refused(scene: &mut Scene, what: &str) -> String {
    let before = contents(scene);
    let devices = scene.devices();
    let Err(PoolError::Failed(why)) = scene.try_open(devices, false) else { panic!("{what}: it is opened") };
    assert!(contents(scene) == before, "{what}: it was changed");
    why
}

fn faults(scene: &mut Scene) -> Vec<String> {
    let handle = scene.reactors[0].runtime().handle();
    let checked = pool::check(&handle, scene.devices());
    scene.ask(checked).unwrap().faults
}

/// A bit of a batch in the middle of the log has turned. Its CRC was wrong, which passed for the end of the log: the pool was opened, with all that had been
/// flushed from there on gone, and a check found nothing. The batches behind it, wherever they went, say that it was durable.
#[test]
fn a_damaged_batch_is_not_the_end_of_the_log() {
    let mut wrapped = 0;
    for commits in [3, 40, 62, 121, 128, 140] {
        for members in [1, 2] {
            let mut scene = written(members, commits);
            let root = roots(&scene).pop().unwrap().1;
            let batches = batches(&scene, &root);
            let comes_round = batches.windows(2).position(|pair| pair[0].0 > pair[1].0);
            wrapped += usize::from(comes_round.is_some());
            let Some((last, others)) = batches.split_last() else { continue };
            let is_tried = |(index, _): &(usize, &(u64, Batch))| {
                [Some(0), Some(others.len() - 1), comes_round, comes_round.map(|it| it + 1)]
                    .contains(&Some(*index))
            };
            for (_, (at, batch)) in others.iter().enumerate().filter(is_tried) {
                let what = format!("{members} members, {commits} commits, batch {}", batch.number);
                for disk in 0..usize::from(members) {
                    turn_a_bit(&scene, disk, at + 70);
                }
                let why = refused(&mut scene, &what);
                let next = batch.number + 1;
                assert!(
                    why.contains(&format!("batch {} is not there, and batch {next}, ", batch.number)),
                    "{what}: {why}"
                );
                let found = faults(&mut scene);
                assert_eq!(found.len(), usize::from(members), "{what}: {found:?}");
                let is_named = |(disk, fault): (usize, &String)| {
                    fault.starts_with(&format!("d{disk}: its log at "))
                        && fault.contains(" is damaged: batch ")
                };
                assert!(found.iter().enumerate().all(is_named), "{what}: {found:?}");
                // On one of them only it is read from the other.
                turn_a_bit(&scene, 0, at + 70);
                assert_eq!(faults(&mut scene).len(), usize::from(members) - 1, "{what}");
                for disk in 1..usize::from(members) {
                    turn_a_bit(&scene, disk, at + 70);
                }
            }
            // The last may have been torn by the power, and nobody was told of it.
            turn_a_bit(&scene, 0, last.0 + 70);
            assert_eq!(faults(&mut scene), Vec::<String>::new());
            if let (2, Some((at, _))) = (members, others.first()) {
                turn_a_bit(&scene, 1, at + 70);
            }
            let pool = scene.open();
            for extent in 0..commits - u64::from(members == 1) {
                scene
                    .is_one_of(&pool, extent << 16, &[&noise(extent, 512)])
                    .unwrap_or_else(|why| panic!("{members} members, {commits} commits: {why}"));
            }
        }
    }
    assert!(wrapped > 0, "no log came round its end");
}

/// The newest root is damaged, and the log behind the older one was free since the newest was durable, and is used again. Nothing of it was found, and the
/// pool went back to the older root. It is refused, since what stands there was written later.
#[test]
fn a_root_whose_log_is_overwritten_is_not_gone_back_to() {
    let mut scene = Scene::sized(1, 1, 32 << 11);
    scene.create(Level::Linear);
    let held = Arc::new(HeldDevice::new(scene.devices().remove(0)));
    let devices = vec![Arc::clone(&held) as Arc<dyn Device>];
    let pool = scene.open_quietly(devices, |_| {}).unwrap();
    scene.ask(pool.create_volume("v", 24 << 20)).unwrap();
    let mut extent = 0;
    let mut commit = |scene: &mut Scene| {
        scene.write(&pool, "v", extent << 16, &noise(extent, 512));
        scene.flush(&pool, "v");
        extent += 1;
    };
    // What stands between the two newest roots' places in the log.
    let between = |scene: &Scene| {
        let found = roots(scene);
        found[1].1.log_batch - found[0].1.log_batch
    };
    let layout = book(&scene).layout;
    let pages = layout.page_offset(2) / 512..layout.data_offset() / 512;
    loop {
        while between(&scene) < 30 {
            commit(&mut scene);
        }
        // The checkpoint behind the newest root comes to nothing, unless it was too far already.
        let pages = pages.clone();
        held.hold(move |request| request.operation.is_write() && pages.contains(&request.lba.0));
        scene.wait(Duration::from_millis(10));
        if between(&scene) >= 30 {
            break;
        }
        held.release();
    }
    let older = roots(&scene).remove(0).1;
    while !batches(&scene, &older).is_empty() {
        commit(&mut scene);
    }
    drop(pool);
    scene.cut();
    assert_eq!(faults(&mut scene), Vec::<String>::new());
    let found = roots(&scene);
    let [(_, older), (at, newest)] = &found[..] else { panic!("two roots are whole") };
    assert_eq!(older.number + 1, newest.number);
    assert!(batches(&scene, older).is_empty(), "its log is used again");
    turn_a_bit(&scene, 0, at + 50);
    let why = refused(&mut scene, "an older root");
    assert!(why.contains(&format!("batch {} is not there, and batch ", older.log_batch)), "{why}");
    let page = newest.number % 2;
    let found = faults(&mut scene);
    assert_eq!(found[0], format!("d0: page {page} of its tables, a root, is torn, or none of this pool's"));
    assert!(found.len() == 2 && found[1].contains(" is damaged: batch "), "{found:?}");
}
