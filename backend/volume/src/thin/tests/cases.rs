//! Single cases.

use super::tools::{Disk, Random, checkpoint, create, load};
use crate::format::{NONE, NewSnapshot, Record};
use crate::thin::bitmap::Bitmap;
use crate::thin::entry::full_bits;
use crate::thin::extents::Extents;
use crate::thin::{Mapped, Metadata, Thin};
use std::collections::BTreeSet;
use std::sync::Arc;

const THIN: Thin = Thin { extents: 2000, extent_bytes: 1 << 20, unit_bytes: 1 << 18 };
const ALL: [u64; 4] = [0xf, 0, 0, 0];

fn pool(size_extents: u64) -> Metadata {
    let mut metadata = Metadata::new(THIN, 1000);
    metadata.apply(&create(1, size_extents << 20)).unwrap();
    metadata
}

fn map(m: &mut Metadata, volume: u32, index: u32, fallback: u32, bits: u64) -> u32 {
    let (extent, birth) = (m.allocate().unwrap(), m.generation());
    m.apply(&Record::Map { volume, index, birth, extent, fallback, bits: [bits, 0, 0, 0] }).unwrap();
    extent
}

fn snapshot(m: &mut Metadata, origin: u32) -> u32 {
    let id = m.next_volume();
    let items = vec![NewSnapshot { origin, id, uuid: [2; 16], name: format!("s{id}") }];
    m.apply(&Record::Snapshot { items }).unwrap();
    id
}

#[test]
fn bits_of_an_extent_end_with_its_last_unit() {
    assert_eq!(full_bits(1), [1, 0, 0, 0]);
    assert_eq!(full_bits(64), [u64::MAX, 0, 0, 0]);
    assert_eq!(full_bits(65), [u64::MAX, 1, 0, 0]);
    assert_eq!(full_bits(256), [u64::MAX; 4]);
}

#[test]
fn bitmap_agrees_with_a_set() {
    let (mut random, mut bitmap, mut set) = (Random::new(1), Bitmap::new(20_000), BTreeSet::new());
    for step in 0..20_000 {
        let number = random.below(20_000);
        if random.one_in(2) {
            assert_eq!(bitmap.insert(number), set.insert(number));
        } else {
            assert_eq!(bitmap.remove(number), set.remove(&number));
        }
        if step % 1000 == 0 {
            // Nearly empty at times: that is what the summary is for.
            set.retain(|kept| kept % 4999 == 0 || !bitmap.remove(*kept));
        }
        let from = random.below(20_001);
        assert_eq!(bitmap.next(from), set.range(from..).next().copied());
        assert_eq!(bitmap.len() as usize, set.len());
    }
}

#[test]
fn references_beyond_two_bytes_are_counted_up_and_down() {
    let mut extents = Extents::new(3);
    extents.find_free();
    for _ in 0..70_000 {
        extents.refer(1);
    }
    assert_eq!((extents.refs(1), extents.free()), (70_000, 2));
    for left in (1..70_000).rev() {
        assert!(!extents.let_go(1));
        assert_eq!(extents.refs(1), left);
    }
    assert!(extents.let_go(1));
    assert_eq!((extents.freed(), extents.free()), (1, 2));
    extents.recycle(1);
    assert_eq!((extents.freed(), extents.free()), (0, 3));
}

#[test]
fn a_write_after_a_snapshot_keeps_the_old_extent_as_fallback_until_all_is_valid() {
    let mut m = pool(10);
    let old = map(&mut m, 1, 3, NONE, 0xf);
    let snap = snapshot(&mut m, 1);
    assert!(!m.is_exclusive(1, 3) && !m.can_rebirth(1, 3));
    let new = map(&mut m, 1, 3, old, 0b1);
    assert!(m.is_exclusive(1, 3));
    let held = m.entry(1, 3);
    assert_eq!(held, Mapped::Partial { extent: new, fallback: old, bits: [1, 0, 0, 0], birth: 2 });
    assert!(m.apply(&Record::Invalid { volume: 1, index: 3, bits: [1, 0, 0, 0] }).is_err());
    m.apply(&Record::Valid { volume: 1, index: 3, bits: [0b1110, 0, 0, 0] }).unwrap();
    assert_eq!(m.entry(1, 3), Mapped::Full { extent: new, birth: 2 });
    assert_eq!(m.entry(snap, 3), Mapped::Full { extent: old, birth: 1 });
    m.apply(&Record::Delete { id: snap }).unwrap();
    assert_eq!(m.quarantined_extents(), 0);
    assert!(!m.release_some(10));
    assert_eq!((m.quarantined_extents(), m.free_extents()), (1, 1998));
    let freed = m.take_freed();
    assert_eq!(freed.extents(), [old]);
    m.recycle(freed);
    assert_eq!((m.quarantined_extents(), m.free_extents()), (0, 1999));
}

