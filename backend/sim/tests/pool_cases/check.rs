//! What a check names: damage to each structure, and what is not there.

use super::*;
use hawser_volume::format::{PAGE_BYTES, ParityEntry, ParityHeader};
use hawser_volume::pool::CheckReport;

fn report(scene: &mut Scene, devices: Vec<Arc<dyn Device>>) -> CheckReport {
    let handle = scene.reactors[0].runtime().handle();
    let checked = pool::check(&handle, devices);
    scene.ask(checked).unwrap()
}

fn faults(scene: &mut Scene) -> Vec<String> {
    let devices = scene.devices();
    report(scene, devices).faults
}

fn book(scene: &Scene, disk: usize) -> Superblock {
    let page = scene.disks[disk].state().snapshot()[4096..8192].to_vec();
    Superblock::decode(&page).unwrap().unwrap()
}

fn page_of(scene: &Scene, disk: usize, at: usize) -> Vec<u8> {
    scene.disks[disk].state().snapshot()[at..at + PAGE_BYTES].to_vec()
}

/// RAID 5 with parts of stripes written; where its parity log is.
fn parity(scene: &mut Scene) -> (Pool, usize, usize) {
    scene.create(Level::Raid5);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    scene.write(&pool, "v", 0, &pattern(1, 128 << 10));
    for at in 0..4 {
        scene.write(&pool, "v", at * 8192, &pattern(2, 4096));
    }
    let layout = book(scene, 0).layout;
    let (log, end) = (layout.parity_log_offset(), layout.data_offset());
    (pool, usize::try_from(log).unwrap(), usize::try_from(end).unwrap())
}

/// Neither header nor entries were looked at.
#[test]
fn a_damaged_header_of_a_parity_log_is_named() {
    for page in [0, 1] {
        let mut scene = Scene::new(60, 3);
        let (pool, log, _) = parity(&mut scene);
        scene.ask(pool.close()).unwrap();
        drop(pool);
        scene.check();
        scene.disks[1].state().content.change(log + page * PAGE_BYTES + 50..log + page * PAGE_BYTES + 51)
            [0] ^= 1;
        let want = format!("d1: page {page} of its parity log's header is torn, or none of this pool's");
        assert_eq!(faults(&mut scene), [want]);
        scene.disks[2].state().media_errors.insert((log + page * PAGE_BYTES) as u64 / 512);
        let found = faults(&mut scene);
        assert_eq!(found.len(), 2, "{found:?}");
        let want = format!("d2: page {page} of its parity log's header cannot be read: ");
        assert!(found[1].starts_with(&want), "{found:?}");
    }
}

#[test]
fn entries_of_a_parity_log_are_looked_at() {
    let mut scene = Scene::new(61, 3);
    let (pool, log, end) = parity(&mut scene);
    drop(pool);
    scene.kill();
    let devices = scene.devices();
    let whole = report(&mut scene, devices);
    assert_eq!(whole.faults, Vec::<String>::new(), "a crash is no fault");
    let entries = |report: &CheckReport| {
        report.checked.iter().find(|(what, _)| *what == "entries of parity logs").map(|(_, count)| *count)
    };
    assert!(entries(&whole) >= Some(4), "{whole:?}");
    // One of them on one member.
    let pool_uuid = book(&scene, 1).pool_uuid;
    let headers =
        [0, 1].map(|page| ParityHeader::decode(&page_of(&scene, 1, log + page * PAGE_BYTES), &pool_uuid));
    let key = headers.into_iter().flatten().max_by_key(|header| header.number).unwrap().key;
    let is_entry = |at: &usize| ParityEntry::decode(&page_of(&scene, 1, *at), &pool_uuid, &key).is_some();
    let at = (log + 2 * PAGE_BYTES..end).step_by(PAGE_BYTES).find(is_entry).unwrap();
    scene.disks[1].state().content.change(at + 60..at + 61)[0] ^= 1;
    let number = (at - log) / PAGE_BYTES - 2;
    assert_eq!(
        faults(&mut scene),
        [format!("d1: its parity log has an entry at page {number} that is torn")]
    );
    scene.disks[1].state().content.change(at + 60..at + 61)[0] ^= 1;
    scene.disks[1].state().media_errors.insert(at as u64 / 512);
    let found = faults(&mut scene);
    assert!(found.len() == 1 && found[0].starts_with("d1: its parity log cannot be read: "), "{found:?}");
}

/// A pool that was closed needs none of its entries: a header that says otherwise is not the last one.
#[test]
fn entries_that_a_closed_pool_needs_are_named() {
    let mut scene = Scene::new(62, 3);
    let (pool, log, _) = parity(&mut scene);
    scene.ask(pool.close()).unwrap();
    drop(pool);
    let pool_uuid = book(&scene, 0).pool_uuid;
    let headers =
        [0, 1].map(|page| ParityHeader::decode(&page_of(&scene, 0, log + page * PAGE_BYTES), &pool_uuid));
    let last = headers.into_iter().flatten().max_by_key(|header| header.number).unwrap();
    let next = ParityHeader { number: last.number + 1, released: 0, ..last };
    let at = log + usize::try_from(next.number % 2).unwrap() * PAGE_BYTES;
    scene.disks[0].state().content.change(at..at + PAGE_BYTES).copy_from_slice(&next.encode(&pool_uuid));
    let found = faults(&mut scene);
    assert!(found.len() == 1, "{found:?}");
    assert!(found[0].starts_with("the parity log of members 0 to 2 still needs entries "), "{found:?}");
}

#[test]
fn spares_and_replacements_that_are_not_there_are_named() {
    let mut scene = Scene::new(63, 4);
    let mut devices = scene.devices();
    let new = devices.pop().unwrap();
    let handle = scene.reactors[0].runtime().handle();
    let options = CreateOptions {
        spares: 1,
        log_bytes: 64 << 10,
        metadata_bytes: Some(1 << 20),
        ..CreateOptions::new("p0", [9; 16], Level::Raid1)
    };
    let created = pool::create(&handle, devices.clone(), options);
    scene.ask(created).unwrap();
    assert_eq!(report(&mut scene, devices.clone()).missing, Vec::<String>::new());
    let found = report(&mut scene, devices[..2].to_vec());
    assert_eq!((found.missing, found.faults), (vec!["spare 0 is missing".to_owned()], Vec::new()));
    let options =
        OpenOptions { sync_bytes_per_second: 4096, ..OpenOptions::new(HOST, Box::new(scene.tail.clone())) };
    let opened = Pool::open(&handle, devices.clone(), options);
    let pool = scene.ask(opened).unwrap();
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    scene.write(&pool, "v", 0, &pattern(1, 1 << 20));
    scene.ask(pool.replace("d1", new, false)).unwrap();
    drop(pool);
    scene.kill();
    let found = report(&mut scene, devices);
    assert_eq!(
        (found.missing, found.faults),
        (vec!["the replacement of member 1 is missing".to_owned()], Vec::new())
    );
}

/// After a crash a copy that is damaged was passed over, whatever had damaged it.
#[test]
fn a_bad_copy_of_a_superblock_is_named_after_a_crash_too() {
    let mut scene = Scene::new(64, 2);
    scene.create(Level::Raid1);
    let pool = scene.open();
    scene.ask(pool.create_volume("v", 1 << 20)).unwrap();
    drop(pool);
    scene.kill();
    scene.check();
    scene.disks[1].state().content.change(65536 + 70..65536 + 71)[0] ^= 1;
    assert_eq!(faults(&mut scene), ["d1: superblock at 65536: the superblock is torn: its CRC is wrong"]);
}
