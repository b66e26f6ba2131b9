//! The table that every reactor reads without a lock: arenas of chunks and of partials, and a map per volume.
//!
//! One thread writes, any number read. The arenas grow by blocks that never move or go away, so that an id is an address.
//!
//! ```text
//!  VolumeMap.chunks[index / 448] ─ id ─► chunks[id / 4096][(id % 4096) * 448 + index % 448] ─► Entry
//!                                        partials[id / 4096][id % 4096]                     ─► extent, fallback, bits
//! ```
//!
//! Why a lookup looks twice: between loading a chunk's id and its entry, our volume may have got a copy of the chunk, and the
//! other volume, being its only user now, may have mapped something of its own there. The writer stores the copy's id before
//! it changes the old chunk, so who sees the change also sees the new id, and begins again. An id means something else only
//! after [`super::Metadata::recycle`], which waits for readers.
//!
//! Invariants:
//! - Chunk 0 is all empty: "no chunk" needs no branch.
//! - A partial belongs to one chunk. It is filled in before an entry names it.

use super::entry::{Bits, Entry, Mapped};
use crate::format::{CHUNK_ENTRIES, NONE};
use hawser_runtime::table::{HUGE_PAGE_BYTES, TableMemory};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Chunks in a block: 4096 * 448 * 8 bytes = 14 MiB, 7 huge pages to the byte. What is not used of it takes no memory.
const BLOCK_CHUNKS: usize = 4096;
const _: () = assert!((BLOCK_CHUNKS * CHUNK_ENTRIES * 8).is_multiple_of(HUGE_PAGE_BYTES));
/// Chunks at most: 2^22 of them map 1.9 * 10^9 extents.
pub(super) const CHUNKS_MAX: usize = 1 << 22;
/// Partials in a block: 4096 * 64 bytes = 256 KiB.
const BLOCK_PARTIALS: usize = 4096;
/// Partials at most.
pub(super) const PARTIALS_MAX: usize = 1 << 24;

#[repr(align(64))]
struct PartialSlot {
    extent: AtomicU32,
    fallback: AtomicU32,
    bits: [AtomicU64; 4],
}

/// What a partial says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialView {
    /// Where the units are whose bit is set.
    pub extent: u32,
    /// The extent where the others are, or [`NONE`]: they are zero.
    pub fallback: u32,
    /// Which units.
    pub bits: Bits,
}

/// A quarter of a megabyte: 28 GiB in extents of 1 MiB.
const CACHED_CHUNKS: usize = 64;

/// A volume's part of the table, and what readers must know of it.
pub struct VolumeMap {
    chunks: Box<[AtomicU32]>,
    shared_generation: AtomicU32,
    size_bytes: AtomicU64,
    is_read_only: bool,
}

impl VolumeMap {
    pub(super) fn new(chunks: &[u32], capacity: usize, size_bytes: u64, is_read_only: bool) -> VolumeMap {
        let kept = chunks.iter().map(|&id| AtomicU32::new(id));
        let more = capacity.saturating_sub(chunks.len());
        VolumeMap {
            chunks: kept.chain((0..more).map(|_| AtomicU32::new(0))).collect(),
            shared_generation: AtomicU32::new(0),
            size_bytes: AtomicU64::new(size_bytes),
            is_read_only,
        }
    }

    /// The volume's size now.
    #[must_use]
    #[inline]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// What was born after this generation is the volume's own.
    #[must_use]
    #[inline]
    pub fn shared_generation(&self) -> u32 {
        self.shared_generation.load(Ordering::Acquire)
    }

    /// A snapshot.
    #[must_use]
    #[inline]
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// How many indices it can hold.
    pub(super) fn capacity(&self) -> u64 {
        (self.chunks.len() * CHUNK_ENTRIES) as u64
    }

    pub(super) fn chunk_ids(&self) -> Vec<u32> {
        self.chunks.iter().map(|id| id.load(Ordering::Relaxed)).collect()
    }

    pub(super) fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// Its entries are more than stay in a second-level cache beside whatever else is there.
    #[must_use]
    #[inline]
    pub fn is_large(&self) -> bool {
        self.chunks.len() > CACHED_CHUNKS
    }

    /// Whoever still has it finds nothing: the volume is gone.
    pub(crate) fn forget(&self) {
        self.set_size(0);
    }

    /// The chunk at this place; 0: none.
    pub(super) fn chunk(&self, at: usize) -> u32 {
        self.chunks.get(at).map_or(0, |id| id.load(Ordering::Relaxed))
    }

    pub(super) fn set_chunk(&self, at: usize, id: u32) {
        if let Some(place) = self.chunks.get(at) {
            place.store(id, Ordering::Release);
        }
    }

    pub(super) fn set_size(&self, size_bytes: u64) {
        self.size_bytes.store(size_bytes, Ordering::Release);
    }

    pub(super) fn set_shared_generation(&self, generation: u32) {
        self.shared_generation.store(generation, Ordering::Release);
    }
}

/// Where an index of a volume is: which chunk, which entry in it.
#[inline]
pub(super) const fn split(index: u32) -> (usize, usize) {
    (index as usize / CHUNK_ENTRIES, index as usize % CHUNK_ENTRIES)
}

/// The arenas.
pub struct Table {
    chunks: Box<[OnceLock<TableMemory>]>,
    partials: Box<[OnceLock<Box<[PartialSlot]>>]>,
}

impl Table {
    pub(super) fn new() -> Table {
        let table = Table {
            chunks: (0..CHUNKS_MAX / BLOCK_CHUNKS).map(|_| OnceLock::new()).collect(),
            partials: (0..PARTIALS_MAX / BLOCK_PARTIALS).map(|_| OnceLock::new()).collect(),
        };
        table.chunk_block(0);
        table
    }

