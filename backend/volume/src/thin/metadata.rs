//! [`Metadata`]: all volumes of a pool and what they hold, owned by one thread. Here: its parts, and questions to it.

use super::checkpoint::Checkpoint;
use super::chunks::Chunks;
use super::dirs::Dirs;
use super::entry::{Bits, Entry, Mapped, full_bits};
use super::extents::Extents;
use super::pages::{Pages, ROOT_PAGES};
use super::release::Freed;
use super::table::{Table, split};
use super::volume::Volume;
use crate::format::CHUNK_ENTRIES;
use crate::format::DIR_POINTERS;
use crate::format::record::VOLUME_BYTES_MAX;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thin {
    /// How many extents the pool has.
    pub extents: u32,
    /// The unit of allocation.
    pub extent_bytes: u64,
    /// The unit of validity: 1 to 256 of them are an extent.
    pub unit_bytes: u32,
}

impl Thin {
    /// Units of an extent.
    #[must_use]
    pub fn units(&self) -> u32 {
        u32::try_from(self.extent_bytes.div_ceil(u64::from(self.unit_bytes))).unwrap_or(u32::MAX)
    }

    /// log2 of the unit's size, which is a power of two.
    #[must_use]
    #[inline]
    pub fn unit_shift(&self) -> u32 {
        self.unit_bytes.trailing_zeros()
    }

    /// The bits of an extent that is valid as a whole.
    #[must_use]
    pub fn full_bits(&self) -> Bits {
        full_bits(self.units())
    }

    /// Extents that so many bytes take, or why that is too many.
    pub(super) fn indices(&self, size_bytes: u64) -> Result<u64, String> {
        match size_bytes.div_ceil(self.extent_bytes) {
            0 => Err("a volume has at least one byte".to_owned()),
            indices if indices <= u64::from(u32::MAX) && size_bytes <= VOLUME_BYTES_MAX => Ok(indices),
            _ => Err(format!("{size_bytes} bytes are more than {} extents, or than 1 EiB", u32::MAX)),
        }
    }
}

/// All volumes of a pool and what they hold.
pub struct Metadata {
    pub(super) thin: Thin,
    pub(super) full: Bits,
    pub(super) table: Arc<Table>,
    pub(super) generation: u32,
    pub(super) next_volume: u32,
    pub(super) volumes: BTreeMap<u32, Volume>,
    pub(super) names: BTreeMap<String, u32>,
    pub(super) extents: Extents,
    pub(super) chunks: Chunks,
    pub(super) dirs: Dirs,
    pub(super) pages: Pages,
    /// Chunks without a reference whose extents are still to be let go.
    pub(super) doomed: Vec<u32>,
    pub(super) freed: Freed,
    pub(super) checkpoint: Option<Box<Checkpoint>>,
    /// Pages that only the last durable tree has.
    pub(super) obsolete: Vec<u32>,
    /// The volume list of the last durable tree.
    pub(super) list_pages: Vec<u32>,
    /// Number of the last durable root.
    pub(super) root_number: u64,
    /// Something has changed since the last checkpoint was begun.
    pub(super) is_changed: bool,
}

impl Metadata {
    /// A pool without volumes, whose metadata area has so many pages.
    ///
    /// # Panics
    /// If an extent is not 1 to 256 units.
    #[must_use]
    pub fn new(thin: Thin, metadata_pages: u32) -> Metadata {
        let mut metadata = Metadata::unloaded(thin, metadata_pages);
        metadata.extents.find_free();
        metadata.is_changed = true;
        metadata
    }

    /// No extent is free yet.
    pub(super) fn unloaded(thin: Thin, metadata_pages: u32) -> Metadata {
        assert!((1..=256).contains(&thin.units()), "{thin:?}");
        let table = Arc::new(Table::new());
        Metadata {
            thin,
            full: thin.full_bits(),
            table: Arc::clone(&table),
            generation: 1,
            next_volume: 1,
            volumes: BTreeMap::new(),
            names: BTreeMap::new(),
            extents: Extents::new(thin.extents),
            chunks: Chunks::new(table),
            dirs: Dirs::new(),
            pages: Pages::new(metadata_pages),
            doomed: Vec::new(),
            freed: Freed::default(),
            checkpoint: None,
            obsolete: Vec::new(),
            list_pages: Vec::new(),
            root_number: 0,
            is_changed: false,
        }
    }

