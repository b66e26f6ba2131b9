//! Changing the mapping: what is shared is copied first, what a checkpoint has yet to write is written first.
//!
//! Nothing here fails: the callers have checked that the change makes sense, and asked for room.

use super::chunks::Stored;
use super::entry::{Entry, Mapped};
use super::metadata::Metadata;
use super::table::{PartialView, split};
use crate::format::{CHUNK_ENTRIES, DIR_POINTERS, NONE};
use std::sync::Arc;

impl Metadata {
    /// The dir of a volume, the volume's own, about to change.
    fn dir_for_change(&mut self, volume: u32, at: usize) -> u32 {
        let place = &mut self.volumes.get_mut(&volume).expect("checked").dirs[at];
        let old = *place;
        let id = if old == 0 {
            self.dirs.allocate()
        } else if self.dirs.get(old).refs > 1 {
            let id = self.dirs.allocate();
            let shared = self.dirs.get_mut(old);
            shared.refs -= 1;
            let (ids, used) = (Arc::clone(&shared.ids), shared.used);
            for &chunk in ids.iter().filter(|chunk| **chunk != 0) {
                self.chunks.get_mut(chunk).refs += 1;
            }
            let copy = self.dirs.get_mut(id);
            (copy.ids, copy.used) = (ids, used);
            id
        } else {
            old
        };
        *place = id;
        self.dirs.mark_dirty(id);
        id
    }

    /// The chunk of a volume, the volume's own, about to change.
    pub(super) fn chunk_for_change(&mut self, volume: u32, at: usize) -> u32 {
        let dir = self.dir_for_change(volume, at / DIR_POINTERS);
        let old = self.dirs.get(dir).ids[at % DIR_POINTERS];
        let id = if old == 0 {
            self.chunks.allocate()
        } else if self.chunks.get(old).refs > 1 {
            self.copy_chunk(old)
        } else {
            self.write_before_change(old);
            old
        };
        if id != old {
            self.dirs.set_chunk(dir, at % DIR_POINTERS, id);
            self.volumes.get_mut(&volume).expect("checked").set_chunk(at, id);
        }
        self.chunks.mark_dirty(id);
        id
    }

    /// A copy takes over one of the references.
    fn copy_chunk(&mut self, old: u32) -> u32 {
        let id = self.chunks.allocate();
        let table = Arc::clone(&self.table);
        for (slot, entry) in table.entries(old).enumerate().filter(|(_, entry)| entry.is_mapped()) {
            let copy = match table.resolve(entry) {
                Mapped::Partial { extent, fallback, bits, birth } => {
                    self.extents.refer(extent);
                    if fallback != NONE {
                        self.extents.refer(fallback);
                    }
                    let view = PartialView { extent, fallback, bits };
                    Entry::partial(self.chunks.allocate_partial(view), birth)
                }
                _ => {
                    self.extents.refer(entry.low());
                    entry
                }
            };
            self.chunks.set_entry(id, slot, copy);
        }
        self.chunks.get_mut(old).refs -= 1;
        id
    }

    /// Puts an entry into a chunk that may change, and lets go of what was there. What the new entry holds was referred to.
    pub(super) fn replace_entry(&mut self, volume: u32, index: u32, chunk: u32, entry: Entry) {
        let (at, slot) = split(index);
        let old = self.chunks.set_entry(chunk, slot, entry);
        let v = self.volumes.get_mut(&volume).expect("checked");
        v.mapped = v.mapped + u64::from(entry.is_mapped()) - u64::from(old.is_mapped());
        self.let_go(old);
        if self.chunks.get(chunk).mapped == 0 {
            self.drop_chunk(volume, at);
        }
    }

    /// A new partial that holds the extent and the fallback from now on.
    pub(super) fn new_partial(&mut self, view: PartialView, birth: u32) -> Entry {
        debug_assert!(view.bits != self.full);
        self.extents.refer(view.extent);
        if view.fallback != NONE {
            self.extents.refer(view.fallback);
        }
        Entry::partial(self.chunks.allocate_partial(view), birth)
    }

