//! Writing a checkpoint: the state of one instant, page by page, while the state goes on changing.
//!
//! ```text
//!   root ─► volume list ─► dirs ─► chunks ─► partials      written from the leaves up: a pointer carries its page's CRC
//! ```
//!
//! What did not change since the last checkpoint keeps its page. What did is frozen by [`Metadata::begin_checkpoint`]: of the
//! dirs the ids are held on to; a chunk is marked, and written early if it is about to change. What goes away meanwhile keeps
//! its id, its entries and its partials until the end, so it can still be written.
//!
//! Invariants:
//! - A page of the last durable tree is not written to before the next root is durable.
//! - A checkpoint that is given up leaves everything as if it had not been begun.

use super::chunks::Stored;
use super::dirs::Ids;
use super::entry::Mapped;
use super::metadata::Metadata;
use super::pages::Pages;
use super::release::Freed;
use crate::format::{
    CHUNK_ENTRIES, ChunkPage, DIR_POINTERS, PARTIAL_PAGES, PARTIALS_PER_PAGE, PagePtr, PartialRecord, Root,
    Uuid, VolumeRecord, crc_of, encode_dir, encode_partials, encode_volumes,
};
use crate::simulated::is_broken;
use std::sync::Arc;

/// A volume as it was, and the ids of its dirs.
struct FrozenVolume {
    record: VolumeRecord,
    dirs: Vec<u32>,
}

/// A checkpoint that is being written.
pub(super) struct Checkpoint {
    generation: u32,
    next_volume: u32,
    extents: u32,
    volumes: Vec<FrozenVolume>,
    chunks: Vec<u32>,
    chunks_done: usize,
    dirs: Vec<(u32, Ids)>,
    dirs_done: usize,
    list: Option<PagePtr>,
    list_pages: Vec<u32>,
    /// Written, not handed out yet.
    ready: Vec<(u32, Vec<u8>)>,
    allocated: Vec<u32>,
    /// Pages that the new tree does not have; the first `obsolete` of them it never had.
    frees: Vec<u32>,
    obsolete: usize,
    chunks_before: Vec<(u32, Stored)>,
    dirs_before: Vec<(u32, PagePtr)>,
    is_out_of_pages: bool,
    /// Lost their last reference meanwhile.
    pub(super) dropped: Vec<u32>,
    pub(super) dropped_dirs: Vec<u32>,
    /// Recycled meanwhile.
    pub(super) recycled: Freed,
}

impl Checkpoint {
    pub(super) fn allocated(&self) -> &[u32] {
        &self.allocated
    }

    /// Puts a page where it will be; `None`: there is no page left.
    fn add(&mut self, pages: &mut Pages, bytes: Vec<u8>) -> Option<PagePtr> {
        let Some(page) = pages.allocate() else {
            self.is_out_of_pages = true;
            return None;
        };
        let ptr = PagePtr { page, crc: crc_of(&bytes) };
        self.allocated.push(page);
        self.ready.push((page, bytes));
        Some(ptr)
    }
}

impl Metadata {
    /// Freezes what is to be written: the state now. `everything`: all pages anew, wherever they are.
    ///
    /// # Panics
    /// If one is being written.
    pub fn begin_checkpoint(&mut self, everything: bool) {
        assert!(self.checkpoint.is_none(), "a checkpoint is being written");
        let volumes = self.volumes.iter().map(|(id, v)| FrozenVolume {
            record: VolumeRecord {
                id: *id,
                uuid: v.uuid,
                name: v.name.clone(),
                size_bytes: v.size_bytes,
                shared_generation: v.shared_generation,
                is_snapshot: v.is_snapshot,
                origin: v.origin,
                dirs: Vec::new(),
            },
            dirs: v.dirs[..v.dirs.iter().rposition(|dir| *dir != 0).map_or(0, |last| last + 1)].to_vec(),
        });
        if is_broken("checkpoint_overwrites_live_pages") {
            for page in std::mem::take(&mut self.list_pages) {
                self.pages.release(page);
            }
        }
        let frees = std::mem::take(&mut self.obsolete);
        self.checkpoint = Some(Box::new(Checkpoint {
            generation: self.generation,
            next_volume: self.next_volume,
            extents: self.thin.extents,
            volumes: volumes.collect(),
            chunks: self.chunks.take_dirty(everything),
            chunks_done: 0,
            dirs: self.dirs.take_dirty(everything),
            dirs_done: 0,
            list: None,
            list_pages: Vec::new(),
            ready: Vec::new(),
            allocated: Vec::new(),
            obsolete: frees.len(),
            frees,
            chunks_before: Vec::new(),
            dirs_before: Vec::new(),
            is_out_of_pages: false,
            dropped: Vec::new(),
            dropped_dirs: Vec::new(),
            recycled: Freed::default(),
        }));
        self.is_changed = false;
    }