    /// What `index` of a volume maps to: for a partial its id, which [`Table::partial`] resolves.
    #[must_use]
    #[inline]
    pub fn lookup(&self, map: &VolumeMap, index: u32) -> Entry {
        self.lookup_while(map, index, || {})
    }

    /// `between` runs after the chunk's id is known and before its entry is: tests let the owner change things there.
    #[inline]
    pub(super) fn lookup_while(&self, map: &VolumeMap, index: u32, mut between: impl FnMut()) -> Entry {
        let (at, slot) = split(index);
        let Some(place) = map.chunks.get(at) else { return Entry::EMPTY };
        let mut id = place.load(Ordering::Acquire);
        loop {
            between();
            let entry = self.entry(id, slot);
            let again = place.load(Ordering::Acquire);
            if again == id {
                return entry;
            }
            id = again;
        }
    }

    /// What `index` of a volume maps to, a partial included, all as of one moment. Bits may be set meanwhile.
    #[must_use]
    pub fn mapped(&self, map: &VolumeMap, index: u32) -> Mapped {
        let mut entry = self.lookup(map, index);
        loop {
            let mapped = self.resolve(entry);
            let again = self.lookup(map, index);
            if again == entry {
                return mapped;
            }
            entry = again;
        }
    }

    /// The partial with this id. [`Table::mapped`] is the safe way to a partial: it looks again whether the entry still names it.
    #[must_use]
    #[inline]
    pub fn partial(&self, id: u32) -> PartialView {
        match self.slot(id) {
            Some(slot) => PartialView {
                extent: slot.extent.load(Ordering::Acquire),
                fallback: slot.fallback.load(Ordering::Acquire),
                bits: std::array::from_fn(|word| slot.bits[word].load(Ordering::Acquire)),
            },
            None => PartialView { extent: NONE, fallback: NONE, bits: [0; 4] },
        }
    }

    /// Loads an entry for nothing but to have it in the cache when its turn comes; loads of a batch overlap.
    #[inline]
    pub fn prefetch(&self, map: &VolumeMap, index: u32) {
        let (at, slot) = split(index);
        if let Some(place) = map.chunks.get(at) {
            std::hint::black_box(self.entry(place.load(Ordering::Relaxed), slot));
        }
    }

    pub(super) fn resolve(&self, entry: Entry) -> Mapped {
        if !entry.is_mapped() {
            return Mapped::None;
        }
        if !entry.is_partial() {
            return Mapped::Full { extent: entry.low(), birth: entry.birth() };
        }
        let PartialView { extent, fallback, bits } = self.partial(entry.low());
        Mapped::Partial { extent, fallback, bits, birth: entry.birth() }
    }

    #[inline]
    pub(super) fn entry(&self, chunk: u32, slot: usize) -> Entry {
        let chunk = chunk as usize;
        let block = self.chunks.get(chunk / BLOCK_CHUNKS).and_then(OnceLock::get);
        let place = block.and_then(|block| block.get(chunk % BLOCK_CHUNKS * CHUNK_ENTRIES + slot));
        place.map_or(Entry::EMPTY, |entry| Entry(entry.load(Ordering::Acquire)))
    }

    /// The entries of a chunk.
    pub(super) fn entries(&self, chunk: u32) -> impl Iterator<Item = Entry> + '_ {
        let begin = chunk as usize % BLOCK_CHUNKS * CHUNK_ENTRIES;
        let block = self.chunk_block(chunk as usize / BLOCK_CHUNKS);
        block[begin..begin + CHUNK_ENTRIES].iter().map(|entry| Entry(entry.load(Ordering::Relaxed)))
    }

    pub(super) fn set_entry(&self, chunk: u32, slot: usize, entry: Entry) {
        let chunk = chunk as usize;
        let block = self.chunk_block(chunk / BLOCK_CHUNKS);
        block[chunk % BLOCK_CHUNKS * CHUNK_ENTRIES + slot].store(entry.0, Ordering::Release);
    }

    /// Fills in a partial that no entry names yet.
    pub(super) fn set_partial(&self, id: u32, view: PartialView) {
        let slot = self.slot_for_writing(id);
        slot.extent.store(view.extent, Ordering::Release);
        slot.fallback.store(view.fallback, Ordering::Release);
        self.set_bits(id, view.bits);
    }

    pub(super) fn set_bits(&self, id: u32, bits: Bits) {
        for (place, bits) in self.slot_for_writing(id).bits.iter().zip(bits) {
            place.store(bits, Ordering::Release);
        }
    }

    fn chunk_block(&self, block: usize) -> &[AtomicU64] {
        self.chunks[block].get_or_init(|| TableMemory::new(BLOCK_CHUNKS * CHUNK_ENTRIES))
    }

    #[inline]
    fn slot(&self, id: u32) -> Option<&PartialSlot> {
        let id = id as usize;
        self.partials.get(id / BLOCK_PARTIALS)?.get()?.get(id % BLOCK_PARTIALS)
    }

    fn slot_for_writing(&self, id: u32) -> &PartialSlot {
        let empty = || PartialSlot {
            extent: AtomicU32::new(NONE),
            fallback: AtomicU32::new(NONE),
            bits: [const { AtomicU64::new(0) }; 4],
        };
        let id = id as usize;
        let block =
            self.partials[id / BLOCK_PARTIALS].get_or_init(|| (0..BLOCK_PARTIALS).map(|_| empty()).collect());
        &block[id % BLOCK_PARTIALS]
    }
}
