//! How long it takes with much. Prints times; asserts none. `THIN_TIB=64` for the size that the design speaks of.

use super::tools::{Disk, POOL, Random, create};
use crate::format::{NONE, NewSnapshot, Record};
use crate::thin::{Loader, Metadata, Thin};
use std::time::Instant;

#[test]
fn a_large_volume_is_mapped_snapshotted_written_and_loaded() {
    let tib: u32 = std::env::var("THIN_TIB").map_or(1, |tib| tib.parse().unwrap());
    let indices = tib << 20;
    let thin = Thin { extents: indices + 1000, extent_bytes: 1 << 20, unit_bytes: 4096 };
    let pages = indices / 448 * 3 + 1000;
    let mut m = Metadata::new(thin, pages);
    m.apply(&create(1, u64::from(indices) << 20)).unwrap();

    let begin = Instant::now();
    for index in 0..indices {
        let extent = m.allocate().unwrap();
        let bits = thin.full_bits();
        m.apply(&Record::Map { volume: 1, index, birth: 1, extent, fallback: NONE, bits }).unwrap();
    }
    println!("{tib} TiB: mapped in {:?}, {:?} each", begin.elapsed(), begin.elapsed() / indices);

    let begin = Instant::now();
    let item = NewSnapshot { origin: 1, id: 2, uuid: [0; 16], name: "s".into() };
    m.apply(&Record::Snapshot { items: vec![item] }).unwrap();
    println!("snapshot: {:?}", begin.elapsed());

    let begin = Instant::now();
    let extent = m.allocate().unwrap();
    m.apply(&Record::Map { volume: 1, index: 7, birth: 2, extent, fallback: 7, bits: [1, 0, 0, 0] }).unwrap();
    println!("first write after it: {:?}", begin.elapsed());

    let (table, map) = (m.table(), m.volume(1).unwrap().map());
    let mut random = Random::new(1);
    let places: Vec<u32> = (0..1 << 16).map(|_| random.below(indices)).collect();
    let begin = Instant::now();
    let sum: u64 = places.iter().map(|index| u64::from(table.lookup(map, *index).low())).sum();
    println!("lookup at random: {:?} each ({sum})", begin.elapsed() / (1 << 16));
    let begin = Instant::now();
    let sum: u64 = (0..1 << 16).map(|index| u64::from(table.lookup(map, index % 64).low())).sum();
    println!("lookup, warm: {:?} each ({sum})", begin.elapsed() / (1 << 16));

    let begin = Instant::now();
    m.begin_checkpoint(false);
    println!("checkpoint begun: {:?}", begin.elapsed());
    let mut disk = Disk::new();
    loop {
        let pages = m.checkpoint_step(64).unwrap();
        if pages.is_empty() {
            break;
        }
        disk.extend(pages);
    }
    let root = m.checkpoint_root(POOL, 0, 0, 0);
    m.end_checkpoint(true);
    println!("checkpoint written: {:?}, {} pages", begin.elapsed(), disk.len());

    let begin = Instant::now();
    m.apply(&Record::Delete { id: 2 }).unwrap();
    println!("snapshot deleted: {:?}", begin.elapsed());
    let begin = Instant::now();
    m.apply(&Record::Delete { id: 1 }).unwrap();
    println!("volume deleted: {:?}", begin.elapsed());
    let begin = Instant::now();
    m.settle();
    println!("released: {:?}", begin.elapsed());
    assert_eq!(m.free_extents(), thin.extents);
    drop(m);
    drop(table);

    let begin = Instant::now();
    let mut loader = Loader::new(thin, pages, &root);
    loop {
        let wanted = loader.wanted(256);
        if wanted.is_empty() {
            break;
        }
        for page in wanted {
            loader.give(page, &disk[&page]).unwrap();
        }
    }
    let m = loader.finish().unwrap();
    println!("loaded: {:?}", begin.elapsed());
    assert_eq!(m.volume(1).unwrap().mapped_extents(), u64::from(indices));
    assert_eq!(m.volume(2).unwrap().mapped_extents(), u64::from(indices));
    assert_eq!(m.free_extents(), 999);
}