    /// The next pages to write, at most so many; empty: that was all, and [`Metadata::checkpoint_root`] comes next.
    ///
    /// # Errors
    /// There are too few pages: the checkpoint must be given up.
    ///
    /// # Panics
    /// If none is being written.
    pub fn checkpoint_step(&mut self, pages_max: usize) -> Result<Vec<(u32, Vec<u8>)>, String> {
        let mut checkpoint = self.checkpoint.take().expect("a checkpoint is being written");
        let c = &mut *checkpoint;
        while c.ready.len() < pages_max && !c.is_out_of_pages {
            if let Some(&id) = c.chunks.get(c.chunks_done) {
                c.chunks_done += 1;
                self.write_chunk(c, id);
            } else if c.dirs_done < c.dirs.len() {
                c.dirs_done += 1;
                self.write_dir(c, c.dirs_done - 1);
            } else if c.list.is_none() {
                self.write_list(c);
            } else {
                break;
            }
        }
        let result = if c.is_out_of_pages {
            Err(format!("{} pages are too few for another checkpoint", self.pages.count()))
        } else {
            let rest = c.ready.split_off(c.ready.len().min(pages_max));
            Ok(std::mem::replace(&mut c.ready, rest))
        };
        self.checkpoint = Some(checkpoint);
        result
    }

    /// The root, when all pages are durable. `record_seq`, `log_position` and `log_batch` are what they were when the checkpoint
    /// was begun.
    ///
    /// # Panics
    /// If not all pages have been handed out.
    #[must_use]
    pub fn checkpoint_root(&self, pool: Uuid, record_seq: u64, log_position: u64, log_batch: u64) -> Root {
        let checkpoint = self.checkpoint.as_ref().expect("a checkpoint is being written");
        assert!(checkpoint.ready.is_empty() && !checkpoint.is_out_of_pages, "pages are missing");
        Root {
            pool,
            number: self.root_number + 1,
            record_seq,
            log_position,
            log_batch,
            generation: checkpoint.generation,
            next_volume: checkpoint.next_volume,
            extents: checkpoint.extents,
            volumes: checkpoint.list.expect("the list is the last that is written"),
            volume_count: u32::try_from(checkpoint.volumes.len()).expect("ids are u32"),
        }
    }

    /// `committed`: the root is durable, and what only the old tree had is free. Else it was given up: nobody will look at the
    /// pages that it wrote, and all that it would have saved is still to be saved.
    ///
    /// # Panics
    /// If none is being written; if an incomplete one is said to be durable.
    pub fn end_checkpoint(&mut self, committed: bool) {
        let c = *self.checkpoint.take().expect("a checkpoint is being written");
        if committed {
            assert!(c.list.is_some() && c.ready.is_empty() && !c.is_out_of_pages, "pages are missing");
            for page in c.frees.into_iter().chain(std::mem::replace(&mut self.list_pages, c.list_pages)) {
                self.pages.release(page);
            }
            self.root_number += 1;
        } else {
            self.is_changed = true;
            for page in c.allocated {
                self.pages.release(page);
            }
            self.obsolete.extend(&c.frees[..c.obsolete]);
            for (id, before) in c.chunks_before {
                self.chunks.get_mut(id).stored = before;
            }
            for (id, before) in c.dirs_before {
                self.dirs.get_mut(id).stored = before;
            }
            for id in c.chunks {
                let chunk = self.chunks.get_mut(id);
                chunk.is_pending = false;
                if chunk.refs > 0 {
                    self.chunks.mark_dirty(id);
                }
            }
            for (id, _) in c.dirs {
                if self.dirs.get(id).refs > 0 {
                    self.dirs.mark_dirty(id);
                }
            }
        }
        for id in c.dropped {
            self.forget_chunk(id);
        }
        for id in c.dropped_dirs {
            self.forget_dir(id);
        }
        self.chunks.recycle(&c.recycled.chunks, &c.recycled.partials);
    }

