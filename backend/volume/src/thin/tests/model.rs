//! Random records, checkpoints, crashes and recycling beside the naive model.

use super::naive::Naive;
use super::tools::{Disk, POOL, Random, load};
use crate::format::{NONE, NewSnapshot, Record, Root};
use crate::thin::{Bits, Freed, Metadata, Thin};
use std::collections::BTreeMap;

const PAGES: u32 = 400;
const EXTENTS: u32 = 64;
/// Chunks that are used: in two dirs, and beside each other.
const PLACES: [u32; 4] = [0, 1, 511, 512];
const PER_PLACE: u32 = 5;

/// What is durable: a root, the state that it is of, and the records since.
struct Durable {
    root: Root,
    state: Naive,
    records: Vec<Record>,
}

struct Running {
    state: Naive,
    /// How many of the durable's records are in it.
    records: usize,
}

struct World {
    random: Random,
    thin: Thin,
    metadata: Metadata,
    naive: Naive,
    disk: Disk,
    durable: Option<Durable>,
    since_start: Vec<Record>,
    running: Option<Running>,
    waiting: Vec<Freed>,
    indices: Vec<u32>,
    counts: BTreeMap<&'static str, u32>,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Random::new(seed);
        let units = random.pick(&[1_u32, 8, 100, 256]).unwrap();
        let thin = Thin { extents: EXTENTS, extent_bytes: 4096 * u64::from(units), unit_bytes: 4096 };
        let indices =
            PLACES.iter().flat_map(|place| (0..PER_PLACE).map(move |slot| place * 448 + slot * 111));
        World {
            random,
            thin,
            metadata: Metadata::new(thin, PAGES),
            naive: Naive::new(EXTENTS, thin.full_bits()),
            disk: Disk::new(),
            durable: None,
            since_start: Vec::new(),
            running: None,
            waiting: Vec::new(),
            indices: indices.collect(),
            counts: BTreeMap::new(),
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn bits(&mut self) -> Bits {
        let full = self.naive.full;
        let mut bits: Bits = std::array::from_fn(|word| self.random.next() & full[word]);
        if self.random.one_in(4) {
            bits = full;
        }
        if bits == [0; 4] {
            bits[0] = 1;
        }
        bits
    }

    fn volume(&mut self, is_snapshot: Option<bool>) -> Option<u32> {
        let fits = |snapshot: bool| is_snapshot.is_none_or(|wanted| wanted == snapshot);
        let all = self.naive.volumes.iter().filter(|(_, v)| fits(v.is_snapshot));
        let ids: Vec<u32> = all.map(|(id, _)| *id).collect();
        self.random.pick(&ids)
    }

    /// A place in a writable volume, within its size.
    fn place(&mut self) -> Option<(u32, u32)> {
        let volume = self.volume(Some(false))?;
        let index = self.random.pick(&self.indices)?;
        let end = self.naive.volumes[&volume].size_bytes.div_ceil(self.thin.extent_bytes);
        (u64::from(index) < end).then_some((volume, index))
    }

    fn record(&mut self) -> Option<Record> {
        let next = self.naive.next_volume;
        let has_room = self.naive.volumes.len() < 9;
        let uuid = [u8::try_from(next % 256).unwrap(); 16];
        Some(match self.random.below(40) {
            0 | 1 if has_room => {
                let indices = self.random.pick(&[5, 449, 512 * 448, 512 * 448 + 449]).unwrap();
                let size_bytes = indices * self.thin.extent_bytes - u64::from(self.random.below(4096));
                Record::CreateVolume { id: next, uuid, name: format!("v{next}"), size_bytes }
            }
            2 => {
                let id = self.volume(Some(false))?;
                let last = self.naive.volumes[&id].held.keys().last().map_or(0, |index| u64::from(*index));
                let indices = (last + 1).max(u64::from(self.random.below(513 * 448)));
                Record::Resize { id, size_bytes: indices * self.thin.extent_bytes }
            }
            3 | 4 if has_room => {
                let mut items = vec![];
                for id in next..next + 1 + self.random.below(2) {
                    items.push(NewSnapshot { origin: self.volume(None)?, id, uuid, name: format!("s{id}") });
                }
                Record::Snapshot { items }
            }
            5 | 6 if has_room => {
                Record::Clone { snapshot: self.volume(Some(true))?, id: next, uuid, name: format!("c{next}") }
            }
            7 | 8 => Record::Delete { id: self.volume(None)? },
            9..=20 => {
                let (volume, index) = self.place()?;
                let held = self.naive.volumes[&volume].held.get(&index);
                let background =
                    held.map_or(NONE, |h| if h.bits == self.naive.full { h.extent } else { h.fallback });
                let fallback = if self.random.one_in(3) { NONE } else { background };
                let bits = if self.random.one_in(5) { [0; 4] } else { self.bits() };
                let extent = self.metadata.allocate()?;
                Record::Map { volume, index, birth: self.naive.generation, extent, fallback, bits }
            }
            21..=26 => {
                let (volume, index) = self.place()?;
                let held = self.naive.volumes[&volume].held.get(&index).filter(|held| held.is_own)?;
                let fallback = held.fallback;
                let bits = self.bits();
                if fallback == NONE && self.random.one_in(2) {
                    Record::Invalid { volume, index, bits }
                } else {
                    Record::Valid { volume, index, bits }
                }
            }
            27..=30 => {
                let (volume, index) = self.place()?;
                let end = self.naive.volumes[&volume].size_bytes.div_ceil(self.thin.extent_bytes);
                let count = self.random.pick(&[1, 2, 300, 448, 900, 512 * 448]).unwrap();
                let index = if self.random.one_in(3) { index / 448 * 448 } else { index };
                let count = count.min(u32::try_from(end).unwrap() - index);
                Record::Unmap { volume, index, count }
            }
            31..=34 => {
                let (volume, index) = self.place()?;
                self.metadata.can_rebirth(volume, index).then_some(())?;
                Record::Rebirth { volume, index, birth: self.naive.generation }
            }
            35 if self.naive.extents < 80 => Record::Grow { extents: self.naive.extents + 1 },
            _ => return None,
        })
    }

    fn change(&mut self) {
        let Some(record) = self.record() else { return };
        self.count(kind(&record));
        if !self.metadata.has_room_for_metadata(2) {
            self.count("no room");
            if let Record::Map { extent, .. } = record {
                self.metadata.give_back(extent);
                return;
            }
            if !matches!(record, Record::Delete { .. }) {
                return;
            }
        }
        self.metadata.apply(&record).unwrap_or_else(|error| panic!("{record:?}: {error}"));
        self.naive.apply(&record);
        match &mut self.durable {
            Some(durable) => durable.records.push(record),
            None => self.since_start.push(record),
        }
    }

    /// A record that makes no sense changes nothing.
    fn refuse(&mut self) {
        let some = self.volume(None).unwrap_or(0);
        let snapshot = self.volume(Some(true)).unwrap_or(0);
        let writable = self.volume(Some(false)).unwrap_or(0);
        let taken = self.naive.referenced().first().copied().unwrap_or(NONE - 1);
        let free = (0..self.naive.extents).find(|e| !self.naive.referenced().contains(e)).unwrap_or(NONE - 1);
        let (full, now) = (self.naive.full, self.naive.generation);
        let map = |volume, index, birth, extent, fallback, bits| Record::Map {
            volume,
            index,
            birth,
            extent,
            fallback,
            bits,
        };
        let record = match self.random.below(16) {
            0 => map(writable, 0, now + 1, free, NONE, full),
            1 => map(writable, 0, 0, free, NONE, full),
            2 => map(writable, 0, now, taken, NONE, full),
            3 => map(writable, 600 * 448, now, free, NONE, full),
            4 => map(snapshot, 0, now, free, NONE, full),
            5 => map(writable, 0, now, free, free, full),
            6 => map(writable, 0, now, self.naive.extents, NONE, full),
            7 => Record::Valid { volume: writable, index: 3, bits: [1, 0, 0, 0] },
            8 => Record::Invalid { volume: snapshot, index: 0, bits: full },
            9 => Record::Unmap { volume: writable, index: 0, count: u32::MAX },
            10 => Record::Delete { id: self.naive.next_volume },
            11 => Record::CreateVolume { id: some, uuid: [0; 16], name: "new".into(), size_bytes: 1 },
            12 => Record::Clone {
                snapshot: writable,
                id: self.naive.next_volume,
                uuid: [0; 16],
                name: "x".into(),
            },
            13 => Record::Grow { extents: self.naive.extents - 1 },
            14 => Record::Snapshot { items: vec![] },
            _ => {
                let item = |id| NewSnapshot { origin: some, id, uuid: [0; 16], name: "twice".into() };
                Record::Snapshot {
                    items: vec![item(self.naive.next_volume), item(self.naive.next_volume + 1)],
                }
            }
        };
        let error = self.metadata.apply(&record).expect_err(&format!("{record:?}"));
        assert!(!error.is_empty());
        self.count("refused");
    }

    fn recycle(&mut self) {
        if self.random.one_in(2) {
            let freed = self.metadata.take_freed();
            self.waiting.push(freed);
        } else if !self.waiting.is_empty() {
            let mut freed = self.waiting.remove(0);
            if let Some(more) = self.waiting.pop() {
                freed.merge(more);
            }
            self.metadata.recycle(freed);
        }
        if self.random.one_in(2) {
            self.metadata.release_some(1);
        }
    }

    fn checkpoint(&mut self) {
        let Some(running) = &self.running else {
            let everything = self.random.one_in(6);
            self.metadata.begin_checkpoint(everything);
            let records = self.durable.as_ref().map_or(self.since_start.len(), |d| d.records.len());
            self.running = Some(Running { state: self.naive.clone(), records });
            return;
        };
        if self.random.one_in(12) {
            self.count("given up");
            self.metadata.end_checkpoint(false);
            self.running = None;
            return;
        }
        let live = self.metadata.live_pages();
        let pages = self.metadata.checkpoint_step(3).unwrap();
        if !pages.is_empty() {
            for (page, bytes) in pages {
                assert!(!live.contains(&page), "page {page} is the durable tree's");
                assert_eq!(bytes.len(), 4096);
                self.disk.insert(page, bytes);
            }
            return;
        }
        let root = self.metadata.checkpoint_root(POOL, 0, 0, 0);
        self.metadata.end_checkpoint(true);
        let records = match self.durable.take() {
            Some(mut durable) => durable.records.split_off(running.records),
            None => std::mem::take(&mut self.since_start).split_off(running.records),
        };
        let state = self.running.take().unwrap().state;
        // Only what belongs to a tree survives, so that a page that was freed too early is missed.
        let live = self.metadata.live_pages();
        self.disk.retain(|page, _| live.contains(page));
        self.durable = Some(Durable { root, state, records });
        self.count("committed");
    }

    /// Loads what is durable and replays; at times goes on with that.
    fn reopen(&mut self) {
        let Some(durable) = &self.durable else { return };
        let thin = Thin { extents: 80, ..self.thin };
        let mut loaded = load(&self.disk, &durable.root, thin, PAGES).unwrap();
        assert_eq!(loaded.verify(), Vec::<String>::new());
        durable.state.compare(&loaded, &self.indices, true);
        assert_eq!(loaded.live_pages(), self.metadata.live_pages());
        for record in &durable.records {
            loaded.apply(record).unwrap_or_else(|error| panic!("replay {record:?}: {error}"));
            loaded.settle();
        }
        assert_eq!(loaded.verify(), Vec::<String>::new());
        self.naive.compare(&loaded, &self.indices, true);
        assert_eq!(
            loaded.free_extents() as usize,
            self.naive.extents as usize - self.naive.referenced().len()
        );
        self.count("reopened");
        if self.random.one_in(3) {
            self.metadata = loaded;
            self.running = None;
            self.waiting.clear();
        }
    }

    fn check(&mut self) {
        assert_eq!(self.metadata.verify(), Vec::<String>::new());
        self.naive.compare(&self.metadata, &self.indices, false);
        let referenced = self.naive.referenced();
        let m = &self.metadata;
        let others = m.free_extents() + m.quarantined_extents() + m.reserved_extents();
        assert!(others as usize + referenced.len() <= self.naive.extents as usize);
        if !m.has_more_to_release() {
            assert_eq!(others as usize + referenced.len(), self.naive.extents as usize);
        }
    }

    fn end(&mut self) {
        if self.running.take().is_some() {
            self.metadata.end_checkpoint(false);
        }
        for freed in std::mem::take(&mut self.waiting) {
            self.metadata.recycle(freed);
        }
        let ids: Vec<u32> = self.naive.volumes.keys().copied().collect();
        for id in ids {
            self.metadata.apply(&Record::Delete { id }).unwrap();
            self.naive.apply(&Record::Delete { id });
        }
        self.metadata.settle();
        self.check();
        assert_eq!(self.metadata.free_extents() + self.metadata.reserved_extents(), self.naive.extents);
        let root = super::tools::checkpoint(&mut self.metadata, &mut self.disk, false);
        assert_eq!((self.metadata.metadata_pages_used(), self.metadata.live_pages()), (2, vec![]));
        assert!(!self.metadata.is_dirty());
        let empty = load(&self.disk, &root, self.metadata.thin(), PAGES).unwrap();
        assert_eq!(empty.free_extents(), self.naive.extents);
    }
}

fn kind(record: &Record) -> &'static str {
    match record {
        Record::CreateVolume { .. } => "create",
        Record::Resize { .. } => "resize",
        Record::Snapshot { .. } => "snapshot",
        Record::Clone { .. } => "clone",
        Record::Delete { .. } => "delete",
        Record::Map { .. } => "map",
        Record::Valid { .. } => "valid",
        Record::Invalid { .. } => "invalid",
        Record::Unmap { .. } => "unmap",
        Record::Rebirth { .. } => "rebirth",
        Record::Grow { .. } => "grow",
    }
}

#[test]
fn random_records_checkpoints_and_crashes_agree_with_a_naive_model() {
    let seeds = std::env::var("THIN_SEEDS").map_or(12, |seeds| seeds.parse().unwrap());
    let mut counts = BTreeMap::new();
    for seed in 0..seeds {
        println!("seed {seed}");
        let mut world = World::new(seed);
        for step in 0..3000 {
            match world.random.below(20) {
                0..=11 => world.change(),
                12 => world.refuse(),
                13..=14 => world.recycle(),
                15..=18 => world.checkpoint(),
                _ if world.random.one_in(6) => world.reopen(),
                _ => {}
            }
            if step % 16 == 0 {
                world.check();
            }
        }
        world.end();
        for (what, count) in world.counts {
            *counts.entry(what).or_insert(0) += count;
        }
    }
    println!("{counts:?}");
    let all = [
        "create",
        "resize",
        "snapshot",
        "clone",
        "delete",
        "map",
        "valid",
        "invalid",
        "unmap",
        "rebirth",
        "grow",
        "refused",
        "given up",
        "committed",
        "reopened",
    ];
    for what in all {
        assert!(counts.get(what).is_some_and(|count| *count > 3), "{what}: {counts:?}");
    }
}
