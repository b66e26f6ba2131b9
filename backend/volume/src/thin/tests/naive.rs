//! The naive model: each volume is a map of what its indices hold, copied as a whole for a snapshot.

use crate::format::{NONE, Record};
use crate::thin::{Bits, Mapped, Metadata};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) extent: u32,
    pub(super) fallback: u32,
    pub(super) bits: Bits,
    /// Mapped, or born again, after the last snapshot or clone.
    pub(super) is_own: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NaiveVolume {
    pub(super) name: String,
    pub(super) size_bytes: u64,
    pub(super) is_snapshot: bool,
    pub(super) origin: u32,
    pub(super) held: BTreeMap<u32, Held>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Naive {
    pub(super) volumes: BTreeMap<u32, NaiveVolume>,
    pub(super) generation: u32,
    pub(super) extents: u32,
    pub(super) next_volume: u32,
    pub(super) full: Bits,
}

impl Naive {
    pub(super) fn new(extents: u32, full: Bits) -> Naive {
        Naive { volumes: BTreeMap::new(), generation: 1, extents, next_volume: 1, full }
    }

    /// A record that makes sense.
    pub(super) fn apply(&mut self, record: &Record) {
        match record {
            Record::CreateVolume { id, name, size_bytes, .. } => {
                let (name, held) = (name.clone(), BTreeMap::new());
                self.add(
                    *id,
                    NaiveVolume { name, size_bytes: *size_bytes, is_snapshot: false, origin: NONE, held },
                );
            }
            Record::Resize { id, size_bytes } => self.at(*id).size_bytes = *size_bytes,
            Record::Snapshot { items } => {
                for item in items {
                    self.copy(item.origin, item.id, &item.name, true);
                }
                self.generation += 1;
            }
            Record::Clone { snapshot, id, name, .. } => {
                self.copy(*snapshot, *id, name, false);
                self.generation += 1;
            }
            Record::Delete { id } => drop(self.volumes.remove(id)),
            &Record::Map { volume, index, extent, fallback, bits, .. } => {
                let fallback = if bits == self.full { NONE } else { fallback };
                self.at(volume).held.insert(index, Held { extent, fallback, bits, is_own: true });
            }
            &Record::Valid { volume, index, bits } => {
                let full = self.full;
                let held = self.at(volume).held.get_mut(&index).unwrap();
                held.bits.iter_mut().zip(bits).for_each(|(held, bits)| *held |= bits);
                if held.bits == full {
                    held.fallback = NONE;
                }
            }
            &Record::Invalid { volume, index, bits } => {
                let held = self.at(volume).held.get_mut(&index).unwrap();
                let before = held.bits;
                held.bits.iter_mut().zip(bits).for_each(|(held, bits)| *held &= !bits);
                // What had nothing valid before is about to be written.
                if held.bits == [0; 4] && before != held.bits {
                    self.at(volume).held.remove(&index);
                }
            }
            &Record::Unmap { volume, index, count } => {
                self.at(volume).held.retain(|at, _| !(index..index + count).contains(at));
            }
            &Record::Rebirth { volume, index, .. } => {
                self.at(volume).held.get_mut(&index).unwrap().is_own = true;
            }
            Record::Grow { extents } => self.extents = *extents,
        }
    }

    fn at(&mut self, id: u32) -> &mut NaiveVolume {
        self.volumes.get_mut(&id).unwrap()
    }

    fn add(&mut self, id: u32, volume: NaiveVolume) {
        self.volumes.insert(id, volume);
        self.next_volume = id + 1;
    }

    fn copy(&mut self, origin: u32, id: u32, name: &str, is_snapshot: bool) {
        let from = self.at(origin);
        from.held.values_mut().for_each(|held| held.is_own = false);
        let copy = NaiveVolume { name: name.to_owned(), is_snapshot, origin, ..from.clone() };
        self.add(id, copy);
    }

    /// How many indices of volumes hold this extent.
    pub(super) fn holders(&self, extent: u32) -> usize {
        let all = self.volumes.values().flat_map(|v| v.held.values());
        all.filter(|held| held.extent == extent || held.fallback == extent).count()
    }

    pub(super) fn referenced(&self) -> BTreeSet<u32> {
        let all = self.volumes.values().flat_map(|v| v.held.values());
        all.flat_map(|held| [held.extent, held.fallback]).filter(|extent| *extent != NONE).collect()
    }

    /// The same, for all who may ask. `indices`: where something may be mapped. `is_settled`: nothing waits to be let go.
    pub(super) fn compare(&self, metadata: &Metadata, indices: &[u32], is_settled: bool) {
        assert_eq!(metadata.generation(), self.generation);
        assert_eq!(metadata.next_volume(), self.next_volume);
        assert_eq!(metadata.thin().extents, self.extents);
        let ids: Vec<u32> = metadata.volumes().map(|(id, _)| id).collect();
        assert_eq!(ids, self.volumes.keys().copied().collect::<Vec<u32>>());
        let table = metadata.table();
        for (id, naive) in &self.volumes {
            let volume = metadata.volume(*id).unwrap();
            assert_eq!(metadata.volume_named(&naive.name), Some(*id));
            assert_eq!((volume.name(), volume.origin()), (naive.name.as_str(), naive.origin));
            assert_eq!((volume.size_bytes(), volume.is_snapshot()), (naive.size_bytes, naive.is_snapshot));
            assert_eq!(volume.map().size_bytes(), naive.size_bytes);
            assert_eq!(volume.map().shared_generation(), volume.shared_generation());
            assert_eq!(volume.mapped_extents(), naive.held.len() as u64, "volume {id}");
            for &index in indices {
                let mapped = metadata.entry(*id, index);
                assert_eq!(mapped, table.mapped(volume.map(), index));
                let held = naive.held.get(&index);
                match (mapped, held) {
                    (Mapped::None, None) => {}
                    (Mapped::Full { extent, .. }, Some(held)) => {
                        assert_eq!((extent, self.full, NONE), (held.extent, held.bits, held.fallback));
                    }
                    (Mapped::Partial { extent, fallback, bits, .. }, Some(held)) => {
                        assert_eq!((extent, fallback, bits), (held.extent, held.fallback, held.bits));
                        assert_ne!(bits, self.full);
                    }
                    other => panic!("volume {id} index {index}: {other:?}"),
                }
                let is_own = held.is_some_and(|held| held.is_own && !naive.is_snapshot);
                assert_eq!(metadata.is_exclusive(*id, index), is_own, "volume {id} index {index}: {held:?}");
                let is_alone = held.is_some_and(|held| self.holders(held.extent) == 1);
                let can = metadata.can_rebirth(*id, index);
                let may = is_alone && !is_own && !naive.is_snapshot;
                assert!(
                    can == may || (may && !is_settled),
                    "volume {id} index {index}: rebirth {can}, {may}"
                );
            }
        }
    }
}
