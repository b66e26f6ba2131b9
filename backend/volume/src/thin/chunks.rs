//! The owner's side of chunks and partials: reference counts, what is on disk, ids that are free.
//!
//! Must not know: volumes, extents.

use super::entry::Entry;
use super::table::{CHUNKS_MAX, PARTIALS_MAX, PartialView, Table};
use crate::format::{CHUNK_ENTRIES, PARTIAL_PAGES, PARTIALS_PER_PAGE, PagePtr};
use std::sync::Arc;

/// Where a chunk is on disk: its page, and the pages of its partials.
#[derive(Clone, Copy)]
pub(super) struct Stored {
    pub(super) chunk: PagePtr,
    pub(super) partials: [PagePtr; PARTIAL_PAGES],
}

impl Stored {
    pub(super) const NOWHERE: Stored =
        Stored { chunk: PagePtr::NONE, partials: [PagePtr::NONE; PARTIAL_PAGES] };

    pub(super) fn pages(&self) -> impl Iterator<Item = u32> + '_ {
        let all = std::iter::once(&self.chunk).chain(&self.partials);
        all.filter(|ptr| !ptr.is_none()).map(|ptr| ptr.page)
    }
}

/// What is known of a chunk besides its entries.
#[derive(Clone, Copy)]
pub(super) struct Chunk {
    /// How many dirs have it.
    pub(super) refs: u32,
    /// Entries that are mapped.
    pub(super) mapped: u16,
    /// Entries that are partial.
    pub(super) partials: u16,
    /// It has changed since the last checkpoint was begun.
    pub(super) is_dirty: bool,
    /// The running checkpoint has yet to write it.
    pub(super) is_pending: bool,
    pub(super) stored: Stored,
}

const UNUSED: Chunk =
    Chunk { refs: 0, mapped: 0, partials: 0, is_dirty: false, is_pending: false, stored: Stored::NOWHERE };

impl Chunk {
    fn partial_pages(&self) -> u32 {
        u32::from(self.partials).div_ceil(u32::try_from(PARTIALS_PER_PAGE).expect("a small number"))
    }
}

/// All chunks and partials.
pub(super) struct Chunks {
    table: Arc<Table>,
    all: Vec<Chunk>,
    free: Vec<u32>,
    partials: u32,
    free_partials: Vec<u32>,
    /// May hold ids twice, and ids that are clean or gone.
    dirty: Vec<u32>,
    /// Pages that all live chunks need.
    pages: u32,
}

impl Chunks {
    pub(super) fn new(table: Arc<Table>) -> Chunks {
        Chunks {
            table,
            all: vec![UNUSED], // chunk 0: none
            free: Vec::new(),
            partials: 0,
            free_partials: Vec::new(),
            dirty: Vec::new(),
            pages: 0,
        }
    }

    pub(super) fn get(&self, id: u32) -> &Chunk {
        &self.all[id as usize]
    }

    pub(super) fn get_mut(&mut self, id: u32) -> &mut Chunk {
        &mut self.all[id as usize]
    }

    /// All ids that were ever used.
    pub(super) fn ids(&self) -> std::ops::Range<u32> {
        1..u32::try_from(self.all.len()).expect("ids are u32")
    }

    /// Pages that all live chunks and their partials need.
    pub(super) fn pages(&self) -> u32 {
        self.pages
    }

    /// So many more chunks and partials can be made.
    pub(super) fn has_room(&self, chunks: usize, partials: usize) -> bool {
        CHUNKS_MAX - self.all.len() + self.free.len() >= chunks
            && PARTIALS_MAX - self.partials as usize + self.free_partials.len() >= partials
    }

    /// A chunk with one reference, all empty, for the table alone so far. Room was asked for.
    pub(super) fn allocate(&mut self) -> u32 {
        let id = if let Some(id) = self.free.pop() {
            for slot in 0..CHUNK_ENTRIES {
                self.table.set_entry(id, slot, Entry::EMPTY);
            }
            id
        } else {
            assert!(self.all.len() < CHUNKS_MAX, "room was asked for");
            self.all.push(UNUSED);
            u32::try_from(self.all.len() - 1).expect("below CHUNKS_MAX")
        };
        *self.get_mut(id) = Chunk { refs: 1, ..UNUSED };
        self.pages += 1;
        id
    }

    /// A partial that no entry names yet. Room was asked for.
    pub(super) fn allocate_partial(&mut self, view: PartialView) -> u32 {
        let id = self.free_partials.pop().unwrap_or_else(|| {
            assert!((self.partials as usize) < PARTIALS_MAX, "room was asked for");
            self.partials += 1;
            self.partials - 1
        });
        self.table.set_partial(id, view);
        id
    }

    /// Changes an entry and the counts; what it was.
    pub(super) fn set_entry(&mut self, id: u32, slot: usize, entry: Entry) -> Entry {
        let old = self.table.entry(id, slot);
        let chunk = &mut self.all[id as usize];
        let before = chunk.partial_pages();
        chunk.mapped = chunk.mapped + u16::from(entry.is_mapped()) - u16::from(old.is_mapped());
        chunk.partials = chunk.partials + u16::from(entry.is_partial()) - u16::from(old.is_partial());
        self.pages = self.pages + chunk.partial_pages() - before;
        self.table.set_entry(id, slot, entry);
        old
    }

    /// Its last reference is gone: it needs no pages any more.
    pub(super) fn retire(&mut self, id: u32) {
        let chunk = &mut self.all[id as usize];
        assert!(chunk.refs == 0, "chunk {id} is in use");
        chunk.is_dirty = false;
        self.pages -= 1 + chunk.partial_pages();
    }

    pub(super) fn mark_dirty(&mut self, id: u32) {
        let chunk = &mut self.all[id as usize];
        if !chunk.is_dirty {
            chunk.is_dirty = true;
            self.dirty.push(id);
        }
    }

    /// Those that changed. They count as clean from now on, and wait to be written.
    pub(super) fn take_dirty(&mut self, everything: bool) -> Vec<u32> {
        let candidates = if everything { self.ids().collect() } else { std::mem::take(&mut self.dirty) };
        let mut taken = Vec::with_capacity(candidates.len());
        for id in candidates {
            let chunk = self.get_mut(id);
            if chunk.refs > 0 && (chunk.is_dirty || everything) {
                chunk.is_dirty = false;
                chunk.is_pending = true;
                taken.push(id);
            }
        }
        self.dirty.clear();
        taken
    }

    /// How many have changed.
    pub(super) fn dirty(&self) -> usize {
        self.dirty.len()
    }

    pub(super) fn recycle(&mut self, chunks: &[u32], partials: &[u32]) {
        self.free.extend_from_slice(chunks);
        self.free_partials.extend_from_slice(partials);
    }
}
