//! Checkpoints that are damaged: with the CRC as it was, and with CRCs made right again all the way up to the root.

use super::tools::{Disk, Random, checkpoint, create, load};
use crate::format::{NONE, NewSnapshot, PagePtr, Record, Root, crc_of};
use crate::thin::{Loader, Metadata, Thin};

const THIN: Thin = Thin { extents: 300, extent_bytes: 1 << 20, unit_bytes: 1 << 18 };
const PAGES: u32 = 100;

fn written() -> (Disk, Root) {
    let mut m = Metadata::new(THIN, PAGES);
    let mut disk = Disk::new();
    m.apply(&create(1, (513 * 448) << 20)).unwrap();
    let map = |m: &mut Metadata, volume, index, fallback, bits| {
        let (extent, birth) = (m.allocate().unwrap(), m.generation());
        m.apply(&Record::Map { volume, index, birth, extent, fallback, bits: [bits, 0, 0, 0] }).unwrap();
        extent
    };
    for index in 0..100 {
        map(&mut m, 1, index, NONE, 0b11);
    }
    let full = map(&mut m, 1, 512 * 448, NONE, 0xf);
    let item = NewSnapshot { origin: 1, id: 2, uuid: [2; 16], name: "s".into() };
    m.apply(&Record::Snapshot { items: vec![item] }).unwrap();
    m.apply(&Record::Clone { snapshot: 2, id: 3, uuid: [3; 16], name: "c".into() }).unwrap();
    map(&mut m, 3, 512 * 448, full, 0b1);
    map(&mut m, 1, 512 * 448 + 3, NONE, 0xf);
    let root = checkpoint(&mut m, &mut disk, false);
    (disk, root)
}

#[test]
fn a_page_that_is_not_what_was_written_is_named_and_another_copy_is_taken() {
    let (disk, root) = written();
    let mut loader = Loader::new(THIN, PAGES, &root);
    loop {
        let wanted = loader.wanted(3);
        if wanted.is_empty() {
            break;
        }
        for page in wanted {
            let mut bytes = disk[&page].clone();
            bytes[2000] ^= 1;
            let error = loader.give(page, &bytes).unwrap_err();
            assert!(error.contains(&format!("page {page}")), "{error}");
            assert!(loader.give(page, &bytes[..100]).is_err());
            loader.give(page, &disk[&page]).unwrap();
            assert!(loader.give(page, &disk[&page]).is_err(), "given twice");
        }
    }
    assert_eq!(loader.finish().unwrap().verify(), Vec::<String>::new());
}

#[test]
fn an_unfinished_load_is_refused() {
    let (disk, root) = written();
    let mut loader = Loader::new(THIN, PAGES, &root);
    let page = loader.wanted(1)[0];
    loader.give(page, &disk[&page]).unwrap();
    loader.wanted(1);
    assert!(loader.finish().is_err());
}

/// Replaces the pointers to this page, and to those that have them.
fn put(disk: &mut Disk, root: &mut Root, page: u32, bytes: Vec<u8>) {
    let bytes_of = |crc: u32| [page.to_le_bytes(), crc.to_le_bytes()].concat();
    let (old, new) = (crc_of(&disk[&page]), crc_of(&bytes));
    disk.insert(page, bytes);
    if root.volumes == (PagePtr { page, crc: old }) {
        root.volumes.crc = new;
    }
    let parents: Vec<u32> = disk.keys().copied().filter(|parent| *parent != page).collect();
    for parent in parents {
        let mut bytes = disk[&parent].clone();
        let places: Vec<usize> =
            (0..bytes.len() - 7).filter(|at| bytes[*at..at + 8] == bytes_of(old)).collect();
        for at in &places {
            bytes[*at..at + 8].copy_from_slice(&bytes_of(new));
        }
        if !places.is_empty() {
            put(disk, root, parent, bytes);
        }
    }
}

#[test]
fn content_that_makes_no_sense_is_refused_or_harmless() {
    let (disk, root) = written();
    let mut random = Random::new(5);
    let (mut refused, mut loaded) = (0, 0);
    for _ in 0..1000 {
        let (mut disk, mut root) = (disk.clone(), root.clone());
        for _ in 0..1 + random.below(2) {
            let pages: Vec<u32> = disk.keys().copied().collect();
            let page = random.pick(&pages).unwrap();
            let mut bytes = disk[&page].clone();
            let used: Vec<usize> =
                (0..bytes.len() / 4).filter(|at| bytes[at * 4..at * 4 + 4] != [0; 4]).collect();
            let at = random.pick(&used).unwrap() * 4;
            let other = random.below(1024) as usize * 4;
            match random.below(4) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = u8::try_from(random.below(256)).unwrap(),
                2 => bytes.copy_within(other..other + 4, at),
                _ => bytes.copy_within(other & !7..(other & !7) + 8, at & !7),
            }
            put(&mut disk, &mut root, page, bytes);
        }
        if random.one_in(10) {
            match random.below(4) {
                0 => root.generation = random.below(5),
                1 => root.extents = random.below(400),
                2 => root.next_volume = random.below(5),
                _ => root.volume_count = random.below(5),
            }
        }
        let Ok(mut m) = load(&disk, &root, THIN, PAGES) else {
            refused += 1;
            continue;
        };
        loaded += 1;
        // What only a check sees, because it takes memory per extent: the same extent at two offsets.
        let faults = m.verify();
        assert!(faults.iter().all(|fault| fault.contains("is mapped at index")), "{faults:?}");
        let ids: Vec<u32> = m.volumes().map(|(id, _)| id).collect();
        for id in ids {
            m.apply(&Record::Delete { id }).unwrap();
        }
        m.settle();
        assert_eq!(m.free_extents(), m.thin().extents);
        assert_eq!(m.verify(), Vec::<String>::new());
    }
    println!("{refused} refused, {loaded} loaded");
    assert!(refused > 100 && loaded > 50, "{refused} refused, {loaded} loaded");
}