    /// For readers on any thread.
    #[must_use]
    pub fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table)
    }

    /// Geometry, with all extents as of now.
    #[must_use]
    pub fn thin(&self) -> Thin {
        self.thin
    }

    /// What is mapped now is born in this generation.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// A volume.
    #[must_use]
    pub fn volume(&self, id: u32) -> Option<&Volume> {
        self.volumes.get(&id)
    }

    /// The id of the volume with this name.
    #[must_use]
    pub fn volume_named(&self, name: &str) -> Option<u32> {
        self.names.get(name).copied()
    }

    /// All volumes, by id.
    pub fn volumes(&self) -> impl Iterator<Item = (u32, &Volume)> {
        self.volumes.iter().map(|(id, volume)| (*id, volume))
    }

    /// The id that the next new volume gets.
    #[must_use]
    pub fn next_volume(&self) -> u32 {
        self.next_volume
    }

    /// What an index of a volume maps to.
    #[must_use]
    pub fn entry(&self, volume: u32, index: u32) -> Mapped {
        self.table.resolve(self.raw_entry(volume, index))
    }

    /// The first index from `from` on that has something mapped.
    #[must_use]
    pub fn next_mapped(&self, volume: u32, from: u32) -> Option<u32> {
        let map = self.volumes.get(&volume)?.map();
        let (first, _) = split(from);
        (first..map.chunk_count()).filter(|at| map.chunk(*at) != 0).find_map(|at| {
            let base = u32::try_from(at * CHUNK_ENTRIES).ok()?;
            let entries = (base..).zip(self.table.entries(map.chunk(at)));
            entries
                .into_iter()
                .find(|(index, entry)| *index >= from && entry.is_mapped())
                .map(|(index, _)| index)
        })
    }

    /// What is mapped there belongs to this volume alone: it may be written in place.
    #[must_use]
    pub fn is_exclusive(&self, volume: u32, index: u32) -> bool {
        self.volumes
            .get(&volume)
            .is_some_and(|v| !v.is_snapshot && self.raw_entry(volume, index).birth() > v.shared_generation)
    }

    /// It was born before the last snapshot, but nobody else holds it any more: `Rebirth` makes it exclusive.
    #[must_use]
    pub fn can_rebirth(&self, volume: u32, index: u32) -> bool {
        let Some(v) = self.volumes.get(&volume) else { return false };
        let (at, _) = split(index);
        let entry = self.raw_entry(volume, index);
        if v.is_snapshot
            || !entry.is_mapped()
            || entry.birth() > v.shared_generation
            || self.is_shared(volume, at)
        {
            return false;
        }
        let extent = match self.table.resolve(entry) {
            Mapped::Full { extent, .. } | Mapped::Partial { extent, .. } => extent,
            Mapped::None => return false,
        };
        self.extents.refs(extent) == 1
    }

    /// Nobody has this extent, nor had it until just now.
    #[must_use]
    pub fn is_free(&self, extent: u32) -> bool {
        self.extents.is_free(extent)
    }

    /// Extents that can be allocated.
    #[must_use]
    pub fn free_extents(&self) -> u32 {
        self.extents.free()
    }

    /// Extents that lost their last reference and are not recycled yet.
    #[must_use]
    pub fn quarantined_extents(&self) -> u32 {
        self.extents.freed()
    }

    /// Extents that are allocated and not mapped yet.
    #[must_use]
    pub fn reserved_extents(&self) -> u32 {
        self.extents.reserved()
    }

    /// Takes a free extent. It is reserved until a `Map` names it or it is given back.
    pub fn allocate(&mut self) -> Option<u32> {
        self.extents.allocate()
    }

    /// It was not mapped after all, and nothing was told to anybody.
    ///
    /// # Panics
    /// If it is not reserved.
    pub fn give_back(&mut self, extent: u32) {
        self.extents.give_back(extent);
    }

    /// With so many more chunks a whole checkpoint still fits beside the last one. To be asked before each record that can be
    /// refused: what one record needs besides is in the reserve.
    #[must_use]
    pub fn has_room_for_metadata(&self, new_chunks: u32) -> bool {
        // What a record takes of the arenas, and those that cannot be refused after it.
        let has_arenas = self.chunks.has_room(16, 16 * CHUNK_ENTRIES);
        has_arenas && self.pages_needed() + u64::from(new_chunks) <= u64::from(self.pages_limit())
    }

    /// How many pages a tree may have, so that the next one fits beside it.
    #[must_use]
    pub fn pages_limit(&self) -> u32 {
        let pages = self.pages.count();
        (pages - RESERVE_PAGES.min(pages / 4)) / 2
    }

    /// Whether these extents can be unmapped: what a snapshot shares is copied first, which needs room; what is the volume's own does not.
    #[must_use]
    pub fn has_room_to_unmap(&self, volume: u32, from: u32, to: u32) -> bool {
        let Some(last) = to.checked_sub(1).filter(|last| *last >= from) else { return true };
        let is_shared = |at| self.chunk_at(volume, at) != 0 && self.is_shared(volume, at);
        let copies = (split(from).0..=split(last).0).any(is_shared);
        match copies {
            true => self.has_room_for_metadata(1),
            false => self.chunks.has_room(16, 16 * CHUNK_ENTRIES),
        }
    }

    /// Pages of the metadata area in use: the last durable tree's, and what a running checkpoint has written.
    #[cfg(test)]
    pub(super) fn metadata_pages_used(&self) -> u32 {
        self.pages.used()
    }

    /// Something is not in the last durable checkpoint.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.is_changed || self.checkpoint.is_some()
    }

    /// About how many chunks the next checkpoint has to write.
    #[must_use]
    pub fn dirty_chunks(&self) -> usize {
        self.chunks.dirty()
    }

    /// The pages of the last durable tree, for copying it to another member. The roots' are not among them.
    #[must_use]
    pub fn live_pages(&self) -> Vec<u32> {
        let mut is_new: Vec<u32> = match &self.checkpoint {
            Some(checkpoint) => checkpoint.allocated().to_vec(),
            None => Vec::new(),
        };
        is_new.sort_unstable();
        let used = (ROOT_PAGES..self.pages.count()).filter(|page| !self.pages.is_free(*page));
        used.filter(|page| is_new.binary_search(page).is_err()).collect()
    }

    /// Pages of a whole tree, as of now. Up to [`Metadata::pages_limit`] there is room for more.
    #[must_use]
    pub fn pages_needed(&self) -> u64 {
        let list_bytes: usize = self.volumes.values().map(|v| 96 + v.name.len() + 8 * v.dirs.len()).sum();
        let list = (list_bytes / LIST_PAGE_BYTES) as u64 + 1;
        u64::from(self.chunks.pages()) + u64::from(self.dirs.live()) + list + u64::from(ROOT_PAGES)
    }

    pub(super) fn raw_entry(&self, volume: u32, index: u32) -> Entry {
        match self.volumes.get(&volume) {
            Some(volume) => self.table.lookup(volume.map(), index),
            None => Entry::EMPTY,
        }
    }

    /// The chunk that a volume has at this place; 0: none.
    pub(super) fn chunk_at(&self, volume: u32, at: usize) -> u32 {
        match self.volumes[&volume].dirs.get(at / DIR_POINTERS) {
            Some(&dir) => self.dirs.get(dir).ids[at % DIR_POINTERS],
            None => 0,
        }
    }

    /// The chunk that a volume has at this place is another's too.
    pub(super) fn is_shared(&self, volume: u32, at: usize) -> bool {
        let Some(&dir) = self.volumes[&volume].dirs.get(at / DIR_POINTERS) else { return false };
        let dir = self.dirs.get(dir);
        dir.refs > 1 || self.chunks.get(dir.ids[at % DIR_POINTERS]).refs > 1
    }
}

/// Kept free, besides room for two trees. A record copies at most two chunks (an `Unmap` that begins and ends inside one) with 6
/// pages of partials each, and their dirs: 2 * (6 + 1) pages besides the chunks. Two trees are over by that much at most.
const RESERVE_PAGES: u32 = 64;
/// At least so much of a page of the volume list is records.
const LIST_PAGE_BYTES: usize = 3800;
