//! A volume, snapshot or clone, as its owner sees it.

use super::table::VolumeMap;
use crate::format::{CHUNK_ENTRIES, DIR_POINTERS, Uuid};
use std::sync::{Arc, Weak};

/// A volume, snapshot or clone.
pub struct Volume {
    pub(super) name: String,
    pub(super) uuid: Uuid,
    pub(super) is_snapshot: bool,
    pub(super) origin: u32,
    pub(super) size_bytes: u64,
    pub(super) shared_generation: u32,
    /// Indices with something mapped.
    pub(super) mapped: u64,
    /// As many as the map has room for; 0: no dir.
    pub(super) dirs: Vec<u32>,
    map: Arc<VolumeMap>,
    /// Maps that were too small for the volume's growth: as long as somebody reads them they are kept right.
    older: Vec<Weak<VolumeMap>>,
}

/// What a volume is made of.
pub(super) struct VolumeParts {
    pub(super) name: String,
    pub(super) uuid: Uuid,
    pub(super) is_snapshot: bool,
    pub(super) origin: u32,
    pub(super) size_bytes: u64,
    pub(super) shared_generation: u32,
    pub(super) mapped: u64,
    pub(super) dirs: Vec<u32>,
}

/// Dirs that so many indices need.
pub(super) fn dirs_for(indices: u64) -> usize {
    let chunks = indices.div_ceil(CHUNK_ENTRIES as u64);
    usize::try_from(chunks.div_ceil(DIR_POINTERS as u64)).expect("indices are u32")
}

impl Volume {
    /// With these dirs, whose chunks are `chunks`.
    pub(super) fn new(parts: VolumeParts, chunks: &[u32]) -> Volume {
        let capacity = parts.dirs.len() * DIR_POINTERS;
        let map = VolumeMap::new(chunks, capacity, parts.size_bytes, parts.is_snapshot);
        map.set_shared_generation(parts.shared_generation);
        Volume {
            name: parts.name,
            uuid: parts.uuid,
            is_snapshot: parts.is_snapshot,
            origin: parts.origin,
            size_bytes: parts.size_bytes,
            shared_generation: parts.shared_generation,
            mapped: parts.mapped,
            dirs: parts.dirs,
            map: Arc::new(map),
            older: Vec::new(),
        }
    }

    /// Its name in the pool.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its UUID.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// It cannot be written.
    #[must_use]
    pub fn is_snapshot(&self) -> bool {
        self.is_snapshot
    }

    /// The id of what it was made of, there or not any more; [`NONE`](crate::format::NONE): of nothing.
    #[must_use]
    pub fn origin(&self) -> u32 {
        self.origin
    }

    /// Its size.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// What was born after this generation is its own.
    #[must_use]
    pub fn shared_generation(&self) -> u32 {
        self.shared_generation
    }

    /// Indices with an extent, shared ones included.
    #[must_use]
    pub fn mapped_extents(&self) -> u64 {
        self.mapped
    }

    /// For readers. Growing may replace it: who sees a smaller size than the volume's asks again.
    #[must_use]
    pub fn map(&self) -> &Arc<VolumeMap> {
        &self.map
    }

    pub(super) fn set_chunk(&mut self, at: usize, id: u32) {
        self.map.set_chunk(at, id);
        self.for_older(|map| map.set_chunk(at, id));
    }

    pub(super) fn set_shared_generation(&mut self, generation: u32) {
        self.shared_generation = generation;
        self.show_shared_generation(generation);
    }

    /// To readers alone.
    pub(super) fn show_shared_generation(&mut self, generation: u32) {
        self.map.set_shared_generation(generation);
        self.for_older(|map| map.set_shared_generation(generation));
    }

    /// `indices`: how many extents that is.
    pub(super) fn resize(&mut self, size_bytes: u64, indices: u64, extent_bytes: u64) {
        self.size_bytes = size_bytes;
        let dirs = dirs_for(indices);
        if dirs > self.dirs.len() {
            self.dirs.resize(dirs, 0);
            let ids = self.map.chunk_ids();
            let map = VolumeMap::new(&ids, dirs * DIR_POINTERS, size_bytes, self.is_snapshot);
            map.set_shared_generation(self.map.shared_generation());
            let old = std::mem::replace(&mut self.map, Arc::new(map));
            self.older.push(Arc::downgrade(&old));
        }
        self.map.set_size(size_bytes);
        self.for_older(|map| map.set_size(size_bytes.min(map.capacity() * extent_bytes)));
    }

    fn for_older(&mut self, tell: impl Fn(&VolumeMap)) {
        self.older.retain(|map| match map.upgrade() {
            Some(map) => {
                tell(&map);
                true
            }
            None => false,
        });
    }
}
