//! Readers on threads of their own, while the owner copies, changes, frees and recycles.

use super::tools::create;
use crate::format::{NONE, NewSnapshot, Record};
use crate::thin::{Freed, Mapped, Metadata, Thin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Readers end when the owner does, even if it panics.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Volume 1 has even extents, clones of it get odd ones, in chunks that were shared: nobody who reads volume 1 sees an odd one,
/// nor a partial that is half another's.
#[test]
fn readers_of_a_volume_never_see_what_a_clone_put_into_a_chunk_that_was_shared() {
    const ROUNDS: u32 = 2000;
    let thin = Thin { extents: 200, extent_bytes: 1 << 20, unit_bytes: 1 << 18 };
    let mut m = Metadata::new(thin, 100);
    m.apply(&create(1, 8 << 20)).unwrap();
    let (table, map) = (m.table(), Arc::clone(m.volume(1).unwrap().map()));
    let is_over = AtomicBool::new(false);
    let passes = [const { AtomicU64::new(0) }; 2];
    std::thread::scope(|scope| {
        let _stop = Stop(&is_over);
        let mut readers = Vec::new();
        for pass in &passes {
            let (table, map, is_over) = (&table, &map, &is_over);
            readers.push(scope.spawn(move || {
                let mut seen = 0_u64;
                while !is_over.load(Ordering::Acquire) {
                    for index in 0..8 {
                        let entry = table.lookup(map, index);
                        assert!(!entry.is_full() || entry.low().is_multiple_of(2), "{entry:?}");
                        match table.mapped(map, index) {
                            Mapped::Partial { extent, fallback, bits, .. } => {
                                assert!(extent.is_multiple_of(2), "{extent}");
                                assert!(fallback == NONE || fallback.is_multiple_of(2), "{fallback}");
                                assert!(bits[0] & 1 == 1, "{bits:?}");
                                seen += 1;
                            }
                            Mapped::Full { extent, .. } => assert!(extent.is_multiple_of(2), "{extent}"),
                            Mapped::None => {}
                        }
                    }
                    pass.fetch_add(1, Ordering::AcqRel);
                }
                seen
            }));
        }
        let extent = |m: &mut Metadata, parity: u32| {
            let mut others = Vec::new();
            let found = loop {
                match m.allocate().expect("most extents are free") {
                    extent if extent % 2 == parity => break extent,
                    extent => others.push(extent),
                }
            };
            others.into_iter().for_each(|extent| m.give_back(extent));
            found
        };
        let mut freed = Freed::default();
        for round in 0..ROUNDS {
            let id = m.next_volume();
            let item = NewSnapshot { origin: 1, id, uuid: [0; 16], name: format!("s{id}") };
            m.apply(&Record::Snapshot { items: vec![item] }).unwrap();
            let clone = id + 1;
            m.apply(&Record::Clone { snapshot: id, id: clone, uuid: [0; 16], name: format!("c{id}") })
                .unwrap();
            m.apply(&Record::Delete { id }).unwrap();
            let index = round % 8;
            for (volume, parity) in [(1, 0), (clone, 1)] {
                let fallback = match m.entry(volume, index) {
                    Mapped::Full { extent, .. } => extent,
                    _ => NONE,
                };
                let (extent, birth) = (extent(&mut m, parity), m.generation());
                let bits = [1 | u64::from(round % 16), 0, 0, 0];
                m.apply(&Record::Map { volume, index, birth, extent, fallback, bits }).unwrap();
                if round % 3 == 0 {
                    m.apply(&Record::Valid { volume, index, bits: [0xf, 0, 0, 0] }).unwrap();
                }
            }
            if round % 5 == 0 {
                m.apply(&Record::Unmap { volume: 1, index: (index + 3) % 8, count: 1 }).unwrap();
            }
            m.apply(&Record::Delete { id: clone }).unwrap();
            m.release_some(100);
            freed.merge(m.take_freed());
            if round % 20 != 0 {
                continue;
            }
            for (pass, reader) in passes.iter().zip(&readers) {
                let begin = pass.load(Ordering::Acquire);
                while pass.load(Ordering::Acquire) < begin + 2 && !reader.is_finished() {
                    std::thread::yield_now();
                }
            }
            m.recycle(std::mem::take(&mut freed));
        }
    });
    assert_eq!(m.verify(), Vec::<String>::new());
}

/// A reader of volume 1 knows which chunk, and stops. Volume 1 gets a copy of the chunk, and the clone, which has the old one to
/// itself now, maps something of its own in it. The reader goes on.
#[test]
fn a_lookup_that_was_overtaken_finds_its_own_volumes_entry() {
    let thin = Thin { extents: 200, extent_bytes: 1 << 20, unit_bytes: 1 << 18 };
    let mut m = Metadata::new(thin, 100);
    m.apply(&create(1, 8 << 20)).unwrap();
    let map = |m: &mut Metadata, volume, index| {
        let (extent, birth) = (m.allocate().unwrap(), m.generation());
        let bits = thin.full_bits();
        m.apply(&Record::Map { volume, index, birth, extent, fallback: NONE, bits }).unwrap();
        extent
    };
    let shared = map(&mut m, 1, 0);
    let item = NewSnapshot { origin: 1, id: 2, uuid: [0; 16], name: "s".to_owned() };
    m.apply(&Record::Snapshot { items: vec![item] }).unwrap();
    m.apply(&Record::Clone { snapshot: 2, id: 3, uuid: [0; 16], name: "c".to_owned() }).unwrap();
    m.apply(&Record::Delete { id: 2 }).unwrap();
    let (table, reader) = (m.table(), Arc::clone(m.volume(1).unwrap().map()));
    let mut is_overtaken = false;
    let entry = table.lookup_while(&reader, 0, || {
        if !std::mem::replace(&mut is_overtaken, true) {
            map(&mut m, 1, 1);
            map(&mut m, 3, 0);
        }
    });
    assert_eq!((entry.low(), is_overtaken), (shared, true));
}