/// Units were written into a cache that was lost. What the tables say then is what a replay of the log makes, where their records name no units;
/// a fallback that nobody else had is there again.
#[test]
fn units_that_are_taken_back_show_what_they_covered_as_if_they_had_never_been_written() {
    for has_snapshot in [true, false] {
        for [first, second] in [[0b0011, 0b1100], [0b0111, 0b0011], [0b0001, 0b0010]] {
            let begin = || {
                let mut m = pool(10);
                let old = map(&mut m, 1, 3, NONE, 0xf);
                let snap = snapshot(&mut m, 1);
                let new = map(&mut m, 1, 3, old, 0);
                if !has_snapshot {
                    m.apply(&Record::Delete { id: snap }).unwrap();
                    assert!(!m.release_some(10));
                }
                (m, new, old)
            };
            let valid = |bits| Record::Valid { volume: 1, index: 3, bits: [bits, 0, 0, 0] };
            let (mut m, new, old) = begin();
            m.apply(&valid(first)).unwrap();
            m.apply(&valid(second)).unwrap();
            let is_whole = first | second == 0xf;
            assert_eq!(matches!(m.entry(1, 3), Mapped::Full { .. }), is_whole);
            let mut freed = m.take_freed();
            assert_eq!(freed.extents().contains(&old), is_whole && !has_snapshot);
            let let_go = if is_whole { old } else { NONE };
            let is_back = m.take_back(1, 3, [second, 0, 0, 0], let_go);
            assert_eq!(is_back, is_whole && !has_snapshot);
            assert_eq!(freed.takes_back(old), is_back);
            let (mut again, ..) = begin();
            again.apply(&valid(first)).unwrap();
            again.apply(&valid(0)).unwrap();
            // The one unit that both have named is lost with the second.
            let bits = [first & !second, 0, 0, 0];
            assert_eq!(m.entry(1, 3), Mapped::Partial { extent: new, fallback: old, bits, birth: 2 });
            if first & second == 0 {
                assert_eq!(m.entry(1, 3), again.entry(1, 3));
            }
            for m in [&mut m, &mut again] {
                assert_eq!(m.verify(), Vec::<String>::new());
                assert_eq!((m.quarantined_extents(), m.free_extents()), (0, 1998));
                // And its end is as ever.
                m.apply(&Record::Valid { volume: 1, index: 3, bits: ALL }).unwrap();
                m.apply(&Record::Delete { id: 1 }).unwrap();
                m.settle();
                assert_eq!(m.verify(), Vec::<String>::new());
            }
            m.recycle(freed);
            assert_eq!(m.free_extents(), 2000 - u32::from(has_snapshot));
        }
    }
}

#[test]
fn when_the_snapshot_is_gone_its_extents_are_born_again() {
    let mut m = pool(10);
    let extent = map(&mut m, 1, 3, NONE, 0b11);
    let snap = snapshot(&mut m, 1);
    m.apply(&Record::Delete { id: snap }).unwrap();
    assert!(m.can_rebirth(1, 3) && !m.is_exclusive(1, 3));
    m.apply(&Record::Rebirth { volume: 1, index: 3, birth: m.generation() }).unwrap();
    assert!(m.is_exclusive(1, 3));
    assert_eq!(m.entry(1, 3), Mapped::Partial { extent, fallback: NONE, bits: [3, 0, 0, 0], birth: 2 });
}

#[test]
fn an_old_map_of_a_grown_volume_stays_right_for_what_it_covers() {
    let mut m = pool(10);
    let old = Arc::clone(m.volume(1).unwrap().map());
    let size_bytes = (512 * 448 * 2) << 20;
    m.apply(&Record::Resize { id: 1, size_bytes }).unwrap();
    let new = Arc::clone(m.volume(1).unwrap().map());
    assert!(!Arc::ptr_eq(&old, &new));
    let extent = map(&mut m, 1, 5, NONE, 0xf);
    let far = map(&mut m, 1, 512 * 448, NONE, 0xf);
    snapshot(&mut m, 1);
    let table = m.table();
    assert_eq!(table.mapped(&old, 5), Mapped::Full { extent, birth: 1 });
    assert_eq!(table.mapped(&new, 512 * 448), Mapped::Full { extent: far, birth: 1 });
    assert_eq!((old.shared_generation(), old.size_bytes()), (1, (512 * 448) << 20));
    assert_eq!(new.size_bytes(), size_bytes);
    let small = m.apply(&Record::Resize { id: 1, size_bytes: (512 * 448) << 20 });
    assert!(small.unwrap_err().contains("is mapped at index 229376"));
    m.apply(&Record::Unmap { volume: 1, index: 512 * 448, count: 1 }).unwrap();
    m.apply(&Record::Resize { id: 1, size_bytes: 6 << 20 }).unwrap();
    assert_eq!((old.size_bytes(), new.size_bytes()), (6 << 20, 6 << 20));
    assert!(m.apply(&Record::Resize { id: 1, size_bytes: 5 << 20 }).is_err());
}