    /// A chunk is about to change: if it is part of the running checkpoint, it is written now.
    pub(super) fn write_before_change(&mut self, id: u32) {
        if !self.chunks.get(id).is_pending {
            return;
        }
        let mut checkpoint = self.checkpoint.take().expect("pending for a checkpoint");
        self.write_chunk(&mut checkpoint, id);
        self.checkpoint = Some(checkpoint);
    }

    fn write_chunk(&mut self, checkpoint: &mut Checkpoint, id: u32) {
        let chunk = self.chunks.get_mut(id);
        if !std::mem::take(&mut chunk.is_pending) {
            return; // it was about to change, and has been written
        }
        let before = chunk.stored;
        let mut entries = Box::new([0; CHUNK_ENTRIES]);
        let mut partials = Vec::with_capacity(chunk.partials.into());
        for ((index, entry), place) in (0..).zip(self.table.entries(id)).zip(entries.iter_mut()) {
            *place = entry.stored();
            if let Mapped::Partial { extent, fallback, bits, .. } = self.table.resolve(entry) {
                partials.push(PartialRecord { index, extent, fallback, bits });
            }
        }
        let mut partial_pages = [PagePtr::NONE; PARTIAL_PAGES];
        for (place, records) in partial_pages.iter_mut().zip(partials.chunks(PARTIALS_PER_PAGE)) {
            let Some(ptr) = checkpoint.add(&mut self.pages, encode_partials(records)) else { return };
            *place = ptr;
        }
        let page = ChunkPage { partial_pages, entries }.encode();
        let Some(ptr) = checkpoint.add(&mut self.pages, page) else { return };
        checkpoint.frees.extend(before.pages());
        checkpoint.chunks_before.push((id, before));
        self.chunks.get_mut(id).stored = Stored { chunk: ptr, partials: partial_pages };
    }

    fn write_dir(&mut self, checkpoint: &mut Checkpoint, at: usize) {
        let (id, ids) = &checkpoint.dirs[at];
        let (id, ids) = (*id, Arc::clone(ids));
        let mut ptrs = [PagePtr::NONE; DIR_POINTERS];
        for (place, &chunk) in ptrs.iter_mut().zip(ids.iter()).filter(|(_, chunk)| **chunk != 0) {
            *place = self.chunks.get(chunk).stored.chunk;
        }
        let Some(ptr) = checkpoint.add(&mut self.pages, encode_dir(&ptrs)) else { return };
        let before = std::mem::replace(&mut self.dirs.get_mut(id).stored, ptr);
        if !before.is_none() {
            checkpoint.frees.push(before.page);
        }
        checkpoint.dirs_before.push((id, before));
    }

    fn write_list(&mut self, checkpoint: &mut Checkpoint) {
        let records: Vec<VolumeRecord> = checkpoint
            .volumes
            .iter()
            .map(|FrozenVolume { record, dirs }| VolumeRecord {
                dirs: dirs.iter().map(|dir| self.dirs.get(*dir).stored).collect(),
                ..record.clone()
            })
            .collect();
        let (pages, allocated) = (&mut self.pages, &mut checkpoint.allocated);
        let first = allocated.len();
        let mut allocate = || {
            let page = pages.allocate()?;
            allocated.push(page);
            Some(page)
        };
        let Some((head, mut written)) = encode_volumes(&records, &mut allocate) else {
            checkpoint.is_out_of_pages = true;
            return;
        };
        checkpoint.list = Some(head);
        checkpoint.list_pages = checkpoint.allocated[first..].to_vec();
        checkpoint.ready.append(&mut written);
    }
}