    /// What this entry held is not held by it any more.
    pub(super) fn let_go(&mut self, entry: Entry) {
        match self.table.resolve(entry) {
            Mapped::None => {}
            Mapped::Full { extent, .. } => self.let_go_extent(extent),
            Mapped::Partial { extent, fallback, .. } => {
                self.let_go_extent(extent);
                if fallback != NONE {
                    self.let_go_extent(fallback);
                }
                self.freed.partials.push(entry.low());
            }
        }
    }

    fn let_go_extent(&mut self, extent: u32) {
        if self.extents.let_go(extent) {
            self.freed.extents.push(extent);
        }
    }

    /// The volume has no chunk there any more.
    pub(super) fn drop_chunk(&mut self, volume: u32, at: usize) {
        let dir = self.dir_for_change(volume, at / DIR_POINTERS);
        let id = self.dirs.get(dir).ids[at % DIR_POINTERS];
        let mapped = self.chunks.get(id).mapped;
        self.dirs.set_chunk(dir, at % DIR_POINTERS, 0);
        let v = self.volumes.get_mut(&volume).expect("checked");
        v.set_chunk(at, 0);
        v.mapped -= u64::from(mapped);
        if self.dirs.get(dir).used == 0 {
            v.dirs[at / DIR_POINTERS] = 0;
            self.let_go_dir(dir);
        }
        self.let_go_chunk(id);
    }

    /// One reference to a dir less; the last lets go of its chunks.
    pub(super) fn let_go_dir(&mut self, id: u32) {
        let dir = self.dirs.get_mut(id);
        dir.refs -= 1;
        if dir.refs > 0 {
            return;
        }
        let ids = Arc::clone(&dir.ids);
        for &chunk in ids.iter().filter(|chunk| **chunk != 0) {
            self.let_go_chunk(chunk);
        }
        self.dirs.retire(id);
        match &mut self.checkpoint {
            Some(checkpoint) => checkpoint.dropped_dirs.push(id),
            None => self.forget_dir(id),
        }
    }

    fn let_go_chunk(&mut self, id: u32) {
        let chunk = self.chunks.get_mut(id);
        chunk.refs -= 1;
        if chunk.refs > 0 {
            return;
        }
        self.chunks.retire(id);
        self.doomed.push(id);
        match &mut self.checkpoint {
            Some(checkpoint) => checkpoint.dropped.push(id),
            None => self.forget_chunk(id),
        }
    }

    /// Lets go of what a chunk without references holds. Its entries stay for those who may still look.
    pub(super) fn release_chunk(&mut self, id: u32) {
        let table = Arc::clone(&self.table);
        for entry in table.entries(id).filter(|entry| entry.is_mapped()) {
            self.let_go(entry);
        }
        self.freed.chunks.push(id);
    }

    /// The pages of a chunk that is gone are the last durable tree's alone.
    pub(super) fn forget_chunk(&mut self, id: u32) {
        let chunk = self.chunks.get_mut(id);
        let stored = std::mem::replace(&mut chunk.stored, Stored::NOWHERE);
        self.obsolete.extend(stored.pages());
    }

    pub(super) fn forget_dir(&mut self, id: u32) {
        let stored = self.dirs.get(id).stored;
        if !stored.is_none() {
            self.obsolete.push(stored.page);
        }
        self.dirs.recycle(id);
    }

    /// Clears `first..end` of one chunk's entries.
    pub(super) fn unmap_in_chunk(&mut self, volume: u32, at: usize, first: usize, end: usize) {
        let old = self.chunk_at(volume, at);
        if old == 0 {
            return;
        }
        let slots = self.table.entries(old).enumerate().filter(|(_, entry)| entry.is_mapped());
        let doomed: Vec<usize> =
            slots.map(|(slot, _)| slot).filter(|slot| (first..end).contains(slot)).collect();
        if doomed.len() == usize::from(self.chunks.get(old).mapped) {
            self.drop_chunk(volume, at);
        } else if !doomed.is_empty() {
            let chunk = self.chunk_for_change(volume, at);
            for slot in doomed {
                let index = u32::try_from(at * CHUNK_ENTRIES + slot).expect("within the volume");
                self.replace_entry(volume, index, chunk, Entry::EMPTY);
            }
        }
    }
}