#[test]
fn held_writes_are_not_exclusive_for_readers_until_they_are_let_go() {
    let mut m = pool(10);
    map(&mut m, 1, 0, NONE, 0xf);
    let map = Arc::clone(m.volume(1).unwrap().map());
    m.hold_writes(1, true);
    assert!(m.table().lookup(&map, 0).birth() <= map.shared_generation());
    assert!(m.is_exclusive(1, 0));
    m.hold_writes(1, false);
    assert!(m.table().lookup(&map, 0).birth() > map.shared_generation());
}

#[test]
fn an_allocated_extent_is_not_given_twice_and_can_be_given_back() {
    let mut m = Metadata::new(Thin { extents: 3, ..THIN }, 100);
    let all: BTreeSet<u32> = (0..3).map(|_| m.allocate().unwrap()).collect();
    assert_eq!((all.len(), m.allocate(), m.reserved_extents()), (3, None, 3));
    m.give_back(1);
    assert_eq!((m.allocate(), m.free_extents()), (Some(1), 0));
}

#[test]
fn as_long_as_there_is_room_a_whole_checkpoint_fits_beside_the_last() {
    let mut m = Metadata::new(THIN, 300);
    let mut disk = Disk::new();
    m.apply(&create(1, (2000 * 448) << 20)).unwrap();
    let mut chunks = 0;
    while m.has_room_for_metadata(1) {
        map(&mut m, 1, chunks * 448, NONE, 0b1);
        chunks += 1;
    }
    assert!(chunks > 50, "{chunks}");
    checkpoint(&mut m, &mut disk, false);
    let root = checkpoint(&mut m, &mut disk, true);
    assert_eq!(m.live_pages().len() + 2, m.metadata_pages_used() as usize);
    assert_eq!(load(&disk, &root, THIN, 300).unwrap().volume(1).unwrap().mapped_extents(), u64::from(chunks));
}

#[test]
fn a_checkpoint_without_pages_fails_and_what_is_there_stays() {
    let mut m = Metadata::new(THIN, 40);
    let mut disk = Disk::new();
    m.apply(&create(1, (2000 * 448) << 20)).unwrap();
    map(&mut m, 1, 0, NONE, 0xf);
    let root = checkpoint(&mut m, &mut disk, false);
    for chunk in 1..50 {
        map(&mut m, 1, chunk * 448, NONE, 0xf);
    }
    m.begin_checkpoint(false);
    let error = std::iter::repeat_with(|| m.checkpoint_step(4)).find_map(Result::err).unwrap();
    assert!(error.contains("40 pages"));
    m.end_checkpoint(false);
    assert!(m.is_dirty() && m.verify().is_empty());
    assert_eq!(load(&disk, &root, THIN, 40).unwrap().volume(1).unwrap().mapped_extents(), 1);
}

#[test]
fn only_what_changed_is_written_again() {
    let mut m = pool(513 * 448);
    let mut disk = Disk::new();
    for at in [0, 1, 2, 512] {
        map(&mut m, 1, at * 448, NONE, 0xf);
    }
    checkpoint(&mut m, &mut disk, false);
    assert_eq!(m.live_pages().len(), 4 + 2 + 1);
    let before = m.live_pages();
    snapshot(&mut m, 1);
    checkpoint(&mut m, &mut disk, false);
    let after = m.live_pages();
    assert_eq!((after.len(), after.iter().filter(|page| before.contains(page)).count()), (7, 6));
    map(&mut m, 1, 1, NONE, 0xf);
    assert_eq!(m.dirty_chunks(), 1);
    m.begin_checkpoint(false);
    let pages = m.checkpoint_step(100).unwrap();
    assert_eq!(pages.len(), 3); // the copied chunk, its dir, the list
    m.end_checkpoint(false);
}

#[test]
fn bits_of_units_that_do_not_exist_are_refused() {
    let mut m = pool(10);
    let extent = m.allocate().unwrap();
    let record = Record::Map { volume: 1, index: 0, birth: 1, extent, fallback: NONE, bits: [0x10, 0, 0, 0] };
    assert!(m.apply(&record).unwrap_err().contains("4 units"));
    m.apply(&Record::Map { volume: 1, index: 0, birth: 1, extent, fallback: NONE, bits: ALL }).unwrap();
    m.apply(&Record::Invalid { volume: 1, index: 0, bits: ALL }).unwrap();
    assert_eq!((m.entry(1, 0), m.quarantined_extents()), (Mapped::None, 1));
}
